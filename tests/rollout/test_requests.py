"""Requests: seeds, limits and order; when a cutoff is read; a segment as a rollout."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial

import pytest

from distill.rollout.requests import (
    CutoffPolling,
    Segment,
    requests_of,
    response_seed,
    rollout_of,
    segment_seed,
    wants_logprobs,
)
from distill.types import Problem, Prompt, Sampling

SAMPLING = Sampling(temperature=1.0, max_new_tokens=12, stop_token_ids=(5,), responses_per_prompt=3, seed=7)
PROMPTS = [Prompt(4, (1, 2, 3), Problem("p")), Prompt(2, (1,) * 9, Problem("p"), max_new_tokens=6)]


def _hashed(text: str) -> int:
    return int(hashlib.blake2b(text.encode(), digest_size=8).digest()[::-1].hex(), 16) // 2


def test_the_seed_of_a_segment_is_a_hash_that_includes_its_offset() -> None:
    assert segment_seed(7, 23, 4, 5, 0) == response_seed(7, 23, 4, 5) == _hashed("7/23/4/5")
    assert segment_seed(7, 23, 4, 5, 100) == _hashed("7/23/4/5/100")
    seeds = {segment_seed(7, 23, 4, index, offset) for index in range(20) for offset in range(20)}
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)


def test_requests_contain_the_seed_and_limit_of_each_response_that_is_not_omitted() -> None:
    found = requests_of(PROMPTS, replace(SAMPLING, omitted=((4, 1), (2, 2))), step=3, window=14)
    assert [(request.prompt.prompt_id, request.response_index) for request in found] == [(4, 0), (4, 2), (2, 0), (2, 1)]
    assert [request.max_new_tokens for request in found] == [11, 11, 5, 5], "limited by the window"
    roomy = requests_of(PROMPTS, SAMPLING, step=3, window=100)
    assert [request.max_new_tokens for request in roomy] == [12] * 3 + [6] * 3, "limited by recipe and prompt"
    assert all(r.seed == _hashed(f"7/3/{r.prompt.prompt_id}/{r.response_index}") for r in [*found, *roomy])
    assert all(r.input_ids == r.prompt.student_ids and r.with_logprobs for r in found)


def test_some_requests_have_log_probs_if_few_are_needed() -> None:
    sampling = replace(SAMPLING, responses_per_prompt=40, logprob_interval=4)
    found = requests_of(PROMPTS, sampling, step=3, window=100)
    assert [request.with_logprobs for request in found] == [wants_logprobs(sampling, r.seed) for r in found]
    assert 5 < sum(request.with_logprobs for request in found) < 40


def test_a_continued_request_reads_the_earlier_segments_after_the_prompt() -> None:
    request = requests_of(PROMPTS, SAMPLING, step=3, window=100)[0]
    assert replace(request, generated_ids=(8, 9)).input_ids == (1, 2, 3, 8, 9)


def test_a_segment_that_ended_becomes_a_rollout_and_a_cut_one_does_not() -> None:
    request = replace(requests_of(PROMPTS, SAMPLING, step=3, window=100)[1], order=17)
    rollout = rollout_of(Segment(request, (8, 5), (-1.0, -2.0), "stop"), version=3)
    assert (rollout.prompt, rollout.response_index, rollout.order) == (PROMPTS[0], 1, 17)
    assert (rollout.response_ids, rollout.logprobs, rollout.finish) == ((8, 5), (-1.0, -2.0), "stop")
    assert (rollout.version, rollout.older_tokens) == (3, 0)
    continued = replace(request, generated_ids=(8,))
    for segment in (Segment(request, (8,), (-1.0,), "cut"), Segment(continued, (5,), (-1.0,), "stop")):
        with pytest.raises(AssertionError):
            rollout_of(segment, version=3)


def test_a_cutoff_is_read_once_in_several_steps_and_compared_at_every_step() -> None:
    bounds = iter([None, 6, 5])
    polling = CutoffPolling(lambda: next(bounds), every=4)
    assert [polling.reached(partial(int, tokens)) for tokens in range(7)] == [False] * 6 + [True]
    assert polling.reached(lambda: 5) is False and polling.reached(lambda: 5), "the bound decreased to 5"


def test_without_a_cutoff_the_tokens_are_not_counted() -> None:
    def fail() -> int:
        raise AssertionError

    assert not any(CutoffPolling(None).reached(fail) for _ in range(10))
