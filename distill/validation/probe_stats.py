"""Statistics of a probe: accuracy of continuations by start, errors clustered by problem, KL by position."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from distill.validation.comparison import Comparison
from distill.validation.scores import Sample, problem_of

STARTS = (0, 10, 30, 60, 90)
"""Percentages of a response's tokens after which a candidate continues it."""
_EARLY, _LATE = (0, 10), (60, 90)
"""Starts whose differences are compared to find out whether the difference changes with the position."""
TENTHS = 10

Kind = Literal["context", "teacher"]
"""Kind of a candidate. context: the student with a context in its prompt; teacher: the model teacher.model_name."""
Key = tuple[int, int]
"""(prompt id, index of the response to it) of a response that is continued."""


@dataclass(frozen=True)
class Estimate:
    """A mean over responses, and its standard error with the problems as the sample."""

    mean: float
    stderr: float | None
    """None with fewer than two problems."""

    def exceeds(self, value: float) -> bool:
        """Return whether the mean is more than two standard errors above ``value``; False without a standard error."""
        return self.stderr is not None and self.mean - 2 * self.stderr > value


def clustered(values: Iterable[tuple[Hashable, float]]) -> Estimate:
    """Return mean and standard error of pairs (problem, value); several values of a problem are not independent.

    For m values of P problems the standard error is sqrt(P / (P - 1) * sum_p (sum_p - mean * m_p)^2) / m, where m_p and
    sum_p are the number and the sum of the values of problem p. The mean of no values is nan.
    """
    sums: dict[Hashable, list[float]] = {}
    for problem, value in values:
        sums.setdefault(problem, []).append(value)
    m = sum(map(len, sums.values()))
    if not m:
        return Estimate(math.nan, None)
    mean = math.fsum(value for each in sums.values() for value in each) / m
    P = len(sums)
    if P < 2:
        return Estimate(mean, None)
    squares = math.fsum((math.fsum(each) - mean * len(each)) ** 2 for each in sums.values())
    return Estimate(mean, math.sqrt(P / (P - 1) * squares) / m)


@dataclass(frozen=True)
class Cell:
    """Graded continuations from one start: a candidate's, and the student's from the same tokens."""

    start: int
    """Percentage of the student's response that was kept."""
    responses: int
    problems: int
    accuracy: Estimate
    student_accuracy: Estimate
    difference: Estimate
    """Accuracy of the candidate minus accuracy of the student, paired by response."""
    truncated: float
    """Fraction of the candidate's responses that reached the length limit."""
    student_truncated: float
    avg_length: float
    """Mean number of tokens of the complete responses: the kept tokens and the candidate's."""
    student_avg_length: float


@dataclass(frozen=True)
class Tenth:
    """Means over the student's tokens t with position (t - 1/2) / T in one tenth of their responses."""

    tokens: int
    forward_kl: float | None
    """Mean KL(candidate || student) in nats; None without tokens."""
    topk_overlap: float | None = None
    """Mean fraction of the candidate's most likely tokens that are among the student's; None if not measured."""


@dataclass(frozen=True)
class CandidateResult:
    """Measurements of one candidate."""

    name: str
    kind: Kind
    cells: tuple[Cell, ...]
    """One cell per start with graded pairs, by ascending start."""
    trend: Estimate
    """Mean difference from the starts 0% and 10% minus that from 60% and 90%, paired by response."""
    skipped: int = 0
    """Number of problems that lack a column of the context, or whose context leaves too little space."""
    tenths: tuple[Tenth, ...] = ()
    """KL by position; empty if the candidate was not compared with the student."""
    lines: tuple[str, ...] = ()
    """Settings (key.path=value) that make this candidate the teacher of a run; empty: the recipe's settings."""


Continued = Mapping[tuple[Key, int], Sample]
"""Maps (response, start) to the graded joined response: the first tokens of the response, and the continuation."""


def candidate_result(name: str, kind: Kind, found: Continued, control: Continued, skipped: int = 0) -> CandidateResult:
    """Return the measurements of a candidate; only responses that candidate and student continued are compared."""
    pairs = {
        at: (found[at], control[at])
        for at in sorted(found.keys() & control.keys())
        if found[at].verdict is not None and control[at].verdict is not None
    }
    starts = sorted({start for _, start in pairs})
    cells = tuple(_cell(start, [pair for (_, at), pair in pairs.items() if at == start]) for start in starts)
    return CandidateResult(name, kind, cells, _trend(pairs), skipped)


def _cell(start: int, pairs: Sequence[tuple[Sample, Sample]]) -> Cell:
    ours, students = zip(*pairs, strict=True)
    return Cell(
        start=start,
        responses=len(pairs),
        problems=len({problem_of(sample) for sample in ours}),
        accuracy=clustered((problem_of(sample), _right(sample)) for sample in ours),
        student_accuracy=clustered((problem_of(sample), _right(sample)) for sample in students),
        difference=clustered((problem_of(a), _right(a) - _right(b)) for a, b in pairs),
        truncated=_mean(sample.rollout.finish == "length" for sample in ours),
        student_truncated=_mean(sample.rollout.finish == "length" for sample in students),
        avg_length=_mean(len(sample.rollout.response_ids) for sample in ours),
        student_avg_length=_mean(len(sample.rollout.response_ids) for sample in students),
    )


def _trend(pairs: Mapping[tuple[Key, int], tuple[Sample, Sample]]) -> Estimate:
    contrasts = []
    for key in dict.fromkeys(key for key, _ in pairs):
        of_key = {start: pairs[key, start] for start in STARTS if (key, start) in pairs}
        if len(of_key) == len(STARTS):
            d = {start: _right(a) - _right(b) for start, (a, b) in of_key.items()}
            contrast = _mean(d[start] for start in _EARLY) - _mean(d[start] for start in _LATE)
            contrasts.append((problem_of(of_key[0][0]), contrast))
    return clustered(contrasts)


def _right(sample: Sample) -> float:
    return float(sample.verdict == "right")


def _mean(numbers: Iterable[float]) -> float:
    listed = list(numbers)
    return math.fsum(listed) / len(listed)


def by_position(compared: Sequence[Comparison]) -> tuple[Tenth, ...]:
    """Return the KL and the top-k overlap in each tenth of the compared responses; empty without responses.

    Token t = 1 to T of a response has the position f = (t - 1/2) / T and belongs to tenth floor(10 f). Each token
    counts equally.
    """
    if not compared:
        return ()
    kl = _sums([each.forward_kl_R for each in compared])
    overlaps = [each.topk_overlap_R for each in compared if each.topk_overlap_R is not None]
    overlap = _sums(overlaps) if len(overlaps) == len(compared) else [(0.0, 0)] * TENTHS
    return tuple(
        Tenth(count, _ratio(total, count), _ratio(*of_overlap))
        for (total, count), of_overlap in zip(kl, overlap, strict=True)
    )


def _sums(values: Sequence[Tensor]) -> list[tuple[float, int]]:
    """Return the sum and the number of the values in each tenth of the responses; values of nan are omitted."""
    totals, counts = [0.0] * TENTHS, [0] * TENTHS
    for value_R in values:
        T = len(value_R)
        for i, value in enumerate(value_R.tolist()):
            if math.isfinite(value):
                tenth = TENTHS * (2 * i + 1) // (2 * T)
                totals[tenth] += value
                counts[tenth] += 1
    return list(zip(totals, counts, strict=True))


def _ratio(total: float, count: int) -> float | None:
    return total / count if count else None
