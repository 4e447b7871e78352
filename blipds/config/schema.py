"""YAML against a schema: a type (a dataclass, list[str], str | None, ...), or a dictionary of them by key.

Settings that are text keep their characters, though YAML takes 4711_1, 12:30:00 and 0012 as numbers, and yes as true.
"""

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blipds.config.sections import AnnotationConfig, ModelConfig
from blipds.errors import UserError, nearest
from blipds.registry import ARCHS

# ---- Reading --------------------------------------------------------------------------------------------------------


class Text(str):
    """A scalar without quotes: its characters, and the bool or number that YAML takes it for (else the characters)."""

    value: bool | int | float | str


class Loader(yaml.SafeLoader):
    """Scalars without quotes become `Text`."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if not isinstance(node, yaml.ScalarNode) or node.style is not None:
            return super().construct_object(node, deep)
        try:
            value = super().construct_object(node, deep)
        except ValueError:  # 0x_, 2026-13-01
            value = node.value
        if value is None:
            return None
        text = Text(node.value)
        text.value = value if isinstance(value, bool | int | float) else str(text)
        return text


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def read_yaml(path: Path) -> dict[Any, Any]:
    """A YAML file of settings, its scalars as they are written (`Text`)."""
    try:
        checked = OmegaConf.load(path)  # refuses keys that stand twice, and aliases that would fill the memory
        loaded = yaml.load(path.read_text("utf-8"), Loader)
    except FileNotFoundError:
        raise UserError(f"no such config file: {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory; a YAML file is expected") from None
    except (yaml.YAMLError, ValueError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is not a YAML file of settings: {' '.join(str(error).split())}") from error
    if not isinstance(checked, DictConfig) or not isinstance(loaded, dict | None):
        raise UserError(f"{path} holds no mapping; expected the sections model, datasets, run")
    return loaded or {}


def read_option(option: str) -> dict[Any, Any]:
    """`key.path=value`, the value read as YAML, as the mapping that a file would have."""
    key, equals, document = option.partition("=")
    if not equals:
        raise UserError(f"--options {option}: expected key.path=value")
    try:
        option.encode()
        value = yaml.load(document, Loader)
    except UnicodeError as error:  # bytes that the locale could not read
        raise UserError(f"--options {option}: not text in this locale; set LC_ALL=C.UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(f"--options {option}: {str(error).splitlines()[0]}") from error
    for name in reversed(re.sub(r"\[(.*?)\]", r".\1", key).split(".")):  # datasets[nocaps].images is allowed, too
        value = {name: value}
    return value


def merged(lower: Any, upper: Any) -> Any:
    """Mappings key by key; of all else the upper."""
    if not isinstance(lower, dict) or not isinstance(upper, dict):
        return upper
    return lower | {key: merged(lower.get(key), value) for key, value in upper.items()}


# ---- Checking -------------------------------------------------------------------------------------------------------


def conform(given: Any, schema: Any, key: str = "") -> Any:
    """What YAML holds, as the schema has it; UserError for the first key that the schema lacks.

    LAVIS writes one file name for a list of one, whole floats for integers, and empty sections. Whether a value has the
    right type, OmegaConf checks.
    """
    parts = get_args(schema) if get_origin(schema) in (Union, UnionType) else (schema,)
    if isinstance(given, Text):
        texts = (str, list[str], AnnotationConfig)
        others = {bool: (bool,), int: (int, float)}  # a key may be true or a path, a number or "all"
        is_other = any(type(given.value) in others.get(part, ()) for part in parts)
        given = str(given) if any(part in texts for part in parts) and not is_other else given.value
    if isinstance(schema, dict) or is_dataclass(schema):
        return _section(given, schema, key)
    if given is not None and (section := next(filter(is_dataclass, parts), None)):  # a section or null
        return _section(given, section, key)
    if isinstance(given, dict):
        values = _inside(parts, dict)
        if values is None and _inside(parts, list):
            raise UserError(f"{key} is {conform(given, Any)!r}; expected a list")
        for name, inner in given.items():
            if inner is None and values in (int, float, str, bool):
                raise UserError(f"{key}.{name} has no value (YAML wants a space after a colon: {{name: value}})")
        return {str(name): conform(inner, values or Any, f"{key}.{name}") for name, inner in given.items()}
    if get_origin(schema) is dict:
        if given is not None:
            raise UserError(f"{key} is {conform(given, Any)!r}; expected a mapping")
        return {}
    if isinstance(given, str) and str not in parts and any(get_origin(part) is list for part in parts):
        return [given]
    if isinstance(given, list):
        return [conform(item, _inside(parts, list) or Any, key) for item in given]
    if isinstance(given, float) and given.is_integer() and int in parts:
        return int(given)
    return given


def _section(given: Any, schema: Any, key: str) -> dict[str, Any]:
    if schema is AnnotationConfig and isinstance(given, str | list):
        given = {"storage": given}
    if schema is AnnotationConfig and isinstance(given, dict) and "storage" in given and "url" not in given:
        given = {"url": [], "md5": [], "member": None} | given  # a file of one's own: not the packaged address's
    if given is None:
        return {}
    hints = schema if isinstance(schema, dict) else type_hints(schema)
    if not isinstance(given, dict):
        raise UserError(f"{key} is {conform(given, Any)!r}; expected a section with {', '.join(hints)}")
    section = {}
    for name, inner in given.items():
        here = f"{key}.{name}" if key else str(name)
        if name not in hints:
            if key == "model" and (owners := [n for n in ARCHS.names() if name in type_hints(ARCHS[n]().config)]):
                arch = given.get("arch", ModelConfig.arch)
                raise UserError(f"{here} is a key of {', '.join(owners)}, and model.arch is {arch}")
            raise UserError(f"unknown key {here}; {nearest(str(name), hints)}")
        section[str(name)] = conform(inner, hints[name], here)
    return section


def _inside(parts: Sequence[Any], container: type) -> Any:
    """What a list or a dictionary may hold; None where none may stand here."""
    return next((get_args(part)[-1] for part in parts if get_origin(part) is container), Any if Any in parts else None)


def type_hints(schema: Any) -> dict[str, Any]:
    """{key: its type} of a dataclass."""
    hints = get_type_hints(schema)
    return {field.name: hints[field.name] for field in fields(schema)}
