"""The data's cache: memory of the ranks, one build for all, damage, eviction and folders that can't be written."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.config import DatasetConfig
from distill.data import cache, files
from distill.data import sources as problems
from distill.data.cache import cache_folders
from distill.data.columns import TextColumn
from distill.data.sources import load_problems
from distill.data.table import Problems
from distill.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder; every table goes into it, however small."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALL", 0)
    return tmp_path / "cache" / "distill" / "data"


def write(path: Path, texts: list[str], **columns: Any) -> Path:
    rows = [{"question": text, "answer": "1"} | columns for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, *columns: str) -> Problems:
    named = [TextColumn(name, "some.key") for name in columns]
    return load_problems([DatasetConfig(data_path=str(path), input_key="question", output_key="answer")], columns=named)


def texts(found: Problems) -> list[str]:
    return [problem.text for problem in found]


def built(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrow"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read, in order."""
    found: list[Path] = []

    def read_rows(file: Any) -> Iterator[Any]:
        found.append(file.path)
        yield from original(file)

    original = files.read_rows
    monkeypatch.setattr(problems, "read_rows", read_rows)
    return found


RANKS = """
import gc, json, os, sys
from distill.config import DatasetConfig
from distill.data.sources import load_problems
import pyarrow.parquet, filelock

def anonymous():
    gc.collect()
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

def load(path):
    return load_problems([DatasetConfig(data_path=path, input_key="question", output_key="answer")])

def grown():
    kept, found = [], []
    for path in sys.argv[1:]:
        before = anonymous()
        kept.append(load(path))
        found.append([len(kept[-1]), anonymous() - before])
    print(json.dumps(found), flush=True)

load("warm.jsonl")  # what is imported late
ready, go = os.pipe()
if os.fork():
    grown()  # the rank that builds the files
    os.write(go, b".")
    os.wait()
else:
    os.read(ready, 1)
    grown()  # the rank that finds them
"""


@pytest.mark.slow
def test_two_ranks_hold_neither_the_data_nor_an_unused_column_in_memory(tmp_path: Path) -> None:
    """In MiB of anonymous memory: 8 MB of used columns, and the same rows with 12 MB more."""
    rng = random.Random(1)
    rows = [{"question": f"{i} " + rng.randbytes(400).hex(), "answer": str(i)} for i in range(10_000)]
    names = []
    for name, more in (("plain", {}), ("long", {"unused": rng.randbytes(600).hex()})):
        table = [row | more for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
        pq.write_table(pa.Table.from_pylist(table), tmp_path / f"{name}.parquet", use_dictionary=False)
        names += [f"{name}.jsonl", f"{name}.parquet"]
    write(tmp_path / "warm.jsonl", ["a" * 1000] * 8000)
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", RANKS, *names]
    done = subprocess.run(program, env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    for rank, found in enumerate(map(json.loads, done.stdout.splitlines())):
        assert [count for count, _ in found] == [10_000] * 4
        assert all(grown < 2 for _, grown in found), (rank, found)
    assert rank == 1
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 5


def test_a_table_is_built_once_for_the_same_columns(folder: Path, reads: list[Path], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["a", " ", "b"], trace="t")
    for _ in range(3):
        assert texts(load(path)) == ["a", "b"]
    assert len(reads) == len(built(folder)) == 1
    assert [problem.columns for problem in load(path, "trace")] == [{"trace": "t"}] * 2
    assert len(reads) == len(built(folder)) == 2
    part = DatasetConfig(data_path=str(path), input_key="question", output_key="answer", split="train[1:]", repeat=2)
    assert texts(load_problems([part], "data.validation")) == ["b", "b"]
    assert len(reads) == 2, "another slice, repeat or key of the configuration is the same table"


def test_a_changed_file_is_read_again(folder: Path, reads: list[Path], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["a"])
    before = path.stat()
    assert texts(load(path)) == ["a"]
    write(path, ["b"])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps times
    assert texts(load(path)) == ["b"]
    assert len(reads) == 2


@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "empty", "other bytes"])
def test_a_damaged_file_is_built_again(damage: str, folder: Path, reads: list[Path], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [f"text {i}" for i in range(100)])
    expected = texts(load(path))
    (file,) = built(folder)
    data = bytearray(file.read_bytes())
    data[data.index(b"text 50")] ^= 1
    contents = {"a flipped bit": data, "cut": data[:-40], "empty": bytearray(), "other bytes": bytearray(len(data))}
    file.write_bytes(contents[damage])
    assert texts(load(path)) == expected
    assert len(reads) == 2
    assert texts(load(path)) == expected
    assert len(reads) == 2


