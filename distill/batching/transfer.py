"""Copy the micro-batches of a training step to the device, all in one transfer.

The tensors of a step are small and many. A blocking copy of each would make the host wait for the device several times
in every micro-batch. The plain equivalent of ``to_device`` is ``MicroBatch.to``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distill.types import MicroBatch, OptimizerBatch, View, map_tensors

_ALIGNMENT = 256
"""Alignment of each tensor in bytes, as for tensors that PyTorch allocates on a GPU one by one."""


def to_device(batches: Sequence[OptimizerBatch], device: torch.device) -> list[OptimizerBatch]:
    """Return the batches with all tensors of their micro-batches on ``device``; on a CPU, the batches themselves.

    All tensors are copied to one pinned buffer and from there in one asynchronous transfer on the current stream. They
    remain views of one buffer on the device, which is freed with the last of them. ``MicroBatch.kept_M``,
    ``MicroBatch.off_policy_M`` and ``View.bounds_B`` are added, so that a micro-batch needs no further transfer.
    """
    return list(batches) if device.type == "cpu" else copy_batches(batches, device)


def copy_batches(batches: Sequence[OptimizerBatch], device: torch.device) -> list[OptimizerBatch]:
    """Return copies of the batches on ``device``, which share one buffer; see ``to_device``."""
    complete = [tuple(_with_derived_tensors(micro_batch) for micro_batch in batch) for batch in batches]
    tensors: dict[int, Tensor] = {}  # by id: the two views of a micro-batch may be the same

    def collect(tensor: Tensor) -> Tensor:
        return tensors.setdefault(id(tensor), tensor)

    for micro_batches in complete:
        for micro_batch in micro_batches:
            map_tensors(micro_batch, collect)
    copies = dict(zip(tensors, copy_together(list(tensors.values()), device), strict=True))
    return [
        replace(batch, micro_batches=tuple(map_tensors(each, lambda tensor: copies[id(tensor)]) for each in moved))
        for batch, moved in zip(batches, complete, strict=True)
    ]


def _with_derived_tensors(micro_batch: MicroBatch) -> MicroBatch:
    off_policy_N, is_kept_N = micro_batch.off_policy_N, micro_batch.weight_N != 0
    return replace(
        micro_batch,
        student=_with_bounds(micro_batch.student),
        teacher=_with_bounds(micro_batch.teacher),
        kept_M=is_kept_N.nonzero().squeeze(1),
        off_policy_M=None if off_policy_N is None else (off_policy_N & is_kept_N).nonzero().squeeze(1),
    )


def _with_bounds(view: View) -> View:
    return replace(view, bounds_B=torch.tensor(view.bounds, dtype=torch.int32))


def copy_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return copies of CPU tensors on ``device``, as contiguous views of one buffer that one transfer fills."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    host = torch.empty(sum(padded), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for part, tensor in zip(_views(host, padded, tensors), tensors, strict=True):
        part.copy_(tensor)
    return _views(host.to(device, non_blocking=True, copy=True), padded, tensors)


def _views(buffer: Tensor, padded: Sequence[int], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a view of ``buffer`` for each tensor, with its dtype and shape; ``padded``: bytes between the views."""
    return [
        part[: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(torch.split(buffer, list(padded)), tensors, strict=True)
    ]
