"""Tests of the pruned student model and its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from scripts.prepare_models import prune_layers, save_folder
from tests.helpers import save_tiny_model


@pytest.fixture
def complete(tmp_path: Path) -> Any:
    folder = save_tiny_model(tmp_path / "complete", "qwen3", layers=4)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_a_pruned_model_equals_the_complete_model_with_skipped_layers(complete: Any, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 7, 11, 13, 17]])
    pruned = prune_layers(complete, (1, 2))
    pruned.save_pretrained(tmp_path / "pruned")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    for skipped in (1, 2):  # expected: the hidden states pass the layer unchanged
        complete.model.layers[skipped].forward = lambda hidden, *args, **kwargs: hidden
    with torch.inference_mode():
        expected = complete(ids, use_cache=False).logits
        assert torch.equal(reloaded(ids, use_cache=False).logits, expected)
        assert torch.equal(pruned(ids, use_cache=True).logits, expected)  # the cache counts layers by their index
    assert reloaded.config.num_hidden_layers == len(reloaded.config.layer_types) == 2
    assert [layer.self_attn.layer_idx for layer in pruned.model.layers] == [0, 1]
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight


def test_pruning_does_not_change_the_complete_model(complete: Any) -> None:
    prune_layers(complete, (0, 3))
    assert complete.config.num_hidden_layers == len(complete.model.layers) == len(complete.config.layer_types) == 4
    assert [layer.self_attn.layer_idx for layer in complete.model.layers] == [0, 1, 2, 3]


def test_a_failed_conversion_leaves_no_files(complete: Any, tmp_path: Path) -> None:
    class NoTokenizer:
        bos_token_id = eos_token_id = pad_token_id = 0

        def __init__(self) -> None:
            self.init_kwargs: dict[str, str] = {}

        def save_pretrained(self, folder: Path) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_folder(tmp_path / "models" / "tiny", complete, NoTokenizer())
    assert list((tmp_path / "models").iterdir()) == []
