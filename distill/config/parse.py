"""A plain tree of values becomes the dataclasses of schema.py; a value that doesn't fit is refused in one sentence."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from distill.config.schema import Config
from distill.errors import UserError, any_of, show


def refuse(sentence: str) -> NoReturn:
    """Raise UserError with ``sentence``."""
    raise UserError(sentence)


hints = cache(get_type_hints)
"""Field name -> type of a dataclass."""


def build(hint: Any, value: Any, key: str) -> Any:
    """``value`` as the type ``hint``; ``key`` is its path, for the sentence that refuses it."""
    options = members(hint)
    if value is None:
        return None if type(None) in options else _wrong(key, value, options)
    for option in options:
        if is_dataclass(option) and isinstance(value, Mapping):
            return _build_dataclass(option, value, key)
        if get_origin(option) is tuple and isinstance(value, (list, tuple)):
            return _build_tuple(option, value, key)
        if (fitting := _scalar(option, value)) is not None:
            return fitting
    _wrong(key, value, options)


def members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _build_dataclass(cls: Any, value: Mapping[Any, Any], key: str) -> Any:
    known = hints(cls)
    for name in value:
        if name not in known:
            refuse(unknown_key(f"{key}.{name}" if key else str(name)))
    return cls(**{name: build(known[name], value[name], f"{key}.{name}" if key else name) for name in value})


def _build_tuple(hint: Any, value: list[Any] | tuple[Any, ...], key: str) -> tuple[Any, ...]:
    items = get_args(hint)
    if items[-1] is Ellipsis:
        return tuple(build(items[0], v, f"{key}.{i}" if len(value) > 1 else key) for i, v in enumerate(value))
    if len(value) != len(items):
        _wrong(key, value, (hint,))
    return tuple(build(item, v, f"{key}.{i}") for i, (item, v) in enumerate(zip(items, value, strict=True)))


def _scalar(option: Any, value: Any) -> Any:
    """``value`` if it fits ``option``, else None; no text is read as a number, and no number as a truth value."""
    if get_origin(option) is Literal:
        return value if any(type(value) is type(choice) and value == choice for choice in get_args(option)) else None
    if option is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if get_origin(option) is dict and isinstance(value, Mapping):
        return dict(value)
    return value if option in (bool, int, str) and type(value) is option else None


_NAMES = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", type(None): "null"}


def describe(option: Any) -> str:
    """A type in the user's words."""
    origin, items = get_origin(option), get_args(option)
    if origin is Literal:
        return any_of(map(str, items))
    if origin is tuple:
        inner = "sections" if is_dataclass(items[0]) else describe(items[0]).split()[-1] + "s"
        return f"a list of {inner}" if items[-1] is Ellipsis else f"a list of {len(items)} {inner}"
    return _NAMES.get(option, "keys with values")


def _wrong(key: str, value: Any, options: tuple[Any, ...]) -> NoReturn:
    closed = any(get_origin(option) is Literal for option in options)
    fault = "isn't possible" if closed else "has the wrong type"
    refuse(f"{key}={show(value)} {fault}: set it to {any_of(map(describe, options))}")


def key_paths(cls: Any = Config, prefix: str = "") -> Iterator[str]:
    """Every key of the tree, sections before their keys; the keys of a list's entries stand under the list."""
    for field in fields(cls):
        path = f"{prefix}{field.name}"
        yield path
        if (section := _section(hints(cls)[field.name])) is not None:
            yield from key_paths(section, path + ".")


def _section(hint: Any) -> Any:
    """The dataclass that a key holds, alone or in a list; None if it holds values."""
    for option in members(hint):
        inner = get_args(option)[0] if get_origin(option) is tuple else option
        if is_dataclass(inner):
            return inner
    return None


def type_of(key: str) -> Any:
    """The type of a key path, numbers being places in lists; None if there is no such key."""
    hint: Any = Config
    for name in key.split("."):
        section = _section(hint)
        if section is None:
            return None
        if not name.isdigit():
            hint = hints(section).get(name)
    return hint


def unknown_key(key: str) -> str:
    """The sentence for a key that doesn't exist, with the key that may have been meant."""
    near = _near(key)
    return f"unknown key {key}: " + (f"did you mean {any_of(near[:3])}?" if near else "--help lists every key")


def _near(key: str) -> list[str]:
    """The keys of the same name elsewhere, or else the nearest by spelling: of its neighbours, or of all."""
    section, _, name = key.rpartition(".")
    name = {"automodel_cfg": "dtensor_cfg"}.get(name, name)  # its name in later versions of the reference
    by_name: dict[str, list[str]] = {}
    for path in key_paths():
        by_name.setdefault(path.rpartition(".")[2], []).append(path)
    same = by_name.get(name, [])
    if here := [path for path in same if path.rpartition(".")[0] == section] or same:
        return here
    neighbours = {path.rpartition(".")[2]: path for path in key_paths() if path.rpartition(".")[0] == section}
    if close := difflib.get_close_matches(name, neighbours, 1, 0.6):
        return [neighbours[close[0]]]
    return [path for other in difflib.get_close_matches(name, by_name, 1, 0.8) for path in by_name[other]]
