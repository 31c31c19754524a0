"""Read and check the environment variables of torchrun or Slurm, and detect that torchrun has ended."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from distill.distributed import slurm
from distill.distributed.variables import integer
from distill.errors import UserError

_PARENT = os.getppid()
"""Parent process id at import of this module; os.getppid() differs from it after the parent has ended."""


def rank_by_launcher() -> int:
    """Return this process's rank from the variables of torchrun or Slurm; 0 if they are not set.

    Raises UserError for invalid environment variables. Without this check, the process would wait for ranks that never
    connect.
    """
    variables = {**os.environ, **slurm.torch_environment()}
    if "RANK" not in variables:
        return 0
    size = integer(variables, "WORLD_SIZE", 1)
    rank = integer(variables, "RANK", 0, size - 1)
    local_size = integer(variables, "LOCAL_WORLD_SIZE", 1, size, default=str(size))
    integer(variables, "LOCAL_RANK", 0, local_size - 1, default="0")
    integer(variables, "MASTER_PORT", 1, 65535)
    address = variables.get("MASTER_ADDR", "")
    try:
        if not address:
            raise OSError("it is empty")
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"MASTER_ADDR={address} cannot be resolved ({error})",
            "set MASTER_ADDR to the host name of rank 0, or start the program with torchrun or srun, which set it",
            key="MASTER_ADDR",
            value=address,
        ) from None
    return rank


def is_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launcher_holds_store() -> bool:
    """Return whether torchrun's launcher serves the rendezvous store (TCPStore); otherwise rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def launch_id() -> str:
    """Return the launch id, which is equal on all ranks; a restart by the launcher has a new id.

    All keys in the rendezvous store begin with the id. Ranks of another job or of an earlier launch that use the same
    port are therefore ignored. Without torchrun and Slurm the id is "0".
    """
    if is_torchrun():  # the run id is torchrun's --rdzv-id; its agents keep their store when they restart the ranks
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        return "/".join(os.environ.get(name, "0") for name in names)
    return os.environ.get(slurm.LAUNCH_ID, "0")


def launcher_error(rank: int) -> str | None:
    """Return an error message if torchrun's launcher, the parent process, has ended; else None.

    Always None without torchrun: the parent is then, for example, a shell, which may end before the run. ``rank``: this
    process's rank, for the message.
    """
    if is_torchrun() and os.getppid() != _PARENT:
        return f"the launcher (process {_PARENT}) of rank {rank} ended"
    return None


def write_error_file(reason: str) -> None:
    """Write ``reason`` to torchrun's error file; do nothing without torchrun.

    torchrun prints a report after its own traceback when a rank fails. With this file, the report ends with ``reason``
    instead of a link to a manual.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": reason, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": reason, "extraInfo": details}}), encoding="utf-8")


def restrict_umask() -> None:
    """Deny write access by other users (``o-w``) to files that this process and its children create."""
    os.umask(os.umask(0o077) | 0o002)
