"""Write and read ``status.json``: state, progress and exit status of a run."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

log = logging.getLogger(__name__)

_STARTED, _CLOCK_MARGIN_S = time.time(), 60.0
"""Unix start time of this process, and tolerance when file times are compared with it; in seconds.

The tolerance is needed because ranks start at different times, and the clocks of machines differ.
"""
State = Literal["running", "finished", "stopped", "refused", "failed"]
STATUS_FILE = "status.json"
_EXTRA_FILE = "DISTILL_STATUS_FILE"
"""Environment variable with the path of a second status file, written even without a run directory."""


class ExitStatus(NamedTuple):
    """State, reason and exit code with which a rank exits; distributed/README.md describes the states.

    If a signal stopped the run, the reason starts with the signal's name; if an alarm stopped it, with "alarm ".
    scripts/train.sbatch depends on this.
    """

    state: State
    reason: str
    exit_code: int
    retryable: bool = False
    """Whether the same command may succeed later. True if a rank, a machine or a disk failed."""


_RUNNING = ExitStatus("running", "", 0)


def retryable_failure(reason: str) -> ExitStatus:
    """Return the retryable exit status of a run that failed because a rank, a machine or a disk failed."""
    return ExitStatus("failed", reason, 1, retryable=True)


class Status:
    """Writer of ``status.json`` in the run directory and at the path in DISTILL_STATUS_FILE.

    The main rank writes the file. Another rank writes only if it exits alone, without the agreement of all ranks, and
    the file has no exit status yet. Every write replaces the file atomically.
    """

    def __init__(self, is_main: bool, on_failure: Callable[[str], None] = lambda reason: None) -> None:
        """``on_failure``: called once with the reason if the first exit status has an exit code other than 0."""
        self._is_main = is_main
        self._on_failure = on_failure
        self._paths = [Path(os.environ[_EXTRA_FILE])] if os.environ.get(_EXTRA_FILE) else []
        self._start_step: int | None = None
        self._step = 0
        self.checkpoint_step: int | None = None
        """Step of the newest complete checkpoint; 0 if none exists, None before the run has searched for one."""
        self._ended = False
        self._lock = threading.Lock()
        if is_main:
            # A recent exit status is from a rank of this run that has already failed, an old one from a previous run.
            for path in self._paths:
                if not _has_ended(path) or _modified(path) < _STARTED - _CLOCK_MARGIN_S:
                    self._write([path], _RUNNING)

    def begin(self, run_dir: Path, step: int) -> None:
        """Begin to write status.json in ``run_dir``; the run starts or resumes after ``step`` finished steps."""
        self._start_step = self.checkpoint_step = step
        with self._lock:
            self._paths.append(run_dir / STATUS_FILE)
        self.set_step(step)

    def set_step(self, step: int) -> None:
        """Record the number of finished steps, and write it to status.json on the main rank."""
        self._step = step
        with self._lock:
            if self._is_main and not self._ended:
                self._write(self._paths, _RUNNING)

    def set_exit_status(self, status: ExitStatus, alone: bool = False) -> None:
        """Record ``status`` if no exit status was recorded before, because the first one names the cause.

        ``alone``: this rank exits without the agreement of other ranks, so it writes even if it is not the main rank.
        """
        with self._lock:
            if (self._is_main or alone) and not self._ended:
                self._write([path for path in self._paths if not _has_ended(path)], status)
            if status.exit_code and not self._ended:
                self._on_failure(status.reason)
            self._ended = True

    def _write(self, paths: Sequence[Path], status: ExitStatus) -> None:
        fields = {
            "state": status.state,
            "reason": status.reason,
            "exit_code": status.exit_code,
            "start_step": self._start_step,
            "step": self._step,
            "checkpoint_step": self.checkpoint_step,
            "retryable": status.retryable,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        text = json.dumps(fields, indent=2) + "\n"
        for path in paths:
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            try:
                part.write_text(text, encoding="utf-8")
                part.replace(path)
            except OSError as error:  # not raised: a full disk must not hide the exit reason from the log
                log.warning(
                    "cannot write the status file %s (%s): the file does not show the current state",
                    path,
                    error.strerror,
                )


def _has_ended(path: Path) -> bool:
    return read_status(path).get("state", "running") != "running"


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def read_status(path: Path) -> dict[str, object]:
    """Return the JSON object in the status file ``path``; an empty dict if the file is missing or invalid."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}
