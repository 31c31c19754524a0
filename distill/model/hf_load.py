"""Build a Hugging Face model without storage, allocate it, and load each rank's part of the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill.model.dtensor import local_shard
from distill.model.hf_files import ModelFiles
from distill.model.hf_index import ModelSetting
from distill.supervise.progress import heartbeat


def meta_model(config: Any, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    """Build a causal language model on the meta device: modules and shapes without storage.

    ``attention``: transformers' ``attn_implementation``.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    model.tie_weights()
    return model


def one_layer_model(config: Any) -> PreTrainedModel:
    """Return the model that ``config`` describes, but with only one layer, on the meta device."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    return meta_model(config, "eager", torch.float32)


def manifest_of(model: nn.Module) -> dict[str, torch.Size]:
    """Return a dictionary from parameter name to shape; tied parameters appear once.

    These are the tensors that are sent to the generation engine.
    """
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def materialize(model: nn.Module, device: torch.device) -> None:
    """Allocate uninitialized storage on ``device`` for a model on the meta device.

    The parameters may already be sharded. Parameters that share one tensor still share it afterwards.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    model.to_empty(device=device)
    for places in owners.values():
        first = getattr(*places[0])
        for module, name in places[1:]:
            if getattr(module, name) is not first:
                module.register_parameter(name, first)


def restore_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Recompute the buffers that checkpoints do not contain; the parameters do not change.

    Such buffers are rotary frequencies and the scale of Gemma's embeddings. The model's own initialization computes
    them. ``device``: device of the recomputed buffers.
    """
    with torch.no_grad():
        for module in model.modules():
            if any(name in module._non_persistent_buffers_set for name, _ in module.named_buffers(recurse=False)):
                for parameter in module.parameters(recurse=False):
                    parameter._is_hf_initialized = True  # otherwise _init_weights would overwrite it
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = torch.empty_like(buffer, device=device)
                model._init_weights(module)


def load_weights(parameters: Iterable[tuple[str, Tensor]], files: ModelFiles, key: str = "model_name") -> None:
    """Copy a checkpoint's weights into ``parameters``; each rank reads only the slices of its shards.

    Not collective. ``parameters``: Hugging Face names and tensors, sharded (DTensor) or complete, of any floating
    dtype. ``files``: the checkpoint. ``key``: the configuration key that names the checkpoint. Raises UserError for a
    missing tensor, a different shape, and values that are not finite.
    """
    setting = ModelSetting(key, files.name)
    with torch.no_grad():
        for name, parameter in parameters:
            heartbeat()
            if name not in files.tensors:
                raise setting.error(f"lacks the tensor {name}", "download the complete model")
            if (shape := files.shape(name)) != tuple(parameter.shape):
                raise setting.error(
                    f"has the tensor {name} with the shape {shape}, but its config.json defines the shape"
                    f" {tuple(parameter.shape)}",
                    "download all of its files again",
                )
            local = local_shard(parameter)
            if local.numel() > 0:
                local.copy_(files.tensor(name, local_slices(parameter)))
                if not _is_finite(local):
                    raise setting.error(
                        f"has NaN or infinite values in the tensor {name} (converted to {local.dtype})",
                        "download the model again, or choose another model",
                    )


_CHECK_CHUNK = 2**22
"""Number of elements per check for NaN and infinity; it limits the memory of the temporary result."""


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(part.isfinite().all()) for part in torch.split(tensor.flatten(), _CHECK_CHUNK))


def local_slices(parameter: Tensor) -> tuple[slice, ...]:
    """Return one slice per dimension of the complete tensor; together they select this rank's shard.

    Tensor parallelism, the innermost mesh axis, divides the tensor first; the FSDP axes divide the resulting part.
    """
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, length) for length in parameter.shape)
    begins, lengths = [0] * parameter.ndim, list(parameter.shape)
    mesh = parameter.device_mesh
    for axis in reversed(range(mesh.ndim)):
        placement = parameter.placements[axis]
        if placement.is_replicate():
            continue
        dim = placement.dim  # type: ignore[attr-defined]
        begin, length = chunk_of(lengths[dim], mesh.size(axis), mesh.get_local_rank(axis))
        begins[dim] += begin
        lengths[dim] = length
    return tuple(slice(begin, begin + length) for begin, length in zip(begins, lengths, strict=True))


def chunk_of(length: int, parts: int, number: int) -> tuple[int, int]:
    """Return (start, length) of chunk ``number`` if ``length`` elements are divided into ``parts`` chunks.

    The division is that of torch.chunk. All chunks have the same length, except that the last chunks may be shorter or
    empty.
    """
    size = -(-length // parts)
    begin = min(length, number * size)
    return begin, min(size, length - begin)


def causal_lm_parts(model: PreTrainedModel) -> tuple[nn.Module, nn.Linear]:
    """Return a model's body (token ids to hidden states) and LM head (hidden states to logits)."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear) and head.bias is None, type(head)
    return model.base_model, head
