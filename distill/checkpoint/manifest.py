"""Read and write the manifest of a checkpoint, the file ``training_info.json``.

The manifest contains the checkpoint's info (step, recipe, metrics, position in the data) and the size and SHA-256 of
each file that a resume reads. It is written last and contains its own hash, so a directory without a valid manifest is
not a complete checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from distill.errors import RunFailed
from distill.metrics.sinks import read_metrics
from distill.run_files import METRICS_FILE
from distill.supervise.progress import heartbeat

log = logging.getLogger(__name__)

INFO = "training_info.json"
_SEAL, _FILES = "sha256", "files"

_CHUNK_BYTES = 2**24
_RETRY_DELAYS_S = (0.5, 2.0, 8.0, 30.0, 60.0)
TRANSIENT_ERRNOS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOTCONN, errno.EHOSTDOWN)
"""Error numbers of transient I/O errors: the disk or file server does not respond at the moment."""
T = TypeVar("T")

Checksums = dict[str, dict[str, int | str]]
"""Maps a file's path inside the checkpoint to its size (key ``bytes``) and SHA-256 (key ``sha256``)."""


class CheckpointError(Exception):
    """Error of a checkpoint that is damaged or cannot be read.

    ``retryable``: whether the cause is a transient I/O error; the files may then be undamaged.
    """

    def __init__(self, reason: str, retryable: bool = False) -> None:
        super().__init__(reason, retryable)
        self.reason = reason
        self.retryable = retryable

    def __str__(self) -> str:
        return self.reason


def checksums_of(folder: Path, names: Iterable[str]) -> Checksums:
    """Return the size and SHA-256 of each file; ``names``: paths of the files relative to ``folder``."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}


def find_damage(
    folder: Path, checksums: Checksums, names: Sequence[str], hashes: bool = True
) -> CheckpointError | None:
    """Return the error of the first damaged or unreadable file of ``names``, or None if all are intact.

    ``names``: paths relative to ``folder``. ``checksums``: expected size and SHA-256 of each file. ``hashes``: whether
    to compare the SHA-256 too, which reads the files completely.
    """
    for name in names:
        try:
            size, expected = retry_io((folder / name).stat).st_size, checksums[name]["bytes"]
            if size != expected:
                return CheckpointError(f"{name} has {size} bytes instead of {expected}")
            if hashes and retry_io(partial(_sha256, folder / name)) != checksums[name]["sha256"]:
                return CheckpointError(f"the sha256 of {name} differs from the value in {INFO}")
        except OSError as error:
            return CheckpointError(f"{name} cannot be read: {error.strerror}", error.errno in TRANSIENT_ERRNOS)
    return None


def retry_io(read: Callable[[], T]) -> T:
    """Call ``read`` and return its result; retry transient I/O errors for 100 s.

    Raises the OSError if it is not transient or still occurs after the last retry.
    """
    for delay_s in _RETRY_DELAYS_S:
        try:
            return read()
        except OSError as error:
            if error.errno not in TRANSIENT_ERRNOS:
                raise
            log.warning("reading a checkpoint failed with a transient I/O error (%s): retrying in %g s", error, delay_s)
            time.sleep(delay_s)
    return read()


def files_of(info: Mapping[str, Any]) -> Checksums:
    """Return the checksums of a checkpoint's files from ``info``, the content of training_info.json."""
    checksums: Checksums = info[_FILES]
    return checksums


def write_info(folder: Path, info: Mapping[str, Any], checksums: Checksums | None = None) -> None:
    """Write ``info`` and ``checksums`` to ``folder/training_info.json`` atomically.

    ``checksums``: checksums of the checkpoint's files; None keeps the checksums that ``info`` contains.
    """
    content = {name: value for name, value in info.items() if name != _SEAL}
    content |= {} if checksums is None else {_FILES: checksums}
    part = folder / f"{INFO}.part"
    write_durably(part, json.dumps(content | {_SEAL: _hash_of(content)}, indent=2) + "\n")
    part.replace(folder / INFO)


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file and flush it to the disk, so that it survives a power failure."""
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def flush_directory(folder: Path) -> None:
    """Flush a directory to the disk, so that a rename survives a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot flush directories
            os.fsync(handle)
    finally:
        os.close(handle)


def read_info(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's training_info.json.

    Raises CheckpointError if the file is missing, damaged or unreadable.
    """
    try:
        text = retry_io((folder / INFO).read_text)
    except FileNotFoundError:
        raise CheckpointError(f"{INFO} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        is_transient = isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS
        raise CheckpointError(f"{INFO} cannot be read: {error}", is_transient) from error
    try:
        info = json.loads(text)
        seal = info.pop(_SEAL)
        checksums = info[_FILES]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{INFO} is truncated or has an invalid format ({error!r})") from error
    if not isinstance(checksums, dict) or _hash_of(info) != seal:
        raise CheckpointError(f"the content of {INFO} does not match the sha256 stored in it")
    return dict(info)


def info_or_error(folder: Path) -> tuple[dict[str, Any], CheckpointError | None]:
    """Return ``(read_info(folder), None)``, or ``({}, error)`` if ``read_info`` raises CheckpointError."""
    try:
        return read_info(folder), None
    except CheckpointError as error:
        return {}, error


def read_file_or_error(folder: Path, name: str) -> tuple[bytes, CheckpointError | None]:
    """Return the content of a small file of a checkpoint and None; or b"" and the error if it cannot be read."""
    try:
        return retry_io((folder / name).read_bytes), None
    except OSError as error:
        return b"", CheckpointError(f"{name} cannot be read: {error.strerror}", error.errno in TRANSIENT_ERRNOS)


def read_failed(folder: Path, error: CheckpointError, on_rank: str = "") -> RunFailed:
    """Return the exception for an unreadable checkpoint; ``on_rank``: "" or a text such as " on rank 3"."""
    fix = "start the run again when the file system responds" if error.retryable else "repair this file"
    return RunFailed(
        f"checkpoint {folder} cannot be loaded, because {error.reason}{on_rank}: {fix}, or move the directory of this"
        " checkpoint away to resume from the previous checkpoint",
        retryable=error.retryable,
    )


def read_verified(folder: Path) -> dict[str, Any]:
    """Verify all files of a checkpoint, and return the content of training_info.json; not collective.

    Raises CheckpointError if a file is damaged or unreadable.
    """
    info = read_info(folder)
    checksums = files_of(info)
    if (error := find_damage(folder, checksums, sorted(checksums))) is not None:
        raise error
    return info


def _hash_of(info: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(info))  # JSON turns tuples into lists
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            heartbeat()  # hashing hundreds of GB takes longer than the watchdog's timeout
    return digest.hexdigest()


def read_history(path: Path, info: Mapping[str, Any]) -> list[dict[str, float | None]]:
    """Return the rows of a checkpoint's metrics.jsonl, plus a row of later validation metrics if any.

    Later metrics were added to ``info``, the content of training_info.json, after metrics.jsonl was copied into the
    checkpoint. ``path``: directory of the checkpoint.
    """
    file = path / METRICS_FILE
    rows = read_metrics(file) if METRICS_FILE in files_of(info) else []
    step = int(path.name.removeprefix("step_"))
    late = {name: value for name, value in info.get("metrics", {}).items() if name.startswith("validation/")}
    if late and rows and not any(row["step"] == step and late.keys() & row.keys() for row in rows):
        rows.append({"step": step, **late})
    return rows
