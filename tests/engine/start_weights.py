"""Trains from a checkpoint under a grid of settings and holds the saved weights against it, as tests/engine/grid.py.

    deepspeed --num_accelerators 2 tests/engine/start_weights.py SPEC.json RESULTS.json

Each setting says beside what grid.py reads: {start: a safetensors file of what the engine must hold after 0 steps,
rates: learning rates of the steps that follow; those of 0 must change nothing}.
"""

import torch
from deepspeed.utils import safe_get_full_grad
from grid import build, main
from safetensors.torch import load_file

from blipds import cli, distributed
from blipds.engine.checkpoints import shape_of


def run_setting(spec, folder, device):
    trainer, _ = build(spec, folder, device)
    engine, start = trainer.engine, load_file(spec["start"])
    result = {"unequal": {0: unequal(engine.weights(), start)}}
    learnt = {name: p for name, p in engine.model.named_parameters() if p.requires_grad}
    copies = {name: start[name].clone().requires_grad_() for name in learnt}
    adam = torch.optim.AdamW(copies.values(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    window = next(trainer.loader.windows(0))
    learns = any(spec["rates"])
    for number, rate in enumerate(spec["rates"], 1):
        for batch in window:
            engine.backward(engine.loss(batch.model_inputs(device, engine.dtype)) / 100)
        if learns:
            for name, parameter in learnt.items():
                gradient = safe_get_full_grad(parameter)
                copies[name].grad = gradient.detach().float().reshape(copies[name].shape).clone()
            adam.param_groups[0]["lr"] = rate
            adam.step()
        engine.step(rate, measure=False)
        if rate == 0.0:
            result["unequal"][number] = unequal(engine.weights(), start)
    if learns:
        saved = dict(engine.weights())
        result["frozen"] = [name for name in unequal(saved.items(), start) if name not in learnt]
        result["moved"] = max((saved[name] - start[name]).abs().max().item() for name in learnt)
        result["off the copy"] = max((saved[name] - copies[name]).abs().max().item() for name in learnt)
        trainer.checkpoints.begin(engine, {"global_step": len(spec["rates"])}, shape_of(engine, 8), best=True)
        trainer.checkpoints.finish()
    result["kept for frozen"] = distributed.gather(sum(tensor.numel() for tensor in engine.frozen.values()))
    trainer.close()
    return result


def unequal(weights, start):
    """Names of the weights that are not the numbers of `start`, bit by bit."""
    return [name for name, weight in weights if not torch.equal(weight, start[name])]


if __name__ == "__main__":
    cli.run(lambda: main(run_setting))
