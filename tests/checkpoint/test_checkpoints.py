"""Checkpoints: written in the background, whole or not there, proven before they are read, and which are kept."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch.distributed.checkpoint import LoadPlan
from torch.distributed.tensor import Shard, distribute_tensor

from distill.checkpoint import Checkpoints, changed_keys, has_validation, read_info
from distill.checkpoint import async_save as background
from distill.checkpoint import lock as claim
from distill.checkpoint import manifest as record
from distill.checkpoint import storage as shards
from distill.config import CheckpointingConfig
from distill.distributed.world import World
from distill.errors import RunFailed, UserError
from distill.model.export import export_hf
from distill.model.export_files import ExportFiles
from distill.supervise.progress import CURRENT
from scripts.launch import ROOT
from tests.helpers import run_ranks


class Alone:
    """A world of one rank, as far as checkpoints ask."""

    is_main, control, rank, size = True, None, 0, 1

    @contextmanager
    def all_or_none(self, doing: str) -> Iterator[None]:
        yield

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]


def checkpoints(folder: Path, **keys: Any) -> Checkpoints:
    config = CheckpointingConfig(checkpoint_dir=str(folder), **keys)
    return Checkpoints(config, Alone())  # type: ignore[arg-type]


def save(saved: Checkpoints, step: int, **tensors: torch.Tensor) -> None:
    """Write a checkpoint and wait for it."""
    saved.save(step, tensors or {"x": torch.full((3,), float(step))}, {"step": step})
    saved.finalize_pending(block=True)


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.iterdir() if path.name != claim.FILE)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the program logged; torch logs every step of a save."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("distill")]


# ---- in the background ----------------------------------------------------------------------------------------------


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writes begin when it is set."""
    go = threading.Event()
    write = background.Write._write

    def later(self: background.Write) -> background.Written:
        assert go.wait(60)
        return write(self)

    monkeypatch.setattr(background.Write, "_write", later)
    return go


