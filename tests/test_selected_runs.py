"""The complete program: selection by grade, a schedule of limits, a periodic teacher, off-policy responses, resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_train import SINCE_THE_LAST_SYNC, _command, _run, _train_rows, check_same_export, make_tiny_run

pytestmark = pytest.mark.slow
CONTEXT = "distillation.context_distillation"
OFF_POLICY = "distillation.off_policy"
MATCHES_SOME = "^[^a-f]*$"
"""Gold answer of the grader regex: right are responses without the letters a to f."""
SHORT = ["distillation.max_num_steps=1", "checkpointing.enabled=false"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one rank, and one of two ranks.

    full, parted: three steps, one of them resumed between two refreshes of the teacher. none: no response is right.
    one, two: the same run with some off-policy responses on one and on two ranks. only: off-policy responses only.
    """
    root = make_tiny_run(tmp_path_factory.mktemp("run"))
    for name, gold in (("some", MATCHES_SOME), ("none", "^never$")):
        rows = [{"question": f"What is {i} + {i}?", "answer": gold} for i in range(12)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ["logger.report=false", "distillation.train_on=right"]
    some = f"data.train={{data_path: {root}/some.jsonl, env_name: regex}}"
    periodic = [
        *base,
        some,
        f"teacher.model_name={root}/student",
        "teacher.max_total_sequence_length=256",
        *(f"{CONTEXT}.{key}" for key in ("enabled=true", "mode=self_periodic", "refresh_period=2")),
        f"{CONTEXT}.teacher_prefix_template='Hint: {{problem}}'",
        *("distillation.max_num_steps=3", "distillation.max_new_tokens_schedule=[[2,4],[3,9]]"),
        *("checkpointing.save_period=9", "policy.optimizer.kwargs.lr=1e-2"),
    ]
    none = [*base, f"data.train={{data_path: {root}/none.jsonl, env_name: regex}}", *SHORT]
    mixed = [*base, some, *SHORT, f"{OFF_POLICY}.share=0.3", f"{OFF_POLICY}.column=answer"]
    lines = [
        _command(root, name, f"cluster.gpus_per_node={2 if name == 'two' else 1}", *overrides)
        for name, overrides in (
            ("full", periodic),
            ("parted", [*periodic, "distillation.max_num_steps=1"]),
            ("parted", periodic),
            ("none", none),
            ("one", mixed),
            ("only", [*mixed, f"{OFF_POLICY}.share=1", "distillation.train_on=all"]),
            ("two", mixed),
        )
    ]
    ran = _run(lines, [1, 1, 1, 1, 1, 1, 2])[0]
    assert [code for code, _, _ in ran] == [0] * 7 and "resumed from" in ran[2][2], ran
    assert "train_on" in ran[3][2] and f"{OFF_POLICY}.share" in ran[5][2]
    return root


def _rows(root: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in _train_rows(root / "runs" / name) if "train/lr" in row]


def test_a_resume_between_two_refreshes_is_bit_exact(root: Path) -> None:
    full, parted = _rows(root, "full"), _rows(root, "parted")
    parted[1].update({name: full[1][name] for name in SINCE_THE_LAST_SYNC})
    assert full == parted and [row["step"] for row in full] == [1, 2, 3]
    check_same_export(root / "checkpoints/full/step_3", root / "checkpoints/parted/step_3")


def test_a_step_trains_on_right_responses_only_and_counts_the_removed_ones(root: Path) -> None:
    rows = _rows(root, "full")
    for row in rows:
        removed = row["train/removed_by_train_on"]
        assert row["train/accuracy"] == 1 - removed / 8 and row["train/global_valid_seqs"] == 8 - removed
        assert row["train/empty_step"] == (removed == 8) and row["train/judge_failures"] == 0
    assert any(0 < row["train/accuracy"] < 1 for row in rows)


def test_the_schedule_limits_the_responses_of_each_step(root: Path) -> None:
    rows = _rows(root, "full")
    assert [row["train/max_new_tokens"] for row in rows] == [12, 4, 9]
    longest = [row["train/max_gen_tokens_per_sample"] for row in rows]
    assert longest[0] > 9 and longest[1] == 4 and 4 < longest[2] <= 9


def test_a_step_without_a_right_response_trains_on_nothing(root: Path) -> None:
    (row,) = _rows(root, "none")
    assert row["train/accuracy"] == row["train/global_valid_seqs"] == 0 and row["train/empty_step"] == 1
    assert row.get("train/loss") is None and row["train/mean_gen_tokens_per_sample"] > 1


def test_selected_and_off_policy_responses_have_the_same_metrics_on_any_number_of_ranks(root: Path) -> None:
    (one,), (two,) = _rows(root, "one"), _rows(root, "two")
    assert one["train/off_policy_responses"] == 2 and 0 < one["train/removed_by_train_on"] < 6, "of 8 responses"
    same = ["off_policy_responses", "removed_by_train_on", "accuracy", "loss", "off_policy_loss", "grad_norm"]
    same += ["global_valid_toks", "global_valid_seqs", "truncation_rate", "repeated_token_share", "repetition_rate"]
    same += [f"{name}_gen_tokens_per_sample" for name in ("mean", "max", "p10", "p50", "p90", "p99")]
    for name in same:
        assert one[f"train/{name}"] == pytest.approx(two[f"train/{name}"], rel=1e-5), name
    assert one["train/global_valid_seqs"] == 8 - one["train/removed_by_train_on"]


def test_a_step_of_off_policy_responses_only_has_no_metric_of_own_responses(root: Path) -> None:
    (row,) = _rows(root, "only")
    assert row["train/generated_tokens"] == 0 and row["train/off_policy_responses"] == 8
    assert row["train/global_valid_toks"] == 8 * row["train/off_policy_mean_tokens_per_sample"]
    assert row["train/off_policy_loss"] > 0 and None not in row.values()
    own = "loss truncation_rate repetition_rate forward_kl sampler_logprob_diff sampler_logprob_diff_max"
    assert not row.keys() & {f"train/{name}" for name in own.split()}
