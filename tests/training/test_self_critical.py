"""Self-critical training on a tiny captioner: its gradient against autograd of the written formula."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from blipds.config.run import load_run_config
from blipds.config.sections import Config, RunConfig, SelfCriticalConfig
from blipds.data.caption_rows import caption_rows
from blipds.data.images import ImageEmbeds
from blipds.data.loader import Batch
from blipds.errors import UserError
from blipds.models.blip.model import BlipCaption
from blipds.models.blip.text_decoder import TextConfig, TextDecoder
from blipds.models.generation import Drawn
from blipds.registry import OBJECTIVES
from blipds.scoring.rewards import CaptionReward

PROMPT, SEP, PAD = [1, 2], 3, 0
WIDTH = 8
LONGEST = 6
TINY = TextConfig(
    vocab_size=12,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=LONGEST,
    hidden_dropout_prob=0.5,  # which must not matter
    initializer_range=0.5,
)


class Words:
    """A tokenizer whose words are numbers."""

    prompt_ids, eos_token_id, pad_token_id = PROMPT, SEP, PAD

    def decode(self, ids):
        return " ".join(str(token) for token in ids[len(PROMPT) :] if token != SEP)

    def longest(self, max_len):
        return max_len


class Encoder(nn.Module):
    """One linear layer for an encoder: images are (tokens, width) too. Counts its calls."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, images):
        self.calls += 1
        return self.linear(images)


class Pixels(ImageEmbeds):
    """Images that have yet to be encoded."""

    def model_inputs(self, device, dtype):
        return {"pixel_values": self.embeds}


@pytest.fixture
def model():
    torch.manual_seed(0)
    captioner = BlipCaption(Encoder(), TextDecoder(TINY, WIDTH))
    for parameter in captioner.parameters():
        nn.init.normal_(parameter, std=0.5)
    return captioner.train()


def engine_of(model):
    """What the objective asks of an engine."""

    @contextmanager
    def evaluating(gather):
        model.eval()
        with torch.no_grad():
            yield model
        model.train()

    return SimpleNamespace(
        model=model,
        device=torch.device("cpu"),
        dtype=torch.float32,
        stage=0,
        evaluating=evaluating,
        loss=lambda inputs: model(**inputs),
    )


IMAGES = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def batch_of(names, texts=None):
    """Images by number ("0", "1", "2"); "": one that cannot be read."""
    captions = texts or [[[*PROMPT, 7, SEP]] if name else [] for name in names]
    pixels = torch.stack([IMAGES[int(name or 0)] for name in names])
    rows = caption_rows(captions, PROMPT, PAD)
    return Batch(Pixels(pixels), rows, len(names), sum(map(len, captions)), list(names), [])


class Sums(CaptionReward):
    given = None

    def __call__(self, image, captions, ended):
        return self.given or [sum(map(int, text.split())) / 10 + end for text, end in zip(captions, ended, strict=True)]


