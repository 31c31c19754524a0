"""The help lists the most used keys, searches all keys, and prints the reference."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from distill.config import Config, DatasetConfig, parse_args
from distill.config.command_line import OPTIONS
from distill.config.help import COMMON_KEYS, field_texts
from distill.config.parse import key_paths
from distill.data import grading
from distill.data.sources import KNOWN_DATASETS
from distill.errors import UserError

SMALL = str(Path(__file__).resolve().parents[2] / "recipes" / "my-distillation-1n4g.yaml")


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs a command line with a help option, and returns the printed text."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as error:
            parse_args(words)
        assert error.value.code == 0
        return capsys.readouterr().out

    return run


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def keys_in(text: str) -> list[str]:
    """Return the keys that the help lists, in this order."""
    return [
        line.partition("=")[0].strip() for line in text.splitlines() if "=" in line and " " not in line.lstrip()[:15]
    ]


def test_help_fits_on_one_screen_and_shows_the_recipes_values(shown: Any) -> None:
    lines = shown("--config", SMALL, "--help", "distillation.num_prompts_per_step=16").splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 120
    assert keys_in("\n".join(lines)) == list(COMMON_KEYS)
    assert len(COMMON_KEYS) == 21 and set(COMMON_KEYS) <= set(key_paths())
    text = "\n".join(lines)
    assert all(option in text for option in OPTIONS)
    assert "distillation.num_prompts_per_step=16 " in text
    assert "policy.model_name=Qwen/Qwen3-0.6B " in text
    assert "logger.wandb_enabled=false " in text


def test_help_all_lists_every_key_that_has_an_effect(shown: Any) -> None:
    text = shown("--config", SMALL, "--help-all", "distillation.seed=1234567")
    keys = set(leaves(dataclasses.asdict(Config())))
    keys |= {key for key in key_paths() if key.startswith("data.train.")}
    without_effect = {
        "policy.logprob_batch_size",
        "policy.dynamic_batching.logprob_mb_tokens",
        "policy.sequence_packing.logprob_mb_tokens",
        "teacher.logprob_batch_size",
    }
    missing = {key for key in keys if f"\n{key}=" not in text and f"\n{key}:" not in text}
    assert missing == without_effect
    assert "No effect:" not in text
    assert "\ndistillation.seed=1234567  (" in text
    assert "\nlogger.wandb_enabled=false  (true or false)" in text
    assert "\npolicy.optimizer.kwargs.betas=[0.9, 0.999]  (" in text
    assert max(map(len, text.splitlines())) <= 120
    words = " ".join(text.split())
    assert "forward: KL(teacher || student)" in words and "reverse: KL(student || teacher)" in words


def test_a_docstring_is_one_paragraph(shown: Any) -> None:
    lines = shown("--help-all").partition("\ndistillation:")[2].splitlines()
    ends = [line for line, after in pairwise(lines) if line[:4] == "    " and after[:4] != "    "]
    assert [line for line in ends if not line.endswith(".")] == []


def test_help_with_a_word_lists_the_keys_that_contain_it(shown: Any) -> None:
    assert keys_in(shown("--help", "resume"))[0] == "checkpointing.resume_from"
    assert keys_in(shown("--help", "Learning", "rate"))[0] == "policy.optimizer.kwargs.lr"
    assert keys_in(shown("--config", SMALL, "-h", "data_path"))[:2] == [
        "data.default.data_path",
        "data.train.data_path",
    ]


def test_help_with_a_section_or_a_key_lists_only_this(shown: Any) -> None:
    section = keys_in(shown("--help", "policy.generation"))
    assert "policy.generation.vllm_cfg.enforce_eager" in section
    assert all(key.startswith("policy.generation.") for key in section)
    text = shown("--help", "data.validation.data_path")
    assert keys_in(text) == ["data.validation.data_path"]
    assert field_texts(DatasetConfig)["data_path"] in " ".join(text.split())


def test_help_with_a_word_that_no_key_contains_is_refused() -> None:
    with pytest.raises(UserError) as error:
        parse_args(["--help", "qqq"])
    assert error.value.value == "qqq"


def test_help_is_printed_for_a_recipe_that_is_refused(shown: Any) -> None:
    assert "distillation.topk_logits_k=64" in shown(
        "--config", SMALL, "distillation.topk_logits_k=-1", "--help", "topk_logits_k"
    )


def test_help_names_all_datasets_and_graders() -> None:
    texts = field_texts(DatasetConfig)
    assert [name for name in KNOWN_DATASETS if name not in texts["dataset_name"]] == []
    names = [name for name in ("math", "exact", "regex", "choice") if f'"{name}"' in inspect.getsource(grading)]
    assert len(names) == 4 and all(f"{name}: " in texts["env_name"] for name in names)
