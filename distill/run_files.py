"""Names of the files in a run directory, and the process that writes to it; imports no torch.

The report reads these files on machines without torch.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

RECIPE_FILE = "config.yaml"
"""The run's complete recipe, with all overrides."""
PARENT_FILE = "config_parent.yaml"
"""Name and complete values of the recipe's parent, for comparison with the run's recipe."""
VERSIONS_FILE = "versions.json"
EARLIER_STARTS = "earlier_starts"
"""Key of versions.json: a list of the values of earlier starts of the run."""
METRICS_FILE = "metrics.jsonl"
REPLACED_FILE = "metrics.replaced.jsonl"
"""File with the rows of steps that a resumed run repeats, so that no row is lost."""
ALARMS_FILE = "alarms.jsonl"
"""File with one line for each start and each end of an alarm; missing if the run had no alarm."""
VALIDATION_FOLDER = "validation"
"""Folder with one JSON Lines file of responses per validation."""
IN_CONTEXT = "in_context"
"""Stem of the file in VALIDATION_FOLDER with the responses that were generated with the teacher's context."""
IN_CONTEXT_AT_END = "in_context_at_end"
"""Like IN_CONTEXT, for the responses of the validation after the last step."""
PROBE_FOLDER = "probe"
"""Folder with the results of each probe of a run: step_N.json and step_N.txt."""
TRAIN_SAMPLES_FOLDER = "train_samples"
"""Folder with one JSON Lines file per sampled step of training."""
REPORT_FILE = "report.html"
LOCK_FILE = ".owner"


def owner_of(folder: Path) -> str | None:
    """Return the content of the lock file of ``folder`` if another process holds the lock, else None; take no lock.

    The process that holds the lock must not call it: closing any handle of the file releases the lock.
    """
    try:
        import fcntl  # not on Windows, where a copied folder can still be read
    except ImportError:
        return None
    try:
        with (folder / LOCK_FILE).open("rb") as file:
            query = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock of 64-bit Linux
            kind = struct.unpack("hhqqi", fcntl.fcntl(file, fcntl.F_GETLK, query))[0]
            return None if kind == fcntl.F_UNLCK else file.read().decode(errors="replace").strip() or "a process"
    except OSError:  # no lock file, or a file system without locks
        return None
