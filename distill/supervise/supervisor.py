"""What ends a rank from outside of its program, and what it says and leaves behind when it ends."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from distill.supervise.signals import StopSignals, ignore_signals
from distill.supervise.status import ExitStatus, Status
from distill.supervise.watchdog import POLL_S, Watchdog

log = logging.getLogger(__name__)

_LAST_WORDS_S = 15
"""Seconds that a rank may take to say why it leaves: a lock may be held by whatever hangs."""
_LOADING_TIMEOUT_S = 1800.0


class Supervisor:
    """Signals, watch and status of this rank; ``run_program`` makes it, and a World carries it.

    Before the loop a signal ends the run at once: nothing would be lost. In the loop it is only noted, and the loop
    ends between two steps.
    """

    def __init__(self, main: bool) -> None:
        self.status = Status(main)
        self.started = time.monotonic()
        """When the program began, by time.monotonic."""
        self.stopped: str | None = None
        """Why the loop was left before its last step."""
        self.stacks_to: Path | None = None
        """Where the stacks of all threads are written when the run fails from outside of its program."""
        self._loops = False
        self._told: ExitStatus | None = None
        self._signals = StopSignals(self._first_signal, self._later_signal)
        self._watch: Watchdog | None = None

    @property
    def asked(self) -> int:
        """The number of the signal that asked this rank to stop; 0 for none."""
        return self._signals.asked or 0

    def listen(self) -> None:
        """Take the signals from now on; in the main thread."""
        self._signals.listen()

    def watch(self, store: dist.Store, rank: int, size: int, meet: Callable[[], None]) -> None:
        """Watchdog the other ranks and be watched, from here on; collective. ``meet`` returns when all have come."""
        watch = Watchdog(store, rank, size, self._leave)
        watch.roll.timeout_s = _LOADING_TIMEOUT_S
        watch.start(meet)
        self._watch = watch

    @property
    def watches(self) -> bool:
        """Whether the others hear of this rank's end."""
        return self._watch is not None

    def expect_loading(self, phase_timeout_s: float) -> None:
        """The recipe is read: loading may stand still for so long, where that is more than is usual."""
        if self._watch is not None:
            self._watch.roll.timeout_s = max(_LOADING_TIMEOUT_S, phase_timeout_s)

    def begin_loop(self, phase_timeout_s: float) -> None:
        """The steps begin: from now on signals wait for a step's end, and phases are timed."""
        self._loops = True
        if self._watch is not None:
            self._watch.roll.timeout_s = phase_timeout_s

    def wait_for_the_cause(self) -> None:
        """An error may come of another rank's end: if the watch hears of that soon, it ends this one, and says so."""
        if self._watch is not None:
            time.sleep(4 * POLL_S)

    def ends(self, ending: ExitStatus, alone: bool = False) -> None:
        """The program is over, and how: a signal to hurry changes nothing about that."""
        self._told = ending
        self.status.end(ending, alone)

    def leave_alone(self, ending: ExitStatus, say: Callable[[str], None] = lambda reason: None) -> NoReturn:
        """End this rank, which knows something that the others don't, and them through their watch.

        ``say`` is told why, if no other rank was first. What follows from the death of a neighbour is not why.
        """
        mine = True
        if self._watch is not None:
            ending = self._watch.missed() or ending
            ending, mine = self._watch.announce(ending)
        if mine:
            say(ending.reason)
        self.ends(ending, alone=True)
        self._let_others_hear()
        leave(ending.exit_code)

    def stop_watching(self) -> None:
        """The ranks are about to end, in any order."""
        if self._watch is not None:
            self._watch.stop()

    def close(self) -> None:
        """The program has ended by itself, on all ranks."""
        self.stop_watching()
        self._signals.close()

    def _first_signal(self, name: str) -> None:
        if self._told is not None:
            return
        if not self._loops:
            # A launcher that has seen a rank die tells the others to go, sooner than their watch looks.
            died = None if self._watch is None else self._watch.missed()
            self._announce_and_leave(died or ExitStatus("stopped", f"{name} before the first step", 0))
        log.warning("%s: the run saves and ends after this step; one more signal, later, ends it at once", name)

    def _later_signal(self, name: str) -> None:
        if self._told is not None:
            self._announce_and_leave(self._told)
        code = 128 + self.asked
        self._announce_and_leave(
            ExitStatus("stopped", f"{name} once more: left at once, unfinished step unsaved", code)
        )

    def _announce_and_leave(self, ending: ExitStatus) -> NoReturn:
        faulthandler.dump_traceback_later(_LAST_WORDS_S, exit=True)
        self._leave(ending if self._watch is None else self._watch.announce(ending)[0])

    def _leave(self, ending: ExitStatus) -> NoReturn:
        """End the process from a thread, whatever the main thread does."""
        faulthandler.dump_traceback_later(_LAST_WORDS_S, exit=True)
        self.status.end(ending, alone=True)
        if ending.state == "failed":
            log.error("error: %s", ending.reason)
            if self.stacks_to is not None:
                with suppress(OSError), self.stacks_to.open("a", encoding="utf-8") as file:
                    faulthandler.dump_traceback(file)
        else:
            log.warning("%s", ending.reason)
        self._let_others_hear()
        logging.shutdown()
        os._exit(ending.exit_code)

    def _let_others_hear(self) -> None:
        """Where rank 0 itself holds the store (without torchrun), its word must be heard before it goes."""
        if self._watch is not None and self._watch.holds_store:
            time.sleep(2 * POLL_S)


def leave(code: int) -> NoReturn:
    """End the process with ``code``; at once where it isn't 0.

    A launcher ends the other ranks when it sees one fail. The interpreter takes longer to end than a launcher to look,
    and all ranks should leave with the program's own code.
    """
    ignore_signals()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    sys.exit(0)


def log_to_console(main: bool) -> None:
    """The main rank's log goes to standard error from INFO on; the others' console stays silent.

    What is said before there is a run folder is kept for the rank's file there.
    """
    logger = logging.getLogger("distill")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    # Without any handler Python prints warnings itself: a silent one keeps the other ranks off the console.
    handler = logging.StreamHandler(sys.stderr) if main else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.addHandler(MemoryHandler(capacity=100_000, flushLevel=logging.CRITICAL + 1, flushOnClose=True))
