"""Training with vLLM on two ranks: a resumed run with partial rollouts repeats the steps bit for bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.test_train import SINCE_THE_LAST_SYNC, _command, _run, _train_rows, check_same_export, make_tiny_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="compares bits of vLLM on CPU; tests/test_gpu.py and python -m scripts.accept train on a GPU",
    ),
]


PARTIAL = [f"distillation.partial_rollouts.{key}" for key in ("enabled=true", "finish_share=0.6", "max_age=1")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the runs, with problems of different lengths, which leave room for 8 to 28 new tokens."""
    root = make_tiny_run(tmp_path_factory.mktemp("run"))
    problems = [{"question": "1" + "+1" * length, "answer": "0"} for length in (1, 4, 8, 11, 14, 16)]
    (root / "spread.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    return root


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, list[tuple[int, str, str]]]:
    """Ends of runs in float32 on both ranks, all in the same processes, because importing vLLM takes long.

    Two steps; one step with one engine and one student of both ranks; three steps with partial rollouts, and the last
    two again.
    """
    vllm = ["policy.generation.backend=vllm", "runtime.verify_teacher=false", "logger.report=false"]
    together = ("policy.generation.vllm_cfg.tensor_parallel_size=2", "policy.dtensor_cfg.tensor_parallel_size=2")
    partial = [*PARTIAL, f"data.train={{data_path: {root}/spread.jsonl, env_name: null}}"]
    partial += ["checkpointing.save_period=1", "policy.generation.max_new_tokens=28", "distillation.max_num_steps=3"]
    partial += ["logger.num_train_samples_to_print=0"]
    lines: dict[str, Sequence[str]] = {
        "complete": ("distillation.max_num_steps=2",),
        "together": (*together, "distillation.max_num_steps=1"),
        "partial": partial,
        "partial again": (*partial, f"checkpointing.resume_from={root}/checkpoints/partial/step_1"),
    }
    ranks = _run([_command(root, name, *vllm, *overrides) for name, overrides in lines.items()])
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(lines)}


def test_every_rank_exits_with_code_0_and_the_main_rank_logs(runs) -> None:
    for ranks in runs.values():
        assert [code for code, _, _ in ranks] == [0, 0]
    (_, _, logged), _ = runs["complete"]
    assert "2 engine(s)" in logged and "reload_weights" in logged
    assert "step 2/2" in logged


def test_vllms_log_is_in_the_log_files_of_the_ranks_and_not_on_the_console(root, runs) -> None:
    engine = "vllm.v1.engine.core: "
    for rank in range(2):
        assert engine in (root / f"runs/complete/logs/rank_{rank:05d}.log").read_text()
    assert all(engine not in out + err for ranks in runs.values() for _, out, err in ranks)


def test_an_engine_and_student_of_two_ranks_train_as_those_of_one(root, runs) -> None:
    each, both = (_train_rows(root / "runs" / run) for run in ("complete", "together"))
    (other,), one = both, each[0]
    assert one["train/generated_tokens"] == other["train/generated_tokens"]
    for name in ("train/loss", "train/grad_norm"):
        assert one[name] == pytest.approx(other[name], rel=1e-4), name
    assert other["train/sampler_logprob_diff"] < 1e-4


def test_syncs_and_their_duration_are_metrics(root, runs) -> None:
    rows = [json.loads(line) for line in (root / "runs/complete/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["train/sync_changed_tensors"] > 20
        assert 0 < row["timing/train/weight_sync"] < row["timing/train/prepare_for_generation"]
        assert 0 <= row["timing/train/generation_wait_share"] < 1
        assert 0 < row["train/sampler_logprob_diff"] < 1e-4, "the engine does not hold the student's weights"
    assert all(row["train/probe_change"] > 0 for row in rows[1:])


def test_partial_rollouts_repeat_bit_for_bit(root, runs) -> None:
    """Also continued responses, whose tokens vLLM reads again under the new weights, and their pool."""
    assert "resumed from" in runs["partial again"][0][2]
    found = [_train_rows(root / "runs" / name) for name in ("partial", "partial again")]
    first, again = (
        [{key: value for key, value in row.items() if "discarded" not in key} for row in rows if "train/lr" in row]
        for rows in found
    )
    for name in SINCE_THE_LAST_SYNC:
        again[1][name] = first[1][name]
    assert first == again and [row["step"] for row in first] == [1, 2, 3]
    assert any(0 < row["train/partial/older_token_share"] < 1 for row in first)
    assert any(row["train/partial/reprefilled_tokens"] > 0 for row in first)
    assert all((row["train/sampler_logprob_diff"] or 0.0) < 1e-4 for row in first)
    names = ("partial", "partial again")
    files = [(root / f"checkpoints/{name}/step_3/partial_rollouts.npz").read_bytes() for name in names]
    assert files[0] == files[1]
    check_same_export(*(root / f"checkpoints/{name}/step_3" for name in names))
