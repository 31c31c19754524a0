"""Statistics of responses: quantiles of lengths, and responses that end in a loop."""

from __future__ import annotations

from typing import Literal

import pytest

from distill.metrics.responses import ends_in_a_loop, response_metrics
from distill.types import Problem, Prompt, Rollout


def rollout(ids: list[int], finish: Literal["stop", "length"] = "length") -> Rollout:
    return Rollout(Prompt(0, (5,), Problem("?")), 0, tuple(ids), (), finish, 0)


def test_quantiles_of_lengths_match_a_hand_calculation() -> None:
    """Lengths 1 to 5: the 10% quantile is 0.1 * 4 = 0.4 tokens above the lowest, the 90% quantile 0.4 below 5."""
    found = response_metrics([rollout([1] * length) for length in (1, 4, 2, 5, 3)])
    assert found == {
        "p10_gen_tokens_per_sample": pytest.approx(1.4),
        "p50_gen_tokens_per_sample": 3.0,
        "p90_gen_tokens_per_sample": pytest.approx(4.6),
        "repetition_rate": 0.0,
    }
    assert response_metrics([]) == {}
    assert response_metrics([rollout([7] * 64), rollout([7] * 63)])["repetition_rate"] == 0.5


@pytest.mark.parametrize(
    ("ids", "finish", "loops"),
    [
        ([7] * 64, "length", True),
        ([7] * 63, "length", False),  # too short
        ([7] * 64 + [2], "stop", True),  # the stop token does not count
        ([7] * 64 + [2], "length", False),
        ([*range(100), *[1, 2, 3] * 21, 1], "length", True),
        ([*range(100), *range(32), *range(32)], "length", True),
        ([*range(100), *range(33), *range(31)], "length", False),  # a period of 33 tokens
        ([*[1, 2] * 50, 9, *[1, 2] * 31], "length", False),  # interrupted within the last 64 tokens
        (list(range(200)), "length", False),
    ],
)
def test_a_response_loops_if_its_last_64_tokens_repeat_at_most_32(ids, finish, loops) -> None:
    assert ends_in_a_loop(rollout(ids, finish)) is loops
