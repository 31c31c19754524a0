"""Simulate the generation phase: lockstep, a shared queue, and partial rollouts; needs no model.

    python -m scripts.bench_generation [--gpu h200] [--median 2048] [--p90 6144] [--quick]

Response lengths are log-normal and limited to a cap. The student is Qwen3-4B with one engine per GPU. The first line
has the cost of a decode step (`distill/timing/README.md` derives it). "An engine" in the tables is the number of
responses that a step trains on, divided by the number of engines. The columns, as means over the steps after the first:

- phase: seconds of the phase; in brackets, its fraction of lockstep.
- limit: lower bound of the phase for this share and age, as a fraction of lockstep.
- wait: fraction of the phase in which an engine waits for other engines.
- discard: fraction of the phase in which an engine decodes tokens beyond T*, because T* is not yet known.
- cut after: T*, the number of new tokens after which unfinished responses are cut; in lockstep the longest response.
- older: fraction of the trained tokens that older weights sampled.
- first, bias: relative difference of the mean length to the mean of the distribution, in the first step and later.
- re-read: thousands of tokens per step and engine that are computed again, because the response continues.

The exit code is 1 if partial rollouts with the default share and age and a cap of 16,384 tokens need more than 0.5 of
lockstep with up to 32 responses an engine, or more than 0.65 with 64.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from distill.batching.flops import ModelFlops
from distill.config.gpus import parse_gpu
from distill.config.loop import PartialRolloutsConfig
from distill.timing.decode import DecodeCost, decode_cost
from distill.timing.lengths import Lengths
from distill.timing.queue import lockstep_queue, partial_queue
from distill.timing.rates import rates_of_gpu
from distill.timing.schedule import Generation, Job, in_progress, lockstep, lower_limit, partial_rollouts

QWEN3_4B = ModelFlops(hidden=2560, layers=36, heads=32, kv_heads=8, head_dim=128, intermediate=9728, vocab=151_936)
PARAMETERS = 4_022_468_096
DEFAULT = PartialRolloutsConfig()
GOAL_CAP, GOALS = 16_384, {8: 0.5, 16: 0.5, 32: 0.5, 64: 0.65}
"""Cap of the goal, and largest fraction of lockstep by the number of responses an engine."""
WORTH = 0.10
"""Fraction of the phase that a shared queue must save to be built."""


@dataclass(frozen=True)
class Grid:
    """Cases of the benchmark."""

    caps: Sequence[int] = (GOAL_CAP, 20_480)
    engines: Sequence[int] = (8, 32)
    batches: Sequence[int] = (8, 16, 32, 64)
    shares: Sequence[float] = (0.6, 0.7, 0.8, 0.9)
    ages: Sequence[int] = (1, 2, 3, 4)
    simulated: int = 4000
    """Approximate number of responses of a simulation, at least 30 steps."""


QUICK = Grid(caps=(GOAL_CAP,), engines=(8,), batches=(8, 64), shares=(0.9,), ages=(2,), simulated=500)


def job_of(grid: Grid, lengths: Lengths, cost: DecodeCost, engines: int, batch: int) -> Job:
    """Return the job with ``batch`` responses an engine."""
    responses = engines * batch
    return Job(engines, responses, lengths, cost, steps=max(30, grid.simulated // responses))


def line(name: str, job: Job, found: Generation, base: Generation, limit: float | None = None) -> str:
    """Return the table's line for one way to generate."""
    bound = "" if limit is None else f"{limit / base.seconds:.3f}"
    return (
        f"{job.responses // job.engines:9d}  {name:13s} {found.seconds:7.1f} ({found.seconds / base.seconds:.3f})"
        f" {bound:>6s} {found.wait_share:5.2f} {found.discarded_share:7.2f} {found.cut_after:9.0f}"
        f" {found.older_share:6.2f} {found.first_bias:+6.2f} {found.bias:+6.2f}"
        f" {found.reprefilled / job.engines / 1e3:7.1f}"
    )


HEAD = (
    f"{'an engine':>9s}  {'generation':13s} {'phase, s':>15s} {'limit':>6s} {'wait':>5s} {'discard':>7s}"
    f" {'cut after':>9s} {'older':>6s} {'first':>6s} {'bias':>6s} {'re-read':>7s}"
)


Fractions = dict[tuple[float, int, int, int], float]
"""Fraction of lockstep by finish_share, max_age, number of engines and responses an engine."""


def table(grid: Grid, lengths: Lengths, cost: DecodeCost, engines: int) -> Fractions:
    """Print the table for one cap and number of engines; return the fractions of partial rollouts."""
    print(f"\n{engines} engines, cap {lengths.cap}, mean length {lengths.mean:.0f}\n{HEAD}")
    fractions = {}
    for batch in grid.batches:
        job = job_of(grid, lengths, cost, engines, batch)
        base = lockstep(job)
        print(line("lockstep", job, base, base))
        for share, age in itertools.product(grid.shares, grid.ages):
            found = partial_rollouts(job, share, age)
            print(line(f"{share:g}, age {age}", job, found, base, lower_limit(job, share, age)))
            fractions[share, age, engines, batch] = found.seconds / base.seconds
    return fractions


