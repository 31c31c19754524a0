"""Select the checkpoints that checkpointing.keep_top_k does not keep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def to_drop(metrics: Mapping[Path, float | None], keep: int | None, higher_is_better: bool) -> list[Path]:
    """Return the checkpoints to remove: all except the newest one and the ``keep`` best ones.

    ``metrics`` maps each checkpoint to its value of the metric checkpointing.metric_name, oldest checkpoint first; a
    checkpoint with the value None counts as worse than all others. If values are equal, the newer checkpoint counts as
    better. The newest checkpoint is always kept, because its metric may be measured later. ``keep``: None keeps all
    checkpoints.
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
