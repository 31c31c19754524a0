"""Errors that a run ends with: what a user can fix, what all ranks raise together, and disk errors.

Exit codes: 2 for UserError, 1 for RunFailed and for any other exception.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path


class UserError(ValueError):
    """A setting or an input that cannot work; the program prints one sentence and exits with code 2.

    ``problem`` states key, value and rule, ``fix`` what to do; str() joins them with a colon. ``key`` and ``value``
    name the setting for callers and tests; they are not part of the sentence.
    """

    def __init__(self, problem: str, fix: str = "", key: str = "", value: object = None) -> None:
        super().__init__(f"{problem}: {fix}" if fix else problem)
        self.problem = problem
        self.fix = fix
        self.key = key
        self.value = value

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str, object]]:
        """Keep all fields when a process pool or ``World.gather`` pickles the error."""
        return type(self), (self.problem, self.fix, self.key, self.value)


class CollectiveUserError(UserError):
    """A UserError that all ranks raise at the same point, so that they exit together."""


class RunFailed(RuntimeError):
    """A failure that all ranks raise together and that is not a configuration error; exit code 1.

    ``retryable``: starting the same command again may succeed.
    """

    def __init__(self, reason: str, retryable: bool = False) -> None:
        super().__init__(reason)
        self.retryable = retryable


def show(value: object) -> str:
    """``value`` as a recipe writes it, cut to 80 characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def any_of(words: Iterable[str]) -> str:
    """Join ``words`` as "a, b or c"."""
    *head, last = words
    return f"{', '.join(head)} or {last}" if head else last


def reason(error: Exception) -> str:
    """The message of ``error`` in one line of at most 200 characters, for the brackets of a sentence."""
    text = " ".join(str(error).split()).rstrip(".:") or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


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
