"""Shard micro-batches over the ranks of a group: assign token positions and loss rows to each rank.

A group consists of the ranks that compute one micro-batch together. A loss row is one response token. A view is the
packed input of one model, student or teacher. All functions are pure.

The ranks of a group exchange keys and values inside attention, so a rank can compute any subset of the positions. In
both views a rank computes the positions that predict the tokens of its loss rows. Hidden states, targets and losses are
therefore never communicated. Positions without a loss row (prompt tokens) go to the ranks with the fewest positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from distill.types import Layout, MicroBatch, SequenceShards, SharedPrefixes, View


@dataclass(frozen=True)
class TeacherInput:
    """The part of another rank's micro-batch that a rank of its teacher group needs, with N response tokens."""

    teacher: View
    rollout_N: Tensor
    """int64 [N]: as in ``MicroBatch``."""


def split(group: Sequence[MicroBatch | TeacherInput], layout: Layout) -> MicroBatch:
    """Return this rank's shard of the micro-batches that its teacher group computes together.

    A teacher group is a set of ranks that shard the teacher's input. ``group`` has one micro-batch per data-parallel
    rank of the teacher group, in order of rank; only this rank's micro-batch must be complete. The teacher computes
    them as one packed micro-batch, sharded over the teacher group. The student trains only on the micro-batch of this
    rank's data-parallel group, sharded over the context-parallel ranks. The result has this rank's part of the
    student's and of the teacher's input. If the teacher shares the student's base, both inputs are sharded alike.
    """
    if layout.teacher_size == 1:
        (complete,) = group
        assert isinstance(complete, MicroBatch), "this rank's own micro-batch is incomplete"
        return complete
    tp = layout.teacher_tp_size
    parts = [_rows_by_rank(micro_batch.rollout_N, layout.cp_size * tp) for micro_batch in group]
    own = layout.dp_rank % len(group)
    complete, first = group[own], layout.cp_rank * tp
    assert isinstance(complete, MicroBatch), "this rank's own micro-batch is incomplete"
    trained = parts[own][first : first + tp]
    rows_N = torch.cat(trained)
    teacher = join([micro_batch.teacher for micro_batch in group])
    offsets = torch.tensor([0, *(len(micro_batch.rollout_N) for micro_batch in group)]).cumsum(0).tolist()
    by_rank = [rows + offset for offset, of_group in zip(offsets, parts, strict=False) for rows in of_group]
    student, grid = complete.student, complete.grid
    by_cp_rank = [torch.cat(parts[own][i * tp : (i + 1) * tp]) for i in range(layout.cp_size)]
    if grid is not None:
        grid = replace(grid, cell_N=grid.cell_N[rows_N], rows_per_rank=max(map(len, by_cp_rank)))
    if layout.cp_size > 1:
        student = shard_view(student, by_cp_rank, layout.cp_rank)
    else:
        student = replace(student, rows_N=student.rows_N[rows_N])
    return MicroBatch(
        student=student,
        teacher=shard_view(teacher, by_rank, layout.teacher_rank),
        sampled_N=complete.sampled_N[rows_N],
        sampled_logprobs_N=complete.sampled_logprobs_N[rows_N],
        weight_N=complete.weight_N[rows_N],
        rollout_N=complete.rollout_N[rows_N],
        token_N=complete.token_N[rows_N],
        length_N=complete.length_N[rows_N],
        off_policy_N=None if complete.off_policy_N is None else complete.off_policy_N[rows_N],
        older_N=None if complete.older_N is None else complete.older_N[rows_N],
        grid=grid,
        rows_per_tp_rank=tuple(len(rows) for rows in trained) if tp > 1 else (),
    )


