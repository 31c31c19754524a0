"""Sharded micro-batches: every position and row once, and row n is the same token in both views."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distill.batching.context_parallel import join, split
from distill.batching.plan import PackingConfig, pack, plan
from distill.types import Layout, MicroBatch, Problem, Prompt, Rollout, View

LAYOUTS = [(1, 2, 2), (2, 1, 2), (2, 2, 4), (1, 1, 2), (1, 1, 4), (1, 2, 4), (2, 1, 4), (1, 3, 6), (4, 2, 8)]
"""(tp, cp, ranks of a teacher group)."""


def _layout(tp: int, cp: int, teacher: int, rank: int, ranks: int) -> Layout:
    dp_rank, inner = divmod(rank, cp * tp)
    return Layout(dp_rank, ranks // (cp * tp), *(inner // tp, cp), *(inner % tp, tp), teacher)


def _rollouts(shapes: list[tuple[int, int, int, int]]) -> list[Rollout]:
    """Build rollouts from (prompt id, extra teacher tokens, response length, response index); prompts may repeat."""
    rollouts = []
    for i, (prompt, more, length, index) in enumerate(shapes):
        ids = tuple(range(10 * prompt, 10 * prompt + 1 + prompt))
        response = tuple(1000 * (i + 1) + n for n in range(length))
        rollouts.append(
            Rollout(
                Prompt(prompt, ids, Problem("")),
                index,
                response,
                tuple(-float(token) for token in response),
                "length",
                0,
                (*range(500, 500 + more), *ids),
            )
        )
    return rollouts


SHAPES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(1, 9), st.integers(0, 3)), min_size=0, max_size=5
)


def _complete(parts: list[View]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and positions of a pack, assembled from the ranks' shards."""
    shards = parts[0].shards
    assert shards is not None
    tokens, positions = (torch.cat([getattr(v, name) for v in parts]) for name in ("tokens_T", "positions_T"))
    return tokens[shards.slot_T], positions[shards.slot_T]


def _sequences(view: View) -> list[list[int]]:
    """Return the tokens of each sequence, and check ``source_T`` against ``expand_S``."""
    count = len(view.tokens_T)
    expand_S = torch.arange(count) if view.shared is None else view.shared.expand_S
    if view.shared is not None:
        assert torch.equal(expand_S[view.shared.source_T], torch.arange(count))
    return [part.tolist() for part in torch.tensor_split(view.tokens_T[expand_S], list(view.bounds[1:-1]))]


ALONE = [(0, 0, 1, 0), (0, 0, 1, 1), (0, 0, 1, 2), (0, 0, 3, 3)]
"""The first rank's rows are more than a third of all positions, so that other ranks have padding."""


