"""Recommendation of a probe: which teacher or context, rollout length and position weights; pure functions.

The rules, with "significant" for more than two standard errors of the paired difference:

- A candidate is better if its difference to the student at start 0% is significantly above 0. Of the better candidates,
  the one with the largest difference at 0% is recommended; this difference is what training can gain.
  The maximum over several candidates is biased upward.
- If no candidate is better, no candidate is recommended. If in addition a difference of ``UNCERTAIN`` at 0% is within
  two standard errors, or if fewer than ``MIN_PROBLEMS`` problems were measured, the data is too small for a decision.
  Candidates without any graded response are named, and do not count.
- Rollout length: the largest start up to which the candidate is significantly better at each start, as a share of the
  90th percentile of the student's response lengths. At least ``MIN_SHARE`` of it and ``MIN_TOKENS`` tokens,
  at most the recipe's length. The recipe's length is kept if the candidate still repairs at the last start, or if the
  difference rises with the position (next rule).
- Position weights: compare the mean difference at the starts 0% and 10% with that at 60% and 90%. If it is
  significantly higher early, late tokens teach less: if the candidate repairs at most from ``EARLY_REPAIR``, the
  rollout length is enough (``first`` with this length is the alternative), otherwise ``position_slope=-0.5``. If it is
  significantly lower early, ``position_sigmoid``. Otherwise no weights.
- If more than ``MAX_TRUNCATED`` of the student's responses reach the length limit, a warning follows: a truncated
  response rarely contains a final answer, so the accuracies measure the limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

from distill.validation.probe_stats import STARTS, CandidateResult, Cell

MIN_PROBLEMS = 20
"""Number of problems below which nothing is recommended: standard errors of fewer problems are unreliable."""
UNCERTAIN = 0.1
"""Difference of accuracies that must be excluded before a candidate counts as not better."""
POWER_ERRORS = 2.8
"""A true difference of 2.8 standard errors is significant at the level of 5% in 80% of all probes: 1.96 + 0.84."""
MAX_TRUNCATED = 0.5
MIN_SHARE, MIN_TOKENS = 0.1, 32
EARLY_REPAIR = 30
"""Largest start, in percent, at which the recommended weights cut responses instead of weighting them."""

Decision = Literal["use", "none", "too small"]
Weights = Literal["first", "position_slope", "position_sigmoid", "none"]

_MAX_TOKENS, _VAL_TOKENS = "policy.generation.max_new_tokens", "policy.generation.val_max_new_tokens"
_WEIGHTS = "loss_fn.token_weights"


@dataclass(frozen=True)
class Lengths:
    """Lengths of the student's responses and limits of the recipe, in tokens."""

    p90: int
    """90th percentile of the lengths of the student's responses."""
    max_new_tokens: int
    """The recipe's limit in training (policy.generation.max_new_tokens)."""
    val_max_new_tokens: int
    """The recipe's limit in validation, and in the probe."""


@dataclass(frozen=True)
class Recommendation:
    """Recommendation of a probe."""

    decision: Decision
    candidate: str | None
    """Name of the recommended candidate; None without a recommended candidate."""
    gain: float | None
    """Difference of the accuracies of the candidate and the student at start 0%."""
    gain_stderr: float | None
    repairs_until: int | None
    """Largest start, in percent, up to which the candidate is significantly better at each start."""
    max_new_tokens: int | None
    weights: Weights | None
    """Kind of position weights. "first": ``lines`` shorten the responses instead, which has the same effect."""
    sentences: tuple[str, ...]
    lines: tuple[str, ...]
    """Settings (key.path=value) to copy; empty if the recipe needs no change."""


def recommend(results: Sequence[CandidateResult], lengths: Lengths) -> Recommendation:
    """Return the recommendation for the measured candidates, by the rules of this module."""
    found = _decided(results, lengths)
    return replace(found, sentences=(*found.sentences, *_warnings(results, lengths)))


