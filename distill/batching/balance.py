"""Balance the work of data-parallel ranks: pack sequences into rounds of one micro-batch per rank.

In round k every rank computes its k-th micro-batch. All ranks wait for the slowest rank of each round. The cost of a
micro-batch estimates its computation time, in units of the computation time of one token. A bin is a micro-batch to be
filled with sequences.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

ROUND_COST = 500
"""Fixed cost of a round of micro-batches: the time to gather the weights and to reduce the gradients.

In a round every rank computes one micro-batch. The unit is the computation time of one token. With P parameters, a
round transfers about 8 P bytes, and a token needs about 8 P FLOPs. The cost is therefore (FLOP/s) / (bytes/s): 500 to
1000 tokens at 150 TFLOP/s and 150 to 300 GB/s. Part of the transfer overlaps with computation. The exact value matters
little: it only decides between assignments of nearly equal time.
"""
BISECTION_STEPS = 12
"""Number of bisection steps of ``balance`` to find the lowest possible cost limit of a micro-batch."""


class Limits(Protocol):
    """Size limits of a micro-batch; None means no limit."""

    @property
    def tokens(self) -> int | None:
        """Return the maximum number of tokens in a micro-batch, or None.

        A sequence with more tokens gets a micro-batch that contains only this sequence.
        """

    @property
    def sequences(self) -> int | None:
        """Return the maximum number of sequences in a micro-batch, or None."""


def balance(tokens: Mapping[int, int], cost: Mapping[int, float], ranks: int, limits: Limits) -> list[list[list[int]]]:
    """Pack sequences into rounds of one micro-batch per rank; return the sequence ids by round and rank.

    ``tokens`` maps each sequence id to its number of tokens, and ``cost`` maps it to its cost. A bin is a micro-batch
    within ``limits``. It may be empty. A sequence that exceeds the limits is the only sequence of its bin. All ranks
    wait for the slowest bin of each round, so the function minimises the sum over rounds of the largest bin cost. The
    search is heuristic. Two strategies propose assignments; both place the most expensive sequences first:

    - Fill all rounds together: each sequence goes to the cheapest bin. This is best if the limits rarely restrict the
      choice.
    - Fill one round after the other: each sequence goes to the round's most expensive bin that stays within a cost
      limit. The limit of a round is max(cost of its first sequence, common limit). A bisection searches for the lowest
      common limit with which all sequences fit. A round with a long sequence then gets as much work as possible, and
      the other rounds get less.

    The number of rounds is the smallest for which a strategy places all sequences. One more round is used if it saves
    more than ``ROUND_COST``. In each round the rank with the least work so far gets the most expensive bin.
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
    """Return a lower bound of the number of rounds of micro-batches that ``limits`` require.

    A round has one micro-batch per rank. ``tokens`` maps each sequence id to its number of tokens. With T tokens in all
    N sequences, the bound is max(T / (ranks * limits.tokens), N / (ranks * limits.sequences)), rounded up. A limit
    of None is ignored. A sequence longer than limits.tokens counts as limits.tokens.
    """
    by_tokens = 1 if limits.tokens is None else sum(min(n, limits.tokens) for n in tokens.values()) / limits.tokens
    by_sequences = 1 if limits.sequences is None else len(tokens) / limits.sequences
    return max(1, math.ceil(max(by_tokens, by_sequences) / ranks))


Bins = list[list[int]]
"""Bins (micro-batches to be filled), each as a list of sequence ids."""


@dataclass(frozen=True)
class _Balancer:
    tokens: Mapping[int, int]
    cost: Mapping[int, float]
    ranks: int
    limits: Limits

    def load(self, members: Sequence[int]) -> float:
        """Return the total cost of the sequences with ids ``members``, which are in one bin (micro-batch)."""
        return sum(self.cost[i] for i in members)

    def time(self, bins: Bins) -> float:
        """Return the estimated time of all rounds: the sum over rounds of the largest bin cost.

        A bin is a micro-batch, and a round has one bin per rank. The bins are grouped into rounds in order of
        descending cost, which minimises this sum.
        """
        return sum(sorted(map(self.load, bins), reverse=True)[:: self.ranks])

    def candidates(self, num_rounds: int) -> list[Bins]:
        """Return possible assignments of all sequences to the bins (micro-batches) of ``num_rounds`` rounds.

        The list is empty if neither strategy of ``balance`` can place all sequences.
        """
        most_expensive_first = sorted(self.tokens, key=lambda i: (-self.cost[i], i))
        bins, left = self.fill(most_expensive_first, num_rounds * self.ranks)
        candidates = [] if left else [bins]
        high = self.load(most_expensive_first)
        bins, left = self.fill_rounds(most_expensive_first, num_rounds, high)
        if left:
            return candidates
        candidates.append(bins)
        low, high = 0.0, max(map(self.load, bins))
        for _ in range(BISECTION_STEPS):
            middle = (low + high) / 2
            bins, left = self.fill_rounds(most_expensive_first, num_rounds, middle)
            if left:
                low = middle
            else:
                high = middle
                candidates.append(bins)
        return candidates

    def fill_rounds(self, most_expensive_first: list[int], num_rounds: int, max_cost: float) -> tuple[Bins, list[int]]:
        """Fill the bins of one round after the other; return the bins and the sequences that did not fit.

        A bin is a micro-batch; a round has one per rank. ``most_expensive_first``: sequence ids by descending cost. The
        cost limit of a round's bins is max(``max_cost``, cost of the round's first sequence).
        """
        bins: Bins = []
        left = most_expensive_first
        for _ in range(num_rounds):
            highest = max(max_cost, self.cost[left[0]]) if left else max_cost
            filled, left = self.fill(left, self.ranks, highest)
            bins += filled
        return bins, left

    def fill(self, order: list[int], num_bins: int, max_cost: float | None = None) -> tuple[Bins, list[int]]:
        """Put each sequence into a bin within ``limits``; return the bins and the sequences that did not fit.

        A bin is a micro-batch. ``order`` has the sequence ids in the order in which they are placed. Without
        ``max_cost`` a sequence goes to the cheapest bin in which it fits. With ``max_cost`` it goes to the most
        expensive bin that costs at most ``max_cost`` including the sequence. An empty bin accepts every sequence.
        """
        bins: Bins = [[] for _ in range(num_bins)]
        filled = [0] * num_bins
        by_load = [(0.0, b) for b in range(num_bins)]  # without full bins, which accept no sequence
        smallest = min((self.tokens[i] for i in order), default=0)
        left: list[int] = []
        for n, i in enumerate(order):
            if not by_load:
                return bins, left + order[n:]
            positions = range(len(by_load))
            if max_cost is not None:
                below = bisect_right(by_load, (max_cost - self.cost[i], num_bins))
                positions = range(max(below, 1) - 1, -1, -1)  # always includes the cheapest bin, which may be empty
            for position in positions:
                load, b = by_load[position]
                fits = self._fits(self.tokens[i], filled[b], len(bins[b]))
                if not bins[b] or (fits and (max_cost is None or position < below)):
                    bins[b].append(i)
                    filled[b] += self.tokens[i]
                    del by_load[position]
                    if self._fits(smallest, filled[b], len(bins[b])):
                        insort(by_load, (load + self.cost[i], b))
                    break
            else:
                left.append(i)
        return bins, left

    def _fits(self, more: int, tokens: int, sequences: int) -> bool:
        """Return whether a bin of ``sequences`` sequences and ``tokens`` tokens accepts one with ``more`` tokens."""
        limits = self.limits
        return (limits.tokens is None or tokens + more <= limits.tokens) and (
            limits.sequences is None or sequences < limits.sequences
        )
