"""The run config: one function merges and checks everything; its sections are `sections.py`.

Precedence, lowest first: the dataclass defaults (those below, and the arch's own), the packaged defaults of the model
(`arch` + `model_type`) and of each dataset, the run config, `--options`. Names and meanings are LAVIS's where LAVIS has
them; run_configs/README.md explains every key.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blipds.config.schema import conform, merged, read_option, read_yaml, type_hints
from blipds.config.sections import Config, DatasetConfig, ModelConfig, one_of
from blipds.errors import UserError
from blipds.files.paths import find_config
from blipds.registry import ARCHS

PACKAGED_DATASETS = Path(__file__).parents[1] / "data" / "configs"

# LAVIS's run keys that something else decides now, and the line that says so.
REPLACED_RUN_KEYS = {
    "amp": "precision is set in the DeepSpeed JSON (bf16, fp16)",
    "device": "the device is what DeepSpeed's accelerator finds; DS_ACCELERATOR overrides it",
    "world_size": "the launcher decides how many ranks there are (deepspeed --num_gpus, --hostfile)",
    "dist_url": "the launcher gives every rank the address of the first",
    "distributed": "the launcher decides; one process works too",
    "use_dist_eval_sampler": "evaluation is always shared among the ranks, each image counted once",
}


def load_run_config(cfg_path: Path, options: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """Merges and checks; returns the config and the lines about keys that something else decides now.

    `cfg_path` may be the name of a packaged one. `options` are `key.path=value`, the value read as YAML. Raises
    UserError with one line that names the key, what was given and what is allowed.
    """
    cfg_path = find_config(cfg_path, "run_configs", ".yaml")
    given = reduce(merged, map(read_option, options), read_yaml(cfg_path))
    section = given.get("model")
    arch = ARCHS[str(section.get("arch", ModelConfig.arch) if isinstance(section, dict) else ModelConfig.arch)]()
    notices = drop_replaced_keys(given.get("run"), REPLACED_RUN_KEYS, "run")
    notices += drop_replaced_keys(section, arch.config.REPLACED, "model")
    own = conform(given, type_hints(Config) | {"model": arch.config})  # the arch decides which keys its section has
    schema = OmegaConf.structured(Config)
    schema.model = OmegaConf.structured(arch.config)
    datasets = {name: packaged_layer(name) for name in own.get("datasets", {})}
    try:
        packaged = {"model": packaged_model(arch, own.get("model", {})), "datasets": datasets}
        config = OmegaConf.to_object(OmegaConf.merge(schema, packaged, own))
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise UserError(f"{cfg_path}: {error.full_key or 'config'}: {message}") from error
    assert isinstance(config, Config)
    return config, notices


def drop_replaced_keys(section: Any, replaced: Mapping[str, str], name: str) -> list[str]:
    """Takes LAVIS's keys that something else decides now out of a section; returns a line for each."""
    dropped = [key for key in replaced if isinstance(section, dict) and key in section]
    for key in dropped:
        del section[key]
    return [f"{name}.{key}: {replaced[key]}" for key in dropped]


def packaged_model(arch: Any, section: Mapping[str, Any]) -> dict[str, Any]:
    """The packaged defaults of `model.model_type`; none where the arch (models/protocol.py) has no model types."""
    model_type = section.get("model_type", arch.config.model_type)
    if model_type is None and not arch.model_types:
        return {}
    if not arch.model_types:
        raise UserError(f"model.model_type is '{model_type}', but {section.get('arch')} has no model types: remove it")
    one_of("model.model_type", str(model_type), sorted(arch.model_types))
    layer: dict[str, Any] = conform(read_yaml(arch.model_types[model_type])["model"], arch.config)
    return layer


def packaged_layer(name: str) -> dict[str, Any]:
    """What a dataset's packaged default says; {} for a dataset of a plugin, which may have none."""
    path = PACKAGED_DATASETS / f"{name}.yaml"
    return conform(read_yaml(path)["datasets"][name], DatasetConfig) if path.exists() else {}


def packaged_dataset(name: str) -> DatasetConfig:
    """A dataset as its packaged default has it."""
    dataset = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DatasetConfig), packaged_layer(name)))
    assert isinstance(dataset, DatasetConfig)
    return dataset
