"""Reduce-scatter of FSDP2's gradients on CPUs, with the gloo backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class GlooReduceScatter:
    """Reduce-scatter (sum) to pass to FSDP2's ``set_custom_reduce_scatter``.

    An all-to-all sends each rank its part of every rank's input, and each rank adds the parts that it receives. On two
    ranks this takes half the time of gloo's own reduce-scatter. All ranks add in the same order, so the result does not
    depend on the rank that computes it.
    """

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate an uninitialised buffer; FSDP calls it for the input and output of the reduce-scatter."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Sum ``input_tensor`` [W * n] over W ranks; write this rank's n elements to ``output_tensor`` [n].

        Collective over ``group``.
        """
        assert op == dist.ReduceOp.SUM, op
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        first, *rest = parts.view(group.size(), -1)
        output_tensor.copy_(first)
        for part in rest:
            output_tensor.add_(part)
