"""Training with vLLM on two ranks: a resumed run repeats the steps bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.test_train import SINCE_THE_LAST_SYNC, _command, _run, _train_rows, make_tiny_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="compares bits of vLLM on CPU; tests/test_gpu.py and python -m scripts.accept train on a GPU",
    ),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Any]:
    """Runs in float32: four steps, the last two again, and two steps with one engine and one student of both ranks.

    Each run has its own processes. The second one resumes from a copy of the first one's checkpoint of step 2.
    """
    vllm = ("policy.generation.backend=vllm", "checkpointing.save_period=2")
    together = ("policy.generation.vllm_cfg.tensor_parallel_size=2", "policy.dtensor_cfg.tensor_parallel_size=2")
    ended = {}
    for name, steps, overrides in (("complete", 4, ()), ("resumed", 4, ()), ("together", 2, together)):
        if name == "resumed":
            checkpoints = shutil.copytree(root / "checkpoints/complete", root / "checkpoints/resumed")
            shutil.rmtree(checkpoints / "step_4")
        line = _command(root, name, *vllm, *overrides, f"distillation.max_num_steps={steps}")
        ended[name] = [rank[0] for rank in _run([line])]
    return ended


def _export(root: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(root / f"checkpoints/{name}/step_4/hf/model.safetensors")


def test_every_rank_exits_with_code_0_and_the_main_rank_logs(runs) -> None:
    for ranks in runs.values():
        assert [code for code, _, _ in ranks] == [0, 0]
    (_, _, logged), _ = runs["complete"]
    assert "2 engine(s)" in logged and "reload_weights" in logged
    assert "step 4/4" in logged


def test_vllms_log_is_in_the_log_files_of_the_ranks_and_not_on_the_console(root, runs) -> None:
    engine = "vllm.v1.engine.core: "
    for rank in range(2):
        assert engine in (root / f"runs/complete/logs/rank_{rank:05d}.log").read_text()
    assert all(engine not in out + err for ranks in runs.values() for _, out, err in ranks)


def test_a_resumed_run_repeats_the_steps_bit_for_bit(root, runs) -> None:
    complete, resumed = (_train_rows(root / "runs" / name) for name in ("complete", "resumed"))
    (_, _, logged), _ = runs["resumed"]
    assert "resumed from" in logged and "step_2" in logged
    assert [row["step"] for row in complete] == [1, 2, 3, 4]
    for key in SINCE_THE_LAST_SYNC:
        resumed[2][key] = complete[2][key]
    assert resumed == complete
    weights, again = _export(root, "complete"), _export(root, "resumed")
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_an_engine_and_student_of_two_ranks_train_as_those_of_one(root, runs) -> None:
    each, both = (_train_rows(root / "runs" / run) for run in ("complete", "together"))
    assert len(both) == 2
    for one, other in zip(each[:2], both, strict=True):
        assert one["train/generated_tokens"] == other["train/generated_tokens"]
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)
        assert other["train/sampler_logprob_diff"] < 1e-4


def test_syncs_and_their_duration_are_metrics(root, runs) -> None:
    rows = [json.loads(line) for line in (root / "runs/complete/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["train/sync_changed_tensors"] > 20
        assert 0 < row["timing/train/weight_sync"] < row["timing/train/prepare_for_generation"]
        assert 0 <= row["timing/train/generation_wait_share"] < 1
        assert 0 < row["train/sampler_logprob_diff"] < 1e-4, "the engine does not hold the student's weights"
    assert all(row["train/probe_change"] > 0 for row in rows[1:])


@pytest.fixture(scope="module")
def partial(root: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Metrics of three steps with partial rollouts, and of a run that repeats the last two of them.

    Problems of different lengths leave room for 8 to 28 new tokens.
    """
    problems = [{"question": "1" + "+1" * length, "answer": "0"} for length in (1, 4, 8, 11, 14, 16)]
    (root / "spread.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    given = [f"distillation.partial_rollouts.{key}" for key in ("enabled=true", "finish_share=0.6", "max_age=1")]
    given += ["checkpointing.save_period=1", f"data.train={{data_path: {root}/spread.jsonl, env_name: null}}"]
    given += ["policy.generation.backend=vllm", "policy.generation.max_new_tokens=28", "distillation.max_num_steps=3"]
    given += ["logger.num_train_samples_to_print=0", "logger.report=false"]
    found: list[list[dict[str, Any]]] = []
    for name in ("partial", "partial again"):
        if found:
            shutil.copytree(root / "checkpoints/partial/step_1", root / f"checkpoints/{name}/step_1")
        ran = _run([_command(root, name, *given)])
        assert [rank[0][0] for rank in ran] == [0, 0], ran[0][0][2]
        rows = [row for row in _train_rows(root / "runs" / name) if "train/lr" in row]
        found.append([{key: value for key, value in row.items() if "discarded" not in key} for row in rows])
    return found[0], found[1]


def test_partial_rollouts_repeat_bit_for_bit(root, partial) -> None:
    """Also continued responses, whose tokens vLLM reads again under the new weights, and their pool."""
    first, again = partial
    for name in SINCE_THE_LAST_SYNC:
        again[1][name] = first[1][name]
    assert first == again and [row["step"] for row in first] == [1, 2, 3]
    assert any(0 < row["train/partial/older_token_share"] < 1 for row in first)
    assert any(row["train/partial/reprefilled_tokens"] > 0 for row in first)
    assert all((row["train/sampler_logprob_diff"] or 0.0) < 1e-4 for row in first)
    folders = [root / f"checkpoints/{name}/step_3" for name in ("partial", "partial again")]
    files = [(folder / "partial_rollouts.npz").read_bytes() for folder in folders]
    assert files[0] == files[1]
    weights, repeated = (load_file(folder / "hf/model.safetensors") for folder in folders)
    assert all(torch.equal(weights[name], repeated[name]) for name in weights)
