"""What the launcher says of this process's place in the world, checked before anyone waits for others by it."""

from __future__ import annotations

import os
import socket

from distill.distributed import slurm
from distill.errors import UserError

_PARENT = os.getppid()
"""Known before anything can take long: who lost it by then has another one already."""
_REMEDY = "start the program by torchrun or srun, or unset it"


def rank_by_launcher() -> int:
    """This process's rank by torchrun's or Slurm's variables, 0 without them.

    Raises UserError for variables that name no place in a world: the process would wait half an hour for nobody. No
    collective, so that each rank says what is wrong with its own.
    """
    variables = {**os.environ, **slurm.torch_environment()}
    if "RANK" not in variables:
        return 0
    size = _number(variables, "WORLD_SIZE", 1)
    rank = _number(variables, "RANK", 0, size - 1)
    local_size = _number({"LOCAL_WORLD_SIZE": str(size), **variables}, "LOCAL_WORLD_SIZE", 1, size)
    _number({"LOCAL_RANK": "0", **variables}, "LOCAL_RANK", 0, local_size - 1)
    _number(variables, "MASTER_PORT", 1, 65535)
    address = variables.get("MASTER_ADDR", "")
    try:
        if not address:
            raise OSError("it is empty")
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:
        raise UserError(f"MASTER_ADDR={address} can't be resolved ({error}): {_REMEDY}") from None
    return rank


def has_launcher() -> bool:
    """Return whether torchrun or Slurm started this process as one of several ranks (or as the only one)."""
    return "RANK" in {**os.environ, **slurm.torch_environment()}


def launcher() -> int | None:
    """The process that started this one, which may not outlive it; None without torchrun, as a shell may end first."""
    return _PARENT if "TORCHELASTIC_RUN_ID" in os.environ else None


def launcher_lives() -> bool:
    """Whether there is no launcher, or it still runs."""
    return launcher() in (None, os.getppid())


def deny_others_writing() -> None:
    """Whatever this process and its children make from now on, only its owner and perhaps its group can write to."""
    os.umask(os.umask(0o077) | 0o002)


def _number(variables: dict[str, str], name: str, least: int, most: int | None = None) -> int:
    text = variables.get(name)
    if text is not None and text.isdecimal() and least <= int(text) and (most is None or int(text) <= most):
        return int(text)
    wanted = f"at least {least}" if most is None else f"in {least}..{most}"
    raise UserError(f"the variable {name}={text or ''} is no whole number {wanted}: {_REMEDY}")
