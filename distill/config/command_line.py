"""Split the command line into options and overrides, with an error message for each kind of mistake."""

from __future__ import annotations

import difflib
import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NoReturn

from distill.config.parse import key_paths, similar_keys
from distill.config.paths import local_or_shipped
from distill.config.schema import Config
from distill.errors import UserError, any_of, show

OPTIONS = {
    "--config FILE": "the recipe, a YAML file: a path, or the name of a file in recipes/",
    "--dry-run": "check what a run checks before it loads weights, print the recipe and the plan, and exit",
    "--elsewhere": "with --dry-run, for a run on another machine: missing packages, models and files are warnings",
    "--help [WORD ...]": "the most used keys; with words: the section, the key, or all keys with these words",
    "--help-all": "all keys with their descriptions",
}
"""Maps each option of the program to its description for the help."""

_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
_HELP_FLAGS, _HELP_ALL_FLAGS = ("--help", "-h"), ("--help-all", "--help_all")
_DRY_RUN_FLAGS, _ELSEWHERE = ("--dry-run", "--dry_run"), "--elsewhere"
_FLAGS = _HELP_FLAGS + _HELP_ALL_FLAGS + _DRY_RUN_FLAGS

_OTHER_OPTIONS = {
    "wandb": "write logger.wandb_enabled=true",
    "no_wandb": "write logger.wandb_enabled=false",
    "tensorboard no_tensorboard": "write logger.tensorboard_enabled=true or false",
    "gpus num_gpus": "write cluster.gpus_per_node=NUMBER",
    "model": "write policy.model_name=NAME for the student, teacher.model_name=NAME for the teacher",
    "dataset": "write data.train.data_path=FILE or data.train.dataset_name=NAME",
    "resume resume_from restore": (
        "a run resumes from its newest checkpoint without an option; write checkpointing.resume_from=FOLDER for another"
    ),
    "output output_dir out": "write runtime.run_dir=FOLDER",
    "steps max_steps": "write distillation.max_num_steps=NUMBER",
    "version": "pip show distill prints the version; versions.json in a run directory lists those of all packages",
    "nproc_per_node nnodes node_rank rdzv_endpoint rdzv_backend standalone master_addr master_port": (
        "write options of torchrun before -m distill.train"
    ),
}
"""Maps names (separated by spaces) of options that do not exist to the fix in the error message."""


@dataclass
class CommandLine:
    """A command line that is split into options and overrides."""

    config_path: Path | None = None
    """Value of --config, as written; None without this option."""
    help_words: list[str] | None = None
    """Words after --help; None without --help."""
    help_all: bool = False
    """Whether the command line contains --help-all."""
    dry_run: bool = False
    """Whether the command line contains --dry-run."""
    elsewhere: bool = False
    """Whether ``--dry-run`` plans a run on another machine (``--elsewhere``)."""
    overrides: list[tuple[str, str]] = field(default_factory=list)
    """Pairs (key, value text), in the order of the command line."""

    @property
    def flag(self) -> str | None:
        """Return the option with which the program prints output and exits, "--help" or "--dry-run"; else None."""
        if self.help_all or self.help_words is not None:
            return "--help"
        return "--dry-run" if self.dry_run else None


