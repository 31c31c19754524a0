"""Rules of the training loop: limits of the length of responses, off-policy responses and partial rollouts."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import NoReturn

from distill.config.divergence_rules import check_divergence
from distill.config.loop import ContextDistillationConfig, DistillationConfig
from distill.config.loss import KlType, LossConfig
from distill.config.parse import changed_names
from distill.config.partial_rules import check_partial_rollouts, warn_of_partial_rollouts
from distill.config.schema import Config
from distill.errors import UserError, show

log = logging.getLogger(__name__)

_SCHEDULE = "distillation.max_new_tokens_schedule"
_OFF_POLICY = "distillation.off_policy"
_CONTEXT = "distillation.context_distillation"


def check_loop(config: Config) -> None:
    """Raise UserError for the first rule about the training loop that ``config`` breaks."""
    for rule in (_check_schedule, _check_validation_limit, _check_off_policy, check_partial_rollouts):
        rule(config)


def _check_schedule(config: Config) -> None:
    schedule = config.distillation.max_new_tokens_schedule
    steps = [step for step, _ in schedule]

    def refuse(problem: str, fix: str) -> NoReturn:
        _refuse(_SCHEDULE, [list(entry) for entry in schedule], problem, fix)

    if steps != sorted({step for step in steps if step >= 1}):
        refuse(
            "has steps that are below 1 or not strictly increasing",
            "list pairs [step, tokens] in the order of their steps; the first step is 1",
        )
    window = config.policy.max_total_sequence_length
    for _, tokens in schedule:
        if tokens < 1:
            refuse(f"has the limit {tokens}", "set each number of tokens to at least 1")
        if tokens > window:
            name = f"policy.max_total_sequence_length={window}"
            refuse(f"has the limit {tokens}, which exceeds {name}", f"set it to at most {window}")


def _check_validation_limit(config: Config) -> None:
    key, tokens = "policy.generation.val_max_new_tokens", config.policy.generation.val_max_new_tokens
    window = config.policy.max_total_sequence_length
    if tokens > window:
        raise UserError(
            f"{key}={tokens} exceeds policy.max_total_sequence_length={window}",
            f"set it to at most {window}, or raise policy.max_total_sequence_length",
            key=key,
            value=tokens,
        )


def _check_off_policy(config: Config) -> None:
    loop, loss = config.distillation, config.loss_fn
    given, key, share = loop.off_policy, f"{_OFF_POLICY}.kl_type", f"{_OFF_POLICY}.share"
    _check_share(loop)
    if given.column is not None and not given.column.strip():
        _refuse(f"{_OFF_POLICY}.column", given.column, "is an empty text", "set it to the name of a column, or to null")
    if given.kl_type == "sampled":
        problem = "needs responses that the student sampled"
        _refuse(key, given.kl_type, problem, f"set {key} to another divergence, such as forward")
    if given.share and loss.kl_type == "sampled":
        _refuse(
            "loss_fn.kl_type",
            loss.kl_type,
            f"cannot be combined with {share}={given.share}, because the student did not sample the responses of the"
            " dataset",
            f"set loss_fn.kl_type to another divergence, or {share}=0",
        )
    if given.kl_type is not None:
        _check_kl_type(loss, given.kl_type)


def _check_share(loop: DistillationConfig) -> None:
    share, key, responses = loop.off_policy.share, f"{_OFF_POLICY}.share", loop.responses_per_step
    if not 0 <= share <= 1:
        _refuse(key, share, "is not a fraction", "set it from 0 to 1")
    if share and not loop.off_policy_per_step:
        _refuse(
            key,
            share,
            f"is less than one of the {responses} responses of a step (num_prompts_per_step *"
            " num_generations_per_prompt)",
            f"set it to 0, or to at least 1/{responses}={show(1 / responses)}",
        )
    if loop.train_on != "all" and loop.off_policy_per_step == responses:
        problem = f"has no effect with {key}={share}, because the student generates no response"
        _refuse("distillation.train_on", loop.train_on, problem, f"set distillation.train_on=all, or a smaller {key}")


def _check_kl_type(loss: LossConfig, kl_type: KlType) -> None:
    """Raise UserError about off_policy.kl_type if it cannot be combined with the other keys of the loss."""
    key = f"{_OFF_POLICY}.kl_type"
    try:
        check_divergence(replace(loss, kl_type=kl_type), key)
    except UserError as error:
        raise UserError(error.problem, error.fix, key=key, value=kl_type) from error


def _refuse(key: str, value: object, problem: str, fix: str) -> NoReturn:
    raise UserError(f"{key}={show(value)} {problem}", fix, key=key, value=value)


def _warn_of_context(context: ContextDistillationConfig) -> None:
    changed = changed_names(context)
    if not context.enabled:
        unused = [name for name in changed if name != "trace_extractor"]  # grading uses its tags too
        if unused:
            log.warning("%s: %s has no effect, because %s.enabled=false", _CONTEXT, ", ".join(unused), _CONTEXT)
        return
    for name, mode in (("refresh_period", "self_periodic"), ("ema_decay", "self_ema")):
        if name in changed and context.mode != mode:
            log.warning("%s.%s has no effect, because %s.mode=%s", _CONTEXT, name, _CONTEXT, context.mode)


def warn_of_loop(config: Config) -> None:
    """Warn of settings of the training loop that are allowed, but may surprise the user."""
    loop = config.distillation
    unused = [[first, tokens] for first, tokens in loop.max_new_tokens_schedule if first > loop.max_num_steps]
    if unused:
        log.warning(
            "%s has entries that no step reaches, because distillation.max_num_steps=%d: %s",
            *(_SCHEDULE, loop.max_num_steps, show(unused)),
        )
    for name in ("column", "kl_type"):
        if not loop.off_policy.share and getattr(loop.off_policy, name) is not None:
            log.warning("%s.%s has no effect, because %s.share=0", _OFF_POLICY, name, _OFF_POLICY)
    _warn_of_context(loop.context_distillation)
    if loop.off_policy_per_step == loop.responses_per_step:
        log.warning(
            "with %s.share=%s the student generates no responses, so metrics of the student's responses (train/loss,"
            " train/truncation_rate and more) are missing and alarms on them are off: read the metrics"
            " train/off_policy_..., or set a smaller share",
            *(_OFF_POLICY, show(loop.off_policy.share)),
        )
    warn_of_partial_rollouts(config)
