"""Answers on their way to all ranks: token ids only, over the control group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill.distributed.world import World
from distill.types import Prompt, Rollout


def gather_rollouts(
    world: World, mine: Sequence[Rollout], prompts: Sequence[Prompt], version: int | None = None
) -> list[Rollout]:
    """The answers of all ranks in the order of ``prompts`` and answer, the same list on every rank; collective.

    Prompts don't travel: every rank has them. With ``version``, all answers must be of those weights.
    """
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    place = {prompt.prompt_id: i for i, prompt in enumerate(prompts)}
    travelling: list[tuple[Any, ...]] = [
        (
            *(r.prompt.prompt_id, r.response_index, r.response_ids, r.logprobs, r.finish, r.version),
            *(r.teacher_prefix_ids, r.teacher_inside_thought),
        )
        for r in mine
    ]
    everyones = [Rollout(by_id[prompt_id], *rest) for part in world.gather(travelling) for prompt_id, *rest in part]
    assert version is None or all(r.version == version for r in everyones), f"answers of other weights than {version}"
    return sorted(everyones, key=lambda r: (place[r.prompt.prompt_id], r.response_index))
