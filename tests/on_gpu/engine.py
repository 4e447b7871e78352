"""The real engine at the largest batch of each card: large at 384, bf16, ZeRO-2, five captions an image."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks.arithmetic import training_flops, training_linears
from benchmarks.measuring import Row, alternate, matmul_rate, peak_memory, reset_peak_memory, wait_for
from benchmarks.pair import PROMPT, our_inputs, random_captions, random_pixels

from blipds import distributed
from blipds.config.deepspeed import Section, load_ds_config
from blipds.config.run import load_run_config
from blipds.config.sections import Config
from blipds.engine import Engine
from blipds.models.blip.geometry import geometry_of
from blipds.monitor import NullMonitor
from blipds.planning.planner import GB, RESERVED, ModelStates, ParameterSizes, Shape, activations, model_states
from blipds.training import building

CARDS_GB = (24, 80, 40, 16)  # the most telling first
CONTEXT = 0.6 * GB  # of CUDA itself, which the allocator's limit leaves out
CAPTIONS, LENGTH = 5, 12
CHECKPOINTED = ["model.vit_grad_ckpt=true", "model.text_grad_ckpt=true"]


@dataclass
class Plan:
    """The planner's forecast, linear in the images of a micro-batch."""

    states: ModelStates
    fixed: float
    per_image: float

    @classmethod
    def of(cls, config: Config, ds: Section) -> "Plan":
        few, more = (activations(config, Shape(n, CAPTIONS, LENGTH, len(PROMPT)), torch.bfloat16)[1] for n in (2, 4))
        per_image = (more - few) / 2
        return cls(model_states(ParameterSizes.of(config), ds, ranks=1), few - 2 * per_image, per_image)

    def tensors(self, images: int) -> float:
        """Bytes of all tensors at the peak."""
        training = self.states.held + self.states.buffers + self.fixed + images * self.per_image
        return max(training, self.states.held + self.states.update)

    def largest(self, memory: float) -> int:
        return max(int((memory - RESERVED - self.tensors(0)) / self.per_image), 0)


class Bench:
    """An engine, built anew when a step ran out of memory: what DeepSpeed then holds of it is unknown."""

    def __init__(self, config: Config, ds: Section, folder: Path, device: torch.device) -> None:
        self.parts = config, ds, folder, None, NullMonitor()
        self.device = device
        self.engine: Engine | None = None
        self.inputs: dict[int, dict[str, torch.Tensor]] = {}  # of the last number of images

    def step(self, images: int) -> None:
        if self.engine is None:
            self.engine = building.build_engine(*self.parts)
            self.engine.train()
        engine, g = self.engine, geometry_of(self.engine.model)
        if images not in self.inputs:
            pixels = random_pixels(images, g, self.device).bfloat16()
            captions = random_captions(images, CAPTIONS, LENGTH, g, self.device)
            self.inputs = {images: our_inputs(pixels, captions)}
        inputs = self.inputs[images]
        engine.backward(engine.loss(inputs) / len(inputs["labels"]))
        engine.step(1e-5, measure=False)

    def fits(self, images: int) -> bool:
        try:
            for _ in range(2):  # the first makes Adam's moments
                self.step(images)
            wait_for(self.device)
            return True
        except torch.OutOfMemoryError:
            self.close()
            return False

    def close(self) -> None:
        self.inputs = {}
        if self.engine is not None:
            self.engine.close()
            self.engine = None


def rows(device: torch.device, folder: Path, dry: bool) -> Iterator[Row]:
    distributed.initialise()
    path, name = ("tests/shapes_tiny.yaml", "tiny") if dry else ("run_configs/caption_coco_large.yaml", "large")
    random = ["model.load_pretrained=false", "model.load_finetuned=false"]
    for checkpointing in (False, True):
        config, _ = load_run_config(Path(path), [*random, *(CHECKPOINTED if checkpointing else [])])
        raw = load_ds_config("ds_configs/zero2.json")
        for held in ("bf16", "fp16"):
            raw[held]["enabled"] = held == "bf16"
        if dry:
            raw["optimizer"]["params"]["torch_adam"] = True  # nothing to compile
            raw["zero_optimization"] |= {"reduce_bucket_size": 10**6, "allgather_bucket_size": 10**6}
        ds = building.resolve(config, raw, device, "zero2.json")
        plan, bench = Plan.of(config, ds), Bench(config, ds, folder, device)
        total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 10 * GB
        for card in (2,) if dry else CARDS_GB:
            if card * GB <= 1.1 * total:  # an "80 GB" card has 79 to 85
                what = f"images/s, {name} at {config.model.image_size}, bf16, ZeRO-2, {card} GB"
                what += ", activation checkpointing" if checkpointing else ""
                yield on_card(bench, plan, what, card, total, 2 if dry else None)
        bench.close()


def on_card(bench: Bench, plan: Plan, what: str, card: int, total: float, at_most: int | None) -> Row:
    """The planner's answer first; then a twelfth more, or less until it fits."""
    device, started = bench.device, time.perf_counter()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min((card * GB - CONTEXT) / total, 1.0), device)
    planned = images = plan.largest(min(card * GB, total))
    if at_most is not None:
        planned = images = min(images, at_most)
    while images > 0 and not bench.fits(images):
        images -= max(images // 12, 1)
    more = images + max(images // 12, 1)
    if images == planned and images > 0 and at_most is None and bench.fits(more):
        images = more
    if images == 0:
        return Row("engine", what, "does not fit", f"{planned} images planned", None, None)
    bench.step(images)
    reset_peak_memory(device)
    timing = alternate({what: lambda: bench.step(images)}, 1 if at_most else 4, device)[what]
    assert bench.engine is not None
    shape = (geometry_of(bench.engine.model), images, CAPTIONS, LENGTH, len(PROMPT))
    flops, speed = training_flops(*shape), images / timing.median
    rate = matmul_rate(training_linears(*shape), device, torch.bfloat16)
    measured, forecast = max(timing.peak_bytes, peak_memory(device)), plan.tensors(images)
    details = {
        "images": images,
        "planned_images": planned,
        "images_per_s": speed,
        "tflop_per_s": flops / timing.median / 1e12,
        "matmul_tflop_per_s": rate / 1e12,
        "peak_gb": measured / GB,
        "planned_gb": forecast / GB,
        "planned_over_measured": forecast / measured,
        "seconds": timing.seconds,
        "search_seconds": time.perf_counter() - started,
    }
    what += f", {images} x {CAPTIONS} captions ({planned} planned; {measured / GB:.1f} GB, {forecast / GB:.1f} planned)"
    against = f"{rate / 1e12:.1f} TFLOP/s of bare products"
    return Row("engine", what, f"{speed:.1f}", against, flops / timing.median / rate, 0.5, details)
