"""The complete program on two ranks: a self-EMA teacher with traces from a dataset, validation and resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_train import SINCE_THE_LAST_SYNC, _command, _run, _train_rows, check_same_export, make_tiny_run

pytestmark = pytest.mark.slow
CONTEXT = "distillation.context_distillation"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, and a run that is resumed after its first step."""
    root = make_tiny_run(tmp_path_factory.mktemp("run"))
    overrides = [
        f"teacher.model_name={root}/student",
        "teacher.max_total_sequence_length=256",
        *(f"{CONTEXT}.{key}" for key in ("enabled=true", "mode=self_ema", "ema_decay=0.5")),
        *(f"{CONTEXT}.{key}" for key in ("trace_source=static_dataset", "static_trace.answer_column=solution")),
        f"{CONTEXT}.teacher_prefix_template='{{problem}} Think: {{trace}}'",
        *(f"distillation.{key}" for key in ("max_num_steps=2", "val_period=1", "val_at_start=true")),
        "distillation.max_val_samples=5",
        f"data.validation={{data_path: {root}/problems.jsonl}}",
        "checkpointing.save_period=1",
    ]
    half = [*overrides, "distillation.max_num_steps=1"]
    lines = [_command(root, "full", *overrides), _command(root, "parted", *half), _command(root, "parted", *overrides)]
    ran = _run(lines)[0]
    assert [code for code, _, _ in ran] == [0, 0, 0] and "resumed from" in ran[2][2], ran
    return root


def _trained(root: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in _train_rows(root / "runs" / name) if "train/loss" in row]


def test_resume_is_bit_exact_with_an_ema_teacher_and_traces(root: Path) -> None:
    full, parted = _train_rows(root / "runs/full"), _train_rows(root / "runs/parted")
    last, resumed = _trained(root, "full")[-1], next(row for row in parted if row["step"] == 2 and "train/loss" in row)
    assert last["step"] == 2
    resumed.update({name: last[name] for name in SINCE_THE_LAST_SYNC})
    at_end = {name for row in parted if row["step"] == 1 for name in row if "in_context_at_end" in name}
    assert at_end, "the first part validated step 1 as its last step"
    parted = [{n: value for n, value in row.items() if row["step"] != 1 or n not in at_end} for row in parted]
    assert full == parted
    check_same_export(root / "checkpoints/full/step_2", root / "checkpoints/parted/step_2")


def test_teacher_prefixes_contain_the_traces_of_the_dataset(root: Path) -> None:
    first, second = _trained(root, "full")
    covered = [row["train/context_distillation_trace_coverage"] for row in (first, second)]
    assert covered == [1.0, 0.75], "one of the four problems of step 2 has no trace"
    for row in (first, second):
        assert row["train/context_distillation_trace_mean_tokens"] == len("1 twice")
        assert row["train/context_distillation_valid_samples"] == 8 and row["train/forward_kl"] > 0.01
    lines = (root / "runs/full/validation/in_context.jsonl").read_text().splitlines()
    read = sorted({json.loads(line)["prompt"] for line in lines})
    assert [text.count("twice") for text in read] == [0, 1, 1, 1, 1]
    assert "What is 3 + 3? Think: 3 twice<|im_end|>" in read[3]