def test_what_is_saved_is_the_tensor_of_then_though_it_is_trained_on_meanwhile(
    tmp_path: Path, held: threading.Event
) -> None:
    saved, tensor = checkpoints(tmp_path), torch.arange(6.0).view(2, 3)
    column, scalar = tensor[:, 1], torch.tensor(1.0)
    saved.save(1, {"x": tensor, "column": column, "steps": scalar}, {"step": 1})
    tensor.mul_(-1.0)
    scalar.add_(1.0)
    held.set()
    saved.finalize_pending(block=True)
    read = {"x": torch.zeros(2, 3), "column": torch.zeros(2), "steps": torch.tensor(0.0)}
    saved.load(tmp_path / "step_1", read)
    assert read["x"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert read["column"].tolist() == [1.0, 4.0] and read["steps"] == 1.0


def test_a_checkpoint_is_there_when_it_is_settled_and_not_before(tmp_path: Path, held: threading.Event) -> None:
    saved = checkpoints(tmp_path, keep_top_k=1)
    saved.finalize_pending(block=True)  # nothing is on its way
    held.set()
    save(saved, 1)
    held.clear()
    saved.save(2, {"x": torch.ones(1)}, {"step": 2})
    saved.finalize_pending(block=False)
    saved.record_metrics(2, {"validation/accuracy": 0.5})  # measured before it is written
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step_1", "tmp_step_2"}, "the one before is dropped when the next is whole"
    held.set()
    saved.finalize_pending(block=True)
    assert kept(tmp_path) == [2]
    assert read_info(tmp_path / "step_2")["metrics"] == {"validation/accuracy": 0.5}


def test_the_next_save_waits_for_the_one_before(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path)
    saved.save(1, {"x": torch.ones(1)}, {"step": 1})
    saved.save(2, {"x": torch.ones(1)}, {"step": 2})
    assert (tmp_path / "step_1").exists() and not (tmp_path / "step_2").exists()
    saved.finalize_pending(block=True)
    assert kept(tmp_path) == [1, 2]


def _on_two_ranks(folder: Path) -> dict[str, Any]:
    """A sharded tensor of five rows saved and changed at once; a write that fails on one rank; folders apart."""
    world = World()
    world.build_mesh("cpu", 1, 1)
    told: dict[str, Any] = {}

    def refused(what: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            told[what] = (type(error).__name__, f"{error}")

    whole = torch.arange(15.0).view(5, 3)
    sharded = distribute_tensor(whole.clone(), world.replica_mesh, [Shard(0)])
    saved = Checkpoints(CheckpointingConfig(checkpoint_dir=str(folder / "saved")), world)
    saved.prepare()
    saved.save(1, {"x": sharded}, {"step": 1})
    sharded.to_local().zero_()
    saved.finalize_pending(block=True)
    saved.load(folder / "saved/step_1", {"x": sharded})
    told["loaded"] = torch.equal(sharded.full_tensor(), whole)
    for step, error in ((2, OSError(28, "No space left on device")), (3, AssertionError("a mistake"))):
        with pytest.MonkeyPatch.context() as patch:
            if world.rank == 1:
                patch.setattr("distill.checkpoint.async_save.sums_of", MagicMock(side_effect=error))
            saved.save(step, {"x": sharded}, {"step": step})
            refused(f"failed {step}", lambda: saved.finalize_pending(block=True))
    stale, denied = OSError(errno.ESTALE, "Stale"), OSError(errno.EACCES, "Denied")
    mistake = AssertionError("a mistake")
    for what, method, errors in (
        ("unread", "_slice_file", (stale, denied)),
        ("unread by one", "_slice_file", (None, stale)),
        ("unread places", "shapes", (None, stale)),
        ("misread", "_slice_file", (stale, mistake)),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(record, "_AGAIN_AFTER_S", ())
            if errors[world.rank] is not None:
                patch.setattr(shards.ShardsReader, method, MagicMock(side_effect=errors[world.rank]))
            refused(what, lambda: saved.load(folder / "saved/step_1", {"x": sharded}))
    world.barrier()
    told["left"] = sorted(path.name for path in (folder / "saved").iterdir())
    with (folder / "saved/step_1/shards/__1_0.distcp").open("r+b") as file:
        world.barrier()
        file.truncate(10)
    world.barrier()
    refused("damaged", saved.newest)
    apart = Checkpoints(CheckpointingConfig(checkpoint_dir=str(folder / f"apart {world.rank}")), world)
    (folder / f"apart {world.rank}").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.checkpoint.checkpoints._PATIENCE_S", 0.0)
        refused("apart", apart.prepare)
    world.close()
    return told


@pytest.mark.slow
def test_two_ranks_write_what_they_have_and_fail_together(tmp_path: Path) -> None:
    first, second = run_ranks(2, _on_two_ranks, tmp_path)
    assert first == second and first["loaded"] and first["left"] == [claim.FILE, "step_1"]
    kind, sentence = first["failed 2"]
    assert kind == "CollectiveUserError" and "the checkpoint of step 2 to checkpointing.checkpoint_dir=" in sentence
    assert first["failed 3"] == (
        "RuntimeError",
        "rank 1 failed while writing the checkpoint of step 3: RuntimeError(\"AssertionError('a mistake')\")",
    )
    may = "which may pass: start again when the disk answers, or move the folder away to go on from the checkpoint"
    for what, cannot in (
        ("unread", "(Denied) by rank 1, mend that, or move the folder away to go on from the checkpoint"),
        ("unread by one", f"(Stale) by rank 1, {may}"),
        ("unread places", f"(Stale) by rank 1, {may}"),
    ):
        step = tmp_path / "saved/step_1"
        assert first[what] == ("RunFailed", f"{step}: shards can't be read {cannot} before it")
    assert first["misread"][0] == "RuntimeError" and "AssertionError: a mistake" in first["misread"][1]
    kind, sentence = first["damaged"]
    assert kind == "CollectiveUserError" and "(step_1: shards/__1_0.distcp has 10 of" in sentence
    kind, sentence = first["apart"]
    assert kind == "CollectiveUserError" and "is not one folder for all ranks (rank 1 does not see" in sentence


def test_the_metrics_so_far_travel_along_and_a_later_validation_of_the_same_weights(tmp_path: Path) -> None:
    run = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "train/loss": step / 4} for step in (1, 2)]
    saved = checkpoints(tmp_path / "saved")
    saved.save(2, {"x": torch.ones(1)}, {"step": 2}, history=run)
    run.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 3, "train/loss": 9.0}]))
    saved.finalize_pending(block=True)
    found = checkpoints(tmp_path / "saved").newest()
    assert found is not None and found.history == rows
    saved.record_metrics(
        2, {"validation/accuracy": 0.25, "validation/avg_length": 3.0, "timing/validation/judging": 1.0}
    )
    found = checkpoints(tmp_path / "saved").newest()
    late = {"step": 2, "validation/accuracy": 0.25, "validation/avg_length": 3.0}
    assert found is not None and found.history == [*rows, late]


