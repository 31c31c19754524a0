"""Override the settings of a config.json that vLLM reads differently; refuse models that it can't run correctly."""

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
"""Family -> vLLM's class for it; vLLM would go by ``architectures``, which may name a classifier or a draft model."""
_ACTIVATION = {"gemma3_text": ("hidden_activation", "gelu_pytorch_tanh")}
_SILU = ("silu", "swish")


def check_vllm_config(config: Any, window: int, what: str) -> None:
    """Refuse a model whose settings vLLM ignores or has no code for, although transformers has.

    ``config``: its Hugging Face configuration; ``window``: tokens of the longest sequence; ``what``: the key and value
    that name the model. Raises UserError.
    """
    for setting, reason in _not_in_vllm(config, window):
        raise UserError(
            f"{what} has {setting} in its config.json, and policy.generation.backend=vllm {reason}: set"
            " policy.generation.backend=transformers, or choose another model"
        )


def _not_in_vllm(config: Any, window: int) -> Iterator[tuple[str, str]]:
    family = config.model_type
    name, activation = _ACTIVATION.get(family, ("hidden_act", "silu"))
    given = getattr(config, name)
    if given != activation and not (activation in _SILU and given in _SILU):
        yield f"{name}={given}", f"has no activation but {activation} for the family {family}"
    if family == "qwen2" and (width := _head_width(config)) * config.num_attention_heads != config.hidden_size:
        yield f"head_dim={width}", "computes it as hidden_size / num_attention_heads for the family qwen2"
    if family == "qwen3" and config.attention_bias:
        yield "attention_bias=True", "leaves out the bias of o_proj for the family qwen3"
    if _windows_some_layers(config) and config.sliding_window < window:
        yield (
            f"sliding_window={config.sliding_window} in some of its layers only",
            f"can't limit some layers of the family {family} to a window",
        )
    for parameters in rotary_parameters(config):
        longest = _longest(parameters, config)
        if longest is not None and longest < window:
            yield (
                f"rope_type=yarn for {longest} positions",
                f"has no rotary frequencies beyond them, but policy.generation.vllm_cfg.max_model_len={window}",
            )


def _windows_some_layers(config: Any) -> bool:
    """Whether this is a model some of whose layers have a window, in a family for which vLLM can't do that."""
    return config.model_type in ("qwen2", "qwen3") and len(set(config.layer_types)) > 1


def _head_width(config: Any) -> int:
    """Channels of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _longest(parameters: Mapping[str, Any], config: Any) -> int | None:
    """Positions for which vLLM tabulates the rotary embedding, where that doesn't follow from its window."""
    if parameters.get("rope_type") != "yarn":
        return None
    return int(parameters["original_max_position_embeddings"] * rotary_factor(parameters, config))


def architecture_overrides(config: Any) -> dict[str, Any]:
    """What vLLM must read instead of config.json so that it builds the model that transformers builds.

    ``config``: the Hugging Face configuration as ``model_config`` returns it, of a model that ``check_vllm_config``
    accepts. A value of None removes a setting.
    """
    overrides: dict[str, Any] = dict.fromkeys(foreign_settings(config))
    overrides["architectures"] = [ARCHITECTURES[config.model_type]]
    overrides["tie_word_embeddings"] = bool(config.tie_word_embeddings)
    overrides["rope_parameters"] = _rotary_overrides(config)
    if getattr(config, "hidden_act", None) in _SILU:
        overrides["hidden_act"] = "silu"
    if _windows_some_layers(config):  # of at least the engine's longest sequence, or the model would be refused
        layers = config.num_hidden_layers
        full = {"sliding_window": None, "layer_types": ["full_attention"] * layers, "max_window_layers": layers}
        overrides.update(full)
    return overrides


def _rotary_overrides(config: Any) -> dict[str, Any]:
    """The rotary parameters with every value that transformers derives or ignores written out as vLLM expects it."""
    given = config.rope_parameters
    if "rope_theta" in given:
        return _plain_rotary(given, config)
    kinds = {kind: parameters for kind, parameters in given.items() if isinstance(parameters, dict)}
    # transformers looks for truncate beside the types of layers and not inside them
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
            del plain[name]  # transformers takes 0 for its default
    return {**plain, "factor": rotary_factor(parameters, config)}


def apply_overrides(overrides: Mapping[str, Any], config: Any) -> Any:
    """Change the configuration that vLLM has read, in place, and return it: vLLM's ``hf_overrides``, partially applied.

    A function and not a dictionary: vLLM takes a setting for present although its value is None.
    """
    for name, value in overrides.items():
        if value is None and not hasattr(type(config), name):
            vars(config).pop(name, None)
        else:
            setattr(config, name, copy.deepcopy(value))
    return config
