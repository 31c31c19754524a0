"""Account for every tensor of a checkpoint before any weight is loaded, from the headers of its files alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from distill.errors import UserError
from distill.model.hf_files import PLAIN, ModelFiles
from distill.model.hf_load import manifest_of, meta_model
from distill.model.quantized_weights import FP8, read_quantization, scale_of

log = logging.getLogger(__name__)

_OF_ACTIVATIONS = re.compile(
    r"(^|[._])(input|output|activation|act|input_activation|k|v|q|kv|qkv|prob|attn|softmax)_(scale|zero_point)(_ub)?$"
)
"""Scales of activations and of the KV cache: they don't change what a weight is."""
_PART_OF_A_WEIGHT = re.compile(
    r"(^|[._])(scales?|scale_inv|scale_\d|scale_and_zero|zeros?|zero_points?|qweight|qzeros|qscales|g_idx|packed|shape"
    r"|global_scale|blocks|codes|codebooks?|absmax|quant_map|nested_\w+|quant_state\S*|SCB|CB|weight_format|bitmask"
    r"|compressed|row_offsets|amax|meta|outliers?\w*|weight_[guv]|original\d|lora_\S+|lokr_\S+|hada_\S+|base_layer\S*"
    r"|magnitude\S*|smooth\w*)$"
)
"""Ends of names whose tensor, beside a weight, shows that the weight is not stored as the number that it is."""


def check_tensors(files: ModelFiles, config: Any, key: str) -> None:
    """Compare the tensors of a checkpoint with the parameters of the model that ``config`` describes.

    Raises UserError, naming ``key`` and the tensor, where one is missing, has another shape or an element type that
    does not define its numbers, or where a tensor shows that weights are stored in another form. Logs a warning that
    names the tensors that no parameter takes; those that transformers drops without a message get none. Reads headers
    only; no collective.
    """
    what = f"{key}={files.name}"
    model = meta_model(config, "eager", torch.float32)
    needed = manifest_of(model)
    if missing := sorted(needed.keys() - files.tensors.keys()):
        others = sorted(files.tensors.keys() - needed.keys())
        raise UserError(
            f"{what} lacks {_listed(missing)} of the {len(needed)} that its config.json describes"
            f"{f', and holds {_listed(others)} that it does not describe' if others else ''}: download it again, or"
            " choose a complete checkpoint of this model"
        )
    for name, shape in needed.items():
        if files.shape(name) != tuple(shape):
            raise UserError(
                f"{what} has {name} of another shape than its config.json describes ({files.shape(name)} and"
                f" {tuple(shape)}): the files don't belong together, so download it again"
            )
    _check_types(files, needed, what)
    _check_others(files, model, needed, what)
    _report_quantization(files, needed, key)


def _check_types(files: ModelFiles, needed: Collection[str], what: str) -> None:
    for name in needed:
        stored = files.tensors[name]
        if stored.dtype in PLAIN or name in files.scales:
            continue
        if stored.dtype not in FP8:
            raise UserError(
                f"{what} has {name} in the element type {stored.dtype}, which is no plain float: choose the unquantised"
                " original of the model"
            )
        why = scale_of(name, files.tensors, read_quantization(files.folder, what))
        raise UserError(
            f"{what} has {name} in FP8 ({stored.dtype}), and its values are not defined, as {why}: download it again,"
            " or choose the unquantised original of the model"
        )


def _check_others(files: ModelFiles, model: PreTrainedModel, needed: Collection[str], what: str) -> None:
    """The tensors that are no parameter: ignored by name, refused, or named in a warning."""
    used = {scale.stored.name for scale in files.scales.values()}
    left = [name for name, stored in files.tensors.items() if name not in needed and stored.name not in used]
    dropped = _dropped_silently(model)
    left = [name for name in left if not _OF_ACTIVATIONS.search(name) and not dropped(name)]
    modules = {name.rpartition(".")[0] for name in needed}
    if parts := sorted(name for name in left if _PART_OF_A_WEIGHT.search(name) and _within(name, modules)):
        raise UserError(
            f"{what} holds {_listed(parts)}, which shows that weights are stored in another form than plain floats and"
            " that no supported quantization defines it: choose the unquantised original of the model"
        )
    if left:
        log.warning(
            "%s holds %s that no parameter of its model takes: transformers ignores such tensors, and so does this run",
            *(what, _listed(sorted(left))),
        )


def _within(name: str, modules: Collection[str]) -> bool:
    """Whether a tensor belongs to a module with parameters, at any depth: q_proj.weight.absmax."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in modules for end in range(1, len(parts)))


def _dropped_silently(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether transformers' ``from_pretrained`` leaves the tensor of a name out without a message."""
    tied = tied_names(model)
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [buffer for buffer, _ in model.named_buffers()]
    if any(buffer.endswith("rotary_emb.inv_freq") for buffer in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(buffer.endswith("position_ids") for buffer in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return lambda name: name in tied or any(re.search(pattern, name) for pattern in patterns)


def tied_names(model: PreTrainedModel) -> set[str]:
    """Names of parameters that are another parameter of the model: the head of a model with a tied head."""
    every = dict(model.named_parameters(remove_duplicate=False))
    return every.keys() - dict(model.named_parameters()).keys()


def _report_quantization(files: ModelFiles, needed: Collection[str], key: str) -> None:
    quantization = read_quantization(files.folder, f"{key}={files.name}")
    number = sum(name in files.scales for name in needed)
    if quantization is None:
        return
    if not number:
        log.warning(
            "%s=%s declares the quantization %s, but its weights are stored as plain floats: they are used as stored",
            *(key, files.name, quantization.method),
        )
    elif key.startswith("policy."):
        log.warning(
            "%s=%s is an FP8 checkpoint (%s): its %d quantized weights are dequantized and trained in plain floats, so"
            " the unquantised original is the better start, and exports are in plain floats",
            *(key, files.name, quantization.method, number),
        )
    else:
        log.info(
            "%s=%s is an FP8 checkpoint (%s): its %d quantized weights are dequantized",
            *(key, files.name, quantization.method, number),
        )


def _listed(names: Iterable[str]) -> str:
    """How many tensors, and the first three by name."""
    names = list(names)
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({', '.join(names[:3])}{more})"
