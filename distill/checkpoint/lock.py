"""Lock a checkpoint directory, so that only one run writes to it.

The package ``filelock`` is not used, because a lock that a failed machine left could not be taken over. On a file
system without locks, the lock file of ``filelock`` also remains after a run is killed.
"""

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
from distill.run_files import LOCK_FILE
from distill.supervise.progress import heartbeat

log = logging.getLogger(__name__)

WAIT_S = 120.0
"""Time in seconds to wait for a lock that another run holds, because that run may be exiting."""
_TAKEN = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class DirectoryLock:
    """Exclusive lock on the directory ``folder``, held until the process exits.

    Only rank 0 creates a lock. The operating system releases the lock when the process ends. A file server may keep the
    lock of a failed machine, so a requeued Slurm job takes over the lock that its earlier start left. If the file
    system does not support locks, a warning is logged and nothing is locked. Raises UserError if another run holds the
    lock for WAIT_S seconds. ``key``: configuration key of the directory, used in messages.
    """

    def __init__(self, folder: Path, key: str) -> None:
        # Closing any handle of a file releases all of the process's locks on it, so keep this as the only handle.
        self._file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
        self._folder, self._key = folder, key
        start, owner = 0.0, ""
        while not self._locked():
            if owner != (current := self._read().strip() or "an unknown process"):
                start, owner = time.monotonic(), current
                log.warning(
                    "%s=%s is in use by %s: waiting up to %g s until that process exits", key, folder, owner, WAIT_S
                )
            elif time.monotonic() - start >= WAIT_S:
                if _is_earlier_start(owner):
                    log.warning(
                        "%s has ended, but its lock on %s remains: this process takes over the lock",
                        *(owner, folder),
                    )
                    break
                raise UserError(
                    f"{key}={folder} is in use by another run ({owner})",
                    f"set {key} to another directory, or stop the other run first; if the machine of the other run is"
                    f" down, remove {folder / LOCK_FILE}",
                    key=key,
                    value=str(folder),
                )
            heartbeat()
            time.sleep(0.2)
        self._token = f"process {os.getpid()} on {socket.gethostname()}{_slurm_start()}\n"
        self._file.truncate(0)
        self._file.write(self._token)
        self._file.flush()

    def check(self) -> None:
        """Raise UserError if the lock file names another run.

        On some file systems, a lock has no effect on other machines, so a run on another machine may have taken over
        the directory.
        """
        owner = self._read()
        if owner != self._token:
            raise UserError(
                f"{self._key}={self._folder} was taken over by another run ({owner.strip() or 'unknown'})",
                f"set {self._key} to a different directory for each run",
                key=self._key,
                value=str(self._folder),
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
            log.warning(
                "the lock file %s cannot be locked (%s), so a second run that writes to its directory is not detected:"
                " use a different directory for each run",
                *(self._file.name, error.strerror),
            )
        return True


def _slurm_start() -> str:
    """Return the text `` in start N of job M`` for the lock file; "" outside Slurm."""
    job = slurm.start_of_job()
    return "" if job is None else f" in start {job[1]} of job {job[0]}"


def _is_earlier_start(owner: str) -> bool:
    """Return whether ``owner``, the content of the lock file, names an earlier start of this Slurm job."""
    job, found = slurm.start_of_job(), re.search(r"in start (\d+) of job (\d+)$", owner)
    return job is not None and found is not None and int(found[2]) == job[0] and int(found[1]) < job[1]
