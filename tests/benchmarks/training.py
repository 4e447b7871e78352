"""Training steps: captions a second, the share of the matmul rate, and the memory of the activations.

What a step is, on both sides: loss, backward, torch's fused AdamW, gradients let go. In bf16 ours keeps fp32 weights
for the optimizer, as DeepSpeed does.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from benchmarks.arithmetic import training_flops, training_linears
from benchmarks.measuring import Row, SavedBytes, alternate, matmul_rate, peak_memory, reset_peak_memory
from benchmarks.pair import (
    PROMPT,
    Size,
    build_ours,
    our_inputs,
    random_captions,
    random_pixels,
    their_inputs,
    transformers_twin,
)
from torch import Tensor, nn

from blipds.engine import flash_in_training
from blipds.models.blip.geometry import geometry_of
from blipds.models.blip.model import BlipCaption

LR = 1e-5


class MasterAdamW:
    """Fused AdamW on fp32 copies of weights of any precision."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.fp32 = self.weights[0].dtype == torch.float32
        self.masters = self.weights if self.fp32 else [p.detach().float() for p in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=LR, weight_decay=0.05, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        if not self.fp32:
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.fp32:
            torch._foreach_copy_(self.weights, self.masters)


def our_step(model: BlipCaption, inputs: dict[str, Tensor]) -> Callable[[], None]:
    """The step of `Trainer.train_step` on one rank without its counting. `inputs`: pixels in the model's precision."""
    dtype = next(model.parameters()).dtype
    device = inputs["pixel_values"].device
    optimizer = MasterAdamW(model)

    def step() -> None:
        torch.backends.cuda.enable_flash_sdp(flash_in_training(device.type, dtype))
        loss = model(**inputs) / len(inputs["labels"])
        loss.backward()
        optimizer.step()

    return step


def their_step(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], None]:
    optimizer = MasterAdamW(model)

    def step() -> None:
        torch.backends.cuda.enable_flash_sdp(True)
        model(**inputs).loss.backward()
        optimizer.step()

    return step


def training(
    geometry: str, image_size: int, size: Size, dropout: float, rounds: int, device: torch.device
) -> list[Row]:
    """Ours at one and at all captions an image, fp32 and bf16, against transformers at one caption in fp32."""
    model = build_ours(geometry, image_size, dropout, device)
    g = geometry_of(model)
    pixels = random_pixels(size.images, g, device)
    captions = random_captions(size.images, size.captions, size.length, g, device)
    twin = transformers_twin(model)
    half = build_ours(geometry, image_size, dropout, device).bfloat16()

    one, several = our_inputs(pixels, captions[:, :1]), our_inputs(pixels, captions)
    several_bf16 = {**several, "pixel_values": pixels.bfloat16()}
    theirs = their_inputs(pixels, captions[:, 0])
    difference = abs((model.eval()(**one) / len(one["labels"]) - twin.eval()(**theirs).loss).item())
    assert difference < 1e-3, f"the two sides' losses differ by {difference}: not the same model"
    sides = {
        "transformers, 1 caption, fp32": their_step(twin.train(), theirs),
        "ours, 1 caption, fp32": our_step(model.train(), one),
        f"ours, {size.captions} captions, fp32": our_step(model, several),
        f"ours, {size.captions} captions, bf16": our_step(half, several_bf16),
    }
    timings = alternate(sides, rounds, device)
    rates = {}
    for dtype, count in ((torch.float32, 1), (torch.float32, size.captions), (torch.bfloat16, size.captions)):
        linears = training_linears(g, size.images, count, size.length, len(PROMPT))
        rates[dtype, count] = matmul_rate(linears, device, dtype)

    baseline_name, *our_names = sides
    baseline = size.images / timings[baseline_name].median
    rows = []
    settings = [
        (1, torch.float32, 1.05, None),
        (size.captions, torch.float32, 4.5, 0.80),
        (size.captions, torch.bfloat16, 8.0, 0.65),
    ]
    for name, (count, dtype, goal, share_goal) in zip(our_names, settings, strict=True):
        timing = timings[name]
        speed = size.images * count / timing.median
        flops = training_flops(g, size.images, count, size.length, len(PROMPT))
        share = flops / timing.median / rates[dtype, count]
        details = {
            "seconds": timing.seconds,
            "gflop_a_step": flops / 1e9,
            "gflop_per_s": flops / timing.median / 1e9,
            "matmul_gflop_per_s": rates[dtype, count] / 1e9,
            "share_of_matmul_rate": share,
            "peak_gb": timing.peak_bytes / 1e9,
            "transformers_seconds": timings[baseline_name].seconds,
            "transformers_peak_gb": timings[baseline_name].peak_bytes / 1e9,
        }
        what = name.removeprefix("ours, ")
        rows.append(
            Row(
                "training",
                f"captions/s, {what}",
                f"{speed:.2f}",
                f"{baseline:.2f} (transformers, 1 caption, fp32)",
                speed / baseline,
                goal,
                details,
            )
        )
        rows.append(
            Row(
                "training",
                f"share of the matmul rate, {what}",
                f"{flops / timing.median / 1e9:.0f} GFLOP/s",
                f"{rates[dtype, count] / 1e9:.0f} GFLOP/s",
                share,
                share_goal,
                {},
            )
        )
    return rows


