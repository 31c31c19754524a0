"""Replace ``auto`` in the recipe by values whose memory forecast fits the GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from distill.config import Config
from distill.memory.forecast import GIB, card_bytes, predict
from distill.memory.shapes import ModelShape

MARGIN = 0.05
"""Fraction of the GPU's memory that stays free according to the forecast, if a value is chosen for ``auto``."""
ENOUGH_TOKENS = 65536
"""Maximum size of a teacher's pack with ``auto``, in tokens, unless the student's budget is larger.

Each pack gathers all weights once. In packs of this size, computing a layer takes many times longer than gathering it.
"""
_CHECKPOINTING = "policy.dtensor_cfg.activation_checkpointing"
_AUTO = "auto"


@dataclass(frozen=True)
class Resolved:
    """A configuration without ``auto``, and one sentence for each value that replaced it."""

    config: Config
    decisions: tuple[str, ...] = ()


def resolve(
    config: Config, student: ModelShape | None, teacher: ModelShape | None, card: int | None, cuda: bool = True
) -> Resolved:
    """Return ``config`` with a concrete value for each ``auto`` that depends on the memory forecast.

    The keys are ``policy.dtensor_cfg.activation_checkpointing`` and the teacher's ``logprob_mb_tokens``. The result is
    a pure function of its arguments, so all ranks get the same result if they pass the same ``card``. ``card``: memory
    of the smallest GPU in bytes, used if ``cluster.gpu_memory_gb`` is null; None: unknown. ``cuda``: whether the run
    uses GPUs. Without a known GPU or shape (None), the values are those that need the least memory.
    """
    if config.cluster.gpu_memory_gb is not None:
        card = card_bytes(config.cluster.gpu_memory_gb)
    if not cuda:
        return _resolve(config, None, "because the run uses no GPU")
    if card is None or student is None or teacher is None:
        return _resolve(config, None, "because the memory of the GPU or the size of a model is unknown")
    limit = int(card * (1 - MARGIN))

    def size(changed: Config, phase: str) -> int:
        return predict(changed, student, teacher, card=card).total(phase)

    return _resolve(config, size, f"because of at most {limit / GIB:.1f} GiB", limit)


_Size = Callable[[Config, str], int]


def _resolve(config: Config, size: _Size | None, why: str, limit: int = 0) -> Resolved:
    resolved = _resolve_checkpointing(config, size, why, limit)
    joined = _resolve_teacher_packs(resolved.config, size, why, limit)
    return Resolved(joined.config, resolved.decisions + joined.decisions)


def _resolve_checkpointing(config: Config, size: _Size | None, why: str, limit: int) -> Resolved:
    if config.policy.dtensor_cfg.activation_checkpointing != _AUTO:
        return Resolved(config)
    if size is None:
        return Resolved(_with_checkpointing(config, True), (f"{_CHECKPOINTING}=auto: true, {why}",))
    candidates: tuple[bool | Literal["selective"], ...] = (False, "selective", True)
    sizes = {mode: size(_with_checkpointing(config, mode), "training") for mode in candidates}
    mode = next((mode for mode in candidates if sizes[mode] <= limit), True)
    values = ", ".join(f"{_yaml(mode)} {bytes_ / GIB:.1f}" for mode, bytes_ in sizes.items())
    text = f"{_CHECKPOINTING}=auto: {_yaml(mode)} (training needs {values} GiB; limit {limit / GIB:.1f} GiB)"
    return Resolved(_with_checkpointing(config, mode), (text,))


def _resolve_teacher_packs(config: Config, size: _Size | None, why: str, limit: int) -> Resolved:
    found = [
        name
        for name in ("sequence_packing", "dynamic_batching")
        if getattr(config.teacher, name).enabled and getattr(config.teacher, name).logprob_mb_tokens == _AUTO
    ]
    if not found:
        return Resolved(config)
    (name,) = found  # the rules allow only one of them
    key, base = f"teacher.{name}.logprob_mb_tokens", _student_budget(config)
    if size is None:
        return Resolved(_with_teacher_packs(config, name, base), (f"{key}=auto: {base}, {why}",))
    most = max(1, ENOUGH_TOKENS // base)
    sizes = {n: size(_with_teacher_packs(config, name, n * base), "teacher") for n in range(1, most + 1)}
    joined = max((n for n, bytes_ in sizes.items() if bytes_ <= limit), default=1)
    text = f"{key}=auto: {joined * base} (the teacher needs {sizes[joined] / GIB:.1f} GiB; limit {limit / GIB:.1f} GiB)"
    return Resolved(_with_teacher_packs(config, name, joined * base), (text,))


def _student_budget(config: Config) -> int:
    """Return the maximum number of tokens of a micro-batch, counted with the longer of both models' prompts."""
    policy = config.policy
    longest = max(policy.max_total_sequence_length, config.teacher.max_total_sequence_length)
    for batching in (policy.sequence_packing, policy.dynamic_batching):
        if batching.enabled:
            return max(batching.train_mb_tokens, longest)
    return longest * policy.train_micro_batch_size


def _with_checkpointing(config: Config, mode: bool | Literal["selective"]) -> Config:
    parallel = replace(config.policy.dtensor_cfg, activation_checkpointing=mode)
    return replace(config, policy=replace(config.policy, dtensor_cfg=parallel))


def _with_teacher_packs(config: Config, name: str, tokens: int) -> Config:
    batching = replace(getattr(config.teacher, name), logprob_mb_tokens=tokens)
    return replace(config, teacher=replace(config.teacher, **{name: batching}))


def _yaml(mode: bool | str) -> str:
    return str(mode).lower()
