"""Checkpoints: background writes, verification, resume after damage, retention and the directory lock."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch.distributed.checkpoint import LoadPlan
from torch.distributed.tensor import Shard, distribute_tensor

from distill.checkpoint import Checkpoints, async_save, changed_keys, has_validation, lock, manifest, read_info, storage
from distill.config import CheckpointingConfig, Config
from distill.distributed.world import World
from distill.errors import RunFailed, UserError
from distill.model.export import export_hf, write_hf
from distill.model.export_files import ExportFiles
from distill.run_files import LOCK_FILE, owner_of
from distill.supervise.progress import CURRENT
from tests.helpers import run_ranks
from tests.lock_holder import lock_holder


class Alone:
    """A world of one rank with the methods that Checkpoints uses."""

    is_main, control, rank, size = True, None, 0, 1

    @contextmanager
    def all_or_none(self, action: str) -> Iterator[None]:
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
    return sorted(int(path.name[5:]) for path in folder.iterdir() if path.name != LOCK_FILE)


def messages_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the messages of distill's loggers; torch logs every step of a save."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("distill")]


# ---- background writes ----------------------------------------------------------------------------------------------


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Return an event that background writes wait for."""
    go = threading.Event()
    write = async_save.Write._write

    def later(self: async_save.Write) -> async_save.WriteResult:
        assert go.wait(60)
        return write(self)

    monkeypatch.setattr(async_save.Write, "_write", later)
    return go


def test_a_checkpoint_contains_the_tensors_at_the_time_of_save(tmp_path: Path, held: threading.Event) -> None:
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


def test_a_checkpoint_is_complete_after_finalize_pending_and_not_before(tmp_path: Path, held: threading.Event) -> None:
    saved = checkpoints(tmp_path, keep_top_k=1)
    saved.finalize_pending(block=True)  # nothing is pending
    held.set()
    save(saved, 1)
    held.clear()
    saved.save(2, {"x": torch.ones(1)}, {"step": 2})
    saved.finalize_pending(block=False)
    saved.record_metrics(2, {"validation/accuracy": 0.5})  # while the write is pending
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step_1", "tmp_step_2"}, "step_1 is dropped only after step_2 is complete"
    held.set()
    saved.finalize_pending(block=True)
    assert kept(tmp_path) == [2]
    assert read_info(tmp_path / "step_2")["metrics"] == {"validation/accuracy": 0.5}


def test_save_waits_for_the_previous_write(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path)
    saved.save(1, {"x": torch.ones(1)}, {"step": 1})
    saved.save(2, {"x": torch.ones(1)}, {"step": 2})
    assert (tmp_path / "step_1").exists() and not (tmp_path / "step_2").exists()
    saved.finalize_pending(block=True)
    assert kept(tmp_path) == [1, 2]


