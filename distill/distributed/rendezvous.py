"""Where ranks find each other: a store, and who has come to it."""

from __future__ import annotations

import datetime
import errno
import ipaddress
import logging
import os
import socket
import time
from typing import NoReturn

import torch.distributed as dist

from distill.distributed import slurm
from distill.distributed.launcher import launcher, launcher_lives
from distill.errors import UserError

log = logging.getLogger(__name__)

PATIENCE_S = 600.0
"""How long ranks wait for those that have not come: their file systems may be cold, but the others may be dead."""
_OWN_PATIENCE_S = 20.0
"""How long rank 0 tries to reach the store that it keeps itself."""
_SAID_AFTER_S = 20.0
_POLL_S = 0.1
_GIVEN_UP = "given up"


class RendezvousError(Exception):
    """Ranks that were to come did not. ``speaks``: whether this rank is the one that says so."""

    def __init__(self, reason: str, speaks: bool = True) -> None:
        super().__init__(reason)
        self.speaks = speaks


class Rendezvous:
    """The world that torchrun's or Slurm's variables tell of, and the store through which its ranks find each other.

    Every rank makes one, calls ``meet`` and then ``connect``. Raises UserError for a port that is taken, and
    RendezvousError where nobody keeps a store. A world of one has no door at all.
    """

    def __init__(self) -> None:
        self.rank, self.size, self._where = 0, 1, "this process"
        self._holds = True
        if "RANK" not in os.environ:
            self.store: dist.Store = dist.HashStore()
            return
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._where = f"{host}:{port}"
        self._holds = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self.store = self._store(host, port)

    def _store(self, host: str, port: int) -> dist.Store:
        """Without torchrun, whose agents keep a store, it is the first rank's.

        That listens, where MASTER_ADDR is an address, there and nowhere else; PyTorch's own would on every interface.
        """
        patience = datetime.timedelta(seconds=_OWN_PATIENCE_S if self._holds else PATIENCE_S)
        try:
            listener = _listen(host, port) if self._holds and _is_address(host) else None
            store = dist.TCPStore(
                host, port, self.size, self._holds, patience, wait_for_workers=False, master_listen_fd=listener
            )
            return dist.PrefixStore(f"start/{_start()}", store)
        except (OSError, dist.DistError, RuntimeError) as error:
            if not self._holds:
                raise RendezvousError(
                    f"rank {self.rank} found nobody who keeps the rendezvous {self._where}, rank 0 or a launcher, for"
                    f" {PATIENCE_S:g} s"
                ) from error
            if _is_taken(error):
                raise UserError(
                    f"MASTER_PORT={port} is taken on {host}, by another run perhaps: set it to a free port"
                ) from error
            raise UserError(
                f"MASTER_ADDR={host} is where rank 0 can't be reached, not even by itself"
                f" ({' '.join(str(error).split())[:100]}): set it to an address of the machine that rank 0 is on"
            ) from error

    def meet(self) -> None:
        """Wait until every rank has come; raises RendezvousError, with their numbers, where some don't."""
        doors = dist.PrefixStore("come", self.store)
        everyone = [f"{rank}" for rank in range(self.size)]
        began, said = time.monotonic(), False
        try:
            doors.set(f"{self.rank}", "")
            while not doors.check(everyone):
                if not launcher_lives():
                    raise RendezvousError(f"the launcher (process {launcher()}) of rank {self.rank} ended")
                waited = time.monotonic() - began
                if waited > _SAID_AFTER_S and not said:
                    said = True
                    log.info("waiting for %s of %d at %s", self._absent(doors), self.size, self._where)
                if waited > PATIENCE_S or doors.check([_GIVEN_UP]):
                    self._give_up(doors)
                time.sleep(_POLL_S)
        except (dist.DistError, RuntimeError) as error:
            raise RendezvousError(
                f"rank 0, or the launcher, left the rendezvous {self._where} while rank {self.rank} waited for others",
                speaks=self.rank <= 1,
            ) from error

    def _absent(self, doors: dist.Store) -> str:
        return named([rank for rank in range(self.size) if not doors.check([f"{rank}"])])

    def _give_up(self, doors: dist.Store) -> NoReturn:
        """The first whose patience ends speaks for all."""
        reason = f"{self._absent(doors)} of {self.size} did not come to the rendezvous {self._where} in"
        told = f"{self.rank}:{reason} {PATIENCE_S:g} s"
        first = doors.compare_set(_GIVEN_UP, "", told).decode()
        if self._holds:
            time.sleep(20 * _POLL_S)  # until the others have heard
        raise RendezvousError(first.partition(":")[2], speaks=first == told)

    def connect(self, backend: str, timeout: datetime.timedelta) -> None:
        """Make the process group, when all have met; ``timeout``: of its collectives. Raises UserError where ranks
        can't reach each other.
        """
        self.store.set_timeout(timeout)
        try:
            dist.init_process_group(backend, timeout=timeout, store=self.store, rank=self.rank, world_size=self.size)
        except (dist.DistError, RuntimeError) as error:
            raise UserError(
                f"rank {self.rank} met the others at {self._where} but can't connect to all of them"
                f" ({' '.join(str(error).split())[:200]}): set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the"
                " network interface on which the nodes reach each other"
            ) from error


def _start() -> str:
    """What the ranks of one start have in common, as far as their launcher tells, and others have not: a rank of
    another job, or one that is left of an earlier start, may come to the same store.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's --rdzv-id; its agents keep their store when they start again
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        return "/".join(os.environ.get(name, "0") for name in names)
    return os.environ.get(slurm.START, "0")


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


def _is_taken(error: Exception) -> bool:
    """Whether somebody else listens at the port; torch tells in words."""
    words = str(error)
    return getattr(error, "errno", None) == errno.EADDRINUSE or "EADDRINUSE" in words or "already in use" in words


def _listen(host: str, port: int) -> int | None:
    """A socket that listens at that address alone; None where it is another machine's, as behind a translated one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=4096).detach()
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return None
        raise
