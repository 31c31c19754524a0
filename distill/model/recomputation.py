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
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from distill.config.models import Recomputation

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
    if mode == "selective":
        layer = model.base_model.layers[0]
        products = sum(isinstance(module, nn.Linear) for module in layer.modules())
        # The layer's last product is needed only by a norm behind the MLP.
        kept = products if hasattr(layer, "post_feedforward_layernorm") else products - 1
        options["context_fn"] = partial(_contexts, kept)
    model.gradient_checkpointing_enable(options)


def _contexts(kept_products: int) -> Any:
    """Return the contexts of one layer's forward and of its recomputation.

    ``kept_products``: number of matrix products of the layer whose results are kept, counted from the first.
    """
    seen = {False: 0, True: 0}  # torch 2.11 calls the policy again in the recomputation

    def policy(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = op._schema.name
        if name in _PRODUCTS:
            seen[context.is_recompute] += 1
        keeps = name in _ATTENTION or (name in _PRODUCTS and seen[context.is_recompute] <= kept_products)
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
