"""Override config.json settings that vLLM and transformers read differently; refuse unsupported ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from distill.errors import UserError
from distill.model.hf_config import foreign_settings, rotary_factor, rotary_parameters

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
"""Maps ``model_type`` of config.json to the name of vLLM's model class.

The key ``architectures`` of config.json is not used, because it may name a classifier or a draft model.
"""
_ACTIVATION = {"gemma3_text": ("hidden_activation", "gelu_pytorch_tanh")}
_SILU = ("silu", "swish")


def check_vllm_config(config: Any, window: int, key: str, model: str) -> None:
    """Raise UserError if vLLM ignores or does not support a setting that transformers supports.

    ``config``: the model's Hugging Face configuration; ``window``: maximum number of tokens of a sequence; ``key``: the
    configuration key that names the model; ``model``: the value of ``key``. The last two are for the error message.
    """
    for setting, reason in _unsupported(config, window):
        raise UserError(
            f"{key}={model} has {setting} in its config.json, but vLLM {reason}",
            "set policy.generation.backend=transformers, or choose another model",
            key=key,
            value=model,
        )


def _unsupported(config: Any, window: int) -> Iterator[tuple[str, str]]:
    """Yield ("setting=value", reason) for each setting of ``config`` that vLLM does not support.

    ``window``: maximum number of tokens of a sequence.
    """
    family = config.model_type
    name, activation = _ACTIVATION.get(family, ("hidden_act", "silu"))
    given = getattr(config, name)
    if given != activation and not (activation in _SILU and given in _SILU):
        yield f"{name}={given}", f"supports only the activation {activation} for the family {family}"
    if family == "qwen2" and (width := _head_width(config)) * config.num_attention_heads != config.hidden_size:
        yield f"head_dim={width}", "uses hidden_size / num_attention_heads instead for the family qwen2"
    if family == "qwen3" and config.attention_bias:
        yield "attention_bias=True", "ignores the bias of o_proj for the family qwen3"
    if _windows_some_layers(config) and config.sliding_window < window:
        yield (
            f"sliding_window={config.sliding_window} in some of its layers only",
            f"cannot limit only some layers of the family {family} to a window",
        )
    for parameters in rotary_parameters(config):
        longest = _longest(parameters, config)
        if longest is not None and longest < window:
            yield (
                f"rope_type=yarn for {longest} positions",
                f"has no rotary frequencies for all policy.generation.vllm_cfg.max_model_len={window} positions",
            )


def _windows_some_layers(config: Any) -> bool:
    """Return whether ``config`` belongs to a Qwen model with a sliding window in only some of its layers.

    vLLM does not support such models.
    """
    return config.model_type in ("qwen2", "qwen3") and len(set(config.layer_types)) > 1


def _head_width(config: Any) -> int:
    """Return the number of channels of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _longest(parameters: Mapping[str, Any], config: Any) -> int | None:
    """Return the number of positions in vLLM's rotary table; None if the table is always long enough."""
    if parameters.get("rope_type") != "yarn":
        return None
    return int(parameters["original_max_position_embeddings"] * rotary_factor(parameters, config))


def architecture_overrides(config: Any) -> dict[str, Any]:
    """Return the config.json settings with which vLLM builds the same model as transformers.

    ``config``: the Hugging Face configuration, from ``model_config``; ``check_vllm_config`` must accept this
    configuration. The result maps each setting to its new value; None removes the setting.
    """
    overrides: dict[str, Any] = dict.fromkeys(foreign_settings(config))
    overrides["architectures"] = [ARCHITECTURES[config.model_type]]
    overrides["tie_word_embeddings"] = bool(config.tie_word_embeddings)
    overrides["rope_parameters"] = _rotary_overrides(config)
    if getattr(config, "hidden_act", None) in _SILU:
        overrides["hidden_act"] = "silu"
    if _windows_some_layers(config):
        # No sequence is longer than this window (check_vllm_config), so removing it changes nothing.
        layers = config.num_hidden_layers
        full = {"sliding_window": None, "layer_types": ["full_attention"] * layers, "max_window_layers": layers}
        overrides.update(full)
    return overrides


def _rotary_overrides(config: Any) -> dict[str, Any]:
    """Return the rotary parameters in vLLM's format, with the same effect as in transformers.

    ``config``: the model's Hugging Face configuration, which contains the rotary parameters of transformers. If the
    parameters depend on the layer type, the result maps each layer type to its parameters.
    """
    given = config.rope_parameters
    if "rope_theta" in given:
        return _plain_rotary(given, config)
    kinds = {kind: parameters for kind, parameters in given.items() if isinstance(parameters, dict)}
    # transformers reads truncate from the outer level, not from the parameters of a layer type
    shared = {"truncate": given.get("truncate")}
    return {kind: _plain_rotary({**parameters, **shared}, config) for kind, parameters in kinds.items()}


def _plain_rotary(parameters: Mapping[str, Any], config: Any) -> dict[str, Any]:
    kind = parameters["rope_type"]
    if kind == "default":
        return {"rope_type": kind, "rope_theta": parameters["rope_theta"]}
    dropped = ("type", "partial_rotary_factor")
    plain = {name: value for name, value in parameters.items() if value is not None and name not in dropped}
    for name in ("beta_fast", "beta_slow"):
        if not plain.get(name, True):
            del plain[name]  # transformers replaces 0 by its default
    return {**plain, "factor": rotary_factor(parameters, config)}


def apply_overrides(overrides: Mapping[str, Any], config: Any) -> Any:
    """Apply ``overrides`` in place to ``config``, the configuration that vLLM has read; return ``config``.

    ``overrides`` maps the name of each setting to its new value; None removes the setting. This function is passed to
    vLLM as ``hf_overrides``. A dictionary would not suffice, because with a dictionary vLLM cannot remove settings.
    """
    for name, value in overrides.items():
        if value is None and not hasattr(type(config), name):
            vars(config).pop(name, None)
        else:
            setattr(config, name, copy.deepcopy(value))
    return config
