"""Statistics of responses: quantiles of lengths, and responses that end in a loop."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pytest

from distill.metrics.responses import WatchedWords, ends_in_a_loop, length_quantiles, repeated_tokens
from distill.metrics.step import Metrics, add_rollouts
from distill.types import Problem, Prompt, Rollout


def rollout(ids: list[int], finish: Literal["stop", "length"] = "length") -> Rollout:
    return Rollout(Prompt(0, (5,), Problem("?")), 0, tuple(ids), (), finish, 0)


def test_quantiles_of_lengths_match_a_hand_calculation() -> None:
    """Lengths 1 to 5: the 10% quantile is 0.1 * 4 = 0.4 tokens above the lowest, the 90% quantile 0.4 below 5."""
    assert length_quantiles([1, 4, 2, 5, 3]) == {
        "p10_gen_tokens_per_sample": pytest.approx(1.4),
        "p50_gen_tokens_per_sample": 3.0,
        "p90_gen_tokens_per_sample": pytest.approx(4.6),
        "p99_gen_tokens_per_sample": pytest.approx(4.96),
    }
    assert length_quantiles([]) == {}


def test_the_repetition_rate_is_a_fraction_of_all_own_responses() -> None:
    metrics = Metrics()
    add_rollouts(metrics, [rollout([7] * 64), rollout([7] * 63)])
    add_rollouts(metrics, [rollout([7] * 63), replace(rollout([7] * 64), off_policy=True)])
    assert metrics.reduce()["repetition_rate"] == pytest.approx(1 / 3)


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


def plainly_repeated(ids: list[int]) -> int:
    """Number of tokens in 8-grams that occur at least twice, found by comparison of all pairs."""
    grams = [tuple(ids[i : i + 8]) for i in range(len(ids) - 7)]
    inside = {i + j for i, gram in enumerate(grams) if grams.count(gram) > 1 for j in range(8)}
    return len(inside)


@pytest.mark.parametrize(
    ("ids", "count"),
    [
        ([], 0),
        ([7] * 8, 0),  # one 8-gram
        ([7] * 9, 9),  # two overlapping 8-grams
        ([*range(8), *range(8)], 16),
        ([*range(8), 99, *range(8)], 16),
        ([*range(7), 99, *range(7)], 0),  # only 7 equal tokens
        ([*range(10), 99, *range(1, 10), 98], 18),  # the tokens 1 to 9, twice; not 0, 98 and 99
        ([*range(8), *range(50, 60), *range(8), *range(60, 70), *range(8)], 24),
        ([*range(200)], 0),
    ],
)
def test_tokens_of_repeated_8_grams_match_a_hand_count(ids, count) -> None:
    assert repeated_tokens(ids) == count == plainly_repeated(ids)


def test_repeated_tokens_equal_those_of_a_comparison_of_all_pairs() -> None:
    draw = random.Random(0)
    for vocabulary in (1, 2, 3, 200_000):
        for length in (5, 9, 60, 200):
            ids = [draw.randrange(vocabulary) for _ in range(length)]
            ids += ids[: length // 3]
            assert repeated_tokens(ids) == plainly_repeated(ids), (vocabulary, length)


def test_metrics_of_responses_do_not_count_responses_from_the_dataset() -> None:
    own, given = rollout([1, 2]), replace(rollout([7] * 70, "stop"), off_policy=True)
    metrics = Metrics()
    add_rollouts(metrics, [own, given])
    found = metrics.reduce()
    assert (found["mean_gen_tokens_per_sample"], found["repeated_token_share"], found["truncation_rate"]) == (2, 0, 1)
    assert found["repetition_rate"] == 0
    assert (found["generated_tokens"], found["total_num_tokens"]) == (2, 1 + 2 + 1 + 70)
    metrics = Metrics()
    add_rollouts(metrics, [given])
    assert metrics.reduce() == {"generated_tokens": 0, "total_num_tokens": 1 + 70}, "no mean without a value"


TEXTS: dict[Sequence[int], str] = {
    (1,): "Wait, wait! Awaiting... WAIT_ wait",
    (2,): "let  me\ncheck: 等等等 e.g. this",
    (3, 3): "let me checkout",
}


def test_watched_words_are_counted_per_1000_tokens_as_complete_words_in_any_case() -> None:
    """Of 4 tokens: 3 times wait, once "let me check", once 等等 (matches do not overlap), once e.g."""
    words = WatchedWords(["wait", "let me check", "等等", "e.g."], TEXTS.__getitem__)
    stats = words.stats([rollout(list(ids)) for ids in TEXTS])
    assert {name: total / count for name, (total, count) in stats.items()} == {
        "train/watched_words": 1500.0,
        "train/watched_words/wait": 750.0,
        "train/watched_words/let me check": 250.0,
        "train/watched_words/等等": 250.0,
        "train/watched_words/e.g.": 250.0,
    }


def test_responses_are_decoded_only_if_words_are_watched() -> None:
    assert WatchedWords([], TEXTS.__getitem__).stats([rollout([1])]) == {}
    assert WatchedWords(["a"], TEXTS.__getitem__).stats([replace(rollout([1]), off_policy=True)]) == {}
