"""Simulation of a queue of responses that all engines share: an engine takes the next response when it has room.

No run has such a queue. The simulation shows what it would gain; scripts/MEASUREMENTS.md has the conclusion.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np

from distill.timing.decode import DecodeCost
from distill.timing.lengths import Tokens
from distill.timing.schedule import Generation, Job, Phase, Pool, first_steps, in_progress


@dataclass
class _Engine:
    """One engine between two ends of responses."""

    clock: float = 0.0
    """Seconds from the start of the phase to the last event."""
    steps: int = 0
    """Number of decode steps until the last event."""
    tokens: int = 0
    """Total context of the running responses at the last event."""
    running: list[tuple[int, int]] = field(default_factory=list)
    """Heap of (number of steps at which the response ends, index of the response)."""
    first_step: dict[int, int] = field(default_factory=dict)
    """Maps a running response to the number of steps at its start."""

    def start(self, cost: DecodeCost, index: int, context: int, new: int) -> None:
        """Compute the prompt of a response and add it to the running ones, which wait meanwhile."""
        self.clock += cost.prefill(np.array([context]))
        self.tokens += context
        self.first_step[index] = self.steps
        heapq.heappush(self.running, (self.steps + new, index))

    def until_next(self, cost: DecodeCost) -> float:
        """Return the seconds from the last event to the next end of a response."""
        steps, running = self.running[0][0] - self.steps, len(self.running)
        return steps * float(cost.step(running, self.tokens + running * (steps - 1) / 2))

    def finish_next(self, cost: DecodeCost) -> int:
        """Advance to the next end of a response, and return its index."""
        self.clock += self.until_next(cost)
        end, index = heapq.heappop(self.running)
        self.tokens += (len(self.running) + 1) * (end - self.steps)
        self.steps = end
        return index

    def remove(self, index: int, context: int, new: int) -> None:
        """Free the cache of an ended response."""
        self.tokens -= context + new
        del self.first_step[index]

    def steps_at(self, cost: DecodeCost, seconds: float) -> int:
        """Return the number of decode steps that are done after ``seconds``, before the next end."""
        if not self.running or seconds <= self.clock:
            return self.steps
        share = min(1.0, (seconds - self.clock) / self.until_next(cost))
        return self.steps + int(share * (self.running[0][0] - self.steps))


def run_queue(
    job: Job, context: Tokens, new: Tokens, order: Tokens, at_most: int, needed: int | None = None
) -> tuple[list[_Engine], Tokens, float]:
    """Generate responses from a shared queue; return engines, tokens of each response, and the seconds.

    ``context``, ``new``: tokens of each response before the phase, and tokens that it needs to end. ``order``: indices
    in the order of the queue. ``at_most``: responses that an engine runs at a time. ``needed``: number of ended
    responses after which all others are cut; None: all must end.
    """
    engines = [_Engine() for _ in range(job.engines)]
    waiting, made = list(order[::-1]), np.zeros_like(new)
    for _ in range(at_most):
        for engine in engines:
            if waiting:
                index = int(waiting.pop())
                engine.start(job.cost, index, int(context[index]), int(new[index]))
    events = [(one.clock + one.until_next(job.cost), i) for i, one in enumerate(engines) if one.running]
    heapq.heapify(events)
    left, seconds = len(order) if needed is None else needed, 0.0
    while events and left > 0:
        seconds, i = heapq.heappop(events)
        engine = engines[i]
        index = engine.finish_next(job.cost)
        made[index] = new[index]
        engine.remove(index, int(context[index]), int(new[index]))
        left -= 1
        if waiting:
            following = int(waiting.pop())
            engine.start(job.cost, following, int(context[following]), int(new[following]))
        if engine.running:
            heapq.heappush(events, (engine.clock + engine.until_next(job.cost), i))
    for engine in engines:
        steps = engine.steps_at(job.cost, seconds)
        for index, first in engine.first_step.items():
            made[index] = min(steps - first, int(new[index]))
    return engines, made, seconds


def lockstep_queue(job: Job, at_most: int, warm_up: int = 1) -> Generation:
    """Simulate generation that waits for the longest response, from a shared queue in the order of the data."""
    count = job.responses
    stream, phases = job.stream((warm_up + job.steps) * count), []
    context, order = np.full(count, job.prompt_tokens), np.arange(count)
    for at in range(0, len(stream), count):
        lengths = stream[at : at + count]
        engines, _, seconds = run_queue(job, context, lengths, order, at_most)
        busy = np.array([engine.clock for engine in engines])
        phases.append(Phase(seconds, busy, lengths, most=at_most))
    return Generation(phases[0], phases[warm_up:], job.lengths)


def partial_queue(job: Job, finish_share: float, max_age: int, at_most: int) -> Generation:
    """Simulate partial rollouts whose responses come from a shared queue; the phase ends when enough have ended.

    The queue has continued responses first, those with the longest context in front. Responses of age ``max_age`` run
    to their end. The age of a response counts from the first phase in which an engine takes it.
    """
    skipped = first_steps(max_age)
    count, pool, phases, at = in_progress(job.responses, finish_share), Pool(), [], 0
    stream = job.stream(count + (skipped + job.steps) * job.responses)
    for step in range(skipped + job.steps):
        new = count - len(pool.length)
        pool.start(stream[at : at + new], step)
        phases.append(_partial_phase(job, pool, step, max_age, at_most))
        at += new
    return Generation(phases[0], phases[skipped:], job.lengths)


def _partial_phase(job: Job, pool: Pool, step: int, max_age: int, at_most: int) -> Phase:
    before, running = pool.done.copy(), np.flatnonzero(pool.unfinished)
    pool.started[pool.done == 0] = step  # no engine has taken them yet
    done, new = pool.done[running], pool.length[running] - pool.done[running]
    context, order = job.prompt_tokens + done, np.argsort(-done, kind="stable")
    needed = job.responses - (len(pool.length) - len(running))
    engines, made, seconds = run_queue(job, context, new, order, at_most, needed)
    busy = np.array([min(engine.clock, seconds) if not engine.running else seconds for engine in engines])
    pool.done[running] += made
    old = pool.unfinished & (step - pool.started >= max_age)
    rest = np.flatnonzero(old)
    if len(rest):
        left = pool.length[rest] - pool.done[rest]
        order = np.argsort(-left, kind="stable")
        more, _, extra = run_queue(job, pool.done[rest] * 0 + 1, left, order, at_most)
        seconds, busy = seconds + extra, busy + [engine.clock for engine in more]
        pool.done[rest] = pool.length[rest]
    trained = np.flatnonzero(~pool.unfinished)[: job.responses]
    phase = Phase(seconds, busy, pool.length[trained], int(before[trained].sum()), int(context[done > 0].sum()))
    kept = np.ones(len(pool.length), bool)
    kept[trained] = False
    pool.keep(kept)
    return phase
