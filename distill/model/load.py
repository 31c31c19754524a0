"""From a name or a folder to a model: files, configuration, tokenizer, weights slice by slice."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from distill.runtime.place import progressed
from distill.types import UserError

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")
"""Model types whose packed, sharded path is tested against the plain model."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_UNSUPPORTED = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")


@dataclass(frozen=True)
class ModelFiles:
    """A checkpoint on disk."""

    name: str
    """As the user wrote it."""
    folder: Path
    files: dict[str, Path]
    """Tensor name -> the safetensors file that holds it."""

    def tensor(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """One tensor, or one slice of it, read from its file; never more than that is in memory."""
        with safe_open(self.files[name], framework="pt") as file:
            part = file.get_slice(name)
            tensor: Tensor = part[slices] if slices else part[:]
            return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole shape of a tensor, from its file's header."""
        with safe_open(self.files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())


def find_model(name: str, key: str) -> ModelFiles:
    """The checkpoint that ``key`` names: a folder, or a model of the hub (taken from its cache or fetched).

    Raises UserError where there is none, or where it holds no safetensors.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _from_hub(name, key)
    if not (folder / "config.json").is_file():
        raise UserError(f"{key}={name} holds no config.json: give the folder or hub name of a Hugging Face model")
    return ModelFiles(name, folder, _tensor_files(folder, name, key))


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
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client has a dozen kinds; to the user they all mean this
        raise UserError(
            f"{key}={name} is no folder, and the hub did not give it ({type(error).__name__}): download it first,"
            " or give a folder"
        ) from error


def _tensor_files(folder: Path, name: str, key: str) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {tensor: folder / file for tensor, file in json.loads(index.read_text())["weight_map"].items()}
        if absent := sorted({file.name for file in files.values() if not file.is_file()}):
            raise UserError(f"{key}={name} lacks {len(absent)} of its files ({absent[0]}): download it whole")
        return files
    single = folder / "model.safetensors"
    if not single.is_file():
        raise UserError(f"{key}={name} holds no safetensors: convert it with save_pretrained(safe_serialization=True)")
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def model_config(files: ModelFiles, key: str) -> Any:
    """The model's Hugging Face configuration; reads no weights.

    Raises UserError for a family whose path is not tested and for a mixture of experts, by name, and for a setting
    that the packed path would pass over silently.
    """
    try:
        config = AutoConfig.from_pretrained(files.folder)
    except Exception as error:  # transformers raises OSError, ValueError or KeyError for one and the same thing
        raise UserError(f"{key}={files.name} has a config.json that can't be read ({error})") from error
    if config.model_type not in FAMILIES:
        mixture = ", a mixture of experts" if any(getattr(config, name, None) for name in _EXPERTS) else ""
        raise UserError(
            f"{key}={files.name} is of the family {config.model_type}{mixture}, which is not supported yet:"
            f" choose a dense model of {', '.join(FAMILIES)}"
        )
    for name in _UNSUPPORTED:
        if value := getattr(config, name, None):
            raise UserError(
                f"{key}={files.name} has {name}={value} in its config.json, which is not supported:"
                " choose a model without it"
            )
    return config


def load_tokenizer(files: ModelFiles, name: str | None, key: str) -> Any:
    """The tokenizer of the model, or the one that ``key`` names instead."""
    source = files.folder if name in (None, files.name) else name
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers raises OSError, ValueError or KeyError for one and the same thing
        raise UserError(f"{key}={name or files.name} has no tokenizer that can be read ({error})") from error


def stop_ids(files: ModelFiles, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer of this model: its generation configuration's and its tokenizer's."""
    ids = {tokenizer.eos_token_id} - {None}
    if (files.folder / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(files.folder).eos_token_id
        ids |= set(eos) if isinstance(eos, list) else {eos} - {None}
    return tuple(sorted(ids))


def compare_vocabularies(student: Any, teacher: Any, student_name: str, teacher_name: str) -> None:
    """Refuse two models that don't share their tokens, told by content: the same id must mean the same token.

    The padded size of the embeddings may differ. Raises UserError with both names.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    token = differing[0]
    raise UserError(
        f"policy.model_name={student_name} and teacher.model_name={teacher_name} have different tokenizers"
        f" ({len(differing)} tokens differ; {token!r} is {ours.get(token)} and {theirs.get(token)}):"
        " choose a teacher with the student's tokenizer"
    )


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


def load_weights(parameters: Iterable[tuple[str, Tensor]], files: ModelFiles) -> None:
    """Fill parameters from the checkpoint, each rank reading its own slices only; no rank holds a whole model.

    ``parameters``: Hugging Face names and tensors, sharded (DTensor) or whole, of any floating dtype. Raises
    UserError where the checkpoint lacks one or has another shape.
    """
    with torch.no_grad():
        for name, parameter in parameters:
            progressed()
            if name not in files.files:
                raise UserError(f"the checkpoint {files.name} lacks the tensor {name}: it is not a whole model")
            if (shape := files.shape(name)) != tuple(parameter.shape):
                raise UserError(
                    f"the checkpoint {files.name} has {name} of another shape than its config.json says"
                    f" ({shape} against {tuple(parameter.shape)}): the files don't belong together"
                )
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if local.numel() > 0:
                local.copy_(files.tensor(name, local_slices(parameter)))


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
