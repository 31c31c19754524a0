"""Rules of partial rollouts: distillation.partial_rollouts.*."""

from __future__ import annotations

import logging
from typing import NoReturn

from distill.config.loop import PartialRolloutsConfig
from distill.config.parse import changed_names
from distill.config.schema import Config
from distill.errors import UserError, show

log = logging.getLogger(__name__)

KEY = "distillation.partial_rollouts"
_ENABLED = f"{KEY}.enabled"


def check_partial_rollouts(config: Config) -> None:
    """Raise UserError if the keys of partial rollouts have wrong values, or if the engines have too little room."""
    partial = config.distillation.partial_rollouts
    if not 0.5 <= partial.finish_share <= 1:
        _refuse("finish_share", partial.finish_share, "is out of range", "set it from 0.5 to 1")
    if partial.max_age < 1:
        _refuse("max_age", partial.max_age, "is out of range", "set it to at least 1")
    if not partial.enabled:
        return
    if not config.distillation.generated_per_step:
        share = f"distillation.off_policy.share={show(config.distillation.off_policy.share)}"
        _refuse(
            "enabled",
            True,
            f"has no effect with {share}, because the student generates no responses",
            f"set {_ENABLED}=false, or a smaller distillation.off_policy.share",
        )
    _check_room(config)


def _check_room(config: Config) -> None:
    """Raise UserError if a limit of the engines is below the number of responses that one engine has in progress.

    With a smaller limit some responses would start only after others have ended, so the step would not get shorter.
    """
    policy, loop = config.policy, config.distillation
    engines = config.cluster.num_nodes * config.cluster.gpus_per_node // policy.generation.ranks_per_engine
    needed = loop.most_per_engine(engines)
    if policy.generation.backend == "transformers":
        limits: dict[str, int | None] = {"policy.generation_batch_size": policy.generation_batch_size}
    else:
        kwargs = policy.generation.vllm_kwargs
        names = ("max_num_seqs", "max_num_batched_tokens")
        limits = {f"policy.generation.vllm_kwargs.{name}": kwargs.get(name) for name in names}
    share = f"{KEY}.finish_share={show(loop.partial_rollouts.finish_share)}"
    for key, limit in limits.items():
        if isinstance(limit, int) and limit < needed:
            raise UserError(
                f"{key}={limit} is below {needed}, the number of responses that one of {engines} engine(s) generates at"
                f" the same time with {_ENABLED}=true and {share}",
                f"set it to at least {needed}, use fewer responses per step, or set {_ENABLED}=false",
                key=key,
                value=limit,
            )


def _refuse(name: str, value: object, problem: str, fix: str) -> NoReturn:
    raise UserError(f"{KEY}.{name}={show(value)} {problem}", fix, key=f"{KEY}.{name}", value=value)


def warn_of_partial_rollouts(config: Config) -> None:
    """Warn of settings of partial rollouts that are allowed, but may surprise the user."""
    loop, default = config.distillation, PartialRolloutsConfig()
    partial = loop.partial_rollouts
    if not partial.enabled:
        for name in changed_names(partial):
            log.warning("%s.%s has no effect, because %s=false", KEY, name, _ENABLED)
        return
    if partial.finish_share == 1:
        log.warning(
            "%s.finish_share=1 waits for the longest response of each step, as %s=false does: set it below 1, such as"
            " %s, to shorten the steps",
            *(KEY, _ENABLED, default.finish_share),
        )
        return
    first = partial.max_age + 1
    if loop.max_num_steps <= first:
        log.warning(
            "with %s=true, the first steps train on shorter responses than later steps, and distillation.max_num_steps="
            "%d ends the run before about step %d, from which on the lengths are representative: train more steps, or"
            " set %s=false",
            *(_ENABLED, loop.max_num_steps, first + 1, _ENABLED),
        )
    elif not (config.data.validation and (loop.val_period or loop.val_at_end)):
        log.warning(
            "with %s=true, metrics of training responses (length, truncation, loss) of the first %d steps describe"
            " short responses, and validation is off: compare later steps only, or set distillation.val_period to"
            " measure complete responses",
            *(_ENABLED, first),
        )
