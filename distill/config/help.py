"""Print ``--help``, ``--help WORD`` and ``--help-all`` from the dataclasses of the schema and their docstrings."""

from __future__ import annotations

import ast
import inspect
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args, get_origin

from distill.config.command_line import OPTIONS
from distill.config.parse import describe, hints, members
from distill.config.schema import Config, DatasetConfig
from distill.errors import UserError, any_of, show

USAGE = "python -m distill.train --config recipes/NAME.yaml [OPTION ...] [key.path=value ...]"
RANKS = "On N GPUs of a machine: torchrun --nproc-per-node N -m distill.train --config recipes/NAME.yaml ..."
VALUES = "Values are YAML: true, null, 1e-5, [1, 2], {a: 1}. Put a value with spaces in quotes: key.path='two words'."

COMMON_KEYS = {
    "policy.model_name": "student: a hub name or a folder",
    "teacher.model_name": "teacher: a hub name or a folder",
    "data.train.data_path": "your own training data: a file or a folder",
    "data.train.dataset_name": "or a dataset of the hub",
    "data.default.prompt_file": "text file with {} in place of the problem",
    "distillation.max_num_steps": "number of training steps",
    "distillation.num_prompts_per_step": "prompts per step",
    "distillation.num_generations_per_prompt": "responses per prompt",
    "policy.train_global_batch_size": "responses per optimizer step",
    "policy.optimizer.kwargs.lr": "learning rate",
    "policy.dtensor_cfg.lora_cfg.enabled": "train low-rank adapters; see --help lora",
    "policy.max_total_sequence_length": "maximum tokens of prompt and response",
    "policy.generation.max_new_tokens": "maximum tokens of a response",
    "policy.generation.temperature": "sampling temperature",
    "loss_fn.kl_type": "divergence: forward, reverse, mixed, jsd, sampled",
    "distillation.context_distillation.enabled": "teacher reads a filled template",
    "distillation.context_distillation.teacher_prefix_template": "this template",
    "distillation.val_period": "steps between validations; 0: none",
    "checkpointing.checkpoint_dir": "checkpoints; the same run resumes from here",
    "cluster.gpus_per_node": "ranks per node; one GPU for each",
    "logger.wandb_enabled": "log to Weights & Biases",
}
"""Maps the most used keys to a description of a few words."""

_WIDTH, _COLUMN = 120, 70


@dataclass(frozen=True)
class Entry:
    """One key or section of the configuration, as the help shows it."""

    path: str
    """Dotted path. ``N`` is the index in a list of sections."""
    kind: str
    """Description of the key's type; "" for a section."""
    value: str
    """Value in YAML notation; "" for a section."""
    text: str
    """Docstring, joined to one paragraph."""
    same_as: str = ""
    """Path of the key in data.train that has the same docstring, which is printed only once; "" for other keys."""


def print_help(config: Config, path: Path | None, words: Sequence[str] | None, all_keys: bool) -> None:
    """Print the help with the values of ``config``.

    ``path``: the recipe from which ``config`` was loaded; None for the default values. ``words``: the words after
    ``--help``; ``all_keys``: whether to print all keys. Raises UserError if no key contains the words.
    """
    entries = list(_entries(Config, config, ""))
    source = f"values of {path}" if path else "default values; with --config FILE, the values of a recipe"
    if all_keys:
        lines = [USAGE, RANKS, "", *_options(), "", VALUES, f"All keys, with the {source}:", *_reference(entries)]
    elif words:
        lines = _reference(_search(entries, words))
    else:
        lines = [USAGE, RANKS, *_options(), VALUES, f"The most used keys ({source}):", *_common(entries)]
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # `--help | head`: discard the rest of the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _entries(cls: Any, values: Any, prefix: str) -> Iterator[Entry]:
    """Yield an entry for each section and key of the dataclass ``cls``, except keys without effect.

    ``values``: instance of ``cls``; ``prefix``: text before each path.
    """
    texts = field_texts(cls)
    for field in fields(cls):
        path, value, text = f"{prefix}{field.name}", getattr(values, field.name), texts[field.name]
        if text.startswith("No effect"):
            continue
        hint = hints(cls)[field.name]
        item = get_args(hint)[0] if get_origin(hint) is tuple else hint
        if not is_dataclass(item):
            yield Entry(path, any_of(map(describe, members(hint))), yaml_text(value), text)
        elif item is DatasetConfig:
            yield Entry(path, "", "", text)
            yield from _dataset_entries(path, value)
        elif item is hint:
            yield Entry(path, "", "", text)
            yield from _entries(item, value, f"{path}.")
        else:
            yield Entry(path, "a list of sections", yaml_text(value), text)
            for entry in _entries(item, cast(Any, item)(), f"{path}.N."):
                yield replace(entry, value="...")


