"""FP8 checkpoints: read the quantization settings, find the scales, and dequantize slices of weights.

In every supported format the value of a weight is q * scale, where q is the stored FP8 number. This also holds for a
scale with the name ``weight_scale_inv``. A scale applies to a block of a weight: some rows and columns, a complete row,
or the complete weight. Other quantization methods raise a UserError that names the method.
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

from distill.errors import show
from distill.model.hf_index import ModelSetting, StoredTensor, json_object

FP8 = ("F8_E4M3", "F8_E5M2")
"""Safetensors names of the FP8 element types; their values must be multiplied by a scale."""
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_INSTEAD = "choose the unquantized original of the model or, for a teacher, an FP8 checkpoint of the model"
_UNNAMED = "an unnamed method"
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
"""Supported values of compressed-tensors' setting ``format`` (unpacked FP8 weights); None: not set."""


@dataclass(frozen=True)
class Layout:
    """Block size of a quantized weight matrix: all elements of one block share one scale."""

    rows: int | None
    """Number of rows of a block; None: all rows of the matrix."""
    columns: int | None
    """Number of columns of a block; None: all columns of the matrix."""

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the numbers of blocks along the rows and along the columns of a matrix.

        ``shape``: shape of the matrix. The last block of either axis may be partial.
        """
        rows, columns = shape
        return -(-rows // (self.rows or rows)), -(-columns // (self.columns or columns))


_TENSOR, _CHANNEL = Layout(None, None), Layout(1, None)


@dataclass(frozen=True)
class Quantization:
    """FP8 quantization method of a model and the block sizes that its configuration allows."""

    method: str
    """Name of the method: fp8, fbgemm_fp8, compressed-tensors or modelopt."""
    layouts: tuple[Layout, ...]
    """Allowed block sizes; all elements of a block share one scale."""


@dataclass(frozen=True)
class WeightScale:
    """Scales of one FP8 weight."""

    stored: StoredTensor
    """File, name and shape of the tensor that contains the scales."""
    layout: Layout
    """Block size of the weight: all elements of one block share one scale."""


def read_quantization(folder: Path, setting: ModelSetting) -> Quantization | None:
    """Return the FP8 quantization that a model's files declare, or None if they declare no quantization.

    Raises UserError for any other quantization method, and for invalid or unsupported settings of an FP8 method.
    """
    found = _declared(folder, setting)
    if found is None:
        return None
    place, settings = found
    if not isinstance(settings, dict) or not settings:
        raise setting.error(
            f"has {place}={show(settings)}, which must be a non-empty object",
            "remove this entry, or download the model again",
        )
    method = _method(settings)
    if method == "fp8":
        return Quantization(method, tuple(_fp8_layouts(settings, place, setting)))
    if method == "fbgemm_fp8":
        return Quantization(method, (_CHANNEL,))
    if method == "compressed-tensors":
        return Quantization(method, tuple(_compressed_layouts(settings, place, setting)))
    if method == "modelopt":
        return Quantization(method, _modelopt_layouts(settings, place, setting))
    raise setting.error(
        f"is quantized with {_NAMES.get(method, method)} ({place}), which is not supported",
        f"{_INSTEAD}; if its weights are not quantized, remove {place}",
    )


def _declared(folder: Path, setting: ModelSetting) -> tuple[str, Any] | None:
    """Return (location, settings) of a model's declared quantization; None: it declares no quantization.

    The location, used in error messages, is a key of config.json or the name of another file. vLLM and transformers
    read the settings from the same locations.
    """
    config = json_object(folder / "config.json", setting)
    nested = config.get("text_config")
    for section, prefix in ((config, ""), (nested if isinstance(nested, dict) else {}, "text_config.")):
        for key in ("quantization_config", "compression_config", "quantization"):
            if section.get(key) is not None:
                return f"config.json's {prefix}{key}", section[key]
    methods = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
    for file, method in methods.items():
        if (folder / file).is_file():
            return file, {"quant_method": method, **json_object(folder / file, setting)}
    return None


def _method(settings: Mapping[str, Any]) -> str:
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"
    if method is None and ("quant_algo" in settings or isinstance(settings.get("quantization"), dict)):
        return "modelopt"
    if method is None and "config_groups" in settings:
        return "compressed-tensors"
    return _UNNAMED if method is None else str(method)


def _fp8_layouts(settings: Mapping[str, Any], place: str, setting: ModelSetting) -> Iterator[Layout]:
    """Yield the block sizes that the method fp8 allows (the format of DeepSeek, Qwen and Mistral).

    If the setting weight_block_size has a value, only this size is allowed. If the value is null, a scale applies to a
    complete weight or to a row. If the setting is missing, a scale may also apply to a block of 128 x 128.
    """
    if "weight_block_size" not in settings:
        yield from (_TENSOR, _CHANNEL)
        yield Layout(128, 128)  # transformers' default
    elif (block := settings["weight_block_size"]) is None:
        yield from (_TENSOR, _CHANNEL)
    else:
        yield _block(block, f"{place}.weight_block_size", setting)


def _block(block: Any, place: str, setting: ModelSetting) -> Layout:
    if isinstance(block, str):  # older notation of compressed-tensors, 128x128
        block = [int(part) if part.isdecimal() else part for part in block.split("x")]
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        problem = f"has {place}={show(block)}, which must be two positive integers (rows and columns)"
        raise setting.error(problem, "download the model again")
    return Layout(*block)


def _compressed_layouts(settings: Mapping[str, Any], place: str, setting: ModelSetting) -> Iterator[Layout]:
    """Yield the block size of each entry of ``config_groups`` in compressed-tensors' ``settings``.

    An entry applies to the weights whose scale tensor has a shape that fits the entry's block size.
    """
    sparsity = settings.get("sparsity_config") or {}
    formats = [settings.get("format"), sparsity.get("format") if isinstance(sparsity, dict) else "sparsity"]
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        problem = f"has {place}.config_groups={show(groups)}, which must be an object with one object per group"
        raise setting.error(problem, "download the model again")
    for wrong in [*formats, *(group.get("format") for group in groups.values())]:
        if wrong not in _COMPRESSED_FORMATS:
            problem = f"has {place} with the compressed-tensors format {wrong}, which is not supported"
            raise setting.error(problem, _INSTEAD)
    transforms = settings.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        raise setting.error(f"has {place} with a transform_config (rotations), which is not supported", _INSTEAD)
    for name, group in groups.items():
        if (weights := group.get("weights")) is not None:
            yield _compressed_layout(weights, f"{place}.config_groups.{name}.weights", setting)


def _compressed_layout(weights: Any, place: str, setting: ModelSetting) -> Layout:
    settings: dict[str, Any] = weights if isinstance(weights, dict) else {}
    kind, bits = settings.get("type", "int"), settings.get("num_bits", 8)
    if kind != "float" or bits != 8 or settings.get("symmetric", True) is not True or settings.get("actorder"):
        details = ", but not symmetric or with an actorder" if kind == "float" and bits == 8 else ""
        problem = f"has {place} with type={kind} and num_bits={bits}{details}, which is not supported"
        raise setting.error(problem, _INSTEAD)
    group = settings.get("group_size")
    strategy = settings.get("strategy") or ("tensor" if group is None else "channel" if group == -1 else "group")
    if strategy == "tensor":
        return _TENSOR
    if strategy == "channel":
        return _CHANNEL
    if strategy == "block":
        return _block(settings.get("block_structure"), f"{place}.block_structure", setting)
    if strategy == "group" and type(group) is int and group > 0:
        return Layout(1, group)
    raise setting.error(
        f"has {place} with strategy={strategy} and group_size={group}, which is not supported", _INSTEAD
    )


def _modelopt_layouts(settings: Mapping[str, Any], place: str, setting: ModelSetting) -> tuple[Layout, ...]:
    nested = settings.get("quantization")
    algorithm = (nested if isinstance(nested, dict) else settings).get("quant_algo", _UNNAMED)
    layouts = {
        "NONE": (),  # null: only the KV cache is quantized
        "FP8": (_TENSOR,),
        "FP8_PER_CHANNEL_PER_TOKEN": (_CHANNEL,),
        "FP8_PB_WO": (Layout(128, 128),),
    }
    if (name := str(algorithm).upper()) not in layouts:
        raise setting.error(f"is quantized with ModelOpt's {name} ({place}), which is not supported", _INSTEAD)
    return layouts[name]


def scale_of(name: str, tensors: Mapping[str, StoredTensor], quantization: Quantization | None) -> WeightScale | str:
    """Return the scale of the FP8 weight ``name``, or the reason (text) why its scale is undefined.

    ``tensors``: headers of all tensors of the model, by name.
    """
    if quantization is None:
        return "config.json has no quantization_config, which would define how to apply the scale of this weight"
    candidates = [f"{name}_scale_inv", f"{name}_scale"]
    if quantization.method == "fp8":
        candidates.append(f"{name.removesuffix('.weight')}.scale")
    found = [tensors[candidate] for candidate in candidates if candidate in tensors]
    if len(found) != 1:
        if found:
            return f"it has {len(found)} scale tensors ({', '.join(s.name for s in found)}) instead of 1"
        return f"its scale tensor ({candidates[1]} or {candidates[0].rpartition('.')[2]}) is missing"
    (scale,) = found
    if scale.dtype not in _SCALES:
        return f"its scale {scale.name} has the unsupported element type {scale.dtype}"
    fitting = [layout for layout in quantization.layouts if _fits(layout, tensors[name].shape, scale.shape)]
    if len({_sizes(layout, tensors[name].shape) for layout in fitting}) != 1:
        return (
            f"its scale {scale.name} has the shape {scale.shape}, which"
            f" {'fits several' if fitting else 'fits none'} of the block sizes of the {quantization.method}"
            f" quantization for a weight of shape {tensors[name].shape}"
        )
    return WeightScale(scale, fitting[0])


def _fits(layout: Layout, weight: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    if layout == _TENSOR:
        return prod(scale) == 1
    if len(weight) != 2:
        return False
    rows, columns = layout.grid(weight)
    # ModelOpt writes blocks as [rows, 1, columns, 1]; scales per row exist with and without a second axis.
    return scale in ((rows, columns), (rows, 1, columns, 1)) or (layout == _CHANNEL and scale == (rows,))


def _sizes(layout: Layout, weight: tuple[int, ...]) -> tuple[int, ...]:
    """Return the block size of ``layout``, limited to the weight's shape ``weight``.

    Two layouts with the same result are equivalent for this weight.
    """
    if layout == _TENSOR:
        return weight
    return min(layout.rows or weight[0], weight[0]), min(layout.columns or weight[1], weight[1])


def weight_scales(tensors: Mapping[str, StoredTensor], quantization: Quantization | None) -> dict[str, WeightScale]:
    """Return a dictionary from weight name to scales for the FP8 weights that have a defined scale."""
    found = {name: scale_of(name, tensors, quantization) for name, stored in tensors.items() if stored.dtype in FP8}
    return {name: scale for name, scale in found.items() if isinstance(scale, WeightScale)}


def dequantized(weight: StoredTensor, scale: WeightScale, slices: tuple[slice, ...] | None) -> Tensor:
    """Return a slice of an FP8 weight in float32; read only this slice and the scales of its blocks.

    ``slices``: slices of step 1, at most one per axis, which may begin and end inside a block; None: the complete
    weight.
    """
    spans = [range(*part.indices(length)) for part, length in zip(slices or (), weight.shape, strict=False)]
    spans += [range(length) for length in weight.shape[len(spans) :]]
    with safe_open(weight.file, framework="pt") as file:
        q: Tensor = file.get_slice(weight.name)[tuple(slice(span.start, span.stop) for span in spans)]
    return q.float() * _scale_of_elements(weight, scale, spans)


def _scale_of_elements(weight: StoredTensor, scale: WeightScale, spans: list[range]) -> Tensor:
    """Return the scales of a weight's elements in ``spans``, broadcastable to the shape of the elements.

    ``spans``: index range of the elements along each axis.
    """
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
