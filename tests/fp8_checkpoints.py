"""FP8 checkpoints for tests, with their dequantized weights computed block by block."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Block = tuple[int, int]


def change_config(folder: Path, **changes: Any) -> None:
    """Change entries of config.json; None removes an entry."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Edit the tensors of model.safetensors in place with ``change``."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def quantize(weight: Tensor, block: Block, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor, Tensor]:
    """Return FP8 elements, scales [block rows, block columns] and dequantized weight; edge blocks may be partial."""
    rows, columns = weight.shape
    scale = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    q, values = torch.empty(rows, columns, dtype=dtype), torch.empty(rows, columns)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale[i, j] = weight[place].abs().max() / torch.finfo(dtype).max
            q[place] = (weight[place] / scale[i, j]).to(dtype)
            values[place] = q[place].float() * scale[i, j].item()
    return q, scale, values


def compressed(**weights: Any) -> dict[str, Any]:
    """Return a quantization_config of compressed-tensors with one group."""
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FORMATS: dict[str, tuple[dict[str, Any], Block, str, Callable[[Tensor], Tensor]]] = {
    # quantization_config, block (0: the complete axis), end of the scale's name, shape in which it is stored
    "fp8 in blocks": ({"quant_method": "fp8", "weight_block_size": [32, 32]}, (32, 32), "_scale_inv", lambda s: s),
    "fp8 in partial blocks": (
        {"quant_method": "fp8", "weight_block_size": [48, 40], "modules_to_not_convert": ["lm_head"]},
        *((48, 40), "_scale_inv", lambda s: s),
    ),
    "fp8 with default blocks": ({"quant_method": "fp8"}, (128, 128), "_scale_inv", lambda s: s),
    "fp8 with powers of two": (
        {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
        *((32, 32), "_scale_inv", lambda s: s.to(torch.float8_e8m0fnu)),
    ),
    "fp8 per tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, (0, 0), "_scale", lambda s: s[0, 0]),
    "fp8 per tensor, no blocks": (
        {"quant_method": "fp8", "weight_block_size": None},
        *((0, 0), "_scale_inv", lambda s: s.reshape(1)),
    ),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, (1, 0), "_scale", lambda s: s),
    "compressed-tensors per tensor": (compressed(strategy="tensor"), (0, 0), "_scale", lambda s: s.reshape(1)),
    "compressed-tensors per channel": (compressed(strategy="channel"), (1, 0), "_scale", lambda s: s),
    "compressed-tensors per channel, bfloat16": (compressed(strategy="channel"), (1, 0), "_scale", Tensor.bfloat16),
    "compressed-tensors per channel, one axis": (compressed(strategy="channel"), (1, 0), "_scale", lambda s: s[:, 0]),
    "compressed-tensors in blocks": (
        compressed(strategy="block", block_structure=[48, 40]),
        *((48, 40), "_scale", lambda s: s),
    ),
    "compressed-tensors in groups": (compressed(strategy="group", group_size=16), (1, 16), "_scale", lambda s: s),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, (0, 0), "_scale", lambda s: s[0, 0]),
    "modelopt per channel": (
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        *((1, 0), "_scale", lambda s: s),
    ),
    "modelopt in blocks": (
        {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
        *((128, 128), "_scale", lambda s: s[:, None, :, None]),
    ),
}


def to_fp8(folder: Path, kind: str, dtype: torch.dtype = torch.float8_e4m3fn) -> dict[str, Tensor]:
    """Quantize the layers of a tiny model in place; return all of its tensors dequantized, in float32."""
    settings, block, suffix, stored = FORMATS[kind]
    values: dict[str, Tensor] = {}

    def change(tensors: dict[str, Tensor]) -> None:
        for name, weight in list(tensors.items()):
            values[name] = weight.float()
            if "_proj.weight" in name:
                rows, columns = block[0] or weight.shape[0], block[1] or weight.shape[1]
                q, scale, values[name] = quantize(weight, (rows, columns), dtype)
                tensors[name], tensors[f"{name}{suffix}"] = q, stored(scale)
                if (
                    (rounded := stored(scale).float().reshape(scale.shape)).ne(scale).any()
                ):  # the scales are stored with less precision
                    expanded = rounded.repeat_interleave(rows, 0)[: weight.shape[0]]
                    values[name] = q.float() * expanded.repeat_interleave(columns, 1)[:, : weight.shape[1]]
                tensors[name.replace(".weight", ".input_scale")] = torch.tensor([7.0])
        tensors["model.layers.0.self_attn.k_scale"] = torch.tensor(3.0)

    change_weights(folder, change)
    change_config(folder, quantization_config=settings)
    return values
