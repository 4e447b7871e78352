"""The real engine at the largest batch of each card: large at 384, bf16, ZeRO-2, five captions an image."""

import cProfile
import pstats
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from benchmarks.arithmetic import training_flops, training_linears
from benchmarks.measuring import Row, Timing, alternate, matmul_rate, peak_memory
from benchmarks.pair import PROMPT, our_inputs, random_captions, random_pixels

from blipds import distributed
from blipds.config.deepspeed import Section, load_ds_config
from blipds.config.run import load_run_config
from blipds.config.sections import Config
from blipds.engine import Engine
from blipds.models.blip.geometry import geometry_of
from blipds.monitor import NullMonitor
from blipds.planning.planner import GB, RESERVED, SLACK, ModelStates, ParameterSizes, Shape, activations, model_states
from blipds.training import building

CARDS_GB = (24, 80, 40, 16)  # the most telling first
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
        left = memory - RESERVED - self.states.held - self.states.buffers
        return max(int((left / (1 + SLACK) - self.fixed) / self.per_image), 0)


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

    def timed(self, what: str, images: int, rounds: int) -> tuple[Timing, list[float]] | None:
        """None: out of memory. Beside it the seconds until each step was launched, which a GPU does meanwhile."""
        host: list[float] = []

        def step() -> None:
            begun = time.perf_counter()
            self.step(images)
            host.append(time.perf_counter() - begun)

        try:
            # the first step makes Adam's moments, the second finds the memory for its peak
            return alternate({what: step}, rounds, self.device, warmup=2)[what], host[2:]
        except torch.OutOfMemoryError:
            self.close()
            return None

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
    """The planner's answer first, less until it fits."""
    device, started = bench.device, time.perf_counter()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min((card * GB - RESERVED) / total, 1.0), device)
    planned = images = plan.largest(min(card * GB, total))
    if at_most is not None:
        planned = images = min(images, at_most)
    timed = None
    while images > 0 and (timed := bench.timed(what, images, 1 if at_most else 4)) is None:
        images -= max(images // 12, 1)
    if timed is None:
        return Row("engine", what, "does not fit", f"{planned} images planned", None, None)
    timing, host = timed
    assert bench.engine is not None
    shape = (geometry_of(bench.engine.model), images, CAPTIONS, LENGTH, len(PROMPT))
    flops, speed = training_flops(*shape), images / timing.median
    memory = cuda_memory(device) if device.type == "cuda" else {}
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
        "planned_states": asdict(plan.states),
        "planned_per_image": plan.per_image,
        "seconds": timing.seconds,
        "host_seconds": host,
        "host_profile": host_profile(lambda: bench.step(images)),
        "seconds_in_all": time.perf_counter() - started,
        **memory,
    }
    what += f", {images} x {CAPTIONS} captions ({planned} planned; {measured / GB:.1f} GB, {forecast / GB:.1f} planned)"
    against = f"{rate / 1e12:.1f} TFLOP/s of bare products"
    return Row("engine", what, f"{speed:.1f}", against, flops / timing.median / rate, 0.5, details)


def host_profile(step: Callable[[], None]) -> list[tuple[str, int, float, float]]:
    """Where Python's time goes in a step: (function, calls, seconds in it alone, with what it calls), by the third."""
    with cProfile.Profile() as recorded:
        step()
    stats = cast(dict, pstats.Stats(recorded).stats)  # type: ignore[attr-defined]
    rows = [
        (f"{Path(file).name}:{line} {name}", calls, alone, whole)
        for (file, line, name), (_, calls, alone, whole, _) in stats.items()
    ]
    return sorted(rows, key=lambda row: -row[2])[:40]


def cuda_memory(device: torch.device) -> dict[str, float]:
    """In GB: what is held between steps, the allocator's most, and what lies outside it (context, NCCL)."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    return {
        "held_gb": torch.cuda.memory_allocated(device) / GB,
        "reserved_peak_gb": torch.cuda.max_memory_reserved(device) / GB,
        "outside_gb": (total - free - reserved) / GB,
    }
