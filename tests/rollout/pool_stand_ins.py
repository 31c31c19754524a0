"""Ranks as threads, with engines whose responses have given lengths, for tests of partial rollouts."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from distill.config.loop import DistillationConfig, PartialRolloutsConfig
from distill.metrics.step import Metrics, _combine
from distill.rollout.partial import PartialRollouts
from distill.rollout.requests import Cutoff, OnEnded, Request, Segment
from distill.types import Problem, Prompt, Rollout, Sampling

MAX_NEW_TOKENS = 1000


def length_of(order: int) -> int:
    """Return the length of a response: widely spread, the same in every run."""
    return 1 + int(random.Random(order).lognormvariate(2.5, 1.0))


def token(order: int, position: int) -> int:
    """Return the token that every engine samples at a position of a response."""
    return (1009 * order + position) % 250


class Ranks:
    """Threads that gather values from each other in place of processes."""

    def __init__(self, size: int) -> None:
        self.size, self.store = size, dist.HashStore()
        self._barrier, self._values = threading.Barrier(size, timeout=60), [None] * size

    def world(self, rank: int) -> Any:
        """Return the stand-in of a World."""

        def gather(value: Any) -> list[Any]:
            self._values[rank] = value
            self._barrier.wait()
            found = list(self._values)
            self._barrier.wait()
            return found

        return SimpleNamespace(
            rank=rank,
            size=self.size,
            is_main=rank == 0,
            store=self.store,
            gather=gather,
            barrier=self._barrier.wait,
            broadcast=lambda value: gather(value)[0],
        )

    def run(self, of_rank: Callable[[Any], Any]) -> list[Any]:
        """Call ``of_rank`` with the world of each rank, and return the results."""

        def guarded(rank: int) -> Any:
            try:
                return of_rank(self.world(rank))
            except Exception as error:
                self._barrier.abort()
                return error

        with ThreadPoolExecutor(self.size) as threads:
            found = list(threads.map(guarded, range(self.size)))
        errors = [each for each in found if isinstance(each, Exception)]
        for error in sorted(errors, key=lambda each: isinstance(each, threading.BrokenBarrierError)):
            raise error
        return found


class ScriptedEngine:
    """An engine that samples one token of each segment after the other, and stops at a cutoff like a real one.

    ``length_of``: function that returns the length of a response. The engine reads the cutoff's bound at random times.
    """

    window = MAX_NEW_TOKENS + 100

    def __init__(self, rank: int, replicas: int, length_of: Callable[[int], int]) -> None:
        self.replica, self.replicas, self.version = rank, replicas, -1
        self._length_of = length_of
        self._times = random.Random()
        self.requests: list[list[Request]] = []
        """Requests of each call."""

    def segments(
        self, requests: Sequence[Request], sampling: Sampling, cutoff: Cutoff | None, on_ended: OnEnded
    ) -> list[Segment]:
        """Return a segment for each request, see Engine.segments."""
        self.requests.append(list(requests))
        running = {request.order: request for request in requests}
        found: dict[int, Segment] = {}
        tokens = 0
        while running:
            bound = cutoff.limit() if cutoff is not None and self._times.random() < 0.3 else None
            if bound is not None and tokens >= bound:
                break
            tokens += 1
            ended = [order for order, request in running.items() if self._left(request) == tokens]
            for order in ended:
                found[order] = self._segment(running.pop(order), tokens, "stop")
            if ended and cutoff is not None:
                cutoff.ended([tokens] * len(ended))
            for order in ended:
                on_ended(found[order])
        found |= {order: self._segment(request, tokens, "cut") for order, request in running.items()}
        return [found[request.order] for request in requests]

    def _left(self, request: Request) -> int:
        return self._length_of(request.order) - len(request.generated_ids)

    def _segment(self, request: Request, count: int, finish: Any) -> Segment:
        start = len(request.generated_ids)
        ids = tuple(token(request.order, start + i) for i in range(count))
        logprobs = tuple(-0.1 * request.seed % 7 for _ in ids) if request.with_logprobs else ()
        return Segment(request, ids, logprobs, finish)


class Responses:
    """Stand-in of StepResponses: sampling settings, and what was added for preparation."""

    def __init__(self, sampling: Sampling, omitted: Callable[[int, Sequence[Prompt]], Any]) -> None:
        self._sampling, self._omitted = sampling, omitted
        self.preparation = self
        self.added: list[Rollout] = []
        self.waiting: list[list[Rollout]] = []

    def sampling_at(self, step: int, prompts: Sequence[Prompt]) -> Sampling:
        """Return the settings of a step, whose limit grows by one with each step."""
        limit = self._sampling.max_new_tokens + step
        return replace(self._sampling, max_new_tokens=limit, omitted=tuple(self._omitted(step, prompts)))

    @contextmanager
    def while_generating(self, waiting: Sequence[Rollout] = ()) -> Iterator[Callable[[Rollout], None]]:
        """Record the responses."""
        self.waiting.append(list(waiting))
        yield self.added.append


@dataclass
class Case:
    """A run of partial rollouts with scripted engines; every step has P prompts with G responses."""

    prompts: int = 2
    responses: int = 1
    finish_share: float = 0.5
    max_age: int = 1
    length_of: Callable[[int], int] = length_of
    problems: int = 5
    off_policy: float = 0.0
    logprob_interval: int = 1

    @property
    def config(self) -> DistillationConfig:
        """Return the settings of the training loop."""
        loop = DistillationConfig(
            num_prompts_per_step=self.prompts,
            num_generations_per_prompt=self.responses,
            partial_rollouts=PartialRolloutsConfig(True, self.finish_share, self.max_age),
        )
        return replace(loop, off_policy=replace(loop.off_policy, share=self.off_policy))

    def batch(self, step: int) -> tuple[Prompt, ...]:
        """Return the batch of prompts of a step: all problems in turn."""
        first = step * self.prompts
        return tuple(self.prompt(i % self.problems) for i in range(first, first + self.prompts))

    def prompt(self, prompt_id: int) -> Prompt:
        """Return a prompt of 1 to 3 tokens."""
        return Prompt(prompt_id, (prompt_id,) * (prompt_id % 3 + 1), Problem(f"p{prompt_id}"))

    def omitted(self, step: int, prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
        """Return the last pairs of a batch, which come from the dataset."""
        pairs = [(prompt.prompt_id, index) for prompt in prompts for index in range(self.responses)]
        return pairs[len(pairs) - round(self.off_policy * len(pairs)) :]

    def strategy(self, world: Any, first_step: int = 0, last_step: int = 99) -> Any:
        """Return the strategy of a rank; its ``engine`` and ``responses`` are attributes."""

        def find(prompt_id: int, student_ids: tuple[int, ...]) -> Prompt | None:
            found = self.prompt(prompt_id)
            return found if prompt_id < self.problems and found.student_ids == student_ids else None

        data = SimpleNamespace(batch=self.batch, prompts=SimpleNamespace(find=find))
        sampling = Sampling(1.0, MAX_NEW_TOKENS, (), self.responses, seed=3, logprob_interval=self.logprob_interval)
        given, engine = Responses(sampling, self.omitted), ScriptedEngine(world.rank, world.size, self.length_of)
        made: Any = PartialRollouts(self.config, world, data, given, engine, first_step, last_step)  # type: ignore[arg-type]
        made.engine, made.responses = engine, given
        return made


@dataclass
class Step:
    """Results of one step."""

    trained: list[Rollout]
    """All ranks' responses, in order."""
    metrics: dict[str, float]
    file: bytes
    """The pool after the step."""
    info: dict[str, Any]


