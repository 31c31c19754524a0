"""Read and check the environment variables of torchrun or Slurm, and detect that torchrun has ended."""

from __future__ import annotations

import os
import socket

from distill.distributed import slurm
from distill.distributed.variables import integer
from distill.errors import UserError

_PARENT = os.getppid()
"""Parent's process id at import. If the parent has died since, os.getppid() returns another number."""


def rank_by_launcher() -> int:
    """Return this process's rank from the variables of torchrun or Slurm; 0 if they are not set.

    Raises UserError for invalid variables. Without this check, the process would wait for ranks that never connect.
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
    """Return whether the rendezvous store is in torchrun's launcher process; otherwise it is in rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def launch_id() -> str:
    """Return the launch id: equal on all ranks of a launch; a restart by the launcher has a new id.

    All keys in the rendezvous store begin with the id, so that ranks of another job or an earlier start at the
    same port are ignored. Without torchrun and Slurm the id is "0".
    """
    if is_torchrun():  # the run id is torchrun's --rdzv-id; its agents keep their store when they restart the ranks
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        return "/".join(os.environ.get(name, "0") for name in names)
    return os.environ.get(slurm.LAUNCH_ID, "0")


def launcher_error(rank: int) -> str | None:
    """Return an error message if torchrun's launcher (parent process of ``rank``) has ended; else None.

    Always None without torchrun, because a shell that starts the process in the background may end earlier.
    """
    if is_torchrun() and os.getppid() != _PARENT:
        return f"the launcher (process {_PARENT}) of rank {rank} ended"
    return None


def restrict_umask() -> None:
    """Deny other users write access to files that this process and its children create."""
    os.umask(os.umask(0o077) | 0o002)
