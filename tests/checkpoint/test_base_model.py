"""A run with adapters resumes only with the same adapters on the same base model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from distill.checkpoint import Found, changed_keys
from distill.checkpoint.base_model import BASE, raise_if_other_adapters, raise_if_other_base
from distill.checkpoint.resume import compare_with_checkpoint
from distill.config import Config, LoraConfig
from distill.data.clock import RunClock, current_time
from distill.errors import UserError

LORA = "policy.dtensor_cfg.lora_cfg"
MODE = "distillation.context_distillation.mode"
ENABLED = "distillation.context_distillation.enabled"
SAVED = LoraConfig(enabled=True, dim=16, target_modules=("q_proj",))


def _recipe(lora: LoraConfig, mode: Any = None, enabled: bool = True) -> Config:
    """Return the default recipe with adapters; ``mode``: mode of context distillation, None: disabled."""
    config = Config()
    if mode is not None:
        context = replace(config.distillation.context_distillation, enabled=enabled, mode=mode)
        config = replace(config, distillation=replace(config.distillation, context_distillation=context))
    parallel = replace(config.policy.dtensor_cfg, lora_cfg=lora)
    return replace(config, policy=replace(config.policy, dtensor_cfg=parallel))


def _found(lora: LoraConfig | None, mode: str | None = None, enabled: bool = True, **info: Any) -> Found:
    """Return a checkpoint; ``lora``: None for one of a version without adapters."""
    recipe = json.loads(json.dumps(asdict(_recipe(lora or LoraConfig(), mode, enabled))))
    if lora is None:
        del recipe["policy"]["dtensor_cfg"]["lora_cfg"]
    return Found(Path("step_4"), {"recipe": recipe, **info}, [])


@pytest.mark.parametrize(
    ("saved", "current", "key"),
    [
        (SAVED, LoraConfig(), "enabled"),
        (LoraConfig(), SAVED, "enabled"),
        (None, SAVED, "enabled"),
        (SAVED, replace(SAVED, dim=8), "dim"),
        (SAVED, replace(SAVED, target_modules=("q_proj", "v_proj")), "target_modules"),
        (SAVED, replace(SAVED, exclude_modules=("*.0.*",)), "exclude_modules"),
    ],
)
def test_a_resume_that_trains_other_tensors_is_refused(saved: LoraConfig | None, current: LoraConfig, key: str) -> None:
    with pytest.raises(UserError) as refused:
        raise_if_other_adapters(_found(saved), _recipe(current))
    assert (refused.value.key, refused.value.value) == (f"{LORA}.{key}", getattr(current, key))
    assert ("--merge" in refused.value.fix) == (key == "enabled" and saved == SAVED)


@pytest.mark.parametrize(
    ("saved", "current"),
    [
        (SAVED, SAVED),
        (SAVED, replace(SAVED, alpha=8.0)),  # allowed here, but it affects what the run learns
        (None, LoraConfig()),
        (LoraConfig(dim=4), LoraConfig()),  # without effect
    ],
)
def test_a_resume_that_trains_the_same_tensors_is_accepted(saved: LoraConfig | None, current: LoraConfig) -> None:
    raise_if_other_adapters(_found(saved), _recipe(current))


STARTED = replace(SAVED, init_from="an adapter")


@pytest.mark.parametrize(
    ("saved", "current", "key"),
    [
        ((SAVED, "self_frozen"), (SAVED, "self_ema"), MODE),
        ((SAVED, None), (SAVED, "self_periodic"), ENABLED),
        ((SAVED, "self_ema", False), (SAVED, "self_ema"), ENABLED),
        ((SAVED, "self_ema"), (SAVED, "self_ema", False), None),
        ((SAVED, "self_frozen"), (STARTED, "self_frozen"), f"{LORA}.init_from"),
        ((STARTED, "self_frozen"), (SAVED, "self_frozen"), f"{LORA}.init_from"),
        ((SAVED, "self_ema"), (SAVED, "self_periodic"), None),
        ((SAVED, "self_ema"), (SAVED, "self_live"), None),
        ((SAVED, "self_live"), (STARTED, "self_live"), None),
    ],
)
def test_a_resume_without_the_adapters_of_the_teacher_is_refused(saved: Any, current: Any, key: str | None) -> None:
    if key is None:
        raise_if_other_adapters(_found(*saved), _recipe(*current))
        return
    with pytest.raises(UserError) as refused:
        raise_if_other_adapters(_found(*saved), _recipe(*current))
    assert refused.value.key == key


def test_alpha_and_the_initial_adapter_affect_learning_if_adapters_are_trained(tmp_path: Path) -> None:
    def changed(before: LoraConfig | None, after: LoraConfig) -> list[str]:
        return list(changed_keys(_found(before).info["recipe"], asdict(_recipe(after))))

    other = replace(SAVED, alpha=8.0, init_from=str(tmp_path))
    assert changed(SAVED, other) == [f"{LORA}.alpha", f"{LORA}.init_from"]
    assert changed(SAVED, SAVED) == changed(replace(SAVED, enabled=False), LoraConfig()) == []
    assert changed(replace(SAVED, match_all_linear=False), SAVED) == [], "patterns take precedence"
    assert changed(None, LoraConfig()) == [] and changed(None, SAVED) == [f"{LORA}.enabled"]
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    assert changed(replace(SAVED, init_from=str(link)), replace(SAVED, init_from=str(tmp_path))) == []


@pytest.mark.parametrize(("mode", "is_refused"), [("self_frozen", False), ("frozen", True)])
def test_the_base_may_have_another_name(mode: str, is_refused: bool) -> None:
    """In mode frozen, the teacher is loaded from its own folder, so another name could be another teacher."""
    saved = _recipe(SAVED, mode)

    def renamed(section: Any, tokenizer: str) -> Any:
        return replace(section, model_name="new", tokenizer=replace(section.tokenizer, name=tokenizer))

    moved = replace(saved, policy=renamed(saved.policy, "new"), teacher=renamed(saved.teacher, "new"))
    found, clock = _found(SAVED, mode, base=ROUNDED, step=4), RunClock(current_time())
    for section in ("policy", "teacher"):  # a recipe without the name of a tokenizer has that of the model
        recipe = found.info["recipe"][section]
        recipe["tokenizer"]["name"] = recipe["model_name"]
    if not is_refused:
        history = compare_with_checkpoint(found, moved, None, clock, None)
        assert history.same_run and not history.training_changes
        other = replace(moved, policy=renamed(saved.policy, "another"))
        with pytest.raises(UserError, match=r"policy\.tokenizer\.name was"):
            compare_with_checkpoint(found, other, None, clock, None)
        found.info[BASE] = None  # all weights are trained: the checkpoint cannot show which model it was
    with pytest.raises(UserError, match=r"teacher\.model_name was") as refused:
        compare_with_checkpoint(found, moved, None, clock, None)
    assert ("policy.model_name was" in refused.value.problem) == (not is_refused)
    assert ("init_from" in refused.value.fix) == is_refused, "adapters are no complete model"


def _base(dtype: str, **checksum: str) -> dict[str, Any]:
    return {"model_name": f"a {dtype} model", "dtype": dtype, "checksum": checksum}


FULL, ROUNDED = _base("float32", float32="1", bfloat16="2"), _base("bfloat16", bfloat16="2")


@pytest.mark.parametrize("saved", [FULL, ROUNDED, None])
@pytest.mark.parametrize("current", [FULL, ROUNDED, None])
def test_the_same_base_in_another_precision_is_accepted(saved: Any, current: Any) -> None:
    raise_if_other_base(_found(SAVED, **{BASE: saved}), current, "a model")


@pytest.mark.parametrize(
    ("saved", "current"),
    [
        (FULL, _base("float32", float32="3", bfloat16="2")),  # a change that bfloat16 does not show
        (FULL, _base("bfloat16", bfloat16="3")),
        (ROUNDED, _base("float32", float32="1", bfloat16="3")),
        (ROUNDED, _base("bfloat16", bfloat16="3")),
    ],
)
def test_a_changed_base_is_refused(saved: Any, current: Any) -> None:
    with pytest.raises(UserError) as refused:
        raise_if_other_base(_found(SAVED, **{BASE: saved}), current, "a model")
    assert (refused.value.key, refused.value.value) == ("policy.model_name", "a model")