def activation_memory(geometry: str, image_size: int, size: Size, dropout: float, device: torch.device) -> list[Row]:
    """Several captions that share an image against as many separate pairs of image and caption."""
    model = build_ours(geometry, image_size, dropout, device)
    g = geometry_of(model)
    pixels = random_pixels(size.images, g, device)
    captions = random_captions(size.images, size.captions, size.length, g, device)
    torch.backends.cuda.enable_flash_sdp(flash_in_training(device.type, torch.float32))
    shared = our_inputs(pixels, captions)
    pairs = our_inputs(pixels.repeat_interleave(size.captions, dim=0), captions.flatten(0, 1).unsqueeze(1))
    sharing, separate = (activation_bytes(model, inputs, device) for inputs in (shared, pairs))
    how = "max_memory_allocated" if device.type == "cuda" else "what autograd saves"
    return [
        Row(
            "memory",
            f"activations, {size.captions} captions an image, fp32 ({how})",
            f"{sharing / 1e9:.2f} GB",
            f"{separate / 1e9:.2f} GB (separate pairs)",
            separate / sharing,
            3.0,
            {"shared_bytes": sharing, "separate_bytes": separate},
        )
    ]


def activation_bytes(model: BlipCaption, inputs: dict[str, Tensor], device: torch.device) -> int:
    """A step's memory beyond weights and gradients: the peak on a GPU, on a CPU what the backward pass waits for."""
    if device.type != "cuda":
        with SavedBytes(model.parameters()) as saved:
            model(**inputs)
        return saved.total
    model(**inputs).backward()  # allocates the gradients
    reset_peak_memory(device)
    before = torch.cuda.memory_allocated(device)
    model(**inputs).backward()
    return peak_memory(device) - before


def compiled(
    geometry: str,
    image_size: int,
    size: Size,
    rounds: int,
    device: torch.device,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
) -> list[Row]:
    """Our training step with run.compile against the same step without; no dropout."""
    rows = []
    for dtype in dtypes:
        model = build_ours(geometry, image_size, 0.0, device).to(dtype)
        g = geometry_of(model)
        pixels = random_pixels(size.images, g, device).to(dtype)
        inputs = our_inputs(pixels, random_captions(size.images, size.captions, size.length, g, device))
        faster = copy.deepcopy(model)
        faster.compile_layers()
        sides = {"compiled": our_step(faster, inputs), "eager": our_step(model, inputs)}
        first = alternate({"compilation": sides["compiled"]}, 1, device, warmup=0)["compilation"].median
        timings = alternate(sides, rounds, device)
        quick, plain = timings["compiled"].median, timings["eager"].median
        precision = "fp32" if dtype == torch.float32 else "bf16"
        rows.append(
            Row(
                "compile",
                f"training step, {size.captions} captions, {precision}, run.compile",
                f"{quick:.3f} s (first step {first:.0f} s)",
                f"{plain:.3f} s (eager)",
                plain / quick,
                None,
                {"compiled_seconds": timings["compiled"].seconds, "eager_seconds": timings["eager"].seconds},
            )
        )
    return rows
