"""Trains the small model of the oracle under a grid of settings and writes down every loss.

    deepspeed --num_accelerators 2 tests/engine/grid.py SPEC.json LOSSES.json

One launch runs many settings, since a launch costs more than the steps. SPEC.json is a list of
{name, ds: a DeepSpeed config with "auto", options: [key=value, ...], cfg: path, steps}.
"""

import json
import sys
from pathlib import Path

import torch

from blipds import cli, distributed
from blipds.captioner import Captioner, initial_weights, load_weights
from blipds.config import load_run_config
from blipds.data.datasets import build_dataset
from blipds.data.loader import TrainLoader
from blipds.ds_config import RunValues, check_keys, precision, resolve_ds_config
from blipds.engine import Engine, checkpointed, parameter_groups, prepare_ops
from blipds.models import build_model
from blipds.monitor import NullMonitor
from blipds.registry import SCHEDULES
from blipds.trainer import Plan, RunState, Trainer


class Recorder(NullMonitor):
    """Keeps what a monitor is told."""

    def __init__(self):
        self.lines = []

    def train(self, step, epoch, values):
        self.lines.append(dict(values))


def run_setting(spec, device):
    config, _ = load_run_config(Path(spec["cfg"]), spec["options"])
    run = config.run
    values = RunValues(
        run.batch_size_train, run.accum_grad_iters, run.init_lr, (0.9, run.beta2), run.weight_decay, run.max_grad_norm
    )
    ds_config = resolve_ds_config(
        check_keys(spec["ds"], spec["name"]),
        values,
        world_size=distributed.world_size(),
        default_precision="fp32",
        hidden_size=64,
        source=spec["name"],
    )
    torch.manual_seed(run.seed)
    captioner = Captioner.from_config(config)
    loader = TrainLoader(
        [build_dataset(name, config, "train", training=True) for name in config.datasets],
        captioner.tokenizer,
        micro_batch=run.batch_size_train,
        accumulation=run.accum_grad_iters,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=run.seed,
        shuffle=run.shuffle,
    )
    model = build_model(config.model, checkpointed)
    location = initial_weights(config.model)
    if location is not None:
        load_weights(model, location, Path("."), say=lambda line: None)
    groups = parameter_groups(model, run.weight_decay, run.weight_decay_on)
    engine = Engine(model, ds_config, groups, precision(ds_config))
    schedule = SCHEDULES[run.lr_sched](init_lr=run.init_lr, max_epoch=100, total_steps=spec["steps"])
    recorder = Recorder()
    plan = Plan(
        epoch_steps=loader.steps_per_epoch,
        total_steps=spec["steps"],
        log_steps=1,
        val_epochs=1,
        val_steps=None,
        save_epochs=10**9,
        save_last=False,
    )
    trainer = Trainer(
        engine, loader, schedule, [], recorder, plan, Path("."), seed=run.seed, max_bad_images=0, state=RunState()
    )
    trainer.train()
    weights = {name: weight for name, weight in engine.weights()}
    engine.close()
    return {
        "losses": [line["loss"] for line in recorder.lines],
        "grad_norms": [line["grad_norm"] for line in recorder.lines],
        "weight_sums": {name: weight.double().abs().sum().item() for name, weight in weights.items()},
    }


def main():
    specs, output = json.loads(Path(sys.argv[-2]).read_text()), Path(sys.argv[-1])
    device = distributed.initialise()
    prepare_ops(offload=False)
    results = {spec["name"]: run_setting(spec, device) for spec in specs}
    if distributed.is_main():
        output.write_text(json.dumps(results))


if __name__ == "__main__":
    cli.run(main)
