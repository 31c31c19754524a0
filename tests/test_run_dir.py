"""The run directory: one run at a time, and the metrics of one run only."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.checkpoint import Found, lock
from distill.checkpoint.resume import RunHistory
from distill.config import Arguments, Config
from distill.data.clock import RunClock, current_time
from distill.distributed.hardware import RankDevice
from distill.errors import UserError
from distill.metrics.sinks import JsonlSink, read_metrics
from distill.run_dir import new_run_dir, open_run_dir
from distill.run_files import LOCK_FILE, PARENT_FILE
from distill.versions import Start
from scripts.launch import ROOT
from tests.lock_holder import lock_holder

CONFIG = replace(Config(), logger=replace(Config().logger, wandb_enabled=False))
START = Start((RankDevice("node1", "cpu", "AMD EPYC, 2 cores", "node1", None),), None)
OTHER = replace(CONFIG, distillation=replace(CONFIG.distillation, seed=7))


def opened(folder: Path, config: Config = CONFIG, found: Found | None = None, last_step: int = 9) -> None:
    """Open the directory as a start of a run, with a row for each of the first three steps."""
    folder.mkdir(exist_ok=True)
    arguments = Arguments(config, Path("recipe.yaml"), elsewhere=False)
    open_run_dir(arguments, folder, RunHistory(RunClock(current_time())), found, last_step, START)


def rows(*steps: int, loss: float = 0.5) -> list[dict[str, Any]]:
    return [{"step": step, "train/loss": loss / step} for step in steps]


def write(folder: Path, *steps: int, loss: float = 0.5) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(*steps, loss=loss)))


def refused(folder: Path, match: str, **start: Any) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir() if path.name != LOCK_FILE}
    with pytest.raises(UserError, match=match) as caught:
        opened(folder, **start)
    assert caught.value.key == "runtime.run_dir"
    assert {path: path.read_bytes() for path in folder.iterdir() if path.name != LOCK_FILE} == before


def at(step: int, *steps: int, loss: float = 0.5) -> Found:
    return Found(Path(f"checkpoints/step_{step}"), {"step": step}, rows(*steps, loss=loss))


def test_a_directory_with_metrics_of_another_recipe_is_refused(tmp_path: Path) -> None:
    opened(tmp_path)
    opened(tmp_path, OTHER)  # no step was recorded yet
    opened(tmp_path)
    write(tmp_path, 1, 2, 3)
    opened(tmp_path)  # a restart of a run that was killed before its first checkpoint
    refused(tmp_path, "distillation.seed was 42 and is 7", config=OTHER)
    checkpointing = replace(CONFIG.checkpointing, enabled=False)
    refused(
        tmp_path, "checkpointing.enabled was True and is False", config=replace(CONFIG, checkpointing=checkpointing)
    )
    longer = replace(CONFIG, distillation=replace(CONFIG.distillation, max_num_steps=2000))
    opened(tmp_path, longer)
    (tmp_path / "config.yaml").unlink()
    refused(tmp_path, "config.yaml cannot be read")


def test_a_directory_of_a_finished_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tmp_path)
    write(tmp_path, 1, 2, 3)
    refused(tmp_path, "finished 3 steps", last_step=3)
    opened(tmp_path, found=at(2, 1, 2), last_step=3)  # killed before its last checkpoint was complete
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    opened(tmp_path, last_step=3)  # a requeued job without any checkpoint


def test_the_directory_has_the_parent_of_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "child.yaml"
    recipe.write_text(f"defaults: {ROOT}/recipes/distillation_math.yaml\ndistillation: {{seed: 3}}\n")
    arguments = Arguments(CONFIG, recipe, elsewhere=False)
    open_run_dir(arguments, tmp_path, RunHistory(RunClock(current_time())), None, 9, START)
    parent = yaml.safe_load((tmp_path / PARENT_FILE).read_text())
    assert parent["parent"] == f"{ROOT}/recipes/distillation_math.yaml"
    assert parent["recipe"]["distillation"]["seed"] == 42 and set(parent["recipe"]) == set(asdict(CONFIG))


def test_a_resume_requires_the_rows_of_its_checkpoint(tmp_path: Path) -> None:
    opened(tmp_path)
    write(tmp_path, 1, 2, 3)
    opened(tmp_path, found=at(2, 1, 2))
    opened(tmp_path, found=at(2, 1, 2), config=OTHER)  # an allowed change: the rows are those of the checkpoint
    assert "seed: 42" in (tmp_path / "config_until_step_2.yaml").read_text()
    assert "seed: 7" in (tmp_path / "config.yaml").read_text()
    opened(tmp_path, found=at(2, 1, 2))  # the change is undone
    kept = sorted(path.name for path in tmp_path.glob("config_until*"))
    assert kept == ["config_until_step_2.yaml", "config_until_step_2_2.yaml"]


def test_steps_that_ran_again_in_another_directory_are_the_same_run(tmp_path: Path) -> None:
    """A requeued job finds a checkpoint of a second job that repeated its steps: the values and times differ."""
    opened(tmp_path)
    write(tmp_path, 1, 2, 3)
    repeated = at(3, 1, 2, 3, loss=0.75)
    repeated.history[0] = rows(1)[0]
    opened(tmp_path, found=repeated)
    JsonlSink(tmp_path / "metrics.jsonl", 3, repeated.history, clock=lambda: 0.0).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == repeated.history
    assert read_metrics(tmp_path / "metrics.replaced.jsonl") == rows(2, 3)
    refused(tmp_path, "distillation.seed was 42 and is 7", found=at(3, 1, 2, 3, loss=0.25), config=OTHER)


def test_a_run_directory_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WAIT_S", 0.5)
    with lock_holder(tmp_path) as other:
        refused(tmp_path, f"in use by another run .process {other.pid}")
    opened(tmp_path)


def test_rows_that_a_resume_repeats_are_kept_in_a_second_file(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    sink = JsonlSink(tmp_path / "metrics.jsonl", resumed_step=1, clock=lambda: 7.0)
    sink.write(2, {"train/loss": 0.1})
    sink.close()
    sink = JsonlSink(tmp_path / "metrics.jsonl", resumed_step=1)
    sink.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == rows(1)
    assert read_metrics(tmp_path / "metrics.replaced.jsonl") == [
        *rows(2, 3),
        {"step": 2, "timestamp": 7.0, "train/loss": 0.1},
    ]


def test_a_resume_completes_the_rows_of_an_older_run_directory(tmp_path: Path) -> None:
    write(tmp_path, 1)
    JsonlSink(tmp_path / "metrics.jsonl", resumed_step=3, history=rows(1, 2, 3)).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == rows(1, 2, 3)


def test_runs_that_start_at_the_same_time_get_different_directories(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: new_run_dir(str(tmp_path / "logs"), None).name, range(24)))
    assert sorted(made) == [f"exp_{number:03d}" for number in range(1, 25)]
