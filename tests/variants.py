"""Tables of tiny checkpoints with the settings of real models, for the tests of models and engines."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.helpers import CONFIGS

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 4.0}


REMOVED = object()
"""Value of a key of config.json that is removed."""


def theta(rope: dict[str, Any], base: float = 5000.0) -> dict[str, Any]:
    """Return rotary parameters in the format of transformers 5, with a base that is no family's default."""
    return {"rope_parameters": {**rope, "rope_theta": base}}


@dataclass(frozen=True)
class Variant:
    """A checkpoint: family, configuration, and changes of its files."""

    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of the family's configuration class."""
    raw: dict[str, Any] = field(default_factory=dict)
    """Keys of config.json to replace after saving, or to remove (``REMOVED``)."""
    tensors: str = ""
    """Change of the files: "other head" (different from the embedding), "same head", "no head" or "no embedding"."""
    dtype: torch.dtype = torch.float32
    """Element type of the files."""


def save_variant(folder: Path, variant: Variant, seed: int = 0) -> Path:
    """Write the checkpoint of a variant; no bias is 0 and no norm is 1, so that tests detect missing ones."""
    torch.manual_seed(seed)
    config = CONFIGS[variant.family](**{**_shape(variant.family), **variant.settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(variant.dtype)
    model.config.dtype = variant.dtype
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    _change_config(folder / "config.json", variant.raw)
    if variant.tensors:
        _change_head(folder / "model.safetensors", variant.tensors)
    return folder


def _shape(family: str) -> dict[str, Any]:
    shape: dict[str, Any] = dict(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    if family == "gemma3_text":
        shape.update(sliding_window=8, sliding_window_pattern=2, query_pre_attn_scalar=24)
    return shape


def _change_config(path: Path, changes: dict[str, Any]) -> None:
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not REMOVED}))


def _change_head(path: Path, change: str) -> None:
    tensors: dict[str, Tensor] = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    if change == "no head":
        del tensors["lm_head.weight"]
    elif change == "no embedding":
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    else:
        tensors["lm_head.weight"] = embedding.clone() + (0.1 if change == "other head" else 0.0)
        if change == "other head":
            tensors["lm_head.weight"].mul_(torch.linspace(-1, 1, len(embedding))[:, None])
    save_file(tensors, path, metadata={"format": "pt"})


def as_version_4(rope: dict[str, Any] | None, base: float = 5000.0, spelling: str = "type") -> dict[str, Any]:
    """Return the rotary keys of a config.json of transformers 4, which replace ``rope_parameters``."""
    scaling = None
    if rope is not None:
        scaling = {spelling if name == "rope_type" else name: value for name, value in rope.items()}
    return {"rope_parameters": REMOVED, "rope_theta": base, "rope_scaling": scaling}


def gemma_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Return Gemma's rotary parameters: ``rope`` for global layers, the default type for sliding layers."""
    local = {"rope_type": "default", "rope_theta": 700.0}
    return {"rope_parameters": {"full_attention": {**rope, "rope_theta": 9000.0}, "sliding_attention": local}}


def windows(first: int, **settings: Any) -> dict[str, Any]:
    """Return Qwen's settings for a window of four tokens in layer ``first`` and all later layers."""
    return {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": first, **settings}


TIED = {"tie_word_embeddings": True}
BIASES = {"attention_bias": True, "mlp_bias": True}
FIRST_SLIDING = ["sliding_attention", "full_attention"]
GEMMA_VERSION_4 = {
    "rope_parameters": REMOVED,
    "layer_types": REMOVED,
    "sliding_window_pattern": 2,
    "rope_theta": 9000.0,
    "rope_local_base_freq": 700.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8},
}
FOREIGN = {
    "bias": True,
    "qkv_bias": True,
    "logits_scaling": 2.0,
    "embedding_multiplier": 3.0,
    "pretraining_tp": 2,
    "attention_dropout": 0.5,
    "head_dtype": "float64",
    "use_cache": False,
}
"""Settings that transformers ignores in the forward pass of Llama."""

