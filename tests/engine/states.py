"""Measures the model states that DeepSpeed allocates under a grid of settings, as tests/engine/grid.py.

    deepspeed --num_accelerators 2 tests/engine/states.py SPEC.json BYTES.json

For each setting the most, over micro-batches and ranks, of what is held after a backward pass.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for held_memory.py

from held_memory import bytes_of, engine_tensors

from blipds import cli, distributed
from blipds.config.deepspeed import check_keys
from blipds.config.run import load_run_config
from blipds.monitor import NullMonitor
from blipds.training import building


def run_setting(spec, device):
    config, _ = load_run_config(Path(spec["cfg"]), spec["options"])
    ds_config = building.resolve(config, check_keys(spec["ds"], spec["name"]), device, spec["name"])
    trainer = building.build_trainer(config, ds_config, Path(), NullMonitor())
    held = 0
    windows = trainer.loader.windows(0)
    for _ in range(2):  # Adam's moments come with the first update
        for batch in next(windows):
            trainer.engine.backward(trainer.engine.loss(batch.model_inputs(device, trainer.engine.dtype)))
            held = max(held, bytes_of(engine_tensors(trainer.engine)))
            trainer.engine.step(1e-4, measure=False)
    trainer.close()
    return max(distributed.gather(held))


def main():
    specs, output = json.loads(Path(sys.argv[-2]).read_text()), Path(sys.argv[-1])
    device = distributed.initialise()
    results = {spec["name"]: run_setting(spec, device) for spec in specs}
    if distributed.is_main():
        output.write_text(json.dumps(results))


if __name__ == "__main__":
    cli.run(main)