def _rows_by_rank(rollout_N: Tensor, ranks: int) -> list[Tensor]:
    """Distribute the loss rows of a micro-batch over ranks; return each rank's row numbers, ascending.

    A loss row is one response token. The ranks get nearly equal numbers of rows. The first rank gets the first row of
    every response: responses with a shared prefix use the same position for their first row, and each position belongs
    to one rank.
    """
    total = len(rollout_N)
    begins_N = torch.ones(total, dtype=torch.bool)
    begins_N[1:] = rollout_N[1:] != rollout_N[:-1]
    first = begins_N.nonzero().squeeze(1)
    later = (~begins_N).nonzero().squeeze(1)
    spare = max(0, -(-total // ranks) - len(first))
    rest = later[spare:]
    begins_N[later[:spare]] = True
    parts = [begins_N.nonzero().squeeze(1)]
    per_rank = -(-len(rest) // max(ranks - 1, 1))
    return parts + [rest[i * per_rank : (i + 1) * per_rank] for i in range(ranks - 1)]


def shard_view(view: View, rows: Sequence[Tensor], rank: int) -> View:
    """Return the part of the packed input ``view`` that rank ``rank`` computes.

    ``view`` is the input of one model. ``rows[r]`` has the numbers of the loss rows (response tokens) of rank r, in
    ascending order. A rank gets the token positions that predict its loss rows, and a part of the remaining positions.
    """
    count, ranks = len(view.tokens_T), len(rows)
    owner_T = torch.full((count,), -1)
    positions = view.rows_N[torch.cat(list(rows))]
    owners = torch.from_numpy(np.repeat(np.arange(ranks), [len(numbers) for numbers in rows]))
    owner_T[positions] = owners
    assert torch.equal(owner_T[positions], owners), "rows of different ranks use the same position"
    held = torch.bincount(owner_T[owner_T >= 0], minlength=ranks)
    size = max(-(-count // ranks), int(held.max()))
    free = (owner_T == -1).nonzero().squeeze(1)
    owner_T[free] = torch.repeat_interleave(torch.arange(ranks), size - held)[: len(free)]
    # numpy's stable sort of 16-bit integers takes linear time, and its repeat is faster than torch's on the CPU.
    by_owner = torch.from_numpy(np.argsort(owner_T.numpy().astype(np.int16), kind="stable"))
    counts = torch.bincount(owner_T, minlength=ranks)
    begins = counts.cumsum(0) - counts
    slot_T = torch.empty(count, dtype=torch.int64)
    skipped = np.repeat((torch.arange(ranks) * size - begins).numpy(), counts.numpy())
    slot_T[by_owner] = torch.arange(count) + torch.from_numpy(skipped)
    position_P = torch.zeros(ranks * size, dtype=torch.int64)
    position_P[slot_T] = torch.arange(count)
    own = by_owner[begins[rank] : begins[rank] + counts[rank]]
    tokens_T, positions_T = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    tokens_T[: len(own)], positions_T[: len(own)] = view.tokens_T[own], view.positions_T[own]
    return View(
        tokens_T,
        positions_T,
        view.bounds,
        slot_T[view.rows_N[rows[rank]]] - rank * size,
        view.shared,
        SequenceShards(slot_T, position_P),
    )


def join(views: Sequence[View]) -> View:
    """Concatenate packed inputs of one model into one packed input, in the given order.

    If the inputs are sharded over ranks, the result is sharded over the same ranks: each rank's part consists of its
    parts of the inputs.
    """
    if len(views) == 1:
        return views[0]
    own = tokens = slots = 0  # positions of this rank, of all ranks, and of all sequences
    rows_N, expand_S, source_T, bounds = [], [], [], [0]
    for view in views:
        count = len(view.tokens_T) if view.shards is None else len(view.shards.slot_T)
        shared = view.shared or _unshared(count, view.tokens_T.device)
        rows_N.append(view.rows_N + own)
        expand_S.append(shared.expand_S + tokens)
        source_T.append(shared.source_T + slots)
        bounds += [slots + bound for bound in view.bounds[1:]]
        own, tokens, slots = own + len(view.tokens_T), tokens + count, slots + view.bounds[-1]
    any_shared = any(view.shared for view in views)
    return View(
        torch.cat([view.tokens_T for view in views]),
        torch.cat([view.positions_T for view in views]),
        tuple(bounds),
        torch.cat(rows_N),
        SharedPrefixes(torch.cat(expand_S), torch.cat(source_T)) if any_shared else None,
        _join_shards(views),
        _join_bounds(views),
    )


def _unshared(count: int, device: torch.device) -> SharedPrefixes:
    each = torch.arange(count, device=device)
    return SharedPrefixes(each, each)


def _join_shards(views: Sequence[View]) -> SequenceShards | None:
    """Return the distribution of the joined positions over the ranks; None if the views are not sharded."""
    slots, positions = [], []
    size, first_slot, first_position = sum(len(view.tokens_T) for view in views), 0, 0
    for view in views:
        shards, part = view.shards, len(view.tokens_T)  # slots per rank
        if shards is None:
            return None
        rank = shards.slot_T // part
        slots.append(rank * size + (shards.slot_T - rank * part) + first_slot)
        positions.append(shards.position_P.view(-1, part) + first_position)
        first_slot, first_position = first_slot + part, first_position + len(shards.slot_T)
    return SequenceShards(torch.cat(slots), torch.cat(positions, 1).flatten())


def _join_bounds(views: Sequence[View]) -> Tensor | None:
    """Return ``View.bounds_B`` of the joined views; None if a view has none."""
    parts: list[Tensor] = []
    first = 0
    for view in views:
        if view.bounds_B is None:
            return None
        parts.append(view.bounds_B[1:] + first if parts else view.bounds_B)
        first += view.bounds[-1]
    return torch.cat(parts)
