"""Partial rollouts: a step ends generation when enough responses are finished; later steps continue the other ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill.checkpoint import CheckpointError, Found, files_of
from distill.checkpoint.manifest import read_failed, read_file_or_error
from distill.config.loop import DistillationConfig
from distill.data.prompts import PromptOrder
from distill.distributed.world import World
from distill.errors import RunFailed
from distill.metrics.step import Metrics
from distill.rollout.cutoff import EndedSegments, StoreCutoff
from distill.rollout.engine import Engine
from distill.rollout.generation import POOL_FILE, POOL_INFO, Generated, warn_of_discarded
from distill.rollout.pool import Pool, PooledResponse, cut, cut_after, deal
from distill.rollout.pool_file import StoredPool, UnknownFormatError, from_bytes, to_bytes
from distill.rollout.requests import Cutoff, Segment
from distill.rollout.responses import StepResponses
from distill.rollout.stream import Stream
from distill.types import Rollout, Sampling

log = logging.getLogger(__name__)

_PREFIX = "train/partial/"


class PartialRollouts:
    """The engines always generate ``most_in_progress`` responses at the same time; each step trains on the oldest ones.

    The number of trained responses per step is the same as without partial rollouts. The pool of responses is equal on
    all ranks, so every rank computes the same cut, the same trained responses and the same distribution over engines.
    ``config``: settings of the training loop. ``first_step``, ``last_step``: numbers of finished steps at the start and
    at the end of the run. The constructor is collective.
    """

    def __init__(
        self,
        config: DistillationConfig,
        world: World,
        prompts: PromptOrder,
        responses: StepResponses,
        engine: Engine,
        first_step: int,
        last_step: int,
    ) -> None:
        self._config, self._world, self._responses, self._engine = config, world, responses, engine
        self._prompts, self._first_step, self._last_step = prompts, first_step, last_step
        per_step = config.responses_per_step
        self._stream = Stream(prompts.batch, responses.sampling_at, engine.window, per_step)
        self._pools = {first_step: Pool(next_order=first_step * per_step)}
        """Pools before and after the last generated step, by number of finished steps.

        A checkpoint after a validation, which an alarm requests, is saved after the next step's responses were
        generated, and needs the pool before them.
        """
        self._ended = EndedSegments(world.store, engine.replica, engine.replicas)
        world.barrier()

    def generate(self, step: int, metrics: Metrics) -> Generated:
        """Continue the unfinished responses, start new ones, and return the oldest finished ones; collective."""
        assert self._engine.version == step, (self._engine.version, step)
        loop = self._config
        before = self._pools[step]
        free = loop.most_in_progress - len(before.responses)
        pool = before.with_new(self._stream.new(before.next_order, max(0, free), step))
        phase = _Phase(self._world, self._engine, self._responses.sampling_at(step, ()), step)
        needed = loop.generated_per_step - len(pool.waiting)
        dealt = self._dealt(pool)
        with self._responses.preparation.while_generating(self._own_rollouts(pool.waiting, step)) as add:
            pool, limit = phase.cut(pool, dealt, needed, StoreCutoff(self._ended, step, needed), add)
            pool = phase.complete(pool, dealt, loop.partial_rollouts.max_age, add)
        trained, after = pool.split(loop.generated_per_step)
        self._pools = {step: before, step + 1: after}
        metrics.add_same(_step_metrics(phase.read_again, trained, after, step))
        metrics.add_same({f"{_PREFIX}cut_after_tokens": float(limit)})
        if step + 1 == self._last_step:
            metrics.add_same({f"{_PREFIX}untrained_tokens": float(after.tokens)})
        metrics.add_totals({f"{_PREFIX}discarded_tokens": float(phase.discarded)})
        metrics.add({"timing/train/generation_busy": (phase.busy_s, 1.0)})
        batch = self._prompts.batch(step)
        prompts = [*batch, *(response.prompt for response in trained)]
        return Generated(self._own_rollouts(trained, step), batch, prompts)

    def _dealt(self, pool: Pool) -> list[list[PooledResponse]]:
        loop, engines = self._config, self._engine.replicas
        per_prompt = loop.num_generations_per_prompt
        return deal(pool.unfinished, engines, loop.most_per_engine(engines), loop.num_prompts_per_step, per_prompt)

    def _own_rollouts(self, finished: Sequence[PooledResponse], step: int) -> list[Rollout]:
        """Return the responses of this rank: those that it returned, or after a resume another part of all."""
        rank, size = self._world.rank, self._world.size
        return [response.rollout(step) for response in finished if response.rank % size == rank]

    def files(self, step: int) -> Mapping[str, bytes]:
        """Return the file with the pool; see Generation.files."""
        return {POOL_FILE: to_bytes(self._pools[step], self._config.responses_per_step)}

    def info(self, step: int) -> Mapping[str, Any]:
        """Return the numbers of responses, waiting responses and tokens of the pool; see Generation.info."""
        pool = self._pools[step]
        return {
            POOL_INFO: {"responses": len(pool.responses), "waiting": len(pool.waiting), "tokens": pool.tokens},
        }

    def restore(self, found: Found) -> None:
        """Continue with the pool in the checkpoint; collective.

        The pool is discarded with a warning if the number of responses per step changed, and responses to prompts that
        are no longer in the training data are left out. Responses that do not fit the current settings are generated
        again, see Stream.adapted. Raises RunFailed on all ranks if the file cannot be read.
        """
        if POOL_FILE not in files_of(found.info):
            return
        stored = self._read(found)
        per_step, was = self._config.responses_per_step, stored.responses_per_step
        if was != per_step:
            why = (
                f"num_prompts_per_step or num_generations_per_prompt changed ({was} responses per step are {per_step})"
            )
            warn_of_discarded(len(stored.pool.responses), stored.pool.tokens, found, why)
            return
        if stored.missing:
            log.warning(
                "%d unfinished or waiting responses in the checkpoint %s are discarded, because their prompts are not"
                " in data.train any more",
                *(stored.missing, found.path),
            )
        pool = stored.pool.updated(self._stream.adapted(each, self._first_step) for each in stored.pool.responses)
        self._pools = {self._first_step: pool}
        pairs = zip(stored.pool.responses, pool.responses, strict=True)
        if again := sum(len(old.ids) > len(new.ids) for old, new in pairs):
            log.warning(
                "%d unfinished or waiting responses in the checkpoint %s are generated again from the first token,"
                " because they are too long for policy.max_total_sequence_length, or lack log-probs that loss_fn needs:"
                " undo the change of the recipe to keep their tokens",
                *(again, found.path),
            )
        counts = len(pool.unfinished), len(pool.waiting), pool.tokens
        log.info("continuing %d unfinished and %d waiting responses with together %d tokens", *counts)

    def _read(self, found: Found) -> StoredPool:
        nothing: tuple[bytes, CheckpointError | None] = b"", None
        content, error = self._world.broadcast(
            read_file_or_error(found.path, POOL_FILE) if self._world.is_main else nothing
        )
        if error is not None:
            raise read_failed(found.path, error)
        try:
            return from_bytes(content, self._prompts.prompts.find)
        except UnknownFormatError as unknown:
            raise RunFailed(
                f"checkpoint {found.path} cannot be loaded, because another version of this program wrote"
                f" {POOL_FILE} ({unknown}): resume it with that version"
            ) from unknown


class _Phase:
    """Generation of one step: requests to this rank's engine, and the segments of all ranks."""

    def __init__(self, world: World, engine: Engine, sampling: Sampling, step: int) -> None:
        self._world, self._engine, self._sampling, self._step = world, engine, sampling, step
        self.busy_s = 0.0
        """Seconds that this rank's engine worked; in the other time of the phase it waited for other engines."""
        self.discarded = 0
        """Number of tokens of this rank's segments that were discarded."""
        self.read_again = 0
        """Number of tokens of continued responses, with their prompts, that the engines read again."""

    def cut(
        self,
        pool: Pool,
        dealt: Sequence[Sequence[PooledResponse]],
        needed: int,
        cutoff: Cutoff,
        add: Callable[[Rollout], None],
    ) -> tuple[Pool, int]:
        """Generate until ``needed`` responses are finished; return the pool with the new tokens, and T*; collective.

        Every other segment is cut after T* new tokens. ``dealt``: the responses of each engine. ``add``: called with
        each response that ended on this rank.
        """
        if needed <= 0:  # enough responses wait from earlier steps
            return pool, 0
        continued = [response for response in pool.unfinished if response.ids]
        self.read_again = sum(len(each.prompt.student_ids) + len(each.ids) for each in continued)
        segments = self._run(dealt[self._engine.replica], cutoff, add)
        own = [len(segment.ids) for segment in segments if segment.finish != "cut"]
        limit = cut_after([tokens for ended in self._world.gather(own) for tokens in ended], needed)
        kept = [cut(segment, limit) for segment in segments]
        self.discarded += sum(len(segment.ids) for segment in segments) - sum(len(segment.ids) for segment in kept)
        return self._extended(pool, kept), limit

    def complete(
        self, pool: Pool, dealt: Sequence[Sequence[PooledResponse]], max_age: int, add: Callable[[Rollout], None]
    ) -> Pool:
        """Generate the unfinished responses of age ``max_age`` to their end; return the new pool; collective.

        They stay on their engines, which have their tokens in the prefix cache.
        """
        last = {each.order: each for each in pool.unfinished if self._step - each.started >= max_age}
        if not last:
            return pool
        own = [last[each.order] for each in dealt[self._engine.replica] if each.order in last]
        return self._extended(pool, self._run(own, None, add) if own else [])

    def _run(
        self, responses: Sequence[PooledResponse], cutoff: Cutoff | None, add: Callable[[Rollout], None]
    ) -> list[Segment]:
        by_order = {response.order: response for response in responses}
        step, rank = self._step, self._world.rank

        def on_ended(segment: Segment) -> None:
            response = by_order[segment.request.order]
            add(response.extended(segment.ids, segment.logprobs, segment.finish, step, rank).rollout(step))

        started = time.monotonic()
        requests = [response.request(self._sampling.seed) for response in responses]
        segments = self._engine.segments(requests, self._sampling, cutoff, on_ended=on_ended)
        self.busy_s += time.monotonic() - started
        return segments

    def _extended(self, pool: Pool, own: Sequence[Segment]) -> Pool:
        """Return the pool with the segments of all ranks; collective. ``own``: the segments of this rank."""
        sent = [(each.request.order, each.ids, each.logprobs, each.finish) for each in own]
        by_order = {response.order: response for response in pool.unfinished}
        return pool.updated(
            by_order[order].extended(ids, logprobs, finish, self._step, rank)
            for rank, part in enumerate(self._world.gather(sent))
            for order, ids, logprobs, finish in part
        )


def _step_metrics(read_again: int, trained: Sequence[PooledResponse], after: Pool, step: int) -> dict[str, float]:
    """Return the metrics of partial rollouts that are equal on all ranks, by name.

    ``read_again``: see ``_Phase``; ``trained``: the responses that the step trains on; ``after``: the pool after it.
    """
    ages = [step - response.started for response in trained]
    older = sum(response.older_tokens(step) for response in trained)
    values = {
        "age_mean": sum(ages) / len(ages),
        "age_max": max(ages),
        "older_token_share": older / sum(len(response.ids) for response in trained),
        "pool_responses": len(after.responses),
        "pool_tokens": after.tokens,
        "waiting_responses": len(after.waiting),
        "reprefilled_tokens": read_again,
    }
    return {f"{_PREFIX}{name}": float(value) for name, value in values.items()}
