"""Teachers that follow the student: average, forward and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from distill.batching.plan import PackingConfig, plan
from distill.config import Config
from distill.distributed.world import World
from distill.errors import UserError
from distill.metrics.step import Metrics
from distill.model.dtensor import local_shard
from distill.model.following_teacher import build_teacher
from distill.model.hf_files import find_model
from distill.model.student import Student
from distill.model.teacher import ScoringTeacher
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
        f"{context}.refresh_period=2",
        "teacher.dtensor_cfg.reshard_after_forward=false",  # gathered weights must not be stale
        "policy.optimizer.kwargs.lr=1e-2",
        *overrides,
        ranks=2,
    )


def _complete(named: Any, world: World) -> dict[str, Tensor]:
    gathered = GatheredWeights(named, torch.float32, 2**30, world.replica_mesh, world.layout.tp_size)
    return {name: tensor.clone() for name, tensor in gathered}


CASES = [("self_ema", 1), ("self_ema", 2), ("self_live", 1), ("self_periodic", 1), ("self_periodic", 2)]
"""Mode and tensor-parallel size."""


def _train_all(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Run all cases in the same two processes, because starting a process takes longer than a case."""
    world = World()
    found = {(mode, tp): _train(folder, world, mode, tp) for mode, tp in CASES}
    world.close()
    return found


def _train(folder: Path, world: World, mode: str, tp: int) -> dict[str, Any]:
    """Train three steps; return the student's weights, the teacher's, and the result of resume."""
    world.build_mesh("cpu", tp, 1)
    config = _config(folder, mode, f"policy.dtensor_cfg.tensor_parallel_size={tp}")
    files = find_model(str(folder), "a model")
    student = Student(config, files, world, 384, ())
    teacher = build_teacher(config, files, world, 384, student)
    weights = [_complete(student.model.named_hf_parameters(), world)]
    step_targets = []
    for step in range(STEPS):
        (batch,) = plan(fixed_rollouts(), world.layout, PackingConfig(12, None, 120), seed=0, step=step)
        targets = [teacher.targets(micro_batch) for micro_batch in batch]
        step_targets.append(targets[0])
        student.train(batch, targets, Metrics())
        teacher.after_step(student, step + 1)
        weights.append(_complete(student.model.named_hf_parameters(), world))
    resumed = build_teacher(config, files, world, 384, student)  # its weights differ from the teacher's
    for name, tensor in teacher.state().items():  # as loading a checkpoint does
        local_shard(resumed.state()[name]).copy_(local_shard(tensor))
    resumed.resume(student)
    micro_batch = batch.micro_batches[0]
    again = [cast(TopK, t.targets(micro_batch)).logprobs_NK for t in (teacher, resumed)]
    return {
        "weights": weights,
        "teacher": _shards(teacher),
        "resumed": torch.equal(*again),
        "moved": not torch.equal(again[0], cast(TopK, step_targets[-1]).logprobs_NK),
        "stored": {name: local_shard(tensor).dtype for name, tensor in teacher.state().items()},
        "state": sorted(teacher.state()),
    }


def _shards(teacher: ScoringTeacher) -> dict[str, Tensor]:
    teacher.model.reshard_all()
    return {name: local_shard(p).clone() for name, p in teacher.model.named_hf_parameters()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("m"), "qwen3", True)


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[tuple[str, int], dict[str, Any]]]:
    """Return the results of each rank by mode and tensor-parallel size."""
    return run_ranks(2, _train_all, folder)


def _parts(runs: list[dict[str, Any]], name: str) -> Tensor:
    return torch.cat([run["teacher"][name] for run in runs])


@pytest.mark.parametrize("tp", [1, 2])
def test_self_ema_teacher_has_the_average_of_the_students_weights(ranks: Any, tp: int) -> None:
    runs = [rank["self_ema", tp] for rank in ranks]
    first, *later = runs[0]["weights"]
    for name, average in first.items():
        for weights in later:
            average = DECAY * average + (1 - DECAY) * weights[name]
        assert torch.allclose(_parts(runs, name), average, rtol=1e-5, atol=1e-6), name
        assert not torch.allclose(average, later[-1][name], rtol=1e-3, atol=1e-4), "the student changed too little"
    for run in runs:
        assert run["resumed"] and run["moved"]
        assert run["state"] == sorted(f"teacher.{name}" for name in first)


def test_self_live_teacher_has_the_students_weights(ranks: Any) -> None:
    runs = [rank["self_live", 1] for rank in ranks]
    for name, weight in runs[0]["weights"][-1].items():
        assert torch.equal(_parts(runs, name), weight), name
    assert all(run["resumed"] and run["moved"] and not run["state"] for run in runs)


@pytest.mark.parametrize("tp", [1, 2])
def test_self_periodic_teacher_has_the_students_weights_of_the_last_refresh(ranks: Any, tp: int) -> None:
    """The period is 2: after 3 steps the teacher has the weights after step 2, also after a resume at step 3."""
    runs = [rank["self_periodic", tp] for rank in ranks]
    weights = runs[0]["weights"]
    for name, weight in weights[2].items():
        assert torch.equal(_parts(runs, name), weight), name
        assert not torch.equal(weight, weights[3][name])
    for run in runs:
        assert run["resumed"] and not run["moved"], "the step after a refresh has its targets"
        assert run["stored"] == {f"teacher.{name}": torch.float32 for name in weights[0]}


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_an_ema_decay_of_0_or_1_is_refused(folder: Path, decay: float) -> None:
    with pytest.raises(UserError, match="ema_decay"):
        _config(folder, "self_ema", f"distillation.context_distillation.ema_decay={decay}")
