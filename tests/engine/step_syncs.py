"""Counts the device syncs of training steps, as tests/engine/grid.py: step_syncs.py SPEC.json SYNCS.json"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for syncs.py

import grid
from syncs import Syncs

from blipds import cli


def run_setting(spec, folder, device):
    """Of each step outside log steps after the first: what was found."""
    trainer, _ = grid.build(spec, folder, device)
    train_step, steps = trainer.train_step, []

    def counted(window, learning_rate, measure):
        if measure or trainer.state.global_step == 0:
            return train_step(window, learning_rate, measure)
        with Syncs() as found:
            result = train_step(window, learning_rate, measure)
        steps.append(found)
        return result

    trainer.train_step = counted
    trainer.train()
    trainer.close()
    return steps


if __name__ == "__main__":
    cli.run(lambda: grid.main(run_setting))