def _warnings(results: Sequence[CandidateResult], lengths: Lengths) -> list[str]:
    found = [
        f"The {result.name} was not measured: no response of it could be graded."
        for result in results
        if _first(result) is None
    ]
    truncated = max((cell.student_truncated for result in results for cell in result.cells[:1]), default=0.0)
    if truncated > MAX_TRUNCATED:
        found.append(
            f"Warning: {truncated:.0%} of the student's responses reach {_VAL_TOKENS}={lengths.val_max_new_tokens}, so"
            " the accuracies measure this limit: raise it."
        )
    return found


def _first(result: CandidateResult) -> Cell | None:
    """Return the measurements from the start 0, or None if no response was graded there."""
    return result.cells[0] if result.cells and result.cells[0].start == 0 else None


def _decided(results: Sequence[CandidateResult], lengths: Lengths) -> Recommendation:
    firsts = [(result, first) for result in results if (first := _first(result)) is not None]
    enough = [(result, first) for result, first in firsts if first.problems >= MIN_PROBLEMS]
    better = [(result, first) for result, first in enough if first.difference.exceeds(0)]
    if better:
        return _use(*max(better, key=lambda pair: pair[1].difference.mean), len(enough), lengths)
    if not firsts:
        return _nothing("too small", ["No response could be graded, so nothing is recommended."])
    if few := [first.problems for _, first in firsts if first.problems < MIN_PROBLEMS]:
        return _nothing("too small", [_too_few(min(few))])
    uncertain = [(e, first.problems) for _, first in enough if (e := _uncertain_error(first)) is not None]
    if uncertain:
        return _nothing("too small", [_too_small(*max(uncertain))])
    return _nothing("none", [_not_better(first, result.name) for result, first in enough])


def _nothing(decision: Decision, sentences: Sequence[str]) -> Recommendation:
    return Recommendation(decision, None, None, None, None, None, None, tuple(sentences), ())


def _uncertain_error(first: Cell) -> float | None:
    """Return the standard error of a difference that may be ``UNCERTAIN`` or more; None if it is clearly less."""
    d = first.difference
    return d.stderr if d.stderr and d.mean + 2 * d.stderr > UNCERTAIN else None


def _too_few(problems: int) -> str:
    return (
        f"The data is too small to decide: {problems} problems were graded, and standard errors need at least"
        f" {MIN_PROBLEMS}: raise distillation.max_val_samples, or add problems to data.validation."
    )


def _too_small(error: float, problems: int) -> str:
    return (
        f"The data is too small to decide: with {problems} problems, two standard errors of the difference at the start"
        f" are {2 * error:.1%}. With about {problems_wanted(error, problems)} problems, a true difference of"
        f" {UNCERTAIN / 2:.0%} would be significant in 80% of all probes: raise distillation.max_val_samples, or"
        " distillation.val_num_generations if there are no more problems."
    )


def problems_wanted(error: float, problems: int) -> int:
    """Return how many problems detect a true difference of half of ``UNCERTAIN`` with a probability of 80%.

    ``error``: standard error of the difference with ``problems`` problems.
    """
    return math.ceil(problems * (POWER_ERRORS * error / (UNCERTAIN / 2)) ** 2)


def _not_better(first: Cell, name: str) -> str:
    difference = first.difference
    error = 2 * (difference.stderr or 0.0)
    if difference.mean + error < 0:
        return (
            f"Do not use the {name}: it lowers the accuracy from {first.student_accuracy.mean:.1%} to"
            f" {first.accuracy.mean:.1%} (difference {difference.mean:+.1%}, two standard errors {error:.1%})."
        )
    return (
        f"The {name} is not better than the student at the start: difference {difference.mean:+.1%}, two standard"
        f" errors {error:.1%}."
    )


