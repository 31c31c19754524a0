"""Recipes from papers: their settings, and the lists of departures in their comments."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from distill.config import Config
from distill.config.loss import PositionSigmoidConfig, SelectConfig, TokenWeightsConfig
from tests.config.test_recipes import FOLDER, PAPERS, load
from tests.harness import forecast_text

# Keys of each recipe of a paper that the paper sets: divergence, K, learning rate, new tokens, token weights.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "papers/gkd-mix.yaml": ("jsd", 64, 2e-5, 8192, {}),
    "papers/iw-opd.yaml": ("sampled", 64, 2e-5, 8192, {"prefix_importance": 0.5}),
    "papers/opcd.yaml": ("reverse", 256, 5e-6, 512, {}),
    "papers/opsd.yaml": (
        *("forward", 0, 5e-6, 1024),
        {"position_sigmoid": PositionSigmoidConfig(0.25, 0.3, 0.1), "normalize": "sequences"},
    ),
    "papers/opsdc.yaml": ("reverse", 0, 1e-6, 8192, {}),
    "papers/short-rollouts.yaml": ("reverse", 64, 2e-5, 819, {}),
    "papers/strong-to-weak.yaml": ("reverse", 64, 2e-5, 8192, {}),
    "papers/tip-entropy.yaml": ("reverse", 0, 1e-6, 8192, {"select": SelectConfig("student_entropy", 0.5)}),
    "papers/tip-soft-or.yaml": ("reverse", 0, 1e-6, 8192, {"select": SelectConfig("soft_or", 0.5)}),
}


def test_every_recipe_of_a_paper_is_checked() -> None:
    assert set(SETTINGS) == set(PAPERS)


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_of_a_paper_has_its_setting(name: str) -> None:
    config = load(name)
    loss, loop = config.loss_fn, config.distillation
    kl_type, k, lr, tokens, weights = SETTINGS[name]
    assert (loss.kl_type, loop.topk_logits_k, config.policy.optimizer.kwargs.lr) == (kl_type, k, lr)
    assert config.policy.generation.max_new_tokens == tokens
    assert loss.token_weights == TokenWeightsConfig(**weights)
    assert loss.outside == "bucket"
    assert loop.val_at_start and loop.val_period and loop.val_at_end and loop.default_alarms
    assert config.checkpointing.metric_name == "val:accuracy"


def test_the_contexts_of_papers_are_those_of_their_teachers() -> None:
    periodic = load("papers/opsdc.yaml").distillation.context_distillation
    assert (periodic.enabled, periodic.mode, periodic.refresh_period) == (True, "self_periodic", 50)
    system = load("papers/opcd.yaml").distillation
    assert system.context_distillation.teacher_system_prompt_file == "prompts/system.txt"
    assert (system.max_num_steps, system.context_distillation.mode) == (50, "self_frozen")
    solution = load("papers/opsd.yaml")
    assert solution.loss_fn.entry_clip == 0.05
    assert solution.distillation.context_distillation.trace_column == "solution"
    lora = solution.policy.dtensor_cfg.lora_cfg
    assert (lora.enabled, lora.dim, lora.alpha) == (True, 64, 128)
    mixed = load("papers/gkd-mix.yaml").distillation.off_policy
    assert (mixed.share, mixed.column) == (0.5, "answer")


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_of_a_paper_names_the_paper_and_its_departures(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert re.search(r"arXiv \d{4}\.\d{5}", text)
    table = (FOLDER / "papers/README.md").read_text()
    assert f"`{Path(name).stem}`" in table


HYPERPARAMETERS = {
    "model_name",
    "dataset_name",
    "outside_topk",
    "betas",
    "max_grad_norm",
    "scheduler",
}
VALUES: dict[str, Callable[[Config], object]] = {
    "kl_type": lambda config: config.loss_fn.kl_type,
    "topk_logits_k": lambda config: config.distillation.topk_logits_k,
    "lr": lambda config: config.policy.optimizer.kwargs.lr,
    "weight_decay": lambda config: config.policy.optimizer.kwargs.weight_decay,
    "num_prompts_per_step": lambda config: config.distillation.num_prompts_per_step,
    "train_global_batch_size": lambda config: config.policy.train_global_batch_size,
    "max_num_steps": lambda config: config.distillation.max_num_steps,
    "max_new_tokens": lambda config: config.policy.generation.max_new_tokens,
    "temperature": lambda config: config.policy.generation.temperature,
    "max_grad_norm": lambda config: config.policy.max_grad_norm,
}


def lists_of(name: str) -> str:
    """Return the lists Paper, Ours and Unknown in the comment of a recipe, in one line."""
    comment = (FOLDER / name).read_text().partition("\ndefaults:")[0]
    found = re.search(r"^# Paper: .*^# Ours: .*^# Unknown: .*", comment, re.MULTILINE | re.DOTALL)
    assert found is not None, name
    return re.sub(r"\s*\n#\s*", " ", found[0])


def overridden(value: Any, path: tuple[str, ...] = ()) -> set[str]:
    """Return the keys below ``value``; in place of a key that many sections have, the key of its section."""
    if isinstance(value, list):
        return {key for each in value if isinstance(each, dict) for key in overridden(each, path)} or overridden(
            0, path
        )
    if isinstance(value, dict):
        return {key for part, each in value.items() for key in overridden(each, (*path, part))}
    return {path[-2] if path[-1] in ("name", "enabled", "type", "train_mb_tokens") else path[-1]}


@pytest.mark.parametrize("name", PAPERS)
def test_the_comment_of_a_recipe_of_a_paper_lists_each_overridden_key_and_each_hyperparameter(name: str) -> None:
    recipe = OmegaConf.to_container(OmegaConf.load(FOLDER / name), resolve=False)
    assert isinstance(recipe, dict)
    parent, own = str(recipe.pop("defaults")), lists_of(name)
    keys, text = overridden(recipe), own
    if f"papers/{parent}" in PAPERS:
        text += lists_of(f"papers/{parent}")
    assert sorted(key for key in keys if not re.search(rf"\b{key}\b", own)) == []
    assert sorted(key for key in HYPERPARAMETERS if not re.search(rf"\b{key}\b", text)) == []
    config = load(name)
    for key, value_of in VALUES.items():
        found, value = re.findall(rf"\b{key} ([\w.-]*\w)", text), value_of(config)
        assert found and (found[0] == value or float(found[0]) == value), (key, found, value)


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_of_a_paper_fits_gpus_of_80_gb(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a folder without model files
    text = forecast_text(load(name, "cluster.gpu_memory_gb=80"))  # raises if it does not fit
    assert ("Qwen2.5" in text) == ("8 ranks" not in text)  # the built-in table has only shapes of Qwen3
