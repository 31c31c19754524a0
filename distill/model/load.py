"""From a name or a folder to a model: files, configuration, tokenizer, weights slice by slice."""

from __future__ import annotations

import json
import os.path
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from distill.config.build import reason, show
from distill.model.architecture import check_architecture, check_config_file, decide_tied_head
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

    def is_floating(self, name: str) -> bool:
        """Whether a tensor holds floating-point numbers, from its file's header."""
        with safe_open(self.files[name], framework="pt") as file:
            return "F" in str(file.get_slice(name).get_dtype())


def find_model(name: str, key: str) -> ModelFiles:
    """The checkpoint that ``key`` names: a folder, or a model of the hub (taken from its cache or fetched).

    Raises UserError where there is none, or where it holds no safetensors.
    """
    folder = Path(name)
    if not os.path.isdir(folder):  # unlike Path.is_dir, also false for a name that no file can have
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
        named = json_object(index, f"{key}={name}").get("weight_map")
        plain = isinstance(named, dict) and all(
            isinstance(file, str) and file.endswith(".safetensors") and "/" not in file for file in named.values()
        )
        if not plain or not named:
            raise UserError(
                f"{key}={name} has a {index.name} without a weight_map from tensors to safetensors files beside it:"
                " download it again"
            )
        files = {tensor: folder / file for tensor, file in named.items()}
        if absent := sorted({file.name for file in files.values() if not file.is_file()}):
            raise UserError(f"{key}={name} lacks {len(absent)} of its files ({absent[0]}): download it whole")
    else:
        single = folder / "model.safetensors"
        if not single.is_file():
            raise UserError(
                f"{key}={name} holds no safetensors, and pickled weights are never read, as they can run code: convert"
                " them where you trust them with save_pretrained(safe_serialization=True)"
            )
        files = dict.fromkeys(_tensor_names(single, f"{key}={name}"), single)
    there = {(tensor, file) for file in set(files.values()) for tensor in _tensor_names(file, f"{key}={name}")}
    if lacking := sorted(tensor for tensor, file in files.items() if (tensor, file) not in there):
        raise UserError(
            f"{key}={name} names {len(lacking)} tensors that their files don't hold ({lacking[0]}): download it again"
        )
    return files


def _tensor_names(file: Path, what: str) -> list[str]:
    """The names in a safetensors file's header, which also tells whether the file is as long as it should be."""
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{what} has a damaged {file.name} ({reason(error)}): download it again") from error


def json_object(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file of a model; UserError, beginning with ``what``, where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{what} has a {path.name} that can't be read ({reason(error)}): download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{what} has a {path.name} that holds no keys and values: download it again")
    return found


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

    Raises UserError for a family whose path is not tested and for a mixture of experts, by name, for sizes that no
    model has, and for a setting that the packed path would pass over silently.
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


def load_tokenizer(files: ModelFiles, name: str | None, key: str) -> Any:
    """The tokenizer of the model, or the one that ``key`` names instead."""
    source = files.folder if name in (None, files.name) else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if not tokenizer.get_vocab():
            raise ValueError("it knows no token")
    except Exception as error:  # transformers raises OSError, ValueError or KeyError for one and the same thing
        raise UserError(
            f"{key}={name or files.name} has no tokenizer that can be read ({reason(error)}): give the folder or hub"
            " name of a model with a tokenizer.json, whose own code is never run"
        ) from error
    return tokenizer


def stop_ids(files: ModelFiles, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer of this model: its generation configuration's and its tokenizer's.

    Raises UserError for a generation configuration that can't be read or that names no ids.
    """
    ids = {tokenizer.eos_token_id} - {None}
    path = files.folder / "generation_config.json"
    if path.is_file():
        eos = json_object(path, files.name).get("eos_token_id")
        listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(token) is int and token >= 0 for token in listed):
            raise UserError(
                f"{path} has eos_token_id={show(eos)}, which is no id of a token: correct it there, or set"
                " policy.generation.stop_token_ids"
            )
        ids |= set(listed)
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
            if not files.is_floating(name):
                raise UserError(
                    f"the checkpoint {files.name} has {name} in whole numbers: choose one that is not quantized"
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
