"""Every tensor of a checkpoint is loaded, dropped as transformers drops it, named in a warning, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from distill.errors import UserError
from distill.model.hf_config import model_config
from distill.model.hf_files import ModelFiles, find_model
from distill.model.hf_load import load_weights, materialize, meta_model
from distill.model.teacher_check import plain_logits
from distill.model.tensor_accounting import check_tensors
from tests.fp8_checkpoints import change_config, change_weights
from tests.helpers import save_tiny_model

KEY = "policy.model_name"
UP = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, Tensor]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("accounting") / "original", tied=False)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def _accounted(folder: Path) -> ModelFiles:
    files = find_model(str(folder), KEY)
    check_tensors(files, model_config(files, KEY), KEY)
    return files


def _refusal(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        _accounted(folder)
    assert str(refused.value).startswith(f"{KEY}={folder} ")
    return str(refused.value)


def _logits(folder: Path) -> Tensor:
    files = _accounted(folder)
    return plain_logits(files, model_config(files, KEY), [list(range(20))], torch.float32, torch.device("cpu"))


def _logits_of_transformers(folder: Path) -> Tensor:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model(torch.arange(20)[None]).logits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_plain_floats_of_any_width_are_read_as_transformers_reads_them(folder: Path, dtype: torch.dtype) -> None:
    change_weights(folder, lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    assert (_logits(folder) - _logits_of_transformers(folder)).abs().max() < 1e-4


def test_names_without_the_prefix_of_the_causal_model_are_loaded_as_transformers_loads_them(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "tied", tied=True)
    expected = _logits(folder)
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    change_config(folder, architectures=["LlamaForCausalLM"])
    assert "layers.0.mlp.up_proj.weight" in load_file(folder / "model.safetensors")
    assert torch.equal(_logits(folder), expected)
    assert (_logits_of_transformers(folder) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(UP), f"lacks 1 tensor ({UP})"),
        (lambda t: t.pop("lm_head.weight"), "no lm_head.weight in its files"),
        (lambda t: [t.pop(n) for n in list(t) if "layers.1" in n], "lacks 9 tensors (model.layers.1.input_layernorm"),
        (lambda t: [t.update({f"module.{n}": t.pop(n)}) for n in list(t)], "and holds 21 tensors (module.lm_head"),
        (lambda t: t.update({UP: t[UP][:5]}), f"{UP} of another shape than its config.json describes ((5, 64) and"),
        (lambda t: t.update({UP: t[UP][:0]}), f"{UP} of another shape than its config.json describes ((0, 64) and"),
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), f"{UP} in the element type I8"),
        (lambda t: t.update({UP: t[UP].to(torch.uint8)}), f"{UP} in the element type U8"),
        (lambda t: t.update({UP: t[UP] > 0}), f"{UP} in the element type BOOL"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), f"{UP} in FP8 (F8_E4M3)"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e5m2)}), f"{UP} in FP8 (F8_E5M2)"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e8m0fnu)}), f"{UP} in the element type F8_E8M0"),
        (lambda t: t.update({f"{UP}_scale": torch.tensor(2.0)}), f"holds 1 tensor ({UP}_scale)"),
        (lambda t: t.update({f"{UP}_scale_inv": torch.ones(1, 1)}), f"{UP}_scale_inv"),
        (lambda t: t.update({f"{UP}_zero_point": torch.zeros(1)}), f"{UP}_zero_point"),
        (lambda t: t.update({f"{UP}.absmax": torch.zeros(4)}), f"{UP}.absmax"),
        (lambda t: t.update({f"{UP}.quant_state.bitsandbytes__nf4": torch.zeros(4)}), "quant_state"),
        (lambda t: t.update({UP.replace("weight", "g_idx"): torch.zeros(64, dtype=torch.int32)}), "g_idx"),
        (lambda t: t.update({UP.replace("weight", "qweight"): torch.zeros(8, dtype=torch.int32)}), "qweight"),
        (lambda t: t.update({UP.replace("weight", "pre_quant_scale"): torch.ones(64)}), "pre_quant_scale"),
        (lambda t: t.update({UP.replace("weight", "weight_packed"): torch.ones(64)}), "weight_packed"),
        (lambda t: t.update({UP.replace("weight", "lora_A.weight"): torch.ones(4, 64)}), "lora_A.weight"),
    ],
)
def test_a_tensor_that_does_not_give_the_models_weight_is_refused_by_name(
    folder: Path, change: Callable[[Tensors], Any], named: str
) -> None:
    change_weights(folder, change)
    assert named in _refusal(folder)


def _add_unused(tensors: Tensors) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(2, 2)  # a layer more than config.json describes
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(128)
    tensors["v_head.summary.weight"] = torch.ones(1, 64)
    tensors["mtp.scale"] = torch.ones(1)


def test_tensors_that_no_parameter_takes_are_named_in_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = _logits(folder)
    change_weights(folder, _add_unused)
    caplog.clear()
    assert torch.equal(_logits(folder), expected)
    (record,) = caplog.records
    assert "holds 4 tensors (model.layers.0.self_attn.q_proj.bias, model.layers.2.mlp" in record.getMessage()
    assert (_logits_of_transformers(folder) - expected).abs().max() < 1e-4  # it drops them too


def test_what_transformers_drops_without_a_message_is_dropped_without_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_tiny_model(tmp_path / "tied", tied=True)

    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        for name in ("k_scale", "v_scale", "k_proj.output_scale", "q_proj.input_scale", "attn.kv_scale"):
            tensors[f"model.layers.0.self_attn.{name}"] = torch.tensor(3.0)

    expected = _logits(folder)
    change_weights(folder, change)
    assert torch.equal(_logits(folder), expected)
    assert caplog.records == []


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_the_name_of_their_tensor(folder: Path, number: float) -> None:
    change_weights(folder, lambda t: t[UP][3:4, 5].fill_(number))
    files = _accounted(folder)
    model = meta_model(model_config(files, KEY), "eager", torch.float32)
    materialize(model, torch.device("cpu"))
    with pytest.raises(UserError, match=f"nan or infinite numbers in {UP}"):
        load_weights(model.named_parameters(), files)


def test_a_number_beyond_the_range_of_the_parameters_type_is_refused(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({UP: t[UP].double().fill_(1e300)}))
    files = _accounted(folder)
    model = meta_model(model_config(files, KEY), "eager", torch.bfloat16)
    materialize(model, torch.device("cpu"))
    with pytest.raises(UserError, match=f"nan or infinite numbers in {UP}"):
        load_weights(model.named_parameters(), files)


# ---- files -----------------------------------------------------------------------------------------------------------


def _in_two_files(folder: Path, **index: str) -> Tensors:
    """Two shards of different types, their index, and no single file; ``index`` adds entries to it."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    first = {name: tensors[name].half() for name in names[:9]}
    save_file(first, folder / FIRST)
    save_file({name: tensors[name] for name in names[9:]}, folder / SECOND)
    placed = {name: FIRST if name in first else SECOND for name in names} | index
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "model.safetensors").unlink()
    return tensors


