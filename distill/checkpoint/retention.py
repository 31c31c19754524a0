"""Select the checkpoints that checkpointing.keep_top_k does not keep."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

KEPT_FOR_ALARMS = 2
"""Number of checkpoints saved for alarms that are kept, in addition to checkpointing.keep_top_k."""


def to_drop(
    metrics: Mapping[Path, float | None], keep: int | None, higher_is_better: bool, for_alarms: Collection[Path] = ()
) -> list[Path]:
    """Return the checkpoints to remove: all except the newest one and the ``keep`` best ones.

    ``metrics`` maps each checkpoint to its value of the metric checkpointing.metric_name, oldest checkpoint first; a
    checkpoint with the value None counts as worse than all others. If values are equal, the newer checkpoint counts as
    better. The newest checkpoint is always kept, because its metric may be measured later. ``keep``: None keeps all
    checkpoints. ``for_alarms``: checkpoints that alarms saved. The newest ``KEPT_FOR_ALARMS`` of them are kept and do
    not count in ``keep``; older ones are treated like all others.
    """
    if keep is None:
        return []
    exempt = [path for path in metrics if path in for_alarms][-KEPT_FOR_ALARMS:]
    paths = [path for path in metrics if path not in exempt]
    sign = 1.0 if higher_is_better else -1.0

    def rank(path: Path) -> tuple[bool, float, int]:
        value = metrics[path]
        return value is not None, sign * (value or 0.0), paths.index(path)

    best = sorted(paths, key=rank)[-keep:]
    newest = list(metrics)[-1:]
    return [path for path in paths if path not in best and path not in newest]
