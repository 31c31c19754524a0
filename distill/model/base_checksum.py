"""Checksums of the frozen weights of a model, equal for any number of ranks and any parallel layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from distill.distributed.world import World
from distill.model.checksum import WORD_BYTES, BitSums, bit_sums
from distill.model.dtensor import local_shard, tp_dim
from distill.model.hf_files import ModelFiles
from distill.model.hf_load import local_slices
from distill.model.model_card import hub_revision, loadable_name
from distill.model.sharded import ShardedLM


def digest(sums: Mapping[str, BitSums]) -> str:
    """Return a SHA-256 of the names and bit sums of a model's weights, independent of their order."""
    return hashlib.sha256(json.dumps(sorted((name, *pair) for name, pair in sums.items())).encode()).hexdigest()


def compared_dtypes(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtypes of the checksums of weights of ``dtype``, by name: ``dtype`` itself and bfloat16.

    A run may resume in another precision. The weights rounded to bfloat16 are then still comparable.
    """
    return {f"{each}".removeprefix("torch."): each for each in (dtype, torch.bfloat16)}


@torch.no_grad()
def frozen_base(model: ShardedLM, files: ModelFiles, world: World) -> dict[str, Any]:
    """Return name, revision, dtype and checksums of a model's frozen weights as JSON values; collective over all ranks.

    ``files``: those of policy.model_name. ``revision`` is the commit of files in the hub's cache, otherwise None. The
    key ``checksum`` maps each of ``compared_dtypes`` to a checksum. Each element is counted on one rank only, and
    integer sums do not depend on their order, so all layouts have equal checksums.
    """
    parameters = model.named_hf_parameters()
    dtypes = compared_dtypes(parameters[0][1].dtype)
    counts_copies = world.layout.tp_rank == 0
    sums = [_own_sums(parameter, each, counts_copies) for _, parameter in parameters for each in dtypes.values()]
    total = torch.stack(sums).to(world.device)
    dist.all_reduce(total)
    by_dtype = total.cpu().view(len(parameters), len(dtypes), 2).unbind(1)
    names = [name for name, _ in parameters]
    checksum = {
        kind: digest({name: BitSums(*pair) for name, pair in zip(names, pairs.tolist(), strict=True)})
        for kind, pairs in zip(dtypes, by_dtype, strict=True)
    }
    return {
        "model_name": loadable_name(files.name),
        "revision": hub_revision(files.folder),
        "dtype": next(iter(dtypes)),
        "checksum": checksum,
    }


def _own_sums(parameter: Tensor, dtype: torch.dtype, counts_copies: bool) -> Tensor:
    """Return the bit sums, int64 [2], of this rank's shard cast to ``dtype``; 0 if another rank counts the same shard.

    Of the copies in replicas and tensor-parallel ranks, only the first one counts. ``counts_copies``: whether this rank
    is the first one of its tensor-parallel group.
    """
    assert isinstance(parameter, DTensor), type(parameter)
    local, mesh = local_shard(parameter), parameter.device_mesh
    is_replica = any(
        placement.is_replicate() and mesh.get_local_rank(axis) > 0
        for axis, placement in enumerate(parameter.placements)
    )
    is_tp_copy = tp_dim(parameter) is None and not counts_copies
    if is_replica or is_tp_copy or not local.numel():
        return torch.zeros(2, dtype=torch.int64, device=local.device)
    slices = local_slices(parameter)
    if len(slices) > 1:
        word = WORD_BYTES // dtype.itemsize
        assert slices[1].start % word == 0, f"{parameter.shape}: the shard at {slices} begins inside a 64-bit word"
    return bit_sums(local.to(dtype), slices[0].start)
