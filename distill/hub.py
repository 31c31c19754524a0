"""Explain why a model or dataset of the Hugging Face hub is not on this machine, and how to fetch it."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distill.errors import reason

FETCH = "python -m scripts.fetch --config ..."
"""Command that downloads the models and datasets of a recipe."""
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""Error numbers of a disk that is full or read-only."""


def offline_variable() -> str | None:
    """Return the environment variable that forbids downloads, as "NAME=value"; None if downloads are allowed."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return None
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((f"{name}={value}" for name in names if (value := os.environ.get(name))), "HF_HUB_OFFLINE=1")


def model_cache() -> str:
    """Return the folder of the models that were downloaded from the hub."""
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def is_hub_name(name: str) -> bool:
    """Return whether ``name`` has the form of a hub name (owner/name) and not of a path.

    ``name`` does not exist on this machine. A path starts with ".", "/" or "~", or its first part is models, runs or
    an existing folder.
    """
    owner = name.partition("/")[0]
    is_path = name.startswith((".", "/", "~")) or owner in ("models", "runs") or os.path.isdir(owner)
    return not is_path and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def is_missing(error: Exception) -> bool:
    """Return whether ``error`` means that a file is not cached and the hub did not send it.

    Returns False for the ValueError of a dataset that the hub sends, but that lacks the requested split or subset.
    """
    from huggingface_hub.errors import DryRunError, HfHubHTTPError

    is_http = isinstance(error, (HfHubHTTPError, DryRunError)) or type(error).__module__.startswith("httpx")
    is_absent = isinstance(error, (ConnectionError, FileNotFoundError)) or "NotFoundError" in type(error).__name__
    return is_http or is_absent


def cause_and_fix(error: Exception, name: str, kind: str = "model") -> tuple[str, str]:
    """Return why the hub's repository ``name`` was not downloaded, as a clause, and the fix.

    ``kind``: model or dataset.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    fetch = f"run {FETCH} with the arguments of this run on a machine that reaches the hub"
    if offline := offline_variable():
        return f"{offline} forbids downloads", f"{fetch}, with HF_HUB_OFFLINE=0"
    found = _chain(error)
    if any(isinstance(each, GatedRepoError) for each in found):
        url = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
        fix = f"accept the licence at {url}, set HF_TOKEN to a token of that account, and run {FETCH}"
        return "the hub sends it only to accounts that accepted its licence", fix
    if any(isinstance(each, RepositoryNotFoundError) or "DatasetNotFound" in type(each).__name__ for each in found):
        return f"the hub shows no {kind} of this name", "correct the name, or set HF_TOKEN to a token that may read it"
    for each in found:
        if isinstance(each, OSError) and each.errno in _CANNOT_WRITE:
            return f"the download failed ({reason(each)})", "free disk space, or set HF_HOME to a writable folder"
    return f"this machine does not reach {constants.ENDPOINT} ({_short(found[-1])})", fetch


def _chain(error: BaseException) -> list[BaseException]:
    """Return ``error``, its cause, the cause of its cause, and so on."""
    found = [error]
    while (cause := found[-1].__cause__) is not None:
        found.append(cause)
    return found


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if 0 < len(text) <= 60 else type(error).__name__


@contextmanager
def offline_hub() -> Iterator[None]:
    """In the ``with`` block, models and datasets of the Hugging Face hub come from the local cache only.

    If the library ``datasets`` is first imported in the block, it stays offline afterwards.
    """
    from huggingface_hub import constants

    modules: list[Any] = [constants, *([sys.modules["datasets.config"]] if "datasets.config" in sys.modules else [])]
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
