"""Checkpoints: sharded, written beside and renamed when whole, found again by the newest step."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
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


class Checkpoints:
    """The ``step_N`` folders of ``checkpointing.checkpoint_dir``: shards by torch.distributed.checkpoint and an info.

    Tensors are stored by name and place, not by rank, so another number of ranks can load them. All ranks call
    ``save`` and ``load`` together.
    """

    def __init__(self, config: CheckpointingConfig, world: World) -> None:
        self._config = config
        self._world = world
        self._dir = Path(config.checkpoint_dir)

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
                (beside / _INFO).write_text(json.dumps(info, indent=2) + "\n")
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

    def _drop_old(self) -> None:
        keep = self._config.keep_top_k
        if keep is None:
            return
        for old in self._steps()[: -max(keep, 1)]:
            shutil.rmtree(old)
            log.info("checkpoint %s dropped: checkpointing.keep_top_k=%d", old, keep)
