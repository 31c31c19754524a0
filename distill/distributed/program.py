"""The frame of the program on every rank: start, exit status, exit code."""

from __future__ import annotations

import io
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout

import torch.distributed as dist

from distill.distributed.launcher import rank_by_launcher, restrict_umask
from distill.distributed.rendezvous import RendezvousError
from distill.distributed.world import World
from distill.errors import CollectiveUserError, RunFailed, UserError
from distill.supervise.logs import log_to_console
from distill.supervise.status import ExitStatus, retryable_failure
from distill.supervise.supervisor import Supervisor, exit_process

__all__ = ["exit_process", "log_to_console", "run_program"]


def run_program(program: Callable[[World | None], None], needs_world: bool) -> int:
    """Run a program in its world and turn how it ended into an exit code, the same on every rank.

    A UserError that all ranks agreed on is one sentence on the main rank's console and code 2, an RunFailed one and
    code 1. A UserError that this rank met alone is said by this rank, which leaves at once and takes the others along.
    Any other error keeps its traceback and does the same. Only the main rank prints. Ranks that don't come are waited
    for, but not for ever. From here on the process obeys signals as Supervisor says; status.json says how it ended.
    """
    restrict_umask()
    try:
        main = rank_by_launcher() == 0
    except UserError as error:  # nobody knows who the main rank is
        _say(str(error))
        return 2
    log_to_console(main)
    if not needs_world:
        return _without_world(program)
    supervisor = Supervisor(main)
    supervisor.listen()
    try:
        world = World(supervisor=supervisor)
    except UserError as error:
        ending = ExitStatus("refused", str(error), 2)
        if supervisor.has_watchdog:
            supervisor.wait_grace_period()
            of_others = error.__cause__ is not None and _lost_by(error.__cause__)
            supervisor.abort(retryable_failure(str(error.__cause__)) if of_others else ending, _say)
        return _without_the_others(supervisor, ending)
    except RendezvousError as error:
        return _without_the_others(supervisor, retryable_failure(str(error)), error.report)
    except Exception as error:
        traceback.print_exc()
        ending = ExitStatus("failed", f"before the ranks were together: {error}", 1, _lost_by(error))
        if supervisor.has_watchdog:
            supervisor.wait_grace_period()
            supervisor.abort(ending)
        return _without_the_others(supervisor, ending, speaks=False)
    alone = False
    try:
        with nullcontext() if main else redirect_stdout(io.StringIO()):
            program(world)
        ending = ExitStatus(
            "finished" if supervisor.stop_reason is None else "stopped", supervisor.stop_reason or "", 0
        )
    except UserError as error:
        ending, alone = (
            ExitStatus("refused", str(error), 2),
            world.size > 1 and not isinstance(error, CollectiveUserError),
        )
    except RunFailed as error:
        ending = ExitStatus("failed", str(error), 1, error.retryable)
    except Exception as error:
        ending = ExitStatus("failed", f"rank {world.rank}: {type(error).__name__}: {error}", 1, _lost_by(error))
        if world.size == 1:
            supervisor.set_exit_status(ending)
            supervisor.close()
            raise
        if _comes_of_others(error):
            supervisor.wait_grace_period()
        # The interpreter's own end may wait for ranks that wait for this one.
        traceback.print_exc()
        supervisor.abort(ending)
    if alone:
        supervisor.abort(ending, _say)
    if ending.exit_code and main:
        _say(ending.reason)
    supervisor.set_exit_status(ending)
    world.close()
    supervisor.close()
    return ending.exit_code


def _without_the_others(supervisor: Supervisor, ending: ExitStatus, speaks: bool = True) -> int:
    """The end of a rank that never had a world."""
    if speaks:
        _say(ending.reason)
    supervisor.set_exit_status(ending, alone=True)
    supervisor.close()
    return ending.exit_code


def _without_world(program: Callable[[None], None]) -> int:
    try:
        program(None)
    except UserError as error:
        _say(str(error))
        return 2
    return 0


def _say(reason: str) -> None:
    """One line on the console, whatever a path or a library's own words have in them."""
    print(f"error: {' '.join(reason.split())}", file=sys.stderr, flush=True)


def _comes_of_others(error: Exception) -> bool:
    """Whether an error is what a collective says when another rank is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "nccl" in str(error).lower()


_LOST = re.compile(
    r"connection (was )?(likely )?(closed|reset)|closed by peer|broken pipe|pair closure|(got|sent|of) 0 bytes"
    r"|remote process exit|ncclRemoteError|unhandled system error|no route to host|unreachable"
    r"|uncorrectable ECC|fallen off the bus",
    re.IGNORECASE,
)
"""What gloo, NCCL, torch's store and CUDA say of a rank, a machine or a device that is gone."""


def _lost_by(error: BaseException) -> bool:
    """Whether an error says that another rank, or this one's device, is gone; else the program may be to blame."""
    return _LOST.search(str(error)) is not None
