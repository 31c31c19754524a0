"""Alarms of a run on one rank: warnings, alarms.jsonl, actions, resume."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from distill.config import AlarmConfig, DistillationConfig
from distill.metrics.run_alarms import RunAlarms, is_alarm
from distill.metrics.summary import console_line, summary, validation_line
from distill.supervise.stop import StopRequested

SHARE, CUT = "train/repeated_token_share", "train/truncation_rate"


class OneRank:
    """The world of a single rank, which counts broadcasts."""

    is_main, broadcasts = True, 0

    def all_or_none(self, action: str) -> AbstractContextManager[None]:
        return nullcontext()

    def broadcast(self, value: Any) -> Any:
        self.broadcasts += 1
        return value


def alarms(folder: Path, *rules: AlarmConfig, history: Sequence[Any] = (), default: bool = False, **more: Any) -> Any:
    config = DistillationConfig(alarms=rules, default_alarms=default)
    return RunAlarms(config, more.pop("world", OneRank()), folder, 10, history, **more)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def events(folder: Path) -> list[tuple[str, str, int]]:
    rows = [json.loads(line) for line in (folder / "alarms.jsonl").read_text().splitlines()]
    return [(row["alarm"], row["event"], row["step"]) for row in rows]


LOSS = AlarmConfig("train/loss", ">", 2.0, 2, "stop")
NAME = "train/loss>2.0,steps=2,stop"


def test_a_stop_alarm_ends_the_run_after_the_step_and_is_recorded(tmp_path, caplog) -> None:
    run = alarms(tmp_path, LOSS, AlarmConfig("train/loss", ">", 3.5, 1, "save"))
    assert run.check(1, {"train/loss": 3.0}) == {} and not (tmp_path / "alarms.jsonl").exists()
    run.raise_if_stopped(1)
    assert run.check(2, {"train/loss": 4.0}) == {
        "alarm/train/loss>2.0,steps=2,stop": 1.0,
        "alarm/train/loss>3.5,save": 1.0,
    }
    assert not run.take_save(), "the stop saves a checkpoint"
    with pytest.raises(StopRequested) as caught:
        run.raise_if_stopped(2)
    assert caught.value.step == 2 and is_alarm(caught.value.reason) and "train/loss is 4" in caught.value.reason
    assert len(warnings(caplog)) == 2
    assert events(tmp_path) == [(NAME, "start", 2), ("train/loss>3.5,save", "start", 2)]
    run.raise_if_stopped(10)  # the run ends after step 10 in any case


def test_a_save_alarm_requests_one_checkpoint(tmp_path) -> None:
    run = alarms(tmp_path, AlarmConfig("train/loss", ">", 2.0, 1, "save"))
    run.check(1, {"train/loss": 3.0})
    run.check(2, {"train/loss": 3.0})
    assert [run.take_save(), run.take_save()] == [True, False]
    run.raise_if_stopped(2)


@pytest.mark.parametrize(
    ("step", "saves", "action", "expected", "wrong"),
    [
        (4, True, "save", ["the checkpoint of step 4 is saved"], ["stops", "ends"]),
        (4, True, "stop", ["the checkpoint of step 4 is saved", "stops"], ["ends"]),
        (4, False, "stop", ["no checkpoint", "stops"], ["checkpoint of"]),
        (10, True, "stop", ["the checkpoint of step 10 is saved", "ends after"], ["stops"]),
        (0, True, "save", ["no checkpoint"], ["of step 0"]),
        (4, True, "warn", [], ["checkpoint", "stops"]),
    ],
)
def test_the_warning_names_only_what_the_run_does(tmp_path, caplog, step, saves, action, expected, wrong) -> None:
    run = alarms(tmp_path, AlarmConfig("validation/accuracy", "<", 0.5, 1, action), saves=saves)
    run.check(step, {"validation/accuracy": 0.1})
    (text,) = warnings(caplog)
    assert all(each in text for each in expected) and not any(each in text for each in wrong)


def test_the_warning_of_a_collapse_names_the_checkpoint_from_before_it(tmp_path, caplog) -> None:
    asked = []

    def before(step: int) -> Path:
        asked.append(step)
        return Path("checkpoints/step_4")

    run = alarms(tmp_path, default=True, checkpoint_before=before)
    for step in range(1, 9):
        run.check(step, {SHARE: 0.9 * (step > 5), CUT: 0.9 * (step > 5)})
    assert asked == [6] and len(warnings(caplog)) == 1 and "checkpoints/step_4" in caplog.text
    assert [name for name, _, _ in events(tmp_path)] == ["repetition", "truncation", "collapse"]


def test_a_resumed_run_continues_the_alarms_of_its_history(tmp_path, caplog) -> None:
    """The file has the alarms up to the checkpoint; the alarm that stopped the run does not stop it again."""
    rows = [{"step": step, "train/loss": 3.0} for step in range(1, 5)]
    first = alarms(tmp_path, LOSS)
    for row in rows:
        first.check(row["step"], row)
    first.check(5, {"train/loss": 1.0})
    assert events(tmp_path) == [(NAME, "start", 2), (NAME, "end", 5)]
    caplog.clear()
    resumed = alarms(tmp_path, LOSS, history=rows)
    assert events(tmp_path) == [(NAME, "start", 2)] and len(warnings(caplog)) == 1
    assert resumed.check(5, {"train/loss": 3.0}) == {"alarm/train/loss>2.0,steps=2,stop": 1.0}
    resumed.raise_if_stopped(5)
    resumed.check(6, {"train/loss": 1.0})
    resumed.check(7, {"train/loss": 3.0})
    resumed.check(8, {"train/loss": 3.0})
    with pytest.raises(StopRequested):
        resumed.raise_if_stopped(8)


def test_a_run_whose_recipe_changed_keeps_the_recorded_alarms_up_to_its_checkpoint(tmp_path) -> None:
    """It has no history. Later alarms and an incomplete last line are removed."""
    first = alarms(tmp_path, LOSS)
    for step, loss in enumerate([3.0, 3.0, 3.0, 1.0], 1):
        first.check(step, {"train/loss": loss})
    with (tmp_path / "alarms.jsonl").open("a") as file:
        file.write('{"step": 1, "alarm": "incompl')
    changed = alarms(tmp_path, LOSS, kept_until=3)
    assert events(tmp_path) == [(NAME, "start", 2)]
    assert changed.check(4, {"train/loss": 3.0}) == {}, "its state is new"


def test_only_the_values_of_the_main_rank_count(tmp_path) -> None:
    class Other(OneRank):
        is_main = False

        def broadcast(self, value: Any) -> Any:
            assert value == ({}, False, None)
            return {"alarm/train/loss>2.0,steps=2,stop": 1.0}, False, "alarm of the main rank"

    class Outcome(Other):
        def broadcast(self, value: Any) -> Any:
            return type(value)(*super().broadcast(value))

    run = alarms(tmp_path, LOSS, world=Outcome())
    assert run.check(1, {"train/loss": 0.0}) == {"alarm/train/loss>2.0,steps=2,stop": 1.0}
    with pytest.raises(StopRequested, match="main rank"):
        run.raise_if_stopped(1)
    assert not list(tmp_path.iterdir())


def test_a_run_without_alarms_communicates_nothing(tmp_path) -> None:
    world = OneRank()
    assert alarms(tmp_path, world=world).check(1, {"train/loss": 9.0}) == {} and world.broadcasts == 0
    assert not list(tmp_path.iterdir())


def test_a_metric_that_is_not_measured_is_reported_once(tmp_path, caplog) -> None:
    names = ("train/topk_overlap", "validation/gsm8k/accuracy", "train/probe_change", "train/loss")
    run = alarms(tmp_path, *(AlarmConfig(name, ">", 1e9) for name in names))
    run.check(1, {"train/loss": 1.0})
    assert [name in caplog.text for name in names] == [True, False, False, False], "no validation so far"
    run.check(1, {"validation/accuracy": 1.0})
    run.check(2, {"train/loss": 1.0})
    run.check(2, {"validation/accuracy": 1.0})
    assert [caplog.text.count(name) for name in names] == [1, 1, 1, 0]


def test_active_alarms_are_in_the_console_line_and_in_the_summary(tmp_path) -> None:
    values = {"train/loss": 1.0, "alarm/repetition": 1.0, "alarm/length": 0.0}
    assert "alarm: repetition  " in console_line(3, 9, {**values, "timing/train/total_step_time": 1.0})
    assert "alarm: accuracy" in validation_line(3, 9, {"validation/accuracy": 0.5, "alarm/accuracy": 1.0})
    assert "alarm" not in console_line(3, 9, {"train/loss": 1.0, "alarm/length": 0.0})
    rows = [{"step": 3, "alarm/length": 0.0}, {"step": 4, **values}, {"step": 5, **values, "alarm/length": 1.0}]
    (line,) = [line for line in summary({"run": (rows, tmp_path)}).splitlines() if line.startswith("alarms")]
    assert line.split("  ")[-1] == "repetition from step 4, length from step 5"