def objective_of(**keys):
    """Its reward here: a tenth of the sum of a caption's words, which are numbers, and one more for an end."""
    run = RunConfig(objective="self_critical", self_critical=SelfCriticalConfig(**keys), max_len=LONGEST, min_len=0)
    objective = OBJECTIVES["self_critical"](Config(run=run))
    records = [SimpleNamespace(image=n, image_id=10 + n, captions=["7", "8 9"][: 2 - n // 2]) for n in range(3)]
    objective.config.env.cache_root = "/dev/null"  # keeps nothing
    objective.said = objective.open([SimpleNamespace(records=records)], Words())
    objective.reward.__class__ = Sums
    return objective


def drawn_by(objective, model, *batches, step=0):
    """What was drawn for each image, by its name, and the batches that are learnt from."""
    drawn, rewarded = {}, objective.rewarded

    def note(name, samples):
        drawn[name] = samples
        return rewarded(name, samples)

    objective.rewarded = note
    prepared = objective.prepare(engine_of(model), list(batches), step)
    return drawn, prepared


def log_p_alone(model, name, ids):
    """Of each token behind the prompt, from the plain decoder and an encoding of this caption's own."""
    embeds = model.visual_encoder(IMAGES[int(name)].unsqueeze(0))
    places = torch.arange(len(PROMPT) - 1, len(ids) - 1)
    logits = model.text_decoder(torch.tensor([ids[:-1]]), embeds, label_positions=places)
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[len(PROMPT) :]).unsqueeze(-1)).squeeze(-1)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("baseline", ["leave_one_out", "greedy"])
def test_the_gradient_is_that_of_the_written_formula(model, baseline, frozen):
    """Two images, three samples: -(reward - baseline) x log p(token), the mean over all tokens."""
    if frozen:
        model.freeze_image_encoder()
    objective = objective_of(samples=3, baseline=baseline)
    drawn, (prepared,) = drawn_by(objective, model, batch_of("01"))
    assert model.visual_encoder.calls == 1
    loss = objective.loss(engine_of(model), prepared) / objective.weight(prepared)
    assert model.visual_encoder.calls == 1  # one encoding serves samples and gradient
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    loss.backward()
    found = {name: model.get_parameter(name).grad.clone() for name in trained}

    total, tokens = torch.zeros(()), 0
    for name, samples in drawn.items():
        rewards = [sum(sample.ids[2:]) / 10 + 0.7 * sample.ended for sample in samples]  # [SEP] is 3
        for k, sample in enumerate(samples[:3]):
            others = [reward for j, reward in enumerate(rewards[:3]) if j != k]
            base = sum(others) / 2 if baseline == "leave_one_out" else rewards[3]
            total = total - (rewards[k] - base) * log_p_alone(model, name, sample.ids).sum()
            tokens += len(sample.ids) - len(PROMPT)
    assert tokens == objective.weight(prepared)
    assert loss.item() == pytest.approx((total / tokens).item(), abs=1e-6)
    model.zero_grad()
    (total / tokens).backward()
    assert max(gradient.abs().max() for gradient in found.values()) > 0.01
    for name in trained:
        torch.testing.assert_close(found[name], model.get_parameter(name).grad, atol=1e-6, rtol=1e-5)


def test_advantages_worked_out_by_hand(model):
    """Rewards of 3, 2 and 1: the others' means are 1.5, 2 and 2.5. Greedy's is 2."""
    samples = [Drawn([*PROMPT, 7, SEP], [-1.0, -2.0], True), Drawn([*PROMPT, 8], [-3.0], False)]
    objective = objective_of(samples=3)
    objective.reward.given = [3.0, 2.0, 1.0]
    found = objective.rewarded("0", [*samples, samples[0]])
    assert [r - b for r, b in zip(found.rewards, found.baselines, strict=True)] == [1.5, 0.0, -1.5]
    objective = objective_of(samples=2, baseline="greedy")
    objective.reward.given = [3.0, 1.0, 2.0]
    found = objective.rewarded("0", [*samples, samples[0]])
    assert [r - b for r, b in zip(found.rewards, found.baselines, strict=True)] == [1.0, -1.0]
    assert len(found.samples) == len(found.texts) == 2


def test_a_sample_in_its_row_is_the_sample_alone(model):
    """As it was drawn with the caches, in a row with the image's other samples, and by itself."""
    objective = objective_of(samples=5)
    drawn, (prepared,) = drawn_by(objective, model, batch_of("01"))
    inputs = prepared.model_inputs(torch.device("cpu"), torch.float32)
    start = 0
    for name in "01":
        for sample in drawn[name]:
            end = start + len(sample.log_p)
            weights = torch.zeros(len(inputs["labels"]))
            weights[start:end] = 1
            in_row = -model(**inputs | {"label_weights": weights})
            alone = log_p_alone(model, name, sample.ids).sum()
            assert in_row.item() == pytest.approx(alone.item(), abs=1e-5)
            assert sum(sample.log_p) == pytest.approx(alone.item(), abs=1e-5)
            start = end
    assert start == len(inputs["labels"])


def test_samples_depend_on_seed_step_and_image_alone(model):
    objective = objective_of(samples=4)
    first, _ = drawn_by(objective, model, batch_of("012"))
    other_batches, _ = drawn_by(objective, model, batch_of("2"), batch_of(["1", "", "0"]))
    ids = {name: [sample.ids for sample in samples] for name, samples in first.items()}
    assert {name: [sample.ids for sample in samples] for name, samples in other_batches.items()} == ids
    next_step, _ = drawn_by(objective, model, batch_of("012"), step=1)
    assert all([sample.ids for sample in next_step[name]] != ids[name] for name in ids)
    objective.config.run.seed += 1
    assert [sample.ids for sample in drawn_by(objective, model, batch_of("012"))[0]["0"]] != ids["0"]


def test_an_accumulated_window_has_the_same_gradient(model):
    """Of two micro-batches, without keeping the encoder's graphs; with a filler and an image that cannot be read."""
    objective, engine = objective_of(samples=3), engine_of(model)
    _, whole = drawn_by(objective, model, batch_of("01"))
    _, parts = drawn_by(objective, model, batch_of(["0", ""]), batch_of(["", "1"]))
    one, two = (sum(objective.loss(engine, batch) for batch in window) for window in (whole, parts))
    assert sum(map(objective.weight, whole)) == sum(map(objective.weight, parts))
    expected = gradients(model, one)
    for name, gradient in gradients(model, two).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)


