"""Compare the adapters and the base model of a checkpoint with the current recipe; low-rank adapters only.

A checkpoint of a run with adapters contains no weights of the base model, only checksums of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from distill.checkpoint.search import DIR_KEY, Found
from distill.config import Config, LoraConfig
from distill.config.lora_rules import KEY, stores_adapters, teacher_shares_base
from distill.errors import CollectiveUserError, UserError, show

BASE = "base"
"""Key of training_info.json with the base model: ``model_name``, ``dtype`` and ``checksum``; null without adapters.

``checksum`` maps a dtype to the checksum of the weights in this dtype.
"""
_CONTEXT = "distillation.context_distillation"
_SHAPES = ("dim", "target_modules", "exclude_modules")
"""Keys of lora_cfg that determine names and shapes of the adapters."""


def raise_if_other_adapters(found: Found, config: Config) -> None:
    """Raise UserError if the tensors of the checkpoint ``found`` are not those that the recipe trains.

    ``checkpointing.allow_changes`` does not allow these changes, because the tensors do not exist in the checkpoint.
    """
    lora = config.policy.dtensor_cfg.lora_cfg
    saved = found.info["recipe"]["policy"].get("dtensor_cfg", {}).get("lora_cfg", {})
    before = bool(saved.get("enabled"))
    if before != lora.enabled:
        trained = {True: "adapters", False: "all weights"}
        merge = " with --merge" if before else ""
        raise _error(
            f"{KEY}.enabled",
            lora.enabled,
            f"checkpoint {found.path} is of a run that trains {trained[before]}, and"
            f" {KEY}.enabled={show(lora.enabled)} trains {trained[lora.enabled]}",
            f"to start from its weights, export it with scripts.export_hf{merge} and set policy.model_name to the"
            " export",
        )
    changed = [name for name in _SHAPES if lora.enabled and _value(saved, name) != getattr(lora, name)]
    if changed:
        name = changed[0]
        raise _error(
            f"{KEY}.{name}",
            getattr(lora, name),
            f"checkpoint {found.path} has adapters with {KEY}.{name}={show(_value(saved, name))}, and"
            f" {KEY}.{name}={show(getattr(lora, name))}",
            "undo the change",
        )
    _compare_teachers(found, config)


def _compare_teachers(found: Found, config: Config) -> None:
    """Raise UserError if the teacher of the recipe stores adapters and the checkpoint has none, or the reverse.

    A checkpoint may have stored adapters that another mode does not need.
    """
    context, lora = config.distillation.context_distillation, config.policy.dtensor_cfg.lora_cfg
    if not lora.enabled:
        return
    saved = found.info["recipe"]
    before, after = (_teacher_stores_adapters(recipe) for recipe in (saved, asdict(config)))
    if before == after:
        return
    was_enabled, mode = (saved["distillation"]["context_distillation"][name] for name in ("enabled", "mode"))
    was: object
    value: object
    if (was_enabled, mode) == (context.enabled, context.mode):
        key, was, value = f"{KEY}.init_from", saved["policy"]["dtensor_cfg"]["lora_cfg"]["init_from"], lora.init_from
    elif not after:
        return
    elif was_enabled == context.enabled:
        key, was, value = f"{_CONTEXT}.mode", mode, context.mode
    else:
        key, was, value = f"{_CONTEXT}.enabled", was_enabled, context.enabled
    raise _error(
        key,
        value,
        f"{key} was {show(was)} at checkpoint {found.path} and is {show(value)}, so the teacher's adapters"
        f" {'are missing' if after else 'would be ignored'}",
        "undo the change",
    )


def _teacher_stores_adapters(recipe: Mapping[str, Any]) -> bool:
    """Return whether the teacher has its own adapters, which checkpoints contain; ``recipe``: as in asdict(Config)."""
    context, lora = recipe["distillation"]["context_distillation"], recipe["policy"]["dtensor_cfg"]["lora_cfg"]
    return bool(context["enabled"]) and stores_adapters(context["mode"], lora["init_from"])


def _value(saved: Mapping[str, Any], name: str) -> Any:
    """Return a value of the section lora_cfg in a checkpoint's recipe, as in LoraConfig; JSON has lists for tuples."""
    value = saved.get(name, getattr(LoraConfig(), name))
    return tuple(value) if isinstance(value, list) else value


def _error(key: str, value: object, problem: str, fix: str) -> UserError:
    fix = f"{fix}, or set another {DIR_KEY} to start a new run"
    return UserError(f"the run cannot resume, because {problem}", fix, key=key, value=value)


def names_of_base(found: Found, config: Config) -> tuple[str, ...]:
    """Return the keys with the name of the base model of adapters; the folder may have been renamed since ``found``.

    They include the name of the tokenizer, if it is the model's own one. A change of their values does not matter:
    ``raise_if_other_base`` compares the weights, and a resume compares the vocabulary, the prompts and config.json.
    Empty without adapters.
    """
    if found.info.get(BASE) is None or not config.policy.dtensor_cfg.lora_cfg.enabled:
        return ()
    keys = []
    for section in ("policy", "teacher") if teacher_shares_base(config) else ("policy",):
        keys.append(f"{section}.model_name")
        models = [recipe[section] for recipe in (found.info["recipe"], asdict(config))]
        if all(model["tokenizer"]["name"] == model["model_name"] for model in models):
            keys.append(f"{section}.tokenizer.name")
    return tuple(keys)


def raise_if_other_base(found: Found, base: Mapping[str, Any] | None, model_name: str) -> None:
    """Raise UserError if the base model changed since the checkpoint ``found``; call it on all ranks.

    ``base``: the value of the key BASE of the current base model, equal on all ranks. ``model_name``: the recipe's
    policy.model_name. The weights are compared in the current dtype, or in bfloat16 if the checkpoint was saved in
    another precision.
    """
    saved = found.info.get(BASE)
    if base is None or saved is None:
        return
    common = [dtype for dtype in (base["dtype"], "bfloat16") if dtype in saved["checksum"]]
    if base["checksum"][common[0]] != saved["checksum"][common[0]]:
        raise CollectiveUserError(
            f"the weights of policy.model_name={model_name} differ from those of the base model"
            f" {saved['model_name']} on which the adapters of checkpoint {found.path} were trained",
            f"restore this base model, or set another {DIR_KEY} to start a new run",
            key="policy.model_name",
            value=model_name,
        )
