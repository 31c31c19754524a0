"""Reduce-scatter of gradients on CPUs (gloo), for FSDP2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class GlooReduceScatter:
    """``dist.reduce_scatter_tensor`` with a sum, in the interface of FSDP2's custom reduce-scatter.

    gloo's own implementation copies its input and passes partial sums from rank to rank. One all-to-all takes half the
    time at two ranks. The parts are added in order of rank, so the sum does not depend on the rank that computes it.
    """

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate a buffer for FSDP."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Sum ``input_tensor`` [W * n] over W ranks; write this rank's part to ``output_tensor`` [n]."""
        assert op == dist.ReduceOp.SUM, op
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        first, *rest = parts.view(group.size(), -1)
        output_tensor.copy_(first)
        for part in rest:
            output_tensor.add_(part)
