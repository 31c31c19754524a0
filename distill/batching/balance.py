"""Dealing: which sequences share a micro-batch, in rows of one micro-batch a rank. Pure functions of numbers."""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

ROW_COST = 500
"""What a row costs beside its sequences, in tokens: the weights are gathered for it, and their gradients spread.

About 8 bytes a parameter travel for a row and 8 FLOPs a parameter are done for a token, so it is the number of FLOPs a
GPU does while it receives a byte: 500 to 1000 for 150 TFLOP/s beside 150 to 300 GB/s, and a part of it is hidden behind
the arithmetic. It decides only between deals that are nearly as fast.
"""
HALVINGS = 12
"""Ceilings tried for the lower rows, each time in half of what is left."""


class Limits(Protocol):
    """What a micro-batch may hold; None: no limit."""

    @property
    def tokens(self) -> int | None:
        """At most this many tokens; a longer sequence is alone."""

    @property
    def sequences(self) -> int | None:
        """At most this many sequences."""


def quadratic_cost(
    *,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate: int,
    vocab: int,
    windowed: int = 0,
    window: int = 0,
) -> float:
    """FLOPs of a model's attention per n^2 over its FLOPs per n: n + this * n^2 is the cost of a sequence of n tokens.

    Forward FLOPs, two a multiplication; the backward and a recomputation multiply both alike.

    - A token, in a layer: queries and the attention's output 2 * 2 * hidden * heads * head_dim, keys and values
      2 * 2 * hidden * kv_heads * head_dim, the gated MLP 3 * 2 * hidden * intermediate. Once: the head, 2 * hidden *
      vocab, as nearly all tokens are an answer's.
    - A pair of a token and one it sees, in a layer: the score and the weighted value, 2 * 2 * heads * head_dim.
      A sequence of n tokens has n^2 / 2 pairs; in ``windowed`` of the layers n * window, which count for the tokens.
    """
    pair = 4 * heads * head_dim
    token = 4 * hidden * head_dim * (heads + kv_heads) + 6 * hidden * intermediate
    return (layers - windowed) * pair / 2 / (layers * token + 2 * hidden * vocab + windowed * pair * window)


def deal(tokens: Mapping[int, int], cost: Mapping[int, float], ranks: int, limits: Limits) -> list[list[list[int]]]:
    """Sequences (id -> tokens, id -> cost) into rows of bins, a row a micro-batch, a bin a rank; none over the limits.

    Ranks wait for the dearest bin of each row: the sum of these is made small. Rows are the fewest for which one of two
    ways finds room for all sequences, or one more where that saves more than a row costs.

    - Every sequence, dearest first, to the cheapest of all bins: best where the limits leave room.
    - Row after row, every sequence, dearest first, to the dearest bin of the row that it leaves under a ceiling. The
      ceiling is the row's first sequence, which the row waits for anyway, or a common one if that is higher; the common
      one is the lowest found that leaves nothing over. So a row that waits for a long sequence takes as much work as
      the limits allow, and the others get the less.

    Inside a row the rank with the least work so far takes the dearest bin. A row may leave a rank's bin empty.
    """
    dealer = _Dealer(tokens, cost, ranks, limits)
    num_rows = fewest_rows(tokens, ranks, limits)
    while not (ways := dealer.ways(num_rows)):
        num_rows += 1
    best = min(ways, key=dealer.time)
    if dealer.time(best) - sum(cost.values()) / ranks > ROW_COST:
        larger = dealer.ways(num_rows + 1)
        best = min([best, *larger], key=lambda bins: dealer.time(bins) + ROW_COST * len(bins) / ranks)
    bins = sorted(best, key=dealer.load, reverse=True)
    work = [0.0] * ranks
    rows = []
    for k in range(0, len(bins), ranks):
        row: list[list[int]] = [[] for _ in range(ranks)]
        by_work = sorted(range(ranks), key=lambda rank: (work[rank], rank))
        for rank, members in zip(by_work, bins[k : k + ranks], strict=True):
            row[rank] = sorted(members)
            work[rank] += dealer.load(members)
        rows.append(row)
    return rows


def fewest_rows(tokens: Mapping[int, int], ranks: int, limits: Limits) -> int:
    """No fewer rows can hold the sequences, whatever their order."""
    by_tokens = 1 if limits.tokens is None else sum(min(n, limits.tokens) for n in tokens.values()) / limits.tokens
    by_sequences = 1 if limits.sequences is None else len(tokens) / limits.sequences
    return max(1, math.ceil(max(by_tokens, by_sequences) / ranks))


Bins = list[list[int]]


@dataclass(frozen=True)
class _Dealer:
    tokens: Mapping[int, int]
    cost: Mapping[int, float]
    ranks: int
    limits: Limits

    def load(self, members: Sequence[int]) -> float:
        """Cost of a bin."""
        return sum(self.cost[i] for i in members)

    def time(self, bins: Bins) -> float:
        """What ranks in lockstep need, where each row has the dearest bins that are left."""
        return sum(sorted(map(self.load, bins), reverse=True)[:: self.ranks])

    def ways(self, num_rows: int) -> list[Bins]:
        """Bins for so many rows that hold all sequences; none where none were found."""
        dearest_first = sorted(self.tokens, key=lambda i: (-self.cost[i], i))
        bins, left = self.fill(dearest_first, num_rows * self.ranks)
        ways = [] if left else [bins]
        high = self.load(dearest_first)
        bins, left = self.fill_rows(dearest_first, num_rows, high)
        if left:
            return ways
        ways.append(bins)
        low, high = 0.0, max(map(self.load, bins))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            bins, left = self.fill_rows(dearest_first, num_rows, middle)
            if left:
                low = middle
            else:
                high = middle
                ways.append(bins)
        return ways

    def fill_rows(self, dearest_first: list[int], num_rows: int, ceiling: float) -> tuple[Bins, list[int]]:
        """Row after row, each under the ceiling or its first sequence, whichever is dearer; and what is left."""
        bins: Bins = []
        left = dearest_first
        for _ in range(num_rows):
            highest = max(ceiling, self.cost[left[0]]) if left else ceiling
            row, left = self.fill(left, self.ranks, highest)
            bins += row
        return bins, left

    def fill(self, order: list[int], num_bins: int, ceiling: float | None = None) -> tuple[Bins, list[int]]:
        """Each to the cheapest bin with room, or to the dearest that stays under the ceiling; and who finds none.

        An empty bin takes any sequence.
        """
        bins: Bins = [[] for _ in range(num_bins)]
        filled = [0] * num_bins
        by_load = [(0.0, b) for b in range(num_bins)]
        left = []
        for i in order:
            places = range(num_bins)
            if ceiling is not None:
                under = bisect_right(by_load, (ceiling - self.cost[i], num_bins))
                places = range(max(under, 1) - 1, -1, -1)  # the cheapest is looked at anyway: it may be empty
            for place in places:
                load, b = by_load[place]
                if not bins[b] or (self._fits(i, filled[b], len(bins[b])) and (ceiling is None or place < under)):
                    bins[b].append(i)
                    filled[b] += self.tokens[i]
                    del by_load[place]
                    insort(by_load, (load + self.cost[i], b))
                    break
            else:
                left.append(i)
        return bins, left

    def _fits(self, i: int, tokens: int, sequences: int) -> bool:
        limits = self.limits
        return (limits.tokens is None or tokens + self.tokens[i] <= limits.tokens) and (
            limits.sequences is None or sequences < limits.sequences
        )
