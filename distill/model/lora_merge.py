"""Merge low-rank adapters into this rank's shards of their weights, rounded to bfloat16 by a fixed dither.

The update of an adapter is often smaller than the distance of two bfloat16 numbers. Rounding to nearest would then
restore the base weight, and the generation engine would never receive the update. The dither rounds an element up with
a probability that equals the element's position between both neighbors, so that sums of many elements keep the update.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distill.model.checksum import bit_sums
from distill.model.dtensor import all_gather, local_shard

_CHUNK = 2**21
"""Number of elements that are merged at once."""
TEMPORARY_BYTES = 16 * _CHUNK
"""Memory of the float32 and int32 temporaries of a merge: about four tensors of a chunk."""
_FIRST_FACTOR, _SECOND_FACTOR = 0x7FEB352D, 0x846CA68B - 2**32
"""Factors of the integer hash function lowbias32, as int32 numbers."""


def dithered(values: Tensor, name: str, first_row: int = 0, first_column: int = 0) -> Tensor:
    """Return ``values``, finite float32 [rows, columns], rounded to bfloat16 by a fixed dither; not collective.

    ``values`` is the part of the tensor ``name`` that begins at ``first_row`` and ``first_column``. A 16-bit hash of
    the name, the row and the column is added to the bits of each value, and the lower 16 bits are dropped. The rounding
    is thus unbiased (the value is the mean over all hashes), depends on no layout and exact for bfloat16 numbers.
    """
    assert values.dtype == torch.float32 and values.ndim == 2, (values.dtype, values.shape)
    row_seed, column_seed = struct.unpack("<2i", hashlib.sha256(name.encode()).digest()[:8])
    rows, columns = values.shape
    row_bits = _hashed_numbers(row_seed, first_row, rows, values.device)
    column_bits = _hashed_numbers(column_seed, first_column, columns, values.device)
    offsets = _upper_bits(_mix(row_bits[:, None] ^ column_bits), 16)
    # A 32-bit float with half of its bits is a bfloat16 number; the sum carries into the exponent where it must.
    bits = offsets.add_(values.contiguous().view(torch.int32)).bitwise_right_shift_(16)
    return bits.to(torch.int16).view(torch.bfloat16)


def _hashed_numbers(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """Return a hash of each of the numbers ``first``, ``first`` + 1, ...: int32 [count]."""
    mixed = _mix(torch.arange(first, first + count, dtype=torch.int32, device=device).add_(seed))
    return mixed ^ _upper_bits(mixed, 16)


def _mix(bits: Tensor) -> Tensor:
    """Mix the int32 numbers ``bits`` in place; the upper bits of the result depend on all bits."""
    bits.mul_(_FIRST_FACTOR)
    bits.bitwise_xor_(_upper_bits(bits, 17))
    return bits.mul_(_SECOND_FACTOR)


def _upper_bits(bits: Tensor, count: int) -> Tensor:
    """Return the upper ``count`` bits of int32 numbers, as numbers of at least 0."""
    return (bits >> (32 - count)).bitwise_and_((1 << count) - 1)  # the mask removes copies of the sign


class Adapter(NamedTuple):
    """The adapter of a weight, or the columns of A and the rows of B that belong to a part of the weight."""

    lora_a: Tensor
    """float32 [R, columns]."""
    lora_b: Tensor
    """float32 [rows, R]."""
    scale: float
    """Factor of the product B @ A."""


@torch.no_grad()
def merge_into(
    sent: Tensor,
    name: str,
    base: Tensor,
    adapter: Adapter,
    first_row: int = 0,
    first_column: int = 0,
) -> Tensor:
    """Write base + scale * B @ A to ``sent``; return whether the result is finite (bool, a scalar); not collective.

    ``sent``, ``base``: [rows, columns], the part of the weight ``name`` that begins at ``first_row`` and
    ``first_column``; ``base`` may be in host memory. ``adapter``: the same columns of A and rows of B.
    bfloat16 is rounded by ``dithered``, float32 is not rounded. An element that the update does not change keeps its
    bits. The call does not wait for the device.
    """
    finite = torch.ones((), dtype=torch.bool, device=sent.device)
    step = max(1, _CHUNK // max(1, sent.shape[1]))
    for begin in range(0, len(sent), step):
        rows = slice(begin, begin + step)
        # -0.0 + 0.0 would be 0.0, so the negative update is subtracted. Its sums start at 0.0, so no zero is negative.
        merged = torch.zeros(sent[rows].shape, dtype=torch.float32, device=sent.device)
        merged.addmm_(adapter.lora_b[rows], adapter.lora_a, alpha=-adapter.scale)
        torch.sub(base[rows].detach().to(sent.device), merged, out=merged)
        finite &= merged.sum().isfinite()
        if sent.dtype == torch.bfloat16:
            merged = dithered(merged, name, first_row + begin, first_column)
        sent[rows] = merged
    return finite


class AdapterMerge:
    """Low-rank adapters, to be merged into this rank's shards of their weights.

    ``adapters``: (name of the weight, linear layer) pairs. A layer's ``lora_A`` [R, in] and ``lora_B`` [out, R] are
    DTensors with the FSDP and tensor-parallel layout of ``weight``; the merged weight is
    weight + ``lora_scale`` * B @ A. ``mesh``: the FSDP mesh, whose last axis divides a replica's rows.
    """

    def __init__(self, adapters: Iterable[tuple[str, nn.Module]], mesh: DeviceMesh) -> None:
        self._layers: dict[str, Any] = dict(adapters)
        self._group: dist.ProcessGroup = mesh.get_group(mesh.ndim - 1)
        self._device = mesh.device_type

    @torch.no_grad()
    def gather(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the matrices A of the weights ``names`` that have an adapter; collective over the FSDP shards.

        Every rank passes the same names. All rows are gathered, with the columns of this rank's tensor-parallel part:
        float32 [R, columns]. One all-gather sends all matrices.
        """
        chosen = [(name, self._layers[name].lora_A) for name in names if name in self._layers]
        if not chosen:
            return {}
        shards = [local_shard(matrix).detach() for _, matrix in chosen]
        ranks = self._group.size()
        # FSDP divides rows as torch.chunk does: only the last shards are shorter, so padding comes after all rows.
        sizes = [-(-len(matrix) // ranks) * shard.shape[1] for (_, matrix), shard in zip(chosen, shards, strict=True)]
        sent = torch.zeros(sum(sizes), dtype=torch.float32, device=self._device)
        for place, shard in zip(torch.split(sent, sizes), shards, strict=True):
            place[: shard.numel()] = shard.flatten()
        gathered = sent.new_empty(ranks * sent.numel())
        all_gather(gathered, sent, group=self._group)
        by_rank = torch.split(gathered.view(ranks, -1), sizes, dim=1)
        return {
            name: rows.reshape(-1, shard.shape[1])[: len(matrix)]
            for (name, matrix), rows, shard in zip(chosen, by_rank, shards, strict=True)
        }

    @torch.no_grad()
    def write(self, sent: Tensor, name: str, base: Tensor, matrix: Tensor, first_row: int, first_column: int) -> Tensor:
        """Write the merged shard of the weight ``name`` to ``sent``; return whether it is finite (bool, a scalar).

        ``sent``, ``base``: [rows, columns], the shard that begins at ``first_row`` and ``first_column``; ``base`` may
        be in host memory. ``matrix``: A, as ``gather`` returns it. float32 is not rounded. Not collective, and it does
        not wait for the device.
        """
        layer = self._layers[name]
        lora_b = local_shard(layer.lora_B).detach().to(sent.device)
        return merge_into(sent, name, base, Adapter(matrix, lora_b, layer.lora_scale), first_row, first_column)

    def sums(self, name: str, matrix: Tensor, first_row: int) -> Tensor:
        """Return two checksums of A and two of this rank's rows of B: int64 [4].

        They show copies of an adapter that differ, even if the merged shards are equal after rounding. ``matrix``: A,
        as ``gather`` returns it. ``first_row``: index of the first row of B in the complete matrix.
        """
        rows_of_b = local_shard(self._layers[name].lora_B).detach()
        return torch.cat([bit_sums(matrix), bit_sums(rows_of_b, first_row).to(matrix.device)])
