"""FP8 checkpoints: which quantization a checkpoint has, which scale belongs to which weight, slices in plain floats.

Every format that is read here stores a weight as q and defines it as q * scale, also where the scale is named
``weight_scale_inv``. All other quantization methods are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from distill.errors import UserError, show
from distill.model.hf_index import StoredTensor, json_object

FP8 = ("F8_E4M3", "F8_E5M2")
"""Element types, as safetensors names them, that are numbers only together with a scale."""
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_INSTEAD = "choose the unquantised original of the model, or an FP8 checkpoint of it for a teacher"
_NAMES = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "quark": "Quark",
    "auto-round": "AutoRound",
}
_COMPRESSED_FORMATS = (None, "dense", "float-quantized", "naive-quantized", "mixed-precision")
"""Formats of compressed-tensors that keep FP8 weights unpacked under their own names."""


@dataclass(frozen=True)
class Layout:
    """How many rows and columns of a weight share one scale; None: all of them."""

    rows: int | None
    columns: int | None

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the scales of a matrix; the last block of either may be partial."""
        rows, columns = shape
        return -(-rows // (self.rows or rows)), -(-columns // (self.columns or columns))


_TENSOR, _CHANNEL = Layout(None, None), Layout(1, None)


@dataclass(frozen=True)
class Quantization:
    """An FP8 method: the layouts of scales that its configuration allows."""

    method: str
    layouts: tuple[Layout, ...]


@dataclass(frozen=True)
class WeightScale:
    """The scale of one FP8 weight, and which part of the weight shares an element of it."""

    stored: StoredTensor
    layout: Layout


def read_quantization(folder: Path, what: str) -> Quantization | None:
    """The FP8 quantization that the files of a model declare; None where none is declared.

    Raises UserError, beginning with ``what``, for every other method and for an FP8 one whose settings don't define
    the weights.
    """
    found = _declared(folder, what)
    if found is None:
        return None
    place, settings = found
    if not isinstance(settings, dict) or not settings:
        raise UserError(
            f"{what} has {place}={show(settings)}, which describes no quantization: remove that entry, or download it"
            " again"
        )
    method = _method(settings)
    if method == "fp8":
        return Quantization(method, tuple(_fp8_layouts(settings, f"{what} has {place}")))
    if method == "fbgemm_fp8":
        return Quantization(method, (_CHANNEL,))
    if method == "compressed-tensors":
        return Quantization(method, tuple(_compressed_layouts(settings, f"{what} has {place}")))
    if method == "modelopt":
        return Quantization(method, _modelopt_layouts(settings, what, place))
    raise UserError(
        f"{what} is quantized with {_NAMES.get(method, method)} ({place}), which is not supported: {_INSTEAD}; if its"
        " weights are stored as plain floats, remove that entry or file"
    )


def _declared(folder: Path, what: str) -> tuple[str, Any] | None:
    """Where the quantization is declared, and its settings. vLLM and transformers look in the same places."""
    config = json_object(folder / "config.json", what)
    nested = config.get("text_config")
    for section, prefix in ((config, ""), (nested if isinstance(nested, dict) else {}, "text_config.")):
        for key in ("quantization_config", "compression_config", "quantization"):
            if section.get(key) is not None:
                return f"config.json's {prefix}{key}", section[key]
    for file, method in (("hf_quant_config.json", "modelopt"), ("quantize_config.json", "gptq")):
        if (folder / file).is_file():
            return file, {"quant_method": method, **json_object(folder / file, what)}
    if (folder / "quant_config.json").is_file():
        return "quant_config.json", {"quant_method": "awq", **json_object(folder / "quant_config.json", what)}
    return None


def _method(settings: Mapping[str, Any]) -> str:
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"
    if method is None and ("quant_algo" in settings or isinstance(settings.get("quantization"), dict)):
        return "modelopt"
    if method is None and "config_groups" in settings:
        return "compressed-tensors"
    return "a method that it does not name" if method is None else str(method)


def _fp8_layouts(settings: Mapping[str, Any], where: str) -> Iterator[Layout]:
    """The format of DeepSeek, Qwen and Mistral: blocks by weight_block_size, else one scale a tensor or a row."""
    if "weight_block_size" not in settings:
        yield from (_TENSOR, _CHANNEL)
        yield Layout(128, 128)  # transformers' default
    elif (block := settings["weight_block_size"]) is None:
        yield from (_TENSOR, _CHANNEL)
    else:
        yield _block(block, f"{where}.weight_block_size")


def _block(block: Any, where: str) -> Layout:
    if isinstance(block, str):  # compressed-tensors' older notation, 128x128
        block = [int(part) if part.isdecimal() else part for part in block.split("x")]
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise UserError(f"{where}={show(block)}, which gives no rows and columns of a block: download it again")
    return Layout(*block)


def _compressed_layouts(settings: Mapping[str, Any], where: str) -> Iterator[Layout]:
    """The layouts of all groups; the shape of a weight's scale decides which group it belongs to."""
    sparsity = settings.get("sparsity_config") or {}
    formats = [settings.get("format"), sparsity.get("format") if isinstance(sparsity, dict) else "sparsity"]
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise UserError(f"{where}.config_groups={show(groups)}, which holds no groups: download it again")
    for wrong in [*formats, *(group.get("format") for group in groups.values())]:
        if wrong not in _COMPRESSED_FORMATS:
            raise UserError(f"{where} of compressed-tensors' format {wrong}, which is not supported: {_INSTEAD}")
    transforms = settings.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        raise UserError(f"{where} with a transform_config, whose rotations are not supported: {_INSTEAD}")
    for name, group in groups.items():
        if (weights := group.get("weights")) is not None:
            yield _compressed_layout(weights, f"{where}.config_groups.{name}.weights")


def _compressed_layout(weights: Any, where: str) -> Layout:
    settings: dict[str, Any] = weights if isinstance(weights, dict) else {}
    kind, bits = settings.get("type", "int"), settings.get("num_bits", 8)
    if kind != "float" or bits != 8 or settings.get("symmetric", True) is not True or settings.get("actorder"):
        details = ", not symmetric or reordered" if kind == "float" and bits == 8 else ""
        raise UserError(f"{where} of type {kind} with {bits} bits{details}, which is not supported: {_INSTEAD}")
    group = settings.get("group_size")
    strategy = settings.get("strategy") or ("tensor" if group is None else "channel" if group == -1 else "group")
    if strategy == "tensor":
        return _TENSOR
    if strategy == "channel":
        return _CHANNEL
    if strategy == "block":
        return _block(settings.get("block_structure"), f"{where}.block_structure")
    if strategy == "group" and type(group) is int and group > 0:
        return Layout(1, group)
    raise UserError(f"{where} of strategy {strategy} with group_size={group}, which is not supported: {_INSTEAD}")


def _modelopt_layouts(settings: Mapping[str, Any], what: str, place: str) -> tuple[Layout, ...]:
    nested = settings.get("quantization")
    algorithm = (nested if isinstance(nested, dict) else settings).get("quant_algo", "a method that it does not name")
    layouts = {
        "NONE": (),  # null: only the KV cache is quantized
        "FP8": (_TENSOR,),
        "FP8_PER_CHANNEL_PER_TOKEN": (_CHANNEL,),
        "FP8_PB_WO": (Layout(128, 128),),
    }
    if (name := str(algorithm).upper()) not in layouts:
        raise UserError(f"{what} is quantized with ModelOpt's {name} ({place}), which is not supported: {_INSTEAD}")
    return layouts[name]


def scale_of(name: str, tensors: Mapping[str, StoredTensor], quantization: Quantization | None) -> WeightScale | str:
    """The scale of the FP8 weight ``name``, or why it has none that is well defined."""
    if quantization is None:
        return "config.json has no quantization_config that defines how its scale is applied"
    candidates = [f"{name}_scale_inv", f"{name}_scale"]
    if quantization.method == "fp8":
        candidates.append(f"{name.removesuffix('.weight')}.scale")
    found = [tensors[candidate] for candidate in candidates if candidate in tensors]
    if len(found) != 1:
        return (
            f"it has {len(found)} tensors of scales ({', '.join(s.name for s in found)})"
            if found
            else (f"its scale ({candidates[1]} or {candidates[0].rpartition('.')[2]}) is missing")
        )
    (scale,) = found
    if scale.dtype not in _SCALES:
        return f"its scale {scale.name} has the element type {scale.dtype}"
    fitting = [layout for layout in quantization.layouts if _fits(layout, tensors[name].shape, scale.shape)]
    if len({_sizes(layout, tensors[name].shape) for layout in fitting}) != 1:
        return (
            f"its scale {scale.name} has the shape {scale.shape}, which"
            f" {'fits several groups' if fitting else 'does not follow from the settings'} of the"
            f" {quantization.method} quantization for a weight of shape {tensors[name].shape}"
        )
    return WeightScale(scale, fitting[0])


def _fits(layout: Layout, weight: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    if layout == _TENSOR:
        return prod(scale) == 1
    if len(weight) != 2:
        return False
    rows, columns = layout.grid(weight)
    # ModelOpt writes blocks as [rows, 1, columns, 1]; a scale a row is written with and without its second axis.
    return scale in ((rows, columns), (rows, 1, columns, 1)) or (layout == _CHANNEL and scale == (rows,))


def _sizes(layout: Layout, weight: tuple[int, ...]) -> tuple[int, ...]:
    """Rows and columns of a block of this weight, so that two layouts with the same blocks are equal."""
    if layout == _TENSOR:
        return weight
    return min(layout.rows or weight[0], weight[0]), min(layout.columns or weight[1], weight[1])


def weight_scales(tensors: Mapping[str, StoredTensor], quantization: Quantization | None) -> dict[str, WeightScale]:
    """The scale of every FP8 weight that has a well-defined one, by the weight's name."""
    found = {name: scale_of(name, tensors, quantization) for name, stored in tensors.items() if stored.dtype in FP8}
    return {name: scale for name, scale in found.items() if isinstance(scale, WeightScale)}


def dequantized(weight: StoredTensor, scale: WeightScale, slices: tuple[slice, ...] | None) -> Tensor:
    """A slice of an FP8 weight in float32; only this slice and the scales of its blocks are read.

    ``slices``: of step 1, one for each axis or fewer; they may begin and end inside of blocks.
    """
    spans = [range(*part.indices(length)) for part, length in zip(slices or (), weight.shape, strict=False)]
    spans += [range(length) for length in weight.shape[len(spans) :]]
    with safe_open(weight.file, framework="pt") as file:
        q: Tensor = file.get_slice(weight.name)[tuple(slice(span.start, span.stop) for span in spans)]
    return q.float() * _scale_of_elements(weight, scale, spans)


def _scale_of_elements(weight: StoredTensor, scale: WeightScale, spans: list[range]) -> Tensor:
    """The scales of the elements in ``spans``, one for each element or broadcast."""
    with safe_open(scale.stored.file, framework="pt") as file:
        if scale.layout == _TENSOR:
            value: Tensor = file.get_tensor(scale.stored.name)
            return value.float().reshape(())
        sizes = [scale.layout.rows or weight.shape[0], scale.layout.columns or weight.shape[1]]
        blocks = [range(s.start // size, -(-s.stop // size)) for s, size in zip(spans, sizes, strict=True)]
        taken = [slice(block.start, block.stop) for block in blocks]
        if len(scale.stored.shape) == 4:
            taken = [taken[0], slice(0, 1), taken[1], slice(0, 1)]
        part: Tensor = file.get_slice(scale.stored.name)[tuple(taken[: len(scale.stored.shape)])]
    grid = part.float().reshape(len(blocks[0]), len(blocks[1]))
    for axis, (span, size, block) in enumerate(zip(spans, sizes, blocks, strict=True)):
        if len(block) > 1 and size > 1:
            grid = grid.index_select(axis, torch.arange(span.start, span.stop) // size - block.start)
    return grid
