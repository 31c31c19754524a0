"""Run requests in vLLM's engine core in this process: add requests, poll for finished responses, abort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distill.supervise.progress import heartbeat

_IDLE_STEPS = 1000
"""Number of consecutive vLLM steps without a new token after which the run fails.

For each token of the unfinished prompts one more step is allowed, because vLLM needs many steps for long prompts.
"""
_STEPS_AHEAD = 4
"""Number of vLLM steps to run after requests are aborted.

In these steps vLLM processes the results that were still in progress.
"""


@dataclass(slots=True)
class Response:
    """A response that vLLM generates. The lists grow with each step until the response is finished."""

    number: int
    """Number of the request, from ``RequestLoop.add``."""
    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    """Ids of the generated tokens, including the stop token if the response ends with one."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probs of the generated tokens in nats; empty if the request did not ask for log-probs."""
    finish: str = ""
    """vLLM's finish reason, such as "stop" or "length"; empty while the response is unfinished."""


class RequestLoop:
    """Runs requests in vLLM's engine core, in the calling thread.

    It replaces ``LLMEngine.add_request`` and ``LLMEngine.step``, which build output objects, text and statistics that
    the trainer does not need. That costs milliseconds of CPU time per step with hundreds of running requests.
    ``engine``: vLLM's ``LLMEngine`` with its engine core in this process. Requests can be added between two polls.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._core = engine.engine_core
        self._tasks = engine.get_supported_tasks()
        self._added = 0
        self._unfinished: dict[str, Response] = {}
        self._prompt_tokens = 0
        self._idle_steps = 0

    @property
    def unfinished(self) -> int:
        """Number of requests that are added but not finished."""
        return len(self._unfinished)

    def fewest_tokens(self) -> int:
        """Return the smallest number of generated tokens of an unfinished request; requires an unfinished request."""
        return min(len(response.token_ids) for response in self._unfinished.values())

    def add(self, token_ids: Sequence[int], params: Any) -> int:
        """Add a request and return its number, which is unique in this object.

        ``token_ids``: the prompt. ``params``: vLLM's ``SamplingParams`` with ``n=1``, without stop strings and without
        log-probs of the prompt. Raises RuntimeError if vLLM is asleep.
        """
        if self._engine.is_sleeping():
            raise RuntimeError("vLLM is asleep, so it would accept the requests but never finish them")
        response = Response(self._added, len(token_ids))
        self._added += 1
        name = f"response-{response.number}"
        request = self._engine.input_processor.process_inputs(
            name, {"prompt_token_ids": list(token_ids)}, params, supported_tasks=self._tasks
        )
        self._core.add_request(request)
        self._unfinished[name] = response
        self._prompt_tokens += response.prompt_tokens
        return response.number

    def poll(self) -> list[Response]:
        """Run one step of vLLM and return the responses that it finished.

        With asynchronous scheduling, a step returns the tokens of an earlier step. Raises RuntimeError if vLLM
        generates no token for many steps.
        """
        finished, tokens = [], 0
        for output in self._core.get_output().outputs:
            response = self._unfinished.get(output.request_id)
            if response is None:  # aborted
                continue
            tokens += len(output.new_token_ids)
            response.token_ids += output.new_token_ids
            if output.new_logprobs is not None:  # float32 [tokens, 1]: only the sampled token's
                response.logprobs += output.new_logprobs.logprobs[:, 0].tolist()
            if output.finish_reason is not None:
                response.finish = str(output.finish_reason)
                self._prompt_tokens -= response.prompt_tokens
                finished.append(self._unfinished.pop(output.request_id))
        self._check_progress(tokens)
        return finished

    def _check_progress(self, tokens: int) -> None:
        if tokens:
            heartbeat(tokens=tokens)
        self._idle_steps = 0 if tokens else self._idle_steps + 1
        if self._idle_steps > _IDLE_STEPS + self._prompt_tokens:
            raise RuntimeError(
                f"vLLM generated no token in {self._idle_steps} steps, with {self.unfinished} responses unfinished"
            )

    def abort(self) -> list[Response]:
        """Abort all unfinished requests, and let vLLM process the results that are still in progress.

        Returns the aborted responses with the tokens that they had. vLLM keeps the complete blocks of their key-value
        cache, so a later request that continues them computes at most the last block again, unless the cache is full.
        """
        aborted = list(self._unfinished.values())
        self._core.abort_requests(list(self._unfinished))
        self._unfinished.clear()
        self._prompt_tokens = self._idle_steps = 0
        for _ in range(_STEPS_AHEAD):
            self._core.get_output()
        return aborted
