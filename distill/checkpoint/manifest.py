"""What a checkpoint says of itself: the info, and the size and sum of every file that a resumed run reads.

``training_info.json`` comes last and is sealed by a sum of its own, so a folder without a good one is no checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from distill.supervise.progress import heartbeat

log = logging.getLogger(__name__)

INFO = "training_info.json"
_SEAL, _FILES = "sha256", "files"

_PIECE = 2**24
_AGAIN_AFTER_S = (0.5, 2.0, 8.0, 30.0, 60.0)
MAY_PASS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOTCONN, errno.EHOSTDOWN)
"""Errors of a disk or file server that doesn't answer now."""
T = TypeVar("T")

Sums = dict[str, dict[str, int | str]]
"""File by its path inside the checkpoint: ``bytes`` and ``sha256``."""


class Damaged(Exception):
    """A checkpoint is not what was written; says which file and what is wrong with it."""


class Unreadable(Damaged):
    """A disk or file server doesn't answer now, which says nothing about what lies there."""


class Fault(NamedTuple):
    """What is wrong with a checkpoint."""

    text: str
    retryable: bool = False
    """Whether a disk or file server doesn't answer now, which says nothing about what lies there."""


def sums_of(folder: Path, names: Iterable[str]) -> Sums:
    """Size and sum of files as they lie on disk, by their paths inside ``folder``."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}


def fault_of(folder: Path, sums: Sums, names: Sequence[str]) -> Fault | None:
    """What is wrong with the first of these files that isn't as written; None if all are."""
    for name in names:
        try:
            found, wanted = patiently((folder / name).stat).st_size, sums[name]["bytes"]
            if found != wanted:
                return Fault(f"{name} has {found} of {wanted} bytes")
            if patiently(partial(_sha256, folder / name)) != sums[name]["sha256"]:
                return Fault(f"{name} holds other bytes than were written")
        except OSError as error:
            return Fault(f"{name} can't be read: {error.strerror}", error.errno in MAY_PASS)
    return None


def patiently(read: Callable[[], T]) -> T:
    """What ``read`` returns, tried again where an error of the disk may pass: a file server that is restarted, say.

    Such an error is no sign that a file is damaged.
    """
    for wait_s in _AGAIN_AFTER_S:
        try:
            return read()
        except OSError as error:
            if error.errno not in MAY_PASS:
                raise
            log.warning("%s; trying again in %g s", error, wait_s)
            time.sleep(wait_s)
    return read()


def files_of(info: Mapping[str, Any]) -> Sums:
    """The sums that an info records."""
    sums: Sums = info[_FILES]
    return sums


def write_info(folder: Path, info: Mapping[str, Any], sums: Sums | None = None) -> None:
    """Write the sealed info, in one rename; ``sums`` are kept from the info if not given."""
    kept = {name: value for name, value in info.items() if name != _SEAL} | ({} if sums is None else {_FILES: sums})
    part = folder / f"{INFO}.part"
    write_durably(part, json.dumps(kept | {_SEAL: _seal(kept)}, indent=2) + "\n")
    part.replace(folder / INFO)


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file and flush it to the disk, so that it survives a power failure."""
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def read_info(folder: Path) -> dict[str, Any]:
    """The info of a checkpoint. Raises Damaged where there is none, or not the one that was written, and Unreadable."""
    try:
        text = patiently((folder / INFO).read_text)
    except FileNotFoundError:
        raise Damaged(f"it has no {INFO}") from None
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno in MAY_PASS:
            raise Unreadable(f"{INFO} can't be read: {error.strerror}") from error
        raise Damaged(f"{INFO} can't be read ({error})") from error
    try:
        info = json.loads(text)
        seal = info.pop(_SEAL)
        sums = info[_FILES]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{INFO} is cut off, or no checkpoint's ({error!r})") from error
    if not isinstance(sums, dict) or _seal(info) != seal:
        raise Damaged(f"{INFO} holds other bytes than were written")
    return dict(info)


def read_whole(folder: Path) -> dict[str, Any]:
    """The info of a checkpoint whose every file this process has compared with its sum; raises Damaged."""
    info = read_info(folder)
    sums = files_of(info)
    if (fault := fault_of(folder, sums, sorted(sums))) is not None:
        raise Damaged(fault.text)
    return info


def _seal(info: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(info))  # as it will be read: a tuple is a list then
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
            heartbeat()  # hundreds of GB on a slow disk are no standstill
    return found.hexdigest()
