"""The gradient that many micro-batches in bf16 add up to, by ZeRO stage: accumulated.py OUTPUT.json"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from blipds import distributed
from blipds.config.deepspeed import RunValues, resolve_ds_config
from blipds.engine import Engine, parameter_groups

GRADIENTS = [1.0, *[2.0**-9] * 15]  # in bf16, 1 + 2^-9 is 1


def sums() -> dict[int, float]:
    """The norm of the only gradient, 1 + 15 / 512."""
    distributed.initialise()
    values = RunValues(1, len(GRADIENTS), 1e-3, (0.9, 0.999), 0.0)
    found = {}
    for stage in (1, 2, 3):
        model = nn.Linear(1, 1, bias=False)
        raw = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
        config = resolve_ds_config(raw, values, world_size=1, default_precision="bf16", hidden_size=1, source="test")
        config["optimizer"]["params"]["torch_adam"] = True  # no op to compile
        engine = Engine(model, config, parameter_groups(model, 0.0, "matrices"), "bf16")
        for number, gradient in enumerate(GRADIENTS, start=1):
            x = torch.full((1, 1), gradient, dtype=torch.bfloat16, device=engine.device)
            engine.backward(engine.loss({"input": x}).float().sum())
            norm = engine.step(1e-3, measure=number == len(GRADIENTS))
        found[stage] = norm
        engine.close()
    return found


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(sums()))
