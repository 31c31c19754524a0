"""Rules of partial rollouts: values, room in the engines, and warnings."""

from __future__ import annotations

import math

import pytest

from distill.checkpoint import changed_keys
from distill.config import DistillationConfig, PartialRolloutsConfig
from distill.config.loop_rules import warn_of_loop
from tests.config.test_config import load, refusal

KEY = "distillation.partial_rollouts"
ON = f"{KEY}.enabled=true"
STEP = ("distillation.num_prompts_per_step=8", "distillation.num_generations_per_prompt=1")
BATCH = "policy.train_global_batch_size=8"
TRANSFORMERS = "policy.generation.backend=transformers"


@pytest.mark.parametrize(
    ("name", "value"),
    [("finish_share", 0.49), ("finish_share", 1.01), ("finish_share", math.nan), ("max_age", 0)],
)
def test_a_value_out_of_range_is_refused_also_while_partial_rollouts_are_off(name: str, value: float) -> None:
    assert refusal(f"{KEY}.enabled=false", f"{KEY}.{name}={value}").key == f"{KEY}.{name}"


def test_partial_rollouts_without_own_responses_are_refused() -> None:
    error = refusal(ON, *STEP, BATCH, "distillation.off_policy.share=1")
    assert (error.key, error.value) == (f"{KEY}.enabled", True)


@pytest.mark.parametrize(
    ("ranks", "engine", "share", "needed"),
    [(1, 1, 0.5, 16), (2, 2, 0.9, 9), (4, 1, 0.7, 3)],
)
def test_an_engine_needs_room_for_all_its_responses_at_the_same_time(ranks, engine, share, needed) -> None:
    """8 responses per step: ceil(8 / share) in progress, on ranks / engine engines."""
    layout = (f"cluster.gpus_per_node={ranks}", "cluster.num_nodes=1", *STEP, BATCH, ON, f"{KEY}.finish_share={share}")
    backends = {
        "policy.generation.vllm_kwargs.max_num_seqs": f"policy.generation.vllm_cfg.tensor_parallel_size={engine}"
    }
    if engine == 1:
        backends["policy.generation_batch_size"] = TRANSFORMERS
    for key, given in backends.items():
        error = refusal(*layout, given, f"{key}={needed - 1}")
        assert (error.key, error.value) == (key, needed - 1)
        load(*layout, given, f"{key}={needed}")
    load(*layout[:-2], TRANSFORMERS, "policy.generation_batch_size=1")


def test_all_new_responses_to_a_prompt_have_room_on_one_engine() -> None:
    loop = DistillationConfig(num_prompts_per_step=5, num_generations_per_prompt=4)
    assert [loop.most_per_engine(engines) for engines in (1, 2, 5, 8)] == [20, 12, 4, 4]
    partial = DistillationConfig(
        num_prompts_per_step=5, num_generations_per_prompt=4, partial_rollouts=PartialRolloutsConfig(True, 0.5)
    )
    assert [partial.most_per_engine(engines) for engines in (1, 2, 5, 8)] == [40, 20, 8, 5]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([f"{KEY}.finish_share=0.8"], f"{KEY}.finish_share"),
        ([f"{KEY}.max_age=3"], f"{KEY}.max_age"),
        ([ON, f"{KEY}.finish_share=1"], "finish_share=1"),
        ([ON, "distillation.max_num_steps=3"], "max_num_steps=3"),
        ([ON, "data.validation=null", "distillation.val_period=0"], "val_period"),
        ([], None),
        ([ON], None),
        ([ON, f"{KEY}.max_age=1", "distillation.max_num_steps=3"], None),
    ],
)
def test_settings_with_a_surprising_effect_cause_a_warning(overrides, named, caplog) -> None:
    validated = ["data.validation={data_path: data/a.jsonl}", "distillation.val_period=2"]
    warn_of_loop(load(*STEP, BATCH, *validated, *overrides))
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (named is not None) and all(str(named) in text for text in warnings), warnings


def recipe(**partial: object) -> dict[str, object]:
    return {
        "distillation": {"seed": 1, "partial_rollouts": {"enabled": True, "finish_share": 0.9, "max_age": 2} | partial}
    }


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ({}, {}, ()),
        ({}, {"finish_share": 0.8}, ("finish_share",)),
        ({}, {"max_age": 3}, ("max_age",)),
        ({}, {"enabled": False}, ("enabled",)),
        ({"enabled": False}, {"enabled": False, "finish_share": 0.8, "max_age": 1}, ()),
    ],
)
def test_a_resume_compares_the_keys_if_one_of_the_recipes_enables_partial_rollouts(before, after, changed) -> None:
    found = changed_keys(recipe(**before), recipe(**after))
    assert set(found) == {f"{KEY}.{name}" for name in changed}


def test_a_recipe_before_partial_rollouts_counts_as_one_without() -> None:
    assert set(changed_keys({"distillation": {"seed": 1}}, recipe())) == {f"{KEY}.enabled"}
    assert not changed_keys({"distillation": {"seed": 1}}, recipe(enabled=False))
