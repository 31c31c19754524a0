"""Check the settings of a config.json: refuse them, drop them, or decide them by the files of the checkpoint."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from distill.errors import UserError, reason
from distill.model.hf_files import ModelFiles
from distill.model.hf_index import json_object
from distill.model.quantized_weights import read_quantization
from distill.supervise.progress import heartbeat

log = logging.getLogger(__name__)

ROTARY = ("default", "linear", "llama3", "yarn")
"""Types of rotary position embeddings whose frequencies are the same at every position and for every length."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BY_LENGTH = ("dynamic", "longrope", "su")
_LAYER_TYPES = ("full_attention", "sliding_attention")
_OTHER_MODELS = ("text_config", "decoder", "generator", "text_encoder")
"""Settings that hold the configuration of a model inside the model."""
_CACHE_ONLY = ("sliding_window", "layer_types", "attention_chunk_size", "num_kv_shared_layers")
"""Settings that transformers' key-value cache reads even where the model's layers do not."""
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "partial_rotary_factor": (None, 1.0),
    "rotary_pct": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1.0),
    "logit_scale": (None, 1.0),
    "query_pre_attn_scalar": (None,),
    "clip_qkv": (None,),
    "bias": (None, False),
    "qkv_bias": (None, False),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "use_qk_norm": (None, False),
    "dual_chunk_attention_config": (None,),
    "alibi": (None, False),
}
"""Settings of other families that would change the logits -> values with which they change nothing."""


def check_config_file(raw: Mapping[str, Any], what: str) -> None:
    """Refuse settings of a config.json with which transformers' own configuration is another kind of model.

    ``what``: the key and value that name the model. Raises UserError.
    """
    if not raw.get("is_causal", True):
        raise UserError(
            f"{what} has is_causal={raw['is_causal']} in its config.json, and a model that reads later tokens can't"
            " generate: choose a causal language model"
        )
    if parts := [name for name in _OTHER_MODELS if raw.get(name) is not None]:
        raise UserError(
            f"{what} has {parts[0]} in its config.json, and a model of several parts is not supported: choose a model"
            " that only reads and writes text"
        )
    if raw.get("per_layer_config"):
        raise UserError(
            f"{what} has per_layer_config in its config.json, and layers of different sizes are not supported: choose a"
            " model whose layers are alike"
        )


def check_architecture(config: Any, raw: Mapping[str, Any], what: str) -> None:
    """Refuse settings under which packed sequences would differ from transformers' model; drop those it ignores.

    ``config``: the Hugging Face configuration, changed in place; ``raw``: its config.json; ``what``: the key and value
    that name the model. Logs a warning, once, for a setting that transformers ignores although it would change the
    logits. Raises UserError.
    """
    _check_rotary(config, raw, what)
    _drop_ignored(config, what)
    _check_layer_types(config, what)
    config.return_dict, config.output_hidden_states, config._output_attentions = True, False, False


def rotary_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """The rotary parameters of a Hugging Face configuration: one dictionary, or one for each type of layer in it."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [parameters[kind] for kind in _LAYER_TYPES if isinstance(parameters.get(kind), dict)]
    yield from nested or [parameters]


def rotary_factor(parameters: Mapping[str, Any], config: Any) -> float:
    """The scaling factor of rotary parameters; transformers derives a YaRN factor of null from the two lengths."""
    factor = parameters["factor"]
    if factor is None:
        factor = config.max_position_embeddings / parameters["original_max_position_embeddings"]
    return float(factor)


def _check_rotary(config: Any, raw: Mapping[str, Any], what: str) -> None:
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    choose = f"choose a model with one of {', '.join(ROTARY)}"
    for parameters in rotary_parameters(config):
        kind = parameters.get("rope_type", "default")
        if isinstance(kind, str) and (kind in _BY_LENGTH or "dynamic" in kind):
            raise UserError(
                f"{what} has rope_type={kind} in the {key} of its config.json, and its frequencies follow the longest"
                f" position in a batch, so that packing would change the logits: {choose}"
            )
        if kind not in ROTARY:
            raise UserError(
                f"{what} has rope_type={kind} in the {key} of its config.json, which is not supported: {choose}"
            )
        for name in _numbers_of(kind, parameters):
            if not _is_positive(parameters.get(name)):
                raise UserError(
                    f"{what} has {name}={parameters.get(name)} in the {key} of its config.json, which must be a number"
                    f" above 0 for rope_type={kind}: download it again"
                )
        partial = parameters.get("partial_rotary_factor")
        if kind != "default" and partial not in (None, 1.0):
            raise UserError(
                f"{what} has partial_rotary_factor={partial} in its config.json, which transformers can't combine with"
                f" rope_type={kind} in the family {config.model_type}: choose a model without it"
            )


def _numbers_of(kind: str, parameters: Mapping[str, Any]) -> list[str]:
    """Names of the rotary parameters that must be numbers above 0; some of YaRN's may be null."""
    if kind == "default":
        return ["rope_theta"]
    optional = [name for name in ("factor", "attention_factor") if parameters.get(name) is not None]
    return ["rope_theta", *optional] if kind == "yarn" else ["rope_theta", "factor"]


