"""Arrow tables in a cache folder, built once on each node and memory-mapped by its ranks.

A file of the cache is an Arrow file, followed by a magic number and a checksum. Its name is a hash of what it was
built from, with the host's name: in a home folder that several nodes share, each node has its own file. Files that are
mapped by a process are locked (shared), and never removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import mmap
import os
import socket
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.distributed.host_memory import give_back_freed_memory
from distill.errors import reason

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

Batches = Callable[[], Iterator["pa.RecordBatch"]]

SMALL = 4 * 2**20
"""Bytes up to which a table is kept in each process's memory instead of in a file."""
MOST_BYTES = 32 * 2**30
"""Bytes of all files in the cache, above which the least recently used ones are removed."""
_VERSION = 1
"""To be raised whenever the same sources yield another table."""
_TRAILER = struct.Struct("<8sQ")
_MAGIC = b"distill1"
_CHUNK = 2**20
_DAY = 24 * 3600.0
_LOCK_SECONDS = 1800.0
"""How long to wait for another process that builds the same file; afterwards this one builds its own."""


def open_table(identity: Any, size: int, schema: pa.Schema, batches: Batches) -> pa.Table:
    """The table of ``batches()``: memory-mapped from the cache, or in memory where it is small.

    ``identity``: what the table depends on, as JSON; ``size``: bytes of its sources. Where no folder can hold the cache
    file, the table is kept in memory, with a warning. The ranks of a node should call it one after another (see
    World.main_first), so that one of them builds the file.
    """
    import pyarrow as pa

    if size <= SMALL:
        found = _all_of(batches(), SMALL)
        if found is not None:
            return pa.Table.from_batches(found, schema)
    digest = hashlib.sha256(json.dumps([_VERSION, identity]).encode()).hexdigest()[:32]
    failures = []
    for folder in cache_folders():
        try:
            return _shared(folder / "data", f"{digest}-{socket.gethostname()}.arrow", schema, batches)
        except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
            failures.append(f"{folder / 'data'}: {reason(error)}")
    logger.warning(
        "no folder can hold the data's cache (%s), so every rank keeps the data in its memory: set XDG_CACHE_HOME to a"
        " folder with free space",
        "; ".join(failures),
    )
    return pa.Table.from_batches(list(batches()), schema)


def _all_of(batches: Iterator[pa.RecordBatch], size: int) -> list[pa.RecordBatch] | None:
    """All batches; None: they have more than ``size`` bytes together."""
    found: list[pa.RecordBatch] = []
    for batch in batches:
        found.append(batch)
        size -= batch.nbytes
        if size < 0:
            return None
    return found


def _shared(folder: Path, name: str, schema: pa.Schema, batches: Batches) -> pa.Table:
    """The table of a cache file, built first where it is missing or damaged; OSError where the folder can't hold it."""
    from filelock import FileLock, Timeout

    _make_private(folder)
    path = folder / name
    table = _mapped(path)
    if table is not None:
        return table
    lock = FileLock(f"{path}.lock", timeout=_LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout:  # its file is renamed into place when it is complete, so two builders don't disturb each other
        logger.warning("another process has been building %s for %.0f s: building it here too", path, _LOCK_SECONDS)
    try:
        table = _mapped(path)
        if table is None:
            _write(path, schema, batches)
            _release_memory()
            _remove_old(folder, keep=path)
            table = _mapped(path)
    finally:
        lock.release()
    if table is None:
        raise OSError(f"{path} was damaged while it was written")
    return table


def _make_private(folder: Path) -> None:
    """Make the folder, for this user alone; a folder that another user prepared under its name is not trusted."""
    for made in (folder.parent, folder):
        made.mkdir(mode=0o700, parents=True, exist_ok=True)
        if made.stat().st_uid != os.getuid():
            raise PermissionError(f"{made} belongs to another user")


def _mapped(path: Path) -> pa.Table | None:
    """The table of a complete, undamaged file, which stays locked while the table lives; None for any other file."""
    import pyarrow as pa

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_size <= _TRAILER.size:
            return None
        content = pa.py_buffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))  # has the lock, as a duplicate
    finally:
        os.close(descriptor)
    body = content.slice(0, content.size - _TRAILER.size)
    if bytes(content.slice(body.size)) != _TRAILER.pack(_MAGIC, _checksum(body)):
        return None
    with suppress(OSError):
        os.utime(path)  # the most recently used
    return pa.ipc.open_file(body).read_all()


def _checksum(content: Any) -> int:
    view, checksum = memoryview(content), 0
    for start in range(0, len(view), _CHUNK):
        checksum = zlib.crc32(view[start : start + _CHUNK], checksum)
    return checksum


def _write(path: Path, schema: pa.Schema, batches: Batches) -> None:
    """Write a temporary file and rename it, so that no reader finds an incomplete one."""
    import pyarrow as pa

    descriptor, written = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # not to be removed
            with pa.ipc.new_file(file, schema) as writer:
                for batch in batches():
                    writer.write_batch(batch)
            file.flush()
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as body:
                trailer = _TRAILER.pack(_MAGIC, _checksum(body))
            file.write(trailer)
        os.replace(written, path)
    except BaseException:
        os.unlink(written)
        raise


def _release_memory() -> None:
    """Return to the system what reading needed: allocators keep tens of MiB for nothing that comes after."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()
    give_back_freed_memory()


def _remove_old(folder: Path, keep: Path) -> None:
    """Remove the least recently used files above MOST_BYTES, and what crashed builders left.

    Files of other hosts too, as every container may have another host name, but only a day after they were opened:
    file systems whose locks don't reach other hosts (Lustre) keep a removed file for those that have it open.
    """
    found = []
    for path in folder.iterdir():
        with suppress(OSError):
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in found)
    for used, size, path in sorted(found):
        ours = f"-{socket.gethostname()}.arrow" in path.name
        since = time.time() - used
        abandoned = path.suffix == ".tmp" and since > _DAY
        surplus = path.suffix == ".arrow" and total > MOST_BYTES and (ours or since > _DAY)
        if path != keep and (abandoned or surplus) and not _in_use(path):
            with suppress(OSError):
                path.unlink()
                total -= size
                Path(f"{path}.lock").unlink(missing_ok=True)


def _in_use(path: Path) -> bool:
    try:
        with path.open("r+b") as file:  # NFS locks exclusively only what is open for writing
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def cache_folders() -> list[Path]:
    """Folders for files that can be built again, best first: the user's cache folder, then the temporary one.

    A user without HOME and without an entry in the system's list of users has the temporary one only.
    """
    given, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~")
    user = Path(given) if os.path.isabs(given) else Path(home, ".cache")
    temporary = Path(tempfile.gettempdir(), f"distill-{os.getuid()}")
    return [user / "distill", temporary] if user.is_absolute() else [temporary]
