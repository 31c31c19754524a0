"""From a name or a folder to a model: files, configuration, weights slice by slice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill.errors import UserError
from distill.model.dtensor import local_shard
from distill.model.hf_files import ModelFiles
from distill.model.hf_index import json_object as json_object
from distill.supervise.progress import heartbeat


def meta_model(config: Any, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model without storage: shapes and modules only."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    model.tie_weights()
    return model


def manifest_of(model: nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of a model's parameters, a tied one once: what every sync must bring."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give a meta model (sharded or not) uninitialised storage on ``device``; tied parameters stay tied."""
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
    """Recompute the buffers that no checkpoint holds (rotary frequencies, the scale of Gemma's embeddings) on
    ``device``, by the model's own means; parameters stay as they are.
    """
    with torch.no_grad():
        for module in model.modules():
            if any(name in module._non_persistent_buffers_set for name, _ in module.named_buffers(recurse=False)):
                for parameter in module.parameters(recurse=False):
                    parameter._is_hf_initialized = True  # else it would be drawn anew
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = torch.empty_like(buffer, device=device)
                model._init_weights(module)


def load_weights(parameters: Iterable[tuple[str, Tensor]], files: ModelFiles, key: str = "model_name") -> None:
    """Fill parameters from the checkpoint, each rank reading its own slices only; no rank holds a whole model.

    ``parameters``: Hugging Face names and tensors, sharded (DTensor) or whole, of any floating dtype; ``key`` is the
    configuration key that names the checkpoint. Raises UserError where the checkpoint lacks one, has another shape, or
    holds numbers that are not finite.
    """
    with torch.no_grad():
        for name, parameter in parameters:
            heartbeat()
            if name not in files.tensors:
                raise UserError(f"the checkpoint {files.name} lacks the tensor {name}: it is not a whole model")
            if (shape := files.shape(name)) != tuple(parameter.shape):
                raise UserError(
                    f"the checkpoint {files.name} has {name} of another shape than its config.json says"
                    f" ({shape} against {tuple(parameter.shape)}): the files don't belong together"
                )
            local = local_shard(parameter)
            if local.numel() > 0:
                local.copy_(files.tensor(name, local_slices(parameter)))
                if not _is_finite(local):
                    raise UserError(
                        f"{key}={files.name} holds nan or infinite numbers in {name} (as {local.dtype}): download it"
                        " again, or choose another checkpoint"
                    )


_CHECKED = 2**22
"""Elements that are compared with infinity at a time: the comparison needs as much memory as they do."""


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(part.isfinite().all()) for part in torch.split(tensor.flatten(), _CHECKED))


def local_slices(parameter: Tensor) -> tuple[slice, ...]:
    """What of the whole tensor this rank has. The mesh's inner axes (tp) split it first, then FSDP's split the part."""
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
    """Where torch.chunk's part ``number`` begins and how long it is: equal parts, the last ones shorter or empty."""
    size = -(-length // parts)
    begin = min(length, number * size)
    return begin, min(size, length - begin)


def causal_lm_parts(model: PreTrainedModel) -> tuple[nn.Module, nn.Linear]:
    """The body that makes hidden states and the head that makes logits of them."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear) and head.bias is None, type(head)
    return model.base_model, head
