"""Self-critical training (Rennie et al. 2017, arXiv 1612.00563): captions of the model's own, and their rewards.

N captions are drawn for each image. The loss is -(reward - baseline) x log p(token), the mean over all sampled tokens
of the global batch; the baseline is the mean reward of the image's other samples (Luo 2020, arXiv 2003.09971), or that
of the greedy caption. One encoding of an image serves the samples and the gradient.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from blipds import distributed
from blipds.config.sections import Config
from blipds.data.caption_rows import CaptionRows, caption_rows
from blipds.data.datasets import CaptionDataset
from blipds.data.loader import Batch, ModelInputs, derive_seed
from blipds.data.tokenizer import CaptionTokenizer
from blipds.engine import Engine
from blipds.errors import UserError
from blipds.files.paths import user_path
from blipds.models.generation import Drawn, SamplingConfig, moved_to
from blipds.models.protocol import CaptioningModel
from blipds.registry import OBJECTIVES
from blipds.scoring.rewards import CaptionReward, RewardWeights
from blipds.training.objectives import CrossEntropy

EXAMPLES = 4  # images of a log step in the report
# What a caption that was broken off ends in: n-gram rewards tempt to it.
BAD_ENDINGS = {"a", "an", "and", "at", "by", "for", "from", "in", "is", "of", "on", "or", "that", "the", "to", "with"}

SUMS = ("images", "samples", "tokens", "reward", "baseline", "length", "bad_endings", "distinct_captions", "entropy")


@dataclass(frozen=True)
class Rewarded:
    """What was drawn for an image, greedy's caption not included, and what each caption is worth."""

    samples: list[Drawn]
    texts: list[str]
    rewards: list[float]
    baselines: list[float]


@dataclass
class EncodedOnce:
    """Images with what the encoder made of them, its graph included; asked a second time, they are encoded anew."""

    images: ModelInputs
    embeds: Tensor | None

    def model_inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        embeds, self.embeds = self.embeds, None
        return self.images.model_inputs(device, dtype) if embeds is None else {"image_embeds": embeds}


