"""Measure how evenly responses are balanced over ranks, and how long planning takes; needs no model.

    python -m scripts.bench_packing [--seeds 5]

Response lengths are drawn from a log-normal distribution (median 2,048 tokens, sigma 1) and limited to a cap. The cost
of a response is its compute in Qwen3-4B. The ranks of a context-parallel group share their micro-batches and count as
one rank. In each round every rank computes one micro-batch, and all ranks wait for the slowest micro-batch. The table
has one line per case, with these columns as means over the seeds:

- rounds: number of rounds; in brackets, the smallest number with enough room for all tokens.
- real: fraction of the computed tokens that are neither in a dummy micro-batch nor padding.
- lockstep: efficiency, the fraction of the ranks' time that is spent on work and not on waiting; in brackets, the value
  of the worst seed.
- possible: an upper bound of the efficiency for these lengths and this budget.
- by tokens: efficiency of the same algorithm if a response's cost is its number of tokens.
- in order: efficiency if responses are assigned to ranks round robin and micro-batches are filled in order.
- bal., s and plan, s: seconds of ``balance``, and of ``plan`` with the tensors of one rank, for the first seed.

The last line has the CPU time of ``plan`` on one rank: 512 responses of 20,000 tokens on 32 ranks, teacher groups of 8.

The exit code is 1 if fewer than 98% of the tokens are real, or if the efficiency is below 95% and also below 99% of the
upper bound.
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

from distill.batching.balance import balance, fewest_rounds
from distill.batching.flops import ModelFlops
from distill.batching.plan import PackingConfig, plan
from distill.types import Layout, Problem, Prompt, Rollout

MEDIAN, SIGMA = 2048, 1.0
QWEN3_4B = dict(hidden=2560, layers=36, heads=32, kv_heads=8, head_dim=128, intermediate=9728, vocab=151_936)
QUADRATIC = ModelFlops(**QWEN3_4B).quadratic
REAL, LOCKSTEP = 0.98, 0.95
NEAR = 0.99
"""Required fraction of the upper bound, if this is lower than LOCKSTEP."""

Rounds = Sequence[Sequence[Sequence[int]]]
"""Response ids by round, rank and micro-batch."""


@dataclass(frozen=True)
class Case:
    """One case of the benchmark: number and maximum length of responses, ranks and token budget."""

    responses: int
    cap: int
    """Maximum tokens of a response."""
    ranks: int
    cp: int
    """Number of ranks in a context-parallel group."""
    budget: int
    """Maximum tokens of a micro-batch."""

    @property
    def groups(self) -> int:
        """Return the number of context-parallel groups, each with its own micro-batches."""
        return self.ranks // self.cp

    @property
    def limits(self) -> PackingConfig:
        """Return the limits for ``balance`` and ``plan``, with all responses in one optimizer batch."""
        return PackingConfig(self.responses, None, self.budget, QUADRATIC)


CASES = [
    Case(responses, cap, ranks, cp, times * cap)
    for cap, responses, (ranks, cp), times in itertools.product(
        (8192, 20_480), (256, 512), ((8, 1), (32, 1), (32, 2)), (1, 2)
    )
]


@dataclass(frozen=True)
class Found:
    """Measurements of one case and seed; the module's docstring describes the columns."""

    rounds: int
    fewest: int
    real: float
    lockstep: float
    possible: float
    by_tokens: float
    in_order: float

    @property
    def holds(self) -> bool:
        """Return whether the fraction of real tokens and the efficiency reach their required values."""
        return self.real >= REAL and self.lockstep >= min(LOCKSTEP, NEAR * self.possible)


