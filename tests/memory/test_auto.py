"""Values of the recipe that the memory forecast chooses."""

from __future__ import annotations

import pytest

from distill.config import Config, load_config
from distill.errors import UserError
from distill.memory.auto import ENOUGH_TOKENS, MARGIN, resolve
from distill.memory.forecast import GIB, predict
from distill.memory.shapes import ModelShape, find_shape
from tests.harness import REPO

BASE = "distillation_math.yaml"
CPU = ("runtime.device=cpu",)


def recipe(*overrides: str) -> Config:
    return load_config(["--config", str(REPO / "recipes" / BASE), "teacher.model_name=Qwen/Qwen3-32B", *overrides])


def shapes(config: Config) -> tuple[ModelShape, ModelShape]:
    found = (find_shape(name, "x") for name in (config.policy.model_name, config.teacher.model_name))
    student, teacher = found
    assert student is not None and teacher is not None
    return student, teacher


def test_auto_recomputes_as_little_as_fits_the_gpu() -> None:
    config, seen, modes = recipe(), [], (False, "selective", True)
    models = shapes(config)
    fixed = {mode: recipe(f"policy.dtensor_cfg.activation_checkpointing={str(mode).lower()}") for mode in modes}
    for card in range(8 * GIB, 96 * GIB, 4 * GIB):
        needed = {mode: predict(fixed[mode], *models, card=card).total("training") for mode in modes}
        assert needed[True] <= needed["selective"] <= needed[False]
        expected = next((mode for mode, size in needed.items() if size <= (1 - MARGIN) * card), True)
        found = resolve(config, *models, card)
        assert found.config.policy.dtensor_cfg.activation_checkpointing == expected, found.decisions
        seen.append(expected)
    assert seen[0] is True and seen[-1] is False


@pytest.mark.parametrize(("card", "cuda"), [(None, True), (80 * GIB, False)])
def test_without_a_known_gpu_auto_needs_the_least_memory(card: int | None, cuda: bool) -> None:
    config = recipe()
    found = resolve(config, *shapes(config), card, cuda)
    assert found.config.policy.dtensor_cfg.activation_checkpointing is True
    assert found.config.teacher.pack_tokens == 8192
    assert len(found.decisions) == 2
    assert resolve(config, None, None, 80 * GIB).config == found.config


def test_auto_joins_as_many_micro_batches_for_the_teacher_as_fit_the_gpu() -> None:
    config = recipe()
    tokens = [resolve(config, *shapes(config), card * GIB).config.teacher.pack_tokens for card in (16, 22, 80)]
    assert tokens[0] == 8192 and tokens[2] == ENOUGH_TOKENS
    assert 8192 <= tokens[1] <= tokens[2] and tokens[1] % 8192 == 0  # type: ignore[operator]


def test_values_that_are_not_auto_stay() -> None:
    words = ("policy.dtensor_cfg.activation_checkpointing=selective", "teacher.dynamic_batching.logprob_mb_tokens=9000")
    config = recipe(*words)
    assert resolve(config, *shapes(config), 80 * GIB).config == config
    assert config.policy.dtensor_cfg.recomputation == "selective" and config.teacher.pack_tokens == 9000
    assert recipe("teacher.dynamic_batching.enabled=false").teacher.pack_tokens is None


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("policy.dtensor_cfg.activation_checkpointing=some", "policy.dtensor_cfg.activation_checkpointing"),
        ("teacher.dynamic_batching.logprob_mb_tokens=all", "teacher.dynamic_batching.logprob_mb_tokens"),
        ("teacher.dynamic_batching.logprob_mb_tokens=0", "teacher.dynamic_batching.logprob_mb_tokens"),
    ],
)
def test_wrong_values_of_keys_with_auto_are_refused(word: str, key: str) -> None:
    with pytest.raises(UserError) as refused:
        recipe(word)
    assert refused.value.key == key


def test_fused_and_foreach_together_are_refused() -> None:
    with pytest.raises(UserError) as refused:
        recipe("policy.optimizer.kwargs.fused=true", "policy.optimizer.kwargs.foreach=true")
    assert refused.value.key == "policy.optimizer.kwargs.fused"
