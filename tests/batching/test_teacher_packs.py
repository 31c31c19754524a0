"""The teacher's larger packs: the same sequences and rows as in its micro-batches, and the same targets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.batching.context_parallel import split
from distill.batching.plan import PackingConfig, pack, plan
from distill.batching.teacher_packs import by_pack, join_for_teacher, pack_sizes, positions_read, split_targets
from distill.batching.transfer import copy_batches
from distill.distributed.world import World
from distill.model.hf_config import model_config
from distill.model.hf_files import find_model
from distill.model.teacher import ShardedTeacher
from distill.types import MicroBatch, OptimizerBatch, TeacherRows, TopK, View
from tests.batching.test_context_parallel import LAYOUTS, SHAPES, _complete, _layout, _rollouts, _sequences
from tests.harness import config_for, fixed_rollouts
from tests.helpers import run_ranks, save_tiny_model


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda count: st.lists(st.lists(st.integers(1, 50), min_size=count, max_size=count), min_size=1, max_size=4)
    ),
    st.integers(1, 120),
)
def test_packs_are_as_large_as_the_limit_allows_on_all_ranks(positions: list[list[int]], limit: int) -> None:
    sizes = pack_sizes(positions, limit)
    assert sum(sizes) == len(positions[0]) and min(sizes) >= 1
    first = 0
    for size in sizes:
        held = [sum(of_rank[first : first + size]) for of_rank in positions]
        assert size == 1 or max(held) <= limit
        first += size
        if first < len(positions[0]):
            assert max(sum(of_rank[first - size : first + 1]) for of_rank in positions) > limit
    assert pack_sizes([[]], limit) == []


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(SHAPES, min_size=4, max_size=4), min_size=1, max_size=3),
    st.sampled_from([(1, 1, 1), *LAYOUTS]),
    st.booleans(),
)
def test_a_joined_pack_has_the_sequences_and_rows_of_its_micro_batches(shapes, sizes, share) -> None:
    """All ranks of a teacher group join ``shapes`` (a list of micro-batches for each round)."""
    tp, cp, size = sizes
    rounds = []
    for i, of_round in enumerate(shapes):
        members = [list(enumerate(_rollouts(shape), start=100 * i + 10 * j)) for j, shape in enumerate(of_round)]
        rounds.append([pack(of_group, share) for of_group in members[: size // (tp * cp)]])
    by_rank = [
        _on_device([split(group, _layout(tp, cp, size, rank, size)) for group in rounds]) for rank in range(size)
    ]
    joined = [join_for_teacher(micro_batches) for micro_batches in by_rank]
    views = [each.teacher for each in joined]
    expected = [sequence for group in rounds for mb in group for sequence in _sequences(mb.teacher)]
    for view in views:
        assert view.bounds_B is not None and view.bounds_B.tolist() == list(view.bounds)
    assert _sequences(_assembled(views)) == expected
    for rank, micro_batches in enumerate(by_rank):
        assert _read(views[rank]) == [row for mb in micro_batches for row in _read(mb.teacher)]
        tp_rank, group = rank % tp, by_rank[rank // tp * tp : rank // tp * tp + tp]
        _assert_split(joined[rank], micro_batches, group, tp_rank)


def _on_device(micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    (batch,) = copy_batches([OptimizerBatch(tuple(micro_batches), 1)], torch.device("cpu"))
    return list(batch)


def _assembled(views: list[View]) -> View:
    """Return the complete view of which ``views`` are the ranks' shards."""
    if views[0].shards is None:
        return views[0]
    tokens, positions = _complete(views)
    return View(tokens, positions, views[0].bounds, views[0].rows_N, views[0].shared)


def _read(view: View) -> list[tuple[int, int]]:
    """Return token and position that each row of the view reads."""
    return list(zip(view.tokens_T[view.rows_N].tolist(), view.positions_T[view.rows_N].tolist(), strict=True))


def _assert_split(joined, micro_batches: list[MicroBatch], group: list[list[MicroBatch]], tp_rank: int) -> None:
    """Check ``split_targets`` with the sampled tokens as targets.

    The teacher returns the targets of a pack in the order of its rows, gathered over the tensor-parallel ``group``.
    """
    tp = len(group)
    parts = [
        [torch.split(mb.sampled_N, list(mb.rows_per_tp_rank or (len(mb.sampled_N),)))[rank] for mb in of_rank]
        for rank, of_rank in enumerate(group)
    ]
    gathered = torch.cat([part for of_rank in parts for part in of_rank])
    assert torch.equal(joined.sampled_N, gathered)
    assert joined.rows_per_tp_rank == (() if tp == 1 else tuple(sum(map(len, of_rank)) for of_rank in parts))
    own = torch.split(joined.sampled_N, list(joined.rows_per_tp_rank or (len(joined.sampled_N),)))[tp_rank]
    assert len(own) == len(joined.teacher.rows_N)
    column = gathered.float()
    topk = TopK(gathered[:, None], column[:, None], column, sampled_logprob_N=-column)
    for targets in (topk, TeacherRows(column[:, None], torch.zeros(2, 1))):
        found = split_targets(targets, micro_batches)
        assert len(found) == len(micro_batches)
        for each, micro_batch in zip(found, micro_batches, strict=True):
            rows = each.ids_NK if isinstance(each, TopK) else each.hidden_ND
            assert torch.equal(rows[:, 0].long(), micro_batch.sampled_N)
            if isinstance(each, TopK):
                assert each.sampled_logprob_N is not None and each.entropy_N is None
                assert torch.equal(-each.sampled_logprob_N.long(), micro_batch.sampled_N)