def draw(case: Case, seed: int) -> dict[int, int]:
    """Return random response lengths in tokens, by response id."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.empty(case.responses).log_normal_(math.log(MEDIAN), SIGMA, generator=generator)
    return dict(enumerate(lengths.clamp(2, case.cap).int().tolist()))


def cost_of(tokens: int) -> float:
    """Return the cost of a sequence, in units of the cost of one token without attention."""
    return tokens + QUADRATIC * tokens * tokens


def measure(case: Case, seed: int) -> Found:
    """Balance one random draw of responses with every method and return the measurements."""
    tokens = draw(case, seed)
    cost = {i: cost_of(n) for i, n in tokens.items()}
    rounds = balance(tokens, cost, case.groups, case.limits)
    by_tokens = balance(tokens, {i: float(n) for i, n in tokens.items()}, case.groups, case.limits)
    return Found(
        rounds=len(rounds),
        fewest=fewest_rounds(tokens, case.groups, case.limits),
        real=sum(tokens.values()) / computed(rounds, tokens, case.cp),
        lockstep=lockstep(rounds, cost),
        possible=possible(tokens, cost, case.groups, case.budget),
        by_tokens=lockstep(by_tokens, cost),
        in_order=lockstep(assign_in_order(tokens, case.groups, case.budget), cost),
    )


def computed(rounds: Rounds, tokens: Mapping[int, int], cp: int) -> int:
    """Return the computed tokens of all micro-batches, with padding to a multiple of ``cp``; a dummy has 1 token."""
    read = [sum(tokens[i] for i in members) or 1 for by_rank in rounds for members in by_rank]
    return sum(-(-n // cp) * cp for n in read)


def lockstep(rounds: Rounds, cost: Mapping[int, float]) -> float:
    """Return the fraction of time spent on work if all ranks wait for the slowest micro-batch of each round."""
    work = [[sum(cost[i] for i in members) for members in by_rank] for by_rank in rounds]
    return sum(map(sum, work)) / (len(rounds[0]) * sum(map(max, work)))


def assign_in_order(tokens: Mapping[int, int], ranks: int, budget: int) -> Rounds:
    """Return a baseline: responses assigned round robin, and micro-batches filled in order up to the budget."""
    parts: list[list[list[int]]] = [[] for _ in range(ranks)]
    for i in tokens:
        part = parts[i % ranks]
        if not part or sum(tokens[j] for j in part[-1]) + tokens[i] > budget:
            part.append([])
        part[-1].append(i)
    return list(itertools.zip_longest(*parts, fillvalue=()))


def possible(tokens: Mapping[int, int], cost: Mapping[int, float], ranks: int, budget: int) -> float:
    """Return an upper bound of the efficiency ``lockstep`` for any number of rounds.

    The cost per token must increase with the length. Sort the rounds by time, longest first. The first j - 1 rounds
    contain at most (j - 1) * ranks * budget tokens. If the longest responses use all of them, round j takes at least as
    long as the longest remaining response. The work of the first j rounds is limited in two ways: by ranks times their
    time, and by the cost of the longest responses that fill their budget. The remaining work takes at least its cost /
    ranks. The total time is at least the sum of both times, for every j, so the maximum over j is a lower bound.
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
    """Return the seconds of ``balance``, and of ``plan`` with the tensors of one rank."""
    tokens = draw(case, seed)
    rollouts = [
        Rollout(Prompt(i, (i,), Problem("")), 0, (7,) * (n - 1), (-1.0,) * (n - 1), "stop", 0)
        for i, n in tokens.items()
    ]
    start = time.perf_counter()
    balance(tokens, {i: cost_of(n) for i, n in tokens.items()}, case.groups, case.limits)
    balanced = time.perf_counter()
    plan(rollouts, Layout(0, case.groups), case.limits, seed, step=0)
    return balanced - start, time.perf_counter() - balanced


def long_plan_seconds(responses: int = 512, tokens: int = 20_000, ranks: int = 32, teacher: int = 8) -> float:
    """Return the CPU seconds of ``plan`` on one rank for responses of equal length, in teacher groups."""
    rollouts = [
        Rollout(Prompt(i // 8, (i // 8,) * 300, Problem("")), i % 8, (7,) * tokens, (-1.0,) * tokens, "stop", 0)
        for i in range(responses)
    ]
    limits = PackingConfig(responses, None, tokens + 300, QUADRATIC)
    start = time.process_time()
    plan(rollouts, Layout(0, ranks, teacher_size=teacher), limits, seed=0, step=0)
    return time.process_time() - start


HEAD = (
    f"{'resp.':>7s} {'cap':>6s} {'ranks':>5s} {'cp':>2s} {'budget':>6s}  {'rounds (min.)':>13s}  {'real':>6s}"
    f"  {'lockstep':>13s} {'possible':>8s} {'by tokens':>9s} {'in order':>8s}  {'bal., s':>7s} {'plan, s':>7s}"
)


def line(case: Case, found: Sequence[Found], balancing: float, planning: float) -> str:
    """Return the table's line for one case; ``found``: one entry per seed."""

    def mean(name: str) -> float:
        return statistics.mean(getattr(one, name) for one in found)

    rounds = f"{mean('rounds'):.1f} ({mean('fewest'):.1f})"
    ours = f"{mean('lockstep'):.3f} ({min(one.lockstep for one in found):.3f})"
    return (
        f"{case.responses:7d} {case.cap:6d} {case.ranks:5d} {case.cp:2d} {case.budget:6d}  {rounds:>13s}"
        f"  {mean('real'):6.4f}  {ours:>13s} {mean('possible'):8.3f} {mean('by_tokens'):9.3f} {mean('in_order'):8.3f}"
        f"  {balancing:7.3f} {planning:7.3f}"
    )


def main() -> int:
    """Print the table; return exit code 0 if all draws reach the required values, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="random draws per case")
    args = parser.parse_args()
    failed = 0
    print(f"a sequence of n tokens costs n + {QUADRATIC:.3g} n^2; {args.seeds} draws per case\n{HEAD}")
    for case in CASES:
        found = [measure(case, seed) for seed in range(args.seeds)]
        missed = sum(not one.holds for one in found)
        failed += missed
        print(line(case, found, *seconds(case, 0)) + f"  FAILED in {missed} draws" * bool(missed), flush=True)
    print(
        f"plan of 512 responses of 20,000 tokens on 32 ranks, teacher groups of 8: {long_plan_seconds():.2f} s of CPU"
    )
    print(f"FAILED: {failed} draws do not reach the required values" if failed else "passed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
