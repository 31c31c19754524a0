"""Malformed model folders: config.json, safetensors, index, tokenizer, generation config."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from tests.malformed.case import CANARY, Case, Workshop, way


def model_case(shop: Workshop, names: str, model: Path, detail: str) -> Case:
    owner = shop.rng.choice(["policy", "teacher"])
    case = shop.case(names.replace("MODEL", str(model)), f"{owner}.model_name={model}")
    case.detail = f"{owner}: {detail}"
    return case


@way
def _broken_config_json(shop: Workshop) -> Case:
    model = shop.model()
    path = model / "config.json"
    content = json.loads(path.read_text())
    changed: list[dict[str, Any]] = [
        {"model_type": "unheard-of"},
        {"model_type": "gpt2"},
        {"model_type": None},
        {"model_type": 3},
        {"hidden_size": "wide"},
        {"hidden_size": None},
        {"hidden_size": -64},
        {"hidden_size": 0},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": "two"},
        {"num_hidden_layers": -1},
        {"vocab_size": -5},
        {"vocab_size": "many"},
        {"vocab_size": 0},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"intermediate_size": [1]},
        {"head_dim": "x"},
        {"hidden_act": "nonsense"},
        {"rope_parameters": 3},
        {"rope_parameters": {"rope_type": "nonsense"}},
        {"max_position_embeddings": "long"},
        {"max_position_embeddings": -1},
        {"rms_norm_eps": "small"},
        {"layer_types": ["nonsense"] * 2},
        {"layer_types": 3},
        {"attention_bias": {"a": 1}, "tie_word_embeddings": "x", "vocab_size": 1.5},
        {"num_experts": 8, "model_type": "qwen3_moe"},
    ]
    kind = shop.rng.randrange(6)
    if kind == 0:
        path.write_bytes(shop.cut(path.read_bytes(), least=2)[:-1])
    elif kind == 1:
        path.write_text(shop.rng.choice(["[]", "3", "null", '"text"', "", "{}", "{nonsense}", '{"a": NaN'] * 1))
    else:
        path.write_text(json.dumps({**content, **(drawn := shop.rng.choice(changed))}))
        return model_case(shop, "MODEL", model, repr(drawn))
    return model_case(shop, "MODEL", model, path.read_text()[-60:])


@way
def _broken_config_json_too(shop: Workshop) -> Case:
    return _broken_config_json(shop)


@way
def _broken_safetensors(shop: Workshop) -> Case:
    model = shop.model()
    path = model / "model.safetensors"
    content = path.read_bytes()
    kind = shop.rng.randrange(8)
    if kind == 0:
        path.write_bytes(shop.cut(content))
    elif kind == 1:
        path.write_bytes(b"")
    elif kind == 2:
        path.write_bytes(struct.pack("<Q", 2**62) + content[8:])
    elif kind == 3:
        path.write_bytes(content[:8] + shop.noise(40) + content[48:])
    elif kind == 4:
        path.unlink()
    elif kind == 5:
        path.unlink()
        (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    elif kind == 6:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content[:-1])
    return model_case(shop, "MODEL", model, str(kind))


@way
def _broken_index(shop: Workshop) -> Case:
    model = shop.model()
    text = shop.rng.choice(
        [
            "{",
            "[]",
            "{}",
            '{"weight_map": 3}',
            '{"weight_map": {}}',
            '{"weight_map": {"model.norm.weight": 3}}',
            '{"weight_map": {"model.norm.weight": "gone.safetensors", "lm_head.weight": "model.safetensors"}}',
            json.dumps({"weight_map": {"model.norm.weight": os.path.join("..", "model.safetensors")}}),
            '{"weight_map": {"model.norm.weight": "pytorch_model.bin"}}',
            '{"weight_map": {"model.norm.weight": "."}}',
        ]
    )
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (model / "model.safetensors.index.json").write_text(text)
    return model_case(shop, "MODEL", model, text)


@way
def _weights_that_do_not_fit(shop: Workshop) -> Case:
    import torch
    from safetensors.torch import load_file, save_file

    model = shop.model()
    weights = load_file(model / "model.safetensors")
    name = shop.rng.choice(sorted(weights))
    kind = shop.rng.randrange(3)
    if kind == 0:
        del weights[name]
    elif kind == 1:
        weights[name] = weights[name][: len(weights[name]) // 2].clone()
    else:
        weights[name] = torch.zeros(weights[name].shape, dtype=torch.int32)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model_case(shop, name, model, f"{kind}: {name}")


@way
def _broken_tokenizer(shop: Workshop) -> Case:
    model = shop.model()
    kind = shop.rng.randrange(6)
    if kind == 0:
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (model / file).unlink(missing_ok=True)
    elif kind == 1:
        (model / "tokenizer.json").unlink()
    elif kind == 2:
        (model / "tokenizer.json").write_bytes(shop.cut((model / "tokenizer.json").read_bytes()))
    elif kind == 3:
        (model / "tokenizer_config.json").write_text(shop.rng.choice(["{", "[]", "3", "null"]))
    elif kind == 4:
        (model / "tokenizer.json").write_text(shop.rng.choice(["{}", "[]", '{"model": {}}', "null"]))
    else:
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "NoSuchTokenizer"}))
        (model / "tokenizer.json").unlink()
    return model_case(shop, "tokenizer", model, str(kind))


@way
def _broken_generation_config(shop: Workshop) -> Case:
    model = shop.model()
    text = shop.rng.choice(
        ["{", "[]", "3", '{"eos_token_id": "<|im_end|>"}', '{"eos_token_id": -7}', '{"eos_token_id": [1.5]}',
         '{"eos_token_id": [[2]]}', '{"eos_token_id": {"a": 1}}']
    )  # fmt: skip
    (model / "generation_config.json").write_text(text)
    return model_case(shop, "generation_config.json", model, text)


@way
def _code_in_a_model_folder(shop: Workshop) -> Case:
    """Python code in the model folder, which transformers would run with trust_remote_code."""
    model = shop.model()
    code = f"open({str(shop.root / CANARY)!r}, 'w').close()\nclass Own: pass\n"
    (model / "own.py").write_text(code)
    if shop.rng.random() < 0.5:
        content = json.loads((model / "config.json").read_text())
        auto = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
        (model / "config.json").write_text(json.dumps({**content, "model_type": "own", "auto_map": auto}))
        return model_case(shop, "MODEL", model, "config")
    content = json.loads((model / "tokenizer_config.json").read_text())
    auto_map = {"AutoTokenizer": ["own.Own", None]}
    (model / "tokenizer.json").unlink()
    text = json.dumps({**content, "tokenizer_class": "Own", "auto_map": auto_map})
    (model / "tokenizer_config.json").write_text(text)
    return model_case(shop, "tokenizer", model, "tokenizer")


@way
def _invalid_model_name(shop: Workshop) -> Case:
    owner = shop.rng.choice(["policy", "teacher"])
    name = shop.rng.choice(
        ["''", "nowhere", "./nowhere", "no-one/nothing", "a/b/c", "/dev/null", "~", "..", "https://x/y", "a//b", "a/",
         "no one/nothing", "no-one/nothing@main", "x" * 300 + "/y", f"{shop.root}/recipe.yaml"]
    )  # fmt: skip
    key = f"{owner}.model_name="
    return shop.case(key, f"{key}{name}", f"{owner}.tokenizer.name={shop.root}/student")


@way
def _invalid_tokenizer_name(shop: Workshop) -> Case:
    owner = shop.rng.choice(["policy", "teacher"])
    names = ["''", "nowhere", "no-one/nothing", "/dev/null", f"{shop.root}/logs", f"{shop.root}/stranger"]
    name = shop.rng.choice(names)
    return shop.case("tokenizer", f"{owner}.tokenizer.name={name}")