VARIANTS: dict[str, Variant] = {
    "llama tied": Variant("llama", TIED),
    "llama untied": Variant("llama"),
    "llama tied with another head in the files": Variant("llama", TIED, tensors="other head"),
    "llama tied with a copy of the head in the files": Variant("llama", TIED, tensors="same head"),
    "llama without a tie setting": Variant("llama", raw={"tie_word_embeddings": REMOVED}),
    "llama attention and MLP biases": Variant("llama", BIASES),
    "llama wide heads": Variant("llama", {"head_dim": 48}),
    "llama linear": Variant("llama", theta(LINEAR)),
    "llama llama3": Variant("llama", theta(LLAMA3)),
    "llama yarn": Variant("llama", theta(YARN)),
    "llama yarn attention factor": Variant(
        "llama", theta({**YARN, "attention_factor": 0.7, "beta_fast": 8.0, "beta_slow": 2.0})
    ),
    "llama yarn mscale": Variant("llama", theta({**YARN, "mscale": 0.8, "mscale_all_dim": 0.3})),
    "llama yarn without truncation": Variant("llama", theta({**YARN, "truncate": False})),
    "llama yarn without an original length": Variant("llama", theta({"rope_type": "yarn", "factor": 4.0})),
    "llama yarn without a factor": Variant("llama", theta(YARN), raw=theta({**YARN, "factor": None, "beta_fast": 0})),
    "llama version 4 linear": Variant("llama", raw=as_version_4({"rope_type": "linear", "factor": 4})),
    "llama version 4 llama3": Variant("llama", raw=as_version_4(LLAMA3, spelling="rope_type")),
    "llama version 4 default": Variant("llama", raw=as_version_4(None)),
    "llama both spellings": Variant(
        "llama", theta(LINEAR), raw={"rope_theta": 900.0, "rope_scaling": {**YARN, "type": "yarn"}}
    ),
    "llama type and rope_type": Variant("llama", raw=theta({**LINEAR, "type": "default"})),
    "llama partial rotary": Variant("llama", raw={"partial_rotary_factor": 0.5}),
    "llama window": Variant("llama", raw={"sliding_window": 4}),
    "llama layer types": Variant("llama", raw={"sliding_window": 4, "layer_types": FIRST_SLIDING}),
    "llama settings of other families": Variant("llama", raw=FOREIGN),
    "llama named a classifier": Variant("llama", raw={"architectures": ["LlamaForSequenceClassification"]}),
    "llama named a draft model": Variant("llama", raw={"architectures": ["EagleLlamaForCausalLM"]}),
    "llama without architectures": Variant("llama", raw={"architectures": REMOVED}),
    "llama with attentions": Variant("llama", raw={"output_attentions": True}),
    "llama gelu": Variant("llama", {"hidden_act": "gelu"}),
    "llama swish": Variant("llama", {"hidden_act": "swish"}),
    "llama epsilon": Variant("llama", {"rms_norm_eps": 0.1}),
    "llama float16": Variant("llama", raw={"dtype": REMOVED, "torch_dtype": "float16"}, dtype=torch.float16),
    "qwen2 tied": Variant("qwen2", TIED),
    "qwen2 version 4 yarn": Variant("qwen2", raw=as_version_4(YARN)),
    "qwen2 windows in all layers": Variant("qwen2", windows(0)),
    "qwen2 windows in some layers": Variant("qwen2", windows(1)),
    "qwen2 windows past the layers": Variant("qwen2", windows(2)),
    "qwen2 windows off": Variant("qwen2", windows(0, use_sliding_window=False)),
    "qwen2 windows by layer types": Variant("qwen2", windows(2, layer_types=FIRST_SLIDING)),
    "qwen2 wide heads": Variant("qwen2", {"head_dim": 48}),
    "qwen2 dual chunk": Variant("qwen2", raw={"dual_chunk_attention_config": {"chunk_size": 8, "local_size": 4}}),
    "qwen2 qk_norm": Variant("qwen2", raw={"qk_norm": True}),
    "qwen2 float16": Variant("qwen2", dtype=torch.float16),
    "qwen3 biases": Variant("qwen3", {"attention_bias": True, **TIED}),
    "qwen3 yarn": Variant("qwen3", {**theta(YARN), "head_dim": 48}),
    "qwen3 windows in all layers": Variant("qwen3", windows(0)),
    "qwen3 windows in some layers": Variant("qwen3", windows(1)),
    "qwen3 tied with another head in the files": Variant("qwen3", TIED, tensors="other head"),
    "gemma tied": Variant("gemma3_text"),
    "gemma untied": Variant("gemma3_text", {"tie_word_embeddings": False}),
    "gemma without a tie setting": Variant("gemma3_text", raw={"tie_word_embeddings": REMOVED}),
    "gemma tied with another head in the files": Variant("gemma3_text", tensors="other head"),
    "gemma biases": Variant("gemma3_text", {"attention_bias": True, "head_dim": 48}),
    "gemma linear on global layers": Variant("gemma3_text", gemma_rope(LINEAR)),
    "gemma version 4": Variant("gemma3_text", raw=GEMMA_VERSION_4),
    "gemma yarn on global layers": Variant("gemma3_text", gemma_rope({**YARN, "truncate": False})),
    "gemma windows in all layers": Variant("gemma3_text", {"layer_types": ["sliding_attention"] * 2}),
    "gemma silu": Variant("gemma3_text", {"hidden_activation": "silu"}),
}
"""Checkpoints whose logits must equal those of ``from_pretrained``."""

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
    "original_max_position_embeddings": 32,
}
_CHOOSE = "llama3 or yarn"

