"""Metrics by position: each token belongs to one tenth of its response."""

from __future__ import annotations

import pytest
import torch

from distill.batching.plan import pack
from distill.config import TokenWeightsConfig
from distill.metrics.step import Metrics
from distill.metrics.token_metrics import TokenMetrics, tenths
from distill.types import LossOutput, Problem, Prompt, Rollout


def test_a_token_belongs_to_the_tenth_that_contains_its_middle() -> None:
    """f is 1/8, 3/8, 5/8 and 7/8 in a response of four tokens, and 1/2 in a response of one token."""
    found = {n: tenths(torch.arange(n, dtype=torch.int32), torch.full((n,), n)).tolist() for n in (1, 4, 10, 20)}
    assert found == {1: [5], 4: [1, 3, 6, 8], 10: list(range(10)), 20: [i // 2 for i in range(20)]}
    assert int(tenths(torch.tensor([10**8 - 1]), torch.tensor([10**8]))) == 9


def test_metrics_by_position_omit_tokens_without_a_weight_and_off_policy_responses() -> None:
    prompt = Prompt(0, (1, 2), Problem("p"))
    ours = Rollout(prompt, 0, (5,) * 10, (-1.0,) * 10, "stop", 0)
    theirs = Rollout(prompt, 1, (6,) * 10, (), "stop", 0, off_policy=True)
    packed = pack([(0, ours), (1, theirs)], weights=TokenWeightsConfig(skip_first=1, first=4, position_slope=1))
    values = {"forward_kl": torch.tensor([1.0, 2.0, 4.0, 70.0, 80.0, 90.0]), "loss": torch.ones(6)}
    tokens, metrics = TokenMetrics(weighted=True), Metrics()
    for _ in range(2):
        tokens.add(LossOutput(torch.zeros(()), {}, packed, values))
    tokens.record(metrics)
    found = metrics.reduce()
    logged = {name: value for name, value in found.items() if value == value}
    assert logged == {
        "train/position/forward_kl_2": 1.0,
        "train/position/forward_kl_3": 2.0,
        "train/position/forward_kl_4": 4.0,
        "trained_tokens": 12,
        "mean_token_weight": pytest.approx((0.3 + 0.5 + 0.7) / 3),
    }
