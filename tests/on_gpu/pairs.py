"""A training step against transformers' BLIP: the same weights, one caption an image, bf16, side by side."""

from collections.abc import Iterator
from pathlib import Path

import torch
from benchmarks.measuring import Row, alternate
from benchmarks.pair import build_ours, our_inputs, random_captions, random_pixels, their_inputs, transformers_twin
from benchmarks.training import our_step, their_step

from blipds.models.blip.geometry import geometry_of

LENGTH = 12  # tokens of a caption, the prompt's four and [SEP] included


def rows(device: torch.device, folder: Path, dry: bool) -> Iterator[Row]:
    geometry, side, images, rounds = ("tiny", 64, 2, 1) if dry else ("large", 384, 16, 5)
    ours = build_ours(geometry, side, 0.0, device).bfloat16()
    g = geometry_of(ours)
    theirs = transformers_twin(ours).bfloat16()
    pixels = random_pixels(images, g, device).bfloat16()
    captions = random_captions(images, 1, LENGTH, g, device)
    sides = {
        "ours": our_step(ours, our_inputs(pixels, captions)),
        "transformers": their_step(theirs, their_inputs(pixels, captions[:, 0])),
    }
    found = alternate(sides, rounds, device, warmup=2)
    mine, other = found["ours"], found["transformers"]
    details = {name: {"seconds": side.seconds, "peak_gb": side.peak_bytes / 1e9} for name, side in found.items()}
    what = f"images/s of training, {geometry} at {side}, bf16, {images} images x 1 caption"
    speed, theirs_speed = images / mine.median, images / other.median
    yield Row("pairs", what, f"{speed:.1f}", f"{theirs_speed:.1f} (transformers)", speed / theirs_speed, None, details)
