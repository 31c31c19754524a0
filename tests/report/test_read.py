"""Run directories that are incomplete, being written, damaged, or of an earlier version."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.errors import UserError
from distill.report.html import build_page
from distill.report.overview import ending_of
from distill.report.page_data import Report
from distill.report.read import read_run
from distill.report.samples import Limits
from distill.run_files import (
    LOCK_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    REPLACED_FILE,
    TRAIN_SAMPLES_FOLDER,
    VALIDATION_FOLDER,
    VERSIONS_FILE,
)
from distill.supervise.status import STATUS_FILE
from tests.report.run_folders import write_run


def index_of(*folders: Path, **limits: int) -> dict[str, Any]:
    data = Report(folders, Limits(**limits)).page_data()
    assert build_page(data)
    return dict(data.index)


def cut(path: Path, *, left: int = 30) -> None:
    """Remove the end of the file's last line, as a kill during the write does."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:left])


def test_a_complete_run_has_no_notes(tmp_path: Path) -> None:
    assert index_of(write_run(tmp_path / "run"))["notes"] == []


@pytest.mark.parametrize(
    "name", [METRICS_FILE, f"{VALIDATION_FOLDER}/step_4.jsonl", f"{TRAIN_SAMPLES_FOLDER}/step_1.jsonl"]
)
def test_a_cut_last_line_is_left_out_with_a_note(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    complete = index_of(run)
    cut(run / name)
    found = index_of(run)
    (note,) = found["notes"]
    assert Path(name).name in note and "incomplete" in note
    samples = len(complete["samples"]["set"]) - len(found["samples"]["set"])
    steps = len(complete["runs"][0]["tables"]["train"]["step"]) - len(found["runs"][0]["tables"]["train"]["step"])
    assert (steps, samples) == ((1, 0) if name == METRICS_FILE else (0, 1))


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", change=lambda row: row["forward_kl"].__setitem__(1, float("nan")))
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "train/loss": null, "train/lr": 1e-5, "train/grad_norm": Infinity}\n')
    data = Report([run], Limits()).page_data()
    series = data.index["runs"][0]["tables"]["train"]["series"]
    assert series["train/loss"][-1] is None and series["train/grad_norm"][-1] is None and series["train/lr"][-1] == 1e-5
    kl = next(sample["forward"] for sample in data.blocks[0]["samples"] if sample["forward"])
    assert kl[1] is None and None not in (kl[0], *kl[2:])
    assert build_page(data)


def test_rows_of_steps_that_were_repeated_are_ignored(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    before = index_of(run)["runs"][0]["tables"]
    (run / REPLACED_FILE).write_text('{"step": 9, "train/loss": 99.0}\n')
    assert index_of(run)["runs"][0]["tables"] == before


def test_a_probe_does_not_hide_the_validation_of_its_step(tmp_path: Path) -> None:
    """A run records a probe as a separate row, after the row of the validation."""
    run = write_run(tmp_path / "run")
    before = index_of(run)["runs"][0]
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "timestamp": 2.0, "validation/probe/start_0/difference": 0.25}\n')
    after = index_of(run)["runs"][0]
    series = after["tables"]["validation"]["series"]
    assert series.pop("validation/probe/start_0/difference") == [None, 0.25]
    assert (series, after["headline"]) == (before["tables"]["validation"]["series"], before["headline"])


def test_a_run_without_validation_has_curves_and_a_note(tmp_path: Path) -> None:
    found = index_of(write_run(tmp_path / "run", validated=()))
    assert len(found["notes"]) == 1 and "no validation" in found["notes"][0]
    assert {chart["id"] for chart in found["charts"]} >= {"loss", "grad_norm", "time", "memory"}
    assert not {chart["id"] for chart in found["charts"]} & {"accuracy", "positions", "validation_kl"}
    assert [each["label"] for each in found["runs"][0]["headline"]] == ["loss", "cost"]


def test_a_folder_with_only_a_recipe_gives_a_page_with_notes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    only = tmp_path / "only"
    only.mkdir()
    (only / RECIPE_FILE).write_bytes((run / RECIPE_FILE).read_bytes())
    found = index_of(only)
    assert found["charts"] == [] and found["runs"][0]["status"] == "unknown" and len(found["notes"]) == 3
    assert any("finished training" in note for note in found["notes"])


def test_the_state_is_that_of_the_status_file_and_the_lock(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", state="running")
    assert ending_of(read_run(run)).state == "unknown", "no process holds the lock: killed"
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True);"
        " sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(run / LOCK_FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert ending_of(read_run(run)).state == "running"
        process.communicate()
    (run / STATUS_FILE).write_text(json.dumps({"state": "failed", "reason": "rank 1 exited"}))
    ending = ending_of(read_run(run))
    assert ending.state == "failed" and "rank 1 exited" in ending.text


def test_responses_of_an_earlier_version_have_their_answer_only(tmp_path: Path) -> None:
    def old(row: dict[str, Any]) -> None:
        for name in ("token_ids", "token_texts", "top_tokens", "teacher_prompt"):
            del row[name]

    data = Report([write_run(tmp_path / "run", change=old)], Limits()).page_data()
    validated = {i for i, each in enumerate(data.index["sample_sets"]) if each["kind"] == "validation"}
    samples = data.index["samples"]
    for number, block, at in zip(samples["set"], samples["block"], samples["at"], strict=True):
        sample = data.blocks[block]["samples"][at]
        is_old = number in validated
        assert sample["answer"] and (sample["texts"] == []) is is_old
        assert not is_old or (sample["forward"] is None and sample["top"] == [])
    assert None not in [
        kl for number, kl in zip(samples["set"], samples["forward"], strict=True) if number in validated
    ]
    assert any("of tokens" in note for note in data.index["notes"])


def test_damaged_files_give_a_page_with_notes(tmp_path: Path) -> None:
    names = [METRICS_FILE, VERSIONS_FILE, RECIPE_FILE, STATUS_FILE, f"{VALIDATION_FOLDER}/step_0.jsonl"]
    run = write_run(tmp_path / "run", tokens=4)
    garbage = (b"\xff\xfe\x00", b"[1, 2]\n\n3\nnull\n", b"{" * 5000, b'{"step": "x", "tokens": []}\n', b"")
    for first in range(len(garbage)):  # each file has each content once
        for i, name in enumerate(names):
            (run / name).write_bytes(garbage[(first + i) % len(garbage)])
        assert index_of(run)["runs"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "logs" / "exp_001")
    for folder in (tmp_path / "missing", tmp_path, run / METRICS_FILE):
        with pytest.raises(UserError) as caught:
            read_run(folder)
        assert caught.value.key == "RUN" and caught.value.value == str(folder)
    with pytest.raises(UserError) as caught:
        read_run(tmp_path / "logs")
    assert "exp_001" in caught.value.fix
