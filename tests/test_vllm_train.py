"""The whole program with vLLM on two ranks: the same numbers twice, and across a resume, bit for bit."""

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
    """Runs of six steps in float32, one in two halves, one with one engine and one student of both ranks together; each
    in its own processes."""
    vllm = ("policy.generation.backend=vllm", "checkpointing.save_period=3")
    together = ("policy.generation.vllm_cfg.tensor_parallel_size=2", "policy.dtensor_cfg.tensor_parallel_size=2")
    ended = {}
    for name, steps, overrides in (("whole", 6, ()), ("halves", 3, ()), ("halves", 6, ()), ("together", 6, together)):
        line = _command(root, name, *vllm, *overrides, f"distillation.max_num_steps={steps}")
        ended[f"{name} to {steps}"] = run_ranks(2, _mains, [free_port()], [line])
    return ended


def _export(root: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(root / f"checkpoints/{name}/step_6/hf/model.safetensors")


def test_every_rank_ends_well_and_the_main_one_speaks(runs) -> None:
    for ranks in runs.values():
        assert [code for ((code, _, _),) in ranks] == [0, 0]
    ((_, _, said),), _ = runs["whole to 6"]
    assert "vLLM: 2 engine(s) of 1 rank(s), window 64, weights by reload_weights" in said
    assert "step 6/6" in said


def test_runs_repeat_and_resume_bit_for_bit(root, runs) -> None:
    """The first half is a second run of the same steps, the second half its resumption."""
    whole, other = (_train_rows(root / "runs" / name) for name in ("whole", "halves"))
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6]
    for key in SINCE_THE_LAST_SYNC:
        other[3][key] = whole[3][key]
    assert other == whole
    weights, others = _export(root, "whole"), _export(root, "halves")
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)


def test_one_engine_and_one_student_of_both_ranks_train_as_one_each(root, runs) -> None:
    each, both = (_train_rows(root / "runs" / run) for run in ("whole", "together"))
    for one, other in zip(each, both, strict=True):
        assert one["train/generated_tokens"] == other["train/generated_tokens"]
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)
        assert other["train/sampler_logprob_diff"] < 1e-4


def test_syncs_and_their_cost_are_metrics(root, runs) -> None:
    rows = [json.loads(line) for line in (root / "runs/whole/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["train/sync_changed_tensors"] > 20
        assert 0 < row["timing/train/weight_sync"] < row["timing/train/prepare_for_generation"]
        assert 0 <= row["timing/train/generation_wait_share"] < 1
        assert 0 < row["train/sampler_logprob_diff"] < 1e-4, "the engine does not hold the student's weights"
    assert all(row["train/probe_change"] > 0 for row in rows[1:])
