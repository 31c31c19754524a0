"""A shared prefix is read once and nothing else changes: views, plan, attention, a complete step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.batching.plan import PackingConfig, plan, view_of
from distill.config import Config
from distill.distributed.world import World
from distill.inputs import packing_of
from distill.model.attention import packed_attention
from distill.model.hf_config import model_config
from distill.model.hf_files import find_model
from distill.types import Layout, Rollout
from tests.distributed.test_host_memory import random_heads
from tests.harness import Step, config_for, differences, fixed_rollouts, plain_step, sharded_step
from tests.helpers import run_ranks, save_tiny_model

VOCAB = 383
TOLERANCE = 1e-5
PACKING = PackingConfig(12, sequences=None, tokens=None)
PACKINGS = {
    "shared": PACKING,
    "shared, several micro-batches": replace(PACKING, tokens=150),
    "shared, counted in sequences": replace(PACKING, sequences=3),
    "unshared": replace(PACKING, share_prefixes=False),
}

_PREFIX = st.sampled_from([(1,), (1, 2), (1, 2, 3), (4, 5, 6, 7)])
_RESPONSE = st.lists(st.integers(10, 99), min_size=1, max_size=6).map(tuple)


def _grouped(responses: int = 2) -> list[Rollout]:
    """Return responses that share prompts, and teacher prefixes if these are the student's."""
    rollouts = fixed_rollouts(vocab=VOCAB)
    return [
        replace(
            rollouts[i - i % responses], response_ids=r.response_ids, logprobs=r.logprobs, response_index=i % responses
        )
        for i, r in enumerate(rollouts)
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(_PREFIX, _RESPONSE), min_size=1, max_size=8))
def test_a_shared_view_expands_to_the_unshared_view(sequences) -> None:
    plain, view = view_of(sequences), view_of(sequences, share=True)
    assert plain.shared is None and view.bounds == plain.bounds
    distinct = {prefix for prefix, _ in sequences}
    assert len(view.tokens_T) == sum(map(len, distinct)) + sum(len(response) - 1 for _, response in sequences)
    if view.shared is None:
        assert len(distinct) == len(sequences)
        return
    expand_S, source_T = view.shared.expand_S, view.shared.source_T
    assert torch.equal(view.tokens_T[expand_S], plain.tokens_T)
    assert torch.equal(view.positions_T[expand_S], plain.positions_T)
    assert torch.equal(view.rows_N, expand_S[plain.rows_N])
    assert torch.equal(expand_S[source_T], torch.arange(len(view.tokens_T)))
    assert all(int(expand_S.tolist().index(t)) == int(source_T[t]) for t in range(len(source_T)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), min_size=1, max_size=24),
    st.integers(1, 3),
    st.sampled_from([None, 50, 120]),
)
def test_responses_with_shared_prefixes_are_assigned_once(drawn, ranks, tokens) -> None:
    prompts = fixed_rollouts(4)
    rollouts = [replace(prompts[p], response_ids=(7,) * n, logprobs=(-1.0,) * n) for p, n in drawn]
    packing = PackingConfig(len(rollouts), None, tokens)
    (parts,) = zip(*[plan(rollouts, Layout(rank, ranks), packing, 0, 0) for rank in range(ranks)], strict=True)
    assert len({len(part) for part in parts}) == 1, "ranks have different numbers of micro-batches"
    assigned = [i for part in parts for mb in part for i in mb.rollout_N.unique().tolist() if i >= 0]
    assert sorted(assigned) == list(range(len(rollouts)))
    for micro_batch in (mb for part in parts for mb in part):
        inside = [rollouts[i] for i in micro_batch.rollout_N.unique().tolist() if i >= 0]
        read = [max(len(r.prompt.student_ids), len(r.teacher_prefix_ids)) + len(r.response_ids) for r in inside]
        assert tokens is None or len(read) <= 1 or sum(read) <= tokens


