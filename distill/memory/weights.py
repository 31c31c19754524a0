"""Memory of a model's sharded weights on one rank: shards, gathered layers, and the parameters that are trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from distill.memory.adapters import Adapters
from distill.memory.shapes import ModelShape, shard_sizes

Lines = dict[str, int]
"""A table of memory: maps a purpose, such as "gradients", to bytes per rank."""


@dataclass(frozen=True)
class ShardedWeights:
    """The weights of one model on the rank with the largest shards."""

    shape: ModelShape
    fsdp: int
    """Number of ranks over which FSDP splits the rows of each weight."""
    tp: int
    """Tensor-parallel size."""
    b: int
    """Number of bytes per gathered element, and per element of frozen shards."""
    stays: bool
    """Whether layers stay gathered after their forward (reshard_after_forward=false)."""
    cuda: bool
    adapters: Adapters | None = None
    """Adapters that are trained in place of the weights; None: the weights are trained, or no parameter is."""

    @property
    def shard(self) -> int:
        """Return the number of elements of the weights' shards, without adapters."""
        return sum(shard_sizes(self.shape, self.fsdp, self.tp))

    @property
    def trained(self) -> int:
        """Return the number of trained elements: all weights, or the adapters."""
        return self.shard if self.adapters is None else self.adapters.shard

    @property
    def trained_layer(self) -> int:
        """Return the number of trained elements of one gathered layer."""
        return self.shape.layer // self.tp if self.adapters is None else self.adapters.layer

    @property
    def trained_root(self) -> int:
        """Return the number of trained elements of the gathered embedding, LM head and last norm."""
        return self.shape.root // self.tp if self.adapters is None else 0

    @property
    def trained_head(self) -> int:
        """Return the number of elements of the LM head's gradient."""
        return (self.shape.head or self.shape.embedding) // self.tp if self.adapters is None else 0

    @property
    def largest_trained(self) -> int:
        """Return the number of elements of the largest shard that is trained."""
        if self.adapters is None:
            return max(self.shape.embedding, self.shape.head) // (self.fsdp * self.tp)
        return max(self.adapters.shards)

    def stored(self) -> Lines:
        """Return the memory of the student's shards: trained ones are float32, frozen ones have ``b`` bytes."""
        if self.adapters is None:
            return {"master weights": 4 * self.shard}
        return {"frozen weights": self.b * self.shard, "adapters": 4 * self.adapters.shard}

    def pinned(self) -> Lines:
        """Return the pinned memory of ``stored`` and of the gradients with cpu_offload.

        torch rounds the block of each tensor up to a power of two.
        """
        sizes = shard_sizes(self.shape, self.fsdp, self.tp)
        if self.adapters is None:
            return dict.fromkeys(("master weights", "gradients"), _rounded(sizes, 4))
        trained = dict.fromkeys(("adapters", "gradients"), _rounded(self.adapters.shards, 4))
        return {"frozen weights": _rounded(sizes, self.b)} | trained

    def gathered(self, layers: int = 2) -> Lines:
        """Return the memory of parameters that FSDP gathers at the same time, as a dict from purpose to bytes.

        ``layers``: number of buffers of a layer's size that are in memory, unless all layers stay gathered: on GPUs,
        FSDP keeps the result of a gather until the next gather has been copied to the parameters. A layer at work thus
        has two buffers, and three exist for a moment when the next layer is gathered. After the last layer, the result
        of its gather is still in memory. Embedding, head and last norm are gathered during the complete pass.
        """
        shape = self.shape
        layers = shape.layers + max(layers - 1, 1) if self.stays else min(layers, shape.layers + 1)
        return {"gathered layers": self._layers(layers), "gathered embeddings": self.b * shape.root // self.tp}

    def start(self, casts: bool) -> Lines:
        """Return the gathered memory at the start of a pass, when the first layer is gathered.

        The result of the gather of embedding, head and last norm is still in memory, in addition to these parameters.
        ``casts``: whether float32 shards of weights are cast to the compute dtype before they are gathered.
        """
        if not self.cuda:
            return replace(self, stays=False).gathered()
        root = self.b * self.shape.root
        copy = root // (self.tp * self.fsdp) if casts and self.adapters is None else 0
        return {"gathered layers": self._layers(2), "gathered embeddings": 2 * root // self.tp + copy}

    def _layers(self, count: int) -> int:
        adapters = 0 if self.adapters is None else self.adapters.layer
        return count * self.b * self.shape.layer // self.tp + count * self.b * adapters


def _rounded(sizes: tuple[int, ...] | list[int], b: int) -> int:
    """Return the bytes of pinned blocks for tensors with ``sizes`` elements of ``b`` bytes."""
    return sum(1 << (b * size - 1).bit_length() for size in sizes)
