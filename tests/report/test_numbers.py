"""Statistics of the page against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from distill.report.numbers import (
    Positions,
    bin_edges,
    gap_closed,
    gap_closed_stderr,
    ks_of,
    mean_stderr,
    paired_difference,
    pass_at,
    pass_at_k,
    quantile,
    total_mean,
)


@pytest.mark.parametrize(
    ("n", "right", "k", "expected"),
    [
        (4, 1, 2, 0.5),  # 3 of the 6 pairs contain the right response
        (5, 2, 3, 0.9),  # 1 of the 10 triples has no right response
        (4, 0, 2, 0.0),
        (4, 3, 2, 1.0),  # every pair has a right response
        (3, 1, 1, 1 / 3),
    ],
)
def test_pass_at_k_is_the_fraction_of_subsets_with_a_right_response(
    n: int, right: int, k: int, expected: float
) -> None:
    assert pass_at_k(n, right, k) == pytest.approx(expected)


def test_pass_at_k_excludes_problems_with_fewer_responses_and_takes_problems_as_the_sample() -> None:
    verdicts = [[True, False, False, False], [False] * 4, [True] * 4, [True]]
    mean, stderr = pass_at(verdicts, 2) or (0.0, None)
    # problems 1/2, 0, 1: mean 1/2, standard deviation 1/2
    assert mean == pytest.approx(0.5) and stderr == pytest.approx(0.5 / math.sqrt(3))
    assert pass_at(verdicts, 5) is None


def test_ks_are_powers_of_two_and_the_number_of_responses() -> None:
    assert ks_of([[True] * 6, [True]]) == [2, 4, 6]
    assert ks_of([[True] * 8]) == [2, 4, 8]
    assert ks_of([[True]]) == ks_of([]) == []


def test_a_few_repeated_problems_give_no_further_k() -> None:
    assert ks_of([[True] * 8, *[[True] * 4] * 3]) == [2, 4] and ks_of([[True] * 2, [True], [True]]) == []


def test_the_standard_error_of_one_problem_is_unknown() -> None:
    assert mean_stderr([0.3]) == (0.3, None)


def test_the_mean_over_tokens_weighs_problems_by_their_tokens() -> None:
    # mean (2 + 4) / (1 + 3) = 1.5; contributions (2 - 1.5) / 4 and (4 - 4.5) / 4
    assert total_mean({"a": (2.0, 1), "b": (4.0, 3)}) == pytest.approx((1.5, 0.25))
    assert total_mean({"a": (2.0, 4)}) == (0.5, None) and total_mean({"a": (0.0, 0)}) is total_mean({}) is None


def test_the_standard_error_of_equal_weights_is_that_of_the_mean() -> None:
    values = [0.1, 0.4, 0.2, 0.9]
    expected = mean_stderr(values)
    assert total_mean({str(i): (3 * value, 3) for i, value in enumerate(values)}) == pytest.approx(expected)


def test_a_paired_difference_uses_common_problems_and_the_error_of_the_differences() -> None:
    first = {"a": (0.0, 2), "b": (1.0, 2), "c": (2.0, 2), "only first": (2.0, 2), "empty": (0.0, 0)}
    second = {"a": (0.5, 1), "b": (1.0, 1), "c": (1.0, 1), "only second": (0.0, 1), "empty": (1.0, 1)}
    (mean, stderr), problems = paired_difference(first, second) or ((0.0, None), 0)
    # differences 1/2, 1/2, 0: mean 1/3, variance 1/12
    assert problems == 3 and mean == pytest.approx(1 / 3) and stderr == pytest.approx(math.sqrt(1 / 12 / 3))
    assert paired_difference(first, {"other": (1.0, 1)}) is None


def test_a_paired_difference_is_the_difference_of_the_means_over_tokens() -> None:
    first, second = {"a": (1.0, 10), "b": (8.0, 10)}, {"a": (1.0, 2), "b": (8.0, 30)}
    (mean, _), _ = paired_difference(first, second) or ((0.0, None), 0)
    assert mean == pytest.approx(9 / 32 - 9 / 20)


def test_the_error_of_the_closed_gap_is_that_of_a_ratio_over_pairs() -> None:
    before = {"a": (2.0, 1), "b": (4.0, 1)}
    assert gap_closed_stderr(before, {"a": (1.0, 1), "b": (2.0, 1)}) == pytest.approx(0.0), "each KL is halved"
    # means 3 and 1; contributions of a: (1/2)/3 - 1 * (-1/2)/9 = 2/9, of b: -2/9
    assert gap_closed_stderr(before, {"a": (2.0, 1), "b": (0.0, 1)}) == pytest.approx(math.sqrt(2 * 2 * (2 / 9) ** 2))
    assert gap_closed_stderr(before, {"a": (1.0, 1)}) is None


def test_the_closed_gap_is_the_removed_fraction_of_the_kl() -> None:
    assert gap_closed(0.4, 0.1) == pytest.approx(0.75) and gap_closed(0.1, 0.2) == pytest.approx(-1.0)
    assert gap_closed(None, 0.1) is gap_closed(0.0, 0.1) is gap_closed(0.4, None) is None


def test_quantiles_interpolate_between_order_statistics() -> None:
    assert quantile([30, 10, 20], 0.5) == 20 and quantile([10, 20], 0.25) == 12.5 and quantile([7], 0.9) == 7


def test_positions_have_bins_that_double() -> None:
    positions = Positions()
    positions.add([1.0, 2.0, 3.0, 4.0, 5.0])
    positions.add([3.0])
    assert [bin_edges(i) for i in range(4)] == [(0, 1), (1, 2), (2, 4), (4, 8)]
    assert positions.means(5) == [2.0, 2.0, 3.5, 5.0, None] and positions.counts == [2, 1, 2, 1]
    positions.add([None, 4.0])
    assert positions.means(2) == [2.0, 3.0] and positions.counts == [2, 2, 2, 1]
