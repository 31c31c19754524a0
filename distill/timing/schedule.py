"""Simulation of the generation phases of a job over many training steps, on response lengths that are drawn by a seed.

Two ways to generate are simulated: lockstep, in which each step waits for its longest response, and partial rollouts.
``distill/timing/README.md`` defines the numbers. Equal arguments give equal results.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from distill.timing.decode import DecodeCost
from distill.timing.lengths import Lengths, Tokens

CUTOFF_POLL_S = 0.2
"""Seconds from the end of the last required response until all engines have received the final limit; an assumption."""


@dataclass(frozen=True)
class Job:
    """Generation of one job: engines, responses per step, lengths, and the cost of decoding."""

    engines: int
    responses: int
    """Number of responses that a step trains on (B)."""
    lengths: Lengths
    cost: DecodeCost
    per_prompt: int = 1
    """Number of consecutive responses to one prompt; they start on the same engine, which computes the prompt once."""
    prompt_tokens: int = 256
    """Number of tokens of each prompt."""
    steps: int = 40
    """Number of steps after the first ones, over which means are taken."""
    seed: int = 0

    def stream(self, count: int) -> Tokens:
        """Return the lengths of the first ``count`` responses of the job; equal for all ways to generate."""
        return self.lengths.draw(count, np.random.default_rng(self.seed))


@dataclass(frozen=True)
class Phase:
    """One simulated generation phase."""

    seconds: float
    busy: NDArray[np.float64]
    """Seconds in which each engine decodes, also tokens that are discarded; in the other time it waits."""
    trained: Tokens
    """Lengths of the responses that the step trains on."""
    older: int = 0
    """Number of tokens of these responses that older weights sampled."""
    reprefilled: int = 0
    """Number of tokens of continued responses, with their prompts, that engines compute again."""
    cut_after: int = 0
    """T*: number of new tokens after which unfinished responses were cut; without partial rollouts the longest."""
    most: int = 0
    """Largest number of responses that one engine runs at the same time."""
    discarding: float = 0.0
    """Seconds in which an engine decodes tokens beyond T*, which are discarded; mean over the engines."""


@dataclass(frozen=True)
class Generation:
    """Simulated generation of a job; means are over the steps after the first ones."""

    first: Phase
    steady: Sequence[Phase]
    lengths: Lengths

    @property
    def seconds(self) -> float:
        """Return the mean duration of the phase."""
        return _mean(phase.seconds for phase in self.steady)

    @property
    def wait_share(self) -> float:
        """Return the mean over steps of the fraction of the phase in which an engine waits for other engines.

        A run measures the same for each step, as ``timing/train/generation_wait_share``.
        """
        return _mean(1 - phase.busy.mean() / phase.seconds for phase in self.steady)

    @property
    def wait_seconds(self) -> float:
        """Return the mean seconds per step in which an engine waits for other engines."""
        return self.seconds - _mean(phase.busy.mean() for phase in self.steady)

    @property
    def discarded_share(self) -> float:
        """Return the mean over steps of the fraction of the phase in which an engine decodes discarded tokens."""
        return _mean(phase.discarding / phase.seconds for phase in self.steady)

    @property
    def older_share(self) -> float:
        """Return the fraction of the trained tokens that older weights sampled."""
        return sum(p.older for p in self.steady) / sum(int(p.trained.sum()) for p in self.steady)

    @property
    def first_bias(self) -> float:
        """Return the relative difference of the mean length in the first step to the mean of the distribution."""
        return float(self.first.trained.mean()) / self.lengths.mean - 1

    @property
    def bias(self) -> float:
        """Return the relative difference of the mean trained length to the mean of the distribution."""
        return float(np.concatenate([phase.trained for phase in self.steady]).mean()) / self.lengths.mean - 1

    @property
    def reprefilled(self) -> float:
        """Return the mean number of tokens per step that are computed again for continued responses."""
        return _mean(float(phase.reprefilled) for phase in self.steady)

    @property
    def cut_after(self) -> float:
        """Return the mean of T*."""
        return _mean(float(phase.cut_after) for phase in self.steady)


def _mean(values: object) -> float:
    return float(np.mean(list(values)))  # type: ignore[call-overload]


def lockstep(job: Job, warm_up: int = 1) -> Generation:
    """Simulate generation in which each step waits for its longest response.

    The prompts of a step are assigned as ``prompts[engine::engines]``.
    """
    count = job.responses
    stream = job.stream((warm_up + job.steps) * count)
    engine = np.arange(count) // job.per_prompt % job.engines
    phases = [_lockstep_phase(job, stream[at : at + count], engine) for at in range(0, len(stream), count)]
    return Generation(phases[0], phases[warm_up:], job.lengths)


def _lockstep_phase(job: Job, lengths: Tokens, engine: Tokens) -> Phase:
    context = np.full(len(lengths), job.prompt_tokens)
    busy = _prefill_new(job, engine) + _decode(job, engine, context, lengths)
    most = int(np.bincount(engine).max())
    return Phase(float(busy.max()), busy, lengths, cut_after=int(lengths.max()), most=most)


def _prefill_new(job: Job, engine: Tokens) -> NDArray[np.float64]:
    """Return the seconds of each engine for the prompts of new responses; ``engine``: index of each one's engine.

    The responses are in the order of the stream. A prompt is computed once for its consecutive responses.
    """
    prompts = np.bincount(engine[:: job.per_prompt], minlength=job.engines)
    return np.asarray(prompts * job.cost.prefill(np.array([job.prompt_tokens])), np.float64)


def _decode(job: Job, engine: Tokens, context: Tokens, new: Tokens) -> NDArray[np.float64]:
    """Return the seconds of each engine for decoding; ``engine``: index of each response's engine."""
    members = [np.flatnonzero(engine == one) for one in range(job.engines)]
    return np.array([job.cost.seconds(context[own], new[own]) for own in members])