def _is_positive(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < float("inf")


def foreign_settings(config: Any) -> list[str]:
    """Names of the settings that are not of the configuration's family: transformers' model ignores them.

    Those in its config.json, and those of the key-value cache, which ``model_config`` has removed.
    """
    known = _own_settings(config)
    names = dict.fromkeys([*vars(config), *_CACHE_ONLY])
    return [name for name in names if name not in known and not name.startswith("_")]


def without_ignored_settings(raw: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """config.json without the settings that transformers ignores and other programs apply, also in its rotary ones.

    ``raw``: the file; ``config``: the Hugging Face configuration that it is read as.
    """
    known = _own_settings(config)

    def kept(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in settings.items() if name in known or not _has_effect(name, value)}

    edited = kept(raw)
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(rotary := edited.get(key), dict):
            nested = {name: kept(value) if isinstance(value, dict) else value for name, value in rotary.items()}
            edited[key] = kept(nested)
    return edited


def _own_settings(config: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config)} | {"model_type", "quantization_config"}


def _has_effect(name: str, value: object) -> bool:
    """Whether a setting changes the logits or the key-value cache in the families that have it."""
    return bool((name in _CACHE_ONLY and value) or (name in _NEUTRAL and value not in _NEUTRAL[name]))


def _drop_ignored(config: Any, what: str) -> None:
    for name in foreign_settings(config):
        value = getattr(config, name, None)
        if _has_effect(name, value):
            _warn_once(
                f"{what} has {name}={value} in its config.json, which the family {config.model_type} does not have:"
                " transformers ignores it, and so do training and generation"
            )
        if name in _CACHE_ONLY:
            vars(config).pop(name, None)


def _check_layer_types(config: Any, what: str) -> None:
    types = getattr(config, "layer_types", None)
    if types is None:
        return
    if unknown := sorted({str(kind) for kind in types} - set(_LAYER_TYPES)):
        raise UserError(
            f"{what} has layer_types with {unknown[0]} in its config.json, which is not supported: choose a model whose"
            f" layers are {' or '.join(_LAYER_TYPES)}"
        )
    if len(types) != config.num_hidden_layers:
        raise UserError(
            f"{what} has {len(types)} layer_types and num_hidden_layers={config.num_hidden_layers} in its config.json,"
            " which must be equal: download it again"
        )
    window = config.sliding_window
    if "sliding_attention" in types and not (type(window) is int and window > 0):
        raise UserError(
            f"{what} has layer_types with sliding_attention in its config.json, and sliding_window={window}, which must"
            " be a number of tokens above 0: download it again"
        )


def decide_tied_head(config: Any, files: ModelFiles, what: str) -> None:
    """Set ``config.tie_word_embeddings`` to whether the head is the embedding, as ``from_pretrained`` decides it.

    A head in the files that differs from the embedding is a head of its own, even if config.json ties them; logs a
    warning then. Reads both tensors where a tied model has both. Without files (a plan made from config.json alone)
    nothing changes. Raises UserError for an untied model without a head, which transformers would initialise at random,
    and for an embedding under the head's name.
    """
    if not files.files:
        return
    if not config.tie_word_embeddings and HEAD not in files.files and EMBEDDING in files.files:
        raise UserError(
            f"{what} has tie_word_embeddings=False in its config.json (or by default) and no {HEAD} in its files:"
            " download it again, or set tie_word_embeddings to true there if the head is the embedding"
        )
    if not config.tie_word_embeddings or HEAD not in files.files:
        return
    if EMBEDDING not in files.files:
        raise UserError(
            f"{what} has its embedding under the name {HEAD} alone: load it with transformers' from_pretrained and save"
            f" it with save_pretrained, which names it {EMBEDDING}"
        )
    if not _same_values(files):
        config.tie_word_embeddings = False
        _warn_once(
            f"{what} has tie_word_embeddings=True in its config.json (or by default), but its {HEAD} differs from its"
            f" {EMBEDDING}: both are used, as transformers 5 does; set tie_word_embeddings to false there, as other"
            " programs may drop the head"
        )


_COMPARED: dict[tuple[object, ...], bool] = {}
_CHUNK = 2**24
"""Elements that are compared at a time: 64 MiB in float32 for each tensor."""


def _same_values(files: ModelFiles) -> bool:
    """Whether head and embedding are equal, element by element; each pair of files is read once per process."""
    if len(shape := files.shape(HEAD)) != 2 or 0 in shape:
        return True  # of no model: the comparison of all shapes refuses it
    places = [files.files[name] for name in (HEAD, EMBEDDING)]
    key = tuple((path, path.stat().st_mtime_ns) for path in places)
    if key not in _COMPARED:
        _COMPARED[key] = files.shape(HEAD) == files.shape(EMBEDDING) and _equal_in_chunks(files)
    return _COMPARED[key]


def _equal_in_chunks(files: ModelFiles) -> bool:
    rows, columns = files.shape(HEAD)
    step = max(1, _CHUNK // columns)
    for first in range(0, rows, step):
        heartbeat()
        part = (slice(first, min(rows, first + step)), slice(0, columns))
        head, embedding = (files.tensor(name, part).float() for name in (HEAD, EMBEDDING))
        if not torch.equal(head, embedding):
            return False
    return True


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    """A configuration is read many times in a run; its warning is logged once."""
    log.warning("%s", message)


FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")
"""Model types whose packed, sharded path is tested against the plain model."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_UNSUPPORTED = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")


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
