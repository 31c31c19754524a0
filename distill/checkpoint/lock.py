"""One run at a time in a folder of checkpoints: two would take each other's files away."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import socket
import time
from pathlib import Path

from distill.distributed import slurm
from distill.errors import UserError
from distill.supervise.progress import heartbeat

log = logging.getLogger(__name__)

PATIENCE_S = 120.0
"""How long the run before may take to end, or a file server to notice that its machine did."""
FILE = ".owner"
_TAKEN = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class DirectoryLock:
    """A folder that is this process's as long as it lives; the main rank makes it.

    A lock of the operating system's, which nothing has to take back: it ends with the process, however that ends. A
    file server may keep the lock of a machine that died, so a requeued job of Slurm's, of which one start lives at a
    time, takes over what its own earlier one had. A file system without locks is warned of. Raises UserError where
    another process has the folder, which ``key`` names, for PATIENCE_S.
    """

    def __init__(self, folder: Path, key: str) -> None:
        # Of this process's locks on a file all end when it closes any of its handles: this one is the only one.
        self._file = (folder / FILE).open("a+", encoding="utf-8")
        began, owner = 0.0, ""
        while not self._locked():
            if owner != (found := self._read().strip() or "an unknown process"):
                began, owner = time.monotonic(), found
                log.warning("%s=%s is in use by %s: waiting up to %g s for its end", key, folder, owner, PATIENCE_S)
            elif time.monotonic() - began >= PATIENCE_S:
                if _earlier_start(owner):
                    log.warning("%s keeps its lock although it must have ended: it is passed over", owner)
                    break
                raise UserError(
                    f"{key}={folder} is in use by another run ({owner}): give each run a folder of its own, or end the"
                    f" other one first; if its machine is dead, remove {folder / FILE}"
                )
            heartbeat()
            time.sleep(0.2)
        self._mine = f"process {os.getpid()} on {socket.gethostname()}{_start()}\n"
        self._file.truncate(0)
        self._file.write(self._mine)
        self._file.flush()

    def check(self) -> None:
        """Raise UserError where another run has taken the folder all the same: on some file systems locks hold on one
        machine only.
        """
        owner = self._read()
        if owner != self._mine:
            raise UserError(
                f"another run ({owner.strip() or 'unknown'}) has taken this one's folder"
                f" {Path(self._file.name).parent}: give each run a folder of its own"
            )

    def _read(self) -> str:
        self._file.seek(0)
        return self._file.read()

    def _locked(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            if error.errno not in _NO_LOCKS:
                raise
            log.warning("%s can't be locked (%s): see that no other run writes there", self._file.name, error.strerror)
        return True


def _start() -> str:
    """Which start of which job of Slurm's this is; empty outside."""
    job = slurm.start_of_job()
    return "" if job is None else f" in start {job[1]} of job {job[0]}"


def _earlier_start(owner: str) -> bool:
    """Whether the owner is an earlier start of the job that this process runs in."""
    job, found = slurm.start_of_job(), re.search(r"in start (\d+) of job (\d+)$", owner)
    return job is not None and found is not None and int(found[2]) == job[0] and int(found[1]) < job[1]
