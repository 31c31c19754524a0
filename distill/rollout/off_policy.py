"""Off-policy responses: which responses of a step come from the dataset, and their rollouts."""

from __future__ import annotations

from collections.abc import Sequence

from distill.data.references import References
from distill.rollout.requests import response_limit, response_seed, stream_seed
from distill.types import Prompt, Rollout, Sampling

Pair = tuple[int, int]
"""Prompt id and response index."""


def off_policy_pairs(
    prompts: Sequence[Prompt], responses_per_prompt: int, share: float, seed: int, step: int
) -> tuple[Pair, ...]:
    """Return the responses of a step that come from the dataset; equal on every rank.

    They are the round(``share`` * number of responses) responses with the smallest hashes of (seed, step, prompt id,
    response index). ``prompts``: the prompts of all ranks, in any order. ``step``: number of finished steps.
    """
    if not share:
        return ()
    own_seed = stream_seed(seed, "off-policy")
    pairs = [(prompt.prompt_id, index) for prompt in prompts for index in range(responses_per_prompt)]
    chosen = sorted(pairs, key=lambda pair: (response_seed(own_seed, step, *pair), pair))[: round(share * len(pairs))]
    return tuple(sorted(chosen))


def reference_rollout(
    prompt: Prompt, response_index: int, references: References, sampling: Sampling, window: int, step: int
) -> Rollout:
    """Return the dataset's response to ``prompt`` as a rollout, truncated like a generated response.

    ``window``: the engine's maximum number of tokens of a prompt and its response together. ``step``: number of
    finished steps. Raises UserError if the response is empty.
    """
    ids, limit = references.response_ids(prompt), response_limit(sampling, prompt, window)
    ends = len(ids) <= limit and ids[-1] in sampling.stop_token_ids
    return Rollout(
        prompt=prompt,
        response_index=response_index,
        response_ids=ids[:limit],
        logprobs=(),
        finish="stop" if ends else "length",
        version=step,
        off_policy=True,
    )
