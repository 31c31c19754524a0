"""How evenly the plan deals answers to ranks, beside simpler ways, and how long it takes; no model is needed.

    python -m scripts.bench_packing [--seeds 5]

Lengths are drawn log-normal (median 2,048, sigma 1) up to a cap, costs are Qwen3-4B's. Ranks of a context-parallel
group share a micro-batch and are dealt to as one. Per case, means over the seeds, the worst seed in brackets:

- rows: micro-batches a rank, and the fewest that can hold the tokens within the budget.
- real: tokens that are neither a dummy's nor fill a micro-batch up to a multiple of the context-parallel size.
- lockstep: work of all ranks over ranks times the sum of each row's dearest micro-batch. ``possible`` is what no deal
  can exceed: ranks wait for the longest answer, and beside it the budget lets them do only so much. ``by tokens`` is
  the same algorithm with tokens for costs; ``in order`` deals round robin and fills micro-batches as answers come.
- seconds: the deal alone, and ``plan`` with the tensors of one rank; the first seed's.

The exit code is 1 where fewer than 98% are real, or lockstep is below both 95% and 99% of what is possible.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from distill.batching.balance import deal, fewest_rows, quadratic_cost
from distill.batching.plan import PackingConfig, plan
from distill.types import Layout, Problem, Prompt, Rollout

MEDIAN, SIGMA = 2048, 1.0
QWEN3_4B = dict(hidden=2560, layers=36, heads=32, kv_heads=8, head_dim=128, intermediate=9728, vocab=151_936)
QUADRATIC = quadratic_cost(**QWEN3_4B)
REAL, LOCKSTEP = 0.98, 0.95
NEAR = 0.99
"""Of what is possible, where 95% is not, or hardly."""

Rows = Sequence[Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Case:
    """Answers to deal, and to whom."""

    answers: int
    cap: int
    """Tokens of the longest answer."""
    ranks: int
    cp: int
    budget: int
    """Tokens of a micro-batch."""

    @property
    def groups(self) -> int:
        """Who gets a micro-batch of its own."""
        return self.ranks // self.cp

    @property
    def limits(self) -> PackingConfig:
        """One optimizer batch of all answers."""
        return PackingConfig(self.answers, None, self.budget, QUADRATIC)


CASES = [
    Case(answers, cap, ranks, cp, times * cap)
    for cap, answers, (ranks, cp), times in itertools.product(
        (8192, 20_480), (256, 512), ((8, 1), (32, 1), (32, 2)), (1, 2)
    )
]


@dataclass(frozen=True)
class Found:
    """Figures of one case and seed."""

    rows: int
    fewest: int
    real: float
    lockstep: float
    possible: float
    by_tokens: float
    in_order: float

    @property
    def holds(self) -> bool:
        """Whether both bounds do, the second as far as it is possible."""
        return self.real >= REAL and self.lockstep >= min(LOCKSTEP, NEAR * self.possible)


def draw(case: Case, seed: int) -> dict[int, int]:
    """Answer -> tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.empty(case.answers).log_normal_(math.log(MEDIAN), SIGMA, generator=generator)
    return dict(enumerate(lengths.clamp(2, case.cap).int().tolist()))


def cost_of(tokens: int) -> float:
    """A sequence's, in tokens."""
    return tokens + QUADRATIC * tokens * tokens


def measure(case: Case, seed: int) -> Found:
    """Deal the answers in all ways."""
    tokens = draw(case, seed)
    cost = {i: cost_of(n) for i, n in tokens.items()}
    rows = deal(tokens, cost, case.groups, case.limits)
    by_tokens = deal(tokens, {i: float(n) for i, n in tokens.items()}, case.groups, case.limits)
    return Found(
        rows=len(rows),
        fewest=fewest_rows(tokens, case.groups, case.limits),
        real=sum(tokens.values()) / computed(rows, tokens, case.cp),
        lockstep=lockstep(rows, cost),
        possible=possible(tokens, cost, case.groups, case.budget),
        by_tokens=lockstep(by_tokens, cost),
        in_order=lockstep(deal_in_order(tokens, case.groups, case.budget), cost),
    )


