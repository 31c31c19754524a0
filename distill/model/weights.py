"""The student's weights on their way out: whole tensors from shards, each with the bit sums taken before it left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from distill.model.checksum import WORD_BYTES, BitSums, bit_sums, whole_bit_sums

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.13
_HEADER = 3
"""Words that a tensor adds to its bucket: two bit sums of the rank's shard, and whether all of it is finite."""


class _Gather(NamedTuple):
    """A bucket on its way."""

    bucket: list[tuple[str, DTensor]]
    starts: list[int]
    """Where each tensor's shard begins in a rank's part."""
    sent: Tensor
    """Kept until all have read it."""
    by_rank: Tensor
    work: dist.Work


class GatheredWeights:
    """Whole tensors of sharded parameters, in order, by one all-gather a bucket; never more than two buckets at a time.

    Every rank of the shard mesh must drain it once, in the same order. The cast to ``dtype`` comes before the gather,
    so that float32 shards travel as bfloat16. A yielded tensor is a view of its bucket: copy it or lose it. ``sums``
    has a tensor's bit sums as soon as it is yielded: added up from the shards, each taken where the shard lies.
    Raises RuntimeError, on all ranks alike, for a tensor that isn't finite, before it is yielded.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], dtype: torch.dtype, bucket_bytes: int) -> None:
        self.sums: dict[str, BitSums] = {}
        self._parameters = parameters
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        ahead: _Gather | None = None
        for bucket in self._buckets():
            # The next bucket travels while this one is taken in.
            now, ahead = ahead, self._start(bucket)
            if now is not None:
                yield from self._finish(now)
        if ahead is not None:
            yield from self._finish(ahead)

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
        mesh = bucket[0][1].device_mesh
        flat, starts = self._packed(bucket, mesh.size(), mesh.get_local_rank(), mesh.device_type)
        gathered = flat.new_empty(mesh.size() * flat.numel())
        work = _all_gather(gathered, flat, group=mesh.get_group(), async_op=True)
        return _Gather(bucket, starts, flat, gathered.view(mesh.size(), -1), work)

    @torch.no_grad()
    def _finish(self, gather: _Gather) -> Iterator[tuple[str, Tensor]]:
        gather.work.wait()
        by_rank, starts = gather.by_rank, gather.starts
        header = by_rank[:, : starts[0]].contiguous().view(torch.int64).view(len(by_rank), -1, _HEADER)
        self._read(header, [name for name, _ in gather.bucket])
        for (name, parameter), begin in zip(gather.bucket, starts, strict=True):
            end = begin + _rows_of_a_rank(parameter, len(by_rank)) * (parameter.numel() // parameter.shape[0])
            whole = by_rank[:, begin:end].reshape(-1)[: parameter.numel()]
            yield name, whole.view(parameter.shape)

    def _packed(
        self, bucket: Sequence[tuple[str, DTensor]], ranks: int, rank: int, device: str
    ) -> tuple[Tensor, list[int]]:
        """This rank's shards end to end behind their header, in one pass that also casts; where each begins."""
        rows = [_rows_of_a_rank(parameter, ranks) for _, parameter in bucket]
        # The header comes first, and everything begins at a whole word, where bits are summed.
        word = WORD_BYTES // self._dtype.itemsize
        starts = [len(bucket) * _HEADER * word]
        for n, (_, parameter) in zip(rows, bucket, strict=True):
            starts.append(starts[-1] + -(-n * (parameter.numel() // parameter.shape[0]) // word) * word)
        ends = starts[1:]
        flat = torch.empty(starts.pop(), dtype=self._dtype, device=device)
        header = flat[: starts[0]].view(torch.int64).view(-1, _HEADER)
        for i, (_, parameter) in enumerate(bucket):
            local = parameter.to_local()
            flat[starts[i] + local.numel() : ends[i]] = 0
            shard = flat[starts[i] : starts[i] + local.numel()].view(local.shape).copy_(local)
            header[i, :2] = bit_sums(shard, rank * rows[i])
            header[i, 2] = local.sum(dtype=torch.float32).isfinite()
        return flat, starts

    def _read(self, header: Tensor, names: Sequence[str]) -> None:
        sums, finite = header.sum(0).tolist(), (header[..., 2] == 1).all(0).tolist()
        broken = [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
        if broken:
            raise RuntimeError(f"{len(broken)} of the student's weights hold nan or infinity, {broken[0]} first")
        self.sums.update(
            {name: BitSums(plain, weighted) for name, (plain, weighted, _) in zip(names, sums, strict=True)}
        )


def _rows_of_a_rank(parameter: Tensor, ranks: int) -> int:
    """torch.chunk's layout: every rank has room for ceil(rows / ranks) rows, and the last ones hold fewer or none."""
    return -(-parameter.shape[0] // ranks)


class WholeWeights:
    """Whole tensors of one process as a sync wants them, with their bit sums: for tests and measurements."""

    def __init__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._weights = list(weights)
        self.sums = whole_bit_sums(self._weights)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._weights)