def _use(result: CandidateResult, first: Cell, candidates: int, lengths: Lengths) -> Recommendation:
    difference = first.difference
    until = repairs_until(result)
    weights = position_weights(result, until)
    # Late tokens teach most if the difference rises, so responses are not cut.
    tokens = lengths.max_new_tokens if weights == "position_sigmoid" else rollout_length(until, lengths)
    sentences = [
        f"Use the {result.name}: from the start, its accuracy is {first.accuracy.mean:.1%} and the student's is"
        f" {first.student_accuracy.mean:.1%}.",
        f"Distillation can gain about {difference.mean:.1%} of accuracy (two standard errors"
        f" {2 * (difference.stderr or 0):.1%}).{_bias(candidates)}",
        _length_sentence(until, tokens, lengths, weights),
        _weights_sentence(weights, tokens),
    ]
    lines = [*result.lines, *_length_lines(tokens, lengths), *_weight_lines(weights)]
    return Recommendation(
        *("use", result.name, difference.mean, difference.stderr, until, tokens, weights),
        tuple(sentences),
        tuple(lines),
    )


def _bias(candidates: int) -> str:
    if candidates < 2:
        return ""
    return (
        f" This is the largest difference of {candidates} candidates, so it is biased upward: probe this candidate"
        " alone with another distillation.seed to measure it."
    )


def repairs_until(result: CandidateResult) -> int:
    """Return the last start, in percent, before the first start at which the candidate is not significantly better."""
    better = {cell.start for cell in result.cells if cell.difference.exceeds(0)}
    return max(takewhile(better.__contains__, STARTS))


def rollout_length(until: int, lengths: Lengths) -> int:
    """Return the recommended maximum number of tokens of a response in training.

    ``until``: the largest start, in percent, from which the candidate still repairs responses.
    """
    if until >= STARTS[-1]:
        return lengths.max_new_tokens
    share = max(until / 100, MIN_SHARE)
    return min(lengths.max_new_tokens, max(MIN_TOKENS, math.ceil(round(share * lengths.p90, 6))))


def position_weights(result: CandidateResult, until: int) -> Weights:
    """Return the recommended kind of position weights; ``until``: as in ``rollout_length``."""
    trend = result.trend
    if trend.exceeds(0):
        return "first" if until <= EARLY_REPAIR else "position_slope"
    is_rising = trend.stderr is not None and trend.mean + 2 * trend.stderr < 0
    return "position_sigmoid" if is_rising else "none"


def _length_sentence(until: int, tokens: int, lengths: Lengths, weights: Weights) -> str:
    if weights == "position_sigmoid":
        return f"Keep responses of up to {lengths.max_new_tokens} tokens, because late tokens teach most."
    repairs = f"It still repairs responses of which the student wrote the first {until}%"
    if tokens >= lengths.max_new_tokens:
        return f"{repairs}, so keep responses of up to {lengths.max_new_tokens} tokens."
    return (
        f"{repairs}, but not later ones: {tokens} tokens are enough in training, because 90% of the responses have at"
        f" most {lengths.p90} tokens. Validation keeps {lengths.val_max_new_tokens} tokens."
    )


def _length_lines(tokens: int, lengths: Lengths) -> list[str]:
    if tokens >= lengths.max_new_tokens:
        return []
    return [f"{_MAX_TOKENS}={tokens}", f"{_VAL_TOKENS}={lengths.val_max_new_tokens}"]


def _weights_sentence(weights: Weights, tokens: int) -> str:
    return {
        "first": "The difference falls with the position, so late tokens teach little. If responses must be complete,"
        f" set {_WEIGHTS}.first={tokens} instead of a lower {_MAX_TOKENS}.",
        "position_slope": "The difference falls slowly with the position, so weight late tokens less.",
        "position_sigmoid": "The difference rises with the position, so weight early tokens less.",
        "none": "The difference does not clearly change with the position, so weight all tokens equally.",
    }[weights]


def _weight_lines(weights: Weights) -> list[str]:
    lines = {
        "position_slope": [f"{_WEIGHTS}.position_slope=-0.5"],
        "position_sigmoid": [
            f"{_WEIGHTS}.position_sigmoid={{w_min: 0.25, tau: 0.3, s: 0.1}}",
            f"{_WEIGHTS}.normalize=sequences",
        ],
    }
    return lines.get(weights, [])
