"""One run at a time in a folder of checkpoints: two would take each other's files away."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from distill.runtime.place import progressed
from distill.types import UserError

log = logging.getLogger(__name__)

PATIENCE_S = 120.0
"""How long the run before may take to end, or a file server to notice that its machine did."""
FILE = ".owner"
_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Claim:
    """A folder that is this process's as long as it lives; the main rank makes it.

    A lock of the operating system's, which nothing has to take back: it ends with the process, however that ends. A
    file system without locks is warned of. Raises UserError where another process has the folder, which ``key`` names,
    for PATIENCE_S.
    """

    def __init__(self, folder: Path, key: str) -> None:
        # Of this process's locks on a file all end when it closes any of its handles: this one is the only one.
        self._file = (folder / FILE).open("a+", encoding="utf-8")
        began, owner = time.monotonic(), ""
        while not self._locked():
            if not owner:
                self._file.seek(0)
                owner = self._file.read().strip() or "an unknown process"
                log.warning("%s=%s is in use by %s: waiting up to %g s for its end", key, folder, owner, PATIENCE_S)
            elif time.monotonic() - began >= PATIENCE_S:
                raise UserError(
                    f"{key}={folder} is in use by another run ({owner}): give each run a folder of its own, or end the"
                    " other one first"
                )
            progressed()
            time.sleep(0.2)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

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
