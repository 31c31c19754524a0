"""Requests to stop: signals of a launcher, a scheduler or a user, and the time by which a run must have saved."""

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
"""Seconds in which further signals are the same request: a scheduler signals every process, and a launcher hands on."""

_listening: list[StopSignals] = []


class StopSignals:
    """The first signal is noted and told to ``on_first``; one that comes later than duplicates do, to ``on_again``.

    Both get the signal's name, in a thread of their own: Python runs handlers in the main thread alone, which may be
    inside a collective for ever. Where that runs, it knows of the request at once, by ``asked``.
    """

    def __init__(
        self,
        on_first: Callable[[str], None],
        on_again: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.asked: signal.Signals | None = None
        self._on_first, self._on_again = on_first, on_again
        self._clock = clock
        self._since: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def notice(self, number: int) -> None:
        """A signal came, as the thread hears."""
        name = signal.Signals(number).name
        if self._since is None:
            self._since = self._clock()
            self.asked = self.asked or signal.Signals(number)
            self._on_first(name)
        elif self._clock() - self._since > SAME_REQUEST_S:
            self._on_again(name)

    def listen(self) -> None:
        """Take the signals from now on; in the main thread."""
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = {number: signal.signal(number, self._in_main_thread) for number in SIGNALS}
        for number in SIGNALS:
            signal.siginterrupt(number, False)  # no library's system call fails for it
        self._descriptor_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._read, name="signals", daemon=True)
        self._thread.start()
        _listening.append(self)

    def close(self) -> None:
        """Leave the signals to whoever had them before."""
        if self not in _listening:
            return
        _listening.remove(self)
        signal.set_wakeup_fd(self._descriptor_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._writer.shutdown(socket.SHUT_WR)  # a forked child may hold it open
        self._thread.join()
        self._writer.close()
        self._reader.close()

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or signal.Signals(number)

    def _read(self) -> None:
        while numbers := self._reader.recv(64):
            for number in numbers:
                if number in SIGNALS:
                    self.notice(number)


def ignore_signals() -> None:
    """From here on nothing but a kill ends the process before its work is done; in the main thread."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _in_a_forked_child() -> None:
    """A child that shares this memory must end by a signal as any process does, and not report it as its parent's."""
    if _listening:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _listening.clear()


os.register_at_fork(after_in_child=_in_a_forked_child)


class Deadline:
    """Whether the next step might end, and its checkpoint be written, only after ``limit_s`` since ``started``.

    ``limit_s``: seconds, None for no limit; ``started``: by ``clock``. A step is expected to take as long as the
    longest so far, and so is a save; before the first save it is taken to last like a step.
    """

    def __init__(self, limit_s: float | None, started: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._started, self._clock = limit_s, started, clock
        self._step_s = self._save_s = 0.0

    def took(self, step_s: float, save_s: float) -> None:
        """A step took so long, and a save so long beside it (0 where there was none yet)."""
        self._step_s = max(self._step_s, step_s)
        self._save_s = max(self._save_s, save_s)

    def near(self) -> bool:
        """Whether there is no time for one more step."""
        if self._limit_s is None:
            return False
        return self._clock() - self._started + self._step_s + (self._save_s or self._step_s) > self._limit_s


def seconds_of(text: str | None) -> float | None:
    """``DD:HH:MM:SS`` in seconds; None stays None."""
    if text is None:
        return None
    days, hours, minutes, seconds = map(int, text.split(":"))
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