def in_progress(responses: int, finish_share: float) -> int:
    """Return the number of responses in progress (M) for ``responses`` trained responses per step (B)."""
    return math.ceil(responses / Fraction(str(finish_share)))


@dataclass
class Pool:
    """Responses that are unfinished, or finished and not yet trained on, in the order in which they were started."""

    length: Tokens = field(default_factory=lambda: np.zeros(0, np.int64))
    """Number of tokens that each response has in the end."""
    done: Tokens = field(default_factory=lambda: np.zeros(0, np.int64))
    """Number of tokens that exist."""
    started: Tokens = field(default_factory=lambda: np.zeros(0, np.int64))
    """Index of the step in which each response was started."""

    def start(self, lengths: Tokens, step: int) -> None:
        """Add new responses with these lengths."""
        self.length = np.concatenate([self.length, lengths])
        self.done = np.concatenate([self.done, np.zeros_like(lengths)])
        self.started = np.concatenate([self.started, np.full_like(lengths, step)])

    def keep(self, kept: NDArray[np.bool_]) -> None:
        """Remove all other responses."""
        self.length, self.done, self.started = self.length[kept], self.done[kept], self.started[kept]

    @property
    def unfinished(self) -> NDArray[np.bool_]:
        """Return which responses are unfinished."""
        return self.done < self.length


def cut_after(remaining: Tokens, needed: int) -> int:
    """Return T*: the fewest new tokens after which ``needed`` of the responses have ended; 0 if none are needed."""
    return int(np.partition(remaining, needed - 1)[needed - 1]) if needed > 0 else 0


def assign(job: Job, context: Tokens) -> Tokens:
    """Return the index of the engine of each running response; ``context``: their tokens, 0 for new responses.

    New responses are assigned by prompt, as in lockstep. Continued responses follow, those with the longest contexts
    first, each to the engine with the fewest responses and, among these, the fewest tokens.
    """
    is_new = context == 0
    engine = np.zeros(len(context), np.int64)
    engine[is_new] = np.arange(is_new.sum()) // job.per_prompt % job.engines
    counts = np.bincount(engine[is_new], minlength=job.engines)
    load = [(int(count), 0, one) for one, count in enumerate(counts)]
    heapq.heapify(load)
    continued = np.flatnonzero(~is_new)
    for at in continued[np.argsort(-context[continued], kind="stable")]:
        count, tokens, one = load[0]
        engine[at] = one
        heapq.heapreplace(load, (count + 1, tokens + int(context[at]), one))
    return engine


