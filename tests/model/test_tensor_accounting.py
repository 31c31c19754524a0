"""Every tensor of a checkpoint is loaded, ignored as in transformers, named in a warning, or refused."""

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
    """Return a copy that the test changes."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def _accounted(folder: Path) -> ModelFiles:
    files = find_model(str(folder), KEY)
    check_tensors(files, model_config(files, KEY), KEY)
    return files


def _refusal(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        _accounted(folder)
    assert (refused.value.key, refused.value.value) == (KEY, str(folder))
    return refused.value.problem


def _logits(folder: Path) -> Tensor:
    files = _accounted(folder)
    return plain_logits(files, model_config(files, KEY), [list(range(20))], torch.float32, torch.device("cpu"))


def _logits_of_transformers(folder: Path) -> Tensor:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model(torch.arange(20)[None]).logits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_dtype_are_read_as_in_transformers(folder: Path, dtype: torch.dtype) -> None:
    change_weights(folder, lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    assert (_logits(folder) - _logits_of_transformers(folder)).abs().max() < 1e-4


def test_a_checkpoint_of_the_base_model_is_loaded_as_in_transformers(tmp_path: Path) -> None:
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
        (lambda t: t.pop("lm_head.weight"), "no lm_head.weight"),
        (lambda t: [t.pop(n) for n in list(t) if "layers.1" in n], "lacks 9 tensors (model.layers.1.input_layernorm"),
        (lambda t: [t.update({f"module.{n}": t.pop(n)}) for n in list(t)], "21 tensors (module.lm_head"),
        (lambda t: t.update({UP: t[UP][:5]}), f"{UP} with the shape (5, 64)"),
        (lambda t: t.update({UP: t[UP][:0]}), f"{UP} with the shape (0, 64)"),
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), "type I8"),
        (lambda t: t.update({UP: t[UP].to(torch.uint8)}), "type U8"),
        (lambda t: t.update({UP: t[UP] > 0}), "type BOOL"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), f"{UP} in FP8 (F8_E4M3)"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e5m2)}), f"{UP} in FP8 (F8_E5M2)"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e8m0fnu)}), "type F8_E8M0"),
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
def test_a_missing_or_unsupported_tensor_is_refused(folder: Path, change: Callable[[Tensors], Any], named: str) -> None:
    change_weights(folder, change)
    assert named in _refusal(folder)


def _add_unused(tensors: Tensors) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(2, 2)  # a layer that config.json does not define
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(128)
    tensors["v_head.summary.weight"] = torch.ones(1, 64)
    tensors["mtp.scale"] = torch.ones(1)


def test_tensors_without_a_parameter_are_named_in_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = _logits(folder)
    change_weights(folder, _add_unused)
    caplog.clear()
    assert torch.equal(_logits(folder), expected)
    (record,) = caplog.records
    assert "4 tensors (model.layers.0.self_attn.q_proj.bias, model.layers.2.mlp" in record.getMessage()
    assert (_logits_of_transformers(folder) - expected).abs().max() < 1e-4  # transformers ignores them too


def test_tensors_that_transformers_ignores_silently_give_no_warning(
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
def test_a_tensor_with_nan_or_infinite_values_is_refused(folder: Path, number: float) -> None:
    change_weights(folder, lambda t: t[UP][3:4, 5].fill_(number))
    files = _accounted(folder)
    model = meta_model(model_config(files, KEY), "eager", torch.float32)
    materialize(model, torch.device("cpu"))
    with pytest.raises(UserError, match=UP) as refused:
        load_weights(model.named_parameters(), files, KEY)
    assert (refused.value.key, refused.value.value) == (KEY, str(folder))


def test_a_value_beyond_the_range_of_the_parameters_dtype_is_refused(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({UP: t[UP].double().fill_(1e300)}))
    files = _accounted(folder)
    model = meta_model(model_config(files, KEY), "eager", torch.bfloat16)
    materialize(model, torch.device("cpu"))
    with pytest.raises(UserError, match=UP) as refused:
        load_weights(model.named_parameters(), files, KEY)
    assert (refused.value.key, refused.value.value) == (KEY, str(folder))


# ---- files -----------------------------------------------------------------------------------------------------------


def _in_two_files(folder: Path, **index: str) -> Tensors:
    """Replace the single file by two shards of different dtypes and an index; ``index`` holds additional entries."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    first = {name: tensors[name].half() for name in names[:9]}
    save_file(first, folder / FIRST)
    save_file({name: tensors[name] for name in names[9:]}, folder / SECOND)
    placed = {name: FIRST if name in first else SECOND for name in names} | index
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "model.safetensors").unlink()
    return tensors


