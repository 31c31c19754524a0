"""Gather complete weights from the shards of all ranks; the sending ranks compute checksums."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from distill.errors import RunFailed
from distill.model.checksum import WORD_BYTES, BitSums, bit_sums
from distill.model.dtensor import all_gather, local_shard, tp_dim
from distill.model.hf_load import chunk_of
from distill.model.lora_merge import AdapterMerge
from distill.supervise.progress import heartbeat

_HEADER = 7
"""Number of int64 header values per tensor.

They are two checksums of the shard, whether it is finite (1 or 0), and two checksums of each of the adapter's matrices
A and B from which the shard was merged (0 without an adapter).
"""


class _ShardLayout(NamedTuple):
    """Division of a tensor over S x TP ranks: TP tensor-parallel parts, each divided into S FSDP shards.

    ``shards`` is S and ``tp`` is TP. Tensor parallelism splits the tensor along ``tp_dim`` (None: not at all). FSDP
    then splits the rows of each part.
    """

    shape: torch.Size
    tp_dim: int | None
    shards: int
    tp: int

    @classmethod
    def of(cls, parameter: DTensor, shards: int, tp: int) -> _ShardLayout:
        return cls(parameter.shape, tp_dim(parameter), shards, tp)

    def part_shape(self, tp_rank: int) -> torch.Size:
        """Return the shape of a rank's tensor-parallel part of the tensor, before FSDP splits the part."""
        shape = list(self.shape)
        if self.tp_dim is not None:
            shape[self.tp_dim] = chunk_of(shape[self.tp_dim], self.tp, tp_rank)[1]
        return torch.Size(shape)

    def rows(self, shard: int, tp_rank: int) -> tuple[int, int]:
        """Return the index of a shard's first row in the complete tensor, and the number of rows in the shard."""
        begin, length = chunk_of(self.part_shape(tp_rank)[0], self.shards, shard)
        before = chunk_of(self.shape[0], self.tp, tp_rank)[0] if self.tp_dim == 0 else 0
        return before + begin, length

    def capacity(self) -> int:
        """Return the number of elements of the largest shard of the tensor.

        In the send buffer of an all-gather, every rank reserves this size for its shard.
        """
        return self.rows(0, 0)[1] * self.part_shape(0)[1:].numel()

    def first_column(self, tp_rank: int) -> int:
        """Return the index of the first column of a rank's tensor-parallel part in the complete tensor."""
        return chunk_of(self.shape[1], self.tp, tp_rank)[0] if self.tp_dim == 1 else 0

    def assemble(self, by_rank: Tensor) -> Tensor:
        """Assemble the complete tensor from the flattened shards of all ranks.

        ``by_rank`` has one row per rank; the row of FSDP shard s on tensor-parallel rank t is s * TP + t.
        """
        parts = []
        for tp_rank in range(1 if self.tp_dim is None else self.tp):
            shape = self.part_shape(tp_rank)
            shards = by_rank[tp_rank :: self.tp]
            if shape.numel() == shards.numel():
                parts.append(shards.reshape(shape))
                continue
            sizes = [self.rows(shard, tp_rank)[1] * shape[1:].numel() for shard in range(self.shards)]
            parts.append(torch.cat([own[:size] for own, size in zip(shards, sizes, strict=True)]).view(shape))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.tp_dim or 0)


class _Gather(NamedTuple):
    """An all-gather in progress, for one bucket of tensors."""

    names: list[str]
    layouts: list[_ShardLayout]
    starts: list[int]
    """Offset of each tensor's shard in one rank's part of the bucket, in elements."""
    sent: Tensor
    """Input buffer of the all-gather; the reference keeps it alive until the gather is complete."""
    by_rank: Tensor
    """Output buffer of the all-gather, with one row per rank."""
    work: dist.Work