def first_steps(max_age: int) -> int:
    """Return the number of first steps that the means of a simulation exclude.

    Later steps have the steady mix of lengths and ages. Responses rarely reach an age of 20, so a larger ``max_age``
    needs no more steps.
    """
    return 10 + 2 * min(max_age, 20)


def partial_rollouts(job: Job, finish_share: float, max_age: int, warm_up: int | None = None) -> Generation:
    """Simulate partial rollouts: a phase ends at T*, and other responses continue in the next steps.

    Responses of age ``max_age`` run to their end in a second part of the phase. ``warm_up``: number of first steps
    that means exclude; None: see ``first_steps``.
    """
    skipped = first_steps(max_age) if warm_up is None else warm_up
    count, pool, phases, at = in_progress(job.responses, finish_share), Pool(), [], 0
    stream = job.stream(count + (skipped + job.steps) * job.responses)
    for step in range(skipped + job.steps):
        new = count - len(pool.length)
        pool.start(stream[at : at + new], step)
        phases.append(_partial_phase(job, pool, step, max_age))
        at += new
    return Generation(phases[0], phases[skipped:], job.lengths)


def _partial_phase(job: Job, pool: Pool, step: int, max_age: int) -> Phase:
    """Simulate one step, and remove the responses that it trains on from the pool."""
    cost, before = job.cost, pool.done.copy()
    running = np.flatnonzero(pool.unfinished)
    done, remaining = pool.done[running], pool.length[running] - pool.done[running]
    limit = cut_after(remaining, job.responses - (len(pool.length) - len(running)))
    new = np.minimum(remaining, limit)
    engine, context = assign(job, done), job.prompt_tokens + done
    again = np.where(done > 0, context, 0)
    prefill = _prefill_new(job, engine[done == 0]) + [cost.prefill(again[engine == one]) for one in range(job.engines)]
    first = prefill + _decode(job, engine, context, new)
    pool.done[running] += new
    old = (remaining > limit) & (step - pool.started[running] >= max_age)
    rest = np.where(old, remaining - new, 0)
    second = _decode(job, engine[old], (context + new)[old], rest[old])
    # An engine with responses beyond T* decodes until it receives the final limit; the other engines wait.
    cuts = np.isin(np.arange(job.engines), engine[remaining > limit])
    end = float(first.max()) + CUTOFF_POLL_S * bool(cuts.any())
    busy = np.where(cuts, end, first)
    pool.done[running] += rest
    trained = np.flatnonzero(~pool.unfinished)[: job.responses]
    phase = Phase(
        seconds=end + float(second.max()),
        busy=busy + second,
        trained=pool.length[trained],
        older=int(before[trained].sum()),
        reprefilled=int(again.sum()),
        cut_after=limit,
        most=int(np.bincount(engine).max()),
        discarding=float((busy - first).mean()),
    )
    kept = np.ones(len(pool.length), bool)
    kept[trained] = False
    pool.keep(kept)
    return phase


def lower_limit(job: Job, finish_share: float, max_age: int) -> float:
    """Return a lower bound of the mean phase, in seconds, for any schedule with these settings.

    README.md derives it: the longest response of each step must be generated in ``max_age`` + 1 phases, and the tokens
    of all responses must be generated by engines that run a limited number of responses.
    """
    cost, steps = job.cost, job.steps
    drawn = job.stream(steps * job.responses).reshape(steps, job.responses)
    longest = drawn.max(axis=1).astype(float)
    per_token = cost.fixed + cost.weights
    read = cost.context * (job.prompt_tokens * drawn + drawn * (drawn - 1) / 2.0)
    own = cost.context * (job.prompt_tokens * longest + longest * (longest - 1) / 2)
    depth = (longest * (per_token + cost.sequence) + own).mean() / (max_age + 1)
    at_most = math.ceil(in_progress(job.responses, finish_share) / job.engines)
    tokens = drawn.sum(axis=1).mean() / job.engines
    work = tokens * (per_token / at_most + cost.sequence) + read.sum(axis=1).mean() / job.engines
    return float(max(depth, work))