def print_flag(argv: Sequence[str]) -> str | None:
    """Return "--help" or "--dry-run" if ``argv`` contains this flag, else None.

    With one of these flags, the program prints the output of the flag and exits without a run. For an invalid command
    line, the error is raised in ``parse_args``, not here.
    """
    try:
        return parse_command_line(argv).flag
    except UserError:
        return parse_command_line([word for word in argv if word in _FLAGS]).flag


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Split ``argv`` into options and overrides; raise UserError for a word that is neither."""
    line, words = CommandLine(), list(argv)
    if bad := [word for word in words if word != word.encode(errors="replace").decode()]:
        problem = f"{bad[0]!a} on the command line is not UTF-8 text"
        raise UserError(problem, "encode it as UTF-8", key=bad[0].partition("=")[0], value=bad[0])
    while words:
        word = words.pop(0)
        if word in _HELP_FLAGS:
            line.help_words = (line.help_words or []) + _take_bare_words(words)
        elif word in _HELP_ALL_FLAGS:
            line.help_all = True
        elif word in _DRY_RUN_FLAGS:
            line.dry_run = True
        elif word == _ELSEWHERE:
            line.elsewhere = True
        else:
            _add_override(line, word, words)
    if line.elsewhere and line.flag is None:
        raise UserError(f"{_ELSEWHERE} has no effect without --dry-run", "add --dry-run, or remove it", key=_ELSEWHERE)
    return line


def _take_bare_words(words: list[str]) -> list[str]:
    """Remove from ``words`` all words before the next option or override, and return the removed words."""
    count = next((i for i, word in enumerate(words) if not _is_bare(word)), len(words))
    taken, words[:count] = words[:count], []
    return taken


def _is_bare(word: str) -> bool:
    return "=" not in word and not word.startswith("-")


def _add_override(line: CommandLine, word: str, rest: list[str]) -> None:
    """Add the option ``--config`` or the override ``word`` to ``line``.

    ``rest``: the words after ``word`` on the command line. For ``--key value``, the value is removed from ``rest``.
    """
    key, equals, text = word.partition("=")
    is_flag = key.startswith("--")
    key = key[2:].replace("-", "_") if is_flag else key.lstrip("+")
    if _is_bare(word):
        _refuse_bare_word(word, rest, line)
    if not _KEY.fullmatch(key) or (is_flag and not _is_setting(key)):
        _refuse_option(word, key)
    if not equals:
        if not is_flag or not rest or rest[0].startswith("--"):
            raise UserError(f"{word} has no value", f"write {key}=value", key=key)
        text = rest.pop(0)
    if key != "config":
        line.overrides.append((key, text))
    elif line.config_path is not None:
        problem = f"--config={show(line.config_path)} and --config={show(text)} are set together"
        fix = "set one recipe; its key defaults can list several parent recipes"
        raise UserError(problem, fix, key="--config", value=text)
    else:
        line.config_path = Path(text)


def _is_setting(key: str) -> bool:
    """Return whether ``--key`` sets a key: it has a dot, or it is a section or --config."""
    return "." in key or key == "config" or key in {section.name for section in fields(Config)}


def _refuse_bare_word(word: str, rest: list[str], line: CommandLine) -> NoReturn:
    """Raise the UserError for a word that is not an option and has no equals sign."""
    is_recipe = os.path.isfile(local_or_shipped(f"recipes/{word}.yaml"))
    if is_recipe or word.endswith((".yaml", ".yml")) or os.path.isfile(word):
        raise UserError(f"{show(word)} is not an override", f"write --config {show(word)}", key="--config", value=word)
    if word in key_paths():
        raise UserError(f"{word} has no value", f"write {word}=value", key=word)
    if line.overrides:
        key, text = line.overrides[-1]
        value = " ".join([text, word, *_take_bare_words(rest)])
        raise UserError(
            f'the word "{show(word)}" follows {key}={show(text)} without an equals sign',
            f"put a value with spaces in quotes, as in {key}='{show(value)}', and write every key as key.path=value",
            key=key,
            value=word,
        )
    if _KEY.fullmatch(word):
        raise UserError(f"{word} has no value", f"write {word}=value", key=word)
    raise UserError(f"{word} is not an override", "write key.path=value or --key.path value", value=word)


def _refuse_option(word: str, key: str) -> NoReturn:
    """Raise the UserError for an unknown option; ``key``: its name without leading dashes, with underscores."""
    option = word.partition("=")[0]
    if not word.startswith("-"):
        raise UserError(f"{show(word)} is not an override", "write key.path=value or --key.path value", value=word)
    known = [name.split()[0] for name in OPTIONS]
    close = difflib.get_close_matches(f"--{key.lower().replace('_', '-').lstrip('-')}", known, 1, 0.7)
    others = [fix for names, fix in _OTHER_OPTIONS.items() if key in names.split()]
    if close:
        fix = f"did you mean {close[0]}?"
    elif others:
        fix = others[0]
    elif similar := similar_keys(key)[:3]:
        fix = f"did you mean {any_of(f'{name}=value' for name in similar)}?"
    else:
        fix = f"use {any_of(known)}, or write keys as key.path=value"
    raise UserError(f"{show(option)} is not an option", fix, key=option, value=word)
