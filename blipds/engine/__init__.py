"""The only room that imports deepspeed: initialisation, backward and step, gathering, checkpoints.

deepspeed is imported where it is used, so that everything else starts fast and works without it.
"""

from blipds.engine.engine import (
    DTYPES,
    Engine,
    checkpointed,
    checkpointed_on_host,
    default_precision,
    flash_in_training,
    parameter_groups,
    partitioned_init,
)
from blipds.engine.ops import prepare_nvme, prepare_ops

__all__ = [
    "DTYPES",
    "Engine",
    "checkpointed",
    "checkpointed_on_host",
    "default_precision",
    "flash_in_training",
    "parameter_groups",
    "partitioned_init",
    "prepare_nvme",
    "prepare_ops",
]
