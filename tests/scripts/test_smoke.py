"""scripts/smoke.py detects every missing output of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.smoke import missing

EXPORT = Path("checkpoints/step_2/hf")


def finished_run(folder: Path) -> Path:
    for file in ("tensorboard/events.out.tfevents.1", "checkpoints/step_2/training.json"):
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text("x")
    (folder / EXPORT).mkdir()
    (folder / EXPORT / "model.safetensors").write_text("x")
    (folder / EXPORT / "config.json").write_text("{}")
    write_losses(folder, 0.5, 0.25)
    return folder


def write_losses(folder: Path, *losses: float | None) -> None:
    rows = [{"step": step, "train/loss": loss} for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_finished_run_lacks_nothing(tmp_path: Path) -> None:
    assert missing(finished_run(tmp_path), steps=2) == []


def test_an_empty_folder_lacks_every_output(tmp_path: Path) -> None:
    assert len(missing(tmp_path, steps=2)) == 5


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
    ],
)
def test_a_missing_output_is_reported(spoil: Callable[[Path], object], word: str, tmp_path: Path) -> None:
    spoil(finished_run(tmp_path))
    assert any(word in problem for problem in missing(tmp_path, steps=2))
