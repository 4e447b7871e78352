"""Settings that are text keep their characters: YAML takes 4711_1, 12:30:00 and 0012 as numbers, and yes as true.

A schema is a type (a dataclass, list[str], str | None, ...), or a dictionary of them by key.
"""

import re
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml


def quoted(document: str, schema: Any) -> str:
    """The same YAML, with quotes around all that the schema says is text."""
    node = yaml.compose(document, Loader=yaml.SafeLoader)
    if node is None:
        return ""
    quote(node, schema)
    return yaml.serialize(node, Dumper=yaml.SafeDumper)


def quoted_option(option: str, schema: Any) -> str:
    key, _, value = option.partition("=")
    for name in re.findall(r"[^.\[\]]+", key):
        schema = schema_of(schema, name)
    return f"{key}={quoted(value, schema)}"


def quote(node: yaml.Node, schema: Any) -> None:
    parts = alternatives(schema)
    if isinstance(node, yaml.MappingNode):
        for key, inner in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                quote(key, str)
            quote(inner, schema_of(schema, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            quote(inner, next((get_args(part)[0] for part in parts if get_origin(part) is list), Any))
    elif node.style is None and (str in parts or list[str] in parts):
        others = {"null", *(["bool"] if bool in parts else []), *(["int", "float"] if int in parts else [])}
        if node.tag.rpartition(":")[2] not in others:  # a key may be true or a path, a number or "all"
            node.tag, node.style = "tag:yaml.org,2002:str", '"'


def alternatives(schema: Any) -> tuple[Any, ...]:
    """The parts of a union, and what a dataclass says may stand in its place."""
    if is_dataclass(schema):
        return schema, *get_args(getattr(schema, "IN_PLACE", None))
    return get_args(schema) if get_origin(schema) in (Union, UnionType) else (schema,)


def schema_of(schema: Any, key: Any) -> Any:
    """What a schema (types, or a dictionary of them) says of a key or an index; Any where it says nothing."""
    for part in alternatives(schema):
        if isinstance(part, dict):
            return part.get(key, Any)
        if is_dataclass(part):
            return type_hints(part).get(str(key), Any)
        if get_origin(part) in (dict, list):
            return get_args(part)[-1]
    return Any


def type_hints(schema: Any) -> dict[str, Any]:
    """{key: its type} of a dataclass."""
    hints = get_type_hints(schema)
    return {field.name: hints[field.name] for field in fields(schema)}