def _on_two_ranks(folder: Path) -> dict[str, Any]:
    """Save a sharded tensor and change it; fail a write or a read on one rank; use two directories."""
    world = World()
    world.build_mesh("cpu", 1, 1)
    found: dict[str, Any] = {}

    def record_error(what: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            found[what] = (
                type(error).__name__,
                f"{error}",
                getattr(error, "key", ""),
                getattr(error, "retryable", None),
            )

    full = torch.arange(15.0).view(5, 3)
    sharded = distribute_tensor(full.clone(), world.replica_mesh, [Shard(0)])
    saved = Checkpoints(CheckpointingConfig(checkpoint_dir=str(folder / "saved")), world)
    saved.prepare()
    saved.save(1, {"x": sharded}, {"step": 1})
    sharded.to_local().zero_()
    saved.finalize_pending(block=True)
    saved.load(folder / "saved/step_1", {"x": sharded})
    found["loaded"] = torch.equal(sharded.full_tensor(), full)
    for step, error in ((2, OSError(28, "No space left on device")), (3, AssertionError("a mistake"))):
        with pytest.MonkeyPatch.context() as patch:
            if world.rank == 1:
                patch.setattr("distill.checkpoint.async_save.checksums_of", MagicMock(side_effect=error))
            saved.save(step, {"x": sharded}, {"step": step})
            record_error(f"failed {step}", lambda: saved.finalize_pending(block=True))
    stale, denied = OSError(errno.ESTALE, "Stale"), OSError(errno.EACCES, "Denied")
    mistake = AssertionError("a mistake")
    for what, method, errors in (
        ("unread", "_slice_file", (stale, denied)),
        ("unread by one", "_slice_file", (None, stale)),
        ("unread metadata", "shapes", (None, stale)),
        ("misread", "_slice_file", (stale, mistake)),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(manifest, "_RETRY_DELAYS_S", ())
            if errors[world.rank] is not None:
                patch.setattr(storage.ShardsReader, method, MagicMock(side_effect=errors[world.rank]))
            record_error(what, lambda: saved.load(folder / "saved/step_1", {"x": sharded}))
    world.barrier()
    found["left"] = sorted(path.name for path in (folder / "saved").iterdir())
    with (folder / "saved/step_1/shards/__1_0.distcp").open("r+b") as file:
        world.barrier()
        file.truncate(10)
    world.barrier()
    record_error("damaged", saved.find)
    separate = Checkpoints(CheckpointingConfig(checkpoint_dir=str(folder / f"separate {world.rank}")), world)
    (folder / f"separate {world.rank}").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.checkpoint.checkpoints._VISIBLE_WITHIN_S", 0.0)
        record_error("two directories", separate.prepare)
    world.close()
    return found


@pytest.mark.slow
def test_two_ranks_write_their_shards_and_fail_together(tmp_path: Path) -> None:
    first, second = run_ranks(2, _on_two_ranks, tmp_path)
    assert first == second and first["loaded"] and first["left"] == [LOCK_FILE, "step_1"]
    key = "checkpointing.checkpoint_dir"
    kind, sentence, error_key, _ = first["failed 2"]
    assert (kind, error_key) == ("CollectiveUserError", key) and "step 2" in sentence and "space" in sentence
    kind, sentence, *_ = first["failed 3"]
    assert kind == "RuntimeError" and "rank 1" in sentence and "AssertionError" in sentence
    for what, error, retryable in (("unread", "Denied", False), ("unread by one", "Stale", True)):
        kind, sentence, _, found = first[what]
        assert (kind, found) == ("RunFailed", retryable) and "rank 1" in sentence and f"({error})" in sentence
    assert first["unread metadata"] == first["unread by one"]
    assert first["misread"][0] == "RuntimeError" and "AssertionError: a mistake" in first["misread"][1]
    kind, sentence, error_key, _ = first["damaged"]
    assert (kind, error_key) == ("CollectiveUserError", key) and "step_1: shards/__1_0.distcp has 10" in sentence
    kind, sentence, error_key, _ = first["two directories"]
    assert (kind, error_key) == ("CollectiveUserError", key) and "rank 1" in sentence


def test_a_checkpoint_contains_the_metrics_and_a_later_validation_of_its_weights(tmp_path: Path) -> None:
    run = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "train/loss": step / 4} for step in (1, 2)]
    saved = checkpoints(tmp_path / "saved")
    saved.save(2, {"x": torch.ones(1)}, {"step": 2}, history=run)
    run.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 3, "train/loss": 9.0}]))
    saved.finalize_pending(block=True)
    found = checkpoints(tmp_path / "saved").find()
    assert found is not None and found.history == rows
    saved.record_metrics(
        2, {"validation/accuracy": 0.25, "validation/avg_length": 3.0, "timing/validation/judging": 1.0}
    )
    found = checkpoints(tmp_path / "saved").find()
    late = {"step": 2, "validation/accuracy": 0.25, "validation/avg_length": 3.0}
    assert found is not None and found.history == [*rows, late]


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ({"select": None}, {"select": {"score": "soft_or", "share": 0.5}}, {"select.score", "select.share"}),
        ({"select": {"score": "soft_or", "share": 0.5}}, {"select": None}, {"select.score", "select.share"}),
        ({"select": {"share": 0.5}}, {"select": {"share": 0.4}}, {"select.share"}),
        ({"skip_first": 0, "first": None}, {"skip_first": 0, "first": 5}, {"first"}),
        (None, {"skip_first": 3, "select": None, "normalize": "tokens"}, {"skip_first"}),  # an older checkpoint
        (None, {"select": {"score": "soft_or", "share": 0.5}}, {"select.score", "select.share"}),
        (None, {"skip_first": 0, "select": None}, set()),
    ],
)
def test_changed_keys_lists_changed_token_weights(before: Any, after: Any, changed: set[str]) -> None:
    saved = {"kl_type": "mixed"} | ({} if before is None else {"token_weights": before})
    found = changed_keys({"loss_fn": saved}, {"loss_fn": {"kl_type": "mixed", "token_weights": after}})
    assert set(found) == {f"loss_fn.token_weights.{key}" for key in changed}


