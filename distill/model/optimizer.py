"""AdamW on this rank's shards of a sharded model: update, gradient norm, clipping and the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill.config.models import OptimizerKwargs
from distill.model.dtensor import local_shard


class ShardedAdamW(torch.optim.AdamW):
    """AdamW whose parameters are this rank's shards (plain tensors) of ``parameters`` (DTensors).

    An operation on a DTensor takes about 100 times as long on the host as the same operation on its shard, and AdamW
    consists of many small operations. The update of a shard needs no other rank. ``device``: the device of the rank,
    on which the default of ``kwargs.fused`` depends.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], kwargs: OptimizerKwargs, device: torch.device) -> None:
        self.sharded = list(parameters)
        fused = kwargs.fused
        if fused is None:
            fused = device.type == "cuda" and not kwargs.foreach
        options = asdict(kwargs) | {"fused": fused, "foreach": bool(kwargs.foreach)}
        # Empty until they are used: FSDP's first forward may move shards to other memory, and the old would stay alive.
        super().__init__([nn.Parameter(shard.new_empty(0)) for shard in self._local()], **options)

    @property
    def shards(self) -> list[nn.Parameter]:
        """Return the parameters of the optimizer: one shard for each sharded parameter, in order."""
        (group,) = self.param_groups
        shards: list[nn.Parameter] = group["params"]
        return shards

    def _local(self) -> list[Tensor]:
        with torch.no_grad():
            return [local_shard(parameter).detach() for parameter in self.sharded]

    def _assign_shards(self) -> None:
        for shard, local in zip(self.shards, self._local(), strict=True):
            shard.data = local

    def gradients(self, of: Callable[[nn.Parameter], bool] = lambda _: True) -> list[Tensor]:
        """Return this rank's shards of the gradients that exist; ``of``: selects parameters."""
        with torch.no_grad():
            return [local_shard(p.grad) for p in self.sharded if p.grad is not None and of(p)]

    @torch.no_grad()
    def multiply_gradients(self, factor: float) -> None:
        """Multiply all gradients by ``factor``; not collective."""
        if shards := self.gradients():
            torch._foreach_mul_(shards, factor)

    def step(self, closure: Any = None) -> Any:
        """Update the shards with the gradients of the sharded parameters; not collective."""
        self._assign_shards()
        for shard, parameter in zip(self.shards, self.sharded, strict=True):
            shard.grad = None if parameter.grad is None else local_shard(parameter.grad)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the shards and of the sharded parameters."""
        super().zero_grad(set_to_none)
        for parameter in self.sharded:
            parameter.grad = None

    def moments(self) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
        """Yield each sharded parameter with its step count and moments, which are created as zeros if missing.

        The moments are DTensors with the layout of the parameter. They share the memory of the optimizer's state, so
        they may be read or filled.
        """
        self._assign_shards()
        for parameter, shard in zip(self.sharded, self.shards, strict=True):
            state = self.state[shard]
            if not state:
                # torch keeps the step count on the host, except for its fused kernel
                device = shard.device if self.defaults["fused"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(shard.data), torch.zeros_like(shard.data)
            yield parameter, {name: _laid_out_as(parameter, tensor) for name, tensor in state.items()}


def _laid_out_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return a DTensor with the layout of ``parameter`` whose shard is ``tensor``; a scalar is returned unchanged."""
    if tensor.ndim == 0 or not isinstance(parameter, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        tensor, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return the sum of the squares of all elements as a float64 scalar on ``device``, accumulated in float64."""
    tensors = [tensor for tensor in tensors if tensor.numel()]  # on CUDA the norm of an empty tensor is uninitialized
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float64)
    return torch.stack(norms).square().sum().to(device)
