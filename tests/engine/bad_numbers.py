"""Trains with a loss that is not a number at step 3 on rank 1, and writes down what became of the weights.

deepspeed --num_accelerators 2 tests/engine/bad_numbers.py SPEC.json RESULTS.json
"""

import torch
from grid import build, main

from blipds import cli, distributed

BAD_STEP = 3


def run_setting(spec, folder, device):
    trainer, recorder = build(spec, folder, device)
    engine, sums, named = trainer.engine, [], []
    loss_of = engine.loss

    def loss(inputs):
        bad = trainer.state.global_step + 1 == BAD_STEP and distributed.rank() == 1
        return loss_of(inputs) * (torch.nan if bad else 1.0)

    step_of = trainer.train_step

    def train_step(window, *arguments, **options):
        if trainer.state.global_step + 1 == BAD_STEP:
            named.append(distributed.gather([name for batch in window for name in batch.names])[1])
        result = step_of(window, *arguments, **options)
        sums.append(sum(weight.double().abs().sum().item() for _, weight in engine.weights()))
        return result

    engine.loss, trainer.train_step = loss, train_step
    trainer.train()
    results = {"weight_sums": sums, "losses": [line["loss"] for line in recorder.lines], "images": named[0]}
    results |= {"adam_step": engine.state.counters()["adam_step"], "bad_steps": trainer.state.bad_steps}
    trainer.close()
    return results


if __name__ == "__main__":
    cli.run(lambda: main(run_setting))
