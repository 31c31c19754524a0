"""A teacher's own float32 weights that follow the student's: a moving average, or a copy of an earlier step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from distill.config import ContextDistillationConfig
from distill.model.dtensor import local_shard


def student_share(context: ContextDistillationConfig, step: int) -> float:
    """Return the share w of the student in the update of the stored weights after ``step`` finished training steps.

    The update is stored = (1 - w) * stored + w * student; 0: the stored weights do not change. The average of
    ``self_ema`` is float32, because in bfloat16 most of the small updates would round to zero.
    """
    if context.mode == "self_ema":
        return 1 - context.ema_decay
    return float(context.mode == "self_periodic" and step % context.refresh_period == 0)


class StoredWeights:
    """Weights of a teacher that checkpoints contain, with the same names and shards as weights of the student.

    They begin as copies of ``named``, pairs of a name and a weight of the student. An update needs no communication.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], context: ContextDistillationConfig) -> None:
        self.named: Mapping[str, Tensor] = {name: weight.detach().clone() for name, weight in named}
        """Maps a name to the stored weight, with this rank's float32 shard."""
        self._context = context

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to save in a checkpoint; a key is "teacher." and the name of the weight."""
        return {f"teacher.{name}": stored for name, stored in self.named.items()}

    @torch.no_grad()
    def update(self, named: Iterable[tuple[str, Tensor]], step: int) -> bool:
        """Move the stored weights towards the student's weights ``named``; return whether they changed.

        ``step``: number of finished training steps. Not collective. A share of 1 copies the weights exactly.
        """
        share = student_share(self._context, step)
        if not share:
            return False
        for name, weight in named:
            local_shard(self.named[name]).lerp_(local_shard(weight), share)
        return True
