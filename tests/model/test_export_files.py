"""The small files of an export are those of the source with the changes that the training requires."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from distill.data.tokenizer import load_tokenizer
from distill.model import export
from distill.model.export_dialects import with_stop_ids
from distill.model.export_files import ExportFiles, read_export_files, stored_export_files
from distill.model.hf_files import ModelFiles, find_model
from tests.helpers import save_tiny_model, tiny_config
from tests.model.test_model_card import RECIPE
from tests.tiny_tokenizer import tiny_tokenizer

TIED_TENSORS = ("model.embed_tokens.weight",)
UNTIED_TENSORS = (*TIED_TENSORS, "lm_head.weight")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def edit(path: Path, **changes: Any) -> dict[str, Any]:
    """Set keys of a JSON file, or remove those set to ``...``."""
    content = {key: value for key, value in (read_json(path) | changes).items() if value is not ...}
    write_json(path, content)
    return content


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tied Llama in the format of transformers 5."""
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "newer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def older(newer: Path, tmp_path: Path) -> Path:
    """Return the same model in the format of transformers 4, with an unknown key."""
    folder = shutil.copytree(newer, tmp_path / "older")
    edit(
        folder / "config.json",
        rope_parameters=...,
        rope_theta=123456.0,
        rope_scaling=None,
        dtype=...,
        torch_dtype="float16",
        unknown_key=[1, {"a": 1e-05}],
    )
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    class_and_eos = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    write_json(folder / "tokenizer_config.json", class_and_eos | {"chat_template": template})
    write_json(folder / "generation_config.json", {"temperature": 0.6, "do_sample": True, "eos_token_id": [258, 256]})
    return folder


def files_of(folder: Path, stops: Sequence[int] = (256, 258), **options: Any) -> ExportFiles:
    files = find_model(str(folder), "policy.model_name")
    return read_export_files(files, load_tokenizer(files, None, "policy.tokenizer.name"), None, stops, **options)


def written(files: ExportFiles, out: Path, tensors: Iterable[str] = TIED_TENSORS) -> Path:
    for name, content in files.complete(torch.float32, list(tensors)).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    return out


def test_a_source_in_the_format_of_version_4_changes_only_its_dtype(older: Path, tmp_path: Path) -> None:
    out = written(files_of(older), tmp_path / "out")
    assert read_json(out / "config.json") == read_json(older / "config.json") | {"torch_dtype": "float32"}
    others = sorted({path.name for path in older.iterdir()} - {"config.json", "model.safetensors"})
    assert sorted(path.name for path in out.iterdir()) == sorted(["config.json", *others])
    for name in others:
        assert (out / name).read_bytes() == (older / name).read_bytes(), name


