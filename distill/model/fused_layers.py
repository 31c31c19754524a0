"""Layers of Llama, Qwen and Gemma models with the Triton kernels of ``kernels.layer_*``.

transformers computes RMSNorm, rotary embedding and gated activations with 15 to 40 small GPU kernels per layer, partly
in float32. The fused forwards compute the same with five: two norms (four in Gemma), queries, keys, and the activation.
Parameters, their names, tensor-parallel plans, FSDP and activation checkpointing are not affected.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.errors import MissingError, UserError, show
from distill.model.attention import packed_attention
from distill.model.dtensor import local_shard

_KEY = "runtime.fused_layers"


def uses_fused_layers(setting: bool | None, device: torch.device) -> bool:
    """Return whether ``runtime.fused_layers`` selects the Triton kernels on ``device``; None selects them on CUDA.

    Raises ``UserError`` if Triton is missing or cannot run on the device. On a CPU, Triton's interpreter must be
    enabled before Triton is first imported.
    """
    if not (device.type == "cuda" if setting is None else setting):
        return False
    if importlib.util.find_spec("triton") is None:
        raise MissingError(
            f"{_KEY}={show(setting)} needs the package triton on {device.type}, but triton is not installed",
            f"install triton, or set {_KEY}=false, which is slower",
            key=_KEY,
            value=setting,
        )
    if device.type != "cuda":
        from distill.kernels import interpreted

        if not interpreted():
            problem = f"{_KEY}=true needs a CUDA device, but the device is {device.type}"
            raise UserError(problem, f"set {_KEY}=null", key=_KEY, value=setting)
    return True


def fuse_layers(model: PreTrainedModel) -> None:
    """Replace the forwards of norms, attention and MLPs by fused ones; call it before FSDP. Not collective.

    The model's attention must be ``attention.PACKED``. An MLP with another activation than SiLU and GELU (tanh
    approximation) keeps its forward.
    """
    for module in list(model.modules()):
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            _fuse_norm(module)
        elif name.endswith("Attention"):
            _fuse_attention(module)
        elif name.endswith("MLP"):
            _fuse_mlp(module, model.config)


def _fuse_norm(norm: Any) -> None:
    from distill.kernels.layer_norm import rms_norm

    eps, one_plus = _norm_settings(norm)

    def forward(hidden: Tensor) -> Tensor:
        normalized: Tensor = rms_norm(hidden, local_shard(norm.weight), eps, one_plus)
        return normalized

    norm.forward = forward


def _norm_settings(norm: Any) -> tuple[float, bool]:
    """Return the norm's epsilon, and whether it multiplies by 1 + weight in float32, as Gemma's norms do."""
    gemma = type(norm).__name__.startswith("Gemma")
    return float(norm.eps if gemma else norm.variance_epsilon), gemma


def _fuse_attention(attention: Any) -> None:
    from distill.kernels.layer_rotary import rotary

    def rotated(heads_THC: Tensor, norm: Any, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        weight_C, (eps, one_plus) = None, (0.0, False)
        if norm is not None:
            weight_C, (eps, one_plus) = local_shard(norm.weight), _norm_settings(norm)
        heads: Tensor = rotary(heads_THC, weight_C, cos_TC, sin_TC, eps, one_plus)
        return heads.transpose(0, 1)[None]

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Compute self-attention as the class of transformers does; [1, T, D] -> [1, T, D]."""
        assert past_key_values is None, "fused attention supports no cache"
        cos_TC, sin_TC = (angles[0] for angles in position_embeddings)
        query, key, value = (
            projection(hidden_states)[0].unflatten(-1, (-1, attention.head_dim))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query = rotated(query, getattr(attention, "q_norm", None), cos_TC, sin_TC)
        key = rotated(key, getattr(attention, "k_norm", None), cos_TC, sin_TC)
        attended, _ = packed_attention(
            attention,
            query,
            key,
            value.transpose(0, 1)[None],
            attention_mask,
            scaling=attention.scaling,
            sliding_window=getattr(attention, "sliding_window", None),
            **kwargs,
        )
        return attention.o_proj(attended.flatten(2)), None

    attention.forward = forward


def _fuse_mlp(mlp: Any, config: Any) -> None:
    from distill.kernels.layer_gate import gated

    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ("silu", "gelu_pytorch_tanh"):
        return
    gelu = activation != "silu"

    def forward(hidden: Tensor) -> Tensor:
        output: Tensor = mlp.down_proj(gated(mlp.gate_proj(hidden), mlp.up_proj(hidden), gelu))
        return output

    mlp.forward = forward
