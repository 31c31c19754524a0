"""The complete program with partial rollouts: twins without them, numbers of ranks, resumes, other features."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.checkpoint import read_info
from tests.test_train import SINCE_THE_LAST_SYNC, _command, _run, _train_rows, check_same_export, make_tiny_run

pytestmark = pytest.mark.slow
PARTIAL = "distillation.partial_rollouts"
CONTEXT = "distillation.context_distillation"
BASE = (
    "logger.report=false",
    "logger.num_train_samples_to_print=0",
    "runtime.verify_teacher=false",
    "distillation.num_prompts_per_step=2",
    "distillation.max_num_steps=4",
    "checkpointing.save_period=1",
    "checkpointing.keep_top_k=9",
    "policy.generation_batch_size=64",
    "policy.generation.max_new_tokens=40",
    "policy.optimizer.kwargs.lr=1e-2",
)
HALF = (f"{PARTIAL}.enabled=true", f"{PARTIAL}.finish_share=0.5", f"{PARTIAL}.max_age=1")
MOST = (f"{PARTIAL}.enabled=true", f"{PARTIAL}.finish_share=0.7")
ALL = (f"{PARTIAL}.enabled=true", f"{PARTIAL}.finish_share=1")
GRADED = ("distillation.train_on=right", "distillation.off_policy.share=0.25", "distillation.off_policy.column=answer")
MIXED = (
    *GRADED,
    "distillation.max_new_tokens_schedule=[[1,12],[3,40]]",
    f"{CONTEXT}.enabled=true",
    f"{CONTEXT}.teacher_prefix_template='{{problem}} {{trace}}'",
    f"{CONTEXT}.trace_extractor.think_tags=['a','b']",
    "teacher.max_total_sequence_length=256",
)
"""Grades, responses of the dataset, a schedule of limits, and a trace that the teacher reads from each response."""
SAMPLED = ("loss_fn.kl_type=sampled", "loss_fn.outside_topk=null", "loss_fn.temperature=null")
DEPENDS_ON_TIME = ("train/partial/discarded_tokens",)


def write_problems(root: Path, name: str = "problems.jsonl") -> None:
    """Write five problems, so that an epoch has two steps; long prompts leave room for few new tokens."""
    rows = [
        {"question": "1" + "+1" * length, "answer": "^[^c-f]*$", "solution": f"<think>{length}</think>"}
        for length in (1, 6, 10, 14, 17)
    ]
    (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on one and two ranks; "from 1" and "on one" resume from checkpoints of the run "two"."""
    root = make_tiny_run(tmp_path_factory.mktemp("run"))
    write_problems(root)
    graded = (*GRADED, f"data.train={{data_path: {root}/problems.jsonl, env_name: regex}}")
    mixed = (*MOST, *MIXED, graded[-1], f"teacher.model_name={root}/student")
    stopped = (*HALF, "distillation.alarms=[{metric: train/lr, value: 0, steps: 2, action: stop}]")
    two_steps, three_steps = (f"distillation.max_num_steps={steps}" for steps in (2, 3))
    runs: list[tuple[str, int, Sequence[str]]] = [
        ("two", 2, HALF),
        ("on one", 1, (*HALF, _resumes(root, "two", 2))),
        ("from 1", 2, (*HALF, _resumes(root, "two", 1))),
        ("stopped", 2, (*stopped, "checkpointing.save_period=9")),
        ("stopped", 2, stopped),
        ("mixed two", 2, mixed),
        ("mixed one", 1, mixed),
        ("mixed again", 1, (*mixed, _resumes(root, "mixed one", 3))),
        ("lockstep", 1, (*graded, two_steps)),
        ("all", 1, (*ALL, *graded, two_steps)),
        ("sampled", 1, (*HALF, *SAMPLED, three_steps)),
    ]
    lines = [_command(root, name, *BASE, *given, f"cluster.gpus_per_node={ranks}") for name, ranks, given in runs]
    ended = _run(lines, [ranks for _, ranks, _ in runs])[0]
    assert [code for code, _, _ in ended] == [0] * len(runs), [error for code, _, error in ended if code]
    return root


def _resumes(root: Path, name: str, step: int) -> str:
    return f"checkpointing.resume_from={root}/checkpoints/{name}/step_{step}"


def rows(root: Path, name: str) -> list[dict[str, Any]]:
    found = [row for row in _train_rows(root / "runs" / name) if "train/lr" in row]
    return [{key: value for key, value in row.items() if key not in DEPENDS_ON_TIME} for row in found]


