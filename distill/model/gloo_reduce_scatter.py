"""Gradients summed over ranks without NCCL: each rank gets every rank's part of its own shard and adds them up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class GlooReduceScatter:
    """``dist.reduce_scatter_tensor`` with a plain sum, in the form that FSDP2 takes for a reduction of one's own.

    gloo's own copies its input and passes partial sums from rank to rank; this exchanges the parts once, in half the
    time at two ranks. They are added in order of rank, so that the sum does not depend on who adds it.
    """

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for FSDP's buffers."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Sum the ranks' ``input_tensor`` [W * n] and leave this rank's part in ``output_tensor`` [n]."""
        assert op == dist.ReduceOp.SUM, op
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        first, *others = parts.view(group.size(), -1)
        output_tensor.copy_(first)
        for part in others:
            output_tensor.add_(part)
