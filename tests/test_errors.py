"""Full and read-only disks: one sentence, all ranks exit together, and earlier checkpoints are kept.

The disks are small file systems in memory; mounting them requires a privileged user.
"""

from __future__ import annotations

import errno
import logging
import subprocess
import threading
from collections.abc import Callable, Iterator
from logging.handlers import MemoryHandler
from pathlib import Path

import pytest

from distill.checkpoint import read_verified
from distill.metrics.sinks import TensorBoardSink, read_metrics
from distill.run_files import LOCK_FILE, METRICS_FILE
from distill.supervise.logs import log_to_file
from tests.test_train import _command, _run, make_tiny_run

Mount = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """Return a function that mounts an empty disk with the given options."""
    folder, mounted = tmp_path_factory.mktemp("disks"), []

    def mount(name: str, options: str) -> Path:
        place = folder / name
        place.mkdir()
        found = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if found.returncode:
            pytest.skip(f"a small disk can't be mounted here: {found.stderr.decode().strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


Ended = dict[str, tuple[tuple[int, str, str], ...]]
"""Exit code, stdout and stderr of the two ranks, by name of the run."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def disks(disk: Mount) -> dict[str, Path]:
    """Return the disks by name; a checkpoint of the tiny run has 1.8 MB, its export 0.6 MB."""
    return {
        "full at the second checkpoint": disk("second", "size=2800k"),
        "full at the export": disk("export", "size=2100k"),
        "read-only": disk("read-only", "size=1m,ro"),
        "full at a row of metrics": disk("metrics", "size=56k"),
        "full at the recipe": disk("recipe", "size=4k"),
    }


@pytest.fixture(scope="module")
def ended(root: Path, disks: dict[str, Path]) -> Ended:
    (root / "a file").write_text("")
    saving, run_dir = "checkpointing.checkpoint_dir", "runtime.run_dir"
    settings = {
        "full at the second checkpoint": [f"{saving}={disks['full at the second checkpoint']}"],
        "full at the export": [
            f"{saving}={disks['full at the export']}",
            "checkpointing.save_consolidated=true",
        ],
        "read-only": [f"{saving}={disks['read-only']}"],
        "a file in the way": [f"{saving}={root}/a file/checkpoints"],
        "full at a row of metrics": [f"{run_dir}={disks['full at a row of metrics']}", "distillation.max_num_steps=20"],
        "full at the recipe": [f"{run_dir}={disks['full at the recipe']}"],
    }
    lines = [_command(root, name, *overrides) for name, overrides in settings.items()]
    return dict(zip(settings, zip(*_run(lines), strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "target", "reason"),
    [
        ("full at the second checkpoint", "checkpointing.checkpoint_dir={disk}", "No space left"),
        ("full at the export", "checkpointing.checkpoint_dir={disk}", "No space left"),
        ("read-only", "checkpointing.checkpoint_dir={disk}", "Read-only file"),
        ("a file in the way", "a file/checkpoints", "Not a"),
        ("full at a row of metrics", "{disk}", "No space left"),
        ("full at the recipe", "{disk}", "No space left"),
    ],
)
def test_a_disk_error_ends_all_ranks_with_one_sentence(
    ended: Ended, disks: dict[str, Path], what: str, target: str, reason: str
) -> None:
    (code, _, error), other = ended[what]
    assert code == 2 and other == (2, "", ""), error
    (sentence,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert target.replace("{disk}", str(disks.get(what))) in sentence and reason in sentence
    key = "runtime.run_dir" if target == "{disk}" else "checkpointing.checkpoint_dir"
    assert key in sentence
    frames = [line for line in error.splitlines() if line.lstrip().startswith("File ") and "/distill/" in line]
    assert not frames and "Error ---" not in error, error
    before_weights = what in ("read-only", "a file in the way", "full at the recipe")
    assert before_weights == ("verified" not in error), error


@pytest.mark.slow
def test_a_full_disk_keeps_the_previous_checkpoint_and_removes_the_incomplete_one(
    ended: Ended, disks: dict[str, Path]
) -> None:
    folder = disks["full at the second checkpoint"]
    assert sorted(path.name for path in folder.iterdir()) == [LOCK_FILE, "step_2"]
    assert read_verified(folder / "step_2")["step"] == 2
    assert [path.name for path in disks["full at the export"].iterdir()] == [LOCK_FILE]


@pytest.mark.slow
def test_metrics_before_the_full_disk_are_complete_lines(ended: Ended, disks: dict[str, Path]) -> None:
    rows = read_metrics(disks["full at a row of metrics"] / METRICS_FILE)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and rows


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("lines_before", [0, 2])
def test_a_log_file_on_a_full_disk_is_closed_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd, lines_before: int
) -> None:
    """Lines logged before the run directory exists are buffered; the warning about them must not recurse."""
    logger = logging.getLogger("distill")
    logger.setLevel(logging.INFO)
    logger.addHandler(MemoryHandler(capacity=100, flushLevel=logging.CRITICAL + 1))
    for i in range(lines_before):
        logger.info("early line %d", i)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank_00003.log").symlink_to("/dev/full")
    log_to_file(tmp_path / "logs/rank_00003.log")
    for i in range(3):
        logger.info("line %d", i)
    warnings = [message for message in caplog.messages if "rank_00003.log" in message]
    assert len(warnings) == 1 and "(No space left on device)" in warnings[0]
    assert "Traceback" not in capfd.readouterr().err
    assert not logger.handlers


def _write_on(sink: TensorBoardSink) -> None:
    for step in range(1000):
        sink.write(step, {"x": 1.0})


def test_a_full_disk_causes_no_traceback_of_the_tensorboard_thread(tmp_path: Path, monkeypatch, capfd) -> None:
    """The thread flushes periodically; the next write raises its error."""
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    sink = TensorBoardSink(tmp_path)
    worker = sink._writer._get_file_writer().event_writer._async_writer._worker

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(worker._record_writer, "flush", full)
    worker._next_flush_time = 0
    with pytest.raises(OSError, match="No space left on device"):
        _write_on(sink)
    worker.join(60)
    assert not worker.is_alive() and "Exception in thread" not in capfd.readouterr().err
    other = threading.Thread(target=full, name="another one")
    other.start()
    other.join()
    assert "Exception in thread another one" in capfd.readouterr().err
