"""``plan``: every response once, optimizer batches independent of the layout, ranks in lockstep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.batching.balance import ROUND_COST
from distill.batching.plan import PackingConfig, balance_responses, pack, pack_teacher, plan
from distill.inputs import packing_of
from distill.types import Layout, OptimizerBatch, Problem, Prompt, Rollout, View
from tests.harness import config_for
from tests.helpers import tiny_config


def _rollouts(lengths: list[int], prefix: int = 3, prompts: int | None = None) -> list[Rollout]:
    """Return one response per prompt, or responses to ``prompts`` prompts in turn."""
    found = []
    for i, n in enumerate(lengths):
        p = i % (prompts or len(lengths))
        prompt = Prompt(p, (p,) * prefix, Problem("p"))
        found.append(Rollout(prompt, 0, (7,) * n, (-1.0,) * n, "length", 0, (p,) * (prefix + p % 5)))
    return found


def _members(batch: OptimizerBatch) -> set[int]:
    return {int(i) for micro_batch in batch for i in micro_batch.rollout_N.unique() if i >= 0}


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(1, 9), st.sampled_from([None, 40, 100]), st.sampled_from([None, 1, 3]))
def test_every_response_is_trained_once_and_ranks_have_equally_many_micro_batches(
    lengths, ranks, size, tokens, sequences
) -> None:
    rollouts = _rollouts(lengths)
    config = PackingConfig(size, sequences=sequences, tokens=tokens)
    plans = [plan(rollouts, Layout(rank, ranks), config, seed=3, step=5) for rank in range(ranks)]
    for batches in zip(*plans, strict=True):
        assert len({len(batch) for batch in batches}) == 1, "ranks have different numbers of micro-batches"
        assert len({batch.response_tokens for batch in batches}) == 1
        rows = sum(int(micro_batch.weight_N.sum()) for batch in batches for micro_batch in batch)
        assert rows == batches[0].response_tokens
        for micro_batch in (micro_batch for batch in batches for micro_batch in batch):
            responses = len(micro_batch.student.bounds) - 1
            assert sequences is None or responses <= sequences
            read = [
                lengths[i] + len(rollouts[i].teacher_prefix_ids)
                for i in micro_batch.rollout_N.unique().tolist()
                if i >= 0
            ]
            assert tokens is None or responses == 1 or sum(read) <= tokens
    seen = [i for batches in plans for batch in batches for i in _members(batch)]
    assert sorted(seen) == list(range(len(lengths)))


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.sampled_from([None, 40, 100]), st.booleans())
def test_every_rank_takes_its_micro_batches_of_the_same_assignment(lengths, ranks, tokens, shared) -> None:
    """The assignment is deterministic, so that ranks need no communication."""
    rollouts = _rollouts(lengths, prompts=3 if shared else None)
    config = PackingConfig(len(lengths), None, tokens, quadratic=1e-2)
    parts = [plan(rollouts, Layout(rank, ranks), config, seed=3, step=5)[0] for rank in range(ranks)]
    again = [plan(list(rollouts), Layout(rank, ranks), config, seed=3, step=5)[0] for rank in range(ranks)]
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 5)
    rounds = balance_responses(rollouts, torch.randperm(len(lengths), generator=generator).tolist(), ranks, config)
    for found in (parts, again):
        taken = [[sorted(set(micro_batch.rollout_N.tolist()) - {-1}) for micro_batch in part] for part in found]
        assert [list(by_rank) for by_rank in zip(*taken, strict=True)] == rounds


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 60), st.integers(1, 4), st.sampled_from([None, 80, 200]))
def test_sharing_prefixes_never_increases_the_estimated_time(lengths, prefix, ranks, tokens) -> None:
    rollouts = _rollouts(lengths, prefix, prompts=4)
    longest = [len(r.teacher_prefix_ids) + len(r.response_ids) for r in rollouts]

    def time(share: bool) -> float:
        config = PackingConfig(len(lengths), None, tokens, quadratic=1e-2, share_prefixes=share)
        rounds = balance_responses(rollouts, range(len(lengths)), ranks, config)
        return sum(ROUND_COST + max(cost(members, share) for members in by_rank) for by_rank in rounds)

    def cost(members: list[int], share: bool) -> float:
        prefix_of = {i: rollouts[i].prompt.prompt_id if share else i for i in members}
        read_once = {prefix_of[i]: len(rollouts[i].teacher_prefix_ids) for i in members}
        tokens_read = sum(read_once.values()) + sum(lengths[i] for i in members)
        return tokens_read + 1e-2 * sum(longest[i] ** 2 for i in members)

    assert time(share=True) <= time(share=False) + 1e-6


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(1, 9))
def test_optimizer_batches_depend_on_the_seed_alone(lengths, ranks, size) -> None:
    one = plan(_rollouts(lengths), Layout(0, 1), PackingConfig(size, None, None), seed=1, step=2)
    shorter = _rollouts([1] * len(lengths))
    sharing = _rollouts(lengths, prompts=3)
    for other_rollouts, tokens, share in (
        (_rollouts(lengths), 30, True),
        (shorter, None, True),
        (sharing, 80, True),
        (sharing, 80, False),
    ):
        config = PackingConfig(size, None, tokens, share_prefixes=share)
        parts = [plan(other_rollouts, Layout(r, ranks), config, seed=1, step=2) for r in range(ranks)]
        together = [set.union(*map(_members, batches)) for batches in zip(*parts, strict=True)]
        assert together == [_members(batch) for batch in one]


@pytest.mark.parametrize(
    ("left", "batches"),
    [(128, [640, 640]), (100, [500, 500]), (65, [320, 330]), (2, [10, 10]), (1, [10]), (0, [])],
)
def test_responses_left_out_shrink_all_optimizer_batches_evenly(left, batches) -> None:
    """128 responses of ten tokens make two batches of 64; of 65, one must not get the weight of 64."""
    config = PackingConfig(64, sequences=8, tokens=None, expected=128)
    planned = plan(_rollouts([10] * left), Layout(0, 2), config, seed=0, step=0)
    assert [batch.response_tokens for batch in planned] == batches


def test_seed_and_step_change_the_optimizer_batches() -> None:
    rollouts = _rollouts([5] * 32)
    first = [_members(b) for b in plan(rollouts, Layout(0, 1), PackingConfig(8, None, None), seed=1, step=0)]
    for seed, step in ((2, 0), (1, 1), (20260101120000, 0), (10**30, 0)):
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
                position = int(view.rows_N[n]) - start
                following = [*prefix_of(rollout), *rollout.response_ids][position + 1]
                assert (position, following) == (len(prefix_of(rollout)) - 1 + i, token)
                n += 1
        assert n == len(view.rows_N)


def _plain_view(sequences: list[tuple[tuple[int, ...], tuple[int, ...]]], share: bool) -> dict[str, list[int]]:
    """Build a view from Python lists, token by token."""
    tokens: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    expand: list[int] = []
    bounds = [0]
    begins: dict[tuple[int, ...], list[int]] = {}
    for prefix, response in sequences:
        slots = begins.get(prefix, []) if share else []
        for position, token in enumerate(prefix[len(slots) :] + response[:-1], start=len(slots)):
            slots = [*slots, len(tokens)]
            tokens.append(token)
            positions.append(position)
        begins[prefix] = slots[: len(prefix)]
        rows += slots[len(prefix) - 1 :]
        expand += slots
        bounds.append(len(expand))
    found = dict(tokens_T=tokens, positions_T=positions, rows_N=rows, bounds=bounds)
    if len(expand) > len(tokens):
        found |= dict(expand_S=expand, source_T=[expand.index(t) for t in range(len(tokens))])
    return found


def _as_lists(view: View) -> dict[str, list[int]]:
    tensors = dict(tokens_T=view.tokens_T, positions_T=view.positions_T, rows_N=view.rows_N)
    if view.shared is not None:
        tensors |= dict(expand_S=view.shared.expand_S, source_T=view.shared.source_T)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int64}
    return {"bounds": list(view.bounds)} | {name: tensor.tolist() for name, tensor in tensors.items()}


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.booleans())
def test_packed_arrays_equal_lists_built_token_by_token(lengths, prompts, share) -> None:
    members = []
    for i, n in enumerate(lengths, start=5):
        prompt = Prompt(i % prompts, (i % prompts + 1,) * (1 + i % prompts), Problem("p"))
        response = tuple(range(100 * i, 100 * i + n))
        teacher = () if i % 3 else (*range(50), i % prompts)
        members.append((i, Rollout(prompt, 0, response, tuple(-0.1 * t for t in response), "stop", 0, teacher)))
    packed = pack(members, share)
    students = [(r.prompt.student_ids, r.response_ids) for _, r in members]
    teachers = [(r.teacher_prefix_ids or r.prompt.student_ids, r.response_ids) for _, r in members]
    assert _as_lists(packed.student) == _plain_view(students, share)
    assert _as_lists(packed.teacher) == _plain_view(teachers, share)
    assert packed.sampled_N.tolist() == [t for _, r in members for t in r.response_ids]
    assert torch.equal(packed.sampled_logprobs_N, torch.tensor([p for _, r in members for p in r.logprobs]))
    assert packed.rollout_N.tolist() == [i for i, r in members for _ in r.response_ids]
    others = pack_teacher(members, share)
    assert _as_lists(others.teacher) == _as_lists(packed.teacher)
    assert torch.equal(others.rollout_N, packed.rollout_N)


class Counted(tuple):
    """A tuple that counts how many of its elements were read."""

    reads: ClassVar[Counter[str]] = Counter()

    def __iter__(self) -> Iterator:
        for element in tuple.__iter__(self):
            self.reads[type(element).__name__] += 1
            yield element


def test_a_rank_converts_only_the_tokens_that_its_teacher_group_reads_and_only_once() -> None:
    Counted.reads.clear()
    rollouts = [
        replace(r, response_ids=Counted(r.response_ids), logprobs=Counted(r.logprobs)) for r in _rollouts([50] * 64)
    ]
    for rank in range(8):
        Counted.reads.clear()
        batches = plan(rollouts, Layout(rank, 8, teacher_size=4), PackingConfig(64, 2, None), seed=0, step=0)
        assert Counted.reads == {"int": 64 * 50 // 2, "float": 64 * 50 // 8}
        assert sum(len(micro_batch.sampled_N) for batch in batches for micro_batch in batch) == 64 * 50 // 8


def test_a_rank_without_responses_gets_a_dummy_of_weight_zero() -> None:
    (batch,) = plan(_rollouts([4]), Layout(1, 2), PackingConfig(8, None, None), seed=0, step=0)
    (dummy,) = batch
    assert (dummy.weight_N.tolist(), dummy.rollout_N.tolist(), batch.response_tokens) == ([0.0], [-1], 4)
    assert dummy.student.tokens_T.shape == dummy.student.rows_N.shape == (1,)


def test_the_token_budget_counts_the_longer_view() -> None:
    long_prefix = [Rollout(Prompt(i, (1, 2), Problem("p")), 0, (7,), (-1.0,), "length", 0, (2,) * 19) for i in range(4)]
    (batch,) = plan(long_prefix, Layout(0, 1), PackingConfig(4, None, tokens=40), seed=0, step=0)
    assert [len(micro_batch.teacher.bounds) - 1 for micro_batch in batch] == [2, 2]


@pytest.mark.parametrize("batching", ["sequence_packing", "dynamic_batching", None])
def test_micro_batches_are_limited_by_tokens_if_the_recipe_packs(tmp_path, batching) -> None:
    enabled = {
        f"policy.{name}.enabled={str(name == batching).lower()}" for name in ("sequence_packing", "dynamic_batching")
    }
    size = f"policy.{batching}.train_mb_tokens=777" if batching else "policy.train_micro_batch_size=4"
    config = config_for(tmp_path, tmp_path, "distillation.allow_degenerate=true", *sorted(enabled), size)
    packing = packing_of(config, tiny_config("llama", tied=True))
    assert (packing.tokens, packing.sequences) == ((777, None) if batching else (None, 4))
    assert packing.optimizer_batch == config.policy.train_global_batch_size