@OBJECTIVES.register("self_critical")
class SelfCritical(CrossEntropy):
    """Captions that the model draws are rewarded with their CIDEr-D (run.self_critical).

    `prepare` puts samples in the place of the captions of a batch; weighed by their advantages they are learnt from as
    captions are. Dropout and drop path are off, so that the log-probabilities of the gradient are those of the model
    that drew.
    """

    shown = ("reward",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.own = config.run.self_critical
        self.rewarding = ThreadPoolExecutor(max_workers=1)  # beside the device, which draws for the other images
        self.sums = dict.fromkeys(SUMS, 0.0)  # since the last log line, on this rank
        self.newest: list[dict[str, Any]] = []
        self.image_ids: dict[str, str] = {}

    def open(self, datasets: Sequence[CaptionDataset], tokenizer: CaptionTokenizer) -> list[str]:
        if not datasets:
            raise UserError(
                "run.objective self_critical counts the references of all images first: it cannot train on a stream"
            )
        own, self.tokenizer = self.own, tokenizer
        references: dict[str, dict[str, None]] = {}  # an image of two datasets has the references of both
        for record in (record for dataset in datasets for record in dataset.records):
            references.setdefault(str(record.image), {}).update(dict.fromkeys(record.captions))
            self.image_ids[str(record.image)] = str(record.image_id)
        captions = {image: list(found) for image, found in references.items()}
        weights = RewardWeights(own.cider_weight, own.bleu_weight)
        self.reward = CaptionReward(captions, weights, user_path(self.config.env.cache_root))
        longest, greedy = tokenizer.longest(self.config.run.max_len), own.baseline == "greedy"
        self.sampling = SamplingConfig(own.samples, longest, greedy, own.temperature, own.top_k, own.top_p)
        lone = sum(len(found) == 1 for found in captions.values())
        said = f"; {lone:,} images have one reference only, which makes for rough rewards" if lone else ""
        return [f"rewards from the references of {len(captions):,} images: {self.facts()['reward']}{said}"]

    def facts(self) -> dict[str, Any]:
        """How rewards are counted: they compare only with those of the same counting."""
        weights = ((self.own.cider_weight, "CIDEr-D"), (self.own.bleu_weight, "BLEU-4"))
        terms = [name if weight == 1 else f"{weight:g} {name}" for weight, name in weights if weight]
        return {"reward": f"{' + '.join(terms)}, {self.reward.counting}"}

    def prepare(self, engine: Engine, window: list[Batch], step: int) -> list[Batch]:
        """Draws for the whole window, since the number of its tokens is needed before the first backward.

        An encoder that learns keeps the graph of one micro-batch; of more it encodes without, and later once more: the
        graphs of all of them together are what accumulation is there to avoid.
        """
        gather = self.config.run.gather_for_evaluation
        any_rank = distributed.any_rank if engine.stage == 3 and not gather else None
        engine.model.eval()
        keeps = len(window) == 1 or engine.model.freeze_vit
        with torch.set_grad_enabled(keeps):
            encoded = [engine.model.encode(**inputs_of(batch.images, engine)) for batch in window]
        with engine.evaluating(gather) as model:
            drawn = [
                self.draw(model, batch.names, embeds, step, any_rank)
                for batch, embeds in zip(window, encoded, strict=True)
            ]
        engine.model.eval()
        self.newest = []
        return [
            self.learnt_from(batch, embeds if keeps else None, futures, engine)
            for batch, embeds, futures in zip(window, encoded, drawn, strict=True)
        ]

    def draw(
        self, model: CaptioningModel, names: Sequence[str], embeds: Tensor, step: int, any_rank: Any
    ) -> list[Future[Rewarded] | None]:
        """What is drawn for each image, rewarded in the background; None where there is no image ("")."""
        found: list[Future[Rewarded] | None] = [None] * len(names)

        def take(image: int, samples: list[Drawn]) -> None:
            if names[image]:
                found[image] = self.rewarding.submit(self.rewarded, names[image], samples)

        prompt_ids = moved_to(embeds.device, torch.tensor(self.tokenizer.prompt_ids))
        uniform = moved_to(embeds.device, self.uniform(names, step))
        try:
            model.draw(embeds, prompt_ids, self.tokenizer.eos_token_id, self.sampling, uniform, take, any_rank)
        except NotImplementedError:
            name = type(model).__name__
            raise UserError(f"run.objective self_critical draws captions, and {name} has no step decoder") from None
        return found

    def uniform(self, names: Sequence[str], step: int) -> Tensor:
        """Random numbers (I, samples, max_len) that depend on seed, step and image, not on batch or rank."""
        generators = [torch.Generator() for _ in names]
        for name, generator in zip(names, generators, strict=True):
            generator.manual_seed(derive_seed(self.config.run.seed, "self_critical", step, name))
        shape = (self.sampling.samples, self.sampling.max_len)
        return torch.stack([torch.rand(shape, generator=generator) for generator in generators])

    def rewarded(self, image: str, samples: list[Drawn]) -> Rewarded:
        texts = [self.tokenizer.decode(sample.ids) for sample in samples]
        rewards = self.reward(image, texts, [sample.ended for sample in samples])
        count = self.sampling.samples
        if self.sampling.greedy:
            baselines = [rewards[-1]] * count
        else:
            baselines = [(sum(rewards) - reward) / (count - 1) for reward in rewards]
        return Rewarded(samples[:count], texts[:count], rewards[:count], baselines)

    def learnt_from(
        self, batch: Batch, embeds: Tensor | None, drawn: Sequence[Future[Rewarded] | None], engine: Engine
    ) -> Batch:
        """The batch with samples in the place of its captions, or beside them (cross_entropy_weight)."""
        prompt, rewarded = self.tokenizer.prompt_ids, [found.result() if found else None for found in drawn]
        given = batch.captions.captions(prompt) if self.own.cross_entropy_weight else [[] for _ in rewarded]
        captions: list[list[list[int]]] = []
        weights: list[float] = []
        for name, found, texts in zip(batch.names, rewarded, given, strict=True):
            samples = [] if found is None else found.samples
            captions.append([*(sample.ids for sample in samples), *texts])
            for number, sample in enumerate(samples):
                assert found is not None
                weights += [found.rewards[number] - found.baselines[number]] * len(sample.log_p)
            weights += [self.own.cross_entropy_weight] * sum(len(ids) - len(prompt) for ids in texts)
            if found is not None:
                self.count(name, found)
        rows = caption_rows(captions, prompt, self.tokenizer.pad_token_id)._replace(label_weights=torch.tensor(weights))
        images = batch.images if embeds is None else EncodedOnce(batch.images, embeds)
        # on the device now, while it has nothing queued that a copy would wait for
        rows = CaptionRows(**rows.to(engine.device))
        return batch._replace(images=images, captions=rows, num_captions=sum(map(len, captions)))

    def count(self, name: str, found: Rewarded) -> None:
        """Adds an image to `metrics` and `examples`."""
        words = [text.split() for text in found.texts]
        log_p = [value for sample in found.samples for value in sample.log_p]
        values = {
            "images": 1,
            "samples": len(words),
            "tokens": len(log_p),
            "reward": sum(found.rewards),
            "baseline": sum(found.baselines),
            "length": sum(map(len, words)),
            "bad_endings": sum(bool(text) and text[-1] in BAD_ENDINGS for text in words),
            "distinct_captions": len(set(found.texts)),
            "entropy": -sum(log_p),
        }
        self.sums = {key: value + values[key] for key, value in self.sums.items()}
        if len(self.newest) < EXAMPLES:
            samples = [
                {"caption": text, "reward": round(reward, 4)}
                for text, reward in zip(found.texts, found.rewards, strict=True)
            ]
            self.newest.append(
                {
                    "image_id": self.image_ids[name],
                    "references": list(self.reward.references[name]),
                    "samples": samples,
                    "baseline": round(mean(found.baselines), 4),
                }
            )

    def metrics(self) -> dict[str, float]:
        """Means over the samples; `distinct_captions` of an image, `entropy` in nats a token: the mean of -log p."""
        sums = distributed.sum_over_ranks(torch.tensor(list(self.sums.values()), dtype=torch.float64)).tolist()
        self.sums = dict.fromkeys(SUMS, 0.0)
        images, samples, tokens, *values = sums
        divisors = {"distinct_captions": images, "entropy": tokens}
        return {name: value / max(divisors.get(name, samples), 1) for name, value in zip(SUMS[3:], values, strict=True)}

    def examples(self) -> list[dict[str, Any]]:
        return self.newest


def inputs_of(images: ModelInputs, engine: Engine) -> dict[str, Tensor | None]:
    """The arguments of `CaptioningModel.encode`."""
    return {"pixel_values": None, "image_embeds": None, **images.model_inputs(engine.device, engine.dtype)}
