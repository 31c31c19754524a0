"""Weights that depend on the models: hand-worked values for each formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from distill.config import LossConfig, SelectConfig, TokenWeightsConfig
from distill.loss.token_weights import ResponseRows, needed_values, needs_score_pass, token_weights


def _rows(lengths: list[int], weights: list[list[float]] | None = None, **values: list[list[float]]) -> ResponseRows:
    """Return responses of the given lengths in a matrix with the width of the longest; values are padded with 0."""
    width = max(lengths)

    def matrix(of_responses: list[list[float]]) -> torch.Tensor:
        return torch.tensor([each + [0.0] * (width - len(each)) for each in of_responses], dtype=torch.float64)

    read_BR = torch.arange(width) < torch.tensor(lengths)[:, None]
    weight_BR = read_BR.double() if weights is None else matrix(weights)
    sampler = values.pop("sampler", [[-1.0] * n for n in lengths])
    off_policy = torch.tensor(values.pop("off_policy", [[0.0]] * len(lengths))) != 0
    return ResponseRows(
        read_BR, weight_BR, off_policy.expand(-1, width), matrix(sampler), {n: matrix(v) for n, v in values.items()}
    )


def _found(weights: TokenWeightsConfig, rows: ResponseRows) -> list[Any]:
    return token_weights(weights, rows).tolist()


def _selecting(score: Any, share: float, **others: Any) -> TokenWeightsConfig:
    return TokenWeightsConfig(select=SelectConfig(score, share), **others)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.5, [[0, 1, 0, 1, 1], [1, 0, 0, 0, 0]]),  # 3 of 5, and 1 of 2
        (0.2, [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]),  # 1 of 5
        (0.61, [[1, 1, 0, 1, 1], [1, 1, 0, 0, 0]]),  # 4 of 5 (3.05, rounded up); of equal scores the earlier one
        (1.0, [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
    ],
)
def test_select_keeps_the_highest_scores_of_each_response(share: float, expected: list[Any]) -> None:
    rows = _rows([5, 2], student_entropy=[[0.5, 2.0, 0.5, 1.0, 1.5], [3.0, 3.0]])
    assert _found(_selecting("student_entropy", share), rows) == expected


@pytest.mark.parametrize(
    "weights",
    [
        TokenWeightsConfig(min_teacher_prob=0.1),
        TokenWeightsConfig(min_teacher_prob=0.1, normalize="sequences"),
        TokenWeightsConfig(prefix_importance=0.5),
        _selecting("student_entropy", 0.1),
        _selecting("soft_or", 0.1),
    ],
)
def test_a_value_of_nan_gives_the_weight_nan(weights: TokenWeightsConfig) -> None:
    """Without it, a comparison with nan would give the token the weight 0, and the run would continue."""
    values = {name: [[0.5, 0.4, 0.3, math.nan], [0.2, 0.1, 0.6]] for name in needed_values(weights)}
    nan, finite = _found(weights, _rows([4, 3], **values))
    assert math.isnan(nan[3]) and all(map(math.isfinite, finite))


def test_a_nan_at_a_token_without_position_weight_changes_nothing() -> None:
    rows = _rows([2], weights=[[0.0, 1.0]], teacher_logprob=[[math.nan, -0.1]])
    assert _found(TokenWeightsConfig(min_teacher_prob=0.1), rows) == [[0.0, 1.0]]


def test_select_counts_and_compares_only_tokens_with_a_position_weight() -> None:
    """Of three eligible tokens, ceil(1.5) = 2 are selected; the first token has the highest score, but no weight."""
    rows = _rows([4], weights=[[0.0, 0.5, 1.0, 1.5]], loss=[[9.0, 0.1, 0.3, 0.2]])
    assert _found(_selecting("divergence", 0.5), rows) == [[0, 0, 1.0, 1.5]]


def test_a_share_times_a_number_that_is_whole_is_not_rounded_up() -> None:
    rows = _rows([100], teacher_entropy=[[float(i) for i in range(100)]])
    assert 0.07 * 100 > 7
    assert sum(_found(_selecting("teacher_entropy", 0.07), rows)[0]) == 7


def test_soft_or_combines_scaled_entropy_and_divergence() -> None:
    """h = 0, 1/2, 1, 1/4 and d = 1/4, 1/2, 0, 1, so the scores are 1/4, 3/4, 1, 1; token 5 has no position weight."""
    rows = _rows(
        [5],
        weights=[[1.0, 1.0, 1.0, 1.0, 0.0]],
        student_entropy=[[1.0, 2.0, 3.0, 1.5, 99.0]],
        loss=[[0.5, 1.0, 0.0, 2.0, 99.0]],
    )
    assert _found(_selecting("soft_or", 0.75), rows) == [[0, 1, 1, 1, 0]]
    assert _found(_selecting("soft_or", 0.25), rows) == [[0, 0, 1, 0, 0]]
    equal = _rows([3], student_entropy=[[2.0, 2.0, 2.0]], loss=[[0.5, 0.5, 0.7]])
    assert _found(_selecting("soft_or", 0.3), equal) == [[0, 0, 1]], "equal entropies are scaled to 0"


def test_soft_or_selects_the_earlier_of_tokens_with_the_largest_divergence() -> None:
    """With the largest divergence the score is 1 for every entropy: rounding of the entropies has no influence."""
    entropies = [0.1 + 0.0137 * i for i in range(60)]
    rows = _rows([61], student_entropy=[[0.0, *entropies]], loss=[[0.0] + [2.0] * 60])
    expected = [0.0] + [1.0] * 30 + [0.0] * 30
    assert _found(_selecting("soft_or", 30 / 61), rows) == [expected]


def test_prefix_importance_of_hand_worked_responses() -> None:
    """|A| = 0.1, 0.3, 0, 0.6, so the ratios are 0, 0.1, 0.4, 0.4; of the second response 0; the third is off-policy."""
    rows = _rows(
        [4, 2, 2],
        sampler=[[-1.0, -1.0, -2.0, -1.0], [-3.0, -3.0], [float("nan")] * 2],
        teacher_logprob=[[-1.1, -0.7, -2.0, -1.6], [-3.0, -3.0], [-1.0, -2.0]],
        off_policy=[[0.0], [0.0], [1.0]],
    )
    found = _found(TokenWeightsConfig(prefix_importance=0.5), rows)
    assert found[0] == pytest.approx([1.5, 1.45, 1.3, 1.3])
    assert found[1] == [1.5, 1.5, 0, 0] and found[2] == [1, 1, 0, 0]


def test_prefix_importance_counts_tokens_that_are_read_without_a_weight() -> None:
    rows = _rows([2], weights=[[0.0, 2.0]], sampler=[[-1.0, -1.0]], teacher_logprob=[[-2.0, -4.0]])
    assert _found(TokenWeightsConfig(prefix_importance=1.0), rows) == [[0, 2 * (1 + 0.75)]]


def test_min_teacher_prob_omits_tokens_below_it_strictly() -> None:
    rows = _rows([3], teacher_logprob=[[float(torch.tensor(p).double().log()) for p in (0.25, 0.5, 0.75)]])
    assert _found(TokenWeightsConfig(min_teacher_prob=0.5), rows) == [[0, 1, 1]]


def test_factors_are_multiplied_and_sequences_divide_by_the_sum() -> None:
    """Selected are tokens 1 and 3; the prefix factors are 2, 1.75 and 1.5; no teacher probability is below 0.01."""
    rows = _rows(
        [3, 1],
        weights=[[0.5, 1.0, 1.5], [0.0]],
        sampler=[[-1.0, -1.0, -1.0], [-1.0]],
        teacher_logprob=[[-2.0, -2.0, -3.0], [-1.0]],
        student_entropy=[[3.0, 1.0, 2.0], [1.0]],
    )
    weights = _selecting("student_entropy", 0.5, prefix_importance=1.0, min_teacher_prob=0.01)
    assert _found(weights, rows) == [[1.0, 0, 1.5 * 1.5], [0, 0, 0]]
    by_sequence = _selecting("student_entropy", 0.5, prefix_importance=1.0, normalize="sequences")
    assert _found(by_sequence, rows) == [pytest.approx([1.0 / 3.25, 0, 2.25 / 3.25]), [0, 0, 0]]


def test_the_weights_of_a_response_do_not_depend_on_other_responses() -> None:
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.rand(3, 6, generator=generator, dtype=torch.float64)
        for name in ("student_entropy", "loss", "teacher_logprob")
    }
    read_BR = torch.arange(6) < torch.tensor([6, 3, 5])[:, None]
    sampler = torch.rand(3, 6, generator=generator, dtype=torch.float64)
    off_policy = torch.zeros(3, 6, dtype=torch.bool)
    weights = _selecting("soft_or", 0.5, prefix_importance=0.5, normalize="sequences")
    found = token_weights(weights, ResponseRows(read_BR, read_BR.double(), off_policy, sampler, values))
    for i, n in enumerate((6, 3, 5)):
        alone = ResponseRows(
            read_BR[i : i + 1, :n],
            read_BR[i : i + 1, :n].double(),
            off_policy[i : i + 1, :n],
            sampler[i : i + 1, :n],
            {name: value[i : i + 1, :n] for name, value in values.items()},
        )
        assert torch.equal(token_weights(weights, alone)[0], found[i, :n])


@pytest.mark.parametrize(
    ("weights", "names", "with_topk"),
    [
        (TokenWeightsConfig(skip_first=3), (), False),
        (_selecting("teacher_entropy", 0.5, min_teacher_prob=0.1), ("teacher_entropy", "teacher_logprob"), False),
        (TokenWeightsConfig(prefix_importance=0.5), ("teacher_logprob",), False),
        (_selecting("student_entropy", 0.5), ("student_entropy",), True),
        (_selecting("soft_or", 0.5), ("student_entropy", "loss"), True),
    ],
)
def test_only_scores_of_the_student_need_a_second_pass(weights: Any, names: Any, with_topk: bool) -> None:
    assert needed_values(weights) == names
    loss = LossConfig(token_weights=weights)
    assert needs_score_pass(loss, 64) == with_topk
    assert needs_score_pass(loss, 0) == bool(names), "without a top-k, the teacher's values are computed in the loss"
