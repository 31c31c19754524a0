"""Training with vLLM on two ranks: runs repeat, and resume, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import free_port, run_ranks
from tests.test_train import SINCE_THE_LAST_SYNC, _command, _mains, _train_rows, make_tiny_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Any]:
    """Runs of six steps in float32: uninterrupted, in two halves, and with one engine and one student of both ranks.

    Each run has its own processes.
    """
    vllm = ("policy.generation.backend=vllm", "checkpointing.save_period=3")
    together = ("policy.generation.vllm_cfg.tensor_parallel_size=2", "policy.dtensor_cfg.tensor_parallel_size=2")
    ended = {}
    for name, steps, overrides in (
        ("uninterrupted", 6, ()),
        ("halves", 3, ()),
        ("halves", 6, ()),
        ("together", 6, together),
    ):
        line = _command(root, name, *vllm, *overrides, f"distillation.max_num_steps={steps}")
        ended[f"{name} to {steps}"] = run_ranks(2, _mains, [free_port()], [line])
    return ended


def _export(root: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(root / f"checkpoints/{name}/step_6/hf/model.safetensors")


def test_every_rank_exits_with_code_0_and_the_main_rank_logs(runs) -> None:
    for ranks in runs.values():
        assert [code for ((code, _, _),) in ranks] == [0, 0]
    ((_, _, logged),), _ = runs["uninterrupted to 6"]
    assert "2 engine(s)" in logged and "reload_weights" in logged
    assert "step 6/6" in logged


def test_runs_repeat_and_resume_is_bit_exact(root, runs) -> None:
    """The first half repeats three steps; the second half resumes from them."""
    once, halves = (_train_rows(root / "runs" / name) for name in ("uninterrupted", "halves"))
    assert [row["step"] for row in once] == [1, 2, 3, 4, 5, 6]
    for key in SINCE_THE_LAST_SYNC:
        halves[3][key] = once[3][key]
    assert halves == once
    weights, resumed = _export(root, "uninterrupted"), _export(root, "halves")
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)


def test_an_engine_and_student_of_two_ranks_train_as_those_of_one(root, runs) -> None:
    each, both = (_train_rows(root / "runs" / run) for run in ("uninterrupted", "together"))
    for one, other in zip(each, both, strict=True):
        assert one["train/generated_tokens"] == other["train/generated_tokens"]
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)
        assert other["train/sampler_logprob_diff"] < 1e-4


def test_syncs_and_their_duration_are_metrics(root, runs) -> None:
    rows = [json.loads(line) for line in (root / "runs/uninterrupted/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["train/sync_changed_tensors"] > 20
        assert 0 < row["timing/train/weight_sync"] < row["timing/train/prepare_for_generation"]
        assert 0 <= row["timing/train/generation_wait_share"] < 1
        assert 0 < row["train/sampler_logprob_diff"] < 1e-4, "the engine does not hold the student's weights"
    assert all(row["train/probe_change"] > 0 for row in rows[1:])
