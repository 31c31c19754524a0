"""The program on one device: teacher away and back, fused optimizer, resume. On CUDA where there is a GPU."""

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


def _away_and_back(folder: str, device: str) -> dict[str, bool]:
    """Targets before and after the teacher's shards left the device, and whether they had left."""
    world = World()
    world.build_mesh(device, tp=1, cp=1)
    config = config_for(Path(folder), Path(folder), "distillation.allow_degenerate=true", f"runtime.device={device}")
    teacher = ShardedTeacher(config, find_model(folder, "teacher.model_name"), world, 384)
    teacher._host = FrozenOffload(teacher.model.parameters())  # on CPU it has none by itself: nothing would be saved
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
    return {"away": sum(storages) == 0, "same": all(same)}


@pytest.mark.parametrize("device", DEVICES)
def test_a_teacher_that_was_away_says_the_same(tmp_path, device) -> None:
    save_tiny_model(tmp_path / "m", "qwen3", True)
    (seen,) = run_ranks(1, _away_and_back, str(tmp_path / "m"), device)
    assert seen == {"away": True, "same": True}


def _trained(folder: str, device: str) -> dict[str, Any]:
    """A student whose moments leave between steps, and one whose stay; both asked for a checkpoint when away."""
    world = World()
    world.build_mesh(device, tp=1, cp=1)
    files, rollouts, found = find_model(folder, "a model"), fixed_rollouts(), {}
    for away in (True, False):
        config = config_for(
            *(Path(folder), Path(folder), "distillation.allow_degenerate=true", f"runtime.device={device}"),
            *("policy.precision=float32", f"runtime.offload_optimizer={str(away).lower()}"),
        )
        student, teacher = Student(config, files, world, 384, ()), ShardedTeacher(config, files, world, 384)
        assert (student._moments is not None) == (away and device == "cuda")
        if away and device == "cpu":  # there it has none by itself: nothing would be saved
            student._moments = OptimizerOffload(student._optimizer)
        with torch.no_grad():
            for parameter in student.model.parameters():
                parameter.mul_(1.1)  # away from its teacher
        left = []
        for step in range(3):
            student.offload()
            moments = [t for s in student._optimizer.state.values() for t in s.values() if t.ndim > 0]
            left.append(sum(t.to_local().untyped_storage().nbytes() for t in moments))
            if step == 2:  # not away when they are read, and away again before it trains
                saved = {name: tensor.full_tensor().clone() for name, tensor in _sharded(student.state()).items()}
                student.offload()
            if step == 1:  # whoever steps without it gets them too
                student.onload()
            for batch in plan(rollouts, world.layout, PackingConfig(6, None, None), 0, step):
                student.train(batch, [teacher.targets(micro_batch) for micro_batch in batch], Metrics())
        weights = {name: tensor.full_tensor().clone() for name, tensor in _sharded(student.state()).items()}
        found[away] = (left, saved, weights)
    world.close()
    (left, *ours), (stayed, *theirs) = found[True], found[False]
    apart = [
        max(float((our[name] - tensor).norm() / tensor.norm()) for name, tensor in their.items())
        for our, their in zip(ours, theirs, strict=True)
    ]
    limit = 0.0 if device == "cpu" else 1e-3  # sums of a GPU differ from run to run
    return {"left": left, "stayed": [size > 0 for size in stayed], "same": [distance <= limit for distance in apart]}


def _sharded(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, DTensor)}


@pytest.mark.parametrize("device", DEVICES)
def test_a_student_whose_moments_were_away_trains_and_saves_the_same(tmp_path, device) -> None:
    save_tiny_model(tmp_path / "m", "qwen3", True)
    (seen,) = run_ranks(1, _trained, str(tmp_path / "m"), device)
    assert seen == {"left": [0, 0, 0], "stayed": [False, True, True], "same": [True, True]}


@pytest.mark.parametrize("device", DEVICES)
def test_a_fused_bfloat16_run_trains_saves_and_resumes(tmp_path, device) -> None:
    from tests.test_train import mains_of_tiny_run

    lines = mains_of_tiny_run(tmp_path, device)
    assert [code for code, _, _ in lines] == [0, 0], lines
    assert "resumed from" in lines[1][2]
    rows = [json.loads(line) for line in (tmp_path / "runs/one/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["train/loss"] > 0 and row["train/sampler_logprob_diff"] < 0.2 for row in rows), rows
