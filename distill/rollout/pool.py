"""The pool of unfinished and waiting responses (partial rollouts): pure functions without other ranks.

A response is generated in segments, one or two per step. After a step, the responses that have not been trained on
remain in the pool: unfinished ones, and waiting ones, which are finished. The argument ``step`` is the number of
finished training steps, which is also the version of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from distill.rollout.requests import Request, Segment, segment_seed
from distill.types import Prompt, Rollout

Pair = tuple[int, int]


@dataclass(frozen=True)
class PooledResponse:
    """A response of the pool, and what is needed to continue it."""

    order: int
    """Number of the response among all responses of the run; see ``numbered_requests``. It identifies the response."""
    prompt: Prompt
    response_index: int
    batch: int
    """Step whose batch of prompts contains the prompt; it is hashed into the seeds of the segments."""
    started: int
    """Step in which the first segment was generated."""
    max_new_tokens: int
    """Maximum number of tokens of the complete response."""
    with_logprobs: bool
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    versions: tuple[Pair, ...] = ()
    """Pairs (version, number of tokens) for each version of the weights that generated tokens, in order."""
    finish: Literal["stop", "length"] | None = None
    """None: unfinished."""
    rank: int = 0
    """Rank that returned the last segment. It may have prepared a waiting response already."""

    @classmethod
    def of(cls, request: Request, batch: int, step: int) -> PooledResponse:
        """Return the response of a new request, without tokens."""
        return cls(
            order=request.order,
            prompt=request.prompt,
            response_index=request.response_index,
            batch=batch,
            started=step,
            max_new_tokens=request.max_new_tokens,
            with_logprobs=request.with_logprobs,
        )

    def request(self, seed: int) -> Request:
        """Return the request for the next segment; ``seed``: the random seed of the run."""
        offset = len(self.ids)
        return Request(
            prompt=self.prompt,
            response_index=self.response_index,
            seed=segment_seed(seed, self.batch, self.prompt.prompt_id, self.response_index, offset),
            max_new_tokens=self.max_new_tokens - offset,
            with_logprobs=self.with_logprobs,
            generated_ids=self.ids,
            order=self.order,
        )

    def extended(
        self,
        ids: tuple[int, ...],
        logprobs: tuple[float, ...],
        finish: Literal["stop", "length", "cut"],
        step: int,
        rank: int,
    ) -> PooledResponse:
        """Return the response with one more segment, which ``rank`` returned in ``step``."""
        versions, count = self.versions, len(ids)
        if versions and versions[-1][0] == step:
            versions, count = versions[:-1], versions[-1][1] + count
        return replace(
            self,
            ids=self.ids + ids,
            logprobs=self.logprobs + logprobs,
            versions=(*versions, (step, count)) if count else versions,
            finish=None if finish == "cut" else finish,
            rank=rank,
        )

    def older_tokens(self, step: int) -> int:
        """Return the number of tokens that weights of earlier steps generated; they are the first tokens."""
        return sum(count for version, count in self.versions if version < step)

    def rollout(self, step: int) -> Rollout:
        """Return the finished response as a rollout to train on in ``step``."""
        assert self.finish is not None, f"response {self.order} is unfinished"
        return Rollout(
            prompt=self.prompt,
            response_index=self.response_index,
            response_ids=self.ids,
            logprobs=self.logprobs,
            finish=self.finish,
            version=self.versions[-1][0],
            older_tokens=self.older_tokens(step),
            order=self.order,
        )


@dataclass(frozen=True)
class Pool:
    """All responses that were started and not trained on, equal on every rank."""

    next_order: int = 0
    """Smallest number of a response that was not started."""
    responses: tuple[PooledResponse, ...] = ()
    """Sorted by ``PooledResponse.order``."""

    @property
    def unfinished(self) -> list[PooledResponse]:
        """Return the responses to continue."""
        return [response for response in self.responses if response.finish is None]

    @property
    def waiting(self) -> list[PooledResponse]:
        """Return the finished responses, which a later step trains on."""
        return [response for response in self.responses if response.finish is not None]

    @property
    def tokens(self) -> int:
        """Return the number of generated tokens of all responses."""
        return sum(len(response.ids) for response in self.responses)

    def with_new(self, new: Sequence[PooledResponse]) -> Pool:
        """Return the pool with new responses, which follow all responses that were started before."""
        if not new:
            return self
        assert all(response.order >= self.next_order for response in new), self.next_order
        return Pool(max(response.order for response in new) + 1, (*self.responses, *new))

    def updated(self, changed: Iterable[PooledResponse]) -> Pool:
        """Return the pool in which ``changed`` replace the responses with the same number."""
        by_order = {response.order: response for response in changed}
        return replace(self, responses=tuple(by_order.get(each.order, each) for each in self.responses))

    def split(self, count: int) -> tuple[list[PooledResponse], Pool]:
        """Return the ``count`` oldest finished responses, which are trained on, and the pool without them.

        The oldest responses are those with the smallest numbers.
        """
        trained = self.waiting[:count]
        assert len(trained) == count, f"{len(trained)} of {count} responses are finished"
        chosen = {response.order for response in trained}
        return trained, replace(self, responses=tuple(each for each in self.responses if each.order not in chosen))


def cut_after(ended: Sequence[int], needed: int) -> int:
    """Return T*, the number of new tokens after which unfinished segments are cut.

    It is the fewest new tokens at which ``needed`` segments have ended; 0 if no segment is needed. ``ended``: numbers
    of new tokens of the finished segments, at least ``needed``.
    """
    assert len(ended) >= needed, f"{len(ended)} segments ended, {needed} are needed"
    return sorted(ended)[needed - 1] if needed > 0 else 0


def cut(segment: Segment, tokens: int) -> Segment:
    """Return the segment if it is finished with at most ``tokens`` tokens, otherwise its first ``tokens`` tokens.

    An unfinished segment must have at least ``tokens`` tokens.
    """
    if segment.finish != "cut" and len(segment.ids) <= tokens:
        return segment
    assert len(segment.ids) >= tokens, f"a segment of {len(segment.ids)} tokens was stopped before {tokens} tokens"
    return replace(segment, ids=segment.ids[:tokens], logprobs=segment.logprobs[:tokens], finish="cut")


def deal(
    responses: Sequence[PooledResponse], engines: int, most: int, prompts_per_batch: int, responses_per_prompt: int
) -> list[list[PooledResponse]]:
    """Distribute the responses to generate over the engines; return the responses of each engine, sorted by number.

    The new responses to a prompt are on the engine that gets the prompt without partial rollouts, or are distributed
    if this engine has no room for them. Each response to continue goes to the engine with the fewest responses, of
    these to the one with the fewest tokens to read; the longest are dealt first. ``most``: maximum number of responses
    of an engine; more only if all engines together have no room.
    """
    dealt: list[list[PooledResponse]] = [[] for _ in range(engines)]
    tokens = [0] * engines

    def add(engine: int, response: PooledResponse) -> None:
        dealt[engine].append(response)
        tokens[engine] += len(response.prompt.student_ids) + len(response.ids)

    def least_loaded() -> int:
        return min(range(engines), key=lambda engine: (len(dealt[engine]), tokens[engine]))

    new = [response for response in responses if not response.ids]
    for number, group in groupby(new, lambda response: response.order // responses_per_prompt):
        members, engine = list(group), number % prompts_per_batch % engines
        fits = len(dealt[engine]) + len(members) <= most
        for response in members:
            add(engine if fits else least_loaded(), response)
    continued = [response for response in responses if response.ids]
    for response in sorted(continued, key=lambda each: (-len(each.prompt.student_ids) - len(each.ids), each.order)):
        add(least_loaded(), response)
    return [sorted(of_engine, key=lambda response: response.order) for of_engine in dealt]
