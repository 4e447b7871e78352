"""The hardware and software of a run."""

import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

import blipds
from blipds import distributed


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
        "versions": versions() | {"blipds": blipds.__version__},
    }
    if device.type == "cuda":
        facts["device_memory_gb"] = torch.cuda.get_device_properties(device).total_memory / 1e9
    return facts


def versions() -> dict[str, str]:
    """Of Python, and of the packages that decide what a run computes."""
    packages = ("torch", "deepspeed", "transformers", "timm")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def processor_name() -> str:
    """Linux's name of the processor; elsewhere Python's."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
