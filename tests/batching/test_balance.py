"""Balancing: every sequence once, within the limits, with little waiting; and the cost of a sequence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from distill.batching.balance import ROUND_COST, _Balancer, balance, fewest_rounds
from distill.batching.flops import ModelFlops
from distill.batching.plan import PackingConfig
from distill.config import Config
from distill.inputs import packing_of
from scripts import bench_packing
from scripts.bench_packing import CASES, QUADRATIC, Case, cost_of, lockstep, measure, possible
from tests.harness import config_for
from tests.helpers import tiny_config

TOKENS = st.lists(st.integers(1, 60), min_size=1, max_size=40)
TOKEN_LIMIT, SEQUENCE_LIMIT = st.sampled_from([None, 10, 60, 100]), st.sampled_from([None, 1, 3])


@settings(max_examples=150, deadline=None)
@given(TOKENS, st.integers(1, 5), TOKEN_LIMIT, SEQUENCE_LIMIT, st.sampled_from([0.0, 0.1]))
def test_every_sequence_is_assigned_once_within_the_limits(drawn, ranks, tokens, sequences, quadratic) -> None:
    limits = PackingConfig(len(drawn), sequences, tokens)
    rounds = balance(dict(enumerate(drawn)), {i: n + quadratic * n * n for i, n in enumerate(drawn)}, ranks, limits)
    bins = [members for by_rank in rounds for members in by_rank]
    assert sorted(i for members in bins for i in members) == list(range(len(drawn)))
    assert {len(by_rank) for by_rank in rounds} == {ranks}
    for members in bins:
        assert sequences is None or len(members) <= sequences
        assert tokens is None or len(members) <= 1 or sum(drawn[i] for i in members) <= tokens
    assert all(any(by_rank) for by_rank in rounds), "a round has only dummies"


@settings(max_examples=150, deadline=None)
@given(TOKENS, st.integers(1, 5), st.sampled_from([60, 100]))
def test_the_number_of_rounds_is_near_the_smallest_possible(drawn, ranks, tokens) -> None:
    """Two micro-batches of a rank hold more than one budget together, so at most one is less than half full."""
    rounds = balance(dict(enumerate(drawn)), dict(enumerate(map(float, drawn))), ranks, PackingConfig(40, None, tokens))
    assert math.ceil(sum(drawn) / tokens / ranks) <= len(rounds) <= math.ceil((2 * sum(drawn) / tokens + 1) / ranks)


@pytest.mark.parametrize("tokens", [10, 1000])
def test_a_sequence_longer_than_the_budget_has_its_own_micro_batch(tokens) -> None:
    lengths = {0: 500, 1: 5, 2: 5}
    rounds = balance(lengths, {i: float(n) for i, n in lengths.items()}, 1, PackingConfig(8, None, tokens))
    assert ([0] in [members for by_rank in rounds for members in by_rank]) == (tokens == 10)


def test_another_round_is_added_only_if_it_saves_more_than_round_cost() -> None:
    """One round of 6 + 6 and 4 + 4 + 4 takes 4.5; two rounds of 6 + 6 and 4, 4 and 4 take 2 + 1.5."""
    tokens = {0: 6, 1: 6, 2: 4, 3: 4, 4: 4}
    for unit, rounds in ((0.9 * ROUND_COST, 1), (1.1 * ROUND_COST, 2)):
        cost = {0: unit, 1: unit, 2: 1.5 * unit, 3: 1.5 * unit, 4: 1.5 * unit}
        assert len(balance(tokens, cost, 2, PackingConfig(5, None, 12))) == rounds


def _plain_fill(
    tokens: dict[int, int], cost: dict[int, float], bins_count: int, limits: PackingConfig, max_cost: float | None
) -> tuple[list[list[int]], list[int]]:
    """Fill bins by the definition in ``_Balancer.fill``: every sequence looks at every bin."""
    bins: list[list[int]] = [[] for _ in range(bins_count)]
    loads, left = [0.0] * bins_count, []
    for i, n in tokens.items():
        by_load = sorted(range(bins_count), key=lambda b: (loads[b], b))
        fitting = [
            b
            for b in by_load
            if not bins[b]
            or (
                (limits.tokens is None or sum(tokens[j] for j in bins[b]) + n <= limits.tokens)
                and (limits.sequences is None or len(bins[b]) < limits.sequences)
            )
        ]
        if max_cost is not None:
            below = [b for b in fitting if loads[b] <= max_cost - cost[i]]
            fitting = below[-1:] or [b for b in fitting if not bins[b]]
        if fitting:
            bins[fitting[0]].append(i)
            loads[fitting[0]] += cost[i]
        else:
            left.append(i)
    return bins, left


@settings(max_examples=150, deadline=None)
@given(TOKENS, st.integers(1, 8), TOKEN_LIMIT, SEQUENCE_LIMIT, st.sampled_from([None, 1.0, 40.0, 90.0, 1e9]))
def test_bins_are_filled_as_if_every_sequence_looked_at_every_bin(drawn, bins, tokens, sequences, max_cost) -> None:
    limits = PackingConfig(len(drawn), sequences, tokens)
    lengths, cost = dict(enumerate(drawn)), {i: n + 0.01 * n * n for i, n in enumerate(drawn)}
    filled = _Balancer(lengths, cost, 1, limits).fill(list(lengths), bins, max_cost)
    assert filled == _plain_fill(lengths, cost, bins, limits, max_cost)


# ---- waiting of ranks ------------------------------------------------------------------------------------------------

HARD = Case(responses=512, cap=20_480, ranks=32, cp=1, budget=40_960)
TIGHT = Case(responses=256, cap=8192, ranks=32, cp=1, budget=8192)


@pytest.mark.parametrize(
    "case", [HARD, TIGHT], ids=["budget of two longest responses", "budget of one longest response"]
)
def test_balancing_costs_reaches_95_percent_lockstep_and_balancing_tokens_does_not(case: Case) -> None:
    found = measure(case, seed=0)
    assert found.rounds == found.fewest
    assert found.real >= 0.98
    assert found.lockstep >= 0.95 > found.by_tokens > found.in_order


def test_lockstep_is_near_its_upper_bound_if_the_budget_forbids_95_percent() -> None:
    """Some ranks have one response of 20k tokens; the budget gives the other ranks no more tokens, so they wait."""
    found = measure(replace(HARD, budget=HARD.cap), seed=0)
    assert 0.99 * found.possible <= found.lockstep <= found.possible < 0.95


def test_a_case_that_misses_a_bound_fails_the_benchmark(monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench_packing, "CASES", [replace(TIGHT, responses=64, ranks=8)])
    monkeypatch.setattr(bench_packing, "long_plan_seconds", lambda: 0.0)
    monkeypatch.setattr("sys.argv", ["bench_packing", "--seeds", "2"])
    assert bench_packing.main() == 0 and "FAILED" not in capsys.readouterr().out
    monkeypatch.setattr(bench_packing, "balance", lambda tokens, cost, ranks, limits: _in_order(tokens, ranks, limits))
    assert bench_packing.main() == 1 and "FAILED in 2" in capsys.readouterr().out


def _in_order(tokens, ranks, limits) -> bench_packing.Rounds:
    return bench_packing.assign_in_order(tokens, ranks, limits.tokens)


def test_dummies_and_context_parallel_padding_are_not_real_tokens() -> None:
    rounds = [[[0, 1], [2]], [[3], []]]
    tokens = {0: 3, 1: 4, 2: 8, 3: 5}
    assert bench_packing.computed(rounds, tokens, cp=1) == 20 + 1
    assert bench_packing.computed(rounds, tokens, cp=2) == 8 + 8 + 6 + 2


def _partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    for rest in _partitions(items[1:]):
        yield [[items[0]], *rest]
        for k, part in enumerate(rest):
            yield [*rest[:k], [items[0], *part], *rest[k + 1 :]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(1, 4), st.sampled_from([20, 60, 90]))
def test_no_assignment_exceeds_the_upper_bound_of_lockstep(drawn, ranks, budget) -> None:
    """Neither the best of all partitions of a few sequences nor the result of ``balance``."""
    tokens = dict(enumerate(drawn))
    cost = {i: n + 0.05 * n * n for i, n in tokens.items()}
    within = (
        parts
        for parts in _partitions(list(tokens))
        if all(len(part) == 1 or sum(tokens[i] for i in part) <= budget for part in parts)
    )
    loads = (sorted((sum(cost[i] for i in part) for part in parts), reverse=True) for parts in within)
    shortest = min(sum(sorted_loads[::ranks]) for sorted_loads in loads)
    bound = possible(tokens, cost, ranks, budget)
    assert sum(cost.values()) / (ranks * shortest) <= bound + 1e-9
    rounds = balance(tokens, cost, ranks, PackingConfig(len(drawn), None, budget))
    assert lockstep(rounds, cost) <= bound + 1e-9
    assert len(rounds) >= fewest_rounds(tokens, ranks, PackingConfig(len(drawn), None, budget))


def test_the_benchmark_covers_all_cases() -> None:
    sizes = {(case.responses, case.cap, case.ranks) for case in CASES}
    assert sizes == set(itertools.product((256, 512), (8192, 20_480), (8, 32)))
    assert {case.budget // case.cap for case in CASES} == {1, 2}


# ---- cost of a sequence ----------------------------------------------------------------------------------------------


def any_config(folder: Path) -> Config:
    """Return a recipe whose models do not exist."""
    return config_for(folder, folder, "distillation.allow_degenerate=true")


def counted_flops(shape, tokens: int) -> int:
    """Return FLOPs of a forward over one sequence with transformers; its attention computes all pairs."""
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="eager")
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2"])
def test_the_quadratic_cost_is_that_of_the_models_counted_flops(tmp_path, family: str) -> None:
    """Two lengths give the FLOPs per n and per n^2; eager attention also computes the half above the diagonal."""
    shape = tiny_config(family, tied=False, heads=8, kv_heads=4, hidden=96, layers=3)
    if family == "qwen2":
        del shape.head_dim  # Qwen2 configurations have none
    short, long = counted_flops(shape, 64), counted_flops(shape, 128)
    per_square = (long - 2 * short) / (128**2 - 2 * 64**2)
    per_token = short / 64 - per_square * 64
    assert packing_of(any_config(tmp_path), shape).quadratic == pytest.approx(per_square / 2 / per_token, rel=1e-3)


def test_layers_with_a_window_are_linear_in_length(tmp_path) -> None:
    shape = Gemma3TextConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=384,
        sliding_window=16,
    )
    assert shape.layer_types.count("sliding_attention") == 5
    projections, mlp, head = 2 * 64 * 32 * (4 + 4 + 1 + 1), 3 * 2 * 64 * 128, 2 * 64 * 384
    pair = 2 * 2 * 4 * 32
    per_token = 6 * (projections + mlp) + head + 5 * 16 * pair
    assert packing_of(any_config(tmp_path), shape).quadratic == pytest.approx(pair / 2 / per_token)


def test_attention_of_qwen3_4b_is_half_of_all_flops_at_27k_tokens() -> None:
    """36 layers, worked by hand: 294,912 FLOPs per n^2, 8,044,544,000 per n."""
    assert ModelFlops(**bench_packing.QWEN3_4B).quadratic == QUADRATIC == pytest.approx(294_912 / 8_044_544_000)
    assert cost_of(27_277) == pytest.approx(2 * 27_277, rel=1e-4)