def test_changed_keys_lists_keys_that_affect_training_with_both_values() -> None:
    then = {
        "distillation": {"seed": 1, "max_num_steps": 5, "context_distillation": {"mode": "self_ema"}},
        "policy": {"optimizer": {"kwargs": {"lr": 1e-3, "betas": (0.9, 0.99)}}, "dtensor_cfg": {"replicate_size": 1}},
        "logger": {"log_dir": "a"},
        "loss_fn": {},
    }
    now = json.loads(json.dumps(then))
    assert changed_keys(now, then) == changed_keys(now, now | {"loss_fn": {"new": 1}}) == {}
    now["distillation"] = {"seed": 2, "max_num_steps": 50, "context_distillation": {"mode": "self_live"}}
    now["policy"] = {"optimizer": {"kwargs": {"lr": 1e-4, "betas": [0.9, 0.99]}}, "dtensor_cfg": {"replicate_size": 2}}
    now["logger"] = {"log_dir": "b"}
    assert list(changed_keys(json.loads(json.dumps(then)), now).values()) == [
        "distillation.seed was 1 and is 2",
        "distillation.context_distillation.mode was self_ema and is self_live",
        "policy.optimizer.kwargs.lr was 0.001 and is 0.0001",
    ]


def test_keys_that_select_what_is_learnt_are_compared_also_with_a_checkpoint_that_lacks_them() -> None:
    now = asdict(Config())
    then = json.loads(json.dumps(now))
    for name in ("train_on", "off_policy", "max_new_tokens_schedule"):
        del then["distillation"][name]
    assert changed_keys(then, now) == changed_keys(json.loads(json.dumps(now)), now) == {}
    unused, used = ({"off_policy": {"share": share, "column": "x", "kl_type": "forward"}} for share in (0.0, 0.5))
    other = {"off_policy": {"share": 0.5, "column": "y", "kl_type": "forward"}}
    assert not changed_keys({"distillation": unused}, now) and not changed_keys(now, {"distillation": unused})
    assert list(changed_keys({"distillation": used}, {"distillation": other})) == ["distillation.off_policy.column"]
    keys = [f"distillation.off_policy.{name}" for name in ("share", "column", "kl_type")]
    assert list(changed_keys({"distillation": used}, now)) == list(changed_keys(now, {"distillation": used})) == keys
    now["distillation"] |= {
        "train_on": "right",
        "max_new_tokens_schedule": ((1, 8),),
        "off_policy": {"share": 0.5, "column": "x", "kl_type": None},
    }
    now["policy"]["generation"]["val_max_new_tokens"] = 7
    now["distillation"] |= {"watched_words": ("wait",), "default_alarms": False, "alarms": ({"metric": "train/loss"},)}
    keys = [f"distillation.{name}" for name in ("max_new_tokens_schedule", "train_on", "off_policy.share")]
    assert list(changed_keys(then, now)) == keys
    then["distillation"]["context_distillation"]["refresh_period"] = 7
    assert [*keys, "distillation.context_distillation.refresh_period"] == list(changed_keys(then, now))


@pytest.mark.parametrize(("write", "left"), [(export_hf, 0), (write_hf, 3)])
def test_only_a_failed_collective_export_consumes_all_weights(tmp_path: Path, write: Any, left: int) -> None:
    (tmp_path / "hf").write_text("a file in the way")
    weights = iter([(f"w{i}", torch.zeros(1)) for i in range(3)])
    with pytest.raises(FileExistsError):
        write(tmp_path / "hf", weights, ExportFiles({}, tied_as_read=True), torch.float32)
    assert len(list(weights)) == left


