"""Prompts of continuations: a candidate's prompt and the first tokens of a response, from which a model continues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from distill.data.teacher_prefix import Prefix
from distill.types import Prompt, Rollout
from distill.validation.probe_stats import STARTS, Continued, Key
from distill.validation.scores import Sample


@dataclass(frozen=True)
class Continuation:
    """A response of the student that is continued after its first tokens."""

    base: Rollout
    start: int
    """Percentage of the response that is kept, one of ``STARTS``."""
    prompt: Prompt
    """Input of the engine: the prompt with the kept tokens; its id is unique among all continuations of the probe."""
    inside_thought: bool
    """Whether the prompt without the kept tokens ends inside a think block."""

    @property
    def kept(self) -> tuple[int, ...]:
        """Return the kept tokens of the response."""
        return self.base.response_ids[: kept_tokens(self.base, self.start)]

    def joined(self, rest: Rollout) -> Rollout:
        """Return the response of the kept tokens and the continuation ``rest``, as a response to the plain prompt.

        Its response index contains the start, so that it is unique among the responses to the prompt.
        """
        return replace(
            self.base,
            prompt=replace(self.base.prompt, inside_thought=self.inside_thought),
            response_index=index_of(self.base.response_index, self.start),
            response_ids=self.kept + rest.response_ids,
            logprobs=(),
            finish=rest.finish,
        )


def kept_tokens(base: Rollout, start: int) -> int:
    """Return the number of tokens in the first ``start`` percent of a response, rounded down; never the stop token."""
    length = len(base.response_ids) - (base.finish == "stop")
    return length * start // 100


def index_of(response_index: int, start: int) -> int:
    """Return the index of a joined response among all joined responses to the same prompt."""
    return response_index * len(STARTS) + STARTS.index(start)


def continuations(
    bases: Sequence[Rollout],
    starts: Sequence[int],
    prefixes: Mapping[int, Prefix],
    limits: Mapping[int, int],
) -> list[Continuation]:
    """Return the continuations of all responses from all starts; equal on every rank if the arguments are equal.

    ``prefixes``: maps a prompt id to the prompt that a candidate reads; problems without one are skipped. ``limits``:
    maps a prompt id to the maximum number of tokens of a complete response, the kept tokens included. A continuation
    has the same id for every candidate, so all candidates sample it with the same random numbers.
    """
    found = []
    for number, base in enumerate(bases):
        prompt = base.prompt
        prefix = prefixes.get(prompt.prompt_id)
        if prefix is None:
            continue
        for start in starts:
            kept = kept_tokens(base, start)
            extended = replace(
                prompt,
                prompt_id=number * len(STARTS) + STARTS.index(start),
                student_ids=prefix.token_ids + base.response_ids[:kept],
                max_new_tokens=limits[prompt.prompt_id] - kept,
            )
            found.append(Continuation(base, start, extended, prefix.inside_thought))
    return found


def prompts_at_start(
    prompts: Sequence[Prompt], prefixes: Mapping[int, Prefix], limits: Mapping[int, int]
) -> list[Prompt]:
    """Return the inputs of the engine for complete responses; arguments as in ``continuations``.

    They keep the ids of ``prompts``. So with the seed of the student's responses, a candidate samples its responses
    with the same random numbers.
    """
    return [
        replace(
            prompt,
            student_ids=prefix.token_ids,
            inside_thought=prefix.inside_thought,
            max_new_tokens=limits[prompt.prompt_id],
        )
        for prompt in prompts
        if (prefix := prefixes.get(prompt.prompt_id)) is not None
    ]


def joined_at_start(prompts: Sequence[Prompt], generated: Sequence[Rollout]) -> list[Rollout]:
    """Return this rank's complete responses as responses to the plain ``prompts``, with the start 0 in their index."""
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    return [
        replace(
            rollout,
            prompt=replace(by_id[rollout.prompt.prompt_id], inside_thought=rollout.prompt.inside_thought),
            response_index=index_of(rollout.response_index, 0),
            logprobs=(),
        )
        for rollout in generated
    ]


def joined(all_: Sequence[Continuation], generated: Sequence[Rollout]) -> list[Rollout]:
    """Return the complete responses of this rank's generated continuations."""
    by_id = {each.prompt.prompt_id: each for each in all_}
    return [by_id[rest.prompt.prompt_id].joined(rest) for rest in generated]


def by_start(samples: Sequence[Sample]) -> Continued:
    """Return the graded joined responses by response and start."""
    found: dict[tuple[Key, int], Sample] = {}
    for sample in samples:
        index, at = divmod(sample.rollout.response_index, len(STARTS))
        found[(sample.rollout.prompt.prompt_id, index), STARTS[at]] = sample
    return found


def percentile(lengths: Sequence[int], percent: int) -> int:
    """Return the smallest length that at least ``percent`` percent of the lengths do not exceed."""
    return sorted(lengths)[-(-len(lengths) * percent // 100) - 1]
