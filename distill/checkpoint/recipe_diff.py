"""Compare a checkpoint's recipe (configuration) with the current one, in keys that affect training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from distill.config.paths import same_value

_SECTIONS = ("distillation.", "loss_fn.", "policy.", "teacher.")
_SAME_RUN = (
    "distillation.allow_degenerate",
    "distillation.context_distillation.metrics.",
    "distillation.max_num_",
    "distillation.max_val_samples",
    "distillation.val_",
    "policy.dtensor_cfg.",
    "policy.dynamic_batching.",
    "policy.generation.backend",
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
_FREE_FORM = ("chat_template_kwargs",)
"""Names of keys whose value is a dict with any names; such a dict is compared as one value."""


def changed_keys(saved: Mapping[str, Any], current: Mapping[str, Any], others: tuple[str, ...] = ()) -> dict[str, str]:
    """Return a dict that maps each changed key that affects training to a text ``KEY was OLD and is NEW``.

    ``saved``, ``current``: the recipe (configuration) in the checkpoint and the current recipe. The dict follows the
    order of keys in ``current``. Keys that only one of the recipes contains are ignored, because another version of the
    program may have written the checkpoint. Different paths to the same file count as equal values. ``others``:
    prefixes of further keys to compare.
    """
    before = dict(_flat(saved, ""))
    return {
        key: f"{key} was {before[key]} and is {value}"
        for key, value in _flat(json.loads(json.dumps(current)), "")
        if key.startswith(_SECTIONS + others) and not key.startswith(_SAME_RUN)
        if not same_value(key, before.get(key, value), value)
    }


def affects_learning(key: str) -> bool:
    """Return whether a change of ``key`` affects what the run learns, and not only the rounding."""
    return key not in _ARITHMETIC


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value and name not in _FREE_FORM:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