def test_shards_of_different_dtypes_are_read_as_in_transformers(folder: Path) -> None:
    _in_two_files(folder)
    assert (_logits(folder) - _logits_of_transformers(folder)).abs().max() < 1e-4


def test_a_tensor_that_is_not_in_the_index_is_read_as_in_transformers(folder: Path) -> None:
    _in_two_files(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][UP]
    path.write_text(json.dumps(index))
    assert (_logits(folder) - _logits_of_transformers(folder)).abs().max() < 1e-4


def test_a_tensor_that_only_the_index_has_gives_a_warning_unless_the_model_needs_it(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _in_two_files(folder, **{"mtp.weight": FIRST})
    assert (_logits(folder) - _logits_of_transformers(folder)).abs().max() < 1e-4
    assert "1 tensor " in caplog.text and "mtp.weight" in caplog.text
    kept = {name: tensor for name, tensor in load_file(folder / FIRST).items() if name != UP}
    save_file(kept, folder / FIRST)
    if UP in load_file(folder / SECOND):
        save_file({n: t for n, t in load_file(folder / SECOND).items() if n != UP}, folder / SECOND)
    assert f"lacks 1 tensor ({UP})" in _refusal(folder)


def test_a_stale_index_next_to_a_complete_single_file_is_ignored(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = {"metadata": {}, "weight_map": {UP: FIRST}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert (_logits(folder) - _logits_of_transformers(folder)).abs().max() < 1e-4
    assert "outdated model.safetensors.index.json" in caplog.text


@pytest.mark.parametrize("shape", [(384,), (), (384, 64, 1), (384, 0)])
def test_head_and_embedding_of_an_invalid_shape_are_refused(folder: Path, shape: tuple[int, ...]) -> None:
    change_config(folder, tie_word_embeddings=True)
    names = ("lm_head.weight", "model.embed_tokens.weight")
    change_weights(folder, lambda t: t.update({name: torch.zeros(shape) for name in names}))
    assert f"model.embed_tokens.weight with the shape {shape}" in _refusal(folder)


@pytest.mark.parametrize("value", [{"hidden_size": 64}, 3, "text"])
def test_a_model_inside_the_model_is_refused(folder: Path, value: object) -> None:
    change_config(folder, text_config=value)
    assert "text_config" in _refusal(folder)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    tensors = _in_two_files(folder)
    save_file({**load_file(folder / FIRST), UP: tensors[UP] * 2}, folder / FIRST)
    assert f"({UP} in {FIRST} and {UP} in {SECOND})" in _refusal(folder)


def test_a_tensor_with_and_without_the_prefix_is_refused(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({UP.removeprefix("model."): t[UP] * 2}))
    assert f"{UP} twice" in _refusal(folder)


def test_an_index_that_names_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    _in_two_files(folder)
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"weight_map": {', f'"weight_map": {{"{UP}": "{FIRST}", '))
    assert f"{FIRST} and {SECOND}" in _refusal(folder)


def test_a_single_file_next_to_an_index_of_other_files_is_refused(folder: Path) -> None:
    single = (folder / "model.safetensors").read_bytes()
    _in_two_files(folder)
    (folder / "model.safetensors").write_bytes(single)
    assert "model.safetensors.index.json" in _refusal(folder)


def test_weights_in_the_format_of_the_models_authors_are_ignored(folder: Path) -> None:
    expected = _logits(folder)
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, folder / "consolidated.safetensors")
    (folder / "params.json").write_text('{"dim": 3}')
    assert torch.equal(_logits(folder), expected)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "adapter"),
        ({"model.Q4_K_M.gguf": b"GGUF"}, "GGUF"),
        ({"consolidated.safetensors": b""}, "consolidated.safetensors"),
        ({FIRST: b""}, FIRST),
        ({"pytorch_model.bin": b""}, "pickled"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False], ids=["with config.json", "without"])
def test_a_folder_of_another_format_is_refused(
    folder: Path, files: dict[str, bytes], named: str, with_config: bool
) -> None:
    (folder / "model.safetensors").unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if not with_config:
        (folder / "config.json").unlink()
        named = named if named in ("adapter", "GGUF") else "config.json"
    assert named in _refusal(folder)


def test_an_adapter_next_to_a_model_is_refused(folder: Path) -> None:
    """With PEFT installed, transformers would load the adapter's base model instead of the folder's weights."""
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter") as refused:
        _accounted(folder)
    assert "scripts.export_hf --merge" in refused.value.fix
