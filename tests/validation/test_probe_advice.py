"""The recommendation of a probe, and its results as text, JSON and metrics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from distill.validation.comparison import Comparison
from distill.validation.probe_advice import Lengths, problems_wanted, recommend, rollout_length
from distill.validation.probe_report import as_json, as_metrics, as_text
from distill.validation.probe_stats import STARTS, CandidateResult, Cell, Estimate, by_position

LENGTHS = Lengths(p90=1000, max_new_tokens=2048, val_max_new_tokens=4096)


def measured(
    name: str, differences: Sequence[float], stderr: float | None = 0.02, trend: Any = (0.0, 0.01), problems: int = 100
) -> CandidateResult:
    """A candidate with these differences at the starts, and a student with an accuracy of 0.3."""
    cells = tuple(
        Cell(s, problems, problems, Estimate(0.3 + d, 0.05), Estimate(0.3, 0.05), Estimate(d, stderr), 0, 0, 9, 9)
        for s, d in zip(STARTS, differences, strict=True)
    )
    return CandidateResult(name, "context", cells, Estimate(*trend), lines=(f"context={name}",))


def test_the_better_candidate_with_the_largest_gain_is_recommended() -> None:
    """It repairs until 30%: 0.05 exceeds two standard errors, 0.04 does not; so 30% of 1000 tokens are enough."""
    falling = measured("b", [0.25, 0.2, 0.05, 0.04, 0.0], trend=(0.2, 0.05))
    found = recommend([measured("a", [0.2] * 5), falling, measured("c", [-0.1] * 5)], LENGTHS)
    assert (found.decision, found.candidate, found.gain, found.gain_stderr) == ("use", "b", 0.25, 0.02)
    assert (found.repairs_until, found.max_new_tokens, found.weights) == (30, 300, "first")
    length = ["policy.generation.max_new_tokens=300", "policy.generation.val_max_new_tokens=4096"]
    assert found.lines == ("context=b", *length), "responses of 300 tokens need no weight for the first 300"


def test_a_candidate_repairs_until_the_first_start_that_is_not_significant() -> None:
    for differences, until in (([0.2, 0.0, 0.2, 0.2, 0.2], 0), ([0.2, 0.2, 0.05, 0.04, 0.1], 30), ([0.2] * 5, 90)):
        assert recommend([measured("a", differences)], LENGTHS).repairs_until == until
    gap = measured("a", [0.2] * 5)
    gap = replace(gap, cells=tuple(cell for cell in gap.cells if cell.start != 30))
    assert recommend([gap], LENGTHS).repairs_until == 10, "a start without a graded pair is not significant"


def test_responses_are_not_cut_if_late_tokens_teach_most() -> None:
    found = recommend([measured("a", [0.1, 0.0, 0.0, 0.4, 0.4], trend=(-0.3, 0.05))], LENGTHS)
    assert (found.repairs_until, found.max_new_tokens, found.weights) == (0, 2048, "position_sigmoid")
    assert not any("max_new_tokens" in line for line in found.lines)


def test_the_gain_of_several_candidates_is_called_biased() -> None:
    one, other = measured("a", [0.2] * 5), measured("b", [0.1] * 5)
    assert ["biased" in recommend(found, LENGTHS).sentences[1] for found in ([one], [one, other])] == [False, True]


def test_a_candidate_that_repairs_at_the_last_start_keeps_the_length() -> None:
    found = recommend([measured("a", [0.2, 0.2, 0.2, 0.2, 0.1])], LENGTHS)
    assert (found.repairs_until, found.max_new_tokens, found.weights) == (90, 2048, "none")
    assert found.lines == ("context=a",)


@pytest.mark.parametrize(
    ("differences", "trend", "weights", "line"),
    [
        ([0.2, 0.2, 0.2, 0.1, 0.0], (0.15, 0.05), "position_slope", "position_slope=-0.5"),
        ([0.2, 0.2, 0.3, 0.4, 0.4], (-0.2, 0.05), "position_sigmoid", "normalize=sequences"),
        ([0.2, 0.2, 0.0, 0.0, 0.0], (0.2, 0.05), "first", "val_max_new_tokens=4096"),
        ([0.2, 0.2, 0.2, 0.2, 0.0], (0.1, 0.05), "none", "val_max_new_tokens=4096"),
    ],
)
def test_position_weights_follow_a_significant_trend_of_the_difference(differences, trend, weights, line) -> None:
    found = recommend([measured("a", differences, trend=trend)], LENGTHS)
    assert found.weights == weights and found.lines[-1].endswith(line)


def test_the_rollout_length_has_a_minimum_and_the_recipes_maximum() -> None:
    assert [rollout_length(until, LENGTHS) for until in STARTS] == [100, 100, 300, 600, 2048]
    assert rollout_length(0, replace(LENGTHS, p90=50)) == 32 and rollout_length(10, replace(LENGTHS, p90=321)) == 33
    assert rollout_length(60, replace(LENGTHS, max_new_tokens=500)) == 500


def test_no_candidate_is_recommended_if_none_is_better() -> None:
    found = recommend([measured("a", [0.03] * 5), measured("b", [-0.2] * 5)], LENGTHS)
    assert (found.decision, found.candidate, found.lines) == ("none", None, ()) and len(found.sentences) == 2


@pytest.mark.parametrize(
    "result",
    [
        measured("few problems", [0.5] * 5, problems=19),
        measured("a gain of 10 points is within two errors", [0.02] * 5, stderr=0.041),
        measured("no standard error", [0.5] * 5, stderr=None, problems=1),
    ],
)
def test_too_small_data_gives_no_recommendation(result: CandidateResult) -> None:
    found = recommend([result, measured("not better", [0.0] * 5)], LENGTHS)
    assert (found.decision, found.candidate, found.lines) == ("too small", None, ())


def test_a_candidate_without_graded_responses_is_named_and_does_not_count() -> None:
    missing = CandidateResult("missing", "context", (), Estimate(float("nan"), None))
    exact = measured("equal", [0.0] * 5, stderr=0.0)
    found = recommend([missing, exact], LENGTHS)
    assert found.decision == "none" and [name in found.sentences[i] for i, name in enumerate(("equal", "missing"))]
    assert "About 0" not in "".join(found.sentences)
    assert recommend([missing, measured("better", [0.2] * 5)], LENGTHS).candidate == "better"
    assert recommend([missing], LENGTHS).decision == "too small"


def test_the_number_of_problems_is_that_of_the_uncertain_candidate_with_a_power_of_80_percent() -> None:
    """100 problems with an error of 0.041; 2.8 errors are 0.05 with 100 (2.8 * 0.041 / 0.05)^2 = 527.2 problems."""
    assert problems_wanted(0.041, 100) == 528
    exact = measured("equal", [0.0] * 5, stderr=0.0, problems=50)
    found = recommend([exact, measured("uncertain", [0.02] * 5, stderr=0.041)], LENGTHS)
    assert found.decision == "too small" and "528" in found.sentences[0] and "100 problems" in found.sentences[0]


def test_a_large_error_below_the_student_is_no_reason_for_doubt() -> None:
    assert recommend([measured("a", [-0.3] * 5, stderr=0.1)], LENGTHS).decision == "none"
    assert recommend([], LENGTHS).decision == "too small"


def test_a_probe_of_mostly_truncated_responses_has_a_warning() -> None:
    result = measured("a", [0.0] * 5)
    for truncated, sentences in ((0.5, 1), (0.51, 2)):
        cells = tuple(replace(cell, student_truncated=truncated) for cell in result.cells)
        assert len(recommend([replace(result, cells=cells)], LENGTHS).sentences) == sentences


def test_results_are_written_as_text_json_and_metrics() -> None:
    result = measured("a", [0.25, 0.2, 0.05, 0.04, 0.0])
    tenths = by_position([Comparison(torch.tensor([torch.nan, 1.0]), torch.zeros(2), ())])
    result = replace(result, tenths=tenths, trend=Estimate(float("nan"), None))
    advice = recommend([result], LENGTHS)
    text = as_text(3, [result], LENGTHS, advice)
    rows = [line.split() for line in text.splitlines() if line.startswith("a ")]
    assert [row[:3] for row in rows] == [
        ["a", "0%", "55.0"],
        ["a", "10%", "50.0"],
        ["a", "30%", "35.0"],
        ["a", "60%", "34.0"],
        ["a", "90%", "30.0"],
        ["a", "-", "-"],
    ]
    assert ["*" in row for row in rows] == [True, True, True, False, False, False] and advice.lines[-1] in text
    written = json.loads(json.dumps(as_json(3, [result], LENGTHS, advice), allow_nan=False))
    assert written["candidates"][0]["cells"][0]["difference"] == {"mean": 0.25, "stderr": 0.02}
    assert written["candidates"][0]["trend"]["mean"] is None and written["recommendation"]["max_new_tokens"] == 300
    values = as_metrics([result])
    assert values["validation/probe/start_30/difference"] == 0.05 and len(values) == 8 * len(STARTS)
