"""Statistics of responses: pass@k, standard errors, quantiles, KL by position; plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from statistics import median_high

Sums = Mapping[str, tuple[float, float]]
"""Maps a problem to the sum of a value over its responses or tokens, and to their number."""
Estimate = tuple[float, float | None]
"""A mean and its standard error; the standard error is None for fewer than two problems."""


def mean_stderr(values: Sequence[float]) -> Estimate:
    """Return the mean of one value per problem, and its standard error: standard deviation / sqrt(problems)."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the unbiased estimate of the probability that at least one of k responses is right.

    ``n`` responses to one problem were graded, of which ``right`` are right; k <= n. The estimate is
    1 - C(n - right, k) / C(n, k), as in Chen et al. 2021 (arXiv 2107.03374).
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def pass_at(verdicts: Iterable[Sequence[bool]], k: int) -> Estimate | None:
    """Return pass@k and its standard error over the problems with at least k graded responses; None without any.

    ``verdicts``: for each problem, whether each of its graded responses is right.
    """
    values = [pass_at_k(len(right), sum(right), k) for right in verdicts if len(right) >= k]
    return mean_stderr(values) if values else None


def ks_of(verdicts: Iterable[Sequence[bool]]) -> list[int]:
    """Return the values of k for which pass@k is reported: powers of two, and the usual number of responses.

    At least half of the problems have this number of graded responses or more. So a few problems that a dataset
    repeats, which have more responses, give no pass@k that is the mean over these problems alone.
    """
    most = median_high([len(right) for right in verdicts] or [0])
    powers = [2**i for i in range(1, most.bit_length()) if 2**i <= most]
    return sorted({*powers, *([most] if most > 1 else [])})


def total_mean(sums: Sums) -> Estimate | None:
    """Return the mean over all responses or tokens, and its standard error clustered by problem; None without any.

    A problem with more tokens has a greater weight. The standard error is that of a ratio of sums, the same as that of
    the trainer's accuracy: sqrt(P / (P - 1) * sum_p (sum_p - mean * number_p)^2) / number for P problems.
    """
    if not sum(number for _, number in sums.values()):
        return None
    mean, shares = _shares(sums)
    return mean, _stderr(list(shares.values()))


def _shares(sums: Sums) -> tuple[float, dict[str, float]]:
    """Return the mean, and for each problem its contribution to the mean's error."""
    total = math.fsum(number for _, number in sums.values())
    mean = math.fsum(value for value, _ in sums.values()) / total
    return mean, {problem: (value - mean * number) / total for problem, (value, number) in sums.items()}


def _stderr(shares: Sequence[float]) -> float | None:
    n = len(shares)
    return math.sqrt(n / (n - 1) * math.fsum(share**2 for share in shares)) if n > 1 else None


def paired_difference(first: Sums, second: Sums) -> tuple[Estimate, int] | None:
    """Return the mean of ``second`` - that of ``first`` on common problems, its standard error, and their number.

    The means are those of ``total_mean``. The standard error is that of the differences, so the difficulty of a
    problem, which both runs share, does not count. None without a common problem.
    """
    if not (common := _common(first, second)):
        return None
    (before, before_P), (after, after_P) = (_shares({p: each[p] for p in common}) for each in (first, second))
    return (after - before, _stderr([after_P[p] - before_P[p] for p in common])), len(common)


def _common(first: Sums, second: Sums) -> list[str]:
    return [p for p, (_, number) in first.items() if number and p in second and second[p][1]]


def gap_closed_stderr(before: Sums, after: Sums) -> float | None:
    """Return the standard error of ``gap_closed`` over the problems that both validations compared; None if unknown.

    The delta method is applied to the ratio of both means, with the problems as pairs.
    """
    common = _common(before, after)
    if len(common) < 2:
        return None
    (first, first_P), (last, last_P) = (_shares({p: each[p] for p in common}) for each in (before, after))
    return _stderr([last_P[p] / first - last * first_P[p] / first**2 for p in common]) if first > 0 else None


def gap_closed(before: float | None, after: float | None) -> float | None:
    """Return the fraction of the KL that training removed: 1 - after / before; None if it is not defined."""
    return None if before is None or after is None or before <= 0 else 1.0 - after / before


def quantile(values: Sequence[float], fraction: float) -> float:
    """Return the quantile of ``values`` with linear interpolation between order statistics."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


class Positions:
    """Sums of a KL over the tokens in bins of positions in the response; the bins are [0, 1), [1, 2), [2, 4), ..."""

    def __init__(self) -> None:
        self.sums: list[float] = []
        self.counts: list[int] = []

    def add(self, kl_R: Sequence[float | None]) -> None:
        """Add the KL of each token of one response, first token first; None is not counted."""
        for i in count():
            start, end = bin_edges(i)
            if start >= len(kl_R):
                return
            part = [kl for kl in kl_R[start:end] if kl is not None]
            if i == len(self.sums):
                self.sums.append(0.0)
                self.counts.append(0)
            self.sums[i] += math.fsum(part)
            self.counts[i] += len(part)

    def means(self, bins: int) -> list[float | None]:
        """Return the mean of each of the first ``bins`` bins; None for a bin without tokens."""
        return [self.sums[i] / self.counts[i] if i < len(self.sums) and self.counts[i] else None for i in range(bins)]


def bin_edges(i: int) -> tuple[int, int]:
    """Return the first position of bin ``i``, and the first position after it."""
    return (0, 1) if i == 0 else (2 ** (i - 1), 2**i)
