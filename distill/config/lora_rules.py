"""Rules of low-rank adapters: policy.dtensor_cfg.lora_cfg.*."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import NoReturn

from distill.config.models import TeacherDtensorConfig
from distill.config.parse import changed_names
from distill.config.schema import Config
from distill.errors import UserError, show

log = logging.getLogger(__name__)

KEY = "policy.dtensor_cfg.lora_cfg"
_MODE = "distillation.context_distillation.mode"


def teacher_shares_base(config: Config) -> bool:
    """Return whether the teacher is the student's module with other adapters or none.

    This is so if adapters are trained and ``distillation.context_distillation.mode`` makes the student its own teacher.
    """
    context = config.distillation.context_distillation
    return config.policy.dtensor_cfg.lora_cfg.enabled and context.enabled and context.mode != "frozen"


def stores_adapters(mode: str, init_from: str | None) -> bool:
    """Return whether a teacher that shares the student's base has its own adapters, which checkpoints contain.

    ``mode``: the mode of context distillation. ``init_from``: the value of lora_cfg.init_from. With it, the student
    before training, which is the teacher in mode self_frozen, has adapters.
    """
    return mode in ("self_ema", "self_periodic") or (mode == "self_frozen" and init_from is not None)


def starts_as_teacher(config: Config) -> bool:
    """Return whether the student before training has the teacher's weights.

    False if they are different models, or if an adapter in ``lora_cfg.init_from`` changes the student only. A teacher
    that shares the student's module has this adapter too.
    """
    lora = config.policy.dtensor_cfg.lora_cfg
    has_adapter = lora.enabled and lora.init_from is not None and not teacher_shares_base(config)
    return config.teacher.model_name == config.policy.model_name and not has_adapter


def check_lora(config: Config) -> None:
    """Raise UserError if the keys of enabled adapters have wrong values, or select no layer."""
    lora = config.policy.dtensor_cfg.lora_cfg
    if not lora.enabled:
        return
    if lora.dropout != 0:
        problem = "is not supported, because dropout would change the student's outputs and not the teacher's"
        _refuse("dropout", lora.dropout, problem, "set it to 0")
    for name in ("target_modules", "exclude_modules"):
        if not all(pattern.strip() for pattern in getattr(lora, name)):
            _refuse(name, list(getattr(lora, name)), "has an empty pattern", "remove it, or set it to names of modules")
    if not (lora.match_all_linear or lora.target_modules or lora.exclude_modules):
        fix = f"set {KEY}.target_modules to names of modules, or match_all_linear to true"
        _refuse("match_all_linear", False, "selects no layer without target_modules and exclude_modules", fix)
    if lora.init_from is not None and not lora.init_from.strip():
        _refuse("init_from", lora.init_from, "is an empty text", "set it to the folder of an adapter, or to null")
    _check_precision(config)


def _check_precision(config: Config) -> None:
    """Raise UserError if the teacher needs another dtype of the base that it shares with the student."""
    ours, theirs = config.policy.precision, config.teacher.precision
    if teacher_shares_base(config) and ours != theirs:
        raise UserError(
            f"teacher.precision={theirs} differs from policy.precision={ours}, but with {KEY}.enabled=true and"
            f" {_MODE}={config.distillation.context_distillation.mode} the teacher is the student's own model",
            f"remove teacher.precision, or set {_MODE}=frozen to load the teacher separately",
            key="teacher.precision",
            value=theirs,
        )


def _refuse(name: str, value: object, problem: str, fix: str) -> NoReturn:
    raise UserError(f"{KEY}.{name}={show(value)} {problem}", fix, key=f"{KEY}.{name}", value=value)


def warn_of_lora(config: Config) -> None:
    """Warn of keys that have no effect with or without adapters, and of a teacher that is a second copy of the base."""
    lora = config.policy.dtensor_cfg.lora_cfg
    changed = changed_names(lora)
    if not lora.enabled and changed:
        log.warning("%s: %s has no effect, because %s.enabled=false", KEY, ", ".join(changed), KEY)
    if lora.enabled:
        _warn_of_teacher(config)


def _warn_of_teacher(config: Config) -> None:
    mode, default = config.distillation.context_distillation.mode, TeacherDtensorConfig()
    ours, theirs = config.policy.dtensor_cfg, config.teacher.dtensor_cfg
    unused = [
        field.name
        for field in fields(default)
        if getattr(theirs, field.name) not in (getattr(default, field.name), getattr(ours, field.name))
    ]
    if teacher_shares_base(config):
        if unused:
            log.warning(
                "teacher.dtensor_cfg: %s has no effect, because with %s.enabled=true and %s=%s the teacher is the"
                " student's own model, with the parallelism of policy.dtensor_cfg",
                *(", ".join(unused), KEY, _MODE, mode),
            )
    elif starts_as_teacher(config) and config.distillation.context_distillation.enabled:
        log.warning(
            "with %s=%s the teacher is loaded as a second copy of the student's base: set %s=self_frozen to use the"
            " base of the student without its adapters",
            *(_MODE, mode, _MODE),
        )
