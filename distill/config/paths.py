"""Normalize paths of the configuration, find files of the project, detect paths to the same file or model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.errors import UserError

MODEL_PATH_KEYS = (
    "policy.model_name",
    "policy.tokenizer.name",
    "policy.tokenizer.chat_template",
    "policy.dtensor_cfg.lora_cfg.init_from",
    "teacher.model_name",
    "teacher.tokenizer.name",
    "teacher.tokenizer.chat_template",
)
"""Configuration keys whose value is the path of a file to read, or a Hugging Face hub name."""
RUN_PATH_KEYS = (
    "checkpointing.checkpoint_dir",
    "checkpointing.resume_from",
    "logger.log_dir",
    "runtime.run_dir",
)
"""Configuration keys whose value is the path of a folder that runs write."""
KEYWORDS = {"checkpointing.resume_from": ("latest", "never")}
"""Maps a key whose value is usually a path to its values that are no paths."""
PATH_KEYS = MODEL_PATH_KEYS + RUN_PATH_KEYS
"""Configuration keys whose value is a path or a Hugging Face hub name."""
DATASET_PATH_KEYS = ("data_path", "prompt_file", "system_prompt_file")
"""Names of the keys whose value is a path, in data.default and in each dataset of data.train and data.validation."""

SHIPPED_FOLDERS = ("recipes", "prompts", "models")
"""Folders of the project whose files are found from any working directory. An installed package has no models."""


def shipped(path: str | Path) -> str | None:
    """Return the absolute path of a file that the project ships, such as "prompts/cot.txt", or None.

    ``path``: a relative path that starts with one of SHIPPED_FOLDERS. In an installed package these folders are in the
    package, in a checkout at the top of the repository.
    """
    if Path(path).parts[:1] not in [(folder,) for folder in SHIPPED_FOLDERS]:
        return None
    package = Path(__file__).resolve().parents[1]
    found = (package if (package / SHIPPED_FOLDERS[0]).is_dir() else package.parent) / path
    return str(found) if os.path.exists(found) else None


def local_or_shipped(path: str) -> str:
    """Return the path of the shipped file of this name if only that file exists, otherwise ``path``."""
    return path if os.path.lexists(path) else shipped(path) or path


def normalize(path: str, key: str) -> str:
    """Expand ``~`` in ``path`` and remove ``.`` parts, repeated slashes and a trailing slash.

    A leading ``./`` is kept if the path does not exist, so that ``./owner/name`` is not read as a hub name. ``..`` is
    kept, because removing it changes the path's target after a symbolic link. ``key``: the configuration key of
    ``path``, for messages. Raises UserError for ``~name`` if no user has this name, and for a broken symbolic link.
    """
    expanded = os.path.expanduser(path)
    dotted = expanded.startswith("./")
    expanded = str(Path(expanded)) if expanded else expanded
    if dotted and not os.path.lexists(expanded):
        expanded = f"./{expanded}"
    if os.path.islink(expanded) and not os.path.exists(expanded):
        problem = f"{key}={path} is a symbolic link to {os.readlink(expanded)}, which does not exist"
        raise UserError(problem, "create the target or correct the path", key=key, value=path)
    if expanded.startswith("~"):
        problem = f"{key}={path} starts with the home folder of a user who does not exist on this machine"
        raise UserError(problem, f"write the complete path, or ./{path} for a folder of that name", key=key, value=path)
    return expanded


def normalize_paths(tree: dict[str, Any]) -> None:
    """Normalize every path of the resolved configuration ``tree`` in place.

    A path to read that does not exist is replaced by the path of the shipped file of this name. If the path of the
    teacher's model or of a tokenizer refers to the student's model, it is replaced by policy.model_name. Such a path
    is, for example, a symbolic link or a folder in the hub's cache. Afterwards, equal models have equal names.
    """
    for key, section, name in _paths(tree):
        if section[name] in KEYWORDS.get(key, ()):
            continue
        path = normalize(section[name], key)
        section[name] = path if key in RUN_PATH_KEYS else local_or_shipped(path)
    student = tree["policy"].get("model_name")
    teacher = tree["teacher"]
    tokenizers = [model["tokenizer"] for model in (tree["policy"], teacher) if isinstance(model.get("tokenizer"), dict)]
    for section, name in [(teacher, "model_name"), *((tokenizer, "name") for tokenizer in tokenizers)]:
        if same_place(section.get(name), student):
            section[name] = student


def _paths(tree: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield (dotted key, section that contains the key, name of the key in it) for each path set in ``tree``."""
    for key in PATH_KEYS:
        *sections, name = key.split(".")
        holder: Any = tree
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and isinstance(holder.get(name), str):
            yield key, holder, name
    data = tree["data"]
    for part in ("default", "train", "validation"):
        entries = data.get(part)
        for entry in entries if isinstance(entries, list) else [entries]:
            for name in DATASET_PATH_KEYS:
                if isinstance(entry, dict) and isinstance(entry.get(name), str):
                    yield f"data.{part}.{name}", entry, name


def same_place(one: Any, other: Any) -> bool:
    """Return whether two values of a path key refer to the same file, folder or hub model."""
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    return one == other or _same_file(one, other) or _caches(one, other) or _caches(other, one)


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # a path does not exist or is not a valid file name
        return False


def _caches(folder: str, name: str) -> bool:
    """Return whether ``folder`` is a snapshot of the hub model ``name`` in the hub's cache."""
    if name.count("/") != 1 or os.path.exists(name) or not os.path.isdir(folder):
        return False
    parts = Path(folder).resolve().parts
    return parts[-3:-1] == (f"models--{name.replace('/', '--')}", "snapshots")


def is_path_key(key: str) -> bool:
    """Return whether the value of ``key`` is a path or a hub name."""
    return key in PATH_KEYS or (key.startswith("data.") and key.rpartition(".")[2] in DATASET_PATH_KEYS)


def same_value(key: str, one: Any, other: Any) -> bool:
    """Return whether two values of ``key`` are equal, or refer to the same file, folder or hub model."""
    return bool(one == other) or (is_path_key(key) and same_place(one, other))
