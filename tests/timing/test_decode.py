"""The cost of decoding on one engine: hand-worked numbers, counted FLOPs and bytes, and a twin per token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from distill.batching.flops import ModelFlops
from distill.config.gpus import Gpu
from distill.memory.shapes import shape_of
from distill.timing.decode import ALL_REDUCE_S, DecodeCost, decode_cost
from distill.timing.lengths import Lengths
from distill.timing.passes import flops_of_shape
from distill.timing.rates import Rates, rates_of_gpu
from tests.helpers import tiny_config

READ = DecodeCost(1.0, 0.5, 2.0, 0.25, 0.0, 0.0, 3.0, 0.5)
"""A cost with simple numbers, in which a step never waits for arithmetic."""
UNIT = Rates("unit", 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0)
"""One FLOP and one byte per second, so a cost is a number of FLOPs or bytes."""


def test_a_decode_step_reads_the_weights_and_the_cache_or_computes() -> None:
    assert READ.step(4, 100) == 1 + 0.5 * 4 + 2 + 0.25 * 100
    computing = DecodeCost(1.0, 0.5, 2.0, 0.25, 10.0, 0.125, 0.0, 0.0)
    assert computing.step(4, 100) == 1 + 0.5 * 4 + 10 * 4 + 0.125 * 100


def test_two_responses_of_two_and_five_tokens_take_the_hand_worked_time() -> None:
    """Contexts 10 and 20: two steps with both, then three with the longer one."""
    both = (1 + 0.5 * 2 + 2 + 0.25 * 30) + (1 + 0.5 * 2 + 2 + 0.25 * 32)
    alone = sum(1 + 0.5 + 2 + 0.25 * (22 + k) for k in range(3))
    ends, seconds = READ.decode(np.array([20, 10]), np.array([5, 2]))
    assert ends.tolist() == [2, 5] and seconds.tolist() == [both, both + alone]
    assert READ.seconds(np.array([20, 10]), np.array([5, 2])) == both + alone
    assert READ.seconds(np.zeros(0, np.int64), np.zeros(0, np.int64)) == 0


def test_decoding_is_the_sum_over_its_steps() -> None:
    """The sum per token is the twin of the sum per interval between two ends."""
    rng = np.random.default_rng(0)
    context, new = rng.integers(0, 50, 40), rng.integers(1, 30, 40)
    seconds = 0.0
    for k in range(new.max()):
        running = new > k
        seconds += float(READ.step(running.sum(), (context + k)[running].sum()))
    assert READ.seconds(context, new) == pytest.approx(seconds)


def test_a_prompt_costs_its_tokens_and_pairs_and_cached_tokens_only_pairs() -> None:
    assert READ.prefill(np.array([4, 2])) == 3 * 6 + 0.5 * (8 + 2)
    assert READ.prefill(np.array([4]), before=10) == 3 * 4 + 0.5 * (40 + 8)


def counted(model: Any, ids: torch.Tensor, **options: Any) -> tuple[int, Any]:
    """FLOPs of a forward over ``ids``, and its output."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = model(input_ids=ids, **options)
    return counter.get_total_flops(), output


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_prefill_and_decode_have_the_counted_flops(family: str) -> None:
    """Eager attention computes all n^2 pairs of a prompt, twice the causal ones; a decode step has n + 1 pairs."""
    config = tiny_config(family, tied=False, heads=8, kv_heads=4, hidden=96, layers=3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    cost = decode_cost(flops_of_shape(shape_of(config, family)), 1, UNIT, itemsize=2)
    head = 2 * 96 * config.vocab_size
    flops, output = counted(model, torch.zeros(1, 24, dtype=torch.int64), use_cache=True)
    assert flops == 24 * (cost.prefill_token + head) + cost.prefill_pair * 24**2
    step, _ = counted(model, torch.zeros(1, 1, dtype=torch.int64), past_key_values=output.past_key_values)
    assert step == cost.flops_sequence + cost.flops_context * 25


@pytest.mark.parametrize("tied", [True, False])
def test_a_decode_step_reads_the_bytes_of_the_weights_and_of_the_cache(tied: bool) -> None:
    config = tiny_config("qwen3", tied=tied)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.bfloat16)
    shape = shape_of(config, "tiny")
    read = shape.parameters - (shape.embedding if shape.head else 0)
    cost = decode_cost(flops_of_shape(shape), read, UNIT, itemsize=2)
    embedding = model.get_input_embeddings().weight
    weights = sum(p.nbytes for p in model.parameters() if tied or p is not embedding)
    cache = model(input_ids=torch.zeros(1, 7, dtype=torch.int64), use_cache=True).past_key_values
    assert cost.weights == weights
    assert 7 * cost.context == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_the_ranks_of_an_engine_share_weights_heads_and_arithmetic() -> None:
    flops = ModelFlops(hidden=8, layers=3, heads=4, kv_heads=2, head_dim=4, intermediate=16, vocab=32)
    one, two, four = (decode_cost(flops, 1000, UNIT, 2, tp) for tp in (1, 2, 4))
    assert (one.weights, two.weights, four.weights) == (2000, 1000, 500)
    assert two.context == one.context / 2 and four.context == two.context  # two heads on four ranks
    assert (two.flops_sequence, four.flops_sequence) == (one.flops_sequence / 2, one.flops_sequence / 4)
    assert one.fixed == 0 and two.fixed == four.fixed == 2 * 3 * ALL_REDUCE_S
    assert two.sequence == 2 * 3 * 8 * 2 * 1  # an all-reduce over two ranks moves its bytes once


def test_rates_of_a_gpu_are_fractions_of_its_peaks() -> None:
    rates = rates_of_gpu(Gpu("x", 100, 1000, 80, 200, 10, "X"))
    assert rates.matmul == pytest.approx(63e12) and rates.memory == pytest.approx(850e9)
    assert rates.attention_backward < rates.attention_forward < rates.matmul
    assert rates_of_gpu(Gpu("x", 100, 1000, 80, 200, 10, "X"), itemsize=4).matmul == pytest.approx(63e12 / 16)


def test_lengths_have_the_given_percentiles_and_limits() -> None:
    lengths = Lengths.of_percentiles(100, 300, 10_000)
    drawn = lengths.draw(200_000, np.random.default_rng(0))
    assert np.quantile(drawn, [0.5, 0.9]) == pytest.approx([100, 300], rel=0.02)
    assert lengths.mean == pytest.approx(drawn.mean(), rel=0.02)
    assert Lengths.of_percentiles(100, 300, 150).quantiles.max() == 150
    assert Lengths.of_percentiles(1, 1, 5).mean == 1
    assert (lengths.draw(9, np.random.default_rng(1)) == lengths.draw(9, np.random.default_rng(1))).all()
