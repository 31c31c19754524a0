"""AdamW on shards: every implementation takes the same step, and norm and clipping are exact."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from distill.config.models import OptimizerKwargs
from distill.model.dtensor import local_shard
from distill.model.optimizer import ShardedAdamW, sum_of_squares

CPU = torch.device("cpu")
SHAPES = [(7, 5), (1, 3), (13,), (0, 4)]
IMPLEMENTATIONS = {
    "single tensor": OptimizerKwargs(lr=1e-2),
    "foreach": OptimizerKwargs(lr=1e-2, foreach=True),
    "fused": OptimizerKwargs(lr=1e-2, fused=True),
}


def _random(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def _parameters(mesh: DeviceMesh | None = None) -> list[nn.Parameter]:
    return [
        nn.Parameter(tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None))
        for tensor in _random(0)
    ]


def _set_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    for parameter, gradient in zip(parameters, _random(seed, scale=0.1), strict=True):
        mesh = getattr(parameter, "device_mesh", None)
        parameter.grad = gradient if mesh is None else distribute_tensor(gradient, mesh, [Shard(0)], src_data_rank=None)


def _plain_steps(count: int) -> list[Tensor]:
    """Return the weights after ``count`` steps of AdamW by its formula, in float64."""
    kwargs = OptimizerKwargs(lr=1e-2)
    weights = [tensor.double() for tensor in _random(0)]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    (b1, b2), decay = kwargs.betas, 1 - kwargs.lr * kwargs.weight_decay
    for step in range(1, count + 1):
        for w, m, v, g in zip(weights, first, second, _random(step, scale=0.1), strict=True):
            m.lerp_(g.double(), 1 - b1)
            v.mul_(b2).add_((1 - b2) * g.double() ** 2)
            w.mul_(decay).sub_(kwargs.lr * (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + kwargs.eps))
    return weights


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Yield a mesh of three ranks, of which this process is the second; collectives do nothing."""
    if dist.is_initialized():  # left by another test of this process
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=1, world_size=3, store=FakeStore())
    yield init_device_mesh("cpu", (3,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_takes_the_same_steps(name: str) -> None:
    parameters = _parameters()
    optimizer = ShardedAdamW(parameters, IMPLEMENTATIONS[name], CPU)
    assert sum(optimizer.defaults[key] for key in ("fused", "foreach")) == (name != "single tensor")
    for step in (1, 2, 3):
        _set_gradients(parameters, step)
        optimizer.step()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in parameters)
    for parameter, expected in zip(parameters, _plain_steps(3), strict=True):
        assert torch.allclose(parameter.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_shards_of_uneven_size_take_their_part_of_the_step(mesh: DeviceMesh, name: str) -> None:
    parameters = _parameters(mesh)
    optimizer = ShardedAdamW(parameters, IMPLEMENTATIONS[name], CPU)
    for step in (1, 2, 3):
        _set_gradients(parameters, step)
        optimizer.step()
    for parameter, complete in zip(parameters, _plain_steps(3), strict=True):
        expected = local_shard(distribute_tensor(complete, mesh, [Shard(0)], src_data_rank=None))
        assert torch.allclose(local_shard(parameter).double(), expected, rtol=1e-6, atol=1e-7)
    assert {len(local_shard(parameter)) for parameter in parameters} == {0, 3, 5}


def test_a_shard_that_fsdp_moved_to_other_memory_is_updated() -> None:
    parameters = _parameters()
    optimizer = ShardedAdamW(parameters, OptimizerKwargs(lr=1e-2), CPU)
    for parameter in parameters:
        parameter.data = parameter.data.clone()
    _set_gradients(parameters, 1)
    optimizer.step()
    assert all(torch.allclose(p.double(), w) for p, w in zip(parameters, _plain_steps(1), strict=True))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_moments_of_a_checkpoint_continue_the_run(mesh: DeviceMesh, name: str) -> None:
    """Copy moments and weights after one step to a new optimizer, as a resume does; both take the same second step."""
    optimizers = []
    for _ in range(2):
        parameters = _parameters(mesh)
        optimizers.append(ShardedAdamW(parameters, IMPLEMENTATIONS[name], CPU))
    trained, resumed = optimizers
    _set_gradients(trained.sharded, 1)
    trained.step()
    for (ours, moments), (theirs, saved) in zip(resumed.moments(), trained.moments(), strict=True):
        assert moments.keys() == saved.keys() and moments["exp_avg"].shape == ours.shape
        for destination, source in zip([ours, *moments.values()], [theirs, *saved.values()], strict=True):
            local_shard(destination.detach()).copy_(local_shard(source.detach()))
    for optimizer in optimizers:
        _set_gradients(optimizer.sharded, 2)
        optimizer.step()
    for ours, theirs in zip(resumed.sharded, trained.sharded, strict=True):
        assert torch.equal(local_shard(ours), local_shard(theirs))


def test_fused_is_the_default_on_gpus_only() -> None:
    def fused(device: str, kwargs: OptimizerKwargs) -> bool:
        return bool(ShardedAdamW(_parameters(), kwargs, torch.device(device)).defaults["fused"])

    assert fused("cuda", OptimizerKwargs()) and fused("cpu", OptimizerKwargs(fused=True))
    assert not fused("cpu", OptimizerKwargs())
    assert not (fused("cuda", OptimizerKwargs(foreach=True)) or fused("cuda", OptimizerKwargs(fused=False)))


def test_the_sum_of_squares_is_accurate_to_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [10.0**e * torch.randn(5_000, generator=generator) for e in (-12, 0, 6)] + [torch.zeros(0)]
    exact = math.fsum(float(x) ** 2 for tensor in tensors for x in tensor.double())
    assert float(sum_of_squares(tensors, CPU)) == pytest.approx(exact, rel=1e-14)
    assert float(sum_of_squares([], CPU)) == 0.0
    assert math.isnan(float(sum_of_squares([torch.tensor([1.0, math.nan])], CPU)))


def test_clipping_multiplies_every_gradient() -> None:
    parameters = _parameters()
    optimizer = ShardedAdamW(parameters, OptimizerKwargs(), CPU)
    optimizer.multiply_gradients(0.5)  # without gradients
    _set_gradients(parameters, 1)
    parameters[0].grad = None
    optimizer.multiply_gradients(0.25)
    for parameter, gradient in zip(parameters[1:], _random(1, scale=0.1)[1:], strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, 0.25 * gradient)
    assert parameters[0].grad is None
