"""Logging: console output of the main rank, and one log file per rank."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from logging.handlers import MemoryHandler
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_CLEAR_LINE = "\r\x1b[K"


class ConsoleHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Handler that writes records to standard error, with a progress bar in the last line of a terminal.

    Each record starts with the time of day; warnings are marked. ``clock``: returns the time in seconds, for
    ``last_output``.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(sys.stderr)
        self._clock = clock
        self._bar = ""
        self.last_output = clock()
        """Value of ``clock`` at the last record, or at the start if there was no record."""
        self.is_terminal = self.stream.isatty()
        self.setFormatter(_ConsoleFormatter("%(asctime)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write ``record`` above the progress bar; the next update of the progress reporter draws the bar again."""
        self._clear_bar()
        super().emit(record)
        self.last_output = self._clock()

    def show_bar(self, text: str) -> None:
        """Replace the progress bar by ``text``, cut to the terminal's width; an empty text removes it."""
        self.acquire()
        try:
            text = text[: shutil.get_terminal_size().columns - 1]
            if text != self._bar:
                self._clear_bar()
                self._bar = text
                self._write(text)
        finally:
            self.release()

    def _clear_bar(self) -> None:
        if self._bar:
            self._bar = ""
            self._write(_CLEAR_LINE)

    def _write(self, text: str) -> None:
        """Write ``text``; do nothing if the terminal was closed, as after a logout, because the run continues."""
        with suppress(OSError):
            self.stream.write(text)
            self.stream.flush()


class _ConsoleFormatter(logging.Formatter):
    """Formatter that marks warnings. Errors, and tables that start with a line break, are written without the time."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.ERROR or record.getMessage().startswith("\n"):
            return record.getMessage()
        if record.levelno == logging.WARNING:
            moment, _, message = text.partition(" ")
            return f"{moment} warning: {message}"
        return text


def log_to_console(is_main: bool) -> None:
    """Log records of level INFO and above to standard error on the main rank; other ranks print nothing.

    Every rank also keeps its records in memory until ``log_to_file`` writes them to a file.
    """
    logger = logging.getLogger("distill")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    # A logger without any handler prints warnings to standard error, so other ranks get a handler that drops records.
    logger.addHandler(ConsoleHandler() if is_main else logging.NullHandler())
    logger.addHandler(MemoryHandler(capacity=100_000, flushLevel=logging.CRITICAL + 1, flushOnClose=True))


def log_to_file(file: Path) -> None:
    """Write this rank's log to ``file``, including all records since ``log_to_console`` was called."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = _RankLog(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT))
    logger = logging.getLogger("distill")
    kept = [h for h in logger.handlers if isinstance(h, MemoryHandler)]
    logger.addHandler(handler)
    for early in kept:
        logger.removeHandler(early)  # before flushing: a warning about a full disk must not enter the buffer
        early.setTarget(handler)
        early.close()


def log_library(name: str, level: str) -> None:
    """Write the log of another library to this rank's log file; its errors also appear on the console.

    ``name``: name of the library's logger. ``level``: lowest level that is logged. Has no effect on the library's own
    handlers, which it must not install.
    """
    logger = logging.getLogger(name)
    logger.setLevel(level)
    logger.propagate = False
    if not any(isinstance(handler, _LibraryHandler) for handler in logger.handlers):
        logger.addHandler(_LibraryHandler())


class _LibraryHandler(logging.Handler):
    """Handler that passes records of another library to the handlers of this program."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            record.msg, record.args = record.getMessage(), None  # do not keep the arguments, which may be large objects
        except Exception:
            self.handleError(record)
            return
        for handler in logging.getLogger("distill").handlers:
            if record.levelno >= logging.ERROR or not isinstance(handler, ConsoleHandler):
                handler.handle(record)


class _RankLog(logging.FileHandler):
    """Handler of a rank's log file. After the first write error it logs one warning and removes itself."""

    failed = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.failed:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self.failed = True
        logger = logging.getLogger("distill")
        logger.removeHandler(self)
        logger.warning(
            "cannot write the log file %s (%s): later records are missing in this file",
            self.baseFilename,
            error.strerror,
        )


def console() -> ConsoleHandler | None:
    """Return the handler that writes to the console; None on ranks that print nothing."""
    return next((h for h in logging.getLogger("distill").handlers if isinstance(h, ConsoleHandler)), None)
