"""Where ranks find each other: a store, and who has come to it."""

from __future__ import annotations

import datetime
import errno
import ipaddress
import logging
import os
import socket
import time

import torch.distributed as dist

from distill.runtime.launch import launcher, launcher_lives
from distill.types import UserError

log = logging.getLogger(__name__)

PATIENCE_S = 600.0
"""How long ranks wait for those that have not come: their file systems may be cold, but the others may be dead."""
_SAID_AFTER_S = 20.0
_POLL_S = 0.1


class AbsentError(Exception):
    """Ranks that were to come did not. ``speaks``: whether this rank is the one that says so."""

    def __init__(self, reason: str, speaks: bool = True) -> None:
        super().__init__(reason)
        self.speaks = speaks


def join(backend: str, timeout: datetime.timedelta) -> None:
    """Wait for all ranks of the world that torchrun's or Slurm's variables tell of, and make the process group.

    ``timeout``: of its collectives. Every rank calls it. Raises AbsentError for ranks that don't come in PATIENCE_S,
    and UserError for a port that is taken and for ranks that can't reach each other. A world of one has no door at all.
    """
    if "RANK" not in os.environ:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _store(host, port, rank, size)
    meet(store, rank, size, f"{host}:{port}")
    store.set_timeout(timeout)
    try:
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    except (dist.DistError, RuntimeError) as error:
        raise UserError(
            f"rank {rank} met the others at {host}:{port} but can't connect to all of them"
            f" ({' '.join(str(error).split())[:200]}): set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the network"
            " interface on which the nodes reach each other"
        ) from error


def _store(host: str, port: int, rank: int, size: int) -> dist.Store:
    """The store of the world; without torchrun, whose agents keep one, it is the first rank's.

    That listens, where MASTER_ADDR is an address, there and nowhere else; PyTorch's own would on every interface.
    """
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    patience = datetime.timedelta(seconds=PATIENCE_S)
    try:
        listener = _listen(host, port) if holds and _is_address(host) else None
        return dist.TCPStore(host, port, size, holds, patience, wait_for_workers=False, master_listen_fd=listener)
    except (OSError, dist.DistError, RuntimeError) as error:
        if not holds:
            raise AbsentError(
                f"rank {rank} found nobody who keeps the rendezvous {host}:{port}, rank 0 or a launcher, for"
                f" {PATIENCE_S:g} s"
            ) from error
        if isinstance(error, OSError) and error.errno != errno.EADDRINUSE:
            raise UserError(
                f"MASTER_ADDR={host}: rank 0 can't listen there ({error.strerror}): set it to an address of its machine"
            ) from error
        raise UserError(
            f"MASTER_PORT={port} is taken on {host}, by another run perhaps: set it to a free port"
        ) from error


def meet(store: dist.Store, rank: int, size: int, where: str) -> None:
    """Wait until every rank has come to the store; raises AbsentError, with their numbers, where some don't."""
    doors = dist.PrefixStore("come", store)
    absent, began, said = list(range(size)), time.monotonic(), False
    try:
        doors.set(f"{rank}", "")
        while absent := [other for other in absent if not doors.check([f"{other}"])]:
            if not launcher_lives():
                raise AbsentError(f"the launcher (process {launcher()}) of rank {rank} ended")
            waited = time.monotonic() - began
            if waited > _SAID_AFTER_S and not said:
                said = True
                log.info("waiting for %s of %d at %s", named(absent), size, where)
            if waited > PATIENCE_S:
                speaker = min(set(range(size)) - set(absent))
                raise AbsentError(
                    f"{named(absent)} of {size} did not come to the rendezvous {where} in {PATIENCE_S:g} s",
                    speaks=rank == speaker,
                )
            time.sleep(_POLL_S)
    except (dist.DistError, RuntimeError) as error:
        raise AbsentError(f"rank 0, or the launcher, left the rendezvous {where} while rank {rank} waited") from error


def named(ranks: list[int]) -> str:
    """``rank 3`` or ``ranks 3, 5``; of very many the first."""
    text = ", ".join(map(str, ranks[:20])) + (f" and {len(ranks) - 20} more" if len(ranks) > 20 else "")
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


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