def run_steps(
    case: Case, ranks: int, steps: Sequence[int], found: Any = None, last_step: int = 99
) -> tuple[list[Step], list[Any]]:
    """Run the steps on threads; return their results, and each rank's strategy. ``found``: checkpoint to resume."""
    strategies: list[Any] = [None] * ranks

    def of_rank(world: Any) -> list[Step]:
        made: Any = case.strategy(world, steps[0], last_step)
        strategies[world.rank] = made
        if found is not None:
            made.restore(found)
        results = []
        for step in steps:
            made.engine.version, metrics = step, Metrics()
            generated = made.generate(step, metrics)
            parts = world.gather((generated.own, metrics.on_host()))
            rollouts = sorted((r for own, _ in parts for r in own), key=lambda r: r.order)
            values = _combine(numbers for _, numbers in parts)
            results.append(Step(rollouts, values, made.files(step + 1)["partial_rollouts.npz"], made.info(step + 1)))
        return results

    return Ranks(ranks).run(of_rank)[0], strategies


def checkpoint(folder: Path, step: Step) -> Any:
    """Write the pool of a step to a folder, as a checkpoint that a run resumes from."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "partial_rollouts.npz").write_bytes(step.file)
    return SimpleNamespace(path=folder, info={"files": {"partial_rollouts.npz": {}}, **step.info})
