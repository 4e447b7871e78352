"""The hardware and software of a run."""

import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from blipds import distributed

PACKAGES = ("blipds", "torch", "deepspeed", "transformers", "timm")


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Of rank 0's machine: command line, ranks, device, processor, cores, memory (GB), versions."""
    facts: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "ranks": distributed.world_size(),
        "ranks_a_machine": distributed.local_world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": processor_name(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        "memory_gb": psutil.virtual_memory().total / 1e9,
        "versions": {"python": platform.python_version()} | {name: installed(name) for name in PACKAGES},
    }
    if device.type == "cuda":
        facts["device_memory_gb"] = torch.cuda.get_device_properties(device).total_memory / 1e9
    return facts


def processor_name() -> str:
    """Linux's name of the processor; elsewhere Python's."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "not installed"
