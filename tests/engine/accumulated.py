"""What bf16 gradients add up to, and what a closed engine keeps, by ZeRO stage: accumulated.py OUTPUT.json"""

import gc
import json
import sys
from pathlib import Path

import psutil
import torch
from torch import nn

from blipds import distributed
from blipds.config.deepspeed import resolve_ds_config
from blipds.config.sections import Config, RunConfig
from blipds.engine import Engine, parameter_groups

GRADIENTS = [1.0, *[2.0**-9] * 15]  # in bf16, 1 + 2^-9 is 1


def small_engine(model: nn.Module, stage: int, accumulation: int) -> Engine:
    run = Config(run=RunConfig(batch_size_train=1, accum_grad_iters=accumulation, init_lr=1e-3))
    raw = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    config = resolve_ds_config(raw, run, world_size=1, default_precision="bf16", source="test")
    config["optimizer"]["params"]["torch_adam"] = True  # no op to compile
    return Engine(model, config, parameter_groups(model, 0.0, "matrices"), "bf16")


def sums() -> dict[int, float]:
    """The norm of the only gradient."""
    found = {}
    for stage in (1, 2, 3):
        engine = small_engine(nn.Linear(1, 1, bias=False), stage, len(GRADIENTS))
        for number, gradient in enumerate(GRADIENTS, start=1):
            x = torch.full((1, 1), gradient, dtype=torch.bfloat16, device=engine.device)
            engine.backward(engine.loss({"input": x}).float().sum())
            norm = engine.step(1e-3, measure=number == len(GRADIENTS))
        engine.close()
        found[stage] = norm
    return found


def held_and_kept() -> dict[int, tuple[int, int]]:
    """MiB of this process while an engine of 16 Mi weights trains, and once it is closed, beside those before."""
    process, found = psutil.Process(), {}
    x = torch.ones(1, 4096, dtype=torch.bfloat16)
    for stage in (0, 0, 1, 2, 3):  # the first one warms up
        gc.collect()
        before = process.memory_info().rss
        engine = small_engine(nn.Linear(4096, 4096, bias=False), stage, accumulation=1)
        engine.backward(engine.loss({"input": x}).float().sum())
        engine.step(1e-3, measure=False)
        held = process.memory_info().rss
        engine.close()
        found[stage] = ((held - before) >> 20, (process.memory_info().rss - before) >> 20)
    return found


if __name__ == "__main__":
    distributed.initialise()
    Path(sys.argv[1]).write_text(json.dumps({"sums": sums(), "memory": held_and_kept()}))
