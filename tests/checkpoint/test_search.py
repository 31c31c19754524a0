"""The checkpoint that checkpointing.resume_from selects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill.checkpoint import Checkpoints, Found
from distill.config import CheckpointingConfig
from distill.errors import UserError
from tests.checkpoint.test_checkpoints import Alone, save


def checkpoints(folder: Path, resume_from: str = "latest") -> Checkpoints:
    config = CheckpointingConfig(checkpoint_dir=str(folder), resume_from=resume_from, keep_top_k=None)
    return Checkpoints(config, Alone())  # type: ignore[arg-type]


def found_from(folder: Path, resume_from: str | Path) -> Found | None:
    return checkpoints(folder, str(resume_from)).find()


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """Return a checkpoint directory with the steps 1 and 2."""
    for step in (1, 2):
        save(checkpoints(tmp_path / "first"), step)
    return tmp_path / "first"


def _refused(folder: Path, resume_from: str | Path, match: str) -> None:
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(UserError, match=match) as caught:
        found_from(folder, resume_from)
    assert caught.value.key == "checkpointing.resume_from"
    assert sorted(folder.parent.rglob("*")) == before, "no file is changed"


def test_latest_selects_the_newest_checkpoint_of_the_directory(tmp_path: Path, first: Path) -> None:
    found = found_from(first, "latest")
    assert found is not None and found.path == first / "step_2"
    assert found_from(tmp_path / "new", "latest") is None


def test_never_starts_at_step_0_and_refuses_a_directory_with_checkpoints(
    tmp_path: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found_from(tmp_path / "new", "never") is None
    _refused(first, "never", r"resume_from=never.*contains the checkpoint step_2")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    _refused(first, "never", "contains the checkpoint step_2")  # of another run
    own = checkpoints(first)
    own.save(3, {"x": torch.ones(1)}, {"step": 3, "slurm_job": 5})
    own.finalize_pending(block=True)
    found = found_from(first, "never")  # the requeued job continues its own run
    assert found is not None and found.path == first / "step_3"


@pytest.mark.parametrize(("given", "step"), [("step_1", 1), ("step_2", 2), (".", 2)])
def test_a_path_selects_a_checkpoint_of_another_directory(tmp_path: Path, first: Path, given: str, step: int) -> None:
    found = found_from(tmp_path / "new", first / given)
    assert found is not None and found.path == first / f"step_{step}"


def test_a_restart_continues_from_the_checkpoints_after_the_path(tmp_path: Path, first: Path) -> None:
    source, new = first / "step_1", checkpoints(tmp_path / "new")
    new.save(5, {"x": torch.ones(1)}, {"step": 5, "resumed_from": str(source)})
    new.finalize_pending(block=True)
    found = found_from(tmp_path / "new", source)
    assert found is not None and found.path.name == "step_5"
    _refused(tmp_path / "new", first / "step_2", "step_5, which does not continue from it")


def test_a_path_before_the_newest_checkpoint_of_its_own_directory_is_refused(first: Path) -> None:
    _refused(first, first / "step_1", "contains the checkpoint step_2")
    assert found_from(first, first / "step_2") is not None and found_from(first, first) is not None


def test_a_path_without_a_checkpoint_or_with_a_damaged_one_is_refused(tmp_path: Path, first: Path) -> None:
    _refused(tmp_path / "new", tmp_path / "none", "is not a checkpoint and contains none")
    (first / "step_2/training_info.json").write_text("{")
    _refused(tmp_path / "new", first, "damaged checkpoint step_2")
