"""How the benchmarks measure: sides that alternate, medians, the machine's matmul rate, peak memory."""

import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.arithmetic import Linear
from tqdm import tqdm


@dataclass(frozen=True)
class Row:
    """A line of the table. `ratio` is what the goal is about: ours over theirs, or a share."""

    benchmark: str
    what: str
    ours: str
    against: str
    ratio: float | None
    goal: float | None
    details: Mapping[str, Any] = field(default_factory=dict)


def line_of(row: Row) -> str:
    """Markdown."""
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    goal = "" if row.goal is None else f"{row.goal:g}"
    return f"| {row.what} | {row.ours} | {row.against} | {ratio} | {goal} |"


@dataclass(frozen=True)
class Timing:
    seconds: list[float]
    peak_bytes: int  # of the whole process on a CPU, of torch's allocations on a GPU

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def alternate(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Runs the sides in turn, so that a busy minute of the machine meets all of them; warm-up rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks = dict.fromkeys(sides, 0)
    progress = tqdm(total=(warmup + rounds) * len(sides), unit="run", leave=False, disable=None)
    for number in range(warmup + rounds):
        for name, run in sides.items():
            progress.set_description(name)
            reset_peak_memory(device)
            wait_for(device)
            started = clock()
            run()
            wait_for(device)
            if number >= warmup:
                seconds[name].append(clock() - started)
                peaks[name] = max(peaks[name], peak_memory(device))
            progress.update()
    progress.close()
    return {name: Timing(seconds[name], peaks[name]) for name in sides}


def matmul_rate(linears: Iterable[Linear], device: torch.device, dtype: torch.dtype, repeats: int = 3) -> float:
    """FLOP/s of bare products of these shapes, forward and both of the backward pass; the best of the repeats.

    Nothing else is timed: it is what a step that consisted of its matrix products alone would reach.
    """
    flops, seconds = 0, 0.0
    for linear in tqdm(list(linears), desc="matmul rate", unit="shape", leave=False, disable=None):
        x = torch.randn(linear.rows, linear.width_in, device=device).to(dtype)
        weight = torch.randn(linear.width_out, linear.width_in, device=device).to(dtype)
        gradient = torch.randn(linear.rows, linear.width_out, device=device).to(dtype)
        products = (
            lambda x=x, weight=weight: F.linear(x, weight),
            lambda gradient=gradient, weight=weight: gradient @ weight,
            lambda gradient=gradient, x=x: gradient.t() @ x,
        )
        for product in products:
            timing = alternate({"product": product}, repeats, device)["product"]
            flops += linear.flops
            seconds += min(timing.seconds) * linear.count
    return flops / seconds


# --- memory


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


def peak_memory(device: torch.device) -> int:
    """Bytes, since `reset_peak_memory` (on a system without /proc: since the start)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class SavedBytes:
    """Bytes that autograd keeps for the backward pass of what runs inside, parameters left out.

    Each storage counts once, however many views of it are kept.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self.not_counted = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.storages: dict[int, torch.UntypedStorage] = {}  # holding them keeps an address from being used twice

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.not_counted:
            self.storages[storage.data_ptr()] = storage
        return tensor

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())

    def __enter__(self) -> "SavedBytes":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


# --- the machine


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> dict[str, Any]:
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next((line.split(": ")[1] for line in cpuinfo.read_text().splitlines() if "model name" in line), name)
    found: dict[str, Any] = {"cpu": name, "threads": torch.get_num_threads(), "system": platform.platform()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_gb": properties.total_memory / 1e9}
    return found
