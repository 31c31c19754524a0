"""Stop requests: signals of a launcher, a scheduler or a user, and the time limit of a run."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_REQUEST_S = 5.0
"""Seconds after the first stop signal, during which further signals are ignored as duplicates.

Duplicates are usual: a scheduler signals every process, and a launcher also forwards the signal that it receives.
"""

_listening: list[StopSignals] = []


class StopSignals:
    """Handler of the stop signals SIGTERM, SIGUSR1 and SIGINT of this process.

    ``on_first`` is called with the name of the first signal, ``on_later`` with the name of each later signal. Signals
    within SAME_REQUEST_S seconds after the first one are ignored. Both functions run in a separate thread, because the
    main thread, in which Python runs signal handlers, may hang in a collective. ``requested`` is the first signal, or
    None.
    """

    def __init__(
        self,
        on_first: Callable[[str], None],
        on_later: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.requested: signal.Signals | None = None
        self._on_first, self._on_later = on_first, on_later
        self._clock = clock
        self._first_time: float | None = None
        self._handlers_before: dict[signal.Signals, Any] = {}

    def handle(self, number: int) -> None:
        """Call ``on_first`` or ``on_later`` for the signal ``number``; called in the signal thread."""
        name = signal.Signals(number).name
        if self._first_time is None:
            self._first_time = self._clock()
            self.requested = self.requested or signal.Signals(number)
            self._on_first(name)
        elif self._clock() - self._first_time > SAME_REQUEST_S:
            self._on_later(name)

    def listen(self) -> None:
        """Install the signal handlers and start the thread that calls ``handle``; call it in the main thread."""
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._handlers_before = {number: signal.signal(number, self._in_main_thread) for number in SIGNALS}
        for number in SIGNALS:
            signal.siginterrupt(number, False)  # otherwise system calls of libraries fail with EINTR
        self._descriptor_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._read, name="signals", daemon=True)
        self._thread.start()
        _listening.append(self)

    def close(self) -> None:
        """Restore the previous signal handlers and stop the signal thread."""
        if self not in _listening:
            return
        _listening.remove(self)
        signal.set_wakeup_fd(self._descriptor_before)
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        self._writer.shutdown(socket.SHUT_WR)  # close() is not enough: a forked child may hold the socket open
        self._thread.join()
        self._writer.close()
        self._reader.close()

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or signal.Signals(number)

    def _read(self) -> None:
        while numbers := self._reader.recv(64):
            for number in numbers:
                if number in SIGNALS:
                    self.handle(number)


def ignore_signals() -> None:
    """Ignore all further stop signals of this process; call it in the main thread."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _reset_in_forked_child() -> None:
    """Restore the default signal handlers in a forked child, so that a signal ends only the child."""
    if _listening:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _listening.clear()


os.register_at_fork(after_in_child=_reset_in_forked_child)


class Deadline:
    """Time limit of a run: ``limit_s`` seconds after ``started``; no limit if ``limit_s`` is None.

    ``started``: start time of the run in seconds, as returned by ``clock``. The next step is expected to take as long
    as the slowest step so far, and a checkpoint save as long as the slowest save so far. Before the first save, a save
    is expected to take as long as a step.
    """

    def __init__(self, limit_s: float | None, started: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._started, self._clock = limit_s, started, clock
        self._step_s = self._save_s = 0.0

    def record(self, step_s: float, save_s: float) -> None:
        """Record the durations of a training step and of a checkpoint save, in seconds.

        ``step_s``: without saves. ``save_s``: 0 if no save has finished.
        """
        self._step_s = max(self._step_s, step_s)
        self._save_s = max(self._save_s, save_s)

    def is_near(self) -> bool:
        """Return whether one more step and a checkpoint save are expected to end after the time limit."""
        if self._limit_s is None:
            return False
        return self._clock() - self._started + self._step_s + (self._save_s or self._step_s) > self._limit_s


def seconds_of(text: str | None) -> float | None:
    """Return the duration ``text``, in the format ``DD:HH:MM:SS``, in seconds; None if ``text`` is None."""
    if text is None:
        return None
    days, hours, minutes, seconds = map(int, text.split(":"))
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