# ---- damage ---------------------------------------------------------------------------------------------------------


def _truncate(file: Path) -> None:
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
    "truncated shard": ("shards/__0_0.distcp", _truncate, "bytes"),
    "changed bit of a shard": ("shards/__0_0.distcp", _flip, "sha256"),
    "missing shard": ("shards/__0_0.distcp", Path.unlink, "No such file"),
    "changed bit of the metadata": ("shards/.metadata", _flip, "sha256"),
    "truncated info": ("training_info.json", _truncate, "JSONDecodeError"),
    "changed bit of the info": ("training_info.json", _flip, "training_info.json"),  # as JSON or as sha256
    "changed step in the info": ("training_info.json", _edit, "sha256"),
    "empty info": ("training_info.json", lambda file: file.write_text(""), "JSONDecodeError"),
    "missing info": ("training_info.json", Path.unlink, "missing"),
    "empty directory": (".", _empty, "training_info.json is missing"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_renamed_and_the_previous_one_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    file, damage, reason = DAMAGE[what]
    saved = checkpoints(tmp_path)
    for step in (1, 2):
        save(saved, step)
    damage(tmp_path / "step_2" / file)
    found = checkpoints(tmp_path).find()
    assert found is not None and found.path == tmp_path / "step_1" and found.info["step"] == 1
    (message,) = messages_of(caplog)
    assert "step_2" in message and "step_1" in message and file in message and reason in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged_step_2", "step_1"]
    save(saved, 2)
    again = checkpoints(tmp_path).find()
    assert again is not None and again.path.name == "step_2"


@pytest.mark.parametrize("what", DAMAGE)
def test_a_run_is_refused_if_all_checkpoints_are_damaged(tmp_path: Path, what: str) -> None:
    file, damage, reason = DAMAGE[what]
    save(checkpoints(tmp_path), 7)
    damage(tmp_path / "step_7" / file)
    for _ in range(2):  # the first refusal must not rename them
        with pytest.raises(UserError) as refused:
            checkpoints(tmp_path).find()
        assert refused.value.key == "checkpointing.checkpoint_dir"
        assert "step_7" in refused.value.problem and reason in refused.value.problem


def test_newest_returns_none_without_checkpoints(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "none").find() is None
    save(checkpoints(tmp_path), 1)
    assert checkpoints(tmp_path, enabled=False).find() is None


def test_prepare_removes_unfinished_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(checkpoints(tmp_path), 1)
    shutil.copytree(tmp_path / "step_1", tmp_path / "tmp_step_2")
    checkpoints(tmp_path).prepare()
    assert kept(tmp_path) == [1]
    (message,) = messages_of(caplog)
    assert "tmp_step_2" in message


def test_retention_ignores_a_checkpoint_with_a_damaged_info(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path, metric_name=None, keep_top_k=1)
    for step in (1, 2, 3):
        save(saved, step)
        if step == 1:
            _flip(tmp_path / "step_1/training_info.json")
    assert kept(tmp_path) == [1, 3]


def test_metadata_with_a_foreign_class_is_refused_without_executing_it(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "it ran"),)

    saved = checkpoints(tmp_path)
    save(saved, 1)
    (tmp_path / "step_1/shards/.metadata").write_bytes(pickle.dumps(Bad()))
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        saved.load(tmp_path / "step_1", {"x": torch.zeros(3)})
    assert not (tmp_path / "it ran").exists()


# ---- retention -------------------------------------------------------------------------------------------------------


