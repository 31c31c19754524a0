"""Retention of checkpoints that alarms saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill.checkpoint.manifest import read_info
from tests.checkpoint.test_checkpoints import checkpoints, kept, messages_of, save


def test_the_two_newest_checkpoints_of_alarms_are_kept_in_addition(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps 2, 4 and 6 are saved for alarms and have no accuracy."""
    saved = checkpoints(tmp_path, metric_name="val:accuracy", keep_top_k=1)
    seen = []
    for step in range(1, 9):
        save(saved, step)
        if step % 2 or step == 8:
            saved.record_metrics(step, {"validation/accuracy": 1 - step / 10})
        else:
            saved.keep_for_alarm(step)
        seen.append(kept(tmp_path))
    assert seen[:4] == [[1], [1, 2], [1, 2, 3], [1, 2, 4]]
    assert seen[4:] == [[1, 2, 4, 5], [1, 4, 6], [1, 4, 6, 7], [1, 4, 6, 8]]
    assert read_info(tmp_path / "step_4")["saved_for_alarm"] is True
    assert "saved_for_alarm" not in read_info(tmp_path / "step_8")
    assert not [m for m in messages_of(caplog) if "worst" in m and ("step_4" in m or "step_6" in m)]


def test_an_alarm_marks_a_checkpoint_that_is_still_being_written(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path, metric_name="val:accuracy", keep_top_k=1)
    save(saved, 1)
    saved.record_metrics(1, {"validation/accuracy": 0.9})
    saved.save(2, {"x": torch.ones(1)}, {"step": 2})
    saved.keep_for_alarm(2)
    saved.finalize_pending(block=True)
    saved.keep_for_alarm(7)  # no such checkpoint
    for step in (3, 4):
        save(saved, step)
    assert kept(tmp_path) == [1, 2, 4] and read_info(tmp_path / "step_2")["saved_for_alarm"] is True