def test_shards_of_different_types_are_each_read_in_their_own(folder: Path) -> None:
    _in_two_files(folder)
    assert (_logits(folder) - _logits_of_transformers(folder)).abs().max() < 1e-4


def test_a_tensor_that_the_index_leaves_out_is_read_from_its_file_as_transformers_reads_it(folder: Path) -> None:
    _in_two_files(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][UP]
    path.write_text(json.dumps(index))
    assert (_logits(folder) - _logits_of_transformers(folder)).abs().max() < 1e-4


def test_a_tensor_that_only_the_index_names_is_warned_of_unless_the_model_needs_it(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _in_two_files(folder, **{"mtp.weight": FIRST})
    assert (_logits(folder) - _logits_of_transformers(folder)).abs().max() < 1e-4
    assert "names tensors that its files don't hold: 1, such as mtp.weight" in caplog.text
    kept = {name: tensor for name, tensor in load_file(folder / FIRST).items() if name != UP}
    save_file(kept, folder / FIRST)
    if UP in load_file(folder / SECOND):
        save_file({n: t for n, t in load_file(folder / SECOND).items() if n != UP}, folder / SECOND)
    assert f"lacks 1 tensor ({UP})" in _refusal(folder)


def test_a_stale_index_beside_a_complete_single_file_is_passed_over(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = {"metadata": {}, "weight_map": {UP: FIRST}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert (_logits(folder) - _logits_of_transformers(folder)).abs().max() < 1e-4
    assert "stale model.safetensors.index.json" in caplog.text


@pytest.mark.parametrize("shape", [(384,), (), (384, 64, 1), (384, 0)])
def test_head_and_embedding_of_a_shape_that_no_model_has_are_refused(folder: Path, shape: tuple[int, ...]) -> None:
    change_config(folder, tie_word_embeddings=True)
    names = ("lm_head.weight", "model.embed_tokens.weight")
    change_weights(folder, lambda t: t.update({name: torch.zeros(shape) for name in names}))
    assert "model.embed_tokens.weight of another shape" in _refusal(folder)


@pytest.mark.parametrize("value", [{"hidden_size": 64}, 3, "text"])
def test_a_model_inside_the_model_is_refused(folder: Path, value: object) -> None:
    change_config(folder, text_config=value)
    assert "has text_config in its config.json" in _refusal(folder)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    tensors = _in_two_files(folder)
    save_file({**load_file(folder / FIRST), UP: tensors[UP] * 2}, folder / FIRST)
    sentence = _refusal(folder)
    assert f"holds {UP} twice ({UP} in {FIRST} and {UP} in {SECOND})" in sentence


def test_a_tensor_with_and_without_the_prefix_is_refused(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({UP.removeprefix("model."): t[UP] * 2}))
    assert f"holds {UP} twice" in _refusal(folder)


def test_an_index_that_names_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    _in_two_files(folder)
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"weight_map": {', f'"weight_map": {{"{UP}": "{FIRST}", '))
    assert f"names {UP} twice, in {FIRST} and {SECOND}" in _refusal(folder)


def test_a_single_file_beside_an_index_of_others_is_refused(folder: Path) -> None:
    single = (folder / "model.safetensors").read_bytes()
    _in_two_files(folder)
    (folder / "model.safetensors").write_bytes(single)
    assert "holds both a model.safetensors and a model.safetensors.index.json" in _refusal(folder)


def test_makers_own_files_beside_the_checkpoint_are_left_alone(folder: Path) -> None:
    expected = _logits(folder)
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, folder / "consolidated.safetensors")
    (folder / "params.json").write_text('{"dim": 3}')
    assert torch.equal(_logits(folder), expected)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "holds an adapter"),
        ({"model.Q4_K_M.gguf": b"GGUF"}, "holds GGUF files"),
        ({"consolidated.safetensors": b""}, "holds consolidated.safetensors but neither"),
        ({FIRST: b""}, f"holds {FIRST} but neither model.safetensors nor model.safetensors.index.json"),
        ({"pytorch_model.bin": b""}, "holds no safetensors, and pickled weights are never read"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False], ids=["with config.json", "without"])
def test_a_folder_of_another_format_is_refused_by_its_name(
    folder: Path, files: dict[str, bytes], named: str, with_config: bool
) -> None:
    (folder / "model.safetensors").unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if not with_config:
        (folder / "config.json").unlink()
        named = named if "adapter" in named or "GGUF" in named else "holds no config.json"
    assert named in _refusal(folder)


def test_an_adapter_beside_a_model_is_refused(folder: Path) -> None:
    """transformers loads the adapter's base model instead of the folder's weights where PEFT is installed."""
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in _refusal(folder)