def test_responses_to_one_prompt_share_a_micro_batch() -> None:
    rollouts = _grouped()
    for rank in range(2):
        ((micro_batch,),) = plan(rollouts, Layout(rank, 2), PACKING, seed=0, step=0)
        members = set(micro_batch.rollout_N.tolist())
        assert all(i ^ 1 in members for i in members)
        assert micro_batch.student.shared is not None and micro_batch.teacher.shared is not None


@pytest.mark.parametrize("window", [None, 3])
def test_attention_over_shared_positions_equals_attention_over_copies(window: int | None) -> None:
    """In values and gradients: a shared position's gradient is the sum over its copies."""
    sequences = [((1, 2, 3), (5, 6, 7, 8)), ((9,), (4, 4)), ((1, 2, 3), (6,)), ((1, 2, 3), (7, 7, 7))]
    view = view_of(sequences, share=True)
    assert view.shared is not None
    expand_S, source_T = view.shared.expand_S, view.shared.source_T
    module, heads = torch.nn.Module(), random_heads(len(view.tokens_T), torch.float64)
    q, k, v = heads
    upstream = torch.randn(1, len(view.tokens_T), 4, 8, dtype=torch.float64)
    got = packed_attention(module, q, k, v, None, view.bounds, view.shared, sliding_window=window)[0]
    q, k, v = copies = [h.detach()[:, :, expand_S].requires_grad_() for h in heads]
    plain = packed_attention(module, q, k, v, None, view.bounds, sliding_window=window)[0]
    assert torch.equal(got, plain[:, source_T])
    ours = torch.autograd.grad(got, heads, upstream)
    theirs = torch.autograd.grad(plain[:, source_T], copies, upstream)
    for gradient, of_copies in zip(ours, theirs, strict=True):
        summed = torch.zeros_like(gradient).index_add_(2, expand_S, of_copies)
        assert (gradient - summed).abs().max() < 1e-12


def _all_steps(root: Path) -> dict[tuple[str, str], Step]:
    world = World()
    world.build_mesh("cpu", tp=1, cp=1)
    steps = {}
    for family in ("llama", "qwen3"):
        config = _config(root, family, world.size)
        for name, packing in PACKINGS.items():
            steps[family, name] = sharded_step(config, world, _grouped(), packing)
    world.close()
    return steps


def _config(root: Path, family: str, ranks: int = 1) -> Config:
    return config_for(root / f"{family}-0", root / f"{family}-1", "loss_fn.outside_topk=bucket", ranks=ranks)


@pytest.mark.slow
def test_a_step_with_shared_prefixes_equals_plain_pytorch(tmp_path: Path) -> None:
    """Loss, gradient norm and every parameter's gradient; the reference reads every response with its prompt."""
    for family in ("llama", "qwen3"):
        for seed in (0, 1):
            save_tiny_model(tmp_path / f"{family}-{seed}", family, tied=True, seed=seed + 3, vocab=VOCAB)
    steps = run_ranks(2, _all_steps, tmp_path)[0]
    for family in ("llama", "qwen3"):
        reference = plain_step(_config(tmp_path, family), _grouped())
        for name in PACKINGS:
            found = differences(steps[family, name], reference)
            worst = max(found, key=found.__getitem__)
            assert found[worst] < TOLERANCE, f"{family}, {name}: {worst} differs by {found[worst]:.2g}"


@pytest.mark.parametrize("batching", ["sequence_packing", "dynamic_batching", "neither"])
def test_runtime_share_prefixes_false_disables_sharing(tmp_path: Path, batching: str) -> None:
    folder = save_tiny_model(tmp_path / "m")
    counted = {
        f"policy.{name}.enabled={str(name == batching).lower()}" for name in ("sequence_packing", "dynamic_batching")
    }
    for shares in (True, False):
        key = f"runtime.share_prefixes={str(shares).lower()}"
        config = config_for(folder, folder, "distillation.allow_degenerate=true", *sorted(counted), key)
        assert packing_of(config, model_config(find_model(str(folder), "a model"), "a model")).share_prefixes == shares