def test_readers_that_start_together_build_one_file(
    folder: Path, reads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", ["a", "b"])
    reading = threading.Event()

    def read_rows(file: Any) -> Iterator[Any]:
        reading.set()
        time.sleep(0.2)
        yield from counted(file)

    counted = problems.__dict__["read_rows"]
    monkeypatch.setattr(problems, "read_rows", read_rows)
    with ThreadPoolExecutor() as pool:  # each takes the lock by a file descriptor, as processes do
        first = pool.submit(load, path)
        reading.wait()
        second = pool.submit(load, path)
        assert texts(first.result()) == texts(second.result()) == ["a", "b"]
    assert len(reads) == 1


def test_a_reader_never_sees_a_file_that_is_being_written(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [f"{i}" for i in range(3000)])
    with path.open("a") as file:
        file.write('{"question": ')
    with pytest.raises(UserError, match="malformed in line 3001"):
        load(path)
    assert [file.suffix for file in folder.iterdir()] in ([], [".lock"])


def test_a_file_that_changes_while_it_is_read_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", ["a", "b"])

    def read_rows(file: Any) -> Iterator[Any]:
        yield from original(file)
        write(path, ["a", "b", "c"])

    original = files.read_rows
    monkeypatch.setattr(problems, "read_rows", read_rows)
    with pytest.raises(UserError, match=r"data\.train: .*a\.jsonl changed while it was read"):
        load(path)
    assert built(folder) == []


def test_the_least_recently_used_files_are_removed_but_none_in_use(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [load(write(tmp_path / f"{i}.jsonl", [f"{i}" * 500])) for i in range(3)]
    first, second, third = sorted(built(folder), key=lambda file: file.stat().st_mtime_ns)
    for age, file in ((300, first), (200, second), (100, third)):
        os.utime(file, (time.time() - age, time.time() - age))
    monkeypatch.setattr(cache, "MOST_BYTES", 2 * first.stat().st_size + 100)
    del old[1]  # no longer in use
    (folder / "left.arrow.tmp").touch()
    os.utime(folder / "left.arrow.tmp", (0, 0))
    found = load(write(tmp_path / "3.jsonl", ["3" * 500]))
    left = set(built(folder))
    assert second not in left and {first, third} < left and len(left) == 3
    assert not (folder / "left.arrow.tmp").exists()
    assert [texts(part)[0][0] for part in (*old, found)] == ["0", "2", "3"]


def test_files_of_other_hosts_are_removed_a_day_after_their_last_use(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(write(tmp_path / "a.jsonl", ["a" * 500]))
    ages = {"0-other.arrow": 2 * 24, "1-another.arrow": 30, "2-other.arrow": 20}
    for name, hours in ages.items():
        (folder / name).write_bytes(bytes(1000))
        os.utime(folder / name, (time.time() - hours * 3600, time.time() - hours * 3600))
    monkeypatch.setattr(cache, "MOST_BYTES", 1)
    load(write(tmp_path / "b.jsonl", ["b" * 500]))
    assert [name for name in ages if (folder / name).exists()] == ["2-other.arrow"]


def test_a_user_without_a_home_folder_has_the_cache_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache_folders() == [tmp_path / f"distill-{os.getuid()}"]


def test_without_a_writable_folder_the_data_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "SMALL", 0)
    (tmp_path / "file").touch()
    path = write(tmp_path / "a.jsonl", ["a"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert texts(load(path)) == ["a"]
    assert len(list((tmp_path / "temporary").rglob("*.arrow"))) == 1
    assert not caplog.records
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert texts(load(path)) == ["a"]
    assert "no folder can hold the data's cache" in caplog.text


def test_a_saved_dataset_is_read_once_by_splits_and_slices(folder: Path, tmp_path: Path) -> None:
    import datasets

    rows = [{"question": f"{i}", "answer": i, "unused": [i]} for i in range(10)]
    parts = datasets.Dataset.from_list(rows).train_test_split(test_size=4, shuffle=False)
    parts.save_to_disk(str(tmp_path / "saved"))

    def read(split: str | None) -> str:
        dataset = DatasetConfig(data_path=str(tmp_path / "saved"), input_key="question", split=split)
        return "".join(texts(load_problems([dataset])))

    assert [read(split) for split in (None, "test", "test[:2]+train[:50%]")] == ["012345", "6789", "67012"]
    assert len(built(folder)) == 2
    with pytest.raises(UserError, match=r"split=dev is not in .*: set data\.train\.split to one of train, test"):
        read("dev")


def test_problems_are_a_sequence_over_their_tables(folder: Path, tmp_path: Path) -> None:
    first = load(write(tmp_path / "a.jsonl", ["a", "", "b", "c"]))
    joined = Problems.joined([first, load(write(tmp_path / "b.jsonl", ["d"])).repeated(2)])
    assert texts(joined) == list("abcdd")
    assert texts(joined[1:4]) == list("bcd")
    assert texts(joined.select([4, 0])) == ["d", "a"]
    assert (joined[-1].text, joined[0].answer, joined[0].source) == ("d", "1", str(tmp_path / "a.jsonl"))
    assert joined == list(joined) and joined != list(joined)[1:] and joined != 3
    with pytest.raises(IndexError):
        joined[5]
