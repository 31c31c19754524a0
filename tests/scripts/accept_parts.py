"""Small parts for the tests of the acceptance command; the worker imports this module by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.accept.results import Check, NotApplicable, exactly
from scripts.accept.settings import Context


def ok(context: Context) -> Iterator[Check]:
    yield Check("one", 1.0, "", exactly(1), f"process {os.getpid()}")


def out_of_bounds(context: Context) -> Iterator[Check]:
    yield Check("two", 2.0, "s", exactly(1))


def error(context: Context) -> Iterator[Check]:
    yield Check("before", 1.0, "", exactly(1))
    raise RuntimeError("out of\nmemory")


def not_applicable(context: Context) -> Iterator[Check]:
    raise NotApplicable("no reason")
    yield


def hang(context: Context) -> Iterator[Check]:
    """Hang with a child process, and ignore the signals that could be ignored."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    yield Check("child", float(child.pid))
    time.sleep(1000)


def crash(context: Context) -> Iterator[Check]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield Check("never", 1.0)


def crash_of_last_rank(context: Context) -> Iterator[Check]:
    if context.rank == context.size - 1:
        raise ValueError("bad rank")
    time.sleep(1000)
    yield Check("never", 1.0)


def written(context: Context) -> Iterator[Check]:
    """Report how many parts the JSON file contains as ended while this part runs."""
    found = json.loads((Path(context.settings.out) / "accept.json").read_text())
    yield Check("ended", float(sum(part["status"] != "not run" for part in found["parts"])))


def about(context: Context) -> Iterator[Check | dict[str, Any]]:
    yield {"facts": {"torch": True}}
