"""Requests to a generation engine: new responses and segments of earlier ones, their random seeds and limits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from distill.types import Prompt, Rollout, Sampling

POLL_STEPS = 4
"""An engine reads the upper bound of its cutoff once in this number of steps; see CutoffPolling."""


@dataclass(frozen=True)
class Request:
    """A response, or the next segment of a response, that an engine must generate."""

    prompt: Prompt
    response_index: int
    """Index of the response among the responses to its prompt."""
    seed: int
    """63-bit seed of the segment's random numbers."""
    max_new_tokens: int
    """Maximum number of tokens of this segment."""
    with_logprobs: bool
    """Whether the engine returns log-probs of the sampled tokens."""
    generated_ids: tuple[int, ...] = ()
    """Token ids of the earlier segments, which the engine reads after the prompt."""
    order: int = 0
    """Number of the response among all responses of the run; only with partial rollouts."""

    @property
    def input_ids(self) -> tuple[int, ...]:
        """Return the token ids that the engine reads before it samples the first token."""
        return self.prompt.student_ids + self.generated_ids


@dataclass(frozen=True)
class Segment:
    """The result of a request."""

    request: Request
    ids: tuple[int, ...]
    """Token ids that were sampled; may be empty only if the segment was cut."""
    logprobs: tuple[float, ...]
    """Log-probs of ``ids`` in nats; empty without ``Request.with_logprobs``."""
    finish: Literal["stop", "length", "cut"]
    """stop: the last token is a stop token; length: ``max_new_tokens`` was reached; cut: stopped by ``Cutoff``."""


OnEnded = Callable[[Segment], None]
"""Function that receives each finished segment (stop or length) while the engine generates other segments."""


class Cutoff(Protocol):
    """Decides after how many new tokens the engines of a job stop their unfinished segments.

    T* is the fewest new tokens at which enough segments of all engines have ended. While the engines run, only an upper
    bound of T* is known, which never increases. An engine stops when each of its unfinished segments has at least as
    many new tokens as the bound; until then it stops no segment, so that the batches of the engine, and with them the
    rounding of its numbers, do not depend on time. T* is computed exactly afterwards. Not collective: engines run
    independently.
    """

    def ended(self, new_tokens: Sequence[int]) -> None:
        """Report finished segments of this engine (stop or length), each by its number of new tokens.

        Called on one rank of each engine.
        """

    def limit(self) -> int | None:
        """Return the current upper bound of T*; None while too few segments have ended.

        Called often, on one rank of each engine, which passes the value to the other ranks of the engine.
        """


class CutoffPolling:
    """The upper bound of T*, read from a cutoff once in several steps of an engine.

    ``read``: returns the bound, see Cutoff.limit; None: the engine has no cutoff. ``every``: number of steps from one
    call of ``read`` to the next.
    """

    def __init__(self, read: Callable[[], int | None] | None, every: int = POLL_STEPS) -> None:
        self._read = read
        self._every = every
        self._steps = 0
        self._bound: int | None = None

    def reached(self, fewest_tokens: Callable[[], int]) -> bool:
        """Return whether the unfinished segments are long enough to be cut; call it before every step.

        ``fewest_tokens``: returns the smallest number of new tokens of an unfinished segment.
        """
        if self._read is None:
            return False
        if self._steps % self._every == 0:
            self._bound = self._read()
        self._steps += 1
        return self._bound is not None and fewest_tokens() >= self._bound


def requests_of(prompts: Sequence[Prompt], sampling: Sampling, step: int, window: int) -> list[Request]:
    """Return requests for new responses to ``prompts``, in the order of the prompts and response indices.

    Responses in ``Sampling.omitted`` have no request. ``step``: number that is hashed into the random seeds.
    ``window``: the engine's maximum number of tokens of a prompt and its response together.
    """
    omitted = set(sampling.omitted)
    return [
        _new_request(prompt, index, sampling, step, window)
        for prompt in prompts
        for index in range(sampling.responses_per_prompt)
        if (prompt.prompt_id, index) not in omitted
    ]


def _new_request(prompt: Prompt, index: int, sampling: Sampling, step: int, window: int) -> Request:
    seed = response_seed(sampling.seed, step, prompt.prompt_id, index)
    limit = response_limit(sampling, prompt, window)
    return Request(prompt, index, seed, limit, wants_logprobs(sampling, seed))


def rollout_of(segment: Segment, version: int) -> Rollout:
    """Return a response that ended in its first segment as a rollout.

    ``version``: version of the weights that generated the segment.
    """
    request = segment.request
    assert segment.finish != "cut" and not request.generated_ids, (segment.finish, len(request.generated_ids))
    return Rollout(
        prompt=request.prompt,
        response_index=request.response_index,
        response_ids=segment.ids,
        logprobs=segment.logprobs,
        finish=segment.finish,
        version=version,
        order=request.order,
    )


def longest_first(requests: Sequence[Request]) -> list[int]:
    """Return the indices of ``requests``, sorted by decreasing number of input tokens.

    In this order, requests of similar length share a batch, and the slowest prefills start first.
    """
    return sorted(range(len(requests)), key=lambda i: (-len(requests[i].input_ids), i))


def response_seed(seed: int, step: int, prompt_id: int, response_index: int) -> int:
    """Return the 63-bit random seed of a response's first segment, a hash of the arguments."""
    return _hash(f"{seed}/{step}/{prompt_id}/{response_index}")


def segment_seed(seed: int, step: int, prompt_id: int, response_index: int, offset: int) -> int:
    """Return the 63-bit random seed of a segment, a hash of the arguments; see response_seed.

    ``step``: the step in which the response was started. ``offset``: number of the response's tokens before the
    segment; the seed at offset 0 is the response's seed.
    """
    if not offset:
        return response_seed(seed, step, prompt_id, response_index)
    return _hash(f"{seed}/{step}/{prompt_id}/{response_index}/{offset}")


def stream_seed(seed: int, stream: str) -> int:
    """Return a 63-bit seed for sampling responses outside training, derived from the run's ``seed``.

    ``stream``: purpose of these responses, such as "validation"; each purpose gets a different seed. With ``seed``
    itself, a response would use the same random numbers as the training response with equal step, prompt and index.
    """
    return _hash(f"{stream}/{seed}")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def wants_logprobs(sampling: Sampling, seed: int) -> bool:
    """Return whether the engine returns log-probs for the response with random seed ``seed``.

    The choice depends only on the seed at offset 0, so it does not depend on the batch or on the number of ranks, and
    all segments of a response have log-probs or none has.
    """
    return seed % sampling.logprob_interval == 0


def response_limit(sampling: Sampling, prompt: Prompt, window: int) -> int:
    """Return the maximum number of tokens of a response to ``prompt``.

    ``window``: the engine's maximum number of tokens of a prompt and its response together.
    """
    total = window if sampling.max_total_length is None else min(window, sampling.max_total_length)
    most = sampling.max_new_tokens if prompt.max_new_tokens is None else prompt.max_new_tokens
    limit = min(sampling.max_new_tokens, most, total - len(prompt.student_ids))
    assert limit >= 1, (limit, len(prompt.student_ids))
    return limit
