"""Positions for heads and back: how ranks that share a pack attend over all of it (all-to-all over heads, Ulysses).

Everything but attention sees one position at a time, so each rank does that for its own. Inside attention every rank
has all positions of some of the heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.types import SequenceShards


class _AllToAll(torch.autograd.Function):
    """Part r of the first axis goes to rank r; the gradient goes the same way back."""

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
    """The R ranks of ``group``, M positions of a pack of T on each; every rank of the group calls it alike."""

    group: dist.ProcessGroup
    shards: SequenceShards

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From all heads at M positions, [1, H, M, Dh], to H / R heads at all positions, [1, H / R, T, Dh].

        One exchange for the three. Fewer key-value heads than ranks are copied for those that share them.
        """
        ranks = self.group.size()
        key, value = (self._for_every_rank(heads, ranks) for heads in (key, value))
        # [1, H, M, Dh] -> [R, M, H / R, Dh]
        parts = [heads[0].reshape(ranks, -1, *heads.shape[2:]).transpose(1, 2) for heads in (query, key, value)]
        received = _AllToAll.apply(torch.cat(parts, dim=2), self.group)  # type: ignore[no-untyped-call]
        ordered = received.flatten(0, 1).index_select(0, self.shards.slot_T)
        q, k, v = ordered.split([part.shape[2] for part in parts], dim=1)
        return q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]

    def positions(self, attended: Tensor) -> Tensor:
        """The way back: [1, T, H / R, Dh] to [1, M, H, Dh]."""
        ranks = self.group.size()
        parts = attended[0].index_select(0, self.shards.position_P).view(ranks, -1, *attended.shape[2:])
        received: Tensor = _AllToAll.apply(parts, self.group)  # type: ignore[no-untyped-call]
        return received.transpose(0, 1).flatten(1, 2)[None]

    def _for_every_rank(self, heads: Tensor, ranks: int) -> Tensor:
        count = heads.shape[1]
        return heads if count % ranks == 0 else heads.repeat_interleave(ranks // count, dim=1)
