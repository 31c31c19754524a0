"""Which checkpoints are kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def to_drop(rated: Mapping[Path, float | None], keep: int | None, higher_is_better: bool) -> list[Path]:
    """All but the newest, and the best ``keep`` by their metric, the newer of equals; without one come last.

    ``rated``: the metric of each, oldest first. What is measured of a checkpoint comes after it was written, so the
    newest may still be without. ``keep`` None: nothing is dropped.
    """
    if keep is None:
        return []
    steps = list(rated)
    sign = 1.0 if higher_is_better else -1.0

    def rank(path: Path) -> tuple[bool, float, int]:
        value = rated[path]
        return value is not None, sign * (value or 0.0), steps.index(path)

    best = sorted(steps, key=rank)[-keep:]
    return [path for path in steps[:-1] if path not in best]
