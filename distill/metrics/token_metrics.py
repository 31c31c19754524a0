"""Metrics of the rows of an optimizer batch: loss statistics, weights, and numbers by position in the response."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distill.metrics.step import Metrics
from distill.types import LossOutput, MicroBatch, Stats

BY_POSITION = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy")
"""Row values whose means are logged by position."""
TENTHS = 10
"""Number of parts of equal length into which each response is divided."""


def position_name(name: str, tenth: int) -> str:
    """Return the logged name of the metric ``name`` in a tenth of the responses, from 1 to 10."""
    return f"train/position/{name}_{tenth}"


def tenths(token_N: Tensor, length_N: Tensor) -> Tensor:
    """Return the tenth of the response, from 0 to 9, that contains the middle of each token: int64 [N].

    ``token_N``: index of the token in its response. ``length_N``: number of tokens of the response.
    """
    return ((2 * token_N.long() + 1) * TENTHS) // (2 * length_N.long())


class TokenMetrics:
    """Sums over the rows of an optimizer batch on this rank; they stay on the device until the step ends."""

    def __init__(self, weighted: bool) -> None:
        self._weighted = weighted
        self._sums: dict[str, Tensor] = {}
        self._counts: Tensor | None = None
        self._trained: list[tuple[float, Tensor]] = []

    def add(self, output: LossOutput) -> None:
        """Add the rows of nonzero weight of a micro-batch."""
        micro_batch = output.micro_batch
        assert micro_batch is not None, "an output of Student.loss"
        kept_M = micro_batch.kept_M
        if kept_M is None:
            kept_M = micro_batch.weight_N.nonzero().squeeze(1)
        self._add_positions(micro_batch, kept_M, output.row_values)
        if self._weighted:
            self._trained.append((float(len(kept_M)), micro_batch.weight_N.sum(dtype=torch.float64)))

    def _add_positions(self, micro_batch: MicroBatch, kept_M: Tensor, values: Mapping[str, Tensor]) -> None:
        tenth_M = tenths(micro_batch.token_N[kept_M], micro_batch.length_N[kept_M])
        if micro_batch.off_policy_N is not None:  # counted in an additional place that is not reported
            tenth_M = tenth_M.masked_fill(micro_batch.off_policy_N[kept_M], TENTHS)
        if self._counts is None:
            self._counts = torch.zeros(TENTHS + 1, dtype=torch.float64, device=kept_M.device)
        self._counts.index_add_(0, tenth_M, torch.ones_like(tenth_M, dtype=torch.float64))
        for name in BY_POSITION:
            if name in values:
                sums = self._sums.setdefault(name, torch.zeros_like(self._counts))
                sums.index_add_(0, tenth_M, values[name].double())

    @property
    def weight(self) -> Tensor | float:
        """Return the sum of the weights of all rows, a float64 scalar."""
        return sum((weight for _, weight in self._trained), start=0.0)

    def record(self, metrics: Metrics) -> None:
        """Add the metrics of all rows to ``metrics``."""
        if self._weighted:
            count = sum(count for count, _ in self._trained)
            metrics.add_totals({"trained_tokens": count})
            metrics.add({"mean_token_weight": (self.weight, count)})
        if self._counts is None:
            return
        counts, stats = self._counts.unbind(), Stats()
        for name, sums in self._sums.items():
            for tenth, total in enumerate(sums.unbind()[:TENTHS]):
                stats[position_name(name, tenth + 1)] = (total, counts[tenth])
        metrics.add(stats)


def add_stats(metrics: Metrics, stats: Stats, sampler: bool) -> None:
    """Add the loss statistics of a micro-batch to ``metrics``.

    ``sampler``: whether to include comparisons with the log-probs of the sampler (the generation engine). After an
    optimizer step the sampler still has the previous weights, so these comparisons would measure the effect of the
    step.
    """
    stats = {name: pair for name, pair in stats.items() if sampler or not name.startswith("sampler_")}
    metrics.add({name: pair for name, pair in stats.items() if not name.endswith("_max")})
    metrics.add_max({name: pair[0] for name, pair in stats.items() if name.endswith("_max")})