def test_what_makes_it_another_run_is_told_by_key_and_value() -> None:
    then = {
        "distillation": {"seed": 1, "max_num_steps": 5, "context_distillation": {"mode": "self_ema"}},
        "policy": {"optimizer": {"kwargs": {"lr": 1e-3, "betas": (0.9, 0.99)}}, "dtensor_cfg": {"replicate_size": 1}},
        "logger": {"log_dir": "a"},
        "loss_fn": {},
    }
    now = json.loads(json.dumps(then))
    assert changed_keys(now, then) == changed_keys(now, now | {"loss_fn": {"new": 1}}) == []
    now["distillation"] = {"seed": 2, "max_num_steps": 50, "context_distillation": {"mode": "self_live"}}
    now["policy"] = {"optimizer": {"kwargs": {"lr": 1e-4, "betas": [0.9, 0.99]}}, "dtensor_cfg": {"replicate_size": 2}}
    now["logger"] = {"log_dir": "b"}
    assert changed_keys(json.loads(json.dumps(then)), now) == [
        "distillation.seed was 1 and is 2",
        "distillation.context_distillation.mode was self_ema and is self_live",
        "policy.optimizer.kwargs.lr was 0.001 and is 0.0001",
    ]


def test_an_export_that_fails_ends_the_gather_that_others_wait_in(tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("a file in the way")
    weights = iter([(f"w{i}", torch.zeros(1)) for i in range(3)])
    with pytest.raises(FileExistsError):
        export_hf(tmp_path / "hf", weights, ExportFiles({}, tied_as_read=True), torch.float32)
    assert next(weights, None) is None


# ---- damage ---------------------------------------------------------------------------------------------------------


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 7)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def _edit(file: Path) -> None:
    file.write_text(file.read_text().replace('"step": ', '"step": 1'))


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a shard cut off": ("shards/__0_0.distcp", _cut, r"shards/__0_0\.distcp has \d+ of \d+ bytes"),
    "a bit of a shard": ("shards/__0_0.distcp", _flip, r"shards/__0_0\.distcp holds other bytes than were written"),
    "a shard away": ("shards/__0_0.distcp", Path.unlink, r"shards/__0_0\.distcp can't be read: No such file"),
    "a bit of the places": ("shards/.metadata", _flip, r"shards/\.metadata holds other bytes"),
    "the info cut off": ("training_info.json", _cut, r"training_info\.json is cut off"),
    "a bit of the info": ("training_info.json", _flip, r"training_info\.json"),
    "another step in the info": ("training_info.json", _edit, r"training_info\.json holds other bytes than were"),
    "the info empty": ("training_info.json", lambda file: file.write_text(""), r"training_info\.json is cut off"),
    "the info away": ("training_info.json", Path.unlink, r"it has no training_info\.json"),
    "nothing but a folder": (".", _empty, "it has no training_info"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    file, damage, said = DAMAGE[what]
    saved = checkpoints(tmp_path)
    for step in (1, 2):
        save(saved, step)
    damage(tmp_path / "step_2" / file)
    found = checkpoints(tmp_path).newest()
    assert found is not None and found.path == tmp_path / "step_1" and found.info["step"] == 1
    (message,) = told(caplog)
    assert "step_2 is damaged" in message and "step_1 is used" in message
    assert re.search(said, message), message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged_step_2", "step_1"]
    save(saved, 2)
    again = checkpoints(tmp_path).newest()
    assert again is not None and again.path.name == "step_2"


@pytest.mark.parametrize("what", DAMAGE)
def test_a_run_does_not_begin_anew_over_checkpoints_none_of_which_is_whole(tmp_path: Path, what: str) -> None:
    file, damage, said = DAMAGE[what]
    save(checkpoints(tmp_path), 7)
    damage(tmp_path / "step_7" / file)
    for _ in range(2):  # the first refusal leaves them there for the second
        with pytest.raises(UserError, match=rf"holds checkpoints and none of them is whole \(step_7: {said}.*repair"):
            checkpoints(tmp_path).newest()


def test_without_checkpoints_a_run_begins_anew(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "none").newest() is None
    save(checkpoints(tmp_path), 1)
    assert checkpoints(tmp_path, enabled=False).newest() is None


def test_what_a_killed_run_left_half_written_is_removed_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(checkpoints(tmp_path), 1)
    shutil.copytree(tmp_path / "step_1", tmp_path / "tmp_step_2")
    checkpoints(tmp_path).prepare()
    assert kept(tmp_path) == [1]
    (message,) = told(caplog)
    assert "tmp_step_2 is of a run that ended before it was whole" in message


def test_a_checkpoint_that_is_damaged_while_the_run_goes_on_is_neither_counted_nor_dropped(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path, metric_name=None, keep_top_k=1)
    for step in (1, 2, 3):
        save(saved, step)
        if step == 1:
            _flip(tmp_path / "step_1/training_info.json")
    assert kept(tmp_path) == [1, 3]


def test_a_pickle_in_the_place_of_the_metadata_is_not_run(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "it ran"),)

    saved = checkpoints(tmp_path)
    save(saved, 1)
    (tmp_path / "step_1/shards/.metadata").write_bytes(pickle.dumps(Bad()))
    with pytest.raises(pickle.UnpicklingError, match=r"holds .*mkdir, which has no place there"):
        saved.load(tmp_path / "step_1", {"x": torch.zeros(3)})
    assert not (tmp_path / "it ran").exists()


