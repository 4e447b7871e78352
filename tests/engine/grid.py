"""Trains the small model of the oracle under a grid of settings and writes down every loss.

    deepspeed --num_accelerators 2 tests/engine/grid.py SPEC.json LOSSES.json

One launch runs many settings, since a launch costs more than the steps. SPEC.json is a list of
{name, cfg: run config, options: [key=value, ...], ds: DeepSpeed config}, where wanted with {run_dir, resume: a run
directory to go on in, until: the last step before the run is dropped, nvme: folder of NVMe offload}.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from blipds import cli, distributed
from blipds.config.deepspeed import check_keys
from blipds.config.run import load_run_config
from blipds.engine.checkpoints import read_state, resume_point
from blipds.monitor import NullMonitor
from blipds.training import building


class Recorder(NullMonitor):
    """Keeps what a monitor is told."""

    def __init__(self, nvme):
        self.nvme = nvme
        self.lines = []
        self.nvme_bytes = []  # what lies in the folder of NVMe offload after each step

    def train(self, step, epoch, values):
        self.lines.append(dict(values))
        if self.nvme:
            self.nvme_bytes.append(sum(file.stat().st_size for file in Path(self.nvme).rglob("*.swp")))


def build(spec, folder, device):
    """A trainer for a setting, and the recorder that it reports to."""
    config, _ = load_run_config(Path(spec["cfg"]), spec["options"])
    run_dir, resumed = Path(spec.get("run_dir", folder / spec["name"])), None
    if "resume" in spec:
        resumed, _ = resume_point(spec["resume"], [])
        building.keep_global_batch(config.run, read_state(resumed)["shape"])
    ds_config = building.resolve(config, check_keys(spec["ds"], spec["name"]), device, spec["name"])
    recorder = Recorder(spec.get("nvme"))
    trainer = building.build_trainer(config, ds_config, run_dir, recorder, resumed)
    if "until" in spec:
        trainer.plan = replace(trainer.plan, total_steps=spec["until"])
    return trainer, recorder


def run_setting(spec, folder, device):
    trainer, recorder = build(spec, folder, device)
    trainer.train()
    weight_sums = {name: weight.double().abs().sum().item() for name, weight in trainer.engine.weights()}
    trainer.close()
    return {
        "losses": [line["loss"] for line in recorder.lines],
        "grad_norms": [line["grad_norm"] for line in recorder.lines],
        "weight_sums": weight_sums,
        "nvme_bytes": recorder.nvme_bytes,
    }


def main(run_setting=run_setting):
    """Runs every setting of SPEC.json, and writes what `run_setting(spec, folder, device)` gave for each."""
    specs, output = json.loads(Path(sys.argv[-2]).read_text()), Path(sys.argv[-1])
    device = distributed.initialise()
    results = {spec["name"]: run_setting(spec, output.parent, device) for spec in specs}
    if distributed.is_main():
        output.write_text(json.dumps(results))


if __name__ == "__main__":
    cli.run(main)
