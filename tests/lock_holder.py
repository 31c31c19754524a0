"""A second process that holds the lock of a directory."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from distill.checkpoint.lock import DirectoryLock


def _hold(folder: Path, end: Connection) -> None:
    lock = DirectoryLock(folder, "a.key")
    end.send(f"{lock} is locked")
    end.poll(None)


@contextlib.contextmanager
def lock_holder(folder: Path) -> Iterator[BaseProcess]:
    """Yield a process that holds the lock until it is killed; it is forked, because a new one would import torch."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(folder, theirs))
    process.start()
    try:
        assert ours.poll(60)
        yield process
    finally:
        process.kill()
        process.join()
