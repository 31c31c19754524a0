"""Numbers of all training responses of a run, and the order in which they are started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from distill.rollout.pool import PooledResponse
from distill.rollout.requests import Request, requests_of, response_limit
from distill.types import Prompt, Sampling


def response_order(step: int, position: int, response_index: int, prompts: int, responses_per_prompt: int) -> int:
    """Return the number of a response among all responses of the run, also those from the dataset.

    ``step``: step whose batch contains the response's prompt. ``position``: index of the prompt in this batch of
    ``prompts`` prompts.
    """
    return (step * prompts + position) * responses_per_prompt + response_index


def numbered_requests(
    prompts: Sequence[Prompt], sampling: Sampling, step: int, window: int, own: Sequence[Prompt] | None = None
) -> list[Request]:
    """Return requests for new responses to a step's batch of prompts, each with its number.

    ``prompts``: the complete batch; ``own``: the prompts of this batch to which responses are requested; None: all.
    Other arguments as in ``requests_of``.
    """
    position = {prompt.prompt_id: i for i, prompt in enumerate(prompts)}

    def numbered(request: Request) -> Request:
        at, each = position[request.prompt.prompt_id], sampling.responses_per_prompt
        return replace(request, order=response_order(step, at, request.response_index, len(prompts), each))

    requests = requests_of(prompts if own is None else own, sampling, step, window)
    return [numbered(request) for request in requests]


@dataclass(frozen=True)
class Stream:
    """The responses that the student generates, in the order of the data: the batches of prompts of all steps."""

    batch: Callable[[int], Sequence[Prompt]]
    """Returns the batch of prompts of a step."""
    sampling_at: Callable[[int, Sequence[Prompt]], Sampling]
    """Returns the sampling settings of a step, without the responses of the dataset, from its prompts."""
    window: int
    """The engine's maximum number of tokens of a prompt and its response together."""
    responses_per_step: int
    """Number of responses of a step, with those from the dataset."""

    def new(self, first: int, count: int, step: int) -> list[PooledResponse]:
        """Return the next ``count`` responses from number ``first`` on, which are started in ``step``.

        Their limits are those of ``step``. Their seeds are those of the steps to which their prompts belong.
        """
        found: list[PooledResponse] = []
        batch = first // self.responses_per_step
        while len(found) < count:
            requests = [request for request in self._requests(batch, step) if request.order >= first]
            found += [PooledResponse.of(request, batch, step) for request in requests[: count - len(found)]]
            batch += 1
        return found

    def adapted(self, response: PooledResponse, step: int) -> PooledResponse:
        """Return a response of a checkpoint with a limit that fits the current settings, which may have changed.

        If it is too long, or lacks log-probs that the loss needs, it is returned without tokens and starts in ``step``.
        """
        sampling, offset = self.sampling_at(step, ()), len(response.ids)
        own = replace(sampling, max_new_tokens=response.max_new_tokens)
        limit = response_limit(own, response.prompt, self.window)
        fits = offset < limit + (response.finish is not None)
        needs_logprobs = sampling.logprob_interval == 1
        if fits and (response.with_logprobs or not needs_logprobs):
            return replace(response, max_new_tokens=limit)
        return PooledResponse(
            order=response.order,
            prompt=response.prompt,
            response_index=response.response_index,
            batch=response.batch,
            started=step,
            max_new_tokens=response_limit(sampling, response.prompt, self.window),
            with_logprobs=response.with_logprobs or needs_logprobs,
        )

    def _requests(self, batch: int, step: int) -> list[Request]:
        prompts = self.batch(batch)
        sampling = replace(self.sampling_at(step, ()), omitted=self.sampling_at(batch, prompts).omitted)
        return numbered_requests(prompts, sampling, batch, self.window)
