"""Read and check a model's config.json: unsupported settings, ignored settings, tied LM head."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from distill.errors import any_of, reason
from distill.model.hf_files import ModelFiles
from distill.model.hf_index import ModelSetting, json_object
from distill.model.quantized_weights import read_quantization
from distill.supervise.progress import heartbeat

log = logging.getLogger(__name__)

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")
"""Supported model types: their packed and sharded forward pass is tested against transformers."""
ROTARY = ("default", "linear", "llama3", "yarn")
"""Supported values of rope_type, the type of rotary position embeddings.

The frequencies of these types depend neither on the positions nor on the length of a sequence.
"""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LENGTH_DEPENDENT = ("dynamic", "longrope", "su")
_LAYER_TYPES = ("full_attention", "sliding_attention")
_NESTED_MODELS = ("text_config", "decoder", "generator", "text_encoder")
"""Keys of config.json for the configurations of nested models, which are not supported."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_UNSUPPORTED = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
_POSITIVE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "head_dim"),
)
_FORWARD = (
    *("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation"),
    *("rms_norm_eps", "rope_parameters", "layer_types", "sliding_window", "query_pre_attn_scalar"),
)
"""Settings that change the logits of a model without changing the shape of a weight."""
_CACHE_ONLY = ("sliding_window", "layer_types", "attention_chunk_size", "num_kv_shared_layers")
"""Settings that transformers' key-value cache reads even if the model's layers ignore them."""
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
"""Model-specific config keys that can change the logits.

Maps each key to the values with which it has no effect.
"""


def model_config(files: ModelFiles, key: str) -> Any:
    """Return the checked Hugging Face configuration of a model, without its quantization settings.

    The quantization is removed because weights are dequantized while they are loaded. Reads no weights, except to
    compare the LM head with the embedding, and never executes code from the model folder. ``key``: the configuration
    key that names the model. Raises UserError for an unsupported model family, a mixture of experts, an unsupported or
    invalid setting, and an unsupported quantization.
    """
    setting = ModelSetting(key, files.name)
    raw = json_object(files.folder / "config.json", setting)
    _check_family(raw, files, setting)
    check_config_file(raw, setting)
    try:
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError or KeyError for the same cause
        problem = f"has a config.json that cannot be read ({reason(error)})"
        raise setting.error(problem, "download the model again") from error
    read_quantization(files.folder, setting)  # raises UserError for an unsupported method
    for part in (config, config.get_text_config()):
        for name in ("quantization_config", "compression_config"):
            if hasattr(part, name):
                delattr(part, name)
    _check_sizes(config, setting)
    check_architecture(config, raw, setting)
    decide_tied_head(config, files, setting)
    return config


def _check_family(raw: Mapping[str, Any], files: ModelFiles, setting: ModelSetting) -> None:
    family = raw.get("model_type")
    if family not in FAMILIES:
        mixture = ", a mixture of experts" if _has_experts(files.folder) else ""
        code = " with custom code (auto_map)" if "auto_map" in raw else ""
        raise setting.error(
            f"has model_type={family}{mixture}{code}, which is not supported",
            f"choose a dense model of the type {any_of(FAMILIES)}",
        )