def test_a_second_look_encodes_anew(model):
    """For the search of numbers that are not finite, after the graph is gone."""
    objective, engine = objective_of(samples=3), engine_of(model)
    _, (prepared,) = drawn_by(objective, model, batch_of("01"))
    first = gradients(model, objective.loss(engine, prepared))
    second = gradients(model, objective.loss(engine, prepared))
    assert model.visual_encoder.calls == 2
    for name in first:
        torch.testing.assert_close(first[name], second[name])


def test_training_captions_beside_the_samples(model):
    """Their tokens weigh cross_entropy_weight each, and count in the mean."""
    texts = [[[*PROMPT, 7, 8, SEP], [*PROMPT, SEP]], [[*PROMPT, 9, SEP]]]
    objective = objective_of(samples=2, cross_entropy_weight=0.25)
    drawn, (prepared,) = drawn_by(objective, model, batch_of("01", texts))
    labels, weights = prepared.captions.labels.tolist(), prepared.captions.label_weights.tolist()
    sampled = [[token for sample in drawn[name] for token in sample.ids[len(PROMPT) :]] for name in "01"]
    assert labels == [*sampled[0], 7, 8, SEP, SEP, *sampled[1], 9, SEP]
    assert weights[len(sampled[0]) : len(sampled[0]) + 4] == [0.25] * 4 and weights[-2:] == [0.25] * 2
    assert objective.weight(prepared) == len(labels)
    assert prepared.num_captions == 7


def test_nothing_readable_is_nothing_to_learn(model):
    objective = objective_of(samples=2)
    _, (prepared,) = drawn_by(objective, model, batch_of(["", ""]))
    assert objective.weight(prepared) == 0
    assert objective.loss(engine_of(model), prepared).item() == 0
    assert objective.metrics()["reward"] == 0


def test_what_is_seen_of_it():
    """Two samples: 'a dog with', cut, and 'dogs', whose rewards are 0.5 and 1.5."""
    objective = objective_of(samples=2)
    objective.tokenizer.decode = lambda ids: {8: "a dog with", 9: "dogs"}[ids[2]]
    objective.reward.given = [0.5, 1.5]
    samples = [Drawn([*PROMPT, 8, 8, 8, 8], [-1.0] * 4, False), Drawn([*PROMPT, 9, SEP], [-2.0, -3.0], True)]
    objective.count("0", objective.rewarded("0", samples))
    assert objective.metrics() == {
        "reward": 1.0,
        "baseline": 1.0,
        "length": 2.0,
        "bad_endings": 0.5,
        "distinct_captions": 2.0,
        "entropy": 1.5,
    }
    (example,) = objective.examples()
    assert example["image_id"] == "10" and example["references"] == ["7", "8 9"]
    assert example["samples"] == [{"caption": "a dog with", "reward": 0.5}, {"caption": "dogs", "reward": 1.5}]
    assert objective.said == [
        "rewards from the references of 3 images: CIDEr-D, PTB tokens, end token counted; 1 images have one reference "
        "only, which makes for rough rewards"
    ]
    assert objective_of(bleu_weight=0.5).facts() == {"reward": "CIDEr-D + 0.5 BLEU-4, PTB tokens, end token counted"}


def error(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


def test_mistakes_get_one_line(model, tmp_path):
    def config(text):
        (tmp_path / "run.yaml").write_text(f"run: {{{text}}}")
        return load_run_config(tmp_path / "run.yaml")

    nucleus_beside_beams = "objective: self_critical, num_beams: 3, self_critical: {top_p: 0.9, top_k: 50}"
    assert config(nucleus_beside_beams)[0].run.self_critical.top_k == 50  # no conflict
    one = "run.self_critical.samples is 1; allowed: 2 or more with baseline leave_one_out, 1 with greedy"
    assert error(config, "self_critical: {samples: 1}") == one
    assert config("self_critical: {samples: 1, baseline: greedy}")
    nothing = "run.self_critical: cider_weight and bleu_weight are 0, so that nothing is rewarded"
    assert error(config, "self_critical: {cider_weight: 0}") == nothing
    assert error(config, "self_critical: {baseline: gredy}") == (
        "run.self_critical.baseline is 'gredy'; did you mean 'greedy'? allowed: greedy, leave_one_out"
    )
    assert error(config, "self_critical: {sample: 5}").startswith("unknown key run.self_critical.sample; did you mean")
    assert error(config, "self_critical: {top_p: 1.5}").endswith("allowed: more than 0, at most 1, or null")
    stream = "run.objective self_critical counts the references of all images first: it cannot train on a stream"
    assert error(OBJECTIVES["self_critical"](Config()).open, [], Words()) == stream
    model.step_decoder = lambda *arguments: (_ for _ in ()).throw(NotImplementedError)
    without = "run.objective self_critical draws captions, and BlipCaption has no step decoder"
    assert error(objective_of().prepare, engine_of(model), [batch_of("0")], 0) == without
