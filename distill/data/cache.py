"""Store Arrow tables in cache files, built once per node and memory-mapped by all ranks of the node.

A cache file is an Arrow file followed by a magic number and a checksum. The file name contains the host name, so nodes
that share a home folder have separate cache files. It also contains a hash of the table's columns and of the paths,
sizes and times of the source files. A process holds a shared lock on each cache file that it has mapped; locked files
are never removed.
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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.distributed.host_memory import give_back_freed_memory
from distill.errors import reason

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

Batches = Callable[[], Iterator["pa.RecordBatch"]]

IN_MEMORY_BYTES = 4 * 2**20
"""Maximum size in bytes of a table that each process keeps in memory instead of in a cache file."""
MAX_CACHE_BYTES = 32 * 2**30
"""Maximum total size of all cache files in bytes; above it, the least recently used files are removed."""
_VERSION = 2
"""Version of the cache files, part of the hash in their names.

Increase it if a change of the code changes the tables that are built from the same source files.
"""
_TRAILER = struct.Struct("<8sQ")
_MAGIC = b"distill1"
_CHUNK = 2**20
_DAY = 24 * 3600.0
_private: Path | None = None
"""Temporary folder for new cache files in the block of ``private_cache``; None outside."""
_LOCK_SECONDS = 1800.0
"""Maximum time in seconds to wait for another process that builds the same cache file.

After this time, this process builds the file itself.
"""


@contextmanager
def private_cache() -> Iterator[None]:
    """In the ``with`` block, new cache files are written to a temporary folder, which is removed at the end.

    Complete files of the shared cache are used, but not changed. Tables remain readable after the block.
    """
    global _private
    with tempfile.TemporaryDirectory(prefix="distill-", ignore_cleanup_errors=True) as folder:
        _private = Path(folder)
        try:
            yield
        finally:
            _private = None


def open_table(identity: Any, size: int, schema: pa.Schema, batches: Batches) -> pa.Table:
    """Return a table of the record batches that ``batches()`` yields.

    The table is kept in memory if its size and the size of its source files are both at most IN_MEMORY_BYTES.
    Otherwise it is memory-mapped from a cache file. ``identity``: a JSON value that changes whenever the table changes;
    its hash is in the name of the cache file. ``size``: the total size of the source files in bytes. If no folder can
    store the cache file, the table is kept in memory and a warning is logged. Not collective: call it first on one rank
    per node (see World.main_first), so that only this rank builds the file.
    """
    import pyarrow as pa

    if size <= IN_MEMORY_BYTES:
        found = _all_of(batches(), IN_MEMORY_BYTES)
        if found is not None:
            return pa.Table.from_batches(found, schema)
    digest = hashlib.sha256(json.dumps([_VERSION, identity]).encode()).hexdigest()[:32]
    name, failures = f"{digest}-{socket.gethostname()}.arrow", []
    if _private is not None and (cached := _open_existing(name)) is not None:
        return cached
    for folder in cache_folders() if _private is None else [_private]:
        try:
            return _open_shared(folder / "data", name, schema, batches)
        except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
            failures.append(f"{folder / 'data'}: {reason(error)}")
    log.warning(
        "the data cache cannot be written (%s), so every rank keeps a copy of the data in memory: set XDG_CACHE_HOME to"
        " a writable folder with free space",
        "; ".join(failures),
    )
    return pa.Table.from_batches(list(batches()), schema)


def _open_existing(name: str) -> pa.Table | None:
    """Return the table of the shared cache file ``name`` without changing the file's times; None if it is missing."""
    for folder in cache_folders():
        with suppress(OSError):
            if (table := _open_mapped(folder / "data" / name, mark=False)) is not None:
                return table
    return None


def _all_of(batches: Iterator[pa.RecordBatch], size: int) -> list[pa.RecordBatch] | None:
    """Return all batches as a list, or None if their total size exceeds ``size`` bytes."""
    found: list[pa.RecordBatch] = []
    for batch in batches:
        found.append(batch)
        size -= batch.nbytes
        if size < 0:
            return None
    return found


