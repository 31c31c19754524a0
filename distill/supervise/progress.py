"""Where this rank is in the program, as the watch tells the other ranks: the phase, and what was done of it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Progress:
    """A rank's place; ranks run one program, so ``number`` tells who is behind."""

    number: int = 0
    """How many phases were entered or left."""
    phase: str = "starting"
    step: int = 0
    """The step that is being made, the first is 1; 0 before."""
    done: int = 0
    """Units of work since the start: tokens, micro-batches, tensors; it moves where work moves."""
    timed: bool = True
    """Whether standing still for long is a fault."""


CURRENT = Progress()
"""This process's place: a process is one rank."""


def heartbeat() -> None:
    """Something of the phase is done; called wherever a long phase has a loop."""
    CURRENT.done += 1


def at_step(step: int) -> None:
    """Step ``step`` begins, the first being 1."""
    CURRENT.step = step


@contextmanager
def phase(name: str, timed: bool = True) -> Iterator[None]:
    """Be in ``phase``, which all ranks enter in the same order; inside another it is a part of that."""
    before, timed_before = CURRENT.phase, CURRENT.timed
    inner = before if before.startswith(_OUTSIDE) else f"{before}: {name}"
    CURRENT.number, CURRENT.phase, CURRENT.timed = (
        CURRENT.number + 1,
        name if inner == before else inner,
        timed and timed_before,
    )
    try:
        yield
    finally:
        after = f"{_OUTSIDE[0]}{name}" if inner == before else before
        CURRENT.number, CURRENT.phase, CURRENT.timed = CURRENT.number + 1, after, timed_before


_OUTSIDE = ("after ", "starting")


def waits_for_others() -> bool:
    """Whether the main thread is inside a call of torch.distributed: it waits for ranks that have not come."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return frame is not None and "/torch/distributed/" in frame.f_code.co_filename
