"""What a disk that refuses says to the user: full, read-only, not there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from distill.types import UserError

_BY_NUMBER = re.compile(r"\(os error (\d+)\)")


def disk_error(error: BaseException | None) -> OSError | None:
    """The operating system's error that is, or led to, ``error``; None where there is none.

    torch hides a full disk behind an assertion of its own, and safetensors in the text of an error of its own kind.
    """
    while error is not None:
        if isinstance(error, OSError):
            return error
        if found := _BY_NUMBER.search(f"{error}"):
            number = int(found.group(1))
            return OSError(number, os.strerror(number))
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def as_disk_error() -> Iterator[None]:
    """The block's error is the operating system's that led to it, where one did: others may see nothing behind it."""
    try:
        yield
    except Exception as error:
        refused = disk_error(error)
        if refused is None or refused is error:
            raise
        raise refused from error


def cannot_write(what: str, error: OSError, remedy: str) -> UserError:
    """The sentence about a folder, or the key that names it: what can't be written, why, and what to do."""
    return UserError(f"{what} can't be written ({error.strerror or error}): {remedy}")


def writing_run(run_dir: Path) -> AbstractContextManager[None]:
    """``writing_to`` the folder of a run."""
    remedy = "free space there, or set logger.log_dir or runtime.run_dir to a folder that can be written to"
    return writing_to(f"the run folder {run_dir}", remedy)


@contextmanager
def writing_to(what: str, remedy: str) -> Iterator[None]:
    """Whatever the block writes to the folder that ``what`` names: a disk that refuses is the user's to mend.

    Raises UserError then; other errors pass.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        refused = disk_error(error)
        if refused is None:
            raise
        raise cannot_write(what, refused, remedy) from error
