"""How a run goes and how it ended, in a file of its folder: a launcher's exit code doesn't tell."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Literal, NamedTuple

log = logging.getLogger(__name__)

State = Literal["running", "finished", "stopped", "refused", "failed"]
STATUS_FILE = "status.json"
_ELSEWHERE = "DISTILL_STATUS_FILE"
"""Variable that names one more file for the same: there from the start, before a run has its folder."""


class Ending(NamedTuple):
    """Why a rank leaves; ``stopped`` is on request, with everything saved that was to be saved."""

    state: State
    reason: str
    exit_code: int
    lost: bool = False
    """Whether a rank or its machine was lost: nothing that the run did, so it may go well when it starts again."""


def lost(reason: str) -> Ending:
    """The end of a run that lost a rank."""
    return Ending("failed", reason, 1, lost=True)


class Status:
    """``status.json``: state, reason, exit code, lost, time, and the steps that were finished when the run ``began``
    and that are now; written beside and renamed.

    The main rank writes it. Another does where it leaves alone, if no end stands there yet.
    """

    def __init__(self, main: bool) -> None:
        self._main = main
        self._paths = [Path(os.environ[_ELSEWHERE])] if os.environ.get(_ELSEWHERE) else []
        self._step = self._began = 0
        self._ended = False
        if main:
            self._write(Ending("running", "", 0))

    def begin(self, run_dir: Path, step: int) -> None:
        """The run has a folder and goes on after ``step`` finished steps."""
        self._paths.append(run_dir / STATUS_FILE)
        self._began = step
        self.at(step)

    def at(self, step: int) -> None:
        """So many steps are finished."""
        self._step = step
        if self._main:
            self._write(Ending("running", "", 0))

    def end(self, ending: Ending, alone: bool = False) -> None:
        """How it ended. ``alone``: no other rank knows, so this one writes, whichever it is.

        The first end that is told holds: what comes of it, as a launcher's signal to the others, is not why it ended.
        """
        if (self._main or alone) and not self._ended and not self._has_ended():
            self._write(ending)
        self._ended = True

    def _has_ended(self) -> bool:
        return any(read_status(path).get("state", "running") != "running" for path in self._paths)

    def _write(self, ending: Ending) -> None:
        found = {"state": ending.state, "began": self._began, "step": self._step, **ending._asdict()}
        text = json.dumps({**found, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}, indent=2) + "\n"
        for path in self._paths:
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            try:
                part.write_text(text, encoding="utf-8")
                part.replace(path)
            except OSError as error:  # a full disk must not hide what is said here from the log
                log.warning("%s can't be written (%s)", path, error.strerror)


def read_status(path: Path) -> dict[str, object]:
    """What ``status.json`` says; empty where there is none, or no readable one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
