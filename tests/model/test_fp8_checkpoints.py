"""FP8 checkpoints are dequantized exactly, for any slice that a rank reads."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    LlamaConfig,
)

from distill.distributed.world import World
from distill.errors import UserError
from distill.model import quantized_weights
from distill.model.hf_config import model_config
from distill.model.hf_files import ModelFiles, find_model
from distill.model.hf_load import load_weights, manifest_of, materialize, meta_model
from distill.model.sharded import Sharding, load_sharded
from distill.model.teacher_check import plain_logits
from distill.model.tensor_accounting import check_tensors
from distill.model.weights import GatheredWeights
from distill.rollout import factory as build
from tests.fp8_checkpoints import FORMATS, change_config, change_weights, compressed, to_fp8
from tests.helpers import run_ranks, save_tiny_model

IDS = torch.randint(0, 384, (2, 16), generator=torch.Generator().manual_seed(0))
KEY = "teacher.model_name"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _unchanged_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the tensor-parallel plan of LlamaConfig, to which transformers' quantizers add entries."""
    monkeypatch.setattr(LlamaConfig, "base_model_tp_plan", dict(LlamaConfig.base_model_tp_plan))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("fp8") / "original", tied=False)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """Return a copy that the test quantizes."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def _accounted(folder: Path, key: str = KEY) -> ModelFiles:
    files = find_model(str(folder), key)
    check_tensors(files, model_config(files, key), key)
    return files


def _refusal(folder: Path, key: str = KEY) -> str:
    with pytest.raises(UserError) as refused:
        _accounted(folder, key)
    assert (refused.value.key, refused.value.value) == (key, str(folder))
    return refused.value.problem


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.float8_e4m3fn) for kind in FORMATS]
    + [(kind, torch.float8_e5m2) for kind in ("fp8 in partial blocks", "modelopt")],
)
def test_every_slice_of_an_fp8_weight_is_elements_times_scales(folder: Path, kind: str, dtype: torch.dtype) -> None:
    values = to_fp8(folder, kind, dtype)
    files, rng = _accounted(folder), random.Random(0)
    for name, weight in values.items():
        assert torch.equal(files.tensor(name), weight), name
        if weight.ndim == 2:
            for _ in range(4):
                rows, columns = (sorted(rng.sample(range(length + 1), 2)) for length in weight.shape)
                part = slice(*rows), slice(*columns)
                assert torch.equal(files.tensor(name, part), weight[part]), (name, part)


def test_a_slice_reads_only_its_elements_and_their_scales(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_fp8(folder, "fp8 in partial blocks")
    files, read = _accounted(folder), []

    class Recorded:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._file = safe_open(*args, **kwargs)

        def __enter__(self) -> Any:
            self._file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self._file.__exit__(*error)

        def get_slice(self, name: str) -> Any:
            class Part:
                def __getitem__(_, slices: Any) -> Tensor:
                    part: Tensor = self._file.get_slice(name)[slices]
                    read.append((name.rpartition(".")[2], tuple(part.shape)))
                    return part

            return Part()

    monkeypatch.setattr(quantized_weights, "safe_open", Recorded)
    files.tensor(UP, (slice(40, 60), slice(39, 41)))  # 128 x 64 in blocks of 48 x 40: borders at 48 and at 40
    files.tensor(UP, (slice(100, 110), slice(50, 64)))
    assert read[:2] == [("weight", (20, 2)), ("weight_scale_inv", (2, 2))]
    assert read[2:] == [("weight", (10, 14)), ("weight_scale_inv", (1, 1))]


@pytest.mark.parametrize(
    ("kind", "dequantizing"),
    [
        ("fp8 in blocks", FineGrainedFP8Config(weight_block_size=[32, 32], dequantize=True)),
        ("fp8 with powers of two", FineGrainedFP8Config(weight_block_size=[32, 32], dequantize=True)),
        ("compressed-tensors per tensor", CompressedTensorsConfig(dequantize=True)),
        ("compressed-tensors per channel", CompressedTensorsConfig(dequantize=True)),
        ("compressed-tensors in groups", CompressedTensorsConfig(dequantize=True)),
    ],
)
def test_logits_of_an_fp8_checkpoint_equal_those_of_transformers(folder: Path, kind: str, dequantizing: Any) -> None:
    to_fp8(folder, kind)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=dequantizing)
    with torch.no_grad():
        expected = model(IDS).logits
    assert (_logits(folder) - expected).abs().max() < 1e-4


def _logits(folder: Path) -> Tensor:
    files = _accounted(folder)
    config = model_config(files, KEY)
    return plain_logits(files, config, IDS.tolist(), torch.float32, torch.device("cpu"))


def _load_on_two_ranks(folder: str) -> dict[str, Tensor]:
    """Return the gathered weights of a model that tensor parallelism shards by rows and columns."""
    world = World()
    world.build_mesh("cpu", tp=2, cp=1)
    files = find_model(folder, KEY)
    sharding = Sharding(world.shard_mesh, world.cp_group, world.tp_mesh)
    model = load_sharded(files, KEY, world, sharding, torch.float32, torch.float32, trainable=True)
    gathered = GatheredWeights(model.named_hf_parameters(), torch.float32, 4096, world.replica_mesh, 2)
    found = {name: tensor.clone() for name, tensor in gathered}
    world.close()
    return found


@pytest.mark.slow
def test_shards_with_borders_inside_blocks_are_dequantized_exactly(folder: Path) -> None:
    """The borders are at row or column 64 of 128, in blocks of 48 rows and 40 columns."""
    values = to_fp8(folder, "fp8 in partial blocks")
    for found in run_ranks(2, _load_on_two_ranks, str(folder)):
        assert found.keys() == values.keys()
        assert all(torch.equal(found[name], weight) for name, weight in values.items())


def test_an_embedding_and_a_head_in_fp8_are_dequantized(folder: Path) -> None:
    expected = {}

    def change(tensors: dict[str, Tensor]) -> None:
        for name in ("lm_head", "model.embed_tokens"):
            q = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
            tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = q, torch.tensor(0.5)
            expected[f"{name}.weight"] = q.float() / 2

    change_weights(folder, change)
    change_config(folder, quantization_config={"quant_method": "modelopt", "quant_algo": "fp8"})
    files = _accounted(folder)
    assert all(torch.equal(files.tensor(name), weight) for name, weight in expected.items())


def test_a_scale_in_another_shard_than_its_weight_is_found(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    values = to_fp8(folder, "fp8 in blocks")
    tensors = load_file(folder / "model.safetensors")
    files = {name: f"model-0000{1 + name.endswith('_inv')}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    accounted = _accounted(folder)
    assert all(torch.equal(accounted.tensor(name), weight) for name, weight in values.items())


def test_an_fp8_student_gives_a_warning_and_an_fp8_teacher_gives_none(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    to_fp8(folder, "compressed-tensors per channel")
    with caplog.at_level("INFO", "distill"):
        _accounted(folder, "policy.model_name")
        _accounted(folder, "teacher.model_name")
    student, teacher = caplog.records
    assert (student.levelname, teacher.levelname) == ("WARNING", "INFO")
    assert "policy.model_name" in student.getMessage() and "14 quantized" in student.getMessage()


def test_a_declared_quantization_of_unquantized_weights_gives_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_config(folder, quantization_config=FORMATS["fp8 in blocks"][0])
    _accounted(folder)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "quantization fp8" in record.getMessage()


def test_the_engine_of_an_fp8_student_is_not_quantized(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import distill.rollout.vllm_engine as vllm_engine

    given: list[dict[str, Any]] = []
    monkeypatch.setattr(vllm_engine, "VllmEngine", lambda *args: given.append(args[-1]))
    generation = SimpleNamespace(
        vllm_cfg=SimpleNamespace(
            gpu_memory_utilization=0.5,
            enforce_eager=True,
            max_model_len=64,
            tensor_parallel_size=1,
            speculative=None,
        ),
        vllm_kwargs={},
        engine_window=64,
    )
    loop = SimpleNamespace(partial_rollouts=SimpleNamespace(enabled=False))
    policy = SimpleNamespace(precision="float32", generation=generation)
    config: Any = SimpleNamespace(policy=policy, distillation=loop)
    to_fp8(folder, "fp8 in blocks")
    files = find_model(str(folder), "policy.model_name")
    world: Any = SimpleNamespace(device=torch.device("cpu"), size=1)
    build._build_vllm(config, files, model_config(files, "policy.model_name"), world, 384)
    read = AutoConfig.from_pretrained(folder)
    assert hasattr(read, "quantization_config")
    assert not hasattr(given[0]["hf_overrides"](read), "quantization_config")
    shape = model_config(files, "policy.model_name")
    assert not hasattr(shape, "quantization_config")
    assert manifest_of(meta_model(shape, "eager", torch.float32)).keys() <= files.tensors.keys()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ"),
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "mxfp8"}, "MXFP8"),
        ({"quant_method": "torchao", "quant_type": {}}, "torchao"),
        ({"quant_method": "quark"}, "Quark"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt's NVFP4"),
        ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, "ModelOpt's MXFP8"),
        ({"quant_method": "unheard-of"}, "unheard-of"),
        ({"bits": 4}, "unnamed"),
        ({}, "quantization_config={}"),
        ("fp8", "quantization_config=fp8"),
        ({**compressed(strategy="group", group_size=32), "format": "pack-quantized"}, "pack-quantized"),
        ({**compressed(strategy="tensor_group", group_size=16), "format": "nvfp4-pack-quantized"}, "nvfp4-pack"),
        (compressed(strategy="channel", type="int"), "type=int and num_bits=8"),
        (compressed(strategy="group", group_size=32, num_bits=4), "type=float and num_bits=4"),
        (compressed(strategy="channel", symmetric=False), "not symmetric"),
        (compressed(strategy="attn_head"), "strategy=attn_head"),
        ({**compressed(strategy="channel"), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({**compressed(strategy="channel"), "transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        (compressed(strategy="block", block_structure=[0, 128]), "block_structure"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
    ],
)
def test_an_unsupported_quantization_is_refused_before_weights_are_needed(
    folder: Path, settings: Any, named: str
) -> None:
    change_config(folder, quantization_config=settings)
    assert named in _refusal(folder)
    with pytest.raises(UserError, match="quantiz") as refused:  # as with --dry-run, without weights
        model_config(ModelFiles(str(folder), folder, {}), KEY)
    assert refused.value.key == KEY


@pytest.mark.parametrize("place", ["text_config", "compression_config", "hf_quant_config.json", "quantize_config.json"])
def test_a_declared_quantization_is_found_in_every_file_and_section(folder: Path, place: str) -> None:
    if place == "text_config":
        change_config(folder, text_config={"quantization_config": {"quant_method": "awq"}})
    elif place == "compression_config":
        change_config(folder, compression_config=compressed(strategy="channel", num_bits=4, type="int"))
    elif place == "hf_quant_config.json":
        settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
        (folder / place).write_text(json.dumps(settings))
    else:
        (folder / place).write_text('{"bits": 4, "group_size": 128}')
    assert place in _refusal(folder)


def test_a_quantized_kv_cache_does_not_change_the_weights(folder: Path) -> None:
    quantization = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    change_weights(folder, lambda t: t.update({"model.layers.1.self_attn.v_proj.output_scale": torch.tensor(9.0)}))
    expected = _accounted(folder).tensor(UP)
    assert expected.dtype == torch.float32


def _scale(tensors: dict[str, Tensor]) -> str:
    return next(name for name in tensors if name.startswith(f"{UP}_scale"))


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("fp8 in blocks", lambda t: t.pop(_scale(t)), "missing"),
        ("fp8 per tensor", lambda t: t.pop(_scale(t)), "missing"),
        ("fp8 in blocks", lambda t: t.update({_scale(t): t[_scale(t)][:2].clone()}), r"the shape \(2, 2\)"),
        ("fp8 in blocks", lambda t: t.update({_scale(t): t[_scale(t)].t().clone()}), r"the shape \(2, 4\)"),
        ("compressed-tensors per channel", lambda t: t.update({_scale(t): torch.ones(64)}), r"the shape \(64,\)"),
        ("fbgemm_fp8", lambda t: t.update({_scale(t): torch.tensor(1.0)}), r"the shape \(\)"),
        ("fp8 in blocks", lambda t: t.update({_scale(t): t[_scale(t)].to(torch.int8)}), "type I8"),
        ("fp8 in blocks", lambda t: t.update({f"{UP}_scale": torch.tensor(1.0)}), "2 scale tensors"),
    ],
)
def test_a_missing_or_unsuitable_scale_is_refused_with_the_name_of_its_weight(
    folder: Path, kind: str, change: Any, named: str
) -> None:
    to_fp8(folder, kind)
    change_weights(folder, change)
    problem = _refusal(folder)
    assert f"{UP} in FP8 (F8_E4M3)" in problem
    assert re.search(named, problem)


def test_fp8_weights_without_a_declared_quantization_are_refused(folder: Path) -> None:
    to_fp8(folder, "fp8 per tensor")
    change_config(folder, quantization_config=None)
    assert "quantization_config" in _refusal(folder)


def test_a_scale_that_fits_several_groups_is_refused(folder: Path) -> None:
    settings = compressed(strategy="block", block_structure=[32, 32])
    other = compressed(strategy="block", block_structure=[40, 40])["config_groups"]["group_0"]
    settings["config_groups"]["group_1"] = other
    to_fp8(folder, "fp8 in blocks")
    change_weights(folder, lambda t: [t.update({n.removesuffix("_inv"): t.pop(n)}) for n in list(t) if "_inv" in n])
    change_config(folder, quantization_config=settings)
    assert "several of" in _refusal(folder)


def test_a_nan_scale_is_refused_when_its_weight_is_loaded(folder: Path) -> None:
    to_fp8(folder, "fp8 in blocks")
    change_weights(folder, lambda t: t[_scale(t)].view(-1)[3:4].fill_(torch.nan))
    files = _accounted(folder)
    model = meta_model(model_config(files, KEY), "eager", torch.float32)
    materialize(model, torch.device("cpu"))
    with pytest.raises(UserError, match=UP) as refused:
        load_weights(model.named_parameters(), files, KEY)
    assert refused.value.key == KEY
