"""ZeRO-3 while a model is built: no rank ever holds more than its share and one whole parameter."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from blipds.config.deepspeed import Section, zero_stage
from blipds.engine.communication import join_deepspeed


@contextmanager
def partitioned_init(config: Section) -> Iterator[None]:
    """Shares the parameters of every module built inside out among the ranks, once its `__init__` is done. Collective.

    `config` is a resolved DeepSpeed config: it says the precision and where the parts are kept (device, host, NVMe).
    Below stage 3 nothing happens. Code inside that looks at values of a finished module finds empty tensors, so random
    weights come afterwards (`Engine.filling`), parameter by parameter.
    """
    if zero_stage(config) < 3:
        yield
        return
    from deepspeed.runtime.zero import Init

    join_deepspeed()  # otherwise Init takes this rank for the only one
    with Init(config_dict_or_path=config):
        yield


def gathered(parameters: Iterable[nn.Parameter], modifier_rank: int | None = None) -> Any:
    """A context in which partitioned parameters are whole on every rank; others are as they are. Collective.

    What `modifier_rank` changes inside stays changed, on all ranks.
    """
    parameters = list(parameters)
    if not any(map(is_partitioned, parameters)):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters, modifier_rank=modifier_rank)


def is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")
