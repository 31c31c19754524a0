"""Scenarios of the loop over vLLM's engine core, under vLLM's asynchronous scheduler.

A fake executor samples scripted tokens in the model's place, because vLLM on CPU cannot schedule asynchronously.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from distill.rollout.vllm_loop import RequestLoop, Response
from tests.rollout.scripted_vllm import plain_fields, plain_run, scripted_engine, scripted_token

STOP_IDS = tuple(range(0, 300, 41))
RUNNING = 24  # fewer than the requests, so that some wait for others


def _requests(count: int) -> list[tuple[list[int], Any]]:
    from vllm import SamplingParams

    chance = random.Random(3)
    requests = []
    for seed in range(count):
        params = SamplingParams(
            max_tokens=chance.choice([1, 2, 17, 60]),
            stop_token_ids=list(STOP_IDS),
            ignore_eos=True,
            seed=seed,
            logprobs=None if seed % 3 == 2 else 0,
            detokenize=False,
        )
        requests.append(([chance.randrange(300) for _ in range(chance.choice([1, 5, 90, 400]))], params))
    return requests


def _fields(response: Response) -> tuple[list[int], list[float], str]:
    return response.token_ids, response.logprobs, response.finish


def _drain(loop: RequestLoop, requests: list[tuple[list[int], Any]]) -> list[tuple[list[int], list[float], str]]:
    """Run the requests, of which a third is added while others run."""
    later = requests[2 * len(requests) // 3 :]
    numbers = [loop.add(*request) for request in requests[: len(requests) - len(later)]]
    found: dict[int, Response] = {}
    while loop.unfinished or later:
        if later:
            numbers.append(loop.add(*later.pop(0)))
        found.update((response.number, response) for response in loop.poll())
    return [_fields(found[number]) for number in numbers]


def _cut(loop: RequestLoop, requests: list[tuple[list[int], Any]], bound: int) -> list[tuple[Any, ...]]:
    """Run the requests, more than can run together, until each unfinished one has ``bound`` tokens; cut these."""
    numbers = [loop.add(*request) for request in requests]
    found: dict[int, Response] = {}
    while loop.unfinished and loop.fewest_tokens() < bound:
        found.update((response.number, response) for response in loop.poll())
    found.update((response.number, response) for response in loop.abort())
    return [_fields(found[number]) for number in numbers]


def _most_per_step(loop: RequestLoop, requests: list[tuple[list[int], Any]]) -> int:
    """Run the requests; return the largest number of tokens that one step added to a response."""
    found = [loop._unfinished[f"response-{loop.add(*request)}"] for request in requests]
    most = 0
    while loop.unfinished:
        before = [len(response.token_ids) for response in found]
        loop.poll()
        most = max(most, *(len(response.token_ids) - n for response, n in zip(found, before, strict=True)))
    return most


def _expected(params: Any) -> tuple[list[int], list[float], str]:
    """Return what the script defines for a request, by hand."""
    tokens = []
    for index in range(params.max_tokens):
        tokens.append(scripted_token(params.seed, index))
        if tokens[-1][0] in STOP_IDS:
            break
    ids = [token for token, _ in tokens]
    logprobs = [] if params.logprobs is None else [logprob for _, logprob in tokens]
    return ids, logprobs, "stop" if ids[-1] in STOP_IDS else "length"


def _several_tokens_per_step(folder: Path, requests: list[tuple[list[int], Any]]) -> dict[str, Any]:
    """Run the scenarios with three drafts per step, some of which are accepted; vLLM's asynchronous scheduler."""
    engine = scripted_engine(folder, RUNNING, drafts=3)
    core, loop = engine.engine_core.engine_core, RequestLoop(engine)
    return {
        "asynchronous": core.async_scheduling,
        "most per step": _most_per_step(loop, requests),
        "loop": _drain(loop, requests),
        "plain": [plain_fields(output) for output in plain_run(engine, requests)],
        "cut": _cut(loop, requests, 5),
        "after cut": _drain(loop, requests),
    }


def loop_scenarios(folder: Path) -> dict[str, Any]:
    """Run all scenarios, and return their results by name. ``folder``: a model, of which only config.json is read."""
    engine = scripted_engine(folder, RUNNING)
    core = engine.engine_core.engine_core
    loop, requests = RequestLoop(engine), _requests(60)
    seen: dict[str, Any] = {"asynchronous": (core.async_scheduling, core.batch_queue_size)}
    seen["expected"] = [_expected(params) for _, params in requests]
    seen["loop"] = _drain(loop, requests)
    seen["plain"] = [plain_fields(output) for output in plain_run(engine, requests)]
    for request in requests:
        loop.add(*request)
    early = [response for _ in range(5) for response in loop.poll()]
    loop.abort()
    seen["aborted"] = (len(early), loop.unfinished, core.scheduler.has_requests(), len(loop.poll()))
    seen["after abort"] = _drain(loop, requests)
    seen["cut"] = _cut(loop, requests, 5)
    seen["after cut"] = _drain(loop, requests)
    seen["several"] = _several_tokens_per_step(folder, requests)
    core.model_executor.sleep(1)
    try:
        loop.add(*requests[0])
    except RuntimeError as error:
        seen["asleep"] = str(error)
    return seen
