"""Show the progress of long phases on the console of the main rank, so that it is never silent for more than 20 s.

On a terminal, the last line of the console is a progress bar. Otherwise a line is logged after SILENCE_S seconds
without output, for example ``generation of step 3: 31% of 512 responses, 12.4k tok/s, 2 min left``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from distill.supervise.logs import ConsoleHandler
from distill.supervise.progress import AFTER, STARTING, Progress
from distill.supervise.quantities import duration, short_count

log = logging.getLogger(__name__)

POLL_S = 1.0
SILENCE_S = 15.0
"""Seconds without output after which a line is logged; below 20 s, because a busy process may delay the line."""
_BAR_AFTER_S = 3.0
"""Seconds after which a phase without a task (counted items) is shown on a terminal, to prevent flicker."""
_BAR_WIDTH = 24


class ProgressReporter:
    """Thread of the main rank that shows the current phase, its finished items and the remaining time.

    ``console``: the console's log handler. ``ranks``: returns the progress of all ranks, this rank first. The phase
    shown is that of the rank that is furthest behind, for which the other ranks wait. Items and tokens are those of all
    ranks. ``clock``: returns the time in seconds.
    """

    def __init__(
        self,
        console: ConsoleHandler,
        ranks: Callable[[], Sequence[Progress]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._ranks = ranks
        self._clock = clock
        self._phase = ("", 0)
        self._phase_start = clock()
        self._task: tuple[str, int, str] = ("", 0, "")
        self._task_start = clock()
        self._items: dict[int, Progress] = {}
        """Maps a rank to its progress in the current task; after a rank has left the task, its items are finished."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress report", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and clear the progress bar."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(2 * POLL_S)
        self._console.show_bar("")

    def _run(self) -> None:
        failed = False
        while not self._stopped.wait(POLL_S):
            try:
                self.poll()
            except Exception:
                if not failed:
                    log.warning("cannot show the progress; this message is not repeated", exc_info=True)
                failed = True

    def poll(self) -> None:
        """Update the progress bar, or log a line if the console was silent for SILENCE_S seconds."""
        now = self._clock()
        slowest = self._update(now)
        if self._console.is_terminal:
            is_long = slowest.total > 0 or now - self._phase_start >= _BAR_AFTER_S
            self._console.show_bar(self._text(slowest, now, bar=True) if is_long else "")
        elif now - self._console.last_output >= SILENCE_S:
            log.info("%s", self._text(slowest, now))

    def _update(self, now: float) -> Progress:
        """Read the progress of all ranks; return that of the rank that is furthest behind."""
        ranks = self._ranks()
        slowest = min(ranks, key=lambda rank: rank.phase_changes)
        if self._phase != (slowest.phase, slowest.step):
            self._phase, self._phase_start = (slowest.phase, slowest.step), now
        task = (slowest.phase, slowest.step, slowest.unit)
        if self._task != task:
            self._task, self._task_start, self._items = task, now, {}
        for number, rank in enumerate(ranks):
            if rank.total and (rank.phase, rank.step, rank.unit) == task:
                self._items[number] = replace(rank)
            elif number in self._items:
                self._items[number].done = self._items[number].total
        return slowest

    def _text(self, slowest: Progress, now: float, bar: bool = False) -> str:
        name = _activity(slowest)
        done, total, tokens = (
            sum(getattr(rank, key) for rank in self._items.values()) for key in ("done", "total", "tokens")
        )
        if not total:
            return f"{name}: {duration(now - self._phase_start)} so far"
        spent = now - self._task_start
        parts = [f"{name}: {_bar(done / total) if bar else ''}{done / total:.0%} of {total} {slowest.unit}"]
        if tokens and spent > 0:
            parts.append(f"{short_count(tokens / spent)} tok/s")
        if 0 < done < total:
            parts.append(f"{duration(spent * (total - done) / done)} left")
        return ", ".join(parts)


def _activity(progress: Progress) -> str:
    """Return a description of the current phase, or of the time before the first phase or between two phases."""
    phase = progress.phase.replace("_", " ")
    if phase == STARTING:
        return "starting the run"
    if phase.startswith(AFTER):
        return f"step {progress.step}, {phase}" if progress.step else f"starting the run, {phase}"
    return f"{phase} of step {progress.step}" if progress.step else phase


def _bar(fraction: float) -> str:
    filled = int(fraction * _BAR_WIDTH)
    return f"[{'#' * filled}{'-' * (_BAR_WIDTH - filled)}] "
