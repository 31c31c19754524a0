"""From a name or a folder to a model: files, configuration, weights slice by slice."""

from __future__ import annotations

import os.path
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from distill.config.build import reason
from distill.model.architecture import check_architecture, check_config_file, decide_tied_head
from distill.model.checkpoint_files import StoredTensor, check_format, stored_tensors
from distill.model.checkpoint_files import json_object as json_object
from distill.model.quantized_weights import WeightScale, dequantized, read_quantization, weight_scales
from distill.runtime.place import progressed
from distill.types import UserError

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")
"""Model types whose packed, sharded path is tested against the plain model."""
LICENSE_FILES = ("README.md", "*LICEN[CS]E*", "NOTICE*", "*USE_POLICY*", "COPYING*", "*TERMS.*", "*TERMS", "TERMS_OF_*")
"""The model card and what else a model comes with that exports copy."""
PLAIN = ("F64", "F32", "F16", "BF16")
"""Element types, as safetensors names them, that are the weights themselves. F64 is rounded, as transformers does."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_UNSUPPORTED = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")


@dataclass(frozen=True)
class ModelFiles:
    """A checkpoint on disk."""

    name: str
    """As the user wrote it."""
    folder: Path
    tensors: Mapping[str, StoredTensor]
    """Every tensor of the files, by the name of the parameter that takes it."""
    scales: Mapping[str, WeightScale] = field(default_factory=dict)
    """Of the weights that are stored in FP8."""

    @property
    def files(self) -> dict[str, Path]:
        """Tensor name -> the safetensors file that holds it."""
        return {name: stored.file for name, stored in self.tensors.items()}

    def tensor(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """One tensor, or one slice of it, in plain floats; never more than that is in memory.

        An FP8 weight is dequantized to float32. Raises UserError for any other type that is not a plain float.
        """
        stored = self.tensors[name]
        if name in self.scales:
            return dequantized(stored, self.scales[name], slices)
        if stored.dtype not in PLAIN:
            raise UserError(
                f"the checkpoint {self.name} has {name} in the element type {stored.dtype}, which is no plain float:"
                " choose one that is not quantized"
            )
        with safe_open(stored.file, framework="pt") as file:
            part = file.get_slice(stored.name)
            tensor: Tensor = part[slices] if slices else part[:]
            return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The complete shape of a tensor, from its file's header."""
        return self.tensors[name].shape


def find_model(name: str, key: str) -> ModelFiles:
    """The checkpoint that ``key`` names: a folder, or a model of the hub (taken from its cache or fetched).

    Raises UserError where it is missing, holds no safetensors, or is quantized with a method that is not supported.
    """
    folder = Path(name)
    if not os.path.isdir(folder):  # unlike Path.is_dir, also false for a name that no file can have
        folder = _from_hub(name, key)
    what = f"{key}={name}"
    check_format(folder, what)
    if not (folder / "config.json").is_file():
        raise UserError(f"{what} holds no config.json: give the folder or hub name of a Hugging Face model")
    tensors = stored_tensors(folder, what)
    return ModelFiles(name, folder, tensors, weight_scales(tensors, read_quantization(folder, what)))


def _from_hub(name: str, key: str) -> Path:
    from huggingface_hub import snapshot_download

    if (
        name.startswith((".", "/"))
        or name.count("/") > 1
        or "/" not in name
        or name.split("/")[0] in ("models", "runs")
    ):
        raise UserError(f"{key}={name} does not exist: give a folder with config.json and safetensors, or a hub name")
    try:
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", *LICENSE_FILES]
        others = ["original/*", "consolidated*"]  # the same weights once more, in their makers' own formats
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=others))
    except Exception as error:  # the hub's client has a dozen kinds; to the user they all mean this
        raise UserError(
            f"{key}={name} is no folder, and the hub did not give it ({type(error).__name__}): download it first,"
            " or give a folder"
        ) from error


def _has_experts(folder: Path) -> bool:
    """Whether transformers knows the model in ``folder`` as a mixture of experts."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # it doesn't know it at all
        return False
    return any(getattr(config, name, None) for name in _EXPERTS)


_POSITIVE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "head_dim"),
)


def model_config(files: ModelFiles, key: str) -> Any:
    """The model's Hugging Face configuration; reads no weights, and never runs code that the folder brings.

    It is the configuration of the model in plain floats: a quantization is left out of it. Raises UserError for a
    family whose path is not tested and for a mixture of experts, by name, for sizes that no model has, for a setting
    that the packed path would pass over silently, and for a quantization that is not supported.
    """
    what = f"{key}={files.name}"
    raw = json_object(files.folder / "config.json", what)
    family = raw.get("model_type")
    if family not in FAMILIES:
        mixture = ", a mixture of experts" if _has_experts(files.folder) else ""
        code = " and would run code of its own (auto_map)" if "auto_map" in raw else ""
        raise UserError(
            f"{what} is of the family {family}{mixture}{code}, which is not supported yet:"
            f" choose a dense model of {', '.join(FAMILIES)}"
        )
    check_config_file(raw, what)
    try:
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError or KeyError for one and the same thing
        raise UserError(f"{what} has a config.json that can't be read ({reason(error)}): download it again") from error
    read_quantization(files.folder, what)  # refuses what can't be read as plain floats
    for part in (config, config.get_text_config()):
        for name in ("quantization_config", "compression_config"):
            if hasattr(part, name):
                delattr(part, name)  # the model is built for plain floats
    for name in _POSITIVE:
        value = getattr(config, name, None)
        if name == "head_dim" and value is None:
            continue  # it follows from the two sizes
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{what} has {name}={value} in its config.json, which no model has: download it again")
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"{what} has {config.num_attention_heads} attention heads in its config.json, which"
            f" {config.num_key_value_heads} key-value heads can't share: download it again"
        )
    for name in _UNSUPPORTED:
        if value := getattr(config, name, None):
            raise UserError(
                f"{key}={files.name} has {name}={value} in its config.json, which is not supported:"
                " choose a model without it"
            )
    check_architecture(config, raw, what)
    decide_tied_head(config, files, what)
    return config


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
            progressed()
            if name not in files.tensors:
                raise UserError(f"the checkpoint {files.name} lacks the tensor {name}: it is not a whole model")
            if (shape := files.shape(name)) != tuple(parameter.shape):
                raise UserError(
                    f"the checkpoint {files.name} has {name} of another shape than its config.json says"
                    f" ({shape} against {tuple(parameter.shape)}): the files don't belong together"
                )
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
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
