"""The run config: one function merges and checks everything; its sections are `sections.py`.

Precedence, lowest first: the dataclass defaults (those below, and the arch's own), the packaged defaults of the model
(`arch` + `model_type`) and of each dataset, the run config, `--options`. Names and meanings are LAVIS's where LAVIS has
them; run_configs/README.md explains every key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blipds.config.quoting import quoted, quoted_option, type_hints
from blipds.config.sections import AnnotationConfig, Config, DatasetConfig, ModelConfig, one_of
from blipds.errors import UserError, nearest
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

    `options` are `key.path=value`, the value read as YAML. Raises UserError with one line that names the key, what was
    given and what is allowed.
    """
    model = model_config_class(with_options(read_yaml(cfg_path), options))
    sections = type_hints(Config) | {"model": model}
    given = with_options(read_yaml(cfg_path, sections), [quoted_option(option, sections) for option in options])
    notices = drop_replaced_keys(given, {"run": REPLACED_RUN_KEYS, "model": model.REPLACED})
    check_schema({name: section for name, section in given.items() if name != "model"}, Config, "")
    check_model_keys(given.get("model"), model)
    schema = OmegaConf.structured(Config)
    schema.model = OmegaConf.structured(model)
    layers = [packaged_model(given), packaged_datasets(given), given]
    try:
        merged = OmegaConf.merge(schema, *(conform(layer, Config, {"model": model}) for layer in layers))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise UserError(f"{cfg_path}: {error.full_key or 'config'}: {message}") from error
    assert isinstance(config, Config)
    return config, notices


def arch_of(given: dict[Any, Any]) -> Any:
    """The arch (models/protocol.py) that a run config asks for."""
    model = given.get("model")
    name = model.get("arch", ModelConfig.arch) if isinstance(model, dict) else ModelConfig.arch
    return ARCHS[str(name)]()


def model_config_class(given: dict[Any, Any]) -> type[ModelConfig]:
    """The dataclass of the model section: `model.arch` decides which keys exist."""
    found: type[ModelConfig] = arch_of(given).config
    return found


def check_model_keys(section: Any, schema: type[ModelConfig]) -> None:
    """As `check_schema`; a key that another arch has is told as that."""
    known = type_hints(schema)
    for key in section if isinstance(section, dict) else ():
        if key not in known:
            owners = [name for name in ARCHS.names() if key in type_hints(ARCHS[name]().config)]
            if owners:
                arch = section.get("arch", ModelConfig.arch)
                raise UserError(f"model.{key} is a key of {', '.join(owners)}, and model.arch is {arch}")
    check_schema(section, schema, "model")


def drop_replaced_keys(given: dict[Any, Any], replaced: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Takes LAVIS's keys that something else decides now out of their sections; returns a line for each."""
    lines = []
    for section, keys in replaced.items():
        values: Any = given.get(section)
        for key in keys:
            if isinstance(values, dict) and key in values:
                del values[key]
                lines.append(f"{section}.{key}: {keys[key]}")
    return lines


def read_yaml(path: Path, schema: Any = Any) -> DictConfig:
    try:
        loaded = OmegaConf.load(path) if schema is Any else OmegaConf.create(quoted(path.read_text("utf-8"), schema))
    except FileNotFoundError:
        raise UserError(f"no such config file: {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory; a YAML file is expected") from None
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is not a YAML file of settings: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} holds no mapping; expected the sections model, datasets, run")
    return loaded


