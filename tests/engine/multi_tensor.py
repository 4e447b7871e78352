"""What blipds.engine.multi_tensor finds and what DeepSpeed's own methods find: multi_tensor.py FOLDER"""

import json
import math
import sys
from pathlib import Path

import grid
import torch

from blipds import cli, distributed


def compare(stage, folder, device):
    options = ["run.batch_size_train=4", "run.num_workers=0", "datasets.shapes_caption.num_images.train=16"]
    ds = {"zero_optimization": {"stage": stage}, "fp16": {"enabled": False}, "bf16": {"enabled": True}}
    spec = {"name": f"zero{stage}", "cfg": "tests/shapes_tiny.yaml", "options": options, "ds": ds}
    trainer, _ = grid.build(spec, folder, device)
    engine = trainer.engine
    (batch,) = next(iter(trainer.loader.windows(0)))
    engine.train()
    engine.backward(engine.loss(batch.model_inputs(device, engine.dtype)))
    optimizer = engine._deepspeed.optimizer
    theirs = type(optimizer)
    shares = [(optimizer.averaged_gradients[n], optimizer.params_in_partition[n]) for n in range(2)]
    norms = [
        [optimizer.get_grad_norm_direct(*share).item(), theirs.get_grad_norm_direct(optimizer, *share).item()]
        for share in shares
    ]
    gradient = shares[0][0][1].view(-1)
    not_finite, number = [], gradient[0].clone()
    for value in (number, math.inf, -math.inf, math.nan):
        gradient[0] = value
        both = optimizer.has_overflow_partitioned_grads_serial, theirs.has_overflow_partitioned_grads_serial
        not_finite.append([bool(both[0]()), bool(both[1](optimizer))])
    parameter = optimizer.round_robin_bit16_groups[0][1]
    place = parameter.data_ptr()
    parameter.data = parameter.data.clone()
    moved = parameter.data_ptr() != place
    optimizer._update_model_bit16_weights(0)
    return {"norms": norms, "not_finite": not_finite, "moved_back": moved and parameter.data_ptr() == place}


def main():
    folder = Path(sys.argv[-1])
    device = distributed.initialise()
    found = {f"zero{stage}": compare(stage, folder, device) for stage in (1, 2)}
    if distributed.is_main():
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.manual_seed(0)
    cli.run(main)