def _open_shared(folder: Path, name: str, schema: pa.Schema, batches: Batches) -> pa.Table:
    """Return the memory-mapped table of the cache file ``name``; build a missing or damaged file first.

    Raises OSError if the file cannot be written or read.
    """
    from filelock import FileLock, Timeout

    _make_private(folder)
    path = folder / name
    table = _open_mapped(path)
    if table is not None:
        return table
    lock = FileLock(f"{path}.lock", timeout=_LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout:  # building the same file twice is safe, because each process renames a complete file
        log.warning(
            "another process has been building the cache file %s for more than %.0f s, so this process builds it too",
            path,
            _LOCK_SECONDS,
        )
    try:
        table = _open_mapped(path)
        if table is None:
            _write(path, schema, batches)
            _release_memory()
            _remove_old(folder, keep=path)
            table = _open_mapped(path)
    finally:
        lock.release()
    if table is None:
        raise OSError(f"the cache file {path} was written, but is incomplete or damaged")
    return table


def _make_private(folder: Path) -> None:
    """Create ``folder`` and its parent folder, accessible only to the current user.

    Raises PermissionError if one of the two folders belongs to another user.
    """
    for made in (folder.parent, folder):
        made.mkdir(mode=0o700, parents=True, exist_ok=True)
        if made.stat().st_uid != os.getuid():
            raise PermissionError(f"{made} belongs to another user")


def _open_mapped(path: Path, mark: bool = True) -> pa.Table | None:
    """Return the memory-mapped table of a cache file; None if the file is missing, incomplete or damaged.

    This process holds a shared lock on the file as long as the table exists. ``mark``: whether to mark the file as most
    recently used.
    """
    import pyarrow as pa

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_size <= _TRAILER.size:
            return None
        # mmap duplicates the descriptor, so the lock lives as long as the mapping.
        content = pa.py_buffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    finally:
        os.close(descriptor)
    body = content.slice(0, content.size - _TRAILER.size)
    if bytes(content.slice(body.size)) != _TRAILER.pack(_MAGIC, _checksum(body)):
        return None
    if mark:
        with suppress(OSError):
            os.utime(path)
    return pa.ipc.open_file(body).read_all()


def _checksum(content: Any) -> int:
    view, checksum = memoryview(content), 0
    for start in range(0, len(view), _CHUNK):
        checksum = zlib.crc32(view[start : start + _CHUNK], checksum)
    return checksum


def _write(path: Path, schema: pa.Schema, batches: Batches) -> None:
    """Write the batches to a temporary file, then rename it to ``path``; no process reads a partial file."""
    import pyarrow as pa

    descriptor, written = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # prevents removal by another process
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
    """Return freed memory to the operating system; otherwise Arrow and glibc keep tens of MiB allocated."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()
    give_back_freed_memory()


def _remove_old(folder: Path, keep: Path) -> None:
    """Remove old temporary files and, above MAX_CACHE_BYTES in total, the least recently used cache files.

    Temporary files are removed after one day. ``keep``: a file that is not removed. Locked files are not removed
    either. A cache file of another host is removed only if it was last opened more than a day ago, because its lock may
    not be visible on this host (Lustre).
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
        surplus = path.suffix == ".arrow" and total > MAX_CACHE_BYTES and (ours or since > _DAY)
        if path != keep and (abandoned or surplus) and not _in_use(path):
            with suppress(OSError):
                path.unlink()
                total -= size
                Path(f"{path}.lock").unlink(missing_ok=True)


def _in_use(path: Path) -> bool:
    try:
        with path.open("r+b") as file:  # NFS requires write access for an exclusive lock
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def cache_folders() -> list[Path]:
    """Return the possible folders for cache files, in order of preference.

    The first is in $XDG_CACHE_HOME or ~/.cache, the second in the system's folder for temporary files. Only the second
    is returned if XDG_CACHE_HOME is not set and the user has no home folder.
    """
    given, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~")
    user = Path(given) if os.path.isabs(given) else Path(home, ".cache")
    temporary = Path(tempfile.gettempdir(), f"distill-{os.getuid()}")
    return [user / "distill", temporary] if user.is_absolute() else [temporary]
