"""The program on one device: teacher away and back, fused optimizer, resume. On CUDA where there is a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distill.model.load import find_model
from distill.model.offload import HostCopy
from distill.model.teacher import Teacher
from distill.runtime.packing import pack
from distill.runtime.world import World
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
    teacher = Teacher(config, find_model(folder, "teacher.model_name"), world, 384)
    teacher._host = HostCopy(teacher.model.parameters())  # on CPU it has none by itself: nothing would be saved
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


@pytest.mark.parametrize("device", DEVICES)
def test_a_fused_bfloat16_run_trains_saves_and_resumes(tmp_path, device) -> None:
    from tests.test_train import mains_of_tiny_run

    lines = mains_of_tiny_run(tmp_path, device)
    assert [code for code, _, _ in lines] == [0, 0], lines
    assert "resumed from" in lines[1][2]
    rows = [json.loads(line) for line in (tmp_path / "runs/one/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["train/loss"] > 0 and row["train/sampler_logprob_diff"] < 0.2 for row in rows), rows
