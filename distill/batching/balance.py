"""Balance sequences over ranks: pack them into rounds of one micro-batch per rank. Pure functions of numbers."""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

ROUND_COST = 500
"""Fixed cost of a round in tokens: gathering the weights and reducing their gradients.

A round moves about 8 bytes per parameter and a token needs 8 FLOPs per parameter, so the cost is the number of FLOPs
that a GPU computes while it receives a byte: 500 to 1000 at 150 TFLOP/s and 150 to 300 GB/s, partly hidden behind the
arithmetic. It only decides between assignments of nearly equal time.
"""
HALVINGS = 12
"""Steps of the bisection for the common ceiling."""


class Limits(Protocol):
    """Limits of a micro-batch; None: no limit."""

    @property
    def tokens(self) -> int | None:
        """Return the maximum number of tokens; a longer sequence is alone."""

    @property
    def sequences(self) -> int | None:
        """Return the maximum number of sequences."""


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
    """Return the factor q of the cost n + q n^2 of a sequence of n tokens: FLOPs per n^2 over FLOPs per n.

    Counts forward FLOPs, two per multiplication; backward and recomputation multiply both terms equally.

    - Per token and layer: queries and the attention's output 2 * 2 * hidden * heads * head_dim, keys and values
      2 * 2 * hidden * kv_heads * head_dim, the gated MLP 3 * 2 * hidden * intermediate. Once per token: the head,
      2 * hidden * vocab, as nearly all tokens are response tokens.
    - Per pair of a token and a token it attends to, and layer: the score and the weighted value,
      2 * 2 * heads * head_dim. A sequence of n tokens has n^2 / 2 pairs; in the ``windowed`` layers it has n * window,
      which count as cost per token.
    """
    pair = 4 * heads * head_dim
    token = 4 * hidden * head_dim * (heads + kv_heads) + 6 * hidden * intermediate
    return (layers - windowed) * pair / 2 / (layers * token + 2 * hidden * vocab + windowed * pair * window)


def balance(tokens: Mapping[int, int], cost: Mapping[int, float], ranks: int, limits: Limits) -> list[list[list[int]]]:
    """Pack sequences (id -> tokens, id -> cost) into rounds of one bin per rank, no bin above the limits.

    A bin is a micro-batch. All ranks wait for the slowest bin of each round; the sum of these maxima is minimised. The
    number of rounds is the smallest for which one of two strategies places all sequences, or one more if that saves
    more than ``ROUND_COST``.

    - Each sequence, most expensive first, goes to the cheapest of all bins: best if the limits leave room.
    - Round after round, each sequence, most expensive first, goes to the fullest bin of the round that stays below a
      ceiling. The ceiling is the cost of the round's first sequence, which the round waits for anyway, or a common one
      if that is higher; the common ceiling is the lowest found that places all sequences. So a round with a long
      sequence takes as much work as the limits allow, and the other rounds take less.

    Within a round the rank with the least work so far gets the most expensive bin. A bin may stay empty.
    """
    balancer = _Balancer(tokens, cost, ranks, limits)
    num_rounds = fewest_rounds(tokens, ranks, limits)
    while not (candidates := balancer.candidates(num_rounds)):
        num_rounds += 1
    best = min(candidates, key=balancer.time)
    if balancer.time(best) - sum(cost.values()) / ranks > ROUND_COST:
        larger = balancer.candidates(num_rounds + 1)
        best = min([best, *larger], key=lambda bins: balancer.time(bins) + ROUND_COST * len(bins) / ranks)
    bins = sorted(best, key=balancer.load, reverse=True)
    work = [0.0] * ranks
    rounds = []
    for k in range(0, len(bins), ranks):
        by_rank: list[list[int]] = [[] for _ in range(ranks)]
        least_work_first = sorted(range(ranks), key=lambda rank: (work[rank], rank))
        for rank, members in zip(least_work_first, bins[k : k + ranks], strict=True):
            by_rank[rank] = sorted(members)
            work[rank] += balancer.load(members)
        rounds.append(by_rank)
    return rounds


def fewest_rounds(tokens: Mapping[int, int], ranks: int, limits: Limits) -> int:
    """Return a lower bound of the number of rounds: total tokens and sequences over a round's limits."""
    by_tokens = 1 if limits.tokens is None else sum(min(n, limits.tokens) for n in tokens.values()) / limits.tokens
    by_sequences = 1 if limits.sequences is None else len(tokens) / limits.sequences
    return max(1, math.ceil(max(by_tokens, by_sequences) / ranks))


Bins = list[list[int]]
"""Micro-batches as lists of sequence ids."""


@dataclass(frozen=True)
class _Balancer:
    tokens: Mapping[int, int]
    cost: Mapping[int, float]
    ranks: int
    limits: Limits

    def load(self, members: Sequence[int]) -> float:
        """Return the cost of a bin."""
        return sum(self.cost[i] for i in members)

    def time(self, bins: Bins) -> float:
        """Return the time of ranks in lockstep, if each round takes the most expensive bins that remain."""
        return sum(sorted(map(self.load, bins), reverse=True)[:: self.ranks])

    def candidates(self, num_rounds: int) -> list[Bins]:
        """Return assignments to ``num_rounds`` rounds that place all sequences; empty if none was found."""
        most_expensive_first = sorted(self.tokens, key=lambda i: (-self.cost[i], i))
        bins, left = self.fill(most_expensive_first, num_rounds * self.ranks)
        candidates = [] if left else [bins]
        high = self.load(most_expensive_first)
        bins, left = self.fill_rounds(most_expensive_first, num_rounds, high)
        if left:
            return candidates
        candidates.append(bins)
        low, high = 0.0, max(map(self.load, bins))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            bins, left = self.fill_rounds(most_expensive_first, num_rounds, middle)
            if left:
                low = middle
            else:
                high = middle
                candidates.append(bins)
        return candidates

    def fill_rounds(self, most_expensive_first: list[int], num_rounds: int, ceiling: float) -> tuple[Bins, list[int]]:
        """Fill round after round below the ceiling, or the cost of its first sequence; also return what did not fit."""
        bins: Bins = []
        left = most_expensive_first
        for _ in range(num_rounds):
            highest = max(ceiling, self.cost[left[0]]) if left else ceiling
            filled, left = self.fill(left, self.ranks, highest)
            bins += filled
        return bins, left

    def fill(self, order: list[int], num_bins: int, ceiling: float | None = None) -> tuple[Bins, list[int]]:
        """Put each sequence into a bin with room; also return the sequences that did not fit.

        The bin is the cheapest one, or with ``ceiling`` the fullest that stays below it. An empty bin takes any
        sequence.
        """
        bins: Bins = [[] for _ in range(num_bins)]
        filled = [0] * num_bins
        by_load = [(0.0, b) for b in range(num_bins)]
        left = []
        for i in order:
            positions = range(num_bins)
            if ceiling is not None:
                below = bisect_right(by_load, (ceiling - self.cost[i], num_bins))
                positions = range(max(below, 1) - 1, -1, -1)  # always includes the cheapest bin, which may be empty
            for position in positions:
                load, b = by_load[position]
                if not bins[b] or (self._fits(i, filled[b], len(bins[b])) and (ceiling is None or position < below)):
                    bins[b].append(i)
                    filled[b] += self.tokens[i]
                    del by_load[position]
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
