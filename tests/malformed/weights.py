"""Model folders with malformed tensors or quantization settings."""

from __future__ import annotations

import json
from typing import Any

from tests.fp8_checkpoints import FORMATS, change_config, change_weights, compressed, to_fp8
from tests.malformed.case import Case, Workshop, way
from tests.malformed.models import model_case


@way
def _unsupported_quantization(shop: Workshop) -> Case:
    model = shop.model()
    settings: Any = shop.rng.choice(
        [
            {"quant_method": shop.rng.choice(["gptq", "awq", "bitsandbytes", "mxfp4", "mxfp8", "hqq", "torchao", "x"])},
            {"quant_method": "modelopt", "quant_algo": shop.rng.choice(["NVFP4", "W4A8_AWQ", "MXFP8", 3, [1]])},
            {**compressed(strategy="group", group_size=32, type="int", num_bits=4), "format": "pack-quantized"},
            compressed(strategy=shop.rng.choice(["attn_head", "token", 3, ["channel"], {"a": 1}])),
            compressed(strategy="block", block_structure=shop.rng.choice([None, 3, "128", "axb", [128], [0, 1], {}])),
            compressed(strategy="group", group_size=shop.rng.choice([0, -3, "128", 1.5, [1]])),
            compressed(strategy="channel", type=shop.rng.choice(["int", "nonsense", 3, None])),
            {**compressed(strategy="channel"), "config_groups": shop.rng.choice([[1], {"group_0": 3}, "all"])},
            {**compressed(strategy="channel"), "format": shop.rng.choice(["nonsense", 3, ["a"], {"a": 1}])},
            {**compressed(strategy="channel"), "sparsity_config": shop.rng.choice([3, {"format": "sparse-bitmask"}])},
            {"quant_method": "fp8", "weight_block_size": shop.rng.choice([3, [], [128], [0, 128], "128", {"a": 1}])},
            {"quant_method": shop.rng.choice([3, ["fp8"], {"a": 1}])},
            *("fp8", 3, [], {}, [{"quant_method": "fp8"}], {"bits": 4}),
        ]
    )
    key = shop.rng.choice(["quantization_config", "compression_config"])
    change_config(model, **{key: settings})
    return model_case(shop, "MODEL", model, f"{key}: {settings!r}"[:200])


@way
def _broken_quantization_file(shop: Workshop) -> Case:
    model = shop.model()
    name = shop.rng.choice(["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
    text = shop.rng.choice(["{", "[]", "3", "{}", '{"quantization": 3}', '{"quantization": {"quant_algo": "NVFP4"}}'])
    (model / name).write_text(text)
    return model_case(shop, "MODEL", model, f"{name}: {text}")


@way
def _undefined_fp8_weights(shop: Workshop) -> Case:
    import torch

    model = shop.model()
    kind = shop.rng.choice(sorted(FORMATS))
    to_fp8(model, kind)
    broken = shop.rng.randrange(4)

    def change(tensors: dict[str, Any]) -> None:
        name = shop.rng.choice(sorted(name for name in tensors if "weight_scale" in name))
        if broken == 0:
            del tensors[name]
        elif broken == 1:
            tensors[name] = torch.ones(3, 5, 7)
        elif broken == 2:
            tensors[name] = torch.ones(tensors[name].shape, dtype=torch.int32)

    change_weights(model, change)
    if broken == 3:
        change_config(model, quantization_config=None)
    return model_case(shop, "MODEL", model, f"{kind}: {broken}")


@way
def _weights_in_an_unsupported_format(shop: Workshop) -> Case:
    import torch

    model = shop.model()
    ends = "weight_scale weight_scale_inv scales qzeros g_idx weight_packed weight.absmax SCB weight_zero_point"
    ends += " lora_A.weight weight.quant_state.bitsandbytes__nf4 pre_quant_scale"
    end = shop.rng.choice(ends.split())
    name = f"model.layers.1.mlp.up_proj.{end}"
    change_weights(model, lambda tensors: tensors.update({name: torch.ones(4)}))
    return model_case(shop, name, model, name)


@way
def _weights_with_nan_or_infinity(shop: Workshop) -> Case:
    model = shop.model()
    number = shop.rng.choice([float("nan"), float("inf"), -float("inf")])
    named = []

    def change(tensors: dict[str, Any]) -> None:
        named.append(shop.rng.choice(sorted(tensors)))
        tensors[named[0]].view(-1)[:1].fill_(number)

    change_weights(model, change)
    return model_case(shop, named[0], model, f"{named[0]}: {number}")


@way
def _inconsistent_files(shop: Workshop) -> Case:
    import torch
    from safetensors.torch import load_file, save_file

    model = shop.model()
    tensors, index = load_file(model / "model.safetensors"), model / "model.safetensors.index.json"
    name = shop.rng.choice(sorted(tensors))
    kind = shop.rng.randrange(5)
    if kind == 0:
        save_file(tensors, model / "a.safetensors")
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors")}))
    elif kind == 1:
        save_file({name: torch.ones(3)}, model / "b.safetensors")
        placed = {**dict.fromkeys(tensors, "model.safetensors"), name: "b.safetensors"}
        index.write_text(json.dumps({"weight_map": placed}))
    elif kind == 2:
        entries = json.dumps(dict.fromkeys(tensors, "model.safetensors")).strip("{}")
        index.write_text(f'{{"weight_map": {{"{name}": "b.safetensors", {entries}}}}}')
    elif kind == 3:
        (model / "adapter_config.json").write_text("{}")
    else:
        (model / "model.safetensors").rename(model / "consolidated.safetensors")
    return model_case(shop, "MODEL", model, f"{kind}: {name}")