def _has_experts(folder: Path) -> bool:
    """Return whether transformers reads the model in ``folder`` as a mixture of experts."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # a family that transformers does not have
        return False
    return any(getattr(config, name, None) for name in _EXPERTS)


def _check_sizes(config: Any, setting: ModelSetting) -> None:
    for name in _POSITIVE:
        value = getattr(config, name, None)
        if name == "head_dim" and value is None:
            continue  # hidden_size / num_attention_heads
        if not isinstance(value, int) or value < 1:
            problem = f"has {name}={value} in its config.json, which must be an integer of at least 1"
            raise setting.error(problem, "download the model again")
    if config.num_attention_heads % config.num_key_value_heads:
        raise setting.error(
            f"has num_attention_heads={config.num_attention_heads} in its config.json, which must be a multiple of"
            f" num_key_value_heads={config.num_key_value_heads}",
            "download the model again",
        )
    for name in _UNSUPPORTED:
        if value := getattr(config, name, None):
            problem = f"has {name}={value} in its config.json, which is not supported"
            raise setting.error(problem, "choose a model without this setting")


def check_config_file(raw: Mapping[str, Any], setting: ModelSetting) -> None:
    """Raise UserError for a bidirectional model, nested models, or layers of different sizes.

    ``raw``: content of config.json.
    """
    if not raw.get("is_causal", True):
        raise setting.error(
            f"has is_causal={raw['is_causal']} in its config.json, and a model with bidirectional attention cannot"
            " generate text",
            "choose a causal language model",
        )
    if parts := [name for name in _NESTED_MODELS if raw.get(name) is not None]:
        raise setting.error(
            f"has {parts[0]} in its config.json, and a model that contains other models is not supported",
            "choose a text-only model",
        )
    if raw.get("per_layer_config"):
        raise setting.error(
            "has per_layer_config in its config.json, and layers of different sizes are not supported",
            "choose a model whose layers have the same size",
        )


def check_architecture(config: Any, raw: Mapping[str, Any], setting: ModelSetting) -> None:
    """Check the rotary embeddings, layer types and ignored settings of a model configuration.

    ``config``: the Hugging Face configuration object. If the model type does not define a key-value cache setting, the
    setting is removed from ``config`` in place. ``raw``: content of config.json. Raises UserError for settings that
    packed sequences do not support. Logs a warning, once per process, for a setting that transformers ignores although
    other programs apply it.
    """
    _check_rotary(config, raw, setting)
    _drop_ignored(config, setting)
    _check_layer_types(config, setting)
    config.return_dict, config.output_hidden_states, config._output_attentions = True, False, False


def rotary_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the rotary parameters of a Hugging Face configuration: one dictionary, or one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [parameters[kind] for kind in _LAYER_TYPES if isinstance(parameters.get(kind), dict)]
    yield from nested or [parameters]


def rotary_factor(parameters: Mapping[str, Any], config: Any) -> float:
    """Return the scaling factor of rotary ``parameters``.

    YaRN allows a null factor; it means max_position_embeddings / original_max_position_embeddings.
    """
    factor = parameters["factor"]
    if factor is None:
        factor = config.max_position_embeddings / parameters["original_max_position_embeddings"]
    return float(factor)


def _check_rotary(config: Any, raw: Mapping[str, Any], setting: ModelSetting) -> None:
    place = f"in the {'rope_scaling' if raw.get('rope_scaling') else 'rope_parameters'} of its config.json"
    choose = f"choose a model with rope_type {any_of(ROTARY)}"
    for parameters in rotary_parameters(config):
        kind = parameters.get("rope_type", "default")
        if isinstance(kind, str) and (kind in _LENGTH_DEPENDENT or "dynamic" in kind):
            raise setting.error(
                f"has rope_type={kind} {place}, which is not supported, because the rotary frequencies of this type"
                " depend on the longest sequence of a batch",
                choose,
            )
        if kind not in ROTARY:
            raise setting.error(f"has rope_type={kind} {place}, which is not supported", choose)
        for name in _positive_parameters(kind, parameters):
            if not _is_positive(parameters.get(name)):
                raise setting.error(
                    f"has {name}={parameters.get(name)} {place}, which must be a number above 0 for rope_type={kind}",
                    "download the model again",
                )
        partial = parameters.get("partial_rotary_factor")
        if kind != "default" and partial not in (None, 1.0):
            raise setting.error(
                f"has partial_rotary_factor={partial} in its config.json, which transformers cannot combine with"
                f" rope_type={kind} for model_type={config.model_type}",
                "choose a model without this setting",
            )


def _positive_parameters(kind: str, parameters: Mapping[str, Any]) -> list[str]:
    """Return the names of the rotary parameters that must be positive numbers for rope_type ``kind``.

    YaRN's factor and attention_factor may be null. Their names are returned only if they are not null.
    """
    if kind == "default":
        return ["rope_theta"]
    optional = [name for name in ("factor", "attention_factor") if parameters.get(name) is not None]
    return ["rope_theta", *optional] if kind == "yarn" else ["rope_theta", "factor"]


def _is_positive(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < float("inf")


def forward_settings(config: Any) -> dict[str, Any]:
    """Return the settings of a Hugging Face configuration that change the logits of the same weights.

    They do not depend on the notation in config.json: a default value and its absence give the same settings.
    """
    settings = {name: getattr(config, name, None) for name in _FORWARD}
    head_dim = settings["head_dim"] or config.hidden_size // config.num_attention_heads
    return {**settings, "head_dim": head_dim, "rope_parameters": _rotary_values(settings["rope_parameters"] or {})}


def _rotary_values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary parameters, or those of each layer type, without nulls and the older name of rope_type."""
    values = {name: value for name, value in parameters.items() if name != "type" and value is not None}
    return {name: _rotary_values(value) if isinstance(value, dict) else value for name, value in values.items()}


def foreign_settings(config: Any) -> list[str]:
    """Return the names of settings that transformers ignores for the model type of ``config``.

    The list includes key-value cache settings that the model type does not define, even if ``config`` lacks them,
    because ``check_architecture`` may have removed them from ``config``.
    """
    known = _own_settings(config)
    names = dict.fromkeys([*vars(config), *_CACHE_ONLY])
    return [name for name in names if name not in known and not name.startswith("_")]


