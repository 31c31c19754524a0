"""Start the program on every rank; handle its errors, exit status and exit code."""

from __future__ import annotations

import io
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout, suppress

import torch.distributed as dist

from distill.distributed.launcher import rank_by_launcher, restrict_umask, write_error_file
from distill.distributed.rendezvous import RendezvousError
from distill.distributed.world import World
from distill.errors import CollectiveUserError, RunFailed, UserError
from distill.supervise.logs import log_to_console
from distill.supervise.status import ExitStatus, retryable_failure
from distill.supervise.supervisor import Supervisor, exit_process

__all__ = ["exit_process", "log_to_console", "run_program", "run_without_world", "start_process"]


def start_process() -> None:
    """Set the umask and the console log; call it before anything logs or writes files."""
    restrict_umask()
    log_to_console(_is_main_or_unknown())


def run_program(program: Callable[[World], None]) -> int:
    """Connect all ranks, run ``program`` and return the exit code, which is the same on every rank.

    Call ``start_process`` first. Exit codes: 0 for success; 2 for UserError; 1 for RunFailed or another exception. The
    main rank prints one sentence for an error that all ranks raise together. An error of a single rank is printed by
    that rank, which then exits, and the watchdogs end the other ranks. A Supervisor handles stop signals and writes
    ``status.json``.
    """
    try:
        is_main = rank_by_launcher() == 0
    except UserError as error:
        _print_error(str(error))
        write_error_file(str(error))
        return 2
    supervisor = Supervisor(is_main, on_failure=write_error_file)
    supervisor.listen()
    world = _join_world(supervisor)
    if isinstance(world, int):
        return world
    single_rank = False
    try:
        with nullcontext() if is_main else redirect_stdout(io.StringIO()):
            program(world)
        status = ExitStatus(
            "finished" if supervisor.stop_reason is None else "stopped", supervisor.stop_reason or "", 0
        )
    except UserError as error:
        status = ExitStatus("refused", str(error), 2)
        single_rank = world.size > 1 and not isinstance(error, CollectiveUserError)
    except RunFailed as error:
        status = ExitStatus("failed", str(error), 1, error.retryable)
    except Exception as error:
        status = ExitStatus(
            "failed", f"rank {world.rank}: {type(error).__name__}: {error}", 1, is_connection_loss(error)
        )
        if world.size == 1:
            supervisor.set_exit_status(status)
            supervisor.close()
            raise
        if _may_follow_from_peer(error):
            supervisor.wait_grace_period()
        # A normal interpreter exit could block, because destructors wait for ranks that wait for this rank.
        supervisor.stop_progress_report()
        traceback.print_exc()
        supervisor.abort(status)
    if single_rank:
        supervisor.abort(status, _print_error)
    if status.exit_code and is_main:
        supervisor.stop_progress_report()
        _print_error(status.reason)
    supervisor.set_exit_status(status)
    world.close()
    supervisor.close()
    return status.exit_code


def run_without_world(program: Callable[[], None]) -> int:
    """Run ``program`` in this process only, without connecting ranks; return the exit code.

    There is no rendezvous, signal handler or status file.

    A UserError is printed as one sentence, with exit code 2; a RunFailed likewise, with exit code 1.
    """
    try:
        program()
    except UserError as error:
        _print_error(str(error))
        write_error_file(str(error))
        return 2
    except RunFailed as error:
        _print_error(str(error))
        return 1
    return 0


def _join_world(supervisor: Supervisor) -> World | int:
    """Connect this rank to all other ranks; return the World, or the exit code if the connection fails."""
    try:
        return World(supervisor=supervisor)
    except UserError as error:
        status = ExitStatus("refused", str(error), 2)
        if supervisor.has_watchdog:
            supervisor.wait_grace_period()
            by_peer = error.__cause__ is not None and is_connection_loss(error.__cause__)
            supervisor.abort(retryable_failure(str(error.__cause__)) if by_peer else status, _print_error)
        return _exit_without_world(supervisor, status)
    except RendezvousError as error:
        return _exit_without_world(supervisor, retryable_failure(str(error)), error.report)
    except Exception as error:
        supervisor.stop_progress_report()
        traceback.print_exc()
        status = ExitStatus(
            "failed", f"a rank failed before all ranks had joined the run: {error}", 1, is_connection_loss(error)
        )
        if supervisor.has_watchdog:
            supervisor.wait_grace_period()
            supervisor.abort(status)
        return _exit_without_world(supervisor, status, prints=False)


def _exit_without_world(supervisor: Supervisor, status: ExitStatus, prints: bool = True) -> int:
    supervisor.stop_progress_report()
    if prints:
        _print_error(status.reason)
    supervisor.set_exit_status(status, alone=True)
    supervisor.close()
    return status.exit_code


def _is_main_or_unknown() -> bool:
    """Return whether this is the main rank; also True if the rank is unknown, so that errors are logged."""
    try:
        return rank_by_launcher() == 0
    except UserError:
        return True


def _print_error(reason: str) -> None:
    """Print ``reason`` to standard error on one line; line breaks in it become spaces."""
    with suppress(OSError):  # the terminal was closed; status.json has the reason
        print(f"error: {' '.join(reason.split())}", file=sys.stderr, flush=True)


def _may_follow_from_peer(error: Exception) -> bool:
    """Return whether ``error`` may be the failure of a collective, caused by the exit of another rank."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "nccl" in str(error).lower()


_CONNECTION_LOSS = re.compile(
    r"connection (was )?(likely )?(closed|reset)|closed by peer|broken pipe|pair closure|(got|sent|of) 0 bytes"
    r"|remote process exit|ncclRemoteError|unhandled system error|no route to host|unreachable"
    r"|uncorrectable ECC|fallen off the bus",
    re.IGNORECASE,
)
"""Regex for error messages of gloo, NCCL, TCPStore and CUDA about a failed rank, machine or device."""


def is_connection_loss(error: BaseException) -> bool:
    """Return whether ``error`` reports a failed rank, machine or device, so that a retry may succeed."""
    return _CONNECTION_LOSS.search(str(error)) is not None
