"""Model cards of exports keep the card of the source and describe the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.model.model_card import _TITLE, model_card, public_name

RECIPE: dict[str, Any] = {
    "distillation": {
        "num_prompts_per_step": 8,
        "num_generations_per_prompt": 2,
        "topk_logits_k": 64,
        "context_distillation": {"enabled": False, "mode": "self_frozen"},
    },
    "loss_fn": {"kl_type": "mixed"},
    "policy": {
        "model_name": "./models/Base-1B/",
        "precision": "bfloat16",
        "generation": {"temperature": 0.7, "top_p": 1.0, "top_k": None, "max_new_tokens": 64},
        "optimizer": {"kwargs": {"lr": 2e-5, "weight_decay": 0.01}},
    },
    "teacher": {"model_name": "org/Teacher-4B"},
}


def test_the_model_card_keeps_the_source_card_and_adds_the_training() -> None:
    source = "---\nlicense: apache-2.0\nbase_model: org/Origin\n---\n\n# Base\n\nText.\n"
    card = model_card(source, RECIPE, 40, {258: "<|im_end|>"})
    assert card.startswith(source)
    for part in ("| teacher | org/Teacher-4B |", "| steps | 40 |", "| sampling temperature | 0.7 |", "(258)"):
        assert part in card
    assert "./models" not in card and "| student | Base-1B |" in card


def test_the_model_card_describes_a_periodic_teacher_and_a_schedule_of_response_limits() -> None:
    context = {"enabled": True, "mode": "self_periodic", "refresh_period": 50}
    loop = RECIPE["distillation"] | {"context_distillation": context, "max_new_tokens_schedule": [[1, 16], [30, 48]]}
    card = model_card("", RECIPE | {"distillation": loop}, 40, {})
    assert "every 50 steps" in card and "64 tokens, 16 from step 1, 48 from step 30" in card


def test_a_model_card_is_created_if_the_source_has_none() -> None:
    card = model_card("", RECIPE, 40, {})
    head = card.split("---")[1].strip().splitlines()
    assert head[:2] == ['base_model: "Base-1B"', "library_name: transformers"] and "- on-policy-distillation" in head


@pytest.mark.parametrize(
    ("name", "shown"),
    [("org/model", "org/model"), ("./model", "model"), ("~/a/model/", "model"), ("runs/x/step_4/hf", "hf")],
)
def test_a_model_card_contains_no_local_path(name: str, shown: str) -> None:
    assert public_name(name) == shown


@pytest.mark.parametrize("name", ["Qwen3: v2 #1", "*star", "@org", "2024-06-01", "123", "yes", "[a]", 'a"b', "ü|x"])
def test_the_front_matter_of_a_new_card_supports_any_folder_name(name: str) -> None:
    recipe = {**RECIPE, "policy": {**RECIPE["policy"], "model_name": f"/models/{name}"}}
    front = yaml.safe_load(model_card("", recipe, 40, {}).split("---\n")[1])
    assert front["base_model"] == name and front["library_name"] == "transformers"


def test_a_folder_of_the_hubs_cache_appears_as_its_hub_name(tmp_path: Path) -> None:
    for stored, shown in (("models--org--Base-1B", "org/Base-1B"), ("models--gpt2", "gpt2")):
        folder = tmp_path / stored / "snapshots/c1899de289a04d12100db370d81485cdf75e47ca"
        folder.mkdir(parents=True)
        (tmp_path / f"link-{shown[-4:]}").symlink_to(folder)
        assert public_name(str(folder)) == public_name(f"{folder}/") == shown
        assert public_name(str(tmp_path / f"link-{shown[-4:]}")) == shown


def test_the_source_card_keeps_its_line_ends_and_code_blocks_are_closed() -> None:
    section = f"\n\n{_TITLE}\n"
    blocks = (("# T\n```py\nx", "\n```"), ("~~~~\n```\n~~~", "\n~~~~"), ("```\nx\n```", ""), ("```a``` b\nc", ""))
    for text, closed in blocks:
        expected = text + closed + section
        assert model_card(text, RECIPE, 40, {}).startswith(expected)
        card = model_card(text.replace("\n", "\r\n"), RECIPE, 40, {})
        assert card.startswith(expected.replace("\n", "\r\n")) and card.count("\n") == card.count("\r\n")


def test_the_table_of_the_card_supports_any_token() -> None:
    assert "| mixed KL over the teacher's top 64 tokens |" in model_card("", RECIPE, 40, {})
    recipe = {**RECIPE, "distillation": {**RECIPE["distillation"], "topk_logits_k": None}}
    card = model_card("", recipe, 40, {5: "a`b", 6: "\r\n|"})
    assert "| mixed KL over all tokens |" in card and "| sampling top_p, top_k | 1, off |" in card
    assert "| stop tokens | `` a`b `` (5), `\\r\\n\\|` (6) |\n" in card