def _dataset_entries(path: str, value: Any) -> Iterator[Entry]:
    """Yield an entry for each key of the dataset section ``path``.

    ``value``: a dataset or a tuple of datasets. Unless there is exactly one dataset, the entries show default values.
    """
    datasets = value if isinstance(value, tuple) else (value,)
    for entry in _entries(DatasetConfig, datasets[0] if len(datasets) == 1 else DatasetConfig(), f"{path}."):
        same = f"data.train.{entry.path.rpartition('.')[2]}"
        yield replace(entry, same_as="" if entry.path == same else same)


@cache
def field_texts(cls: type) -> dict[str, str]:
    """Return a dict from the fields of the dataclass ``cls`` to their docstrings, each joined to one paragraph."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, after in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                texts[ast.unparse(field.target)] = " ".join(str(after.value.value).split())
    return texts


def yaml_text(value: Any) -> str:
    """Return ``value`` in YAML notation, on one line. A dataclass is shown without fields that are null or empty."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(yaml_text, value)) + "]"
    if is_dataclass(value):
        value = {name: v for name, v in vars(value).items() if v not in (None, (), {})}
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {yaml_text(v)}" for name, v in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _search(entries: Sequence[Entry], words: Sequence[str]) -> list[Entry]:
    """Return the section or the key that ``words`` names, or else all keys that contain all the words."""
    name = words[0].removeprefix("--").replace("-", "_").rstrip(".")
    if len(words) == 1 and (found := [e for e in entries if e.path == name or e.path.startswith(f"{name}.")]):
        return found
    wanted = [word.lower() for word in words]
    found = [e for e in entries if e.kind and all(word in f"{e.path} {e.text}".lower() for word in wanted)]
    if not found:
        what = " ".join(words)
        raise UserError(
            f"--help {what} finds no key with {'this word' if len(words) == 1 else 'these words'}",
            "use another word, or --help-all, which lists all keys",
            key="--help",
            value=what,
        )
    return sorted(found, key=lambda e: not all(word in e.path.lower() for word in wanted))


def _options() -> list[str]:
    return [f"  {option:<20} {text}" for option, text in OPTIONS.items()]


def _common(entries: Sequence[Entry]) -> list[str]:
    """Return one line for each of COMMON_KEYS: key, value and description."""
    values = {entry.path: entry.value for entry in entries}
    settings = ((f"{key}={values[key]}", text) for key, text in COMMON_KEYS.items())
    return [f"  {_cut(setting):<{_COLUMN - 2}} {text}" for setting, text in settings]


def _cut(setting: str) -> str:
    return setting if len(setting) <= _COLUMN - 2 else setting[: _COLUMN - 5] + "..."


def _reference(entries: Sequence[Entry]) -> list[str]:
    """Return the lines of the reference: for each entry, the key with value and type, and its indented docstring."""
    width = min(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns)
    paths = {entry.path for entry in entries}
    lines = []
    for entry in entries:
        title = f"{entry.path}={show(entry.value)}  ({entry.kind})" if entry.kind else f"\n{entry.path}:"
        text = f"See {entry.same_as}." if entry.same_as in paths else entry.text
        lines += [title] if len(title) <= width else textwrap.wrap(title, width, subsequent_indent="        ")
        lines += textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ")
    return lines
