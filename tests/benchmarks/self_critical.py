"""A self-critical step: all samples of an image on one encoding, against an encoding for each."""

import time
from collections.abc import Callable

import torch
from benchmarks.measuring import Row, alternate
from benchmarks.pair import PROMPT, SEP, Size, build_ours, random_captions, random_pixels
from benchmarks.training import MasterAdamW
from torch import Tensor

from blipds.data.caption_rows import caption_rows
from blipds.data.tokenizer import CaptionTokenizer
from blipds.models.blip.geometry import geometry_of
from blipds.models.generation import Drawn, SamplingConfig
from blipds.scoring.rewards import CaptionReward, RewardWeights

MAX_LEN = 20


def self_critical(
    geometry: str, image_size: int, size: Size, rounds: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Row]:
    """Random weights never end a caption: all run to 20 tokens. References are words drawn by lot, five an image."""
    model = build_ours(geometry, image_size, 0.0, device).to(dtype).eval()
    g, tokenizer = geometry_of(model), CaptionTokenizer()
    pixels = random_pixels(size.images, g, device).to(dtype)
    words = random_captions(size.images, 5, size.length, g, torch.device("cpu")).tolist()
    references = {str(n): [tokenizer.decode(ids) for ids in captions] for n, captions in enumerate(words)}
    reward = CaptionReward(references, RewardWeights(), cache_root=None)
    optimizer, spent = MasterAdamW(model), {"sampling": 0.0, "rewards": 0.0, "all": 0.0}
    prompt_ids = torch.tensor(PROMPT, device=device)

    def step(images: Tensor, samples: int) -> None:
        begun = time.perf_counter()
        embeds = model.encode(images, None)
        encoded = time.perf_counter()
        drawn: list[list[Drawn]] = [[] for _ in images]
        uniform = torch.rand(len(images), samples, MAX_LEN, device=device)
        sampling = SamplingConfig(samples, MAX_LEN)
        model.draw(embeds.detach(), prompt_ids, SEP, sampling, uniform, drawn.__setitem__)
        sampled = time.perf_counter()
        weights: list[float] = []
        for number, found in enumerate(drawn):
            texts = [tokenizer.decode(sample.ids) for sample in found]
            rewards = reward(str(number % size.images), texts, [sample.ended for sample in found])
            weights += [value for value, one in zip(rewards, found, strict=True) for _ in one.log_p]
        rewarded = time.perf_counter()
        rows = caption_rows([[one.ids for one in found] for found in drawn], PROMPT, 0)
        rows = rows._replace(label_weights=torch.tensor(weights))
        (model(image_embeds=embeds, **rows.to(device)) / len(weights)).backward()
        optimizer.step()
        spent["sampling"] += sampled - encoded
        spent["rewards"] += rewarded - sampled
        spent["all"] += time.perf_counter() - begun

    shared: Callable[[], None] = lambda: step(pixels, size.captions)  # noqa: E731
    separate: Callable[[], None] = lambda: step(pixels.repeat(size.captions, 1, 1, 1), 1)  # noqa: E731
    timings = alternate({"one encoding": shared, "an encoding each": separate}, rounds, device)
    one, each = timings["one encoding"].median, timings["an encoding each"].median
    spent = dict.fromkeys(spent, 0.0)
    shared()
    what = f"s a self-critical step, {size.images} images, {size.captions} samples"
    share = spent["rewards"] / spent["all"]
    details = {"seconds": {name: timing.seconds for name, timing in timings.items()}, "spent": spent}
    return [
        Row("self_critical", what, f"{one:.2f}", f"{each:.2f} (an encoding each)", each / one, 2.5, details),
        Row("self_critical", "the rewards' share of it", f"{share:.4f}", "-", None, None),
        Row("self_critical", "sampling's share of it", f"{spent['sampling'] / spent['all']:.2f}", "-", None, None),
    ]