# ---- which are kept --------------------------------------------------------------------------------------------------


def test_the_best_by_the_metric_are_kept_and_the_newest_besides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = checkpoints(tmp_path, metric_name="val:accuracy", keep_top_k=2)
    seen = []
    for step, accuracy in enumerate([0.3, 0.5, 0.1, math.nan, 0.4, 0.2], 1):
        save(saved, step)
        before = kept(tmp_path)
        saved.record_metrics(step, {"train/loss": 1.0})
        saved.record_metrics(
            step, {"validation/accuracy": accuracy, "validation/avg_length": 7.0, "timing/validation/judging": 1.0}
        )
        seen.append((before, kept(tmp_path)))
    assert seen == [
        ([1], [1]),
        ([1, 2], [1, 2]),
        ([1, 2, 3], [1, 2, 3]),  # the third is the worst, and the newest
        ([1, 2, 4], [1, 2, 4]),
        ([1, 2, 5], [2, 5]),  # the fourth was not measured; the fifth takes the first's place
        ([2, 5, 6], [2, 5, 6]),
    ]
    info = read_info(tmp_path / "step_5")
    assert info["step"] == 5 and info["metrics"] == {"validation/accuracy": 0.4, "validation/avg_length": 7.0}
    assert has_validation(info) and not has_validation({"step": 5, "metrics": {"train/loss": 1.0}})
    said = [message for message in told(caplog) if "is not ranked: val:accuracy was not measured" in message]
    assert len(said) == 1 and "step_4" in said[0]


def test_a_loss_ranks_the_other_way_and_of_equals_the_newer_wins(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path, metric_name="train:loss", higher_is_better=False, keep_top_k=1)
    for step, loss in enumerate([0.3, math.nan, 0.2, 0.2, 0.9], 1):
        save(saved, step)
        saved.record_metrics(step, {"train/loss": loss, "train/lr": 1.0})
    assert kept(tmp_path) == [4, 5]
    assert read_info(tmp_path / "step_4")["metrics"] == {"train/loss": 0.2}


