"""Gather the rollouts of all ranks on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill.distributed.world import World
from distill.types import Prompt, Rollout


def gather_rollouts(
    world: World, own: Sequence[Rollout], prompts: Sequence[Prompt], version: int | None = None
) -> list[Rollout]:
    """Return the rollouts of all ranks, in the same order on every rank; collective.

    The rollouts are sorted by ``Rollout.order``, then by their prompt's position in ``prompts`` and by response index.
    ``own``: the rollouts of this rank. ``prompts``: the prompts of all ranks, equal on every rank. ``version``:
    expected ``Rollout.version`` (number of finished training steps) of every rollout; None: not checked.
    """
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    position = {prompt.prompt_id: i for i, prompt in enumerate(prompts)}
    sent: list[tuple[Any, ...]] = [
        (
            *(r.prompt.prompt_id, r.response_index, r.response_ids, r.logprobs, r.finish, r.version),
            *(r.teacher_prefix_ids, r.teacher_inside_thought, r.off_policy, r.older_tokens, r.order),
        )
        for r in own
    ]
    rollouts = [Rollout(by_id[prompt_id], *fields) for part in world.gather(sent) for prompt_id, *fields in part]
    versions = {rollout.version for rollout in rollouts}
    assert version is None or versions <= {version}, f"responses of weights {versions}, expected {version}"
    return sorted(rollouts, key=lambda r: (r.order, r.off_policy, position[r.prompt.prompt_id], r.response_index))
