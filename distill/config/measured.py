"""Which metrics a recipe cannot produce, and which key would change that; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distill.config.loss import TokenWeightsConfig
from distill.config.metric_names import is_of_validation
from distill.config.schema import Config, DatasetConfig

Cause = tuple[str, str]
"""Why a metric is never measured, and the fix, as parts of a sentence."""
_ALARM_METRICS = {"alarm/topk_overlap": "train/topk_overlap", "alarm/accuracy": "validation/accuracy_change"}
"""Maps an alarm to its metric, if not every recipe produces it."""


@dataclass(frozen=True)
class _Need:
    """Metrics of training steps that only some recipes produce."""

    names: str
    """Regular expression of the names."""
    holds: Callable[[Config], bool]
    """Function that returns whether a recipe produces the metrics."""
    because: str
    fix: str


_NEEDS = (
    _Need(
        "train/(off_policy_)?topk_overlap",
        lambda config: config.distillation.topk_logits_k > 0,
        "distillation.topk_logits_k=0 compares the complete vocabulary",
        "set distillation.topk_logits_k above 0",
    ),
    _Need(
        "train/(accuracy|judge_failures)|timing/train/grading",
        lambda config: _is_graded(config.data.train),
        "no dataset of data.train has a grader (env_name)",
        "set data.train.env_name",
    ),
    _Need(
        "train/(removed_by_train_on|empty_step)",
        lambda config: config.distillation.train_on != "all",
        "distillation.train_on=all removes no response",
        "set distillation.train_on to right or wrong",
    ),
    _Need(
        "train/off_policy_.*",
        lambda config: config.distillation.off_policy.share > 0,
        "distillation.off_policy.share=0",
        "set distillation.off_policy.share above 0",
    ),
    _Need(
        "train/partial/.*|timing/train/generation_busy",
        lambda config: config.distillation.partial_rollouts.enabled,
        "distillation.partial_rollouts.enabled=false",
        "set distillation.partial_rollouts.enabled=true",
    ),
    _Need(
        "train/max_new_tokens",
        lambda config: bool(config.distillation.max_new_tokens_schedule),
        "distillation.max_new_tokens_schedule is empty",
        "set distillation.max_new_tokens_schedule",
    ),
    _Need(
        "train/(trained_tokens|mean_token_weight|skipped_optimizer_steps)",
        lambda config: config.loss_fn.token_weights != TokenWeightsConfig(),
        "loss_fn.token_weights is not set",
        "set a key of loss_fn.token_weights",
    ),
    _Need(
        "train/context_distillation_.*|timing/train/teacher_prefixes",
        lambda config: config.distillation.context_distillation.enabled,
        "distillation.context_distillation.enabled=false",
        "set distillation.context_distillation.enabled=true",
    ),
)


def missing_cause(name: str, config: Config) -> Cause | None:
    """Return why a run of the recipe never records the metric ``name``, and the fix; None if it may record it.

    ``name``: a name for which ``is_metric`` is true.
    """
    loop = config.distillation
    if name.startswith("alarm/"):
        if not loop.default_alarms:
            return "distillation.default_alarms=false", "set distillation.default_alarms=true"
        if name == "alarm/grad_norm" and loop.control:
            return "distillation.control=true turns this alarm off", "set distillation.control=false"
        name = _ALARM_METRICS.get(name, name)
    if is_of_validation(name):
        return _validation(name, config)
    missing = (need for need in _NEEDS if re.fullmatch(need.names, name) and not need.holds(config))
    return next(((need.because, need.fix) for need in missing), None)


def _is_graded(datasets: Sequence[DatasetConfig]) -> bool:
    return any(dataset.env_name is not None for dataset in datasets)


def _validation(name: str, config: Config) -> Cause | None:
    loop = config.distillation
    if not config.data.validation:
        return "data.validation=null", "set data.validation"
    if name.startswith(("validation/probe/", "timing/validation/probe_")):
        return None if loop.probe_period else ("distillation.probe_period=0", "set distillation.probe_period above 0")
    if not (loop.val_period or loop.val_at_start or loop.val_at_end):
        because = "distillation.val_period=0 and val_at_start and val_at_end are false"
        return because, "set distillation.val_period above 0"
    if re.search("accuracy|judge_failures|pass@", name) and not _is_graded(config.data.validation):
        return "no dataset of data.validation has a grader (env_name)", "set data.validation.env_name"
    if "in_context" in name and not loop.context_distillation.enabled:
        because = "distillation.context_distillation.enabled=false"
        return because, "set distillation.context_distillation.enabled=true"
    found = re.search(r"pass@(\d+)", name)
    return None if found is None else _pass_at(int(found[1]), config)


def _pass_at(k: int, config: Config) -> Cause | None:
    """Return why pass@k is never measured: k is a power of two, or the number of responses to a problem."""
    n, repeat = config.distillation.val_num_generations, max(dataset.repeat for dataset in config.data.validation)
    most = n * repeat
    # With repeated problems, distillation.max_val_samples may reduce the number of responses to a problem.
    if 2 <= k <= most and (k & (k - 1) == 0 or k == most or repeat > 1):
        return None
    because = (
        f"there are {most} responses to a problem (distillation.val_num_generations={n}), and pass@k is reported for"
        " k = 2, 4, 8, ... and this number"
    )
    return because, f"set distillation.val_num_generations={max(k, 2)}, or use another k"
