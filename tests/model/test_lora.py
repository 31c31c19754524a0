"""Low-rank adapters in one process: selection of layers, initial values, forward and gradients."""

from __future__ import annotations

import logging
import math
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.batching.plan import view_of
from distill.config import LoraConfig
from distill.errors import UserError
from distill.model.hf_files import ModelFiles, find_model
from distill.model.initial_adapter import _warn_if_other_base
from distill.model.lora import adapted_layers, check_adapters
from distill.model.peft_files import StoredAdapter
from distill.model.sharded import ShardedLM
from tests.harness import config_for, response_logits
from tests.helpers import save_tiny_model, tiny_config
from tests.lora_oracle import adapted_model, fill, peft_parameters, with_peft

SEQUENCES = [((5, 6, 7), tuple(range(8, 30))), ((11,), (13, 14, 15, 16))]
ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
_KEY = "policy.dtensor_cfg.lora_cfg"


def _lora(**changes: object) -> LoraConfig:
    return LoraConfig(enabled=True, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [[*ATTENTION, *MLP]] * 2),
        ({"target_modules": ("q_proj", "down_proj")}, [["self_attn.q_proj", "mlp.down_proj"]] * 2),
        ({"target_modules": ("*.self_attn.*",), "exclude_modules": ("o_proj",)}, [ATTENTION[:3]] * 2),
        ({"target_modules": ("model.layers.1.mlp.*",)}, [[], MLP]),
        ({"target_modules": ("gate*",), "match_all_linear": False}, [["mlp.gate_proj"]] * 2),
        ({"exclude_modules": ("*lm_head*", "embed_tokens", "*mlp*")}, [ATTENTION] * 2),
    ],
)
def test_patterns_select_linear_layers_of_the_decoder_layers(changes, expected) -> None:
    found = adapted_layers(_lora(**changes), tiny_config("llama", tied=False))
    names = [f"model.layers.{layer}.{name}" for layer, layer_names in enumerate(expected) for name in layer_names]
    assert list(found) == names


def test_the_size_of_an_adapted_layer_is_its_outputs_and_inputs() -> None:
    found = adapted_layers(_lora(), tiny_config("qwen3", tied=True))
    assert found["model.layers.1.self_attn.k_proj"] == (2 * 32, 64)
    assert found["model.layers.1.mlp.down_proj"] == (64, 128)


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"target_modules": ("q_proj", "lm_head")}, "target_modules", "lm_head"),
        ({"target_modules": ("embed_tokens",)}, "target_modules", "embed_tokens"),
        ({"target_modules": ("*norm",)}, "target_modules", "*norm"),
        ({"target_modules": ("qproj",)}, "target_modules", "qproj"),
        ({"target_modules": ("proj",)}, "target_modules", "proj"),
        ({"target_modules": ("q.proj",)}, "target_modules", "q.proj"),
        ({"exclude_modules": ("qproj",)}, "exclude_modules", "qproj"),
        ({"exclude_modules": ("q_pro",)}, "exclude_modules", "q_pro"),
        ({"exclude_modules": ("o_proj", "mlp")}, "exclude_modules", "mlp"),  # the name of no layer
        ({"exclude_modules": ("*.self_attn",)}, "exclude_modules", "*.self_attn"),
        ({"exclude_modules": ("model.layers.0",)}, "exclude_modules", "model.layers.0"),
        ({"exclude_modules": ("model",)}, "exclude_modules", "model"),
        ({"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)}, "exclude_modules", ["q_proj"]),
    ],
)
def test_a_pattern_without_a_linear_layer_is_refused(changes, key, value) -> None:
    with pytest.raises(UserError) as error:
        adapted_layers(_lora(**changes), tiny_config("llama", tied=False))
    assert (error.value.key, error.value.value) == (f"{_KEY}.{key}", value)
    assert ("exclude" in error.value.fix) == (key == "exclude_modules")


