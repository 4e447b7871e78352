"""One optimizer step of a small model under every ZeRO stage: first_steps.py '{"name": lr_scale}' OUTPUT.json"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from blipds import distributed
from blipds.config.deepspeed import resolve_ds_config
from blipds.config.sections import Config, RunConfig
from blipds.engine import Engine, parameter_groups


def first_steps(scales: dict[str, float]) -> dict[int, dict[str, float]]:
    """By stage and parameter: the largest distance that one step moves a weight."""
    distributed.initialise()
    run = RunConfig(batch_size_train=1, init_lr=2e-3, weight_decay=0.0)
    moved = {}
    for stage in range(4):
        torch.manual_seed(0)
        model = nn.ModuleDict({"visual_encoder": nn.Linear(4, 8, bias=False), "text_decoder": nn.Linear(8, 2)})
        model.forward = lambda pixels, model=model: model["text_decoder"](model["visual_encoder"](pixels)).sum()
        model.is_elsewhere = lambda name: False  # as a captioner says that checkpoints hold all of it
        raw = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": False}, "fp16": {"enabled": False}}
        config = resolve_ds_config(raw, Config(run=run), world_size=1, default_precision="fp32", source="this test")
        config["optimizer"]["params"]["torch_adam"] = True  # no op to compile
        groups = parameter_groups(model, 0.0, "matrices", scales)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        engine = Engine(model, config, groups, "fp32")
        engine.backward(engine.loss({"pixels": torch.ones(1, 4)}))
        engine.step(2e-3, measure=False)
        moved[stage] = {name: (weight - before[name]).abs().max().item() for name, weight in engine.weights()}
        engine.close()
    return moved


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(first_steps(json.loads(sys.argv[1]))))