def test_a_checkpoint_that_is_not_ranked_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = checkpoints(tmp_path, metric_name="val:accuracy", keep_top_k=None)
    for step, values in enumerate([{"validation/accuracy": 0.5}, {}, {}], 1):
        save(saved, step)
        saved.record_metrics(step, values)
    assert kept(tmp_path) == [1, 2, 3]
    save(saved, 4)
    said = [message.split("/")[-1] for message in told(caplog) if "is not ranked" in message]
    assert said == [f"step_{step} is not ranked: val:accuracy was not measured" for step in (2, 3)]


def test_without_a_metric_the_newest_are_kept(tmp_path: Path) -> None:
    for name in (None, "val:accuracy"):  # never measured: the same
        saved = checkpoints(tmp_path / str(name), metric_name=name, keep_top_k=2)
        for step in (1, 2, 3, 10):
            save(saved, step)
        assert kept(tmp_path / str(name)) == [3, 10]


def test_a_metric_that_nobody_measures_is_named_once_with_those_that_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = checkpoints(tmp_path, metric_name="val:acuracy")
    for step in (1, 2):
        saved.record_metrics(step, {"validation/accuracy": 0.5, "validation/avg_length": 3.0})
    assert told(caplog) == ["checkpointing.metric_name=val:acuracy was not measured, but accuracy, avg_length"]


# ---- one run at a time, and disks that are slow or hiccup ------------------------------------------------------------

OWNER = """
import sys
from pathlib import Path
from distill.checkpoint.lock import DirectoryLock

claim = DirectoryLock(Path(sys.argv[1]), "checkpointing.checkpoint_dir")
print("mine", flush=True)
input()
"""


def test_a_folder_in_which_another_run_writes_is_refused_until_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However it ends: the other one is killed here."""
    monkeypatch.setattr(claim, "PATIENCE_S", 0.5)
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "mine\n"
        unfinished = tmp_path / "tmp_step_3"
        unfinished.mkdir()
        told_who = rf"^checkpointing\.checkpoint_dir=.* is in use by another run \(process {other.pid} on .*\): give"
        with pytest.raises(UserError, match=told_who):
            checkpoints(tmp_path).prepare()
        assert unfinished.exists(), "what the other one is about to finish"
        assert sum("waiting up to" in line for line in told(caplog)) == 1
        monkeypatch.setattr(claim, "PATIENCE_S", 1e9)
        threading.Timer(0.3, other.kill).start()
        checkpoints(tmp_path).prepare()
        assert not unfinished.exists()
        assert (tmp_path / claim.FILE).read_text().startswith(f"process {os.getpid()} on ")
    finally:
        other.kill()
        other.wait()


def test_a_requeued_job_takes_over_from_its_earlier_start_and_from_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file server may keep the lock of a machine that died."""
    monkeypatch.setattr(claim, "PATIENCE_S", 0.2)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "mine\n"
        for job, start in (("17", "1"), ("17", "0"), ("18", "2")):
            monkeypatch.setenv("SLURM_JOB_ID", job)
            monkeypatch.setenv("SLURM_RESTART_COUNT", start)
            with pytest.raises(UserError, match="is in use by another run"):
                checkpoints(tmp_path).prepare()
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        checkpoints(tmp_path).prepare()
        assert "in start 1 of job 17 keeps its lock although it must have ended" in "".join(told(caplog))
        assert (tmp_path / claim.FILE).read_text().endswith(" in start 2 of job 17\n")
    finally:
        other.kill()
        other.wait()


def test_where_locks_hold_on_one_machine_only_the_run_that_lost_its_folder_stops_before_it_writes(
    tmp_path: Path,
) -> None:
    saved = checkpoints(tmp_path)
    saved.prepare()
    save(saved, 1)
    (tmp_path / "tmp_step_2").mkdir()  # the other one's
    (tmp_path / claim.FILE).write_text("process 1 on another machine\n")
    with pytest.raises(UserError, match=r"another run \(process 1 on another machine\) has taken this one's folder"):
        save(saved, 2)
    assert kept(tmp_path / "tmp_step_2") == [] and (tmp_path / "tmp_step_2").exists()


def test_where_nothing_can_be_locked_a_run_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fcntl.lockf", MagicMock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    checkpoints(tmp_path).prepare()
    assert "can't be locked (No locks available): see that no other run writes there" in "".join(told(caplog))


