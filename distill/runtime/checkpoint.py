"""Checkpoints: sharded, written beside and renamed when whole, found again by the newest step, kept by a metric."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from distill.config import CheckpointingConfig
from distill.runtime.world import World
from distill.types import UserError

log = logging.getLogger(__name__)

_INFO = "training_info.json"
_SHARDS = "shards"


def has_validation(info: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's info tells a validation of its weights."""
    return any(name.startswith("validation/") for name in info.get("metrics", {}))


class Checkpoints:
    """The ``step_N`` folders of ``checkpointing.checkpoint_dir``: shards by torch.distributed.checkpoint and an info.

    Tensors are stored by name and place, not by rank, so another number of ranks can load them. All ranks call
    ``save`` and ``load`` together.
    """

    def __init__(self, config: CheckpointingConfig, world: World) -> None:
        self._config = config
        self._world = world
        self._dir = Path(config.checkpoint_dir)
        self._said: set[str] = set()
        """What was warned of once."""

    def due(self, step: int, last: bool) -> bool:
        """Whether a checkpoint is written after ``step`` finished steps."""
        period = self._config.save_period
        return self._config.enabled and (last or (period > 0 and step % period == 0))

    def newest(self) -> Path | None:
        """The newest whole checkpoint, as the main rank sees it; None if there is none or checkpoints are off."""
        found = self._steps()[-1:] if self._config.enabled and self._world.main else []
        return self._world.broadcast(found[0] if found else None)

    def info(self, path: Path) -> dict[str, Any]:
        """What a checkpoint says of the run: finished steps, position in the data."""
        try:
            info: dict[str, Any] = json.loads((path / _INFO).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"the checkpoint {path} has no readable {_INFO} ({error}): remove the folder") from error
        return info

    def load(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Fill ``tensors`` in place from a checkpoint; collective. Raises UserError where they don't fit."""
        with self._world.agreed("comparing the checkpoint with the model"):
            stored = dcp.FileSystemReader(path / _SHARDS).read_metadata().state_dict_metadata
            for name, tensor in tensors.items():
                size = getattr(stored.get(name), "size", None)
                if size != tensor.shape:
                    raise UserError(
                        f"the checkpoint {path} does not fit the model ({name}: {size} against {tuple(tensor.shape)}):"
                        " set checkpointing.checkpoint_dir to another folder, or the model to the checkpoint's"
                    )
        dcp.load(tensors, checkpoint_id=path / _SHARDS, process_group=self._world.control)

    def save(
        self, step: int, tensors: dict[str, Tensor], info: dict[str, Any], export: Callable[[Path], None] | None = None
    ) -> Path:
        """Write ``step_N`` from all ranks: into a folder beside, renamed when whole; then drop what isn't kept.

        ``export`` writes more into the folder and is called on all ranks.
        """
        final, beside = self._dir / f"step_{step}", self._dir / f"tmp_step_{step}"
        with self._world.agreed("making the checkpoint's folder"):
            if self._world.main:
                self._make(beside)
        dcp.save(tensors, checkpoint_id=beside / _SHARDS, process_group=self._world.control)
        if export is not None:
            export(beside)
        with self._world.agreed("finishing the checkpoint"):
            if self._world.main:
                self._write_info(beside, info)
                shutil.rmtree(final, ignore_errors=True)
                beside.rename(final)
                self._drop_old()
        return final

    def _make(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"checkpointing.checkpoint_dir={self._config.checkpoint_dir} can't be written ({error.strerror}):"
                " choose a writable folder"
            ) from error

    def _steps(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        whole = [p for p in self._dir.glob("step_*") if p.name[5:].isdigit() and (p / _INFO).is_file()]
        return sorted(whole, key=lambda p: int(p.name[5:]))

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Write what was measured of the weights after ``step`` steps to their checkpoint, and drop what isn't kept.

        ``values``: as in the logs, ``train/loss`` and ``validation/accuracy`` for two; validation's are kept, and the
        metric that ranks. Without such a checkpoint nothing happens. Collective; the names are the same on every rank.
        """
        if not self._config.enabled:
            return
        kind = self._metric.partition("/")[0]
        there = sorted(name for name in values if self._metric and name.startswith(f"{kind}/"))
        if there and self._metric not in there and self._metric not in self._said:
            names = ", ".join(name.removeprefix(f"{kind}/") for name in there)
            log.warning("checkpointing.metric_name=%s was not measured, but %s", self._config.metric_name, names)
            self._said.add(self._metric)
        kept = {n: v for n, v in values.items() if n.startswith("validation/") or n == self._metric}
        if not kept:
            return
        with self._world.agreed("rating the checkpoint"):
            path = self._dir / f"step_{step}"
            if self._world.main and (path / _INFO).is_file():
                info = self.info(path)
                info["metrics"] = info.get("metrics", {}) | {n: v for n, v in kept.items() if math.isfinite(v)}
                self._write_info(path, info)
                self._drop_old()

    def _write_info(self, path: Path, info: Mapping[str, Any]) -> None:
        part = path / f"{_INFO}.part"
        part.write_text(json.dumps(info, indent=2) + "\n")
        part.replace(path / _INFO)

    @property
    def _metric(self) -> str:
        """The metric that ranks, as the logs name it; empty for none."""
        kind, _, name = (self._config.metric_name or "").partition(":")
        return f"{'validation' if kind == 'val' else kind}/{name}" if name else ""

    def _drop_old(self) -> None:
        """Keep the newest, and the best ``keep_top_k`` by the metric, the newer of equals; those without it come last.

        What is measured of a checkpoint comes after it was written, so the newest may still be without.
        """
        keep, steps = self._config.keep_top_k, self._steps()
        rated = {path: self.info(path).get("metrics", {}).get(self._metric) for path in steps}
        if self._metric and any(value is not None for value in rated.values()):
            for path in [p for p in steps[:-1] if rated[p] is None and p.name not in self._said]:
                log.warning("%s is not ranked: %s was not measured", path, self._config.metric_name)
                self._said.add(path.name)
        if keep is None:
            return
        sign = 1.0 if self._config.higher_is_better else -1.0

        def rank(path: Path) -> tuple[bool, float, int]:
            value = rated[path]
            return value is not None, sign * (value or 0.0), steps.index(path)

        best = sorted(steps, key=rank)[-keep:]
        for old in [path for path in steps[:-1] if path not in best]:
            shutil.rmtree(old)
            log.info("checkpoint %s dropped: checkpointing.keep_top_k=%d", old, keep)
