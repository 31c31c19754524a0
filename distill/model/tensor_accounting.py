"""Compare all tensors of a checkpoint with the model's parameters, before weights are loaded."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from distill.model.hf_files import FLOAT_TYPES, ModelFiles
from distill.model.hf_index import ModelSetting
from distill.model.hf_load import manifest_of, meta_model
from distill.model.quantized_weights import FP8, read_quantization, scale_of

log = logging.getLogger(__name__)

_ACTIVATION_SCALE = re.compile(
    r"(^|[._])(input|output|activation|act|input_activation|k|v|q|kv|qkv|prob|attn|softmax)_(scale|zero_point)(_ub)?$"
)
"""Matches names of scales of activations or of the KV cache; weights do not depend on these scales."""
_PART_OF_A_WEIGHT = re.compile(
    r"(^|[._])(scales?|scale_inv|scale_\d|scale_and_zero|zeros?|zero_points?|qweight|qzeros|qscales|g_idx|packed|shape"
    r"|global_scale|blocks|codes|codebooks?|absmax|quant_map|nested_\w+|quant_state\S*|SCB|CB|weight_format|bitmask"
    r"|compressed|row_offsets|amax|meta|outliers?\w*|weight_[guv]|original\d|lora_\S+|lokr_\S+|hada_\S+|base_layer\S*"
    r"|magnitude\S*|smooth\w*)$"
)
"""Matches tensor names whose ending indicates a quantized or packed weight, or an adapter."""


def check_tensors(files: ModelFiles, config: Any, key: str) -> None:
    """Compare the tensors of a checkpoint with the parameters of the model that ``config`` describes.

    Raises UserError for a missing tensor, a different shape, an unsupported element type, and a tensor whose name
    indicates quantized or packed weights. Logs a warning for tensors that match no parameter, except those that
    transformers ignores silently. ``key``: the configuration key that names the checkpoint. Reads only the headers of
    the files. Not collective.
    """
    setting = ModelSetting(key, files.name)
    model = meta_model(config, "eager", torch.float32)
    needed = manifest_of(model)
    if missing := sorted(needed.keys() - files.tensors.keys()):
        extra = sorted(files.tensors.keys() - needed.keys())
        raise setting.error(
            f"lacks {_listed(missing)} of the {len(needed)} that its config.json defines"
            f"{f', and holds {_listed(extra)} that config.json does not define' if extra else ''}",
            "download the model again, or choose a complete checkpoint of this model",
        )
    for name, shape in needed.items():
        if files.shape(name) != tuple(shape):
            raise setting.error(
                f"has the tensor {name} with the shape {files.shape(name)}, but its config.json defines the shape"
                f" {tuple(shape)}",
                "download all of its files again",
            )
    _check_types(files, needed, setting)
    _check_unused(files, model, needed, setting)
    _report_quantization(files, needed, setting)


def _check_types(files: ModelFiles, needed: Collection[str], setting: ModelSetting) -> None:
    for name in needed:
        stored = files.tensors[name]
        if stored.dtype in FLOAT_TYPES or name in files.scales:
            continue
        if stored.dtype not in FP8:
            raise setting.error(
                f"has the tensor {name} in the unsupported element type {stored.dtype}",
                "choose the unquantized original of the model",
            )
        why = scale_of(name, files.tensors, read_quantization(files.folder, setting))
        raise setting.error(
            f"has the weight {name} in FP8 ({stored.dtype}) with undefined values, because {why}",
            "download the model again, or choose the unquantized original of the model",
        )


def _check_unused(files: ModelFiles, model: PreTrainedModel, needed: Collection[str], setting: ModelSetting) -> None:
    """Check the tensors in the files that match no parameter of the model.

    Raises UserError for a tensor whose name indicates that a weight is quantized or packed. Logs a warning for other
    tensors, except activation scales and tensors that transformers ignores silently.
    """
    used = {scale.stored.name for scale in files.scales.values()}
    left = [name for name, stored in files.tensors.items() if name not in needed and stored.name not in used]
    dropped = _dropped_silently(model)
    left = [name for name in left if not _ACTIVATION_SCALE.search(name) and not dropped(name)]
    modules = {name.rpartition(".")[0] for name in needed}
    if parts := sorted(name for name in left if _PART_OF_A_WEIGHT.search(name) and _within(name, modules)):
        raise setting.error(
            f"holds {_listed(parts)}, so its weights are quantized or packed in an unsupported format",
            "choose the unquantized original of the model",
        )
    if left:
        log.warning(
            "%s holds %s that match no parameter of the model: transformers ignores such tensors, and so does this run",
            *(setting, _listed(sorted(left))),
        )


def _within(name: str, modules: Collection[str]) -> bool:
    """Return whether the tensor ``name`` is inside one of ``modules``, at any depth.

    For example, q_proj.weight.absmax is inside the module q_proj.
    """
    parts = name.split(".")
    return any(".".join(parts[:end]) in modules for end in range(1, len(parts)))


def _dropped_silently(model: PreTrainedModel) -> Callable[[str], bool]:
    """Return a predicate: whether ``from_pretrained`` silently ignores the tensor with a given name."""
    tied = tied_names(model)
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [buffer for buffer, _ in model.named_buffers()]
    if any(buffer.endswith("rotary_emb.inv_freq") for buffer in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(buffer.endswith("position_ids") for buffer in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return lambda name: name in tied or any(re.search(pattern, name) for pattern in patterns)


def tied_names(model: PreTrainedModel) -> set[str]:
    """Return the names of parameters that share the tensor of another parameter, such as a tied LM head."""
    every = dict(model.named_parameters(remove_duplicate=False))
    return every.keys() - dict(model.named_parameters()).keys()


def _report_quantization(files: ModelFiles, needed: Collection[str], setting: ModelSetting) -> None:
    quantization = read_quantization(files.folder, setting)
    count = sum(name in files.scales for name in needed)
    if quantization is None:
        return
    if not count:
        log.warning(
            "%s declares the quantization %s, but its weights are not quantized: they are used as stored",
            *(setting, quantization.method),
        )
    elif setting.key.startswith("policy."):
        log.warning(
            "%s is an FP8 checkpoint (%s): its %d quantized weights are dequantized, trained and exported unquantized;"
            " choose the unquantized original of the model if it is available",
            *(setting, quantization.method, count),
        )
    else:
        log.info(
            "%s is an FP8 checkpoint (%s): its %d quantized weights are dequantized",
            *(setting, quantization.method, count),
        )


def _listed(names: Iterable[str]) -> str:
    """Return a text such as "5 tensors (a, b, c, ...)", with the number and the first three names."""
    names = list(names)
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({', '.join(names[:3])}{more})"
