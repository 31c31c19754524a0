"""Local shards, tensor-parallel dimensions and gathers of DTensor parameters."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.13


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, or ``tensor`` unchanged if it is not a DTensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    shard: Tensor = tensor.to_local()
    return shard


def tp_dim(parameter: Tensor) -> int | None:
    """Return the dimension along which tensor parallelism splits a DTensor, or None if it does not."""
    assert isinstance(parameter, DTensor), type(parameter)
    names = parameter.device_mesh.mesh_dim_names or ()
    placement = parameter.placements[names.index("tp")] if "tp" in names else None
    if placement is None or placement.is_replicate():
        return None
    dim: int = placement.dim  # type: ignore[attr-defined]
    return dim
