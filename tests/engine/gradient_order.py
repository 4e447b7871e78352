"""Two ranks whose gradients come in opposite orders: gradient_order.py FOUND.json

The minimal script of DeepSpeed#2343: the means of gradients over two ranks, by ZeRO stage, in order or as they come.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from blipds import distributed
from blipds.config.deepspeed import resolve_ds_config
from blipds.config.sections import Config, RunConfig
from blipds.engine import Engine, parameter_groups


class TwoBranches(nn.Module):
    """The loss is 2 x + 3 y + 5 z for weights x, y, z; of the first two, which comes first depends on the rank.

    z = 0 lies between them in the reversed order of parameters, and has no gradient where `unused` is given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.x, self.z, self.y = (nn.Parameter(torch.zeros(1)) for _ in range(3))

    def forward(self, unused: Tensor | None = None) -> Tensor:
        first, last = ((self.x, 2), (self.y, 3)) if distributed.rank() == 0 else ((self.y, 3), (self.x, 2))
        product = first[0] * first[1]
        loss = product + last[0] * last[1]
        return (loss if unused is not None else loss + 5 * self.z).sum()


def gradients(stage: int, compiled: bool, unused: bool) -> dict[str, float]:
    """By the change that Adam's first moment makes of them: (1 - beta1) x gradient."""
    from deepspeed.utils import safe_get_full_optimizer_state

    run = Config(run=RunConfig(batch_size_train=1, init_lr=1e-3, max_grad_norm=None))
    raw = {"zero_optimization": {"stage": stage, "overlap_comm": True}, "bf16": {"enabled": False}}
    config = resolve_ds_config(raw, run, world_size=2, default_precision="fp32", source="test")
    config["optimizer"]["params"]["torch_adam"] = True  # no op to compile
    model = TwoBranches()
    engine = Engine(model, config, parameter_groups(model, 0.0, "matrices"), "fp32", compiled=compiled)
    engine.backward(engine.loss({"unused": torch.ones(1)} if unused else {}))
    engine.step(1e-3, measure=False)
    moments = {name: safe_get_full_optimizer_state(p, "exp_avg") for name, p in model.named_parameters()}
    engine.close()
    return {name: round(moment.item() / 0.1, 4) for name, moment in moments.items()}


if __name__ == "__main__":
    distributed.initialise()
    settings = [(1, True, False), (2, True, False), (2, True, True), (2, False, False)]
    found = {str(setting): gradients(*setting) for setting in settings}
    if distributed.is_main():
        Path(sys.argv[-1]).write_text(json.dumps(found))