REFUSED: dict[str, tuple[Any, ...]] = {
    "llama dynamic": (
        Variant("llama", theta(DYNAMIC)),
        *("rope_type=dynamic", "rope_parameters", _CHOOSE),
    ),
    "llama longrope": (Variant("llama", theta(LONGROPE)), "rope_type=longrope", _CHOOSE),
    "qwen2 version 4 dynamic": (
        Variant("qwen2", raw=as_version_4(DYNAMIC)),
        *("rope_type=dynamic", "rope_scaling", _CHOOSE),
    ),
    "qwen3 su": (Variant("qwen3", raw=as_version_4({**LONGROPE, "rope_type": "su"})), "rope_type=su", _CHOOSE),
    "gemma dynamic on global layers": (Variant("gemma3_text", raw=gemma_rope(DYNAMIC)), "rope_type=dynamic", _CHOOSE),
    "llama proportional": (
        Variant("llama", theta({"rope_type": "proportional", "partial_rotary_factor": 0.5})),
        *("rope_type=proportional", _CHOOSE),
    ),
    "llama unknown rotary type": (Variant("llama", raw=theta({"rope_type": "ntk"})), "rope_type=ntk", _CHOOSE),
    "llama rotary type that is a number": (Variant("llama", raw=theta({"rope_type": 3})), "rope_type=3", _CHOOSE),
    "llama rotary factor of 0": (Variant("llama", raw=theta({**LINEAR, "factor": 0})), "factor=0"),
    "llama rotary factor as a string": (Variant("llama", raw=theta({**LLAMA3, "factor": "8"})), "factor=8"),
    "llama partial linear": (
        Variant("llama", raw=theta({**LINEAR, "partial_rotary_factor": 0.5})),
        *("partial_rotary_factor=0.5", "rope_type=linear"),
    ),
    "llama bidirectional attention": (Variant("llama", raw={"is_causal": False}), "is_causal=False"),
    "llama layers of several sizes": (
        Variant("llama", raw={"per_layer_config": {"1": {"intermediate_size": 64}}}),
        "per_layer_config",
    ),
    "qwen2 chunked layers": (
        Variant("qwen2", raw={"layer_types": ["full_attention", "chunked_attention"]}),
        "chunked_attention",
    ),
    "qwen2 window of 0 tokens": (
        Variant("qwen2", raw=windows(0, sliding_window=0, layer_types=REMOVED)),
        "sliding_window=0",
    ),
    "qwen2 layer types without a window": (
        Variant("qwen2", raw={"use_sliding_window": False, "layer_types": FIRST_SLIDING}),
        *("sliding_attention", "sliding_window=None"),
    ),
    "gemma window that is null": (Variant("gemma3_text", raw={"sliding_window": None}), "sliding_window=None"),
    "qwen3 fewer layer types": (Variant("qwen3", raw={"layer_types": ["full_attention"]}), "layer_types"),
    "llama without a head": (Variant("llama", tensors="no head"), "tie_word_embeddings=False", "no lm_head.weight"),
    "llama embedding under the head's name": (
        Variant("llama", TIED, tensors="no embedding"),
        *("lm_head.weight", "save_pretrained"),
    ),
    "gemma without a head": (
        Variant("gemma3_text", {"tie_word_embeddings": False}, tensors="no head"),
        *("tie_word_embeddings=False", "no lm_head.weight"),
    ),
}
"""Checkpoints that must be refused, with words of the error."""