def test_a_position_counts_for_every_response_that_shares_it() -> None:
    shared = pack(list(enumerate(_rollouts([(3, 5, 4, 0), (3, 5, 6, 1)]))), share=True)
    assert shared.teacher.shared is not None
    assert positions_read(shared) == shared.teacher.bounds[-1] > len(shared.teacher.tokens_T)
    parts = [split([shared], _layout(1, 2, 2, rank, 2)) for rank in range(2)]
    assert [positions_read(part) for part in parts] == [-(-shared.teacher.bounds[-1] // 2)] * 2


def test_packs_are_consecutive() -> None:
    micro_batches = [pack([]) for _ in range(5)]
    found = [list(each) for each in by_pack(micro_batches, [2, 1, 2])]
    assert [each for group in found for each in group] == micro_batches and [*map(len, found)] == [2, 1, 2]


CASES = {
    "one rank per micro-batch": (1, 1, 1, ()),
    "tp 2, teacher group of 4, sampled": (
        2,
        1,
        4,
        ("loss_fn.kl_type=sampled", "loss_fn.token_weights.prefix_importance=0.5"),
    ),
    "cp 2, full vocabulary": (1, 2, 2, ("distillation.topk_logits_k=0",)),
}


def _both(folder: Path) -> dict[str, tuple[float, int, int]]:
    """Return for each case the largest difference of targets, and the numbers of micro-batches and forwards."""
    world = World()
    found = {}
    for name, (tp, cp, teacher_size, overrides) in CASES.items():
        world.build_mesh("cpu", tp, cp, 1, teacher_size)
        budget = ("teacher.sequence_packing.enabled=true", "teacher.sequence_packing.logprob_mb_tokens=250")
        disabled = "teacher.dynamic_batching.enabled=false"
        config = config_for(
            folder, folder, "distillation.allow_degenerate=true", disabled, *budget, *overrides, ranks=4
        )
        files = find_model(str(folder), "teacher.model_name")
        teacher = ShardedTeacher(config, files, world, model_config(files, "teacher.model_name").vocab_size)
        rollouts = fixed_rollouts(16)
        batches = plan(rollouts, world.layout, PackingConfig(8, sequences=1, tokens=None), seed=0, step=0)
        micro_batches = [micro_batch for batch in batches for micro_batch in batch]
        plain = [teacher.targets(micro_batch) for micro_batch in micro_batches]
        forwards = 0

        def count(*_: object) -> None:
            nonlocal forwards
            forwards += 1

        handle = teacher.model.register_forward_pre_hook(count)
        joined = list(teacher.targets_of(micro_batches))
        handle.remove()
        difference = 0.0
        for ours, theirs, micro_batch in zip(joined, plain, micro_batches, strict=True):
            if isinstance(ours, TopK):
                assert (ours.sampled_logprob_N is None) == (not overrides)
                difference = max(difference, *_sampled_difference(ours, micro_batch.sampled_N))
            for field, tensor in vars(theirs).items():
                if tensor is None:
                    assert vars(ours)[field] is None
                elif field.endswith("ids_NK"):
                    assert torch.equal(vars(ours)[field].sort(1).values, tensor.sort(1).values)
                elif field.endswith("_N") or field == "hidden_ND":
                    assert vars(ours)[field].shape == tensor.shape
                    difference = max([difference, *(vars(ours)[field] - tensor).abs().flatten().tolist()])
        found[name] = (difference, len(micro_batches), forwards)
    world.close()
    return found


def _sampled_difference(topk: TopK, sampled_N: torch.Tensor) -> list[float]:
    """Return how much ``sampled_logprob_N`` differs from the log-probs that ``kl_type=sampled`` adds to the top-k."""
    if topk.sampled_logprob_N is None:
        return [0.0]
    kept_N = topk.logprobs_NK.masked_fill(topk.ids_NK != sampled_N[:, None], 0.0).sum(1)
    return [0.0, *(topk.sampled_logprob_N - kept_N).abs().tolist()]


@pytest.mark.slow
def test_joined_packs_give_the_targets_of_the_micro_batches(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "m", "qwen3", True, seed=2, hidden=64, heads=8, kv_heads=4)
    for found in run_ranks(4, _both, tmp_path / "m"):
        for name, (difference, micro_batches, forwards) in found.items():
            assert difference < 1e-5, name
            assert 1 <= forwards <= micro_batches // 2, (name, forwards, micro_batches)
