"""Trains the small model of the oracle under a grid of settings and writes down every loss.

    deepspeed --num_accelerators 2 tests/engine/grid.py SPEC.json LOSSES.json

One launch runs many settings, since a launch costs more than the steps. SPEC.json is a list of
{name, cfg: run config, options: [key=value, ...], ds: DeepSpeed config, nvme: folder of NVMe offload or nothing}.
"""

import json
import sys
from pathlib import Path

from blipds import building, cli, distributed
from blipds.config import load_run_config
from blipds.ds_config import check_keys
from blipds.monitor import NullMonitor


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


def run_setting(spec, device):
    config, _ = load_run_config(Path(spec["cfg"]), spec["options"])
    ds_config = building.resolve(config, check_keys(spec["ds"], spec["name"]), device, spec["name"])
    recorder = Recorder(spec.get("nvme"))
    trainer = building.build_trainer(config, ds_config, Path(), recorder)
    trainer.train()
    weight_sums = {name: weight.double().abs().sum().item() for name, weight in trainer.engine.weights()}
    trainer.close()
    return {
        "losses": [line["loss"] for line in recorder.lines],
        "grad_norms": [line["grad_norm"] for line in recorder.lines],
        "weight_sums": weight_sums,
        "nvme_bytes": recorder.nvme_bytes,
    }


def main():
    specs, output = json.loads(Path(sys.argv[-2]).read_text()), Path(sys.argv[-1])
    device = distributed.initialise()
    results = {spec["name"]: run_setting(spec, device) for spec in specs}
    if distributed.is_main():
        output.write_text(json.dumps(results))


if __name__ == "__main__":
    cli.run(main)
