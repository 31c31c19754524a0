"""Rendezvous: a key-value store through which the ranks of one launch find each other."""

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

from distill.distributed.launcher import launch_id, launcher_error, launcher_holds_store
from distill.errors import UserError
from distill.supervise.watchdog import rank_names

log = logging.getLogger(__name__)

TIMEOUT_S = 600.0
"""Seconds to wait for missing ranks; a rank on a slow file system may import modules for minutes."""
_OWN_STORE_TIMEOUT_S = 20.0
"""Timeout in seconds for rank 0 to connect to the rendezvous store, if rank 0 itself serves the store."""
_LOG_AFTER_S = 20.0
_POLL_S = 0.1
_TIMED_OUT = "timed out"


class RendezvousError(Exception):
    """Failure to connect all ranks at the start of a run, for example because a rank is missing.

    ``report``: whether this rank prints the reason; False if another rank prints it.
    """

    def __init__(self, reason: str, report: bool = True) -> None:
        super().__init__(reason)
        self.report = report


class Rendezvous:
    """This rank's connection to the key-value store through which the ranks find each other.

    Rank, number of ranks and address are read from the environment variables of torchrun or Slurm. Every rank creates a
    Rendezvous, and calls ``barrier`` and then ``connect``. Raises UserError if rank 0 cannot open the store, for
    example because the port is in use, and RendezvousError if another rank cannot connect to it. A single process
    without a launcher opens no port.
    """

    def __init__(self) -> None:
        self.rank, self.size, self._address = 0, 1, "this process"
        self.holds_store = True
        """Whether this process serves the store, which then closes when this process exits."""
        if "RANK" not in os.environ:
            self.store: dist.Store = dist.HashStore()
            return
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._address = f"{host}:{port}"
        self.holds_store = self.rank == 0 and not launcher_holds_store()
        self.store = self._open_store(host, port)

    def _open_store(self, host: str, port: int) -> dist.Store:
        """Connect to the key-value store, which rank 0 or torchrun's launcher process serves.

        If MASTER_ADDR is an IP address, rank 0 listens on that address only; PyTorch would listen on all interfaces.
        """
        timeout = datetime.timedelta(seconds=_OWN_STORE_TIMEOUT_S if self.holds_store else TIMEOUT_S)
        try:
            listener = _listen(host, port) if self.holds_store and _is_ip_address(host) else None
            store = dist.TCPStore(
                host, port, self.size, self.holds_store, timeout, wait_for_workers=False, master_listen_fd=listener
            )
            return dist.PrefixStore(f"launch/{launch_id()}", store)
        except (OSError, dist.DistError, RuntimeError) as error:
            if not self.holds_store:
                raise RendezvousError(
                    f"rank {self.rank} could not connect to the rendezvous {self._address} of rank 0 or its launcher"
                    f" within {TIMEOUT_S:g} s"
                ) from error
            if _is_port_in_use(error):
                raise UserError(
                    f"MASTER_PORT={port} is in use on {host}, perhaps by another run",
                    "set it to a free port",
                    key="MASTER_PORT",
                    value=port,
                ) from error
            raise UserError(
                f"MASTER_ADDR={host} is not an address of rank 0's machine, because rank 0 itself cannot connect to it"
                f" ({' '.join(str(error).split())[:100]})",
                "set it to an address of rank 0's machine",
                key="MASTER_ADDR",
                value=host,
            ) from error

    def barrier(self) -> None:
        """Wait until every rank has called this method; collective.

        Raises RendezvousError with the numbers of the missing ranks after TIMEOUT_S seconds.
        """
        arrived = dist.PrefixStore("arrived", self.store)
        all_ranks = [f"{rank}" for rank in range(self.size)]
        began, logged = time.monotonic(), False
        try:
            arrived.set(f"{self.rank}", "")
            while not arrived.check(all_ranks):
                if message := launcher_error(self.rank):
                    raise RendezvousError(message)
                waited = time.monotonic() - began
                if waited > _LOG_AFTER_S and not logged:
                    logged = True
                    log.info(
                        "waiting for %s of %d at the rendezvous %s", self._missing(arrived), self.size, self._address
                    )
                if waited > TIMEOUT_S or arrived.check([_TIMED_OUT]):
                    self._raise_timeout(arrived)
                time.sleep(_POLL_S)
        except (dist.DistError, RuntimeError) as error:
            raise RendezvousError(
                f"rank 0 or its launcher closed the rendezvous {self._address} while rank {self.rank} waited there",
                report=self.rank <= 1,
            ) from error

    def _missing(self, arrived: dist.Store) -> str:
        return rank_names([rank for rank in range(self.size) if not arrived.check([f"{rank}"])])

    def _raise_timeout(self, arrived: dist.Store) -> NoReturn:
        """Raise RendezvousError with the reason that the first rank to time out has written to the store.

        Only the first rank to time out prints the reason. ``arrived``: store with one key per rank that has reached
        the barrier.
        """
        reason = f"{self._missing(arrived)} of {self.size} did not reach the rendezvous {self._address} within"
        message = f"{self.rank}:{reason} {TIMEOUT_S:g} s"
        first = arrived.compare_set(_TIMED_OUT, "", message).decode()
        if self.holds_store:
            time.sleep(20 * _POLL_S)  # until the other ranks have read it
        raise RendezvousError(first.partition(":")[2], report=first == message)

    def connect(self, backend: str, timeout: datetime.timedelta) -> None:
        """Create torch's default process group after ``barrier``; collective.

        ``backend``, ``timeout``: backend of the group and timeout of its collectives. Raises UserError if ranks cannot
        reach each other.
        """
        self.store.set_timeout(timeout)
        try:
            dist.init_process_group(backend, timeout=timeout, store=self.store, rank=self.rank, world_size=self.size)
        except (dist.DistError, RuntimeError) as error:
            raise UserError(
                f"rank {self.rank} reached the rendezvous {self._address} but cannot connect to all other ranks"
                f" ({' '.join(str(error).split())[:200]})",
                "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the network interface on which the nodes reach"
                " each other",
                key="GLOO_SOCKET_IFNAME",
                value=os.environ.get("GLOO_SOCKET_IFNAME"),
            ) from error


def _is_ip_address(host: str) -> bool:
    """Return whether ``host`` is an IP address and not a host name.

    The store listens on a single address only if ``host`` is an IP address. A host name may resolve to the loopback
    address on its own machine, and other machines cannot reach that address.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_port_in_use(error: Exception) -> bool:
    """Return whether ``error`` means that the port is in use; torch reports this only in the message."""
    text = str(error)
    return getattr(error, "errno", None) == errno.EADDRINUSE or "EADDRINUSE" in text or "already in use" in text


def _listen(host: str, port: int) -> int | None:
    """Return the descriptor of a socket that listens on ``port`` of the IP address ``host`` only.

    None if ``host`` is not an address of this machine, for example behind a NAT.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=4096).detach()
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return None
        raise
