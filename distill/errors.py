"""Errors that end a run: user errors, failures that all ranks raise together, and disk errors.

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
    """Return ``value`` as a recipe writes it, truncated to 80 characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def any_of(words: Iterable[str]) -> str:
    """Join ``words`` as "a, b or c"."""
    *head, last = words
    return f"{', '.join(head)} or {last}" if head else last


def reason(error: Exception) -> str:
    """Return the message of ``error`` in one line of at most 200 characters, to quote it in parentheses."""
    text = " ".join(str(error).split()).rstrip(".:") or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


_BY_NUMBER = re.compile(r"\(os error (\d+)\)")


def disk_error(error: BaseException | None) -> OSError | None:
    """Return the OSError that is or caused ``error``, or None.

    torch replaces a full disk by a failed assertion; safetensors has the number of the OSError in its message.
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
    """Replace an error of the block by the OSError that caused it, if any: pickling would lose the cause."""
    try:
        yield
    except Exception as error:
        cause = disk_error(error)
        if cause is None or cause is error:
            raise
        raise cause from error


def cannot_write(target: str, error: OSError, fix: str) -> UserError:
    """Return the error for a directory, or the key that names it, that cannot be written."""
    key, _, value = target.partition("=")
    is_setting = bool(value) and " " not in key
    problem = f"{target} cannot be written ({error.strerror or error})"
    return UserError(problem, fix, key=key if is_setting else "", value=value if is_setting else None)


def writing_run(run_dir: Path) -> AbstractContextManager[None]:
    """Return ``writing_to`` for the run directory."""
    fix = "free space there, or set logger.log_dir or runtime.run_dir to a writable directory"
    return writing_to(f"the run directory {run_dir}", fix)


@contextmanager
def writing_to(target: str, fix: str) -> Iterator[None]:
    """Raise UserError if the block fails because of the disk; ``target`` names the directory or ``key=value``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = disk_error(error)
        if cause is None:
            raise
        raise cannot_write(target, cause, fix) from error
