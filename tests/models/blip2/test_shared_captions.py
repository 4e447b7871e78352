"""Captions of an image share all that is in front of them; what each learns is what it would learn alone."""

from itertools import islice

import pytest
import torch

from blipds.data.caption_rows import caption_rows
from blipds.data.tokenizer import caption_tokenizer
from blipds.models.generation import GenerationConfig

TEXTS = [
    ["a dog runs", "a black dog is running after a white dog in the snow", "two dogs", "snow", "dogs play outside"],
    ["a man in a red shirt", "a person sits on a bench"],
    [],
    ["a girl jumps into a pool"],
]


def gradients(model, captions, tokenizer, pixel_values):
    rows = caption_rows(captions, tokenizer.prompt_ids, tokenizer.pad_token_id)
    loss = model(**rows.to(torch.device("cpu")), pixel_values=pixel_values)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def test_shared_captions_equal_separate_pairs(build, config):
    tokenizer, model = caption_tokenizer(config.model), build().train()
    captions = [[tokenizer.encode(tokenizer.prompt + text) for text in row] for row in TEXTS]
    pixel_values = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    shared_loss, shared = gradients(model, captions, tokenizer, pixel_values)
    pairs = [(image, [caption]) for image, row in enumerate(captions) for caption in row]
    pixels_of_pairs = pixel_values[[image for image, _ in pairs]]
    pair_loss, separate = gradients(model, [row for _, row in pairs], tokenizer, pixels_of_pairs)
    torch.testing.assert_close(shared_loss, pair_loss, rtol=1e-5, atol=0)
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert shared.keys() == separate.keys() == learns
    assert {name.partition(".")[0] for name in learns} == {"visual_encoder", "bridge"}
    for name, gradient in separate.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item() + 1e-6)


@torch.no_grad()
def test_log_probabilities_of_shared_captions_are_those_of_the_search(build, config):
    """Whatever greedy search says of three images, given back as candidates, all in the row of each."""
    tokenizer, model = caption_tokenizer(config.model), build()
    found: list[list[float]] = []
    pixel_values = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    prompt_ids = torch.tensor(tokenizer.prompt_ids)
    generation = GenerationConfig(num_beams=1, max_len=24)
    arguments = {"pixel_values": pixel_values, "log_probs": found}
    sequences = model.generate(prompt_ids, tokenizer.eos_token_id, generation, **arguments)
    captions = [[[*sequence, tokenizer.eos_token_id]] * 2 for sequence in sequences]
    rows = caption_rows(captions, tokenizer.prompt_ids, tokenizer.pad_token_id).to(torch.device("cpu"))
    log_probs = iter(model.log_probs(rows, model.image_encoder(pixel_values)).tolist())
    for row, expected in zip(captions, found, strict=True):
        for ids in row:
            again = list(islice(log_probs, len(ids) - len(prompt_ids)))
            assert again[: len(expected)] == pytest.approx(expected, abs=1e-4)


def test_an_image_without_captions_learns_nothing(build, config):
    """As a filler at the end of an epoch, or a photograph that cannot be read."""
    tokenizer, model = caption_tokenizer(config.model), build().train()
    loss, found = gradients(model, [[], []], tokenizer, torch.randn(2, 3, 56, 56))
    assert loss == 0 and all(not gradient.any() for gradient in found.values())
