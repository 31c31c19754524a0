"""Statistics and data of the experiments: estimates over seeds, paired differences, steps of equal time, sums."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from distill.config import load_config
from scripts import experiments, study
from scripts.experiments import Estimate, estimate, step_rows, step_seconds, training_seconds
from scripts.launch import ROOT
from scripts.make_problems import FORMS, texts
from scripts.study import (
    SEEDS,
    Arm,
    Request,
    agrees,
    compare,
    differences,
    finished_within,
    graded,
    measured,
    partial,
    scheduled,
    steps_that_fit,
    summary,
    table,
    trained_tokens,
)


def _row(step: int, total: float, validation: float = 0.0) -> dict[str, float | int]:
    """Metrics of a step: 2 s of training, of ``total`` seconds ``validation`` seconds outside of the step's work."""
    return {
        "step": step,
        "timing/train/total_step_time": total,
        "timing/train/policy_training": 2.0,
        "timing/train/validation": validation,
        "timing/train/checkpointing": 0.25,
        "throughput/training_tflop": 0.5 * step,
        "train/global_valid_toks": 100 * step,
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Files of a run of two steps: validations of one problem before the first step and after the last."""
    rows: list[dict[str, Any]] = [{"step": 0, "validation/accuracy": 0.5}, _row(1, 7.0, 3.0), _row(2, 5.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "validation").mkdir()
    for name, kls, verdicts in (
        ("step_0", (0.5, 0.7), ("wrong", "right", "wrong", "wrong")),
        ("step_2", (0.1, 0.3), ("right", "right", "wrong", "right")),
        ("in_context", (0.0, 0.0), ("right", "right", "right", "right")),
    ):
        samples = [{"prompt_id": i // 2, "verdict": v, "forward_kl": kls} for i, v in enumerate(verdicts)]
        (tmp_path / "validation" / f"{name}.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    return tmp_path


def _validated(folder: Path, kls: dict[int, float]) -> None:
    """Write a validation of one response for each step in ``kls``."""
    for step, kl in kls.items():
        sample = {"prompt_id": 0, "verdict": None, "forward_kl": [kl]}
        (folder / "validation" / f"step_{step}.jsonl").write_text(json.dumps(sample) + "\n")


def test_an_estimate_is_the_mean_with_the_interval_of_students_t() -> None:
    # 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7, standard error sqrt(7 / 3), t(2 degrees of freedom) = 4.303
    found = estimate([1.0, 2.0, 6.0])
    assert found.mean == 3.0
    assert found.high - found.mean == pytest.approx(4.303 * math.sqrt(7 / 3))
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_an_estimate_of_one_seed_has_no_interval_and_none_is_refused() -> None:
    found = estimate([0.25])
    assert found.mean == 0.25 and math.isnan(found.low) and math.isnan(found.high)
    for values in ([], [0.0] * 11):
        with pytest.raises(ValueError):
            estimate(values)


def test_differences_are_paired_by_seed() -> None:
    first = [{"kl": 1.0, "only here": 0.0}, {"kl": 5.0, "only here": 0.0}, {"kl": 9.0, "only here": 0.0}]
    found = differences(first, [{"kl": 0.5}, {"kl": 4.5}, {"kl": 8.5}])
    # The seeds differ by 4, but every pair by exactly -0.5: the paired interval is empty.
    assert found == {"kl": Estimate(-0.5, -0.5, -0.5)}
    assert summary(first)["kl"].high > 10
    with pytest.raises(ValueError):
        differences(first, [{"kl": 0.5}])


def test_a_table_lists_every_seed() -> None:
    lines = table({"one": [{"kl": 0.125}, {"kl": 0.25}, {"kl": 0.5}], "two": [{"n": 7.0}] * 3})
    assert lines[0].split() == ["one", "two"]
    assert "0.125, 0.25, 0.5" in lines[2]
    assert lines[3].split() == ["n", "7", "(7", "to", "7)"]


def test_a_comparison_reports_every_run_and_the_differences(capsys: pytest.CaptureFixture[str]) -> None:
    found = compare({"one": [{"kl": 1.0}, {"kl": 2.0}, {"kl": 3.0}], "two": [{"kl": 0.0}, {"kl": 1.0}, {"kl": 2.0}]})
    assert found["seeds"] == list(SEEDS) == [1, 2, 3]
    assert found["runs"]["one"] == [{"kl": 1.0}, {"kl": 2.0}, {"kl": 3.0}]
    assert found["differences"] == {"kl": {"mean": -1.0, "low": -1.0, "high": -1.0}}
    assert json.loads(json.dumps(found)) == found
    assert "two - one" in capsys.readouterr().out


def test_a_recommendation_agrees_if_its_context_gives_the_highest_accuracy() -> None:
    def runs(*after: float) -> list[dict[str, float]]:
        return [{"right after": each, "rise": each - 0.2} for each in after]

    results = {"sum_answer": runs(0.3, 0.4, 0.35), "sum_story": runs(0.2, 0.1, 0.3)}
    assert agrees("context prompts/sum_answer.txt", results) and not agrees("context prompts/sum_story.txt", results)
    assert agrees(None, {"sum_story": runs(0.2, 0.1, 0.3)})
    assert not agrees(None, results)  # 0.15 +- 4.303 * 0.05 / sqrt(3) is above 0


def test_steps_of_equal_time_count_the_slow_first_step_once() -> None:
    # 100 s: 10 s for the first step, then 90 / 4 = 22.5 steps of 4 s (the median of 3, 4 and 9)
    assert steps_that_fit(100.0, [10.0, 4.0, 9.0, 3.0]) == 23
    assert steps_that_fit(100.0, [10.0, 4.0, 9.0, 3.0]) > steps_that_fit(97.0, [10.0, 4.0, 9.0, 3.0])
    assert steps_that_fit(5.0, [10.0, 4.0]) == 1


def test_training_seconds_exclude_validation_and_checkpoints(run_dir: Path) -> None:
    assert [row["step"] for row in step_rows(run_dir)] == [1, 2]  # the first row has only a validation
    assert step_seconds(_row(1, 7.0, 3.0)) == 3.75
    assert training_seconds(run_dir) == 3.75 + 4.75


def test_costs_are_means_over_steps_and_kls_means_over_tokens(run_dir: Path) -> None:
    found = measured(run_dir)
    assert (found["training TFLOP per step"], found["steps"], found["training seconds"]) == (0.75, 2.0, 8.5)
    assert found["trained tokens per step"] == 150
    assert found["KL before, nats per token"] == pytest.approx(0.6)
    assert found["KL after, nats per token"] == pytest.approx(0.2)


def test_selected_tokens_count_if_the_run_selects() -> None:
    assert trained_tokens({"train/trained_tokens": 50.0, "train/global_valid_toks": 100.0}) == 50.0
    assert trained_tokens({"train/global_valid_toks": 100.0}) == 100.0


def test_rates_are_those_of_the_first_and_last_validation(run_dir: Path) -> None:
    found = graded(run_dir)
    assert (found["right before"], found["right after"], found["right with the context"]) == (0.25, 0.75, 1.0)
    assert found["rise"] == 0.5


def test_lengths_and_waits_are_means_over_steps_and_trained_tokens_a_sum(run_dir: Path) -> None:
    by_step: list[tuple[Any, ...]] = [
        (40.0, 8.0, 0.5, None),
        (100.0, 4.0, 0.25, 0.0),
        (120.0, 3.0, 0.0, 0.3),
        (140.0, 5.0, 0.25, 0.3),
    ]
    names: tuple[str, ...] = ("train/mean_gen_tokens_per_sample", "timing/train/generation_slowest")
    names += ("timing/train/generation_wait_share", "train/partial/older_token_share")
    rows = [_row(step, 5.0) | dict(zip(names, values, strict=True)) for step, values in enumerate(by_step, 1)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _validated(run_dir, {1: 0.5, 2: 0.25, 3: 0.75, 4: 0.125})
    found = scheduled(run_dir, 4)
    assert found["KL, mean of the last validations"] == 0.375
    assert (found["generation seconds per step"], found["wait share"], found["trained tokens"]) == (5.0, 0.25, 1000.0)
    assert (found["length, first third of steps"], found["length, last third of steps"]) == (40.0, 140.0)
    assert found["share of older tokens"] == pytest.approx(0.15)
    earlier = scheduled(run_dir, 2)
    assert earlier["KL, mean of the last validations"] == 0.375
    assert (earlier["steps"], earlier["training seconds"], earlier["trained tokens"]) == (2.0, 9.5, 300.0)
    assert (earlier["generation seconds per step"], earlier["wait share"]) == (6.0, 0.375)
    assert (earlier["length, first third of steps"], earlier["length, last third of steps"]) == (40.0, 100.0)
    assert earlier["share of older tokens"] == 0.0
    assert earlier["KL after, nats per token"] == 0.25


@pytest.mark.parametrize(("overrides", "in_progress"), [((), 16), (study.PARTIAL, 22)])
def test_the_recipe_of_partial_rollouts_is_valid_in_both_arms(overrides: tuple[str, ...], in_progress: int) -> None:
    config = load_config(["--config", str(ROOT / "recipes/study/long-cpu.yaml"), *overrides])
    assert (config.distillation.responses_per_step, config.distillation.most_in_progress) == (16, in_progress)


def test_partial_rollouts_are_measured_after_the_last_step_within_the_time_of_the_other_arm(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lockstep: two steps in 8.5 s. Partial rollouts: four steps, of which 4 + 2 + 2 s fit and 4 + 2 + 2 + 2 do not."""
    started: list[tuple[str, int, tuple[str, ...]]] = []
    more = tmp_path / "more"
    shutil.copytree(run_dir / "validation", more / "validation")
    rows = [_row(step, seconds + 0.25) for step, seconds in enumerate((4.0, 2.0, 2.0, 2.0), 1)]
    (more / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _validated(run_dir, {1: 0.5, 2: 0.4})
    _validated(more, {1: 0.5, 2: 0.4, 3: 0.25, 4: 0.125})

    def train(self: Request, experiment: str, arm: Arm, seed: int, *overrides: str) -> Path:
        started.append((arm.name, seed, (*arm.overrides, *overrides)))
        return run_dir if arm.name == "lockstep" else more

    monkeypatch.setattr(Request, "train", train)
    found = partial(Request((), keep=False))
    each = "distillation.val_period=1"
    settings = (each, *study.PARTIAL, "distillation.max_num_steps=4")
    assert started == [run for seed in SEEDS for run in (("lockstep", seed, (each,)), ("partial", seed, settings))]
    measurements = found["runs"]["partial"][0]
    assert (measurements["steps"], measurements["training seconds"]) == (3.0, 8.0)
    assert measurements["KL after, nats per token"] == 0.25
    curve = found["held-out KL by training seconds"]["partial"][0]
    assert curve == [(0.0, pytest.approx(0.6)), (4.0, 0.5), (6.0, 0.4), (8.0, 0.25), (10.0, 0.125)]
    assert found["lengths"]["partial"] == [[0.0] * 4] * 3 and found["runs"].keys() == {"lockstep", "partial"}
    assert "MORE_STEPS" not in capsys.readouterr().out
    monkeypatch.setattr(study, "MORE_STEPS", 1.5)  # three planned steps, which all fit
    partial(Request((), keep=False))
    assert capsys.readouterr().out.count("MORE_STEPS=1.5") == len(SEEDS)


def test_at_least_one_step_finishes_within_the_time(run_dir: Path) -> None:
    assert [finished_within(seconds, run_dir) for seconds in (0.0, 3.75, 8.4, 8.5, 100.0)] == [1, 1, 1, 2, 2]


def test_a_finished_run_is_kept_only_with_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")

    def run(command: list[str]) -> int:
        commands.append(command)
        folder = next(word for word in command if word.startswith("runtime.run_dir="))
        (tmp_path / folder.partition("=")[2]).mkdir(parents=True)
        return 0

    monkeypatch.setattr(experiments, "run", run)
    arm, keeping = Arm("two words", "x.yaml", ("a.b=1",)), Request(("c=0",), keep=True)
    for request, changed in ((keeping, "c=1"), (keeping, "c=1"), (keeping, "c=2"), (Request((), keep=False), "c=2")):
        folder = request.train("rule", arm, 1, changed)
    assert folder == tmp_path / "runs" / "rule" / "two-words-seed1"
    request.train("rule", arm, 2, "c=3")
    assert [command[-2:] for command in commands] == [
        *(["c=1", "distillation.seed=1"], ["c=2", "distillation.seed=1"], ["c=2", "distillation.seed=1"]),
        ["c=3", "distillation.seed=2"],
    ]
    assert commands[0][-6:] == [
        "recipes/study/x.yaml",
        "runtime.run_dir=runs/rule/two-words-seed1",
        *("a.b=1", "c=0", "c=1", "distillation.seed=1"),
    ]


@pytest.mark.parametrize(("reason", "fails"), [("alarm collapse: ...", False), ("train/loss is not finite", True)])
def test_a_run_that_an_alarm_stopped_has_not_failed(
    reason: str, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str]) -> int:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "status.json").write_text(json.dumps({"reason": reason}))
        return 1

    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(experiments, "run", run)
    if fails:
        with pytest.raises(SystemExit):
            experiments.train(tmp_path / "x", "x.yaml")
    else:
        assert experiments.train(tmp_path / "x", "x.yaml") == tmp_path / "x"


def test_held_out_sums_are_right_and_not_in_the_training_file() -> None:
    parts = []
    for name in ("sum_train", "sum_validation"):
        lines = (ROOT / "prompts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        parts.append([json.loads(line) for line in lines])
    for problem in (*parts[0], *parts[1]):
        first, sign, second = problem["question"].removeprefix("What is ").removesuffix("?").split()
        assert int(problem["answer"]) == int(first) + {"+": 1, "-": -1}[sign] * int(second)
    train, held_out = ({problem["question"] for problem in part} for part in parts)
    assert (len(train), len(held_out), train & held_out) == (136, 64, set())


def test_held_out_texts_have_all_forms_and_are_not_in_the_training_file() -> None:
    parts = []
    for name in ("text_train", "text_validation"):
        lines = (ROOT / "prompts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        parts.append([json.loads(line) for line in lines])
    assert [*parts[0], *parts[1]] == list(texts(seed=7)), "python scripts/make_problems.py"
    train, held_out = ({problem["question"] for problem in part} for part in parts)
    assert (len(train), len(held_out), train & held_out) == (256, 32, set())
    starts = [form.partition("{}")[0] for form in FORMS]
    assert [sum(question.startswith(start) for question in held_out) for start in starts] == [4] * 8
