"""Supervision of one rank: stop signals, watchdog that detects failed ranks, and exit status."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from distill.supervise.logs import console, log_to_file
from distill.supervise.progress import CURRENT, Progress
from distill.supervise.progress_report import ProgressReporter
from distill.supervise.signals import StopSignals, ignore_signals
from distill.supervise.status import ExitStatus, Status
from distill.supervise.watchdog import POLL_S, Watchdog

log = logging.getLogger(__name__)

_EXIT_TIMEOUT_S = 15
"""Seconds after which an exiting rank is killed.

The exit itself may hang, for example if a hanging thread holds a lock of the logging module.
"""
_GRACE_PERIOD_S = 4 * POLL_S
_LOADING_TIMEOUT_S = 1800.0  # named in the message of FailureDetector


class Supervisor:
    """Signals, watchdog and exit status of this rank.

    ``run_program`` creates it, and it is available as ``World.supervisor``.

    A stop signal before the training loop ends the run immediately, because there is no progress to save. During the
    training loop, the first signal is only recorded, and the loop stops after the current step.
    """

    def __init__(self, is_main: bool, on_failure: Callable[[str], None] = lambda reason: None) -> None:
        """``on_failure``: called once with the reason if this rank's exit code is not 0."""
        self.status = Status(is_main, on_failure)
        self.started = time.monotonic()
        """Start time of the program in seconds, as returned by time.monotonic."""
        self.stop_reason: str | None = None
        """Reason why the training loop stopped before the last step; None if it did not stop early."""
        self._log_file: Path | None = None
        self._in_loop = False
        self._exit_status: ExitStatus | None = None
        self._signals = StopSignals(self._first_signal, self._later_signal)
        self._watchdog: Watchdog | None = None
        handler = console() if is_main else None
        self._reporter = None if handler is None else ProgressReporter(handler, self._progress_of_ranks)

    @property
    def stop_signal(self) -> int:
        """Return the number of the first stop signal that this rank received; 0 if it received none."""
        return self._signals.requested or 0

    def listen(self) -> None:
        """Start to handle stop signals and to show progress on the console; call it in the main thread."""
        self._signals.listen()
        if self._reporter is not None:
            self._reporter.start()

    def _progress_of_ranks(self) -> list[Progress]:
        return [CURRENT] if self._watchdog is None else self._watchdog.progress_of_ranks()

    def log_to(self, run_dir: Path, rank: int) -> None:
        """Write this rank's log to a file in ``run_dir/logs``.

        If the watchdog ends this rank because of a failure, the stacks of all threads are appended to the file.
        """
        self._log_file = run_dir / "logs" / f"rank_{rank:05d}.log"
        log_to_file(self._log_file)

    def start_watchdog(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        barrier: Callable[[], None],
        launcher_error: Callable[[], str | None],
        holds_store: bool,
    ) -> None:
        """Start this rank's watchdog; collective.

        ``store``: the rendezvous store. ``barrier``: function that returns when all ranks have called it.
        ``launcher_error``: returns an error message if the launcher has ended, else None. ``holds_store``: whether this
        process serves the store.
        """
        watchdog = Watchdog(store, rank, size, self._exit_from_thread, launcher_error, holds_store)
        watchdog.detector.timeout_s = _LOADING_TIMEOUT_S
        watchdog.start(barrier)
        self._watchdog = watchdog

    @property
    def has_watchdog(self) -> bool:
        """Return whether this rank has a watchdog, so that other ranks receive its exit status."""
        return self._watchdog is not None

    def allow_loading(self, phase_timeout_s: float) -> None:
        """Set the timeout for loading data and models: ``phase_timeout_s`` seconds, but at least 30 minutes.

        The run fails if no rank makes progress for this time.
        """
        if self._watchdog is not None:
            self._watchdog.detector.timeout_s = max(_LOADING_TIMEOUT_S, phase_timeout_s)

    def begin_loop(self, phase_timeout_s: float) -> None:
        """Begin the training loop: from now on, a stop signal stops the run after the current step.

        The run fails if no rank makes progress for ``phase_timeout_s`` seconds.
        """
        self._in_loop = True
        if self._watchdog is not None:
            self._watchdog.detector.timeout_s = phase_timeout_s

    def wait_grace_period(self) -> None:
        """Wait 8 s, so that the watchdog can detect a failed rank that caused this rank's error.

        If the watchdog detects a failed rank, it ends the process with that failure as the reason, and this method does
        not return.
        """
        if self._watchdog is not None:
            time.sleep(_GRACE_PERIOD_S)

    def set_exit_status(self, status: ExitStatus, alone: bool = False) -> None:
        """Record the exit status; later signals do not change it.

        ``alone``: whether this rank exits without the agreement of other ranks.
        """
        self._exit_status = status
        self.status.set_exit_status(status, alone)

    def abort(self, status: ExitStatus, report: Callable[[str], None] = lambda reason: None) -> NoReturn:
        """End this rank because of an error that only this rank has; the watchdogs end the other ranks.

        ``report`` is called with the reason. If another rank failed first, ``report`` is not called, and this rank
        exits with the status of that rank.
        """
        is_first = True
        if self._watchdog is not None:
            status = self._watchdog.dead_neighbour() or status
            status, is_first = self._watchdog.announce(status)
        self.stop_progress_report()
        if is_first:
            report(status.reason)
        self.set_exit_status(status, alone=True)
        self._keep_store_alive()
        exit_process(status.exit_code)

    def stop_watchdog(self) -> None:
        """Stop this rank's watchdog, so that it does not report other ranks as failed when they exit."""
        if self._watchdog is not None:
            self._watchdog.stop()

    def stop_progress_report(self) -> None:
        """Stop to show progress and clear the progress bar; call it before an error is printed."""
        if self._reporter is not None:
            self._reporter.stop()

    def close(self) -> None:
        """Stop all threads and restore the signal handlers; called at the regular end of the program."""
        self.stop_progress_report()
        self.stop_watchdog()
        self._signals.close()

    def _first_signal(self, name: str) -> None:
        if self._exit_status is not None:
            return
        if not self._in_loop:
            # The launcher may send this signal because a rank died, which the watchdog has not detected yet.
            cause = None if self._watchdog is None else self._watchdog.dead_neighbour()
            self._announce_and_exit(
                cause or ExitStatus("stopped", f"{name} was received before the first training step", 0)
            )
        log.warning(
            "received %s: the run saves a checkpoint and stops after this step; another signal more than"
            " 5 s later stops it immediately",
            name,
        )

    def _later_signal(self, name: str) -> None:
        if self._exit_status is not None:
            self._announce_and_exit(self._exit_status)
        reason = f"{name} was the second stop signal: the run stopped immediately and did not save the unfinished step"
        self._announce_and_exit(ExitStatus("stopped", reason, 128 + self.stop_signal))

    def _announce_and_exit(self, status: ExitStatus) -> NoReturn:
        faulthandler.dump_traceback_later(_EXIT_TIMEOUT_S, exit=True)
        self._exit_from_thread(status if self._watchdog is None else self._watchdog.announce(status)[0])

    def _exit_from_thread(self, status: ExitStatus) -> NoReturn:
        """End the process with ``status``; not called in the main thread, because that may hang."""
        faulthandler.dump_traceback_later(_EXIT_TIMEOUT_S, exit=True)
        self.status.set_exit_status(status, alone=True)
        self.stop_progress_report()
        if status.state == "failed":
            log.error("error: %s", status.reason)
            if self._log_file is not None:
                with suppress(OSError), self._log_file.open("a", encoding="utf-8") as file:
                    faulthandler.dump_traceback(file)
        else:
            log.warning("%s", status.reason)
        self._keep_store_alive()
        logging.shutdown()
        os._exit(status.exit_code)

    def _keep_store_alive(self) -> None:
        """If this process serves the rendezvous store, wait 4 s, so that other ranks read the exit status."""
        if self._watchdog is not None and self._watchdog.holds_store:
            time.sleep(2 * POLL_S)


def exit_process(code: int) -> NoReturn:
    """End the process with exit code ``code``; if it is not 0, skip the interpreter's shutdown.

    A launcher kills the other ranks when a rank fails. The shutdown takes longer than the launcher's poll interval, so
    a rank that is still shutting down would be killed and would not return this code.
    """
    ignore_signals()
    logging.shutdown()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the terminal was closed: the interpreter's shutdown would replace the exit code
        os._exit(code)
    if code:
        os._exit(code)
    sys.exit(0)
