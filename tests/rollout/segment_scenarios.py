"""Scenarios of segments that run on every engine: cut by a cutoff, and continued; and the claims about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from distill.rollout.requests import Request, Segment, requests_of, segment_seed
from distill.rollout.transformers_engine import processed_logprobs
from distill.types import Problem, Prompt, Sampling

WINDOW = 64
VALID = 300
STEP = 4
SAMPLED = Sampling(
    temperature=0.8, max_new_tokens=20, stop_token_ids=tuple(range(0, VALID, 29)), responses_per_prompt=3, seed=6
)
GREEDY = Sampling(temperature=0.0, max_new_tokens=20, stop_token_ids=())
LENGTHS = (30, 1, 40, 12, 30)
PROMPTS = [
    Prompt(i, tuple(range(10 * i, 10 * i + length)), Problem("p"), max_new_tokens=most)
    for i, (length, most) in enumerate(zip(LENGTHS, (20, 5, 20, 9, 19), strict=True))
]


@dataclass
class CountingCutoff:
    """A cutoff for one engine: T* is the smallest length that ``needed`` of its segments do not exceed."""

    needed: int
    lengths: list[int] = field(default_factory=list)
    reads: int = 0

    def ended(self, new_tokens: Sequence[int]) -> None:
        """Record the lengths of segments that ended."""
        self.lengths += new_tokens

    def limit(self) -> int | None:
        """Return the ``needed``-th smallest length that is known."""
        self.reads += 1
        return sorted(self.lengths)[self.needed - 1] if len(self.lengths) >= self.needed else None


@dataclass
class FixedCutoff:
    """A cutoff with a fixed bound, which is unknown in the first ``reads`` reads, as if other engines were slow."""

    bound: int
    reads: int = 0

    def ended(self, new_tokens: Sequence[int]) -> None:
        """Ignore the lengths."""

    def limit(self) -> int | None:
        """Return the bound; None in the first reads."""
        self.reads -= 1
        return self.bound if self.reads < 0 else None


def continuation(segment: Segment, tokens: int, seed: int) -> Request:
    """Return the request that continues a segment after its first ``tokens`` tokens."""
    request = segment.request
    return replace(
        request,
        seed=segment_seed(seed, STEP, request.prompt.prompt_id, request.response_index, tokens),
        max_new_tokens=request.max_new_tokens - tokens,
        generated_ids=segment.ids[:tokens],
    )


def segment_scenarios(
    engine: Any,
    sampling: Sampling,
    needed: int,
    gather: Callable[[list[Segment]], list[Segment]] = list,
    after_cut: Callable[[list[Request]], Any] = lambda requests: None,
    prompts: Sequence[Prompt] = PROMPTS,
) -> dict[str, Any]:
    """Generate complete, cut and continued segments; return them by name, in the order of the requests.

    ``needed``: number of segments that end before the other segments are cut. ``gather``: returns the segments of all
    ranks of the engine. ``after_cut``: called with the continuing requests before they run.
    """
    requests = requests_of(prompts, sampling, STEP, engine.window)

    def run(wanted: Sequence[Request], *args: Any) -> list[Segment]:
        found = gather(engine.segments(wanted, sampling, *args))
        return sorted(found, key=lambda segment: wanted.index(segment.request))

    cutoff = CountingCutoff(needed)
    called: list[Segment] = []
    complete = run(requests)
    cut = run(requests, cutoff, None, called.append)
    tokens = sorted(len(segment.ids) for segment in complete)[needed - 1]
    following = [continuation(segment, tokens, sampling.seed) for segment in cut if len(segment.ids) > tokens]
    seen = {"complete": complete, "cut": cut, "tokens": tokens, "cutoff": cutoff, "called": called}
    seen["after cut"] = after_cut(following)
    seen["continued"] = run(following)
    seen["bound 0"] = run(requests, FixedCutoff(0))
    if sampling.temperature:
        seen["continued alone"] = [segment for request in following for segment in run([request])]
        seen["another seed"] = run([replace(request, seed=request.seed + 1) for request in following])
    return seen


def check_cut(seen: dict[str, Any]) -> None:
    """Check that a cutoff only truncates: up to T* tokens, the segments equal those without a cutoff."""
    complete, cut, tokens = seen["complete"], seen["cut"], seen["tokens"]
    assert [segment.request for segment in complete] == [segment.request for segment in cut]
    assert {segment.finish for segment in cut} >= {"cut", "length"}
    assert 0 < sum(len(segment.ids) > tokens for segment in complete) < len(complete)
    for full, short in zip(complete, cut, strict=True):
        if short.finish == "cut":
            assert tokens <= len(short.ids) < len(full.ids)
        else:
            assert short == full
        assert (short.ids, short.logprobs) == (full.ids[: len(short.ids)], full.logprobs[: len(short.ids)])
    assert [(segment.ids, segment.finish) for segment in seen["bound 0"]] == [((), "cut")] * len(complete)
    for segment in (*complete, *cut, *seen["continued"]):
        most = segment.request.max_new_tokens
        assert len(segment.ids) <= most and (segment.finish == "length") <= (len(segment.ids) == most)


def check_reports(seen: dict[str, Any]) -> None:
    """Check that every segment that ended is reported once to the cutoff and to on_ended, and no other."""
    ended = [segment for segment in seen["cut"] if segment.finish != "cut"]
    assert sorted(seen["cutoff"].lengths) == sorted(len(segment.ids) for segment in ended)
    assert len(seen["called"]) == len(ended) and all(segment in seen["called"] for segment in ended)


def check_continued(seen: dict[str, Any]) -> None:
    """Check that continued segments depend on input and seed only."""
    together, alone = seen["continued"], seen["continued alone"]
    assert together and [(s.ids, s.finish) for s in together] == [(s.ids, s.finish) for s in alone]
    for one, other in zip(together, alone, strict=True):
        assert max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)) < 1e-4
    assert all(one.ids != other.ids for one, other in zip(together, seen["another seed"], strict=True))


def check_greedy_continuation(seen: dict[str, Any]) -> None:
    """Check that truncated and continued segments together equal the uninterrupted greedy responses."""
    complete = {segment.request.prompt.prompt_id: segment for segment in seen["complete"]}
    assert seen["continued"] and seen["tokens"] < 20
    for segment in seen["continued"]:
        full, request = complete[segment.request.prompt.prompt_id], segment.request
        assert request.generated_ids + segment.ids == full.ids and segment.finish == full.finish
        differences = [abs(a - b) for a, b in zip(segment.logprobs, full.logprobs[seen["tokens"] :], strict=True)]
        assert max(differences) < 1e-4


def check_logprobs(folder: Path, segments: Sequence[Segment], sampling: Sampling, valid: int = VALID) -> None:
    """Check log-probs against a forward pass of transformers over input and segment."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for segment in segments:
        read, ids = segment.request.input_ids, torch.tensor(segment.ids)
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([read + segment.ids])).logits[0, len(read) - 1 : -1]
        expected = processed_logprobs(logits, sampling, valid).gather(1, ids[:, None])[:, 0]
        assert (expected - torch.tensor(segment.logprobs)).abs().max() < 1e-4
