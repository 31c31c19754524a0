"""Activation checkpointing: which results of a layer's forward the backward pass recomputes.

``full`` keeps only the input of each layer and runs the layer's forward again. ``selective`` also keeps the results
that cost the most time per byte. For Din input channels of a matrix product, L tokens per sequence, Dh channels per
head, bf16, and a GPU with 620 TFLOP/s (matrix products), 300 TFLOP/s (attention) and 2.8 TB/s (memory):

    attention        2 * L * Dh FLOP for 2 * Dh bytes         L / 300 ps per byte; 9 ps at L = 2,700, 55 at L = 16,400
    matrix product   2 * Din FLOP for 2 bytes                 Din / 620 ps per byte; 4 to 16 ps at Din = 2,560 to 9,728
    norm, rotary     4 bytes moved for 2 bytes kept           0.7 ps per byte
    SwiGLU           6 bytes moved for 2 bytes kept           1.1 ps per byte

So attention comes first, then the products with wide inputs, then the other products; elementwise results are always
recomputed. The result of the MLP's last product is only added to the residual stream, so no gradient needs it; only
Gemma, which has a norm behind it, keeps it.

A layer with an adapter (``lora.linear``) has three products. A x is kept: it is small, and as expensive per byte as the
product with the weight. B (A x) is recomputed: with r input channels it costs r / 620 ps per byte.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedModel

from distill.config.models import Recomputation
from distill.model.lora import has_adapter

_ATTENTION = (
    "torch_attn::_varlen_attn",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
)
_PRODUCTS = ("aten::mm", "aten::addmm")


def set_recomputation(model: PreTrainedModel, mode: Recomputation) -> None:
    """Set the activation checkpointing of all decoder layers; call it before FSDP.

    Gradients do not depend on the mode. The state of random number generators is not restored for the recomputation,
    because the layers use no random numbers.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    model.gradient_checkpointing_enable(options)
    # transformers lets the embedding's outputs require gradients, which only re-entrant checkpointing needs. With
    # adapters, the backward would then continue below the first layer with an adapter.
    model.disable_input_require_grads()
    if mode == "selective":
        for layer in model.base_model.layers:
            contexts = partial(_contexts, _kept_products(layer))
            layer._gradient_checkpointing_func = partial(checkpoint, **options, context_fn=contexts)


def _kept_products(layer: nn.Module) -> list[bool]:
    """Return whether the result of each matrix product of a layer is kept, in the order of the forward."""
    kept: list[bool] = []
    for module in layer.modules():  # all families define the linear layers in the order of the forward
        if isinstance(module, nn.Linear):
            kept += [True, False, True] if has_adapter(module) else [True]  # A x, B (A x), W x
    # The layer's last product is needed only by a norm behind the MLP.
    kept[-1] = hasattr(layer, "post_feedforward_layernorm")
    return kept


def _contexts(kept_products: list[bool]) -> Any:
    """Return the contexts of one layer's forward and of its recomputation.

    ``kept_products``: whether the result of each matrix product of the layer is kept.
    """
    seen = {False: 0, True: 0}  # torch 2.11 calls the policy again in the recomputation

    def policy(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = op._schema.name
        keeps = name in _ATTENTION
        if name in _PRODUCTS:
            number = seen[context.is_recompute]
            keeps = number < len(kept_products) and kept_products[number]
            seen[context.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
