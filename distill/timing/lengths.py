"""Distribution of response lengths: log-normal, limited to the maximum number of new tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Z90 = NormalDist().inv_cdf(0.9)
"""The 90th percentile of the standard normal distribution."""
_QUANTILES = 2048


@dataclass(frozen=True)
class Lengths:
    """Log-normal response lengths in tokens, rounded to integers of at least 1 and at most ``cap``."""

    median: float
    sigma: float
    """Standard deviation of the logarithm of the length, before the limits."""
    cap: int
    """Maximum number of tokens of a response."""

    @classmethod
    def of_percentiles(cls, median: float, p90: float, cap: int) -> Lengths:
        """Return the distribution with this median and 90th percentile, before the limits; ``p90`` >= ``median``."""
        return cls(median, math.log(max(p90, median) / median) / Z90, cap)

    def draw(self, count: int, rng: np.random.Generator) -> Tokens:
        """Return ``count`` independent lengths."""
        return self._limited(np.exp(math.log(self.median) + self.sigma * rng.standard_normal(count)))

    @cached_property
    def quantiles(self) -> Tokens:
        """Return 2048 lengths in ascending order, each with the same probability."""
        normal = NormalDist()
        z = np.array([normal.inv_cdf((i + 0.5) / _QUANTILES) for i in range(_QUANTILES)])
        return self._limited(np.exp(math.log(self.median) + self.sigma * z))

    @property
    def mean(self) -> float:
        """Return the mean length in tokens."""
        return float(self.quantiles.mean())

    def _limited(self, lengths: NDArray[np.float64]) -> Tokens:
        return np.clip(np.rint(lengths), 1, self.cap).astype(np.int64)
