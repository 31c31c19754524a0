"""Activation checkpointing: the same gradients in every mode, and what the backward computes again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from distill.batching.plan import view_of
from distill.config.models import LoraConfig, Recomputation
from distill.model.attention import PACKED
from distill.model.lora import AdapterSwitch, adapted_modules, add_adapters
from distill.model.recomputation import set_recomputation
from tests.helpers import tiny_config

SEQUENCES = [(tuple(range(1, 4)), tuple(range(5, 15))), (tuple(range(20, 24)), tuple(range(30, 37)))]
LAYERS = 2
FAMILIES = ["llama", "qwen2", "qwen3", "gemma3_text"]


class _Counter(TorchDispatchMode):
    """Counts matrix products and attention calls of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in ("mm", "addmm") or "attention" in name:
            self.found["product" if "mm" in name else "attention"] += 1
        return func(*args, **(kwargs or {}))


def _run(family: str, mode: Recomputation, lora: LoraConfig | None = None) -> tuple[list[Tensor], Counter[str]]:
    """Return the gradients of all trained parameters, and the products and attention calls of the backward."""
    torch.manual_seed(0)
    config = tiny_config(family, tied=True, layers=LAYERS)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED, dtype=torch.float32).train()
    if lora is not None:
        _add_adapters(model, lora)
    set_recomputation(model, mode)
    view = view_of(SEQUENCES)
    hidden = model.model(
        input_ids=view.tokens_T[None], position_ids=view.positions_T[None], packed_bounds=view.bounds, use_cache=False
    ).last_hidden_state
    with _Counter() as counter:
        hidden.square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None], counter.found


def _add_adapters(model: Any, lora: LoraConfig) -> None:
    add_adapters(model, lora, AdapterSwitch())
    for _, module in adapted_modules(model):
        module.lora_A, module.lora_B = (
            nn.Parameter(torch.randn(matrix.shape) / 8) for matrix in (module.lora_A, module.lora_B)
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_bit_for_bit_in_every_mode(family: str) -> None:
    (plain, counted), *others = [_run(family, mode) for mode in ("none", "selective", "full")]
    products = 7 * LAYERS  # q, k, v, o, gate, up, down: two each in a backward
    assert counted == {"product": 2 * products, "attention": LAYERS * len(SEQUENCES)}
    for gradients, _ in others:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain, gradients, strict=True))
    (_, selective), (_, full) = others
    assert selective == counted, "selective checkpointing computes only elementwise results again"
    # No gradient needs the result of the MLP's last product, unless a norm follows it.
    again = products if family == "gemma3_text" else products - LAYERS
    assert full == {"product": 2 * products + again, "attention": 2 * LAYERS * len(SEQUENCES)}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_adapters_are_the_same_bit_for_bit_in_every_mode(family: str) -> None:
    lora = LoraConfig(enabled=True, dim=8)
    (plain, counted), *others = [_run(family, mode, lora) for mode in ("none", "selective", "full")]
    assert len(plain) == 2 * 7 * LAYERS
    for gradients, _ in others:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain, gradients, strict=True))
    (_, selective), (_, full) = others
    layers = 7 * LAYERS
    assert selective == counted + Counter(product=layers), "selective computes only B (A x) and elementwise again"
    again = 3 * layers if family == "gemma3_text" else 3 * layers - LAYERS
    assert full == counted + Counter(product=again, attention=LAYERS * len(SEQUENCES))


def test_selective_recomputation_supports_layers_with_different_adapters() -> None:
    lora = LoraConfig(enabled=True, dim=8, target_modules=("model.layers.0.self_attn.o_proj", "*.layers.1.mlp.*"))
    (plain, counted), (gradients, selective) = [_run("llama", mode, lora) for mode in ("none", "selective")]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain, gradients, strict=True))
    assert selective == counted + Counter(product=4)


def _saved_results(family: str, lora: LoraConfig | None = None) -> int:
    """Return the number of elements that selective checkpointing keeps per position and layer."""
    kept: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        wrapper = checkpoint._VersionWrapper

        def counted(value: Any) -> Any:
            kept.extend([value] if isinstance(value, Tensor) else [])
            return wrapper(value)

        patch.setattr(checkpoint, "_VersionWrapper", counted)
        _run(family, "selective", lora)
    return sum(tensor.numel() for tensor in kept) // (len(view_of(SEQUENCES).tokens_T) * LAYERS)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_last_product_of_a_layer_is_kept_only_if_a_norm_reads_it(family: str) -> None:
    hidden, heads, kv_heads, channels = 64, 4, 2, 32
    attention = heads * channels + heads  # output and log-sum-exp
    products = (heads + 2 * kv_heads) * channels + hidden + 2 * 2 * hidden
    last = hidden if family == "gemma3_text" else 0
    assert _saved_results(family) == attention + products + last


def test_an_adapter_adds_only_its_rank_to_the_kept_results() -> None:
    lora = LoraConfig(enabled=True, dim=8)
    assert _saved_results("llama", lora) == _saved_results("llama") + 7 * lora.dim
