"""Samples to learn from, drawn by a tiny captioner: their frequencies are those of its softmax."""

import pytest
import torch
from torch import nn

from blipds.models.blip.model import BlipCaption
from blipds.models.blip.text_decoder import TextConfig, TextDecoder
from blipds.models.generation import GenerationConfig, SamplingConfig, draw_tokens


def draw(model, samples, **config):
    """Captions of two images of noise, with one stream of random numbers each."""
    config = SamplingConfig(samples=samples, **{"max_len": 5, **config})
    uniform = torch.stack([torch.rand(samples, 5, generator=torch.Generator().manual_seed(i)) for i in (7, 8)])
    found = {}
    model.draw(NOISE, torch.tensor([1, 2]), 3, config, uniform, found.__setitem__)
    return found


NOISE = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def tiny():
    """A captioner of 12 words with random weights; [1, 2] is the prompt, and 3 ends a caption."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(5)
    model = BlipCaption(nn.Identity(), TextDecoder(TextConfig(vocab_size=12, max_position_embeddings=8, **sizes), 8))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def softmax_after(tiny, image, words):
    logits = tiny.text_decoder(torch.tensor([[1, 2, *words]]), NOISE[image : image + 1])
    return logits.softmax(-1)[0].double()


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


@torch.no_grad()
def test_frequencies_of_samples_agree_with_the_softmax(tiny):
    """20,000 draws; with 11 degrees of freedom chi-square is above 31.3 once in a thousand times."""
    for image, samples in draw(tiny, 20_000).items():
        first = torch.tensor([sample.ids[2] for sample in samples])
        assert chi_square(first.bincount(minlength=12), softmax_after(tiny, image, [])) < 31.3
        word = next(token for token in first.bincount(minlength=12).argsort(descending=True).tolist() if token != 3)
        second = torch.tensor([sample.ids[3] for sample in samples if sample.ids[2] == word])
        assert len(second) > 2000
        assert chi_square(second.bincount(minlength=12), softmax_after(tiny, image, [word])) < 31.3
        assert all(sample.ended == (sample.ids[-1] == 3) and sample.ids.count(3) <= 1 for sample in samples)
        assert all(sample.ended or len(sample.ids) == 5 for sample in samples)
        assert all(len(sample.log_p) == len(sample.ids) - 2 for sample in samples)


@torch.no_grad()
def test_temperature_top_k_and_top_p_of_samples(tiny):
    plain = softmax_after(tiny, 0, [])
    likeliest = plain.argsort(descending=True).tolist()
    sharp = (plain**4) / (plain**4).sum()
    found = draw(tiny, 5000, temperature=0.25)[0]
    assert chi_square(torch.tensor([sample.ids[2] for sample in found]).bincount(minlength=12), sharp) < 31.3
    two = draw(tiny, 500, top_k=2)[0]
    assert {sample.ids[2] for sample in two} == set(likeliest[:2])
    top_p = (plain[likeliest[0]] + plain[likeliest[1]] / 2).item()  # reached by the second
    assert {sample.ids[2] for sample in draw(tiny, 500, top_p=top_p)[0]} == set(likeliest[:2])
    total = plain[likeliest[:2]].sum()
    for sample in two:
        assert sample.log_p[0] == pytest.approx((plain[sample.ids[2]] / total).log().item(), abs=1e-5)


def test_the_greedy_caption_beside_the_samples(tiny):
    config = GenerationConfig(num_beams=1, max_len=5, min_len=0)
    greedy = tiny.generate(torch.tensor([1, 2]), 3, config, image_embeds=NOISE)
    for image, samples in draw(tiny, 3, greedy=True).items():
        assert len(samples) == 4
        assert samples[3].ids == greedy[image] + [3] * samples[3].ended
        assert [sample.ids for sample in samples[:3]] == [sample.ids for sample in draw(tiny, 3)[image]]


def test_a_random_number_near_one_draws_no_impossible_token():
    logits = torch.full((1, 1, 1000), -torch.inf)
    logits[..., :900] = torch.randn(900, generator=torch.Generator().manual_seed(0))
    config = SamplingConfig(samples=1, max_len=5)
    for last in torch.linspace(1 - 2**-20, 1 - 2**-24, 50):
        token, log_p = draw_tokens(logits, last.view(1, 1), config)
        assert token.item() < 900 and log_p.isfinite()