def test_patterns_are_checked_only_if_adapters_are_enabled() -> None:
    model = tiny_config("llama", tied=False)
    override = f"{_KEY}.target_modules=[qproj]"
    check_adapters(config_for(Path("student"), Path("teacher"), override), model)
    with pytest.raises(UserError):
        check_adapters(config_for(Path("student"), Path("teacher"), override, f"{_KEY}.enabled=true"), model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_logits_and_gradients_of_adapters_equal_peft(tmp_path: Path, family: str) -> None:
    folder = save_tiny_model(tmp_path, family, tied=family == "gemma3_text")
    _fill_biases(folder)
    lora = _lora(dim=3, alpha=5.0)
    plain = with_peft(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"), lora)
    expected = torch.cat([response_logits(plain, *sequence) for sequence in SEQUENCES])
    model = adapted_model(find_model(str(folder), "a model"), lora)
    fill(model.named_trained())
    found = _logits(model)
    assert torch.allclose(found, expected, atol=1e-4)
    for logits in (expected, found):
        logits.log_softmax(-1)[:, 7].sum().backward()
    references, named = peft_parameters(plain), dict(model.named_trained())
    assert references.keys() == named.keys()
    for name, reference in references.items():
        ours, theirs = named[name].grad, reference.grad
        assert ours is not None and theirs is not None
        assert (ours - theirs).norm() < 1e-5 * theirs.norm(), name
    assert all(parameter.grad is None for _, parameter in model.named_hf_parameters())


def _fill_biases(folder: Path) -> None:
    """Replace the biases of a saved model, which are 0, by random values."""
    weights = load_file(folder / "model.safetensors")
    biases = {name: torch.randn_like(tensor) for name, tensor in weights.items() if name.endswith(".bias")}
    save_file(weights | biases, folder / "model.safetensors", metadata={"format": "pt"})


def _logits(model: ShardedLM) -> Tensor:
    return model(view_of(SEQUENCES), lambda hidden, head: hidden @ head.t())


def test_a_model_without_adapters_and_one_with_initial_adapters_equal_the_base(tmp_path: Path) -> None:
    files = find_model(str(save_tiny_model(tmp_path, "qwen3", tied=False)), "a model")
    model = adapted_model(files, _lora())
    with model.without_adapters(), torch.no_grad():
        base = _logits(model)
    assert torch.equal(_logits(model), base), "B is 0"
    fill(model.named_trained())
    assert not torch.allclose(_logits(model), base, atol=1e-2)
    with suppress(ZeroDivisionError), model.without_adapters():
        with model.without_adapters(), torch.no_grad():
            pass
        assert torch.equal(_logits(model), base), "an inner block does not end the outer one"
        raise ZeroDivisionError
    assert not torch.allclose(_logits(model), base, atol=1e-2), "an exception ends the block"


@pytest.mark.parametrize("init", ["xavier", "kaiming"])
def test_initial_values_depend_on_seed_and_name_only(tmp_path: Path, init: str) -> None:
    files = find_model(str(save_tiny_model(tmp_path, "llama", hidden=256)), "a model")
    first, same, other = (
        dict(adapted_model(files, _lora(dim=64, lora_A_init=init), seed).named_trained()) for seed in (1, 1, 2)
    )
    q, k = (f"model.layers.0.self_attn.{name}_proj.lora_A" for name in "qk")
    assert torch.equal(first[q], same[q])
    assert not torch.equal(first[q], other[q]) and not torch.equal(first[q], first[k])
    assert all(not parameter.any() for name, parameter in first.items() if name.endswith("lora_B"))
    values = first[q].detach()
    if init == "kaiming":  # uniform between the bounds of nn.Linear's weights
        assert 0.99 / 16 < float(values.abs().max()) <= 1 / 16
        assert float(values.std()) == pytest.approx(1 / 16 / math.sqrt(3), rel=0.02)
    else:
        assert float(values.std()) == pytest.approx(math.sqrt(2 / (256 + 64)), rel=0.02)
        assert float(values.abs().max()) > 3 * float(values.std())


def test_a_checkpoint_tensor_keeps_its_name(tmp_path: Path) -> None:
    files = find_model(str(save_tiny_model(tmp_path, "llama", tied=True)), "a model")
    model = adapted_model(files, _lora(target_modules=("v_proj",)))
    assert {name for name, _ in model.named_hf_parameters()} == files.tensors.keys()
    assert [name for name, _ in model.adapters] == [f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2)]
    assert [name for name, _ in model.named_trained()] == [
        f"model.layers.{i}.self_attn.v_proj.lora_{matrix}" for i in range(2) for matrix in "AB"
    ]


@pytest.mark.parametrize(
    ("name", "checksum", "warns"),
    [
        ("models/a", {"bfloat16": "1"}, False),
        ("models/renamed", {"bfloat16": "1"}, False),
        ("models/a", {"bfloat16": "2"}, True),
        ("models/other", {}, True),  # an adapter of another program has no checksums
        ("models/a", {}, False),
        ("", {}, False),
    ],
)
def test_an_adapter_of_another_base_is_named_in_a_warning(
    name: str, checksum: dict[str, str], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = StoredAdapter(ModelFiles("an adapter", Path("an adapter"), {}), 8, 1.0, name, checksum)
    with caplog.at_level(logging.WARNING):
        _warn_if_other_base(adapter, {"model_name": "/elsewhere/a", "checksum": {"float32": "3", "bfloat16": "1"}})
    assert ("an adapter" in caplog.text) is warns
