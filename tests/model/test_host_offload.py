"""Offload of weights and moments: the size of pinned memory, its reuse, and when the moments are on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from distill.batching.plan import PackingConfig, pack, plan
from distill.distributed.world import World
from distill.metrics.step import Metrics
from distill.model import host_offload
from distill.model.hf_files import find_model
from distill.model.host_offload import PINNED_UNIT, FrozenOffload, HostSlab, OptimizerOffload, pinned_blocks
from distill.model.student import Student
from distill.model.teacher import ShardedTeacher
from distill.types import LossOutput, MicroBatch, Targets
from tests.harness import config_for, fixed_rollouts
from tests.helpers import run_ranks, save_tiny_model


@pytest.mark.parametrize("nbytes", [0, 1, PINNED_UNIT, PINNED_UNIT + 1, 8_190_530_816, 2**33])
def test_pinned_blocks_are_powers_of_two_with_the_exact_sum(nbytes: int) -> None:
    """torch's pinned allocator rounds each block up to a power of two."""
    blocks = pinned_blocks(nbytes)
    assert all(size & (size - 1) == 0 for size in blocks)
    assert 0 <= sum(blocks) - nbytes < PINNED_UNIT
    assert len(blocks) <= 16


def test_storages_of_a_slab_may_cross_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_offload, "PINNED_UNIT", 8)
    tensors = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in (3, 0, 17, 30, 1)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    before = [tensor.clone() for tensor in tensors]
    slab = HostSlab([storage.nbytes() for storage in storages], pinned=False)
    assert max(map(len, slab._pieces)) > 1
    slab.store(storages)
    for tensor in tensors:
        tensor.zero_()
    slab.load(storages)
    assert all(map(torch.equal, tensors, before))


def test_moments_use_the_same_host_memory_in_every_step() -> None:
    model = nn.Linear(300, 200)
    optimizer = torch.optim.AdamW(model.parameters())
    offload = OptimizerOffload(optimizer)
    offload.release()  # no moments yet
    slabs = []
    for _ in range(3):
        model(torch.ones(300)).sum().backward()
        offload.restore()
        optimizer.step()
        moments = [t.clone() for state in optimizer.state.values() for t in state.values()]
        offload.release()
        slabs.append(offload._host)
        assert offload.nbytes == 2 * 4 * (300 * 200 + 200)
        assert all(t.untyped_storage().nbytes() == 0 for s in optimizer.state.values() for t in s.values() if t.ndim)
        offload.restore()
        same = [t for state in optimizer.state.values() for t in state.values()]
        assert all(map(torch.equal, moments, same))
        offload.release()
    assert slabs[0] is not None and slabs[0] is slabs[1] is slabs[2]


def test_frozen_weights_return_unchanged() -> None:
    weights = [torch.randn(7, 5), torch.randn(11)]
    before = [weight.clone() for weight in weights]
    offload = FrozenOffload(weights)
    offload.release()
    assert sum(weight.untyped_storage().nbytes() for weight in weights) == 0
    offload.restore()
    assert all(map(torch.equal, weights, before))


def _step(folder: str) -> dict[str, list[int]]:
    """Return bytes of moments on the device at each loss, and lengths of FSDP's record of forwards."""
    world = World()
    world.build_mesh("cpu", tp=1, cp=1)
    words = ("distillation.allow_degenerate=true", "runtime.device=cpu")
    config, files = config_for(Path(folder), Path(folder), *words), find_model(folder, "a model")
    student, teacher = Student(config, files, world, 384, ()), ShardedTeacher(config, files, world, 384)
    student._moments = OptimizerOffload(student._optimizer)
    seen: dict[str, list[int]] = {"moments": [], "forwards": []}
    loss = student.loss

    def counted(micro_batch: MicroBatch, targets: Targets) -> LossOutput:
        states = student._optimizer.state.values()
        moments = [t for state in states for t in state.values() if t.ndim > 0]
        seen["moments"].append(sum(host_offload._storage_of(t).nbytes() for t in moments))
        return loss(micro_batch, targets)

    student.loss = counted  # type: ignore[method-assign]
    for step in range(2):
        batch = plan(fixed_rollouts(), world.layout, PackingConfig(6, 2, None), 0, step)[0]
        with teacher.on_device():
            targets = [teacher.targets(micro_batch) for micro_batch in batch]
        student.train(batch, targets, Metrics())
        student.offload()
    pack_ = pack(list(enumerate(fixed_rollouts())))
    order = teacher.model._get_fsdp_state()._comm_ctx.post_forward_order  # type: ignore[operator]
    for _ in range(3):
        with teacher.on_device():
            teacher.targets(pack_)
            seen["forwards"].append(len(order))
        groups = [state._fsdp_param_group for state in teacher.model._get_fsdp_state()._state_ctx.all_states]  # type: ignore[operator]
        seen["forwards"].append(len(order) + sum(len(group._post_forward_indices) for group in groups if group))
    world.close()
    return seen


@pytest.mark.slow
def test_moments_are_away_during_forwards_and_no_forward_is_remembered(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "m", "qwen3", True, layers=2)
    (seen,) = run_ranks(1, _step, str(tmp_path / "m"))
    assert len(seen["moments"]) == 6 and set(seen["moments"]) == {0}
    assert seen["forwards"] == [3, 0] * 3  # two layers and the root
