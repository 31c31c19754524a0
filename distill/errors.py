"""Errors that end a run: user errors, failures that all ranks raise together, and disk errors.

Exit codes: 2 for UserError, 1 for RunFailed and for any other exception.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path


class UserError(ValueError):
    """Error in a setting or an input; the program prints one sentence and exits with code 2.

    ``problem``: the setting and the violated rule; ``fix``: the change that the user should make. str() returns
    "problem: fix". ``key``: the configuration key or environment variable with the error, or "" if the error is in a
    file; ``value``: the value of ``key``. Both are for callers and tests.
    """

    def __init__(self, problem: str, fix: str, key: str = "", value: object = None) -> None:
        super().__init__(f"{problem}: {fix}")
        self.problem = problem
        self.fix = fix
        self.key = key
        self.value = value

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str, object]]:
        """Return the class and the constructor's arguments, so that pickle keeps all fields."""
        return type(self), (self.problem, self.fix, self.key, self.value)


class MissingError(UserError):
    """A package, model or file that the recipe needs is not on this machine.

    ``--dry-run --elsewhere`` logs it as a warning, because the run is planned for another machine.
    """


class NotCachedError(MissingError):
    """A model, tokenizer or dataset of the Hugging Face hub is not in the local cache, and cannot be downloaded.

    ``--dry-run`` logs it as a warning, because it uses no network.
    """


class CollectiveUserError(UserError):
    """A UserError that all ranks raise at the same point, so that they exit together."""


class RunFailed(RuntimeError):
    """A failure that all ranks raise together and that is not a configuration error; exit code 1.

    ``retryable``: whether starting the same command again may succeed.
    """

    def __init__(self, reason: str, retryable: bool = False) -> None:
        super().__init__(reason)
        self.retryable = retryable


def show(value: object) -> str:
    """Return ``value`` in the notation of recipes (null for None, true for True), cut to 80 characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def any_of(words: Iterable[str]) -> str:
    """Return ``words`` joined as "a, b or c"; "" if there are no words."""
    *head, last = list(words) or [""]
    return f"{', '.join(head)} or {last}" if head else last


def reason(error: Exception) -> str:
    """Return the message of ``error`` as one line of at most 200 characters.

    If the message is empty, return the name of the exception's type.
    """
    text = " ".join(str(error).split()).rstrip(".:") or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


_BY_NUMBER = re.compile(r"\(os error (\d+)\)")


def disk_error(error: BaseException | None) -> OSError | None:
    """Return the OSError that is ``error`` itself or its cause; None if no OSError caused ``error``.

    For example, if the disk is full, torch raises an exception whose cause or context is the OSError. safetensors
    raises an exception whose message contains the error number, from which this function creates the OSError.
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
    """If an OSError caused the exception that the ``with`` block raised, raise the OSError instead.

    Other exceptions are raised unchanged. Use this context manager where exceptions are pickled to send them to other
    ranks, because pickling removes an exception's cause.
    """
    try:
        yield
    except Exception as error:
        cause = disk_error(error)
        if cause is None or cause is error:
            raise
        raise cause from error


def raise_if_not_creatable(folder: Path) -> None:
    """Raise the OSError with which creating the directory ``folder`` and writing to it would fail; write nothing.

    Faults that show only during the write, such as a full disk, are not detected.
    """
    for place in (folder, *folder.parents):
        try:
            is_directory = stat.S_ISDIR(place.stat().st_mode)
        except FileNotFoundError:
            continue  # the parent decides
        if not is_directory:
            number = errno.EEXIST if place == folder else errno.ENOTDIR
        elif os.access(place, os.W_OK | os.X_OK):
            return
        else:
            number = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(number, os.strerror(number), str(place))


def cannot_write(target: str, error: OSError, fix: str) -> UserError:
    """Return the UserError for a directory that cannot be written because of ``error``.

    ``target``: a description of the directory, or the setting ``key=value`` that contains its path.
    """
    key, _, value = target.partition("=")
    is_setting = bool(value) and " " not in key
    problem = f"{target} cannot be written ({error.strerror or error})"
    return UserError(problem, fix, key=key if is_setting else "", value=value if is_setting else None)


def writing_run(run_dir: Path) -> AbstractContextManager[None]:
    """Return a context manager that raises UserError if its ``with`` block cannot write to ``run_dir``."""
    fix = "free disk space there, or set logger.log_dir or runtime.run_dir to a writable directory"
    return writing_to(f"the run directory {run_dir}", fix)


def writing_to(target: str, fix: str) -> AbstractContextManager[None]:
    """Return a context manager that raises UserError if its ``with`` block fails because of a disk error.

    ``target`` and ``fix``: arguments of ``cannot_write``.
    """
    return disk_errors_as(lambda cause: cannot_write(target, cause, fix))


@contextmanager
def disk_errors_as(user_error: Callable[[OSError], UserError]) -> Iterator[None]:
    """Raise ``user_error(cause)`` if the ``with`` block fails because of the disk error ``cause``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = disk_error(error)
        if cause is None:
            raise
        raise user_error(cause) from error