@settings(max_examples=20, deadline=None)
@given(shape=SHAPES, sizes=st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)]), share=st.booleans())
def test_a_teacher_that_shares_the_base_reads_shards_like_those_of_the_student(shape, sizes, share) -> None:
    """All tensor-parallel ranks have the same input, and the teacher's row n is the student's row n."""
    tp, cp = sizes
    complete = pack(list(enumerate(_rollouts(shape))), share)
    parts = [split([complete], _layout(tp, cp, cp, rank, tp * cp)) for rank in range(tp * cp)]
    for rank, part in enumerate(parts):
        first = parts[rank // tp * tp]
        assert torch.equal(part.teacher.tokens_T, first.teacher.tokens_T)
        assert torch.equal(part.teacher.rows_N, first.teacher.rows_N) and part.rows_per_tp_rank == ()
        assert (part.student.shards is None) == (part.teacher.shards is None) == (cp == 1)
    if cp > 1:
        tokens, positions = _complete([part.teacher for part in parts[::tp]])
        assert torch.equal(tokens, complete.teacher.tokens_T) and torch.equal(positions, complete.teacher.positions_T)
        tokens, _ = _complete([part.student for part in parts[::tp]])
        assert torch.equal(tokens, complete.student.tokens_T)
    _rows_are_kept(complete, parts[::tp], 1)


@settings(max_examples=40, deadline=None)
@example(shapes=[ALONE, ALONE, [], []], sizes=(1, 3, 6), share=False)
@given(shapes=st.lists(SHAPES, min_size=4, max_size=4), sizes=st.sampled_from(LAYOUTS), share=st.booleans())
def test_the_shards_of_a_group_make_up_the_pack(shapes, sizes, share) -> None:
    tp, cp, size = sizes
    members = [list(enumerate(_rollouts(shape), start=10 * i)) for i, shape in enumerate(shapes)]
    group = [pack(of_group, share) for of_group in members[: size // (tp * cp)]]
    parts = [split(group, _layout(tp, cp, size, rank, size)) for rank in range(size)]
    complete = join([micro_batch.teacher for micro_batch in group])
    assert _sequences(complete) == [sequence for micro_batch in group for sequence in _sequences(micro_batch.teacher)]
    tokens, positions = _complete([part.teacher for part in parts])
    assert torch.equal(tokens, complete.tokens_T) and torch.equal(positions, complete.positions_T)
    assert len({len(part.teacher.tokens_T) for part in parts}) == 1
    for dp, micro_batch in enumerate(group):
        ours = parts[dp * tp * cp : (dp + 1) * tp * cp]
        if cp > 1:
            tokens, _ = _complete([part.student for part in ours[::tp]])
            assert torch.equal(tokens, micro_batch.student.tokens_T)
        _rows_are_kept(micro_batch, ours, tp)


def _rows_are_kept(complete: MicroBatch, parts: list[MicroBatch], tp: int) -> None:
    """Check that every row is present once, with its numbers and its position in both views."""

    def rows(micro_batch: MicroBatch) -> list[tuple[float, ...]]:
        student = micro_batch.student
        read = student.tokens_T[student.rows_N], student.positions_T[student.rows_N]
        numbers = micro_batch.sampled_N, micro_batch.sampled_logprobs_N, micro_batch.weight_N, micro_batch.rollout_N
        return list(zip(*(column.tolist() for column in (*read, *numbers)), strict=True))

    assert sorted(row for part in parts[::tp] for row in rows(part)) == sorted(rows(complete))
    for rank, part in enumerate(parts):
        assert rows(part) == rows(parts[rank // tp * tp])  # a tensor-parallel group trains the same rows
    expected = {}
    for token, row in zip(complete.sampled_N.tolist(), complete.teacher.rows_N.tolist(), strict=True):
        expected[token] = (complete.teacher.tokens_T[row].item(), complete.teacher.positions_T[row].item())
    for first in range(0, len(parts), tp):
        of_group = parts[first : first + tp]
        read = [
            (part.teacher.tokens_T[row].item(), part.teacher.positions_T[row].item())
            for part in of_group
            for row in part.teacher.rows_N.tolist()
        ]
        assert read == [expected[token] for token in of_group[0].sampled_N.tolist()]
        assert tp == 1 or of_group[0].rows_per_tp_rank == tuple(len(part.teacher.rows_N) for part in of_group)


def test_ranks_have_equally_many_rows() -> None:
    rollouts = _rollouts([(3, 0, 40, 0), (2, 0, 40, 0), (1, 5, 40, 0)])
    parts = [split([pack(list(enumerate(rollouts)))], _layout(1, 4, 4, rank, 4)) for rank in range(4)]
    assert [len(part.sampled_N) for part in parts] == [30, 30, 30, 30]


@pytest.mark.parametrize(("tp", "cp", "teacher"), [(1, 2, 2), (2, 1, 4), (1, 1, 2)])
def test_sharded_plans_train_every_token_once(tp, cp, teacher) -> None:
    rollouts = _rollouts([(i % 4, i % 3, 1 + i % 5, i) for i in range(12)])
    config = PackingConfig(12, None, tokens=20)
    plans = [plan(rollouts, _layout(tp, cp, teacher, rank, 4), config, seed=1, step=2) for rank in range(4)]
    complete = plan(rollouts, Layout(0, 1), PackingConfig(12, None, None), seed=1, step=2)
    trained = [
        int(token)
        for rank, batches in enumerate(plans)
        for batch in batches
        for part in batch
        for token, weight in zip(part.sampled_N, part.weight_N, strict=True)
        if weight and rank % tp == 0
    ]
    assert sorted(trained) == sorted(token for part in complete[0] for token in part.sampled_N.tolist())