def test_only_licences_and_tokenizer_files_are_copied(older: Path, tmp_path: Path) -> None:
    store = tmp_path / "blobs"
    store.mkdir()
    copied = ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "README.md", "merges.txt", "vocab.json", "tokenizer.model")
    for name in (*copied, "special_tokens_map.json", "added_tokens.json"):
        (store / name).write_text("{}")
        (older / name).symlink_to(store / name)  # as the hub's cache does
    (older / "additional_chat_templates").mkdir()
    (older / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    for name in ("pytorch_model.bin", "model.gguf", "modeling_own.py", "optimizer.pt"):
        (older / name).write_text("x")
    write_json(older / "hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}})
    for name in ("onnx", "original"):
        (older / name).mkdir()
        (older / name / "tokenizer.model").write_text("x")
    (older / "broken.json").symlink_to("nowhere")
    edit(older / "config.json", auto_map={"AutoModel": "modeling_own.Own"})
    edit(older / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    before = {path.relative_to(older).as_posix() for path in older.rglob("*")}
    out = written(files_of(older), tmp_path / "out")
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert there == {
        *copied,
        *("special_tokens_map.json", "added_tokens.json", "additional_chat_templates/tool_use.jinja"),
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert "auto_map" not in read_json(out / "config.json") | read_json(out / "tokenizer_config.json")
    assert before == {path.relative_to(older).as_posix() for path in older.rglob("*")}, "the source is only read"


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantization_config_is_removed_because_the_weights_are_not_quantized(older: Path, key: str) -> None:
    config = read_json(older / "config.json")
    edit(older / "config.json", **{key: {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    assert json.loads(files_of(older).contents["config.json"]) == config


ROPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "default": ("qwen3", {"rope_type": "default", "rope_theta": 1e6}, {"rope_theta": 1e6}),
    "linear": (
        "llama",
        {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "yarn": (
        "qwen2",
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128},
        {
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        },
    ),
    "by layer type": (
        "gemma3_text",
        {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
}


V4 = {"rope_parameters": ..., "rope_theta": ..., "rope_scaling": ...}
DEFAULT = {"rope_type": "default", "rope_theta": 5e5}
GEMMA_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR, YARN = {"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "original_max_position_embeddings": 128}


def _rotary_buffers(config: Any) -> list[torch.Tensor]:
    """Return the rotary frequencies of the model in transformers."""
    return [buffer for name, buffer in AutoModelForCausalLM.from_config(config).named_buffers() if "inv_freq" in name]


@pytest.mark.parametrize(
    ("family", "changes", "theta", "scaling"),
    [
        pytest.param("llama", {"rope_scaling": {**LINEAR, "rope_theta": 5e5}}, 5e5, ..., id="theta in rope_scaling"),
        pytest.param(
            "llama", {"rope_theta": 1e6, "rope_scaling": {**LINEAR, "rope_theta": 5e3}}, 5e3, ..., id="two values"
        ),
        pytest.param("llama", {"rope_theta": 5e5, "rope_scaling": {}}, 5e5, None, id="empty rope_scaling"),
        pytest.param("llama", {"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5, ..., id="default"),
        pytest.param("qwen2", {"rope_theta": 5e5, "rope_scaling": {**LINEAR, "type": "linear"}}, 5e5, ..., id="type"),
        pytest.param("llama", {}, 1e4, None, id="no rotary key"),
        pytest.param(
            "qwen3",
            {"rope_parameters": {**YARN, "rope_theta": 1e6, "factor": None}, "max_position_embeddings": 512},
            *(1e6, {**YARN, "factor": 4.0}),
            id="yarn factor of null",
        ),
        pytest.param(
            "llama",
            {"rope_parameters": DEFAULT, "rope_theta": 1e4},
            5e5,
            None,
            id="different values for versions 4 and 5",
        ),
        pytest.param(
            "llama", {"rope_parameters": DEFAULT, "rope_scaling": LINEAR}, 1e4, ..., id="rope_scaling has priority"
        ),
        pytest.param(
            "gemma3_text",
            {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), DEFAULT), "rope_theta": 3e6},
            *(5e5, None),
            id="by layer type",
        ),
        *(
            pytest.param(
                "gemma3_text",
                {"rope_parameters": {"full_attention": GEMMA_YARN | inside, "sliding_attention": DEFAULT} | outside},
                *(1e6, {**YARN, "factor": 4.0, **outside}),
                id=f"truncate {place} the layer types",
            )
            for place, inside, outside in (("inside", {"truncate": False}, {}), ("outside", {}, {"truncate": False}))
        ),
    ],
)
def test_version_4_reads_the_rotary_values_of_version_5(newer, tmp_path, family, changes, theta, scaling) -> None:
    """``scaling``: the value in the export; ``...``: the value of the source."""
    folder = shutil.copytree(newer, tmp_path / "source")
    tiny_config(family, True).save_pretrained(folder)
    source = edit(folder / "config.json", **V4 | changes)
    out = written(files_of(folder), tmp_path / "out")
    found = read_json(out / "config.json")
    assert found["rope_theta"] == theta
    assert found.get("rope_scaling") == (source["rope_scaling"] if scaling is ... else scaling)
    read, trained = AutoConfig.from_pretrained(out), AutoConfig.from_pretrained(folder)
    pairs = list(zip(_rotary_buffers(read), _rotary_buffers(trained), strict=True))
    assert pairs and all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_settings_that_transformers_ignores_are_removed_because_vllm_applies_them(newer, tmp_path) -> None:
    folder = shutil.copytree(newer, tmp_path / "source")
    foreign = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "attention_chunk_size": 4}
    foreign |= {"partial_rotary_factor": 0.5, "logit_scale": 2.0, "qk_norm": True, "clip_qkv": 1.0}
    kept = {"logits_scaling": 1.0, "num_kv_shared_layers": 0, "unknown_key": 3, "attention_bias": True}
    edit(folder / "config.json", **foreign, **kept, rope_parameters={**DEFAULT, "partial_rotary_factor": 0.5})
    found = json.loads(files_of(folder).contents["config.json"])
    assert not foreign.keys() & found.keys() and kept.items() <= found.items()
    assert found["rope_parameters"] == DEFAULT


GEMMA = {"full_attention": DEFAULT, "sliding_attention": DEFAULT}
LOCAL = {"full_attention": DEFAULT, "sliding_attention": DEFAULT | {"rope_theta": 1e4}}
OLD_LINEAR = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}


@pytest.mark.parametrize(
    ("family", "before", "after", "changed"),
    [
        ("llama", {}, {"rms_norm_eps": 1e-3}, ["rms_norm_eps"]),
        ("llama", V4 | {"rope_theta": 5e5}, {"rope_theta": 1e6}, ["rope_parameters"]),
        ("llama", {"rope_parameters": DEFAULT}, V4 | {"rope_theta": 5e5}, []),
        ("llama", V4 | OLD_LINEAR, V4 | {"rope_parameters": LINEAR | {"rope_theta": 5e5}}, []),
        ("qwen2", {}, {"head_dim": ...}, []),
        ("llama", {}, {"num_attention_heads": 8, "head_dim": 16}, ["num_attention_heads", "head_dim"]),
        ("qwen3", {}, {"hidden_act": "gelu"}, ["hidden_act"]),
        ("gemma3_text", {"rope_parameters": GEMMA}, {"rope_parameters": LOCAL}, ["rope_parameters"]),
        ("gemma3_text", {}, {"query_pre_attn_scalar": 32}, ["query_pre_attn_scalar"]),
        ("gemma3_text", {}, {"sliding_window": 16}, ["sliding_window"]),
        ("llama", {}, {"use_cache": False, "unknown_key": 3, "torch_dtype": "float16", "sliding_window": 8}, []),
    ],
)
def test_changed_settings_of_equal_weights_are_found(newer, tmp_path, family, before, after, changed) -> None:
    """As at a resume: the checkpoint stores the files of the start."""
    folder, step = shutil.copytree(newer, tmp_path / "source"), tmp_path / "step_4"
    tiny_config(family, True).save_pretrained(folder)
    edit(folder / "config.json", **before)
    content = files_of(folder).stored(torch.bfloat16, list(TIED_TENSORS))
    for name, text in content.items():
        (step / name).parent.mkdir(parents=True, exist_ok=True)
        (step / name).write_bytes(text)
    stored = stored_export_files(step, content)
    assert stored is not None and stored.changes(files_of(folder)) == []
    edit(folder / "config.json", **after)
    assert [text.partition(" ")[0] for text in stored.changes(files_of(folder))] == changed
    (stops,) = stored.changes(files_of(folder, (258,)))[len(changed) :]
    assert "[256, 258]" in stops and "[258]" in stops


def test_settings_of_the_models_family_are_kept(newer: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(newer, tmp_path / "source")
    tiny_config("gemma3_text", True).save_pretrained(folder)
    found, source = json.loads(files_of(folder).contents["config.json"]), read_json(folder / "config.json")
    own = ("sliding_window", "layer_types", "query_pre_attn_scalar", "attention_bias")
    assert all(found[name] == source[name] is not None for name in own)


@pytest.mark.parametrize("listed", [["LlamaForSequenceClassification", "LlamaForCausalLM"], ["LlamaModel"], [], None])
def test_architectures_contains_only_the_class_of_the_trained_model(older: Path, listed: Any) -> None:
    edit(older / "config.json", architectures=listed)
    assert json.loads(files_of(older).contents["config.json"])["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("name", ROPES)
def test_a_source_in_the_format_of_version_5_gets_the_keys_of_version_4(name: str, newer: Path, tmp_path: Path) -> None:
    family, parameters, expected = ROPES[name]
    config = tiny_config(family, True)
    config = type(config).from_dict(config.to_dict() | {"rope_parameters": parameters})
    config.architectures = [
        config.__class__.__name__.replace("Config", "Model")
    ]  # class of a base model, which vLLM cannot load
    folder = shutil.copytree(newer, tmp_path / "source")
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    out = written(files_of(folder), tmp_path / "out")
    before, after = read_json(folder / "config.json"), read_json(out / "config.json")
    architecture = AutoModelForCausalLM.from_config(config).__class__.__name__
    changed = {"dtype": "float32", "torch_dtype": "float32", "architectures": [architecture]}
    assert after == before | changed | expected | {"eos_token_id": [256, 258]}
    again = shutil.copytree(out, tmp_path / "again")  # an export can be the student of another run
    shutil.copy(folder / "model.safetensors", again)
    assert read_json(written(files_of(again), tmp_path / "twice") / "config.json") == after
    assert type(config).from_pretrained(out).rope_parameters == type(config).from_pretrained(folder).rope_parameters


def test_a_scaled_local_rope_gives_a_warning_because_version_4_lacks_it(newer, tmp_path, caplog) -> None:
    folder = shutil.copytree(newer, tmp_path / "source")
    config = tiny_config("gemma3_text", True)
    local = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    config.rope_parameters["sliding_attention"] = local
    config.save_pretrained(folder)
    with caplog.at_level(logging.WARNING):
        files_of(folder)
    assert "rope_type=linear" in caplog.text


@pytest.mark.parametrize(
    ("generation", "config", "stops", "eos"),
    [
        pytest.param({"eos_token_id": [258, 256]}, {}, (256, 258), [258, 256], id="equal sets keep the form"),
        pytest.param({"eos_token_id": 258}, {}, (258,), 258, id="one id"),
        pytest.param({"eos_token_id": 256}, {}, (256, 258), [256, 258], id="base student and instruct teacher"),
        pytest.param({"eos_token_id": 256}, {}, (5,), 5, id="stop ids of the recipe"),
        pytest.param({}, {"eos_token_id": 258}, (1, 258), [258, 1], id="no ids in generation_config"),
        pytest.param(None, {"eos_token_id": 258, "bos_token_id": 1}, (256, 258), [258, 256], id="no generation_config"),
        pytest.param({"eos_token_id": 256}, {}, (), 256, id="no stop ids"),
    ],
)
def test_generation_config_has_the_stop_ids_of_the_training(generation, config, stops, eos) -> None:
    others = {"temperature": 0.6, "transformers_version": "4.51.0"}
    source = None if generation is None else generation | others
    edited, model = with_stop_ids(source, config, stops)
    assert edited is not None and edited.pop("eos_token_id") == eos
    source_eos = (generation or {}).get("eos_token_id")
    assert model == (config if eos == source_eos else config | {"eos_token_id": eos})
    assert edited == (others if generation is not None else {"bos_token_id": 1})


def test_a_generation_config_made_from_config_json_does_not_override_the_stop_ids() -> None:
    """transformers recreates it from config.json if ``_from_model_config`` is set."""
    for source in (2, [2, 3]):
        generation = {"_from_model_config": True, "eos_token_id": source}
        expected = {"eos_token_id": [2, 3]}
        assert with_stop_ids(generation, {"eos_token_id": 2}, (2, 3)) == (expected, expected)


def test_the_users_chat_template_replaces_all_templates_of_the_model(older: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("\ufeff{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    (older / "additional_chat_templates").mkdir()
    (older / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    write_json(older / "chat_template.json", {"chat_template": "old"})
    out = written(files_of(older, chat_template=str(tmp_path / "own.jinja")), tmp_path / "out")
    chat = [{"role": "user", "content": "hi"}]
    assert AutoTokenizer.from_pretrained(out).apply_chat_template(chat, tokenize=False) == "[hi]"
    assert not (out / "additional_chat_templates").exists() and not (out / "chat_template.json").exists()
    assert "chat_template" not in read_json(out / "tokenizer_config.json")


def test_tokenizer_files_come_from_the_tokenizer_of_the_recipe(older: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_tokenizer(extra=("<|other|>",)).save_pretrained(other)
    (older / "merges.txt").write_text("of the model")
    write_json(other / "config.json", {"eos_token_id": 7})
    (other / "README.md").write_text("of the tokenizer")
    files = find_model(str(older), "policy.model_name")
    tokenizer = load_tokenizer(files, str(other), "policy.tokenizer.name")
    found = read_export_files(files, tokenizer, str(other), (258, 256)).contents
    assert found["tokenizer.json"] == (other / "tokenizer.json").read_bytes()
    assert json.loads(found["config.json"])["unknown_key"] and not {"merges.txt", "README.md"} & found.keys()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_class_that_misreads_the_tokenizer_is_replaced(family: str, newer: Path, tmp_path: Path, caplog) -> None:
    folder = shutil.copytree(newer, tmp_path / "source")
    tiny_config(family, True).save_pretrained(folder)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<|im_end|>"})
    text = "What is 1 + 2?"
    own = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert family == "qwen2" or AutoTokenizer.from_pretrained(folder).encode(text) != own, (
        "transformers 5 reads it correctly now"
    )
    with caplog.at_level(logging.WARNING):
        out = written(files_of(folder), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.encode(text) == own and tokenizer.eos_token == "<|im_end|>"
    assert "PreTrainedTokenizerFast.from_pretrained" not in caplog.text
    assert read_json(out / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize(
    ("named", "padding_side"),
    [
        ("LlamaTokenizerFast", "left"),
        ("GemmaTokenizer", "left"),
        ("Qwen2TokenizerFast", None),
        ("TokenizersBackend", None),
        (None, "left"),
    ],
)
def test_the_defaults_of_a_replaced_class_become_explicit_settings(
    newer: Path, tmp_path: Path, named, padding_side
) -> None:
    """Otherwise version 4 would return token_type_ids, which ``generate`` refuses, and pad on the other side."""
    folder = shutil.copytree(newer, tmp_path / "source")
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>", "tokenizer_class": named})
    found = json.loads(files_of(folder).contents["tokenizer_config.json"])
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert found["model_input_names"] == ["input_ids", "attention_mask"] and found.get("padding_side") == padding_side
    edit(folder / "tokenizer_config.json", padding_side="right", model_input_names=["input_ids"])
    found = json.loads(files_of(folder).contents["tokenizer_config.json"])
    assert (found["padding_side"], found["model_input_names"]) == ("right", ["input_ids"]), (
        "settings of the source are kept"
    )


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_the_exported_tokenizer_json_adds_bos_if_add_bos_token_is_set(newer, tmp_path, named: str) -> None:
    folder = shutil.copytree(newer, tmp_path / "source")
    settings = {"tokenizer_class": named, "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    write_json(folder / "tokenizer_config.json", settings | {"add_bos_token": True})
    trained = load_tokenizer(find_model(str(folder), "policy.model_name"), None, "policy.tokenizer.name")
    out = written(files_of(folder), tmp_path / "out")
    read = AutoTokenizer.from_pretrained(out)
    assert read("a b").input_ids == trained("a b").input_ids and trained("a b").input_ids[0] == 256
    before, after = read_json(folder / "tokenizer.json"), read_json(out / "tokenizer.json")
    assert before | {"post_processor": after["post_processor"]} == after
    edit(folder / "tokenizer_config.json", add_bos_token=False)
    assert files_of(folder).contents["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_transformers_misreads_with_any_class_gives_a_warning(newer, tmp_path, caplog) -> None:
    """transformers 5 uses Qwen2Tokenizer for a qwen2 model and tokenizer_class in the file."""
    folder = shutil.copytree(newer, tmp_path / "source")
    tiny_config("qwen2", True).save_pretrained(folder)
    letters = ["▁", "\n", *map(chr, range(33, 127)), "▁a"]
    own = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[("▁", "a")]))
    own.pre_tokenizer, own.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    own.save(str(folder / "tokenizer.json"))
    with caplog.at_level(logging.WARNING):
        files = files_of(folder)
    assert "PreTrainedTokenizerFast.from_pretrained" in caplog.text
    read = PreTrainedTokenizerFast.from_pretrained(written(files, tmp_path / "out"))
    assert read.encode("a a") == own.encode("a a").ids


def test_a_list_of_extra_special_tokens_is_written_in_the_format_of_version_4(newer: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(newer, tmp_path / "source")
    tokenizer = tiny_tokenizer(special_think=False)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>"]})
    tokenizer.save_pretrained(folder)
    assert read_json(folder / "tokenizer_config.json")["extra_special_tokens"] == ["<think>"]
    out = written(files_of(folder), tmp_path / "out")
    found = read_json(out / "tokenizer_config.json")
    assert found["additional_special_tokens"] == ["<think>"] and "extra_special_tokens" not in found
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer.encode("a<think>"), skip_special_tokens=True) == "a"


@pytest.mark.parametrize(("declared", "tensors"), [(True, UNTIED_TENSORS), (False, TIED_TENSORS), (..., TIED_TENSORS)])
def test_config_json_declares_whether_the_trained_head_is_tied(older: Path, declared: Any, tensors: Any) -> None:
    edit(older / "config.json", tie_word_embeddings=declared)
    config = json.loads(files_of(older).complete(torch.bfloat16, tensors)["config.json"])
    assert config["tie_word_embeddings"] is (tensors == TIED_TENSORS) and config["torch_dtype"] == "bfloat16"


def test_sharded_weights_have_an_index_with_their_size_and_replace_an_earlier_export(
    newer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_model(str(newer), "policy.model_name")
    weights = {name: source.tensor(name) for name in source.files}
    out, files = tmp_path / "out", files_of(newer)
    monkeypatch.setattr(export, "_SHARD_BYTES", 100_000)
    export.export_hf(out, weights.items(), files, torch.float32)
    index = read_json(out / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(4 * weight.numel() for weight in weights.values())
    assert len(set(index["weight_map"].values())) == len(list(out.glob("*.safetensors"))) > 1
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "the umask also applies to weights"
    sharded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    monkeypatch.setattr(export, "_SHARD_BYTES", 10**9)
    export.export_hf(out, weights.items(), files, torch.float32)
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]
    for state in (sharded, AutoModelForCausalLM.from_pretrained(out).state_dict()):
        assert all(torch.equal(state[name], weight) for name, weight in weights.items())


def test_card_and_licence_files_are_found_under_other_spellings(older: Path) -> None:
    (older / "readme.md").write_bytes(b"\xef\xbb\xbf---\nlicense: other\n---\n# Own\n")
    (older / "license").mkdir()
    names = ("GEMMA_TERMS.md", "Llama3_License.pdf", "license/LICENSE", "Terms_of_Use.txt", "my_LICENCE")
    for name in names:
        (older / name).write_text(name)
    found = files_of(older).with_card(RECIPE, 40, {}).contents
    assert "README.md" not in found
    assert found["readme.md"].startswith(b"---\nlicense: other\n---\n# Own\n\n## On-policy")
    assert all(found[name] == name.encode() for name in names)


@pytest.mark.parametrize("ids", [[256.0, 258], [True, 258], 258.0])
def test_stop_ids_are_written_as_integers(ids: Any) -> None:
    stops = (1, 258) if ids == [True, 258] else (258,) if ids == 258.0 else (256, 258)
    edited, _ = with_stop_ids({"eos_token_id": ids}, {}, stops)
    eos = edited["eos_token_id"] if edited else None
    listed = eos if isinstance(eos, list) else [eos]
    assert sorted(listed) == list(stops) and all(type(token) is int for token in listed)


def test_an_export_of_a_base_student_stops_at_the_stop_ids_of_the_training(newer: Path, tmp_path: Path) -> None:
    """The stop id is a token of the greedy continuation, which continues after it without that stop id."""
    folder = shutil.copytree(newer, tmp_path / "source")
    GenerationConfig(eos_token_id=256).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    start = torch.tensor([[1, 2, 3]])
    free = model.generate(start, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 3:].tolist()
    stop = max(set(free[:6]), key=free.index)
    files: ModelFiles = find_model(str(folder), "policy.model_name")
    weights = [(name, files.tensor(name)) for name in files.files]
    export.export_hf(tmp_path / "out", weights, files_of(folder, (256, stop)), torch.float32)
    ended = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generate(start, max_new_tokens=12, do_sample=False)
    assert len(free) == 12 and ended[0, 3:].tolist() == free[: free.index(stop) + 1]
