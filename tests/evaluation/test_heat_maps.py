"""Heat maps by words: which token's attention belongs to which word."""

import pytest
import torch

from blipds.data.tokenizer import CaptionTokenizer
from blipds.evaluation import heat_maps


class Model:
    """Position t looks at patch t of 4 x 4 alone."""

    def cross_attention(self, pixel_values, input_ids):
        self.asked = input_ids.tolist()
        return torch.eye(16)[: len(input_ids)].view(-1, 4, 4)


def patches(heat):
    """The patches that count at least half as much as the brightest."""
    weights = [weight for row in heat.weights for weight in row]
    return [place for place, weight in enumerate(weights) if weight >= 0.5]


def test_a_word_is_chosen_one_position_before_it():
    """[DEC] a picture of | a skate ##board ##er: pieces of one word count together."""
    tokenizer = CaptionTokenizer()
    model = Model()
    words = heat_maps.word_maps(model, tokenizer, torch.zeros(1, 3, 8, 8), "a skateboarder jumps")
    pieces = tokenizer.tokenizer.convert_ids_to_tokens(model.asked)
    assert pieces[:5] == ["[DEC]", "a", "picture", "of", "a"] and pieces[-1] == "jumps"
    assert [heat.word for heat in words] == ["a", "skateboarder", "jumps"]
    first = len(tokenizer.prompt_ids)
    assert patches(words[0]) == [first - 1]
    assert patches(words[1]) == list(range(first, len(pieces) - 2))
    assert patches(words[2]) == [len(pieces) - 2]


@pytest.mark.parametrize("prompt", ["a black-and-white photo of ", "an x-ray  of ", ""])
def test_the_prompt_has_no_map(prompt):
    tokenizer, model = CaptionTokenizer(prompt=prompt), Model()
    words = heat_maps.word_maps(model, tokenizer, torch.zeros(1, 3, 8, 8), "a dog")
    assert model.asked == [*tokenizer.prompt_ids, 1037, 3899]
    assert [heat.word for heat in words] == ["a", "dog"]
    assert patches(words[0]) == [len(tokenizer.prompt_ids) - 1]


def test_a_caption_without_a_word_has_no_map():
    assert heat_maps.word_maps(Model(), CaptionTokenizer(), torch.zeros(1, 3, 8, 8), "") == []


def test_weights_are_scaled_from_0_to_1():
    assert heat_maps.scaled(torch.tensor([[2.0, 3.0], [4.0, 2.5]])) == [[0.0, 0.5], [1.0, 0.25]]
    assert heat_maps.scaled(torch.full((1, 2), 0.25)) == [[0.0, 0.0]]
