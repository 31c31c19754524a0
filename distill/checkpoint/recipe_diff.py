"""Compare a checkpoint's recipe (configuration) with the current one, in keys that affect training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from distill.config import TokenWeightsConfig
from distill.config.lora_rules import KEY
from distill.config.paths import same_value

_SECTIONS = ("distillation.", "loss_fn.", "policy.", "teacher.")
_SAME_RUN = (
    "distillation.alarms",
    "distillation.allow_degenerate",
    "distillation.context_distillation.metrics.",
    "distillation.default_alarms",
    "distillation.max_num_",
    "distillation.max_val_samples",
    "distillation.probe_period",
    "distillation.val_",
    "distillation.watched_words",
    "policy.dtensor_cfg.",  # except for _LORA
    "policy.dynamic_batching.",
    "policy.generation.backend",
    "policy.generation.expected_length.",
    "policy.generation.val_",
    "policy.generation.vllm_",
    "policy.generation_batch_size",
    "policy.logprob_",
    "policy.sequence_packing.",
    "policy.train_micro_batch_size",
    "teacher.dtensor_cfg.",
    "teacher.dynamic_batching.",
    "teacher.logprob_",
    "teacher.sequence_packing.",
)
"""Prefixes of configuration keys that do not affect training.

These keys set the length of the run, parallelism, memory use and monitoring.
"""
_ARITHMETIC = (
    "loss_fn.backend",
    "loss_fn.logits_dtype",
    "policy.optimizer.kwargs.foreach",
    "policy.optimizer.kwargs.fused",
    "policy.precision",
    "teacher.precision",
)
"""Keys of dtypes and implementations, which change the rounding but not what the run learns."""
_LORA = f"{KEY}."
"""Prefix of keys that affect training, although keys of parallelism do not."""
_WITHOUT_EFFECT = (f"{_LORA}match_all_linear",)
"""Keys whose value changes nothing: patterns take precedence over match_all_linear, and without them it is true."""
_SWITCHES = {
    "distillation.off_policy.": "share",
    "distillation.partial_rollouts.": "enabled",
    _LORA: "enabled",
}
"""Maps the prefix of a section to the key that enables it: keys of a section that is disabled have no effect."""
_BEFORE: dict[str, Any] = {
    "distillation.context_distillation.keep_history": False,
    "distillation.context_distillation.teacher_messages_key": None,
    "distillation.context_distillation.teacher_system_prompt_file": None,
    "distillation.control": False,
    "distillation.max_new_tokens_schedule": [],
    "distillation.off_policy.share": 0.0,
    "distillation.partial_rollouts.enabled": False,
    "distillation.train_on": "all",
    f"{_LORA}enabled": False,
}
"""Keys that recipes of older checkpoints lack, with the values that have the effect of these recipes."""
_FREE_FORM = ("chat_template_kwargs",)
"""Names of keys whose value is a dict with any names; such a dict is compared as one value."""


def changed_keys(saved: Mapping[str, Any], current: Mapping[str, Any], others: tuple[str, ...] = ()) -> dict[str, str]:
    """Return a dict that maps each changed key that affects training to a text ``KEY was OLD and is NEW``.

    ``saved``, ``current``: the recipe (configuration) in the checkpoint and the current recipe. The dict follows the
    order of keys in ``current``. Keys that only one of the recipes contains are ignored, because another version of the
    program may have written the checkpoint; keys in ``_BEFORE`` have a value also in recipes without them. If a
    section is null in one recipe, each of its keys counts as null there. Keys of a section in ``_SWITCHES`` are
    compared only if one of the recipes enables it. Different paths to the same file are equal.
    ``others``: prefixes of further keys to compare.
    """
    now, then = json.loads(json.dumps(current)), _with_loss_defaults(saved)
    after = dict(_flat(_with_null_sections(now, then), ""))
    before = {**after, **_BEFORE, **dict(_flat(_with_null_sections(then, now), ""))}
    return {
        key: f"{key} was {before[key]} and is {value}"
        for key, value in after.items()
        if key.startswith(_SECTIONS + others) and (key.startswith(_LORA) or not key.startswith(_SAME_RUN))
        if key not in _WITHOUT_EFFECT and not same_value(key, before[key], value)
        if not any(
            key.startswith(section) and not before.get(f"{section}{switch}") and not after.get(f"{section}{switch}")
            for section, switch in _SWITCHES.items()
        )
    }


def affects_learning(key: str) -> bool:
    """Return whether a change of ``key`` affects what the run learns, and not only the rounding."""
    return key not in _ARITHMETIC


def _with_loss_defaults(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``saved`` with the defaults of the keys of loss_fn that recipes of older checkpoints lack."""
    if "loss_fn" not in saved:
        return dict(saved)
    defaults = {"entry_clip": None, "token_weights": asdict(TokenWeightsConfig())}
    return {**saved, "loss_fn": {**defaults, **saved["loss_fn"]}}


def _with_null_sections(tree: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``tree`` with a section of nulls in place of each null for which ``other`` has a section."""
    found = dict(tree)
    for name, value in tree.items():
        section = other.get(name)
        if isinstance(section, Mapping) and name not in _FREE_FORM and (value is None or isinstance(value, Mapping)):
            found[name] = _with_null_sections(dict.fromkeys(section) if value is None else value, section)
    return found


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value and name not in _FREE_FORM:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
