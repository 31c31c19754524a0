"""Teachers that follow the student: the average is the formula's, what answers is it, and a resumed run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distill.batching.plan import PackingConfig, plan
from distill.config import Config
from distill.distributed.world import World
from distill.errors import UserError
from distill.metrics.step import Metrics
from distill.model.following import build_teacher
from distill.model.hf_files import find_model
from distill.model.student import Student
from distill.model.teacher import Teacher
from distill.model.weights import GatheredWeights
from distill.types import TopK
from tests.harness import config_for, fixed_rollouts
from tests.helpers import run_ranks, save_tiny_model

pytestmark = pytest.mark.slow
DECAY = 0.7
STEPS = 3


def _config(folder: Path, mode: str, *overrides: str) -> Config:
    context = "distillation.context_distillation"
    return config_for(
        folder,
        folder,
        "loss_fn.outside_topk=bucket",
        f"{context}.enabled=true",
        f"{context}.mode={mode}",
        f"{context}.ema_decay={DECAY}",
        "teacher.dtensor_cfg.reshard_after_forward=false",  # gathered weights that stay must not stay stale
        "policy.optimizer.kwargs.lr=1e-2",
        *overrides,
        ranks=2,
    )


def _whole(named: Any, world: World) -> dict[str, Tensor]:
    gathered = GatheredWeights(named, torch.float32, 2**30, world.replica_mesh, world.layout.tp_size)
    return {name: tensor.clone() for name, tensor in gathered}


def _train(folder: Path, mode: str, tp: int) -> dict[str, Any]:
    """Three steps: the student's weights after each, the teacher's after the last, and what a fresh one resumes to."""
    world = World()
    world.build_mesh("cpu", tp, 1)
    config = _config(folder, mode, f"policy.dtensor_cfg.tensor_parallel_size={tp}")
    files = find_model(str(folder), "a model")
    student = Student(config, files, world, 384, ())
    teacher = build_teacher(config, files, world, 384, student)
    weights = [_whole(student.model.named_hf_parameters(), world)]
    said = []
    for step in range(STEPS):
        (batch,) = plan(fixed_rollouts(), world.layout, PackingConfig(12, None, 120), seed=0, step=step)
        targets = [teacher.targets(micro_batch) for micro_batch in batch]
        said.append(targets[0])
        student.train(batch, targets, Metrics())
        teacher.after_step(student)
        weights.append(_whole(student.model.named_hf_parameters(), world))
    other = build_teacher(config, files, world, 384, student)
    for name, tensor in teacher.state().items():  # as a checkpoint would bring it
        cast(DTensor, other.state()[name]).to_local().copy_(cast(DTensor, tensor).to_local())
    other.resume(student)
    micro_batch = batch.micro_batches[0]
    again = [cast(TopK, t.targets(micro_batch)).logprobs_NK for t in (teacher, other)]
    world.close()
    return {
        "weights": weights,
        "teacher": _whole_teacher(teacher),
        "resumed": torch.equal(*again),
        "moved": not torch.equal(again[0], cast(TopK, said[-1]).logprobs_NK),
        "state": sorted(teacher.state()),
    }


def _whole_teacher(teacher: Teacher) -> dict[str, Tensor]:
    teacher.model.reshard_all()
    return {name: p.to_local().clone() for name, p in teacher.model.named_hf_parameters()}  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("m"), "qwen3", True)


def _parts(runs: list[dict[str, Any]], name: str) -> Tensor:
    return torch.cat([run["teacher"][name] for run in runs])


@pytest.mark.parametrize("tp", [1, 2])
def test_an_averaged_teacher_is_the_average_of_the_students_weights(folder: Path, tp: int) -> None:
    runs = run_ranks(2, _train, folder, "self_ema", tp)
    first, *others = runs[0]["weights"]
    for name, average in first.items():
        for weights in others:
            average = DECAY * average + (1 - DECAY) * weights[name]
        assert torch.allclose(_parts(runs, name), average, rtol=1e-5, atol=1e-6), name
        assert not torch.allclose(average, others[-1][name], rtol=1e-3, atol=1e-4), "the student moved too little"
    for run in runs:
        assert run["resumed"] and run["moved"]
        assert run["state"] == sorted(f"teacher.{name}" for name in first)


def test_a_live_teacher_has_the_students_weights(folder: Path) -> None:
    runs = run_ranks(2, _train, folder, "self_live", 1)
    for name, weight in runs[0]["weights"][-1].items():
        assert torch.equal(_parts(runs, name), weight), name
    assert all(run["resumed"] and run["moved"] and not run["state"] for run in runs)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_decay_that_keeps_all_or_nothing_is_refused_with_the_mode_that_does_it(folder: Path, decay: float) -> None:
    with pytest.raises(UserError, match=r"ema_decay=[01]\.0"):
        _config(folder, "self_ema", f"distillation.context_distillation.ema_decay={decay}")
