"""The student's weights on their way out: whole tensors from shards, each with the bit sums taken before it left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from distill.model.checksum import WORD_BYTES, BitSums, bit_sums, whole_bit_sums
from distill.model.hf_load import chunk_of
from distill.supervise.progress import heartbeat

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.13
_HEADER = 3
"""Words that a tensor adds to its bucket: two bit sums of the rank's shard, and whether all of it is finite."""


def tp_dim(parameter: Tensor) -> int | None:
    """The dimension that tensor parallelism splits; None: the parameter is whole on every rank of its group."""
    assert isinstance(parameter, DTensor)
    names = parameter.device_mesh.mesh_dim_names or ()
    placement = parameter.placements[names.index("tp")] if "tp" in names else None
    if placement is None or placement.is_replicate():
        return None
    dim: int = placement.dim  # type: ignore[attr-defined]
    return dim


class _Place(NamedTuple):
    """Where a tensor's parts lie on S x TP ranks: split by tensor parallelism first, each part by FSDP's rows."""

    shape: torch.Size
    tp_dim: int | None
    shards: int
    tp: int

    @classmethod
    def of(cls, parameter: DTensor, shards: int, tp: int) -> _Place:
        return cls(parameter.shape, tp_dim(parameter), shards, tp)

    def part(self, tp_rank: int) -> torch.Size:
        """The shape of a tensor-parallel part."""
        shape = list(self.shape)
        if self.tp_dim is not None:
            shape[self.tp_dim] = chunk_of(shape[self.tp_dim], self.tp, tp_rank)[1]
        return torch.Size(shape)

    def rows(self, shard: int, tp_rank: int) -> tuple[int, int]:
        """The first row of a rank's shard, as the whole tensor counts them, and how many it has."""
        begin, length = chunk_of(self.part(tp_rank)[0], self.shards, shard)
        before = chunk_of(self.shape[0], self.tp, tp_rank)[0] if self.tp_dim == 0 else 0
        return before + begin, length

    def room(self) -> int:
        """Elements that every rank has room for: those of the largest shard."""
        return self.rows(0, 0)[1] * self.part(0)[1:].numel()

    def whole(self, by_rank: Tensor) -> Tensor:
        """The tensor of all ranks' shards [S * TP, room]."""
        parts = []
        for tp_rank in range(1 if self.tp_dim is None else self.tp):
            shape = self.part(tp_rank)
            shards = by_rank[tp_rank :: self.tp]
            if shape.numel() == shards.numel():
                parts.append(shards.reshape(shape))
                continue
            sizes = [self.rows(shard, tp_rank)[1] * shape[1:].numel() for shard in range(self.shards)]
            parts.append(torch.cat([own[:size] for own, size in zip(shards, sizes, strict=True)]).view(shape))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.tp_dim or 0)


class _Gather(NamedTuple):
    """A bucket on its way."""

    names: list[str]
    places: list[_Place]
    starts: list[int]
    """Where each tensor's shard begins in a rank's part."""
    sent: Tensor
    """Kept until all have read it."""
    by_rank: Tensor
    work: dist.Work


class GatheredWeights:
    """Whole tensors of sharded parameters, in order, by one all-gather a bucket; never more than two buckets at a time.

    Every rank of ``mesh`` (one axis: all ranks that hold a whole model between them, ``tp`` innermost) must drain it
    once, in the same order. The cast to ``dtype`` comes before the gather, so that float32 shards travel as bfloat16. A
    yielded tensor is a view of its bucket: copy it or lose it. Each rank computes the bit sums of its own shards; their
    totals are the tensor's. Raises RuntimeError, on all ranks alike, for a tensor that isn't finite, before it is
    yielded.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        dtype: torch.dtype,
        bucket_bytes: int,
        mesh: DeviceMesh,
        tp: int = 1,
    ) -> None:
        self._parameters = parameters
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._mesh = mesh
        self._tp = tp

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor, _ in self.with_sums():
            yield name, tensor

    def with_sums(self) -> Iterator[tuple[str, Tensor, BitSums]]:
        """Yield each tensor with its name and its bit sums."""
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
        ranks = self._mesh.size()
        places = [_Place.of(parameter, ranks // self._tp, self._tp) for _, parameter in bucket]
        flat, starts = self._packed([parameter.to_local() for _, parameter in bucket], places)
        gathered = flat.new_empty(ranks * flat.numel())
        work = _all_gather(gathered, flat, group=self._mesh.get_group(), async_op=True)
        return _Gather([name for name, _ in bucket], places, starts, flat, gathered.view(ranks, -1), work)

    @torch.no_grad()
    def _finish(self, gather: _Gather) -> Iterator[tuple[str, Tensor, BitSums]]:
        gather.work.wait()
        heartbeat()
        by_rank, starts = gather.by_rank, gather.starts
        header = by_rank[:, : starts[0]].contiguous().view(torch.int64).view(len(by_rank), -1, _HEADER)
        sums = _sums_of(header, gather.names)
        for name, place, begin, sent in zip(gather.names, gather.places, starts, sums, strict=True):
            yield name, place.whole(by_rank[:, begin : begin + place.room()]), sent

    def _packed(self, shards: Sequence[Tensor], places: Sequence[_Place]) -> tuple[Tensor, list[int]]:
        """This rank's shards end to end behind their header, in one pass that also casts; where each begins."""
        shard, tp_rank = divmod(self._mesh.get_local_rank(), self._tp)
        # The header comes first, and everything begins at a whole word, where bits are summed.
        word = WORD_BYTES // self._dtype.itemsize
        starts = [len(shards) * _HEADER * word]
        for place in places:
            starts.append(starts[-1] + -(-place.room() // word) * word)
        ends = starts[1:]
        flat = torch.empty(starts.pop(), dtype=self._dtype, device=self._mesh.device_type)
        header = flat[: starts[0]].view(torch.int64).view(-1, _HEADER)
        for i, (local, place) in enumerate(zip(shards, places, strict=True)):
            assert place.tp_dim in (None, 0) or local.shape[1] % word == 0, f"{place}: a word would be cut in two"
            flat[starts[i] + local.numel() : ends[i]] = 0
            sent = flat[starts[i] : starts[i] + local.numel()].view(local.shape).copy_(local)
            if place.tp_dim is None and tp_rank > 0:
                header[i, :2] = 0  # the same shard is the first rank's, and counted there
            else:
                header[i, :2] = bit_sums(sent, place.rows(shard, tp_rank)[0])
            header[i, 2] = local.sum(dtype=torch.float32).isfinite()
        return flat, starts


def _sums_of(header: Tensor, names: Sequence[str]) -> list[BitSums]:
    """The bit sums of a bucket's tensors, from the headers of all ranks [S * TP, tensors, 3].

    Raises RuntimeError for a tensor that is not finite.
    """
    finite = (header[..., 2] == 1).all(0).tolist()
    broken = [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
    if broken:
        raise RuntimeError(f"{len(broken)} of the student's weights hold nan or infinity, {broken[0]} first")
    return [BitSums(plain, weighted) for plain, weighted, _ in header.sum(0).tolist()]


class WholeWeights:
    """Complete tensors of one process as a sync sends them, with their bit sums: for tests and measurements."""

    def __init__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._weights = list(weights)
        self.sums = whole_bit_sums(self._weights)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._weights)

    def with_sums(self) -> Iterator[tuple[str, Tensor, BitSums]]:
        """Yield each tensor with its name and its bit sums."""
        for name, tensor in self._weights:
            yield name, tensor, self.sums[name]