def check_same_run(
    root: Path, one: str, other: str, resumed: int = 0, steps: int = 4, ours: list[dict[str, Any]] | None = None
) -> None:
    """Metrics, weights and the pool after the last step are equal bit for bit; ``ours``: the metrics of ``one``."""
    ours, theirs = ours or rows(root, one), rows(root, other)
    assert [row["step"] for row in ours] == list(range(1, steps + 1))
    if resumed:
        ours[resumed] |= {name: theirs[resumed][name] for name in SINCE_THE_LAST_SYNC}
    assert ours == theirs
    folders = [root / f"checkpoints/{name}/step_{steps}" for name in (one, other)]
    check_same_export(*folders)
    pools = [folder / "partial_rollouts.npz" for folder in folders]
    assert pools[0].read_bytes() == pools[1].read_bytes()


def check_equal(root: Path, one: str, other: str) -> None:
    """All metrics are equal, except for the rounding of sums."""
    for ours, theirs in zip(rows(root, one), rows(root, other), strict=True):
        for name in (ours.keys() | theirs.keys()) - SINCE_THE_LAST_SYNC:
            if name.startswith("train/") and not name.startswith("train/sampler_logprob_diff"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_a_share_of_1_trains_as_without_partial_rollouts_bit_for_bit(root) -> None:
    """Also with grades and with responses of the dataset between the student's own."""
    for ours, theirs in zip(rows(root, "all"), rows(root, "lockstep"), strict=True):
        assert ours["train/partial/older_token_share"] == 0 == ours["train/partial/pool_responses"]
        assert {name: value for name, value in ours.items() if "/partial/" not in name} == theirs
    check_same_export(*(root / f"checkpoints/{name}/step_2" for name in ("all", "lockstep")))
    assert not (root / "checkpoints/lockstep/step_2/partial_rollouts.npz").exists()


def test_another_number_of_ranks_resumes_and_trains_on_the_same_responses(root) -> None:
    check_equal(root, "on one", "two")
    last = rows(root, "on one")[-1]
    assert last["train/global_valid_seqs"] == 4 and 0 < last["train/partial/older_token_share"] < 1


def test_a_resume_is_bit_exact(root) -> None:
    check_same_run(root, "from 1", "two", resumed=1)


def test_the_resumes_start_from_pools_of_all_kinds(root) -> None:
    """Responses wait, unfinished ones are as old as max_age, and step 2 ends an epoch."""
    infos = [read_info(root / f"checkpoints/two/step_{step}") for step in (1, 2)]
    assert any(info["partial_rollouts"]["waiting"] for info in infos)
    assert any(info["partial_rollouts"]["waiting"] < info["partial_rollouts"]["responses"] for info in infos)
    assert infos[1]["data"]["step_in_epoch"] == 0
    assert max(row["train/partial/age_max"] for row in rows(root, "two")) >= 1
    assert all("partial_rollouts.npz" in info["files"] for info in infos), "the file is verified before a resume"


def test_a_stopped_run_saves_its_pool_and_continues_bit_for_bit(root) -> None:
    found = rows(root, "stopped")
    assert "alarm" in str([*found[1]])
    without_alarms = [{name: row[name] for name in row if not name.startswith("alarm/")} for row in found]
    check_same_run(root, "stopped", "two", resumed=2, ours=without_alarms)


def test_grades_traces_schedules_and_responses_of_the_dataset_work_with_partial_rollouts(root) -> None:
    """The teacher reads the trace of the complete response, whose limit is that of its first step."""
    check_equal(root, "mixed one", "mixed two")
    check_same_run(root, "mixed again", "mixed one", resumed=3)
    last = rows(root, "mixed one")[-1]
    assert last["train/off_policy_responses"] == 1 and last["train/partial/age_max"] >= 1
    assert last["train/context_distillation_trace_coverage"] > 0
    longest = [row["train/max_gen_tokens_per_sample"] for row in rows(root, "mixed one")]
    assert longest[0] == 12 < longest[-1]


def test_the_sampled_loss_uses_the_log_probs_of_all_segments_and_the_comparison_those_of_the_current_weights(
    root,
) -> None:
    found = rows(root, "sampled")
    assert any(row["train/partial/older_token_share"] > 0 for row in found)
    for row in found:
        assert row["train/loss"] is not None
        assert (row["train/sampler_logprob_diff"] or 0.0) < 1e-4, "a token of older weights was compared"
