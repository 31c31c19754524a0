"""Larger packs for the teacher: join consecutive micro-batches, and split the teacher's targets again.

The teacher has no backward pass, so its activations need little memory and it can read several micro-batches of the
student at once. Each layer's weights are then gathered less often. All functions are pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.batching.context_parallel import join
from distill.types import MicroBatch, Targets, TeacherRows, View


@dataclass(frozen=True)
class TeacherPack:
    """Input of one forward pass of the teacher on this rank: the teacher's part of several micro-batches.

    With tensor parallelism each rank reads a part of the rows of every micro-batch. The rows of the pack are then
    ordered by rank first and by micro-batch second.
    """

    teacher: View
    sampled_N: Tensor
    """int64 [N]: sampled response token of each row."""
    rows_per_tp_rank: tuple[int, ...]
    """Number of rows of the view on each tensor-parallel rank; empty without tensor parallelism."""


def positions_read(micro_batch: MicroBatch) -> int:
    """Return the number of positions of a micro-batch that the teacher computes on this rank.

    As in the limits of micro-batches, every response counts with its prefix, even if responses share the prefix.
    """
    view = micro_batch.teacher
    own = len(view.tokens_T)
    ranks = 1 if view.shards is None else len(view.shards.position_P) // own
    return max(own, -(-view.bounds[-1] // ranks))


def pack_sizes(positions_by_rank: Sequence[Sequence[int]], limit: int) -> list[int]:
    """Return the number of consecutive micro-batches in each pack of the teacher.

    ``positions_by_rank``: for each rank, the number of positions of each micro-batch; all ranks have equally many
    micro-batches. The result is the same on all ranks, because each pack needs collectives. No rank has more than
    ``limit`` positions in a pack of several micro-batches.
    """
    sizes: list[int] = []
    held: list[int] = []
    for of_ranks in zip(*positions_by_rank, strict=True):
        joined = [before + more for before, more in zip(held, of_ranks, strict=True)] if sizes else []
        if sizes and max(joined) <= limit:
            sizes[-1] += 1
            held = joined
        else:
            sizes.append(1)
            held = list(of_ranks)
    return sizes


def by_pack(micro_batches: Sequence[MicroBatch], sizes: Sequence[int]) -> Iterator[Sequence[MicroBatch]]:
    """Yield ``sizes[0]`` micro-batches, then the next ``sizes[1]``, and so on."""
    first = 0
    for size in sizes:
        yield micro_batches[first : first + size]
        first += size


def join_for_teacher(micro_batches: Sequence[MicroBatch]) -> TeacherPack:
    """Return the teacher's input for the given micro-batches of this rank, joined into one pack."""
    counts = _row_counts(micro_batches)
    by_micro_batch = [
        torch.split(micro_batch.sampled_N, list(of_ranks))
        for micro_batch, of_ranks in zip(micro_batches, counts, strict=True)
    ]
    sampled = [part for of_rank in zip(*by_micro_batch, strict=True) for part in of_rank]
    has_tp = bool(micro_batches[0].rows_per_tp_rank)
    return TeacherPack(
        join([micro_batch.teacher for micro_batch in micro_batches]),
        torch.cat(sampled),
        tuple(map(sum, zip(*counts, strict=True))) if has_tp else (),
    )


def split_targets(targets: Targets, micro_batches: Sequence[MicroBatch]) -> list[Targets]:
    """Split the teacher's targets for a pack into the targets of its micro-batches.

    Without tensor parallelism, the results share the memory of ``targets``.
    """
    counts = _row_counts(micro_batches)
    ordered = [count for of_rank in zip(*counts, strict=True) for count in of_rank]

    def split(rows: Tensor) -> list[Tensor]:
        parts = torch.split(rows, ordered)
        of_micro_batches = [parts[m :: len(counts)] for m in range(len(counts))]
        return [part[0] if len(part) == 1 else torch.cat(part) for part in of_micro_batches]

    if isinstance(targets, TeacherRows):
        return [replace(targets, hidden_ND=hidden_ND) for hidden_ND in split(targets.hidden_ND)]
    columns = {name: split(column) for name, column in vars(targets).items() if column is not None}
    return [replace(targets, **{name: rows[m] for name, rows in columns.items()}) for m in range(len(counts))]


def _row_counts(micro_batches: Sequence[MicroBatch]) -> list[tuple[int, ...]]:
    """Return for each micro-batch the number of rows of each tensor-parallel rank, or of this rank if tp is 1."""
    return [each.rows_per_tp_rank or (len(each.sampled_N),) for each in micro_batches]
