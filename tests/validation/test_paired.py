"""pass@k, and the change of the accuracy since the first validation, against hand-worked numbers."""

from __future__ import annotations

import json
import math
from itertools import combinations
from typing import Any

import pytest

from distill.types import Problem, Prompt, Rollout
from distill.validation.paired import accuracy_change, grades
from distill.validation.scores import Sample, scores


def samples(*verdicts: str, texts: str = "abcdefgh") -> list[Sample]:
    """One problem for each text of "+" (right), "-" (wrong) and "?" (not graded) responses."""
    names: dict[str, Any] = {"+": "right", "-": "wrong", "?": None}
    prompts = [Prompt(i, (7,), Problem(text, "5", "set")) for i, text in zip(range(len(verdicts)), texts, strict=False)]
    return [
        Sample(Rollout(prompt, i, (1,), (), "stop", 0), "set", names[verdict])
        for prompt, each in zip(prompts, verdicts, strict=True)
        for i, verdict in enumerate(each)
    ]


def test_pass_at_k_is_the_mean_over_problems_of_the_chance_that_one_of_k_is_right() -> None:
    """4 responses each, with 1, 0 and 2 right: pass@2 is 1/2, 0 and 5/6, pass@4 is 1, 0 and 1."""
    found = scores(samples("+---", "----", "-+-+"))
    assert found["accuracy"] == pytest.approx(0.25)
    assert found["pass@2"] == pytest.approx((1 / 2 + 5 / 6) / 3) and found["pass@4"] == pytest.approx(2 / 3)
    deviation = math.sqrt(sum((value - 4 / 9) ** 2 for value in (1 / 2, 0, 5 / 6)) / 2)
    assert found["pass@2_stderr"] == pytest.approx(deviation / math.sqrt(3))
    assert "pass@1" not in found and "pass@3" not in found and "pass@8" not in found


def test_pass_at_k_equals_the_share_of_subsets_with_a_right_response() -> None:
    verdicts = ("+-+--", "-----", "++++-")
    found = scores(samples(*verdicts))
    for k in (2, 4, 5):
        shares = [sum("+" in subset for subset in combinations(each, k)) / math.comb(len(each), k) for each in verdicts]
        assert found[f"pass@{k}"] == pytest.approx(sum(shares) / 3), k


def test_pass_at_k_leaves_out_problems_with_fewer_responses() -> None:
    found = scores(samples("+", "+-", "--", "?"))
    assert found["pass@2"] == 0.5 and found["pass@2_stderr"] == pytest.approx(0.5)
    assert not [name for name in scores(samples("+", "-")) if name.startswith("pass@")]
    assert not [name for name in scores(samples("?", "?")) if name.startswith("pass@")]


def test_the_standard_error_of_the_accuracy_is_that_of_the_means_of_problems() -> None:
    """Means 1, 0.5, 0, 0.5: standard deviation 0.40825, over sqrt(4). By responses, it would be 0.1890."""
    found = scores(samples("++", "+-", "--", "-+"))
    assert found["accuracy_stderr"] == pytest.approx(0.4082483 / 2)


def test_the_change_of_the_accuracy_is_paired_by_problem() -> None:
    """Differences by problem: -0.5, 0, -0.5, 0: mean -0.25, standard deviation 0.288675, over sqrt(4).

    Without pairs the standard error would be 0.25 to 0.29.
    """
    first = grades(samples("++", "++", "+-", "--"), 0)
    now = grades(samples("+-", "++", "--", "--"), 20)
    assert accuracy_change(json.loads(json.dumps(first)), now) == {
        "validation/accuracy_change": pytest.approx(-0.25),
        "validation/accuracy_change_stderr": pytest.approx(0.2886751 / 2),
        "validation/accuracy_change_num_problems": 4.0,
    }
    assert accuracy_change(first, first) == {} and accuracy_change(None, now) == {} == accuracy_change(first, None)


def test_one_common_problem_has_a_change_without_a_standard_error() -> None:
    first, now = grades(samples("+", "?"), 0), grades(samples("-", "+"), 5)
    assert accuracy_change(first, now) == {
        "validation/accuracy_change": -1.0,
        "validation/accuracy_change_num_problems": 1.0,
    }
    assert grades(samples("?"), 0) is None and accuracy_change(grades(samples("?", "+"), 0), first) == {}


def test_repeats_of_a_problem_are_one_pair() -> None:
    first, now = grades(samples("+", "+", "-", texts="aab"), 0), grades(samples("-", "+", "-", texts="aab"), 5)
    assert first == {"step": 0, "problems": {"0": [2, 2], "2": [0, 1]}}
    values = accuracy_change(first, now)
    assert values["validation/accuracy_change"] == pytest.approx(-1 / 3)
