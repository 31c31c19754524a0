"""FLOPs of a step, and their relation to the peak of the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distill.batching.flops import ModelFlops
from distill.config import TokenWeightsConfig
from distill.config.gpus import GPUS
from distill.metrics.utilization import Utilization, device_peak, peak_flops
from distill.types import Problem, Prompt, Rollout

TINY = ModelFlops(hidden=4, layers=2, heads=2, kv_heads=1, head_dim=3, intermediate=5, vocab=7)
TOKEN = 2 * (2 * 4 * 6 * 2 + 2 * 4 * 3 * 2 + 3 * 2 * 4 * 5)  # q and o, k and v, MLP of two layers
HEAD, PAIR = 2 * 4 * 7, 2 * 2 * 2 * 2 * 3  # PAIR: score and weighted value, two heads of three channels, two layers


def rollouts(*shapes: tuple[int, int]) -> list[Rollout]:
    """Rollouts with (number of prompt tokens, number of response tokens); equal numbers are equal prompts."""
    made = [(Prompt(prompt, (1,) * prompt, Problem("?")), response) for prompt, response in shapes]
    return [Rollout(prompt, i, (1,) * n, (-0.5,) * n, "stop", 0) for i, (prompt, n) in enumerate(made)]


def test_flops_of_training_match_a_hand_count() -> None:
    one = TOKEN * 8 + HEAD * 2 + PAIR * 8 * 8 / 2  # 6 prompt and 2 response tokens
    assert TINY.training(rollouts((6, 2)), share_prefixes=True) == 3 * one
    prompt = TOKEN * 6 + PAIR * 6 * 6 / 2
    assert TINY.training(rollouts((6, 2), (6, 2)), share_prefixes=False) == 6 * one
    assert TINY.training(rollouts((6, 2), (6, 2)), share_prefixes=True) == 3 * (2 * one - prompt)


def test_flops_of_training_adapters_have_no_gradients_of_frozen_weights() -> None:
    adapters = 2 * 3 * (4 + 6)  # one adapter of rank 3 for a layer with 4 inputs and 6 outputs
    body, head, pairs = TOKEN * 8, HEAD * 2, PAIR * 8 * 8 / 2
    lora = replace(TINY, adapters=adapters)
    assert lora.training(rollouts((6, 2)), share_prefixes=True) == 2 * (body + head) + 3 * (pairs + adapters * 8)
    shared = lora.training(rollouts((6, 2), (6, 2)), share_prefixes=True)
    prompt = 2 * TOKEN * 6 + 3 * (PAIR * 6 * 6 / 2 + adapters * 6)
    assert shared == 2 * lora.training(rollouts((6, 2)), share_prefixes=True) - prompt
    # The cost of a long sequence: all terms of a token, and those of its square.
    assert lora.quadratic == pytest.approx(3 * PAIR / 2 / (2 * (TOKEN + HEAD) + 3 * adapters))
    assert TINY.quadratic == pytest.approx(PAIR / 2 / (TOKEN + HEAD))


def test_a_layer_with_a_window_has_at_most_window_pairs_per_token() -> None:
    windowed = ModelFlops(
        hidden=4, layers=2, heads=2, kv_heads=1, head_dim=3, intermediate=5, vocab=7, windowed=1, window=2
    )
    assert TINY.forward(0, 8, 0) - windowed.forward(0, 8, 0) == PAIR / 2 * (8 * 8 / 2 - 8 * 2)
    assert TINY.forward(0, 3, 0) == windowed.forward(0, 3, 0)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_follows_from_the_name_of_the_gpu(name: str, tflops: float | None) -> None:
    assert peak_flops(name, torch.bfloat16) == (None if tflops is None else tflops * 1e12)
    assert peak_flops(name, torch.float32) is None and device_peak(torch.device("cpu"), torch.bfloat16) is None
    assert all(peak_flops(f"NVIDIA {gpu.words}", torch.float16) == gpu.tflops * 1e12 for gpu in GPUS)


def test_mfu_is_the_fraction_of_the_peak_in_the_training_phase() -> None:
    made = rollouts((6, 2))
    flops = TINY.training(made, share_prefixes=True)
    values = {"timing/train/policy_training": 2.0}
    known = Utilization(TINY, True, ranks=4, peak=flops).metrics(values, made)
    tflops = {"throughput/training_tflop": flops / 1e12, "throughput/training_tflops_per_gpu": flops / 8e12}
    assert known == {name: pytest.approx(value) for name, value in tflops.items()} | {"throughput/mfu": 0.125}
    assert Utilization(TINY, True, 4, None).metrics(values, made).keys() == tflops.keys()
    assert (
        Utilization(TINY, True, 4, 1.0).metrics({}, made) == Utilization(TINY, True, 4, 1.0).metrics(values, []) == {}
    )


def test_flops_count_the_tokens_that_are_read_and_the_rows_with_a_weight() -> None:
    """Of two responses to a prompt of six tokens, the second has no token with a weight."""
    made = rollouts((6, 10), (6, 2))
    weights = TokenWeightsConfig(skip_first=2, first=4)
    values = {"timing/train/policy_training": 1.0, "train/trained_tokens": 2.0}
    body = TOKEN * 10 + PAIR * 10 * 10 / 2
    for scores, head in ((False, 3 * 2), (True, 3 * 2 + 4)):
        found = Utilization(TINY, True, 1, None, weights, scores).metrics(values, made)
        assert found["throughput/training_tflop"] * 1e12 == pytest.approx(3 * body + head * HEAD)