def test_the_best_checkpoints_by_the_metric_and_the_newest_are_kept(
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
        ([1, 2, 3], [1, 2, 3]),  # step 3 has the worst value and is the newest
        ([1, 2, 4], [1, 2, 4]),
        ([1, 2, 5], [2, 5]),  # step 4 has no value; step 5 is better than step 1
        ([2, 5, 6], [2, 5, 6]),
    ]
    info = read_info(tmp_path / "step_5")
    assert info["step"] == 5 and info["metrics"] == {"validation/accuracy": 0.4, "validation/avg_length": 7.0}
    assert has_validation(info) and not has_validation({"step": 5, "metrics": {"train/loss": 1.0}})
    unranked = [message for message in messages_of(caplog) if "worst" in message]
    assert len(unranked) == 1 and "step_4" in unranked[0]


def test_lower_is_better_for_a_loss_and_the_newer_of_equals_is_kept(tmp_path: Path) -> None:
    saved = checkpoints(tmp_path, metric_name="train:loss", higher_is_better=False, keep_top_k=1)
    for step, loss in enumerate([0.3, math.nan, 0.2, 0.2, 0.9], 1):
        save(saved, step)
        saved.record_metrics(step, {"train/loss": loss, "train/lr": 1.0})
    assert kept(tmp_path) == [4, 5]
    assert read_info(tmp_path / "step_4")["metrics"] == {"train/loss": 0.2}


def test_a_checkpoint_without_the_metric_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = checkpoints(tmp_path, metric_name="val:accuracy", keep_top_k=None)
    for step, values in enumerate([{"validation/accuracy": 0.5}, {}, {}], 1):
        save(saved, step)
        saved.record_metrics(step, values)
    assert kept(tmp_path) == [1, 2, 3]
    save(saved, 4)
    unranked = [message.split("/")[-1].split()[0] for message in messages_of(caplog) if "worst" in message]
    assert unranked == ["step_2", "step_3"]


def test_the_newest_checkpoints_are_kept_without_a_metric(tmp_path: Path) -> None:
    for name in (None, "val:accuracy"):  # never measured: the same
        saved = checkpoints(tmp_path / str(name), metric_name=name, keep_top_k=2)
        for step in (1, 2, 3, 10):
            save(saved, step)
        assert kept(tmp_path / str(name)) == [3, 10]


def test_an_unmeasured_metric_name_is_logged_once_with_the_available_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = checkpoints(tmp_path, metric_name="val:acuracy")
    for step in (1, 2):
        saved.record_metrics(step, {"validation/accuracy": 0.5, "validation/avg_length": 3.0})
    (message,) = messages_of(caplog)
    assert "checkpointing.metric_name=val:acuracy" in message and "accuracy, avg_length" in message


# ---- directory lock, transient I/O errors and heartbeats ------------------------------------------------------------


def test_a_directory_in_use_is_refused_until_the_other_run_exits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other process is killed, so it cannot release the lock itself."""
    monkeypatch.setattr(lock, "WAIT_S", 0.5)
    with lock_holder(tmp_path) as other:
        unfinished = tmp_path / "tmp_step_3"
        unfinished.mkdir()
        with pytest.raises(UserError, match=f"process {other.pid} ") as refused:
            checkpoints(tmp_path).prepare()
        assert refused.value.key == "checkpointing.checkpoint_dir"
        assert unfinished.exists(), "it belongs to the other run"
        assert sum("waiting" in line for line in messages_of(caplog)) == 1
        monkeypatch.setattr(lock, "WAIT_S", 1e9)
        threading.Timer(0.3, other.kill).start()
        checkpoints(tmp_path).prepare()
        assert not unfinished.exists()
        assert (tmp_path / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")


def test_a_requeued_job_takes_over_the_lock_of_its_earlier_start_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file server may keep the lock of a dead machine."""
    monkeypatch.setattr(lock, "WAIT_S", 0.2)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with lock_holder(tmp_path):
        for job, start in (("17", "1"), ("17", "0"), ("18", "2")):
            monkeypatch.setenv("SLURM_JOB_ID", job)
            monkeypatch.setenv("SLURM_RESTART_COUNT", start)
            with pytest.raises(UserError, match="in use"):
                checkpoints(tmp_path).prepare()
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        checkpoints(tmp_path).prepare()
        assert "in start 1 of job 17 " in "".join(messages_of(caplog))
        assert (tmp_path / LOCK_FILE).read_text().endswith(" in start 2 of job 17\n")


