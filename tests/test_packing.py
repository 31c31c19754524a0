"""The plan: every answer once, optimizer batches independent of the layout, ranks in lockstep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.runtime.packing import PackingConfig, deal, pack, plan
from distill.types import Layout, OptimizerBatch, Problem, Prompt, Rollout


def _rollouts(lengths: list[int], prefix: int = 3) -> list[Rollout]:
    return [
        Rollout(Prompt(i, (1,) * prefix, Problem("p")), 0, (7,) * n, (-1.0,) * n, "length", 0, (2,) * (prefix + i % 5))
        for i, n in enumerate(lengths)
    ]


def _members(batch: OptimizerBatch) -> set[int]:
    return {int(i) for micro_batch in batch for i in micro_batch.rollout_N.unique() if i >= 0}


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(1, 9), st.sampled_from([None, 40, 100]), st.sampled_from([None, 1, 3]))
def test_every_answer_is_trained_exactly_once_and_ranks_stay_in_step(lengths, ranks, size, tokens, sequences) -> None:
    rollouts = _rollouts(lengths)
    config = PackingConfig(size, sequences=sequences, tokens=tokens)
    plans = [plan(rollouts, Layout(rank, ranks), config, seed=3, step=5) for rank in range(ranks)]
    for batches in zip(*plans, strict=True):
        assert len({len(batch) for batch in batches}) == 1, "ranks have different numbers of micro-batches"
        assert len({batch.response_tokens for batch in batches}) == 1
        rows = sum(int(micro_batch.weight_N.sum()) for batch in batches for micro_batch in batch)
        assert rows == batches[0].response_tokens
        for micro_batch in (micro_batch for batch in batches for micro_batch in batch):
            answers = len(micro_batch.student.bounds) - 1
            assert sequences is None or answers <= sequences
            read = [
                lengths[i] + len(rollouts[i].teacher_prefix_ids)
                for i in micro_batch.rollout_N.unique().tolist()
                if i >= 0
            ]
            assert tokens is None or answers == 1 or sum(read) <= tokens
    seen = [i for batches in plans for batch in batches for i in _members(batch)]
    assert sorted(seen) == list(range(len(lengths)))


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(1, 9))
def test_who_shares_an_optimizer_batch_depends_on_the_seed_alone(lengths, ranks, size) -> None:
    one = plan(_rollouts(lengths), Layout(0, 1), PackingConfig(size, None, None), seed=1, step=2)
    shorter = _rollouts([1] * len(lengths))
    for other_rollouts, tokens in ((_rollouts(lengths), 30), (shorter, None)):
        parts = [
            plan(other_rollouts, Layout(r, ranks), PackingConfig(size, None, tokens), seed=1, step=2)
            for r in range(ranks)
        ]
        together = [set.union(*map(_members, batches)) for batches in zip(*parts, strict=True)]
        assert together == [_members(batch) for batch in one]


def test_seed_and_step_change_the_optimizer_batches() -> None:
    rollouts = _rollouts([5] * 32)
    first = [_members(b) for b in plan(rollouts, Layout(0, 1), PackingConfig(8, None, None), seed=1, step=0)]
    for seed, step in ((2, 0), (1, 1)):
        assert first != [_members(b) for b in plan(rollouts, Layout(0, 1), PackingConfig(8, None, None), seed, step)]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, LENGTHS)
def test_teacher_and_student_rows_predict_the_same_token(lengths, prefixes) -> None:
    rollouts = [
        Rollout(
            Prompt(i, tuple(range(100, 100 + n)), Problem("p")),
            0,
            tuple(range(1000 * i, 1000 * i + n)),
            (-1.0,) * n,
            "stop",
            0,
            (5,) * prefixes[i % len(prefixes)],
        )
        for i, n in enumerate(lengths)
    ]
    micro_batch = pack(list(enumerate(rollouts)))
    assert micro_batch.sampled_N.tolist() == [token for r in rollouts for token in r.response_ids]
    for view, prefix_of in (
        (micro_batch.student, lambda r: r.prompt.student_ids),
        (micro_batch.teacher, lambda r: r.teacher_prefix_ids),
    ):
        n = 0
        for b, rollout in enumerate(rollouts):
            start, stop = view.bounds[b], view.bounds[b + 1]
            read = view.tokens_T[start:stop].tolist()
            assert read == [*prefix_of(rollout), *rollout.response_ids[:-1]]
            assert view.positions_T[start:stop].tolist() == list(range(stop - start))
            for i, token in enumerate(rollout.response_ids):
                place = int(view.rows_N[n]) - start
                following = [*prefix_of(rollout), *rollout.response_ids][place + 1]
                assert (place, following) == (len(prefix_of(rollout)) - 1 + i, token)
                n += 1
        assert n == len(view.rows_N)


def test_a_rank_without_answers_gets_a_dummy_of_weight_zero() -> None:
    (batch,) = plan(_rollouts([4]), Layout(1, 2), PackingConfig(8, None, None), seed=0, step=0)
    (dummy,) = batch
    assert (dummy.weight_N.tolist(), dummy.rollout_N.tolist(), batch.response_tokens) == ([0.0], [-1], 4)
    assert dummy.student.tokens_T.shape == dummy.student.rows_N.shape == (1,)


def test_lockstep_rows_cost_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(256).log_normal_(7.0, 0.8, generator=generator).clamp(1, 8192).int().tolist()
    config = PackingConfig(256, None, tokens=16384)
    cost = {i: n + config.quadratic * n * n for i, n in enumerate(lengths)}
    rows = deal(dict(enumerate(lengths)), 8, config)
    work = [[sum(cost[i] for i in members) for members in row] for row in rows]
    lockstep = sum(map(sum, work)) / (8 * sum(map(max, work)))
    assert lockstep > 0.95, f"{lockstep:.3f} of the time is work; the rest is waiting for the slowest rank"


@pytest.mark.parametrize("tokens", [10, 1000])
def test_an_answer_longer_than_the_budget_is_alone(tokens) -> None:
    rows = deal({0: 500, 1: 5, 2: 5}, 1, PackingConfig(8, None, tokens))
    bins = [members for row in rows for members in row]
    assert ([0] in bins) == (tokens == 10)


def test_a_budget_of_tokens_counts_the_longer_view() -> None:
    long_prefix = [Rollout(Prompt(i, (1, 2), Problem("p")), 0, (7,), (-1.0,), "length", 0, (2,) * 19) for i in range(4)]
    (batch,) = plan(long_prefix, Layout(0, 1), PackingConfig(4, None, tokens=40), seed=0, step=0)
    assert [len(micro_batch.teacher.bounds) - 1 for micro_batch in batch] == [2, 2]
