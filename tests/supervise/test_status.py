"""status.json: its keys, and which rank's exit status it contains."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distill.supervise.status import STATUS_FILE, ExitStatus, Status, read_status

KEYS = {"state", "reason", "exit_code", "start_step", "step", "checkpoint_step", "retryable", "time"}


def test_status_json_contains_the_progress_and_then_the_exit_status(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("DISTILL_STATUS_FILE", str(tmp_path / "extra.json"))
    main, other = Status(is_main=True), Status(is_main=False)
    assert read_status(tmp_path / "extra.json")["state"] == "running", "exists before the run has a directory"
    for status in (main, other):
        status.begin(tmp_path, 3)
    other.set_step(4)
    found = read_status(tmp_path / STATUS_FILE)
    assert found == read_status(tmp_path / "extra.json") and found.keys() == KEYS
    assert (found["state"], found["step"]) == ("running", 3), "only the main rank writes"
    main.set_step(4)
    other.set_exit_status(ExitStatus("finished", "", 0))
    assert read_status(tmp_path / STATUS_FILE)["state"] == "running"
    main.set_exit_status(ExitStatus("stopped", "SIGTERM", 0))
    main.set_exit_status(ExitStatus("failed", "a consequence", 1))
    found = read_status(tmp_path / STATUS_FILE)
    found.pop("time")
    status_fields = {"state": "stopped", "reason": "SIGTERM", "exit_code": 0, "retryable": False}
    assert found == {**status_fields, "start_step": 3, "step": 4, "checkpoint_step": 3}, "the first exit status wins"
    main.set_step(5)
    assert read_status(tmp_path / STATUS_FILE)["state"] == "stopped", "a main thread that still runs for a moment"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["extra.json", STATUS_FILE]


def test_the_reason_of_the_first_failure_is_reported_once() -> None:
    reasons: list[str] = []
    failed, stopped = Status(is_main=False, on_failure=reasons.append), Status(is_main=True, on_failure=reasons.append)
    failed.set_exit_status(ExitStatus("refused", "a=1 is wrong: set 2", 2))
    failed.set_exit_status(ExitStatus("failed", "a consequence", 1))
    stopped.set_exit_status(ExitStatus("stopped", "SIGTERM", 0))
    stopped.set_exit_status(ExitStatus("failed", "a consequence", 1))
    assert reasons == ["a=1 is wrong: set 2"]


def test_an_old_status_is_overwritten_and_the_exit_status_of_another_rank_is_not(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "extra.json"
    monkeypatch.setenv("DISTILL_STATUS_FILE", str(file))
    file.write_text('{"state": "failed", "reason": "rank 3: broken"}')
    Status(is_main=True).set_exit_status(ExitStatus("stopped", "SIGTERM", 0))
    assert read_status(file)["reason"] == "rank 3: broken"
    os.utime(file, (0, 0))
    Status(is_main=False)
    assert read_status(file)["state"] == "failed"
    Status(is_main=True)
    assert read_status(file)["state"] == "running"


def test_a_rank_that_exits_alone_writes_its_status_unless_there_is_one(tmp_path: Path) -> None:
    main, other = Status(is_main=True), Status(is_main=False)
    for status in (main, other):
        status.begin(tmp_path, 0)
    other.set_exit_status(ExitStatus("failed", "rank 1: broken", 1), alone=True)
    assert read_status(tmp_path / STATUS_FILE)["reason"] == "rank 1: broken"
    main.set_exit_status(ExitStatus("stopped", "SIGTERM", 0))
    assert read_status(tmp_path / STATUS_FILE)["reason"] == "rank 1: broken", "the cause, not the launcher's signal"


@pytest.mark.parametrize(
    "text", ['{"state": "stopped", "began": 3, "step": 5, "saved": 5, "reason": "SIGTERM", "lost": false}', "{", "[]"]
)
def test_a_status_of_an_earlier_version_or_a_damaged_one_does_not_stop_a_new_run(tmp_path: Path, text: str) -> None:
    file = tmp_path / STATUS_FILE
    file.write_text(text)
    status = Status(is_main=True)
    status.begin(tmp_path, 5)
    assert (read_status(file)["state"], read_status(file)["start_step"]) == ("running", 5)
    status.set_exit_status(ExitStatus("finished", "", 0))
    assert read_status(file)["state"] == "finished"


def test_a_status_that_cannot_be_written_raises_nothing(tmp_path: Path) -> None:
    status = Status(is_main=True)
    status.begin(tmp_path / "missing", 0)
    status.set_exit_status(ExitStatus("finished", "", 0))
    assert read_status(tmp_path / "missing" / STATUS_FILE) == {}
    assert os.listdir(tmp_path) == []