def test_a_run_whose_directory_was_taken_stops_before_it_writes(
    tmp_path: Path,
) -> None:
    saved = checkpoints(tmp_path)
    saved.prepare()
    save(saved, 1)
    (tmp_path / "tmp_step_2").mkdir()  # of the other run
    (tmp_path / LOCK_FILE).write_text("process 1 on another machine\n")
    with pytest.raises(UserError, match="process 1 on another machine"):
        save(saved, 2)
    assert kept(tmp_path / "tmp_step_2") == [] and (tmp_path / "tmp_step_2").exists()


def test_a_file_system_without_locks_is_only_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fcntl.lockf", MagicMock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    checkpoints(tmp_path).prepare()
    assert "No locks available" in "".join(messages_of(caplog))


@pytest.mark.parametrize("stays", [False, True])
def test_a_transient_error_during_verification_is_retried_and_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stays: bool
) -> None:
    """If the error persists, the run fails as retryable and no checkpoint is renamed."""
    saved = checkpoints(tmp_path)
    save(saved, 1)
    save(saved, 2)
    monkeypatch.setattr(manifest, "_RETRY_DELAYS_S", (0.0, 0.0, 0.0))
    sum_of, left = manifest._sha256, [4 if stays else 3]

    def hiccup(path: Path) -> str:
        if left[0] and "step_2" in str(path):
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return sum_of(path)

    monkeypatch.setattr(manifest, "_sha256", hiccup)
    if stays:
        with pytest.raises(RunFailed, match=r"step_2 .*Stale") as failed:
            saved.find()
        assert failed.value.retryable
    else:
        found = saved.find()
        assert found is not None and found.path.name == "step_2"
    assert kept(tmp_path) == [1, 2]


@pytest.mark.parametrize("source", ["a tensor", "the metadata"])
@pytest.mark.parametrize(("number", "times"), [(errno.ESTALE, 3), (errno.ESTALE, 4), (errno.EACCES, 1)])
def test_transient_errors_while_loading_shards_are_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, number: int, times: int
) -> None:
    saved = checkpoints(tmp_path)
    save(saved, 1)
    monkeypatch.setattr(manifest, "_RETRY_DELAYS_S", (0.0, 0.0, 0.0))
    owner, name = (storage.ShardsReader, "_slice_file") if source == "a tensor" else (Path, "read_bytes")
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
    with pytest.raises(RunFailed, match=rf"step_1 .*\({os.strerror(number)}\)") as failed:
        saved.load(tmp_path / "step_1", tensors)
    assert failed.value.retryable is (number == errno.ESTALE) and left[0] == 0


def test_each_file_of_shards_has_its_own_retries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_RETRY_DELAYS_S", (0.0,))
    reader = storage.ShardsReader(tmp_path)
    reader.storage_data = {name: MagicMock(relative_path=name) for name in "abc"}
    failed: list[str] = []

    def hiccup(self: storage.ShardsReader, plan: Any, planner: Any) -> None:
        (name,) = (item.storage_index for item in plan.items)
        if name not in failed:
            failed.append(name)
            raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(storage.ShardsReader, "_read_file", hiccup)
    reader.read_data(LoadPlan([MagicMock(storage_index=name) for name in "abc"]), None).wait()
    assert failed == ["a", "b", "c"]


def test_writing_and_loading_shards_record_heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog must not mistake a slow disk for a hung rank."""
    pieces = threading.Semaphore(0)
    resolve = storage.CountingSavePlanner.resolve_data

    def slow(planner: storage.CountingSavePlanner, item: Any) -> Any:
        assert pieces.acquire(timeout=60)
        return resolve(planner, item)

    monkeypatch.setattr(storage.CountingSavePlanner, "resolve_data", slow)
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


def test_the_owner_of_a_lock_is_read_without_a_lock(tmp_path: Path) -> None:
    assert owner_of(tmp_path) is None and not list(tmp_path.iterdir())
    with lock_holder(tmp_path) as process:
        assert f"process {process.pid}" in (owner_of(tmp_path) or "")
    assert owner_of(tmp_path) is None
