"""Log-probabilities of captions against transformers' BLIP with the same weights, and against the search's scores."""

import pytest
import torch
from checkpoint_samples import ORACLE, export, load

from blipds.data.caption_rows import caption_rows
from blipds.data.images import Images
from blipds.data.processors import BlipImageEval, load_image
from blipds.data.tokenizer import CaptionTokenizer
from blipds.models.generation import GenerationConfig, Hypotheses

SEARCHES = {
    "beams": GenerationConfig(num_captions=3),
    "greedy": GenerationConfig(num_beams=1),
    "nucleus": GenerationConfig(num_beams=1, use_nucleus_sampling=True, temperature=0.5),
    "penalised": GenerationConfig(repetition_penalty=1.5, min_len=10),
}


@pytest.fixture(scope="module")
def twin(tmp_path_factory, shared, oracle_shapes):
    """The oracle as transformers' model."""
    from transformers import BlipForConditionalGeneration

    folder = tmp_path_factory.mktemp("twin") / "hf"
    export(folder, load(shared / "oracle" / "tiny_blip.pth", oracle_shapes), ORACLE)
    return BlipForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def pixel_values(shared, golden):
    """Eight photographs."""
    folder, processor = shared / "data" / "flickr8k" / "images", BlipImageEval(96)
    pixels = torch.stack([processor(load_image(folder / name)) for name in golden["generate"]["images"][:8]])
    return Images(pixels, processor.mean, processor.std).to(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer()


def said(model, tokenizer, pixel_values, config, log_probs):
    prompt_ids, uniform = torch.tensor(tokenizer.prompt_ids), torch.rand(len(pixel_values), config.max_len)
    arguments = {"pixel_values": pixel_values, "log_probs": log_probs}
    return model.generate(prompt_ids, tokenizer.eos_token_id, config, uniform, **arguments)


@torch.no_grad()
def theirs(twin, pixels, ids, start):
    """log p of ids[start:] of one image, by transformers."""
    logits = twin(pixel_values=pixels.unsqueeze(0), input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[start:]).unsqueeze(-1)).squeeze(-1).tolist()


@pytest.mark.parametrize("config", SEARCHES.values(), ids=SEARCHES.keys())
def test_those_of_a_search_are_transformers(oracle_model, twin, pixel_values, tokenizer, config):
    torch.manual_seed(0)
    found: list[list[float]] = []
    sequences = said(oracle_model, tokenizer, pixel_values, config, found)
    assert len(sequences) == len(found) == len(pixel_values) * config.num_captions
    ended = 0
    for number, (sequence, log_probs) in enumerate(zip(sequences, found, strict=True)):
        start, words = len(tokenizer.prompt_ids), len(sequence) - len(tokenizer.prompt_ids)
        ended += len(log_probs) > words
        ids = [*sequence, tokenizer.eos_token_id][: start + len(log_probs)]
        pixels = pixel_values[number // config.num_captions]
        assert log_probs == pytest.approx(theirs(twin, pixels, ids, start), abs=1e-4)
    assert ended
    torch.manual_seed(0)
    assert said(oracle_model, tokenizer, pixel_values, config, None) == sequences  # asking changes nothing


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_they_add_up_to_the_scores_by_which_beams_are_ranked(
    oracle_model, pixel_values, tokenizer, monkeypatch, length_penalty
):
    scores = {}

    class Recording(Hypotheses):
        def best(self, count):
            scores.update({tuple(sequence): score for score, sequence, _ in self.finished})
            return super().best(count)

    monkeypatch.setattr("blipds.models.generation.Hypotheses", Recording)
    found: list[list[float]] = []
    config = GenerationConfig(num_captions=3, length_penalty=length_penalty)
    sequences = said(oracle_model, tokenizer, pixel_values[:1], config, found)
    ours = [sum(one) / len(ids) ** length_penalty for ids, one in zip(sequences, found, strict=True)]
    assert ours == pytest.approx([scores[tuple(ids)] for ids in sequences], rel=1e-6)
    assert ours == sorted(ours, reverse=True)


def test_those_of_given_captions_are_transformers(oracle_model, twin, pixel_values, tokenizer):
    """Several captions of an image in a row, none of another."""
    texts = [["two dogs play", "a skateboarder jumps over a rail in the park", "snow"], [], ["a man, who isn't there"]]
    captions = [[tokenizer.encode(tokenizer.prompt + text) for text in row] for row in texts]
    rows = caption_rows(captions, tokenizer.prompt_ids, tokenizer.pad_token_id).to(torch.device("cpu"))
    with torch.no_grad():
        found = oracle_model.log_probs(rows, oracle_model.image_encoder(pixel_values[:3]))
    assert not found.requires_grad
    start = len(tokenizer.prompt_ids)
    expected = [
        log_prob
        for pixels, row in zip(pixel_values, captions, strict=False)
        for ids in row
        for log_prob in theirs(twin, pixels, ids, start)
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
