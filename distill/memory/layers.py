"""Bytes per token position of one decoder layer: saved for the backward, and at work in a forward or backward.

``b``: bytes per element of the compute dtype; ``tp``: tensor-parallel size; ``fused``: whether the layers use the fused
kernels for norms, rotary embedding and SwiGLU (``runtime.fused_layers``); ``cp``: context-parallel size; ``low``:
number of channels of all results A x of the layer's low-rank adapters.
"""

from __future__ import annotations

from distill.config.models import Recomputation
from distill.memory.shapes import ModelShape


def saved_by_layer(shape: ModelShape, b: int, tp: int = 1, fused: bool = False, cp: int = 1, low: int = 0) -> int:
    """Return the bytes per position that autograd saves for the backward of a layer without recomputation.

    Layers of the transformers library: each norm saves its float32 input, and its output before and after the
    multiplication by the weight. Attention saves queries, keys, values, and two copies of its output: the result of the
    attention kernel, and the input of the output projection. The MLP saves four tensors of its intermediate size. The
    norms of queries and keys save the same tensors as other norms.

    Fused layers: each norm saves its input, and the next product its output. Attention saves queries, keys, values and
    its output once, or twice with context parallelism, which exchanges it between ranks. The MLP saves three tensors of
    its intermediate size. Norms of queries and keys save their input.

    Adapters read the saved inputs of their layers, and save A x.
    """
    hidden, queries, keys, intermediate, statistics = _widths(shape, tp)
    if fused:
        normalised = b * (queries + keys) if shape.qk_norm else 0
        outputs = 2 if cp > 1 else 1
        attention = (1 + outputs) * queries + 2 * keys
        return b * ((2 + shape.norms) * hidden + attention + 3 * intermediate + low) + statistics + normalised
    normalised = (4 + b) * (queries + keys) if shape.qk_norm else 0
    return (
        shape.norms * (4 + 2 * b) * hidden
        + normalised
        + b * (3 * queries + 2 * keys)
        + statistics
        + b * (4 * intermediate + low)
    )


def kept_by_layer(
    shape: ModelShape, b: int, tp: int, fused: bool, mode: Recomputation, cp: int = 1, low: int = 0
) -> int:
    """Return the bytes per position that stay in memory from a layer's forward to its backward.

    With full recomputation it is the input of the layer. With selective recomputation it is also the results of
    attention and of all matrix products but the last, which only Gemma's norm behind the MLP needs, and but the
    products B (A x) of adapters.
    """
    hidden, queries, keys, intermediate, statistics = _widths(shape, tp)
    if mode == "none":
        return saved_by_layer(shape, b, tp, fused, cp, low)
    if mode == "full":
        return b * hidden
    own = 2 + (shape.norms > 2)
    return b * (own * hidden + 2 * queries + 2 * keys + 2 * intermediate + low) + statistics


def backward_workspace(
    shape: ModelShape, b: int, tp: int, fused: bool, mode: Recomputation, cp: int = 1, low: int = 0
) -> int:
    """Return the bytes per position that the backward of one layer needs in addition to what layers keep.

    They are the results that the layer recomputes, and gradients: two tensors of the intermediate size and two of the
    hidden size. A fused layer saves its input, which exists already, instead of a float32 copy. With adapters, a layer
    computes the sums of kept products and B (A x) again; each sum replaces a kept product of the same size.
    """
    hidden, _, _, intermediate, _ = _widths(shape, tp)
    gradients = 2 * b * (intermediate + hidden)
    if mode == "none":
        return gradients
    recomputed = saved_by_layer(shape, b, tp, fused, cp, low)
    if mode == "selective":
        recomputed -= kept_by_layer(shape, b, tp, fused, mode, cp, low) - b * hidden
    elif fused:
        recomputed -= b * hidden
    return gradients + recomputed


def forward_workspace(shape: ModelShape, b: int, fused: bool = False, tp: int = 1) -> int:
    """Return the peak bytes per position in the forward of one layer under ``torch.no_grad``.

    The peak is the residual stream plus the larger of two parts: the MLP's intermediate tensors, or the queries with
    their float32 norm (the fused norm needs no float32 tensor). ``b``: bytes per element of the compute dtype.
    """
    queries = shape.heads * shape.head_dim // tp
    attention = (8 + b) * queries if not fused else 3 * b * queries
    return max(3 * b * shape.intermediate // tp, attention) + 2 * b * shape.hidden


def _widths(shape: ModelShape, tp: int) -> tuple[int, int, int, int, int]:
    """Return the numbers of channels: hidden, queries, keys, MLP; and the bytes of attention's statistics."""
    queries, keys = shape.heads * shape.head_dim // tp, shape.kv_heads * shape.head_dim // tp
    return shape.hidden, queries, keys, shape.intermediate // tp, 4 * shape.heads // tp
