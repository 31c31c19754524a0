"""Seconds of forward and backward passes over packed sequences, and of the exchange of weights between ranks."""

from __future__ import annotations

from dataclasses import dataclass

from distill.batching.flops import ModelFlops
from distill.config.models import Recomputation
from distill.memory.adapters import Adapters
from distill.memory.shapes import ModelShape
from distill.timing.lengths import Lengths
from distill.timing.rates import ATTENTION_BACKWARD_FLOPS, Rates

UNFUSED_NORM, UNFUSED_ROTARY = 36, 21
"""Bytes per element that a norm and a rotary embedding of transformers move: six and ten kernels, partly float32."""
BACKWARD_BYTES = 2.5
"""Bytes that small operations move in a backward, relative to their forward; an assumption."""
LOSS_BYTES = 18
"""Bytes per logit that the loss moves: it writes float32 logits, reads them twice, writes bfloat16 gradients and reads
them for two matrix products."""
TOPK_BYTES = 8
"""Bytes per logit that the teacher's top-k moves: it writes float32 logits and reads them once."""
TORCH_LOSS_BYTES, TORCH_TOPK_BYTES = 62, 84
"""The same without Triton: torch reads and writes the logits in ten and in eight kernels (distill/timing/README.md)."""


def flops_of_shape(shape: ModelShape) -> ModelFlops:
    """Return the FLOPs of a model; layers with a sliding window count as layers with full attention."""
    names = ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab")
    return ModelFlops(**{name: getattr(shape, name) for name in names})


@dataclass(frozen=True)
class Sequences:
    """Sequences that a model reads in a step, summed over all ranks."""

    positions: float
    """Number of computed token positions; a shared prompt counts once."""
    pairs: float
    """Number of pairs of query and key, in one layer."""
    rows: float
    """Number of response tokens, for which the LM head computes logits."""

    @classmethod
    def of(cls, lengths: Lengths, prompt: float, responses: int, prompts: int) -> Sequences:
        """Return the sequences of ``responses`` responses to ``prompts`` computed prompts of ``prompt`` tokens."""
        n = lengths.quantiles
        tokens, pairs = float(n.mean()), float((n * (prompt + n / 2)).mean())
        return cls(
            prompts * prompt + responses * tokens,
            prompts * prompt * prompt / 2 + responses * pairs,
            responses * tokens,
        )


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one rank in the layers of a model for the sequences of a step, without the exchange of weights."""

    forward: float
    elementwise: float
    """Part of ``forward`` for norms, rotary embeddings, activations and residual sums."""
    backward: float

    def training(self, recomputed: Recomputation) -> float:
        """Return the seconds of forward and backward; ``recomputed``: what the backward computes again."""
        again = {"none": 0.0, "selective": self.elementwise, "full": self.forward}[recomputed]
        return self.forward + again + self.backward


def elementwise_bytes(shape: ModelShape, itemsize: int, fused: bool) -> float:
    """Return the bytes per position and layer that norms, rotary embedding, SwiGLU and residual sums move.

    Fused kernels read and write each tensor once.
    """
    normalised = shape.norms * shape.hidden
    queries_keys = (shape.heads + shape.kv_heads) * shape.head_dim
    if shape.qk_norm:
        normalised += queries_keys
    if fused:
        return itemsize * (2 * normalised + 2 * queries_keys + 3 * shape.intermediate)
    sums = 6 * shape.hidden + 5 * shape.intermediate
    return UNFUSED_NORM * normalised + UNFUSED_ROTARY * queries_keys + itemsize * sums


def layer_times(
    shape: ModelShape,
    read: Sequences,
    rates: Rates,
    ranks: int,
    itemsize: int,
    fused: bool,
    adapters: Adapters | None = None,
) -> LayerTimes:
    """Return the seconds of each of ``ranks`` ranks, if the work is even.

    The backward of matrix products has twice the FLOPs of the forward. With ``adapters`` the weights are frozen: their
    products have no gradients of weights, and those of the adapters are added.
    """
    flops, positions = flops_of_shape(shape), read.positions / ranks
    matmul = flops.token_flops * positions / rates.matmul
    attention = flops.layers * flops.pair_flops * read.pairs / ranks
    moved = shape.layers * elementwise_bytes(shape, itemsize, fused) * positions / rates.elementwise
    backward, low = 2 * matmul, 0.0
    if adapters is not None:
        low = 2 * adapters.parameters * positions / rates.matmul
        moved += adapter_bytes(adapters, itemsize) * positions / rates.elementwise
        backward = matmul + 2 * low
    backward += ATTENTION_BACKWARD_FLOPS * attention / rates.attention_backward + BACKWARD_BYTES * moved
    return LayerTimes(matmul + low + attention / rates.attention_forward + moved, moved, backward)


def adapter_bytes(adapters: Adapters, itemsize: int) -> float:
    """Return the bytes per position that a forward of all adapters moves: they limit it, not its FLOPs.

    A x reads the inputs of each layer. B (A x) has the size of the layer's outputs; it is written, and read by the
    product with the weight, which adds it.
    """
    return itemsize * (adapters.inputs + 2 * adapters.outputs)


def head_seconds(
    shape: ModelShape, rows: float, rates: Rates, ranks: int, bytes_: int, wide: int = 1, narrow: int = 0
) -> float:
    """Return the seconds of each rank for the LM head.

    ``bytes_``: per logit. ``wide``: matrix products with float32 results (logits), ``narrow``: in the compute dtype
    (gradients).
    """
    logits = shape.vocab * rows / ranks
    flops = 2 * shape.hidden * logits
    return flops * (wide / rates.wide_matmul + narrow / rates.matmul) + bytes_ * logits / rates.memory


def gather_seconds(bytes_: float, ranks: int, per_node: int, rates: Rates) -> float:
    """Return the seconds of a gather of ``bytes_`` over ``ranks`` ranks; a reduce-scatter takes as long.

    Each rank receives the shards of all others over its links. A node receives the shards of all other nodes over the
    network cards of its ``per_node`` ranks. The slower one counts.
    """
    nodes = -(-ranks // per_node)
    inside = bytes_ * (ranks - 1) / ranks / rates.link
    return max(inside, bytes_ * (nodes - 1) / nodes / (min(per_node, ranks) * rates.network))