def without_ignored_settings(raw: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Return config.json without the settings that transformers ignores but other programs apply.

    Such settings inside the rotary parameters are removed too. ``raw``: the content of config.json; ``config``: the
    Hugging Face configuration that transformers creates from it.
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
    """Return whether ``value`` of the setting ``name`` affects the logits or the key-value cache.

    Assumes a model that supports the setting.
    """
    return bool((name in _CACHE_ONLY and value) or (name in _NEUTRAL and value not in _NEUTRAL[name]))


def _drop_ignored(config: Any, setting: ModelSetting) -> None:
    for name in foreign_settings(config):
        value = getattr(config, name, None)
        if _has_effect(name, value):
            _warn_once(
                f"{setting} has {name}={value} in its config.json, which model_type={config.model_type} does not"
                " support: transformers ignores this setting, and so do training and generation"
            )
        if name in _CACHE_ONLY:
            vars(config).pop(name, None)


def _check_layer_types(config: Any, setting: ModelSetting) -> None:
    types = getattr(config, "layer_types", None)
    if types is None:
        return
    if unknown := sorted({str(kind) for kind in types} - set(_LAYER_TYPES)):
        raise setting.error(
            f"has {unknown[0]} in the layer_types of its config.json, which is not supported",
            f"choose a model with layers of the type {any_of(_LAYER_TYPES)}",
        )
    if len(types) != config.num_hidden_layers:
        raise setting.error(
            f"has {len(types)} entries in layer_types but num_hidden_layers={config.num_hidden_layers} in its"
            " config.json, and the two numbers must be equal",
            "download the model again",
        )
    window = config.sliding_window
    if "sliding_attention" in types and not (type(window) is int and window > 0):
        raise setting.error(
            f"has sliding_window={window} in its config.json, which must be a number of tokens of at least 1 for"
            " sliding_attention in layer_types",
            "download the model again",
        )


def decide_tied_head(config: Any, files: ModelFiles, setting: ModelSetting) -> None:
    """Set ``config.tie_word_embeddings`` to whether the LM head and the embedding are the same tensor.

    The decision is the same as in transformers' ``from_pretrained``. If config.json ties the two but the files contain
    an LM head with other values, the LM head is untied and a warning is logged. This comparison reads both tensors. If
    ``files`` lists no tensors, because only config.json is available for a memory forecast, nothing changes. Raises
    UserError in two cases: an untied model has no LM head, so transformers would initialize it at random; or a tied
    model has an LM head but no embedding.
    """
    if not files.files:
        return
    if not config.tie_word_embeddings and HEAD not in files.files and EMBEDDING in files.files:
        raise setting.error(
            f"has tie_word_embeddings=False in its config.json (or by default) but no {HEAD} in its files",
            "download the model again, or set tie_word_embeddings to true in config.json if the LM head and the"
            " embedding are the same tensor",
        )
    if not config.tie_word_embeddings or HEAD not in files.files:
        return
    if EMBEDDING not in files.files:
        raise setting.error(
            f"holds its embedding only under the name {HEAD}",
            "load the model with transformers' from_pretrained and save it with save_pretrained, which uses the name"
            f" {EMBEDDING}",
        )
    if not _same_values(files):
        config.tie_word_embeddings = False
        _warn_once(
            f"{setting} has tie_word_embeddings=True in its config.json (or by default), but its {HEAD} differs from"
            f" its {EMBEDDING}: both are used, as in transformers 5; set tie_word_embeddings to false in config.json,"
            f" because other programs may ignore {HEAD}"
        )


_EQUAL_HEADS: dict[tuple[object, ...], bool] = {}
"""Caches whether the LM head of a model equals its embedding.

The key is the path and the modification time of the two files that contain these tensors.
"""
_CHUNK = 2**24
"""Number of elements of each tensor that are read and compared at a time: 64 MiB in float32."""


def _same_values(files: ModelFiles) -> bool:
    """Return whether LM head and embedding have equal values.

    The comparison reads both tensors; its result is cached until the process ends or one of the files changes.
    """
    if len(shape := files.shape(HEAD)) != 2 or 0 in shape:
        return True  # an invalid shape, which check_tensors refuses
    places = [files.files[name] for name in (HEAD, EMBEDDING)]
    key = tuple((path, path.stat().st_mtime_ns) for path in places)
    if key not in _EQUAL_HEADS:
        _EQUAL_HEADS[key] = files.shape(HEAD) == files.shape(EMBEDDING) and _equal_in_chunks(files)
    return _EQUAL_HEADS[key]


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
    """Log ``message`` as a warning, but only once per process.

    A run reads the same configuration many times.
    """
    log.warning("%s", message)
