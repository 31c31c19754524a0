"""One device: offloaded teacher and optimizer, fused optimizer, resume. Runs on CUDA if there is a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from distill.batching.plan import PackingConfig, pack, plan
from distill.distributed.world import World
from distill.metrics.step import Metrics
from distill.model.hf_files import find_model
from distill.model.host_offload import FrozenOffload, OptimizerOffload
from distill.model.student import Student
from distill.model.teacher import ShardedTeacher
from tests.harness import config_for, fixed_rollouts
from tests.helpers import run_ranks, save_tiny_model

pytestmark = pytest.mark.slow
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def _offload_and_onload(folder: str, device: str) -> dict[str, bool]:
    """Return whether the teacher's shards were freed, and whether targets before and after are equal."""
    world = World()
    world.build_mesh(device, tp=1, cp=1)
    config = config_for(Path(folder), Path(folder), "distillation.allow_degenerate=true", f"runtime.device={device}")
    teacher = ShardedTeacher(config, find_model(folder, "teacher.model_name"), world, 384)
    teacher._host = FrozenOffload(
        teacher.model.parameters()
    )  # on CPUs the teacher has none, because it would save nothing
    micro_batch = pack(list(enumerate(fixed_rollouts())))
    before = teacher.targets(micro_batch)
    teacher.offload()
    storages = [p.to_local().untyped_storage().nbytes() for p in teacher.model.parameters()]  # type: ignore[attr-defined]
    teacher.onload()
    after = teacher.targets(micro_batch)
    world.close()
    same = [
        torch.equal(getattr(before, name), getattr(after, name)) for name in ("ids_NK", "logprobs_NK", "log_tail_N")
    ]
    return {"freed": sum(storages) == 0, "same": all(same)}


@pytest.mark.parametrize("device", DEVICES)
def test_offloading_the_teacher_changes_no_target(tmp_path, device) -> None:
    save_tiny_model(tmp_path / "m", "qwen3", True)
    (seen,) = run_ranks(1, _offload_and_onload, str(tmp_path / "m"), device)
    assert seen == {"freed": True, "same": True}


def _trained(folder: str, device: str) -> dict[str, Any]:
    """Train with and without offloading the moments, and read the checkpoint state while they are offloaded."""
    world = World()
    world.build_mesh(device, tp=1, cp=1)
    files, rollouts, found = find_model(folder, "a model"), fixed_rollouts(), {}
    for offload in (True, False):
        config = config_for(
            *(Path(folder), Path(folder), "distillation.allow_degenerate=true", f"runtime.device={device}"),
            *("policy.precision=float32", f"runtime.offload_optimizer={str(offload).lower()}"),
        )
        student, teacher = Student(config, files, world, 384, ()), ShardedTeacher(config, files, world, 384)
        assert (student._moments is not None) == (offload and device == "cuda")
        if offload and device == "cpu":  # on CPUs the student has none, because it would save nothing
            student._moments = OptimizerOffload(student._optimizer)
        with torch.no_grad():
            for parameter in student.model.parameters():
                parameter.mul_(1.1)  # different from its teacher
        sizes = []
        for step in range(3):
            student.offload()
            moments = [t for s in student._optimizer.state.values() for t in s.values() if t.ndim > 0]
            sizes.append(sum(t.untyped_storage().nbytes() for t in moments))
            if step == 2:  # state() restores the moments; offload them again before training
                saved = {name: tensor.full_tensor().clone() for name, tensor in _sharded(student.state()).items()}
                student.offload()
            if step == 1:  # train() restores the moments itself in the other steps
                student.onload()
            for batch in plan(rollouts, world.layout, PackingConfig(6, None, None), 0, step):
                student.train(batch, [teacher.targets(micro_batch) for micro_batch in batch], Metrics())
        weights = {name: tensor.full_tensor().clone() for name, tensor in _sharded(student.state()).items()}
        found[offload] = (sizes, saved, weights)
    world.close()
    (offloaded, *ours), (kept, *theirs) = found[True], found[False]
    distances = [
        max(float((our[name] - tensor).norm() / tensor.norm()) for name, tensor in their.items())
        for our, their in zip(ours, theirs, strict=True)
    ]
    limit = 0.0 if device == "cpu" else 1e-3  # floating-point sums on a GPU differ from run to run
    return {
        "offloaded": offloaded,
        "kept": [size > 0 for size in kept],
        "same": [distance <= limit for distance in distances],
    }


def _sharded(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, DTensor)}


@pytest.mark.parametrize("device", DEVICES)
def test_offloading_the_moments_changes_no_weight_and_no_checkpoint(tmp_path, device) -> None:
    save_tiny_model(tmp_path / "m", "qwen3", True)
    (seen,) = run_ranks(1, _trained, str(tmp_path / "m"), device)
    assert seen == {"offloaded": [0, 0, 0], "kept": [False, True, True], "same": [True, True]}


@pytest.mark.parametrize("device", DEVICES)
def test_a_fused_bfloat16_run_trains_saves_and_resumes(tmp_path, device) -> None:
    from tests.test_train import mains_of_tiny_run

    lines = mains_of_tiny_run(tmp_path, device)
    assert [code for code, _, _ in lines] == [0, 0], lines
    assert "resumed from" in lines[1][2]
    rows = [json.loads(line) for line in (tmp_path / "runs/one/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["train/loss"] > 0 and row["train/sampler_logprob_diff"] < 0.2 for row in rows), rows
