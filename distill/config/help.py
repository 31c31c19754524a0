"""Print ``--help`` with tyro: every key with its docstring and its value in the recipe."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from distill.config.schema import Config

DESCRIPTION = """Train a student language model on its own responses; the teacher scores every response token.

Keys are set in the recipe, or on the command line as key.path=value, ++key.path=value, --key.path value or
--key.path=value. If a key is set twice, the last value is used. Values are YAML: null, true, [1, 2], {a: 1}. The
defaults shown below are the recipe's values."""


@dataclass(frozen=True)
class _Usage:
    settings: Annotated[tyro.conf.FlagConversionOff[Config], tyro.conf.arg(name="")]
    """Configuration keys; the defaults are the values in the recipe."""
    config: Path
    """Recipe (a YAML file). Its key "defaults" lists parent recipes."""
    dry_run: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(aliases=["--dry-run"])] = False
    """Print the resolved configuration and the memory forecast, and exit."""


def print_help(config: Config, path: Path) -> None:
    """Print the text of ``--help``, with the values of ``config`` as defaults.

    ``path``: the recipe from which ``config`` was loaded.
    """
    registry = ConstructorRegistry()
    registry.primitive_rule(_as_yaml)
    try:
        tyro.cli(
            _Usage,
            prog="python -m distill.train",
            description=DESCRIPTION,
            args=["--help"],
            default=_Usage(config, path),
            use_underscores=True,
            config=(tyro.conf.AvoidSubcommands,),
            registry=registry,
        )
    except SystemExit:
        return
    except BrokenPipeError:  # `--help | head`: discard the rest of the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _as_yaml(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Return the tyro spec that shows a dict or a list of dataclasses as one flag; None for other types.

    Without this spec, tyro shows one flag per entry, and no flag for an empty dict or list.
    """
    options = get_args(info.type) if type(None) in get_args(info.type) else (info.type,)
    for option in options:
        items = get_args(option)
        if get_origin(option) is dict or (get_origin(option) is tuple and is_dataclass(items[0])):
            return PrimitiveConstructorSpec(
                nargs=1,
                metavar="YAML",
                instance_from_str=lambda words: words[0],
                is_instance=lambda value: True,
                str_from_instance=lambda value: [_shown(value)],
            )
    return None


def _shown(value: Any) -> str:
    """Return ``value`` as YAML. A dataclass is shown without the fields that are None or empty."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if is_dataclass(value):
        value = {name: v for name, v in vars(value).items() if v not in (None, (), {})}
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_shown(v)}" for name, v in value.items()) + "}"
    return "null" if value is None else str(value)
