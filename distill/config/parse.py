"""Convert YAML values to the types of the configuration schema; list all keys; describe types in messages."""

from __future__ import annotations

import difflib
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from distill.config.schema import Config
from distill.errors import UserError, any_of, show

hints = cache(get_type_hints)
"""Cached function that returns a dict from the field names of a dataclass to their types."""


def parse_value(hint: Any, value: Any, key: str) -> Any:
    """Convert ``value``, read from YAML, to the type ``hint``.

    ``key``: the dotted key of ``value``; "" for the complete configuration. Raises UserError for a wrong type or an
    unknown key.
    """
    options = members(hint)
    if value is None:
        return None if type(None) in options else _refuse_type(key, value, options)
    for option in options:
        if is_dataclass(option) and isinstance(value, Mapping):
            return _parse_section(option, value, key)
        if get_origin(option) is tuple and isinstance(value, (list, tuple)):
            return _parse_tuple(option, value, key)
        if (parsed := _parse_scalar(option, value)) is not None:
            return parsed
    _refuse_type(key, value, options)


def members(hint: Any) -> tuple[Any, ...]:
    """Return the members of ``hint`` if it is a union type, else a tuple that contains only ``hint``."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _parse_section(cls: Any, value: Mapping[Any, Any], key: str) -> Any:
    known = hints(cls)
    for name in value:
        if name not in known:
            raise unknown_key(f"{key}.{name}" if key else str(name))
    return cls(**{name: parse_value(known[name], value[name], f"{key}.{name}" if key else name) for name in value})


def _parse_tuple(hint: Any, value: list[Any] | tuple[Any, ...], key: str) -> tuple[Any, ...]:
    items = get_args(hint)
    if items[-1] is Ellipsis:
        return tuple(parse_value(items[0], v, f"{key}.{i}" if len(value) > 1 else key) for i, v in enumerate(value))
    if len(value) != len(items):
        _refuse_type(key, value, (hint,))
    return tuple(parse_value(item, v, f"{key}.{i}") for i, (item, v) in enumerate(zip(items, value, strict=True)))


def _parse_scalar(option: Any, value: Any) -> Any:
    """Return ``value`` as the type ``option``; None if ``value`` has another type.

    An int is converted if ``option`` is float, and a float without a fraction, such as 1e3, if ``option`` is int. Text
    is never converted to a number, and a number is never converted to a boolean.
    """
    if get_origin(option) is Literal:
        return value if any(type(value) is type(choice) and value == choice for choice in get_args(option)) else None
    if option is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if option is int and type(value) is float and value.is_integer():
        return int(value)
    if get_origin(option) is dict and isinstance(value, Mapping):
        return dict(value)
    return value if option in (bool, int, str) and type(value) is option else None


_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", type(None): "null"}


def describe(option: Any) -> str:
    """Return the description of type ``option`` for error messages, such as "a list of numbers"."""
    origin, items = get_origin(option), get_args(option)
    if origin is Literal:
        return any_of(map(str, items))
    if origin is tuple:
        inner = "sections" if is_dataclass(items[0]) else "texts" if items[0] is str else "numbers"
        return f"a list of {inner}" if items[-1] is Ellipsis else f"a list of {len(items)} {inner}"
    return _TYPE_NAMES.get(option, "a section with keys")


def _refuse_type(key: str, value: Any, options: tuple[Any, ...]) -> NoReturn:
    is_choice = any(get_origin(option) is Literal for option in options)
    fault = "is not a possible value" if is_choice else "has the wrong type"
    fix = f"set it to {any_of(map(describe, options))}"
    raise UserError(f"{key}={show(value)} {fault}", fix, key=key, value=value)


def key_paths(cls: Any = Config, prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every section and key in the schema, each section before its keys.

    Keys in a list of sections have no index: data.train.split. ``prefix``: text before each path.
    """
    for field in fields(cls):
        path = f"{prefix}{field.name}"
        yield path
        if (section := _section(hints(cls)[field.name])) is not None:
            yield from key_paths(section, path + ".")


def changed_names(section: Any) -> list[str]:
    """Return the names of the fields of a configuration section whose value is not the default."""
    default = type(section)()
    return [field.name for field in fields(section) if getattr(section, field.name) != getattr(default, field.name)]


def _section(hint: Any) -> Any:
    """Return the dataclass in the type ``hint``; None if ``hint`` contains no dataclass.

    ``hint`` may be a dataclass, a tuple of dataclasses, or a union with one of these.
    """
    for option in members(hint):
        inner = get_args(option)[0] if get_origin(option) is tuple else option
        if is_dataclass(inner):
            return inner
    return None


def type_of(key: str) -> Any:
    """Return the type of the configuration key ``key``; None if the key does not exist.

    Numbers in the dotted path ``key`` are list indices.
    """
    hint: Any = Config
    for name in key.split("."):
        section = _section(hint)
        if section is None:
            return None
        if not name.isdigit():
            hint = hints(section).get(name)
    return hint


def unknown_key(key: str) -> UserError:
    """Return the UserError for an unknown key; its message suggests existing keys with similar names.

    If no name is similar, the message lists the keys in the section of ``key``. If the recipe has the dotted path of an
    existing key as one key, the message explains the notation.
    """
    section = key.rpartition(".")[0]
    if key in key_paths():
        fix = "write its sections as nested mappings, because dots separate keys only on the command line"
    elif similar := similar_keys(key)[:3]:
        fix = f"did you mean {any_of(similar)}?"
    else:
        names = [path.rpartition(".")[2] for path in _keys_in(section)]
        fix = f"choose {any_of(names)}" + (f" in {section}" if section else "")
    return UserError(f"unknown key {key}", fix, key=key)


def similar_keys(key: str) -> list[str]:
    """Return the existing keys that the user may have meant by the unknown ``key``, the most similar first.

    First choice: keys with the same name (the part after the last dot), in the section of ``key`` or else in any
    section. Then: the key of this section with the most similar name; the key with another separator (a dot for an
    underscore); keys of this section with a common word; keys with a similar name in any section.
    """
    section, _, name = key.rpartition(".")
    # dtensor_cfg has the name automodel_cfg in later versions of NeMo-RL; a number of GPUs is not cluster.gpu
    name = {"automodel_cfg": "dtensor_cfg", "gpus": "gpus_per_node"}.get(name, name)
    by_name: dict[str, list[str]] = {}
    for path in key_paths():
        by_name.setdefault(path.rpartition(".")[2], []).append(path)
    same = by_name.get(name, [])
    if here := [path for path in same if path.rpartition(".")[0] == section] or same:
        return here
    neighbours = {path.rpartition(".")[2]: path for path in _keys_in(section)} if section else {}
    if close := difflib.get_close_matches(name, neighbours, 1, 0.6):
        return [neighbours[close[0]]]
    if joined := [path for path in key_paths() if path.replace(".", "_") == key.replace(".", "_")]:
        return joined
    words = set(name.split("_"))
    if common := [path for other, path in neighbours.items() if words & set(other.split("_"))]:
        return common
    return [path for similar in difflib.get_close_matches(name, by_name, 1, 0.8) for path in by_name[similar]]


def _keys_in(section: str) -> list[str]:
    """Return the paths of the keys directly in ``section``; "" for the complete configuration."""
    return [path for path in key_paths() if path.rpartition(".")[0] == section]