class GatheredWeights:
    """Iterable of (name, complete tensor), gathered from sharded parameters in buckets; collective.

    Every rank of ``mesh`` must iterate once, to the end, with the same parameters in the same order. The mesh has one
    axis over all ranks of a replica. Each group of ``tp`` consecutive ranks is a tensor-parallel group. Shards are cast
    to ``dtype`` before the all-gather.

    A bucket holds consecutive tensors of at most ``bucket_bytes`` in total, or one larger tensor. At most two buckets
    are in memory. A yielded tensor may be a view of its bucket: if you keep the tensor, copy it, otherwise the bucket
    stays in memory. Each rank computes the checksums (``BitSums``) of its shards before it sends them; the checksums of
    a tensor are the sums over its shards. If a tensor is not finite, all ranks raise RuntimeError before the tensor is
    yielded.

    Tensor-parallel ranks hold copies of the weights that are not split (norms, for example), and replicas hold copies
    of all weights. The checksums of all copies are compared at the end of the iteration; this detects bit flips and
    copies that are trained differently. If they differ, all ranks raise RunFailed. ``replicas``: process group of the
    ranks that hold the same shards in all replicas; None: only one replica, or do not compare the replicas. ``merge``:
    low-rank adapters, which are merged into the shards of their weights before the shards are sent; None: no adapters.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        dtype: torch.dtype,
        bucket_bytes: int,
        mesh: DeviceMesh,
        tp: int = 1,
        replicas: dist.ProcessGroup | None = None,
        merge: AdapterMerge | None = None,
    ) -> None:
        self._parameters = parameters
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._mesh = mesh
        self._tp = tp
        self._replicas = replicas
        self._merge = merge

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor, _ in self.with_sums():
            yield name, tensor

    def with_sums(self) -> Iterator[tuple[str, Tensor, BitSums]]:
        """Yield (name, complete tensor, checksums); the sending ranks compute the checksums."""
        ahead: _Gather | None = None
        copies = _Copies(self._mesh.mesh.flatten().tolist(), self._tp)
        for bucket in self._buckets():
            # Start to gather the next bucket before the caller uses the current bucket. The bucket before it is freed.
            started = self._start(bucket)
            if ahead is not None:
                yield from self._finish(ahead, copies)
            ahead = started
        if ahead is not None:
            yield from self._finish(ahead, copies)
        copies.verify(self._replicas, self._mesh.device_type)

    def _buckets(self) -> Iterator[list[tuple[str, DTensor]]]:
        bucket: list[tuple[str, DTensor]] = []
        size = 0
        for name, parameter in self._parameters:
            assert isinstance(parameter, DTensor), name
            bytes_ = parameter.numel() * self._dtype.itemsize
            if bucket and size + bytes_ > self._bucket_bytes:
                yield bucket
                bucket, size = [], 0
            bucket.append((name, parameter))
            size += bytes_
        if bucket:
            yield bucket

    @torch.no_grad()
    def _start(self, bucket: list[tuple[str, DTensor]]) -> _Gather:
        ranks = self._mesh.size()
        layouts = [_ShardLayout.of(parameter, ranks // self._tp, self._tp) for _, parameter in bucket]
        flat, starts = self._pack(bucket, layouts)
        gathered = flat.new_empty(ranks * flat.numel())
        work = all_gather(gathered, flat, group=self._mesh.get_group(), async_op=True)
        return _Gather([name for name, _ in bucket], layouts, starts, flat, gathered.view(ranks, -1), work)

    @torch.no_grad()
    def _finish(self, gather: _Gather, copies: _Copies) -> Iterator[tuple[str, Tensor, BitSums]]:
        gather.work.wait()
        heartbeat()
        by_rank, starts = gather.by_rank, gather.starts
        header = by_rank[:, : starts[0]].contiguous().view(torch.int64).view(len(by_rank), -1, _HEADER).cpu()
        _check_finite(header, gather.names)
        sums = copies.total_sums(header, gather.names, gather.layouts)
        for name, layout, begin, sent in zip(gather.names, gather.layouts, starts, sums, strict=True):
            yield name, layout.assemble(by_rank[:, begin : begin + layout.capacity()]), sent

    def _pack(self, bucket: Sequence[tuple[str, DTensor]], layouts: Sequence[_ShardLayout]) -> tuple[Tensor, list[int]]:
        """Return a buffer with this rank's shards, and the offset of each shard in the buffer, in elements.

        The buffer has the dtype ``self._dtype`` and begins with a header that contains the checksums of the shards.
        Collective if tensors of the bucket have adapters.
        """
        # The header comes first. Every shard begins at a word boundary, because checksums are sums of words.
        word = WORD_BYTES // self._dtype.itemsize
        starts = [len(bucket) * _HEADER * word]
        for layout in layouts:
            starts.append(starts[-1] + -(-layout.capacity() // word) * word)
        ends = starts[1:]
        flat = torch.empty(starts.pop(), dtype=self._dtype, device=self._mesh.device_type)
        header = flat[: starts[0]].zero_().view(torch.int64).view(-1, _HEADER)
        adapters = {} if self._merge is None else self._merge.gather(name for name, _ in bucket)
        for i, ((name, parameter), layout) in enumerate(zip(bucket, layouts, strict=True)):
            local = local_shard(parameter)
            assert layout.tp_dim in (None, 0) or local.shape[1] % word == 0, (
                f"{layout}: a shard would end inside a 64-bit word"
            )
            flat[starts[i] + local.numel() : ends[i]] = 0
            sent = flat[starts[i] : starts[i] + local.numel()].view(local.shape)
            self._write(sent, name, local, layout, adapters.get(name), header[i])
        return flat, starts

    def _write(
        self, sent: Tensor, name: str, local: Tensor, layout: _ShardLayout, matrix: Tensor | None, header: Tensor
    ) -> None:
        """Write a shard to ``sent`` and its header values to ``header``; ``matrix``: A of its adapter, or None."""
        shard, tp_rank = divmod(self._mesh.get_local_rank(), self._tp)
        first_row = layout.rows(shard, tp_rank)[0]
        if matrix is None or self._merge is None:
            sent.copy_(local)
            header[2] = local.sum(dtype=torch.float32).isfinite()
        else:
            header[2] = self._merge.write(sent, name, local, matrix, first_row, layout.first_column(tp_rank))
            header[3:] = self._merge.sums(name, matrix, first_row)
        header[:2] = bit_sums(sent, first_row)


def _other_tp_copies(sums: Tensor) -> Tensor:
    """Return where ``sums`` [shards, tp, tensors, 2] differ from those of the first tensor-parallel rank."""
    return (sums != sums[:, :1]).any(-1)


def _check_finite(header: Tensor, names: Sequence[str]) -> None:
    """Raise RuntimeError if a tensor of a bucket is not finite.

    ``header`` [ranks, tensors, _HEADER]: the header values of each shard.
    """
    finite = (header[..., 2] == 1).all(0).tolist()
    broken = [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
    if broken:
        raise RuntimeError(f"{len(broken)} weights of the student contain nan or infinity; the first is {broken[0]}")


class _Copies:
    """Comparison of the copies of each weight, and of its adapter, on the ranks of a replica and between replicas.

    ``ranks``: the ranks of one replica, in the order of the gathered shards; ``tp`` consecutive ranks are a
    tensor-parallel group. All ranks of a replica have the same checksums, so all find the same differences.
    """

    def __init__(self, ranks: Sequence[int], tp: int) -> None:
        self._ranks = torch.tensor(ranks).view(-1, tp)
        self._names: list[str] = []
        self._sums: list[Tensor] = []
        """For each bucket, int64 [tensors, 7]: six checksums, and the first rank with a different copy, or -1.

        The checksums are those of the tensor, and the sums over the replica's ranks of those of A and B.
        """

    def total_sums(self, header: Tensor, names: Sequence[str], layouts: Sequence[_ShardLayout]) -> list[BitSums]:
        """Return the checksums of each tensor of a bucket, and store them with the tensor-parallel comparison.

        ``header`` [ranks, tensors, _HEADER]: the header values of each rank's shard. Of a tensor that tensor
        parallelism does not split, only the copy of the first tensor-parallel rank counts.
        """
        header = header.view(*self._ranks.shape, -1, _HEADER)
        by_shard, of_a, of_b = header[..., :2], header[..., 3:5], header[..., 5:]
        split_rows, split_columns = (torch.tensor([layout.tp_dim == dim for layout in layouts]) for dim in (0, 1))
        copied = ~(split_rows | split_columns)
        total = torch.where(copied[:, None], by_shard[:, 0].sum(0), by_shard.sum((0, 1)))
        # A was gathered, so all shards have copies. Tensor parallelism splits A by columns and B by rows of the weight.
        differs = _other_tp_copies(by_shard) & copied | (of_a != of_a[:1]).any(-1)
        differs |= _other_tp_copies(of_a) & ~split_columns | _other_tp_copies(of_b) & ~split_rows
        differs = differs.flatten(0, 1)  # [ranks, tensors]
        first = self._ranks.flatten()[differs.int().argmax(0)].where(differs.any(0), torch.tensor(-1))
        self._names += names
        self._sums.append(torch.cat([total, header[..., 3:].sum((0, 1)), first[:, None]], dim=1))
        return [BitSums(*pair) for pair in total.tolist()]

    def verify(self, replicas: dist.ProcessGroup | None, device: str) -> None:
        """Raise RunFailed on all ranks if copies of a weight differ; collective over ``replicas``."""
        own = torch.cat(self._sums) if self._sums else torch.empty((0, _HEADER), dtype=torch.int64)
        by_replica = [own]
        if replicas is not None:
            by_replica = [torch.empty_like(own, device=device) for _ in range(replicas.size())]
            dist.all_gather(by_replica, own.to(device), group=replicas)
        found = torch.stack(by_replica).cpu()
        split, replicated = (found[..., -1] >= 0).any(0), (found[..., :-1] != found[:1, :, :-1]).any(-1).any(0)
        names = [name for name, differs in zip(self._names, (split | replicated).tolist(), strict=True) if differs]
        if not names:
            return
        i = self._names.index(names[0])
        if split[i]:
            where = f"the copy of rank {int(found[:, i, -1].max())} differs from that of a lower rank"
        else:
            replica = int((found[:, i, :-1] != found[0, i, :-1]).any(-1).int().argmax())
            where = f"replica {replica} (of {len(found)}, counted from 0) differs from replica 0"
        raise RunFailed(
            f"{len(names)} weights of the student are not the same in all copies; the first is {names[0]}: {where}",
            retryable=True,
        )
