"""The store through which ranks find each other."""

from __future__ import annotations

import datetime
import errno
import ipaddress
import os
import socket
from typing import Any

import torch.distributed as dist


def arguments(timeout: datetime.timedelta) -> dict[str, Any]:
    """What ``init_process_group`` is told of the world, by the variables that torchrun or Slurm have set.

    Without torchrun, whose agents keep the store, it is the first rank's, and where MASTER_ADDR is an address it
    listens there and nowhere else; PyTorch's own would listen on every interface. A world of one has no door at all.
    """
    if "RANK" not in os.environ:
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    host, rank, size = os.environ["MASTER_ADDR"], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or not _is_address(host):
        return {}
    port = int(os.environ["MASTER_PORT"])
    listener = _listen(host, port) if rank == 0 else None
    store = dist.TCPStore(host, port, size, rank == 0, timeout, wait_for_workers=False, master_listen_fd=listener)
    return {"store": store, "rank": rank, "world_size": size}


def _is_address(host: str) -> bool:
    """A name may mean another interface to its own machine than to the others."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _listen(host: str, port: int) -> int | None:
    """A socket that listens at that address alone; None where it is another machine's, as behind a translated one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=4096).detach()
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return None
        raise
