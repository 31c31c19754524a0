"""Progress of this rank: counters, and the current phase, which is a named part of the run.

The watchdog sends the progress to other ranks.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Progress:
    """Progress counters of one rank, and its phase: a named part of the run, such as ``generation``.

    All ranks enter the same phases in the same order.
    """

    phase_changes: int = 0
    """Number of phase entries and exits since the start; ranks with smaller numbers are behind."""
    phase: str = "starting"
    """Name of the current phase; ``outer: inner`` for a nested phase."""
    step: int = 0
    """Number of the current training step, counted from 1; 0 before the first step."""
    work_units: int = 0
    """Number of finished units of work (tokens, micro-batches, tensors) since the start."""
    timed: bool = True
    """Whether the run fails after ``runtime.phase_timeout_s`` seconds without progress in this phase."""


CURRENT = Progress()
"""Progress of this process, which is one rank."""


def heartbeat() -> None:
    """Count one finished unit of work (token, micro-batch, tensor).

    Loops inside long phases call it in every iteration, so that the watchdog detects their progress.
    """
    CURRENT.work_units += 1


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
    nested = not before.startswith(_BETWEEN_PHASES)
    _change_phase(f"{before}: {name}" if nested else name, timed and timed_before)
    try:
        yield
    finally:
        _change_phase(before if nested else f"after {name}", timed_before)


_BETWEEN_PHASES = ("after ", "starting")


def _change_phase(name: str, timed: bool) -> None:
    CURRENT.phase_changes, CURRENT.phase, CURRENT.timed = CURRENT.phase_changes + 1, name, timed


def in_collective() -> bool:
    """Return whether the main thread is inside a torch.distributed call, where it waits for other ranks."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return frame is not None and "/torch/distributed/" in frame.f_code.co_filename
