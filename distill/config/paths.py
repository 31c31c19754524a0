"""Paths of a recipe, brought to one spelling before they are compared or created."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.config.parse import refuse

PATH_KEYS = (
    "policy.model_name",
    "policy.tokenizer.name",
    "policy.tokenizer.chat_template",
    "teacher.model_name",
    "teacher.tokenizer.name",
    "teacher.tokenizer.chat_template",
    "checkpointing.checkpoint_dir",
    "logger.log_dir",
    "runtime.run_dir",
)
"""Keys that hold a path, or a hub name in its place."""
DATASET_PATH_KEYS = ("data_path", "prompt_file", "system_prompt_file")
"""The same of each entry of data.default, data.train and data.validation."""


def normalize(path: str, key: str) -> str:
    """``path`` with ``~`` expanded and without ``.`` parts, doubled and trailing slashes.

    A leading ``./`` stays in front of what does not exist: ``./owner/name`` must not become a name of the hub.

    ``..`` stays: behind a symbolic link its target is not the folder that the text suggests. Raises UserError, naming
    ``key``, for the home folder of an unknown user and for a symbolic link to nothing.
    """
    expanded = os.path.expanduser(path)
    dotted = expanded.startswith("./")
    expanded = str(Path(expanded)) if expanded else expanded
    if dotted and not os.path.lexists(expanded):
        expanded = f"./{expanded}"
    if os.path.islink(expanded) and not os.path.exists(expanded):
        refuse(
            f"{key}={path} is a symbolic link to {os.readlink(expanded)}, which does not exist: create that, or correct"
            " the path"
        )
    if expanded.startswith("~"):
        refuse(
            f"{key}={path} begins with the home folder of a user that this machine doesn't have: write the complete"
            f" path, or ./{path} for a folder of that name"
        )
    return expanded


def normalize_paths(tree: dict[str, Any]) -> None:
    """Normalize every path of a recipe in place; ``tree`` has no interpolations left and data sets are filled in.

    Where two keys name one folder by different paths (a symbolic link, a relative and an absolute path, a hub name and
    its folder in the hub's cache), the teacher's take the student's spelling: the same model is the same text.
    """
    for key, section, name in _paths(tree):
        section[name] = normalize(section[name], key)
    student = tree["policy"].get("model_name")
    teacher = tree["teacher"]
    tokenizers = [model["tokenizer"] for model in (tree["policy"], teacher) if isinstance(model.get("tokenizer"), dict)]
    for section, name in [(teacher, "model_name"), *((tokenizer, "name") for tokenizer in tokenizers)]:
        if same_place(section.get(name), student):
            section[name] = student


def _paths(tree: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(key, the section that holds it, its name there) of each path that is set to a text."""
    for key in PATH_KEYS:
        *sections, name = key.split(".")
        place: Any = tree
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if isinstance(place, dict) and isinstance(place.get(name), str):
            yield key, place, name
    data = tree["data"]
    for part in ("default", "train", "validation"):
        entries = data.get(part)
        for entry in entries if isinstance(entries, list) else [entries]:
            for name in DATASET_PATH_KEYS:
                if isinstance(entry, dict) and isinstance(entry.get(name), str):
                    yield f"data.{part}.{name}", entry, name


def same_place(one: Any, other: Any) -> bool:
    """Whether two values of a path key name the same file or folder, or the same model of the hub."""
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    return one == other or _same_file(one, other) or _caches(one, other) or _caches(other, one)


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # one of them doesn't exist, or is no name that a file can have
        return False


def _caches(folder: str, name: str) -> bool:
    """Whether ``folder`` is a snapshot of the hub model ``name`` in the hub's cache."""
    if name.count("/") != 1 or os.path.exists(name) or not os.path.isdir(folder):
        return False
    parts = Path(folder).resolve().parts
    return parts[-3:-1] == (f"models--{name.replace('/', '--')}", "snapshots")


def is_path_key(key: str) -> bool:
    """Whether the values of ``key`` are to be compared as paths."""
    return key in PATH_KEYS or (key.startswith("data.") and key.rpartition(".")[2] in DATASET_PATH_KEYS)


def same_value(key: str, one: Any, other: Any) -> bool:
    """Whether two values of ``key`` mean the same: equal, or paths to the same place."""
    return bool(one == other) or (is_path_key(key) and same_place(one, other))
