"""How a run goes and how it ended, in a file of its folder: a launcher's exit code doesn't tell."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

log = logging.getLogger(__name__)

_STARTED, _MARGIN_S = time.time(), 60.0
"""When this process began to be a rank; and how far clocks, and ranks that start together, may be apart."""
State = Literal["running", "finished", "stopped", "refused", "failed"]
STATUS_FILE = "status.json"
_ELSEWHERE = "DISTILL_STATUS_FILE"
"""Variable that names one more file for the same: there from the start, before a run has its folder."""


class ExitStatus(NamedTuple):
    """Why a rank leaves; ``stopped`` is on request, with everything saved that was to be saved."""

    state: State
    reason: str
    exit_code: int
    lost: bool = False
    """Whether a rank, its machine or its disk was lost: nothing that the run did, so it may go well once more."""


def lost(reason: str) -> ExitStatus:
    """The end of a run that lost a rank."""
    return ExitStatus("failed", reason, 1, lost=True)


class Status:
    """``status.json``: state, reason, exit code, lost, time, and the steps that were finished when the run ``began``,
    that are now, and that are ``saved``; written beside and renamed.

    The main rank writes it. Another does where it leaves alone, if no end stands there yet.
    """

    def __init__(self, main: bool) -> None:
        self._main = main
        self._paths = [Path(os.environ[_ELSEWHERE])] if os.environ.get(_ELSEWHERE) else []
        self._began: int | None = None
        self._step = 0
        self.saved: int | None = None
        """The step of the newest whole checkpoint; None before the run has looked for one."""
        self._ended = False
        self._lock = threading.Lock()
        if main:
            for path in self._paths:  # an end that stands there is of an earlier run, or of a rank that was faster
                if not _has_ended(path) or _written(path) < _STARTED - _MARGIN_S:
                    self._write([path], ExitStatus("running", "", 0))

    def begin(self, run_dir: Path, step: int) -> None:
        """The run has a folder and goes on after ``step`` finished steps."""
        self._began = self.saved = step
        with self._lock:
            self._paths.append(run_dir / STATUS_FILE)
        self.at(step)

    def at(self, step: int) -> None:
        """So many steps are finished."""
        self._step = step
        with self._lock:
            if self._main and not self._ended:
                self._write(self._paths, ExitStatus("running", "", 0))

    def end(self, ending: ExitStatus, alone: bool = False) -> None:
        """How it ended. ``alone``: no other rank knows, so this one writes, whichever it is.

        The first end that is told holds: what comes of it, as a launcher's signal to the others, is not why it ended.
        """
        with self._lock:
            if (self._main or alone) and not self._ended:
                self._write([path for path in self._paths if not _has_ended(path)], ending)
            self._ended = True

    def _write(self, paths: Sequence[Path], ending: ExitStatus) -> None:
        where = {"began": self._began, "step": self._step, "saved": self.saved}
        found = {"state": ending.state, **where, **ending._asdict()}
        text = json.dumps({**found, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}, indent=2) + "\n"
        for path in paths:
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            try:
                part.write_text(text, encoding="utf-8")
                part.replace(path)
            except OSError as error:  # a full disk must not hide what is said here from the log
                log.warning("%s can't be written (%s)", path, error.strerror)


def _has_ended(path: Path) -> bool:
    return read_status(path).get("state", "running") != "running"


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def read_status(path: Path) -> dict[str, object]:
    """What ``status.json`` says; empty where there is none, or no readable one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
