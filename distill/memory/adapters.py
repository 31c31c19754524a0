"""Numbers of parameters of the student's low-rank adapters on one rank."""

from __future__ import annotations

from dataclasses import dataclass

from distill.config import Config
from distill.memory.shapes import ModelShape
from distill.model.lora import select_layers
from distill.model.tensor_parallel import role_of


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters on the rank with the largest shards."""

    dim: int
    """Rank of the adapters: the number of rows of A and of columns of B."""
    parameters: int
    """Number of parameters of all adapters."""
    outputs: int
    """Number of outputs of all adapted linear layers."""
    shards: tuple[int, ...]
    """Number of elements of each adapter's shard."""
    layer: int
    """Number of elements of the adapters in one transformer layer on one tensor-parallel rank; the largest layer."""
    products: int
    """Number of adapters in this layer; each has an intermediate result of ``dim`` channels."""

    @property
    def shard(self) -> int:
        """Return the number of elements of all shards."""
        return sum(self.shards)

    @property
    def inputs(self) -> int:
        """Return the number of inputs of all adapted linear layers."""
        return self.parameters // self.dim - self.outputs


def adapters_of(config: Config, shape: ModelShape, fsdp: int, tp: int) -> Adapters | None:
    """Return the adapters of the student; None if all weights are trained.

    Tensor parallelism splits the larger side of an adapter: B of a layer whose outputs are split, A of a layer whose
    inputs are split. FSDP splits the rows of both over ``fsdp`` ranks.
    """
    lora = config.policy.dtensor_cfg.lora_cfg
    if not lora.enabled:
        return None
    by_layer = [
        {name.format(layer): (outputs, inputs) for name, outputs, inputs in shape.linear_layers}
        for layer in range(shape.layers)
    ]
    selected = [select_layers(lora, layers) for layers in by_layer]
    parts = [[part for item in found.items() for part in _parts(lora.dim, *item, tp)] for found in selected]
    largest = max(range(shape.layers), key=lambda layer: sum(rows * columns for rows, columns in parts[layer]))
    return Adapters(
        dim=lora.dim,
        parameters=lora.dim * sum(sum(size) for found in selected for size in found.values()),
        outputs=sum(outputs for found in selected for outputs, _ in found.values()),
        shards=tuple(-(-rows // fsdp) * columns for layer in parts for rows, columns in layer),
        layer=sum(rows * columns for rows, columns in parts[largest]),
        products=len(selected[largest]),
    )


def _parts(dim: int, name: str, size: tuple[int, int], tp: int) -> list[tuple[int, int]]:
    """Return the shapes of A and B of one linear layer on one tensor-parallel rank."""
    outputs, inputs = size
    if role_of(name) == "rowwise":
        return [(dim, inputs // tp), (outputs, dim)]
    return [(dim, inputs), (outputs // tp, dim)]
