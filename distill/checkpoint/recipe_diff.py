"""What has changed in a recipe since a checkpoint, as far as it makes the run another one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from distill.config.paths import same_value

_SECTIONS = ("distillation", "loss_fn", "policy", "teacher")
_SAME_RUN = (
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
"""Beginnings of keys that say how long, on which layout or how closely watched a run is, not what it learns."""


def changed_keys(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``key was VALUE and is VALUE`` for every key that shapes what is learnt, in the recipe's order.

    A key that only one of them has, as another version's would, is left out. Two paths to one place are no change.
    """
    before = dict(_flat(then, ""))
    return [
        f"{key} was {before[key]} and is {value}"
        for key, value in _flat(json.loads(json.dumps(now)), "")
        if key.startswith(_SECTIONS) and not key.startswith(_SAME_RUN)
        if not same_value(key, before.get(key, value), value)
    ]


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
