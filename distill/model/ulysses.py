"""Split of packed sequences over ranks, with all-to-all over attention heads (Ulysses).

The ranks of a process group share the positions of a packed micro-batch. Outside attention, each rank computes its own
positions with all heads. Inside attention, each rank computes all positions with its own heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.types import SequenceShards


class _AllToAll(torch.autograd.Function):
    """All-to-all over the first axis: send part r to rank r. The backward sends the gradients back."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        parts = gradients[0].contiguous()
        sent_back = torch.empty_like(parts)
        dist.all_to_all_single(sent_back, parts, group=ctx.group)
        return sent_back, None


@dataclass(frozen=True)
class UlyssesAllToAll:
    """All-to-all between R ranks that each have M of the T positions of a packed micro-batch.

    All public methods are collective over ``group``. H is the number of heads, Dh the number of channels per head.
    """

    group: dist.ProcessGroup
    """Process group of the R ranks that compute the micro-batch together."""
    shards: SequenceShards
    """Assignment of the micro-batch's positions to the ranks of the group."""

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exchange all heads of this rank's positions for this rank's heads of all positions.

        Input shape [1, H, M, Dh], output shape [1, H / R, T, Dh]. One all-to-all sends the three tensors. If there are
        fewer key-value heads than ranks, each key-value head is repeated so that every rank gets one head.
        """
        ranks = self.group.size()
        key, value = (self._repeat(heads, ranks) for heads in (key, value))
        # [1, H, M, Dh] -> [R, M, H / R, Dh]
        parts = [heads[0].reshape(ranks, -1, *heads.shape[2:]).transpose(1, 2) for heads in (query, key, value)]
        received = _AllToAll.apply(torch.cat(parts, dim=2), self.group)  # type: ignore[no-untyped-call]
        ordered = received.flatten(0, 1).index_select(0, self.shards.slot_T)
        q, k, v = ordered.split([part.shape[2] for part in parts], dim=1)
        return q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]

    def positions(self, attended: Tensor) -> Tensor:
        """Exchange this rank's heads of all positions for all heads of this rank's positions.

        Input shape [1, T, H / R, Dh], output shape [1, M, H, Dh].
        """
        ranks = self.group.size()
        parts = attended[0].index_select(0, self.shards.position_P).view(ranks, -1, *attended.shape[2:])
        received: Tensor = _AllToAll.apply(parts, self.group)  # type: ignore[no-untyped-call]
        return received.transpose(0, 1).flatten(1, 2)[None]

    def _repeat(self, heads: Tensor, ranks: int) -> Tensor:
        count = heads.shape[1]
        return heads if count % ranks == 0 else heads.repeat_interleave(ranks // count, dim=1)
