"""Real runs of two ranks that alarms stop, a control experiment, and the names of their metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from distill.checkpoint.manifest import read_info
from distill.config.metric_names import is_metric
from distill.supervise.status import read_status
from tests.test_train import _command, _run, make_tiny_run

pytestmark = pytest.mark.slow

RUN = (
    *(f"distillation.{key}=true" for key in ("val_at_start", "val_at_end", "context_distillation.enabled", "control")),
    *("distillation.val_period=1", "distillation.val_num_generations=4", "teacher.max_total_sequence_length=256"),
    "distillation.context_distillation.teacher_prefix_template='Hint: {problem}'",
    *("distillation.watched_words=[what, is]", "distillation.max_num_steps=4", "checkpointing.save_period=100"),
    *("data.validation.input_key=question", "data.validation.output_key=answer"),
    "distillation.alarms=[{metric: validation/num_answers, steps: 2, action: stop}, "
    "{metric: validation/num_answers, value: 1, steps: 4, action: save}, "
    "{metric: train/grad_norm, op: '>=', value: 0, steps: 2, action: stop}]",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def starts(root: Path) -> list[list[tuple[int, str, str]]]:
    """Three starts of one run: two are stopped by alarms, after steps 1 and 2."""
    names = f"data.validation.data_path={root}/problems.jsonl", f"teacher.model_name={root}/student"
    return _run([_command(root, "run", *RUN, *names)] * 3)


def rows(root: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "runs/run" / file).read_text().splitlines()]


def test_alarms_stop_all_ranks_with_a_checkpoint_and_exit_code_0(root, starts) -> None:
    """The first alarm stops the run in the validation of step 1, the second after step 2; both count across a start."""
    assert [[code for code, _, _ in of_rank] for of_rank in starts] == [[0, 0, 0]] * 2
    events = [(e["alarm"], e["event"], e["step"], e["action"]) for e in rows(root, "alarms.jsonl")]
    assert events == [
        ("validation/num_answers>0.0,steps=2,stop", "start", 1, "stop"),
        ("train/grad_norm>=0.0,steps=2,stop", "start", 2, "stop"),
        ("validation/num_answers>1.0,steps=4,save", "start", 3, "save"),
    ]
    for (_, _, error), event in zip(starts[0][:2], rows(root, "alarms.jsonl"), strict=False):
        assert error.count(event["message"]) == 2, "the warning, and the reason of the end"


def test_a_validation_alarm_saves_the_validated_weights(root, starts) -> None:
    """No checkpoint of step 3 is due: it is saved before the next step trains, and exempt from keep_top_k."""
    saved = {step: read_info(root / f"checkpoints/run/step_{step}") for step in (1, 2, 3, 4)}
    assert {step: info.get("saved_for_alarm") for step, info in saved.items()} == {1: True, 2: True, 3: True, 4: None}
    assert saved[3]["step"] == 3
    assert all("validation/accuracy" in saved[step]["metrics"] for step in (1, 3)), "also if the alarm stops the run"
    assert [row["step"] for row in rows(root) if "validation/accuracy" in row] == [0, 1, 2, 3, 4], (
        "no validation is repeated"
    )
    history = (root / "checkpoints/run/step_3/metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["step"] for line in history) == 3


def test_a_run_that_an_alarm_stopped_continues_if_it_is_started_again(root, starts) -> None:
    found = [row for row in rows(root) if "train/loss" in row]
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert [row.get("alarm/train/grad_norm>=0.0,steps=2,stop") for row in found] == [None, 1.0, 1.0, 1.0]
    status = read_status(root / "runs/run/status.json")
    assert (status["state"], status["start_step"], status["step"]) == ("finished", 2, 4)


def test_every_recorded_metric_is_a_known_name(root, starts) -> None:
    names = {name for row in rows(root) for name in row}
    unknown = {name for name in names if not is_metric(name) and not name.startswith("alarm/")}
    assert unknown == {"step", "timestamp", "progress/total_tokens"}, "alarms cannot use these"
    assert {"train/watched_words/what", "train/repeated_token_share", "train/p99_gen_tokens_per_sample"} <= names


def test_a_control_is_trained_without_and_validated_with_the_context(root, starts) -> None:
    """Teacher and student are equal at the start: their divergence is that of the context, which training omits."""
    steps = [row for row in rows(root) if "train/loss" in row]
    assert steps[0]["train/loss"] == pytest.approx(0.0, abs=1e-5)
    (start,) = [row for row in rows(root) if row["step"] == 0]
    assert start["validation/forward_kl"] > 1e-4 and "validation/in_context_accuracy" in start
    first = json.loads((root / "runs/run/validation/step_0.jsonl").read_text().splitlines()[0])
    assert "Hint:" in first["teacher_prompt"] and "Hint:" not in first["prompt"]


def test_validations_have_pass_at_k_the_paired_change_and_the_context_at_the_end(root, starts) -> None:
    found = {row["step"]: row for row in rows(root) if "validation/accuracy" in row}
    assert {"validation/pass@2", "validation/pass@4"} <= found[0].keys()
    assert "validation/accuracy_change" not in found[0]
    for step in (1, 2, 3, 4):
        change = found[step]["validation/accuracy_change"]
        assert change == pytest.approx(found[step]["validation/accuracy"] - found[0]["validation/accuracy"])
        assert math.isfinite(found[step]["validation/accuracy_change_stderr"])
    at_end = {step for step, row in found.items() if "validation/in_context_at_end_accuracy" in row}
    assert at_end == {4} and (root / "runs/run/validation/in_context_at_end.jsonl").is_file()
