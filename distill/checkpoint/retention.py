"""Selection of the checkpoints that are removed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def to_drop(metrics: Mapping[Path, float | None], keep: int | None, higher_is_better: bool) -> list[Path]:
    """Return all checkpoints except the newest and the best ``keep``; None keeps all.

    ``metrics``: the value that ranks each checkpoint, oldest first; None ranks last. Of equal values the newer
    checkpoint wins. The newest is always kept: its validation may follow later.
    """
    if keep is None:
        return []
    paths = list(metrics)
    sign = 1.0 if higher_is_better else -1.0

    def rank(path: Path) -> tuple[bool, float, int]:
        value = metrics[path]
        return value is not None, sign * (value or 0.0), paths.index(path)

    best = sorted(paths, key=rank)[-keep:]
    return [path for path in paths[:-1] if path not in best]