def with_options(given: DictConfig, options: Sequence[str]) -> dict[Any, Any]:
    for option in options:
        if "=" not in option:
            raise UserError(f"--options {option}: expected key.path=value")
    try:
        return container(OmegaConf.merge(given, OmegaConf.from_dotlist(list(options))))
    except UnicodeError as error:  # bytes that the locale could not read
        raise UserError(f"--options {' '.join(options)}: not text in this locale; set LC_ALL=C.UTF-8") from error
    except (OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
        raise UserError(f"--options {' '.join(options)}: {str(error).splitlines()[0]}") from error


def packaged_model(given: dict[Any, Any]) -> dict[Any, Any]:
    """The packaged defaults of `model.model_type`; none where the arch has no model types."""
    arch, section = arch_of(given), given.get("model") or {}
    model_type = section.get("model_type", arch.config.model_type)
    if model_type is None and not arch.model_types:
        return {}
    if not arch.model_types:
        raise UserError(f"model.model_type is '{model_type}', but {section.get('arch')} has no model types: remove it")
    one_of("model.model_type", str(model_type), sorted(arch.model_types))
    return container(read_yaml(arch.model_types[model_type]))


def packaged_datasets(given: dict[Any, Any]) -> dict[Any, Any]:
    """Packaged defaults of the datasets that the run config names; a dataset of a plugin may have none."""
    found = {}
    for name in given.get("datasets") or {}:
        path = PACKAGED_DATASETS / f"{name}.yaml"
        if path.exists():
            found[name] = container(read_yaml(path))["datasets"][name]
    return {"datasets": found}


def packaged_dataset(name: str) -> DatasetConfig:
    """A dataset as its packaged default has it."""
    layer = packaged_datasets({"datasets": {name: None}})["datasets"][name]
    merged = OmegaConf.merge(OmegaConf.structured(DatasetConfig), conform(layer, DatasetConfig))
    dataset = OmegaConf.to_object(merged)
    assert isinstance(dataset, DatasetConfig)
    return dataset


def container(config: Container) -> dict[Any, Any]:
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return plain


def check_schema(value: Any, schema: Any, key: str) -> None:
    """Names the first key that the schema lacks, with the nearest spelling. Types are OmegaConf's to check."""
    if get_origin(schema) is dict and value is not None:
        if not isinstance(value, dict):
            raise UserError(f"{key} is {value!r}; expected a mapping")
        of_values = get_args(schema)[1]
        for name, inner in value.items():
            here = f"{key}.{name}" if key else str(name)
            if inner is None and of_values in (int, float, str, bool):
                raise UserError(f"{here} has no value (YAML wants a space after a colon: {{name: value}})")
            check_schema(inner, of_values, here)
    elif isinstance(value, dict) and any(get_origin(part) is list for part in (schema, *get_args(schema))):
        raise UserError(f"{key} is {value!r}; expected a list")
    elif is_dataclass(schema) and value is not None and not is_storage(value, schema):
        if not isinstance(value, dict):
            raise UserError(f"{key} is {value!r}; expected a section with {', '.join(f.name for f in fields(schema))}")
        hints = type_hints(schema)
        for name, inner in value.items():
            here = f"{key}.{name}" if key else str(name)
            if name not in hints:
                raise UserError(f"unknown key {here}; {nearest(str(name), hints)}")
            check_schema(inner, hints[name], here)


def is_storage(value: Any, schema: Any) -> bool:
    """Whether a path, or a list of them, stands in the place of a split's section."""
    return schema is AnnotationConfig and isinstance(value, str | list)


def conform(value: Any, schema: Any, subclasses: Mapping[str, Any] | None = None) -> Any:
    """LAVIS writes one file name for a list of one, whole floats for integers, and empty sections.

    subclasses: of fields whose values are of another class than the schema says.
    """
    if is_dataclass(schema):
        if value is None:
            return {}
        if is_storage(value, schema):
            value = {"storage": value}
        if schema is AnnotationConfig and "storage" in value and "url" not in value:
            value = {"url": [], "md5": [], "member": None} | value  # a file of one's own: not the packaged address's
        hints = type_hints(schema) | dict(subclasses or {})
        return {name: conform(inner, hints[name]) for name, inner in value.items()}
    if get_origin(schema) is dict:
        return {str(name): conform(inner, get_args(schema)[1]) for name, inner in (value or {}).items()}
    if get_origin(schema) is list and isinstance(value, str):
        return [value]
    if isinstance(value, float) and value.is_integer() and int in (schema, *get_args(schema)):
        return int(value)
    return value
