"""What else takes time: captions, compiled layers, the loader, and where a step's time goes."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from benchmarks.generation import generation
from benchmarks.loading import IMAGE_SIZE, make_photographs
from benchmarks.measuring import Row, alternate, wait_for
from benchmarks.pair import PROMPT, SEP, Size, build_ours, our_inputs, random_captions, random_pixels
from benchmarks.training import compiled, our_step
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from blipds.data.annotations import ImageFile, Record, annotations_of
from blipds.data.datasets import CaptionDataset
from blipds.data.loader import RankShare, epoch_loader
from blipds.data.processors import BlipImageTrain, CaptionProcessor
from blipds.data.tokenizer import CaptionTokenizer
from blipds.models.blip.geometry import geometry_of
from blipds.models.generation import GenerationConfig

COSTS = 10  # of each profile


def rows(device: torch.device, folder: Path, dry: bool) -> Iterator[Row]:
    geometry, side, images, rounds = ("tiny", 64, 2, 1) if dry else ("base", 384, 64, 3)
    yield from generation(geometry, side, Size(images), rounds, device, torch.bfloat16)
    yield loader_rate(1 if dry else os.cpu_count() or 1, 64 if dry else 2048)
    yield from profiles(geometry, side, images, folder, device)
    # the CPU's compiler takes minutes
    with torch.compiler.set_stance("force_eager") if dry else nullcontext():
        yield from compiled(geometry, side, Size(2 if dry else 16), rounds, device, (torch.bfloat16,))


def loader_rate(workers: int, samples: int) -> Row:
    """640 x 480 JPEGs to the training transform at 384, through TrainLoader and its workers."""
    with tempfile.TemporaryDirectory() as folder:
        paths = make_photographs(Path(folder), 32)
        texts = ("a picture of a dog",)
        records = [Record(ImageFile(paths[n % len(paths)]), texts, str(n)) for n in range(samples)]
        dataset = CaptionDataset(
            "jpegs", annotations_of(records), BlipImageTrain(IMAGE_SIZE), CaptionProcessor(), 1, True
        )
        share = RankShare(16, 1, 0, 1)
        windows = epoch_loader([dataset], CaptionTokenizer(), share, seed=1, num_workers=workers).windows(0)
        next(windows)  # the workers have started
        started, count = time.perf_counter(), sum(1 for _ in windows)
        seconds = time.perf_counter() - started
    speed = 16 * count / seconds
    what = f"images/s of the loader, {workers} workers, 640x480 JPEGs to {IMAGE_SIZE}"
    against = f"{speed / workers:.0f} a worker"
    return Row("loader", what, f"{speed:.0f}", against, None, None, {"seconds": seconds, "workers": workers})


def profiles(geometry: str, side: int, images: int, folder: Path, device: torch.device) -> Iterator[Row]:
    """The most costly operators of a training step and of a batch of captions; traces for chrome://tracing."""
    model = build_ours(geometry, side, 0.1, device).bfloat16()
    g = geometry_of(model)
    pixels = random_pixels(images, g, device).bfloat16()
    captions = random_captions(images, 5, 12, g, device)
    prompt_ids = torch.tensor(PROMPT, device=device)
    yield from costs("a training step", our_step(model, our_inputs(pixels, captions)), folder / "step.json", device)
    model.eval()
    search = lambda: model.generate(prompt_ids, SEP, GenerationConfig(), pixel_values=pixels)  # noqa: E731
    yield from costs("captions of a batch, beam 3", search, folder / "captions.json", device)


def costs(what: str, run: Callable[[], object], trace: Path, device: torch.device) -> Iterator[Row]:
    (seconds,) = alternate({what: run}, 1, device)[what].seconds
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as recorded:
        run()
        wait_for(device)
    recorded.export_chrome_trace(str(trace))
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # operators alone: the time of a kernel is that of the operator which launched it, too
    operators = [event for event in recorded.key_averages() if event.device_type == DeviceType.CPU]
    found = sorted(operators, key=lambda event: -getattr(event, own))
    total = sum(getattr(event, own) for event in found) or 1.0
    share = total / 1e6 / seconds
    yield Row(
        "profile", f"{what}: its operators", f"{total / 1e3:.1f} ms", f"{seconds * 1e3:.1f} ms in all", share, None
    )
    for event in found[:COSTS]:
        spent = getattr(event, own)
        name = f"{what}: {event.key[:70]}, {event.count} times"
        yield Row("profile", name, f"{spent / 1000:.2f} ms", f"{total / 1000:.1f} ms in all", spent / total, None)