@pytest.mark.parametrize("stays", [False, True])
def test_an_error_that_may_pass_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stays: bool) -> None:
    """It is waited for; where it stays, the run ends, may be started again, and no checkpoint is given up."""
    saved = checkpoints(tmp_path)
    save(saved, 1)
    save(saved, 2)
    monkeypatch.setattr(record, "_AGAIN_AFTER_S", (0.0, 0.0, 0.0))
    sum_of, left = record._sha256, [4 if stays else 3]

    def hiccup(path: Path) -> str:
        if left[0] and "step_2" in str(path):
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return sum_of(path)

    monkeypatch.setattr(record, "_sha256", hiccup)
    if stays:
        with pytest.raises(RunFailed, match=r"step_2: .* can't be read: Stale .* or move the") as failed:
            saved.newest()
        assert failed.value.retryable
    else:
        found = saved.newest()
        assert found is not None and found.path.name == "step_2"
    assert kept(tmp_path) == [1, 2]


@pytest.mark.parametrize("where", ["a tensor", "the places of all tensors"])
@pytest.mark.parametrize(("number", "times"), [(errno.ESTALE, 3), (errno.ESTALE, 4), (errno.EACCES, 1)])
def test_a_disk_that_fails_while_the_shards_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int, times: int
) -> None:
    """It may pass behind the sums as before them: the read begins again, and where it never succeeds, the run ends."""
    saved = checkpoints(tmp_path)
    save(saved, 1)
    monkeypatch.setattr(record, "_AGAIN_AFTER_S", (0.0, 0.0, 0.0))
    owner, name = (shards.ShardsReader, "_slice_file") if where == "a tensor" else (Path, "read_bytes")
    read, left = getattr(owner, name), [times]

    def hiccup(*args: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return read(*args)

    monkeypatch.setattr(owner, name, hiccup)
    tensors = {"x": torch.zeros(3)}
    if (number, times) == (errno.ESTALE, 3):
        saved.load(tmp_path / "step_1", tensors)
        assert tensors["x"].tolist() == [1.0] * 3
        return
    with pytest.raises(RunFailed, match=rf"step_1: shards can't be read \({os.strerror(number)}\), ") as failed:
        saved.load(tmp_path / "step_1", tensors)
    assert failed.value.retryable is (number == errno.ESTALE) and left[0] == 0


def test_each_file_of_shards_has_the_disks_patience_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_AGAIN_AFTER_S", (0.0,))
    reader = shards.ShardsReader(tmp_path)
    reader.storage_data = {name: MagicMock(relative_path=name) for name in "abc"}
    failed: list[str] = []

    def hiccup(self: shards.ShardsReader, plan: Any, planner: Any) -> None:
        (name,) = (item.storage_index for item in plan.items)
        if name not in failed:
            failed.append(name)
            raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(shards.ShardsReader, "_read_file", hiccup)
    reader.read_data(LoadPlan([MagicMock(storage_index=name) for name in "abc"]), None).wait()
    assert failed == ["a", "b", "c"]


def test_slow_writes_and_reads_are_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the watch goes by: a disk that takes its time is no standstill."""
    pieces = threading.Semaphore(0)
    resolve = shards.CountedSave.resolve_data

    def slow(planner: shards.CountedSave, item: Any) -> Any:
        assert pieces.acquire(timeout=60)
        return resolve(planner, item)

    monkeypatch.setattr(shards.CountedSave, "resolve_data", slow)
    saved = checkpoints(tmp_path)
    tensors = {f"x{i}": torch.ones(2) for i in range(300)}
    saved.save(1, tensors, {"step": 1})
    before = CURRENT.work_units
    waiting = threading.Thread(target=saved.finalize_pending, kwargs={"block": True})
    waiting.start()
    waiting.join(1.5)
    assert CURRENT.work_units == before, "nothing is written yet"
    while CURRENT.work_units == before and waiting.is_alive():
        pieces.release()
        waiting.join(0.1)
    assert CURRENT.work_units > before and waiting.is_alive()
    pieces.release(300)
    waiting.join()
    before = CURRENT.work_units
    saved.load(tmp_path / "step_1", {name: torch.zeros(2) for name in tensors})
    assert CURRENT.work_units == before + 300
