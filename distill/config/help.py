"""--help: every key with its meaning and the value that the recipe gives it, printed by tyro."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from distill.config.schema import Config

DESCRIPTION = """Train a student language model on its own answers, judged token by token by a teacher.

A key is set in the recipe, or here as key.path=value, ++key.path=value, --key.path value or --key.path=value; later
wins. Values are YAML: null, true, [1, 2], {a: 1}. The defaults shown are those of the recipe that --config names."""


@dataclass(frozen=True)
class _Usage:
    settings: Annotated[tyro.conf.FlagConversionOff[Config], tyro.conf.arg(name="")]
    """The recipe's keys."""
    config: Path
    """The recipe: a YAML file, whose key "defaults" may name parents."""
    dry_run: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(aliases=["--dry-run"])] = False
    """Print the resolved configuration and stop."""


def print_help(config: Config, path: Path) -> None:
    """Print the usage to stdout, with ``config``'s values, those of the recipe at ``path``, as defaults."""
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
    except BrokenPipeError:  # `--help | head`: what is left to say goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _as_yaml(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """One flag for a mapping or a list of sections, where tyro would make a flag of every entry or of none."""
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
    """A default in few words: what is set in it, as YAML would write it."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if is_dataclass(value):
        value = {name: v for name, v in vars(value).items() if v not in (None, (), {})}
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_shown(v)}" for name, v in value.items()) + "}"
    return "null" if value is None else str(value)
