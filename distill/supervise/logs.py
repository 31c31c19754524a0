"""Logging: console output of the main rank, and one log file per rank."""

from __future__ import annotations

import logging
import sys
from logging.handlers import MemoryHandler
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


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
    handler = logging.StreamHandler(sys.stderr) if is_main else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
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
