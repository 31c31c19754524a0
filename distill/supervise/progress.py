"""Progress of this rank: counters, and the current phase, which is a named part of the run.

The watchdog sends the progress to other ranks; the console of the main rank shows it (progress_report.py).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
STARTING, AFTER = "starting", "after "
"""Value of ``Progress.phase`` before the first phase, and its prefix between two phases (``after NAME``)."""


@dataclass
class Progress:
    """Progress counters of one rank, and its phase: a named part of the run, such as ``generation``.

    All ranks enter the same phases in the same order.
    """

    phase_changes: int = 0
    """Number of phase entries and exits since the start; ranks with smaller numbers are behind."""
    phase: str = STARTING
    """Name of the current phase; ``outer: inner`` for a nested phase, ``after NAME`` between two phases."""
    step: int = 0
    """Number of the current training step, counted from 1; 0 before the first step."""
    work_units: int = 0
    """Number of finished units of work (tokens, micro-batches, tensors) since the start."""
    timed: bool = True
    """Whether the run fails after ``runtime.phase_timeout_s`` seconds without progress in this phase."""
    total: int = 0
    """Number of items of the current task; 0 without a task. See ``task``."""
    done: int = 0
    """Number of finished items of the current task."""
    unit: str = ""
    """Plural name of the items of the current task, such as ``responses``."""
    tokens: int = 0
    """Number of tokens that the current task has generated."""


CURRENT = Progress()
"""Progress of this process, which is one rank."""


def heartbeat(done: int = 0, tokens: int = 0) -> None:
    """Count one finished unit of work (token, micro-batch, tensor).

    Loops inside long phases call it in every iteration, so that the watchdog detects their progress. ``done``: number
    of items of the current task that are finished since the last call. ``tokens``: number of new tokens.
    """
    CURRENT.work_units += 1
    CURRENT.done += done
    CURRENT.tokens += tokens


@contextmanager
def task(total: int, unit: str) -> Iterator[None]:
    """Start a task of ``total`` items in the ``with`` block; ``heartbeat(done=...)`` counts finished items.

    ``unit``: plural name of the items, such as ``responses``. A nested task replaces the outer task until it ends.
    """
    outer = CURRENT.total, CURRENT.done, CURRENT.unit, CURRENT.tokens
    CURRENT.total, CURRENT.done, CURRENT.unit, CURRENT.tokens = total, 0, unit, 0
    try:
        yield
    finally:
        CURRENT.total, CURRENT.done, CURRENT.unit, CURRENT.tokens = outer


def set_step(step: int) -> None:
    """Record that training step ``step``, counted from 1, begins."""
    CURRENT.step = step


@contextmanager
def phase(name: str, timed: bool = True) -> Iterator[None]:
    """Set the current phase during the ``with`` block; a nested phase is named ``outer: inner``.

    All ranks enter the same phases in the same order. ``timed=False`` disables the limit ``runtime.phase_timeout_s`` in
    this phase and in phases nested in it.
    """
    before, timed_before = CURRENT.phase, CURRENT.timed
    nested = not before.startswith((AFTER, STARTING))
    _change_phase(f"{before}: {name}" if nested else name, timed and timed_before)
    try:
        yield
    finally:
        _change_phase(before if nested else f"{AFTER}{name}", timed_before)


@contextmanager
def untimed() -> Iterator[None]:
    """Disable the limit ``runtime.phase_timeout_s`` during the ``with`` block; the phase keeps its name."""
    before, timed_before = CURRENT.phase, CURRENT.timed
    _change_phase(before, timed=False)
    try:
        yield
    finally:
        _change_phase(before, timed_before)


def counted(items: Iterable[T]) -> Iterator[T]:
    """Yield ``items``, and report each as a finished item of the current task when the next one is requested."""
    for item in items:
        yield item
        heartbeat(done=1)


def _change_phase(name: str, timed: bool) -> None:
    CURRENT.phase_changes, CURRENT.phase, CURRENT.timed = CURRENT.phase_changes + 1, name, timed


def in_collective() -> bool:
    """Return whether the main thread is inside a torch.distributed call, where it waits for other ranks."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return frame is not None and "/torch/distributed/" in frame.f_code.co_filename