NOT_IN_VLLM = {
    "llama gelu": (Variant("llama", {"hidden_act": "gelu"}), "hidden_act=gelu"),
    "gemma silu": (Variant("gemma3_text", {"hidden_activation": "silu"}), "hidden_activation=silu"),
    "qwen2 wide heads": (Variant("qwen2", {"head_dim": 48}), "head_dim=48"),
    "qwen3 biases": (Variant("qwen3", {"attention_bias": True}), "attention_bias=True"),
    "qwen2 windows in some layers": (Variant("qwen2", windows(1)), "sliding_window=4 in some of its layers only"),
    "qwen2 windows by layer types": (
        Variant("qwen2", windows(2, layer_types=FIRST_SLIDING)),
        "sliding_window=4 in some of its layers only",
    ),
    "qwen3 windows in some layers": (Variant("qwen3", windows(1)), "sliding_window=4 in some of its layers only"),
    "llama yarn shorter than the window": (
        Variant("llama", theta({**YARN, "factor": 2.0})),
        "rope_type=yarn for 64 positions",
    ),
}
"""Checkpoints that transformers supports and vLLM does not, with the setting that the error names."""

ENGINE_VARIANTS = {
    "llama3, biases, wide heads, a window and two ranks": (
        Variant(
            "llama",
            {**BIASES, "head_dim": 64, "num_key_value_heads": 2},
            raw={
                **FOREIGN,
                **as_version_4(LLAMA3),
                "sliding_window": 4,
                "architectures": ["LlamaForSequenceClassification"],
            },
        ),
        2,
    ),
    "qwen2 yarn in version 4, windows, dual chunk, float16 files, one key-value head and two ranks": (
        Variant(
            "qwen2",
            windows(0),
            raw={
                **as_version_4({**YARN, "factor": None}),
                "dual_chunk_attention_config": {"chunk_size": 8, "local_size": 4},
                "qk_norm": True,
                "architectures": ["Qwen2ForRewardModel"],
            },
            dtype=torch.float16,
        ),
        2,
    ),
    "qwen3 yarn without truncation, partial rotary, untied by its files": (
        Variant(
            "qwen3",
            {**TIED, "head_dim": 64, **theta({**YARN, "truncate": False, "attention_factor": 0.7})},
            raw={"partial_rotary_factor": 1.0},
            tensors="other head",
        ),
        1,
    ),
    "gemma linear in version 4, biases, untied and two ranks": (
        Variant(
            "gemma3_text",
            {"tie_word_embeddings": False, "attention_bias": True},
            raw=GEMMA_VERSION_4,
        ),
        2,
    ),
}
"""Combinations of independent settings, with the number of ranks of the engine; an engine takes seconds to start."""

_FOUR_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TENSOR_PARALLEL = {
    "llama biases": Variant("llama", {**BIASES, **_FOUR_HEADS, "head_dim": 48, **theta(LLAMA3)}),
    # The texts contain the padding token 0, whose embedding is zero: a gradient at this token would be large.
    "gemma untied": Variant("gemma3_text", {**_FOUR_HEADS, "attention_bias": True}, tensors="other head"),
}
"""Checkpoints whose gradients must not depend on tensor parallelism."""