def print_summary(fractions: Fractions) -> None:
    """Print the largest fraction of lockstep of each setting."""
    print(f"\ncap {GOAL_CAP}: largest fraction of lockstep, up to 32 responses an engine and with 64")
    for setting in dict.fromkeys((share, age) for share, age, _, _ in fractions):
        own = [(batch, value) for (*other, _, batch), value in fractions.items() if (*other,) == setting]
        few, many = (max((v for b, v in own if (b > 32) is more), default=0.0) for more in (False, True))
        print(f"{setting[0]:g}, age {setting[1]}  {few:.3f}  {many:.3f}")


def missed_goals(fractions: Fractions) -> list[str]:
    """Return one line for each case in which the default settings do not reach the goal."""
    default = DEFAULT.finish_share, DEFAULT.max_age
    return [
        f"FAILED: {engines} engines, {batch} an engine: {value:.3f} of lockstep, goal {GOALS[batch]:g}"
        for (share, age, engines, batch), value in fractions.items()
        if (share, age) == default and value > GOALS[batch]
    ]


@dataclass(frozen=True)
class QueueGain:
    """What a shared queue saves, as fractions of the phase; negative: it takes longer."""

    lockstep: float
    """Without partial rollouts, at the best number of running responses below that of lockstep."""
    partial: float
    """With partial rollouts, relative to a phase that ends at the same time, but in which all responses run."""
    ending: float
    """What partial rollouts save if a phase ends when enough responses have ended, and not at T* new tokens."""


def queue_gain(job: Job) -> QueueGain:
    """Return what a shared queue saves in one job, for the default share and age."""
    share, age = DEFAULT.finish_share, DEFAULT.max_age
    most, all_running = job.responses // job.engines, -(-in_progress(job.responses, share) // job.engines)
    fewer = sorted({max(1, int(most * part)) for part in (0.75, 0.5, 0.25)})
    base, cut = lockstep(job).seconds, partial_rollouts(job, share, age).seconds
    ended = partial_queue(job, share, age, all_running).seconds
    alone = min(lockstep_queue(job, count).seconds for count in fewer)
    both = min(partial_queue(job, share, age, count).seconds for count in fewer)
    return QueueGain(1 - alone / base, 1 - both / ended, 1 - ended / cut)


def print_queue(grid: Grid, lengths: Lengths, cost: DecodeCost) -> None:
    """Print what a shared queue saves, and the conclusion."""
    print("\nshared queue, cap 16384: fraction of the phase that it saves at its best number of running responses")
    print(f"{'engines':>7s} {'an engine':>9s}  {'lockstep':>8s}  {'partial rollouts':>16s}  {'end by time':>11s}")
    gains = []
    for engines, batch in itertools.product(grid.engines, grid.batches):
        job = replace(job_of(grid, lengths, cost, engines, batch), steps=max(5, 1000 // (engines * batch)))
        gains.append(gain := queue_gain(job))
        print(f"{engines:7d} {batch:9d}  {gain.lockstep:8.3f}  {gain.partial:16.3f}  {gain.ending:11.3f}", flush=True)
    alone, both = max(gain.lockstep for gain in gains), max(gain.partial for gain in gains)
    verdict = "is worth building" if max(alone, both) >= WORTH else "is not built"
    print(
        f"a shared queue saves at most {alone:.1%} of the phase without partial rollouts and {both:.1%} with them, so"
        f" it {verdict} (limit {WORTH:.0%}). All responses run from the start, so a queue can only delay some of"
        " them.\nColumn `end by time`: a phase that ends as soon as enough responses have ended would be shorter, but"
        " its set of responses would depend on time, so no run could be repeated."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; return exit code 0 if the default settings reach the goal, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gpu", default="h200", help="name of a GPU, or TFLOPS/GBPS (default: h200)")
    parser.add_argument("--median", type=float, default=2048, help="median length in tokens (default: 2048)")
    parser.add_argument("--p90", type=float, default=6144, help="90th percentile of the length (default: 6144)")
    parser.add_argument("--quick", action="store_true", help="few cases and steps; for tests")
    args = parser.parse_args(argv)
    grid = QUICK if args.quick else Grid()
    cost = decode_cost(QWEN3_4B, PARAMETERS, rates_of_gpu(parse_gpu(args.gpu)), itemsize=2)
    print(f"Qwen3-4B on {args.gpu}; log-normal lengths, median {args.median:g}, 90th percentile {args.p90:g}")
    print(cost.formula())
    fractions: Fractions = {}
    for cap, engines in itertools.product(grid.caps, grid.engines):
        found = table(grid, Lengths.of_percentiles(args.median, args.p90, cap), cost, engines)
        if cap == GOAL_CAP:
            fractions |= found
    print_summary(fractions)
    print_queue(grid, Lengths.of_percentiles(args.median, args.p90, GOAL_CAP), cost)
    missed = missed_goals(fractions)
    print("\n".join([*missed, "FAILED" if missed else "passed"]))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
