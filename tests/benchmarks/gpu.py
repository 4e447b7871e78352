"""On a CUDA device: the largest batch that fits a card, and what it does with it."""

from collections.abc import Callable

import torch
from benchmarks.arithmetic import training_flops, training_linears
from benchmarks.measuring import Row, alternate, matmul_rate
from benchmarks.pair import PROMPT, build_ours, our_inputs, random_captions, random_pixels
from benchmarks.training import our_step

from blipds.models.blip.geometry import geometry_of

CARDS_GB = (16, 24, 40, 80)
LENGTH = 12


def largest(fits: Callable[[int], bool], limit: int = 1 << 14) -> int:
    """The largest batch that fits, 0 if not even one does; `fits` must hold for all below one that fits.

    Doubles until it does not fit, then halves the gap: about 2 log2(answer) tries.
    """
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def training_on_cards(geometry: str, captions: int, rounds: int, device: torch.device) -> list[Row]:
    """base_coco or large_coco at 384 in bf16 (fp32 weights and Adam's moments beside it), with and without
    activation checkpointing, on this card limited to the memory of smaller ones."""
    total = torch.cuda.get_device_properties(device).total_memory
    rows = []
    for grad_ckpt in (False, True):
        for card in CARDS_GB:
            if card * 1e9 > total * 1.1:  # an "80 GB" card has 79 to 85
                continue
            torch.cuda.set_per_process_memory_fraction(min(card * 1e9 / total, 1.0), device)
            rows.append(_on_card(geometry, captions, grad_ckpt, card, rounds, device))
            torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    return rows


def _on_card(geometry: str, captions: int, grad_ckpt: bool, card: int, rounds: int, device: torch.device) -> Row:
    what = f"images/s, {geometry} at 384, bf16, {card} GB" + (", activation checkpointing" if grad_ckpt else "")
    try:
        model = build_ours(geometry, 384, 0.1, device, grad_ckpt).bfloat16()
    except torch.cuda.OutOfMemoryError:
        return Row("gpu", what, "does not fit", "-", None, None)
    g = geometry_of(model)

    def step(images: int) -> Callable[[], None]:
        pixels = random_pixels(images, g, device).bfloat16()
        return our_step(model, our_inputs(pixels, random_captions(images, captions, LENGTH, g, device)))

    def fits(images: int) -> bool:
        try:
            run = step(images)
            for _ in range(2):  # the first makes Adam's moments
                run()
            torch.cuda.synchronize(device)
            return True
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            model.zero_grad()
            torch.cuda.empty_cache()

    images = largest(fits)
    if images == 0:
        return Row("gpu", what, "does not fit", "-", None, None)
    timing = alternate({what: step(images)}, rounds, device, warmup=2)[what]
    shape = (g, images, captions, LENGTH, len(PROMPT))
    flops = training_flops(*shape)
    rate = matmul_rate(training_linears(*shape), device, torch.bfloat16)
    return Row(
        "gpu",
        f"{what}, {images} images x {captions} captions",
        f"{images / timing.median:.1f}",
        f"{rate / 1e12:.0f} TFLOP/s of bare products",
        flops / timing.median / rate,
        None,
        {
            "images": images,
            "images_per_s": images / timing.median,
            "tflop_per_s": flops / timing.median / 1e12,
            "matmul_tflop_per_s": rate / 1e12,
            "mfu": flops / timing.median / rate,
            "peak_gb": timing.peak_bytes / 1e9,
            "seconds": timing.seconds,
        },
    )
