"""One process of a group of parts: ``python -m scripts.accept.worker ORDER.json``.

Each rank appends its events to ``EVENTS.RANK.jsonl``: ``begin`` and ``end`` of each part and its checks. After an error
the process ends with exit code 3, and the command starts a new process for the group's remaining parts.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from scripts.accept.results import Check, NotApplicable
from scripts.accept.settings import Context, Order, Settings

ERROR_CODE = 3
_PR_SET_PDEATHSIG = 1
_STORE_S = 2.0
"""Seconds for which the first rank keeps the rendezvous store after its last part: ranks of other nodes may use it."""


def main(argv: list[str]) -> int:
    """Run the parts of an order; return the exit code."""
    prepare_process()
    order = Order.read(Path(argv[0]))
    context = Context(Settings(**order.settings), list(order.ports))
    with open(f"{order.events}.{context.rank}.jsonl", "a", encoding="utf-8") as events:
        for name, source, limit in order.parts:
            if not run_part(name, source, limit, context, events):
                return ERROR_CODE
    if context.settings.nodes > 1 and context.rank == 0:
        time.sleep(_STORE_S)
    return 0


def prepare_process() -> None:
    """End with the parent process, write no core files, and print tracebacks at SIGUSR1."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def run_part(name: str, source: str, limit: float, context: Context, events: Any) -> bool:
    """Run one part and write its events; return whether the process can run another part.

    ``source``: the module and the function that run the part, separated by a colon. ``limit``: maximum duration in
    seconds; a timer then ends this process.
    """

    def write(event: str, **fields: Any) -> None:
        events.write(json.dumps({"event": event, "part": name, **fields}) + "\n")
        events.flush()

    print(f"== {name}", flush=True)
    write("begin")
    # If the command cannot end this process (because it was killed, or runs on another node), this timer does. It needs
    # no Python thread, so it also ends a hung kernel or collective.
    faulthandler.dump_traceback_later(limit + 10, exit=True)
    try:
        module, _, function = source.partition(":")
        for found in getattr(importlib.import_module(module), function)(context):
            if isinstance(found, Check):
                write("check", check=found.as_json())
            else:
                write("about", about=found)
    except NotApplicable as reason:
        write("end", status="n/a", reason=str(reason))
    except BaseException as error:
        traceback.print_exc()
        write("end", status="FAILED", reason=f"{type(error).__name__}: {error}")
        return False
    else:
        write("end", status="ok", reason="")
    finally:
        faulthandler.cancel_dump_traceback_later()
    return True


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # destructors of process groups and engines could wait for other processes