def computed(rows: Rows, tokens: Mapping[int, int], cp: int) -> int:
    """Tokens of all micro-batches: a dummy is one, and each is filled up to a multiple of ``cp``."""
    read = [sum(tokens[i] for i in members) or 1 for row in rows for members in row]
    return sum(-(-n // cp) * cp for n in read)


def lockstep(rows: Rows, cost: Mapping[int, float]) -> float:
    """Share of the ranks' time that is work, if all wait in each row for the dearest micro-batch."""
    work = [[sum(cost[i] for i in members) for members in row] for row in rows]
    return sum(map(sum, work)) / (len(rows[0]) * sum(map(max, work)))


def deal_in_order(tokens: Mapping[int, int], ranks: int, budget: int) -> Rows:
    """Round robin; a rank's micro-batch ends where the next answer would exceed the budget."""
    parts: list[list[list[int]]] = [[] for _ in range(ranks)]
    for i in tokens:
        part = parts[i % ranks]
        if not part or sum(tokens[j] for j in part[-1]) + tokens[i] > budget:
            part.append([])
        part[-1].append(i)
    return list(itertools.zip_longest(*parts, fillvalue=()))


def possible(tokens: Mapping[int, int], cost: Mapping[int, float], ranks: int, budget: int) -> float:
    """No deal has a higher lockstep efficiency, in however many rows; cost must grow faster than tokens.

    Rows by time, the longest first. The first j - 1 hold at most (j - 1) * ranks * budget tokens, so the j-th waits at
    least for the longest answer that does not go into these if longer ones go first. The first j rows do no more work
    than their ranks have time for, nor more than that of the longest answers that fill the budget. All other work takes
    at least its share of a rank. The highest of these times over j is a lower bound.
    """
    longest_first = sorted(tokens, key=lambda i: -tokens[i])
    total = sum(cost.values())
    least = time_spent = done = 0.0
    for j in itertools.count(1):
        waits_for = _first_beyond(longest_first, tokens, (j - 1) * ranks * budget, budget)
        if waits_for is None:
            break
        time_spent += cost[waits_for]
        done = min(_most_work(longest_first, tokens, cost, j * ranks * budget, budget), done + ranks * cost[waits_for])
        least = max(least, time_spent + (total - done) / ranks)
    return min(1.0, total / (ranks * least))


def _first_beyond(longest_first: Sequence[int], tokens: Mapping[int, int], room: int, budget: int) -> int | None:
    for i in longest_first:
        room -= min(tokens[i], budget)
        if room < 0:
            return i
    return None


def _most_work(
    longest_first: Sequence[int], tokens: Mapping[int, int], cost: Mapping[int, float], room: int, budget: int
) -> float:
    work = 0.0
    for i in longest_first:
        taken = min(room, n := min(tokens[i], budget))
        work += taken / n * cost[i]
        room -= taken
    return work


def seconds(case: Case, seed: int) -> tuple[float, float]:
    """Of the deal alone, and of ``plan`` with the tensors of one rank."""
    tokens = draw(case, seed)
    rollouts = [
        Rollout(Prompt(i, (i,), Problem("")), 0, (7,) * (n - 1), (-1.0,) * (n - 1), "stop", 0)
        for i, n in tokens.items()
    ]
    start = time.perf_counter()
    deal(tokens, {i: cost_of(n) for i, n in tokens.items()}, case.groups, case.limits)
    dealt = time.perf_counter()
    plan(rollouts, Layout(0, case.groups), case.limits, seed, step=0)
    return dealt - start, time.perf_counter() - dealt


HEAD = (
    f"{'answers':>7s} {'cap':>6s} {'ranks':>5s} {'cp':>2s} {'budget':>6s}  {'rows (fewest)':>13s}  {'real':>6s}"
    f"  {'lockstep':>13s} {'possible':>8s} {'by tokens':>9s} {'in order':>8s}  {'deal, s':>7s} {'plan, s':>7s}"
)


def line(case: Case, found: Sequence[Found], dealing: float, planning: float) -> str:
    """A line of the table."""

    def mean(name: str) -> float:
        return statistics.mean(getattr(one, name) for one in found)

    rows = f"{mean('rows'):.1f} ({mean('fewest'):.1f})"
    ours = f"{mean('lockstep'):.3f} ({min(one.lockstep for one in found):.3f})"
    return (
        f"{case.answers:7d} {case.cap:6d} {case.ranks:5d} {case.cp:2d} {case.budget:6d}  {rows:>13s}"
        f"  {mean('real'):6.4f}  {ours:>13s} {mean('possible'):8.3f} {mean('by_tokens'):9.3f} {mean('in_order'):8.3f}"
        f"  {dealing:7.3f} {planning:7.3f}"
    )


def main() -> int:
    """Print the table; 0 if both bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="draws of each case")
    args = parser.parse_args()
    failed = 0
    print(f"a sequence of n tokens costs n + {QUADRATIC:.3g} n^2; {args.seeds} draws a case\n{HEAD}")
    for case in CASES:
        found = [measure(case, seed) for seed in range(args.seeds)]
        missed = sum(not one.holds for one in found)
        failed += missed
        print(line(case, found, *seconds(case, 0)) + f"  MISSED by {missed}" * bool(missed), flush=True)
    print(f"FAILED: {failed} draws miss a bound" if failed else "passed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
