"""Dealing: everything once, within the limits, ranks that wait little for each other; and what a sequence costs."""

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

from distill.batching.balance import ROW_COST, deal, fewest_rows, quadratic_cost
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
def test_every_sequence_is_dealt_once_within_the_limits(drawn, ranks, tokens, sequences, quadratic) -> None:
    limits = PackingConfig(len(drawn), sequences, tokens)
    rows = deal(dict(enumerate(drawn)), {i: n + quadratic * n * n for i, n in enumerate(drawn)}, ranks, limits)
    bins = [members for row in rows for members in row]
    assert sorted(i for members in bins for i in members) == list(range(len(drawn)))
    assert {len(row) for row in rows} == {ranks}
    for members in bins:
        assert sequences is None or len(members) <= sequences
        assert tokens is None or len(members) <= 1 or sum(drawn[i] for i in members) <= tokens
    assert all(any(row) for row in rows), "a row of dummies"


@settings(max_examples=150, deadline=None)
@given(TOKENS, st.integers(1, 5), st.sampled_from([60, 100]))
def test_rows_are_about_as_few_as_can_hold_the_tokens(drawn, ranks, tokens) -> None:
    """Two micro-batches of one rank, if never more than one could be half empty, hold more than one budget."""
    rows = deal(dict(enumerate(drawn)), dict(enumerate(map(float, drawn))), ranks, PackingConfig(40, None, tokens))
    assert math.ceil(sum(drawn) / tokens / ranks) <= len(rows) <= math.ceil((2 * sum(drawn) / tokens + 1) / ranks)


@pytest.mark.parametrize("tokens", [10, 1000])
def test_a_sequence_longer_than_the_budget_is_alone(tokens) -> None:
    lengths = {0: 500, 1: 5, 2: 5}
    rows = deal(lengths, {i: float(n) for i, n in lengths.items()}, 1, PackingConfig(8, None, tokens))
    assert ([0] in [members for row in rows for members in row]) == (tokens == 10)


def test_a_row_more_is_taken_only_where_it_saves_more_than_it_costs() -> None:
    """One row holds them as 6 + 6 and 4 + 4 + 4, which takes 4.5; two rows of 6 + 6 and 4, 4 and 4 take 2 + 1.5."""
    tokens = {0: 6, 1: 6, 2: 4, 3: 4, 4: 4}
    for unit, rows in ((0.9 * ROW_COST, 1), (1.1 * ROW_COST, 2)):
        cost = {0: unit, 1: unit, 2: 1.5 * unit, 3: 1.5 * unit, 4: 1.5 * unit}
        assert len(deal(tokens, cost, 2, PackingConfig(5, None, 12))) == rows


# ---- how long ranks wait ---------------------------------------------------------------------------------------------

HARD = Case(answers=512, cap=20_480, ranks=32, cp=1, budget=40_960)
TIGHT = Case(answers=256, cap=8192, ranks=32, cp=1, budget=8192)


@pytest.mark.parametrize("case", [HARD, TIGHT], ids=["twice the longest answer", "the longest answer"])
def test_costs_keep_ranks_in_step_where_tokens_do_not(case: Case) -> None:
    found = measure(case, seed=0)
    assert found.rows == found.fewest
    assert found.real >= 0.98
    assert found.lockstep >= 0.95 > found.by_tokens > found.in_order


def test_where_the_budget_forbids_95_percent_the_deal_is_near_what_is_possible() -> None:
    """Some ranks have one answer of 20k tokens, and the others no more tokens than that: they must wait."""
    found = measure(replace(HARD, budget=HARD.cap), seed=0)
    assert 0.99 * found.possible <= found.lockstep <= found.possible < 0.95


def test_a_case_that_misses_a_bound_fails_the_benchmark(monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench_packing, "CASES", [replace(TIGHT, answers=64, ranks=8)])
    monkeypatch.setattr("sys.argv", ["bench_packing", "--seeds", "2"])
    assert bench_packing.main() == 0 and "MISSED" not in capsys.readouterr().out
    monkeypatch.setattr(bench_packing, "deal", lambda tokens, cost, ranks, limits: _in_order(tokens, ranks, limits))
    assert bench_packing.main() == 1 and "MISSED by 2" in capsys.readouterr().out


def _in_order(tokens, ranks, limits) -> bench_packing.Rows:
    return bench_packing.deal_in_order(tokens, ranks, limits.tokens)


def test_dummies_and_what_fills_up_for_context_parallelism_are_not_real() -> None:
    rows = [[[0, 1], [2]], [[3], []]]
    tokens = {0: 3, 1: 4, 2: 8, 3: 5}
    assert bench_packing.computed(rows, tokens, cp=1) == 20 + 1
    assert bench_packing.computed(rows, tokens, cp=2) == 8 + 8 + 6 + 2


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
def test_no_deal_does_better_than_what_is_called_possible(drawn, ranks, budget) -> None:
    """The best of all partitions of a few sequences, and ours beside it."""
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
    rows = deal(tokens, cost, ranks, PackingConfig(len(drawn), None, budget))
    assert lockstep(rows, cost) <= bound + 1e-9
    assert len(rows) >= fewest_rows(tokens, ranks, PackingConfig(len(drawn), None, budget))


def test_the_table_has_the_promised_cases() -> None:
    sizes = {(case.answers, case.cap, case.ranks) for case in CASES}
    assert sizes == set(itertools.product((256, 512), (8192, 20_480), (8, 32)))
    assert {case.budget // case.cap for case in CASES} == {1, 2}


# ---- what a sequence costs -------------------------------------------------------------------------------------------


def any_config(folder: Path) -> Config:
    """A recipe; the models it names need not be there."""
    return config_for(folder, folder, "distillation.allow_degenerate=true")


def counted_flops(shape, tokens: int) -> int:
    """Of a forward over one sequence by transformers' own model; its attention is over all pairs."""
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="eager")
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2"])
def test_the_quadratic_cost_is_what_a_models_operators_do(tmp_path, family: str) -> None:
    """Two lengths give the FLOPs per n and per n^2; eager attention also does the half above the diagonal."""
    shape = tiny_config(family, tied=False, heads=8, kv_heads=4, hidden=96, layers=3)
    if family == "qwen2":
        del shape.head_dim  # its configurations name none
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


def test_qwen3_4b_spends_as_much_on_attention_as_on_all_else_at_27k_tokens() -> None:
    """36 layers, worked by hand: 294,912 FLOPs per n^2, 8,044,544,000 per n."""
    assert quadratic_cost(**bench_packing.QWEN3_4B) == QUADRATIC == pytest.approx(294_912 / 8_044_544_000)
    assert cost_of(27_277) == pytest.approx(2 * 27_277, rel=1e-4)
