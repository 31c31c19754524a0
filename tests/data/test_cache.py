"""The data cache: memory of the ranks, a single build, damage, eviction and folders without write access."""

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
from distill.data import cache, files, sources
from distill.data.cache import cache_folders, private_cache
from distill.data.table import Problems
from distill.errors import UserError
from tests.data.loading import load_datasets

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the cache folder; tables of all sizes are stored in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "IN_MEMORY_BYTES", 0)
    return tmp_path / "cache" / "distill" / "data"


def write(path: Path, texts: list[str], **columns: Any) -> Path:
    rows = [{"question": text, "answer": "1"} | columns for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, trace_column: str | None = None) -> Problems:
    dataset = DatasetConfig(data_path=str(path), input_key="question", output_key="answer")
    return load_datasets([dataset], trace_column=trace_column)


def texts(found: Problems) -> list[str]:
    return [problem.text for problem in found]


def built(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrow"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Record the paths of the files that are read, in order."""
    found: list[Path] = []

    def read_rows(file: Any) -> Iterator[Any]:
        found.append(file.path)
        yield from original(file)

    original = files.read_rows
    monkeypatch.setattr(sources, "read_rows", read_rows)
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
    return load_problems(DatasetConfig(data_path=path, input_key="question", output_key="answer"), "data.train")

def grown():
    kept, found = [], []
    for path in sys.argv[1:]:
        before = anonymous()
        kept.append(load(path))
        found.append([len(kept[-1]), anonymous() - before])
    print(json.dumps(found), flush=True)

load("warm.jsonl")  # triggers late imports
ready, go = os.pipe()
if os.fork():
    grown()  # this rank builds the files
    os.write(go, b".")
    os.wait()
else:
    os.read(ready, 1)
    grown()  # this rank finds them
"""


@pytest.mark.slow
def test_two_ranks_keep_neither_data_nor_unused_columns_in_memory(tmp_path: Path) -> None:
    """Measure anonymous memory in MiB for 8 MB of used columns, with and without 12 MB of unused columns."""
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


def test_a_table_is_built_once_per_set_of_columns(folder: Path, reads: list[Path], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["a", " ", "b"], trace="t")
    for _ in range(3):
        assert texts(load(path)) == ["a", "b"]
    assert len(reads) == len(built(folder)) == 1
    assert [problem.columns for problem in load(path, "trace")] == [{"trace": "t"}] * 2
    assert len(reads) == len(built(folder)) == 2
    part = DatasetConfig(data_path=str(path), input_key="question", output_key="answer", split="train[1:]", repeat=2)
    assert texts(load_datasets([part], "data.validation")) == ["b", "b"]
    assert len(reads) == 2, "slice, repeat and configuration key do not affect the table"


def test_changed_files_are_read_again(folder: Path, reads: list[Path], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["a"])
    before = path.stat()
    assert texts(load(path)) == ["a"]
    write(path, ["b"])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # like a copy that preserves times
    assert texts(load(path)) == ["b"]
    assert len(reads) == 2


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "empty", "zeros"])
def test_damaged_cache_files_are_built_again(damage: str, folder: Path, reads: list[Path], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [f"text {i}" for i in range(100)])
    expected = texts(load(path))
    (file,) = built(folder)
    data = bytearray(file.read_bytes())
    data[data.index(b"text 50")] ^= 1
    contents = {"flipped bit": data, "truncated": data[:-40], "empty": bytearray(), "zeros": bytearray(len(data))}
    file.write_bytes(contents[damage])
    assert texts(load(path)) == expected
    assert len(reads) == 2
    assert texts(load(path)) == expected
    assert len(reads) == 2


def test_concurrent_readers_build_a_single_file(
    folder: Path, reads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", ["a", "b"])
    reading = threading.Event()

    def read_rows(file: Any) -> Iterator[Any]:
        reading.set()
        time.sleep(0.2)
        yield from counted(file)

    counted = sources.__dict__["read_rows"]
    monkeypatch.setattr(sources, "read_rows", read_rows)
    with ThreadPoolExecutor() as pool:  # each thread locks its own file descriptor, like a process
        first = pool.submit(load, path)
        reading.wait()
        second = pool.submit(load, path)
        assert texts(first.result()) == texts(second.result()) == ["a", "b"]
    assert len(reads) == 1


def test_readers_never_find_an_incomplete_cache_file(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [f"{i}" for i in range(3000)])
    with path.open("a") as file:
        file.write('{"question": ')
    with pytest.raises(UserError, match="line 3001"):
        load(path)
    assert [file.suffix for file in folder.iterdir()] in ([], [".lock"])


def test_files_that_change_while_being_read_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", ["a", "b"])

    def read_rows(file: Any) -> Iterator[Any]:
        yield from original(file)
        write(path, ["a", "b", "c"])

    original = files.read_rows
    monkeypatch.setattr(sources, "read_rows", read_rows)
    with pytest.raises(UserError) as caught:
        load(path)
    assert (caught.value.key, caught.value.value) == ("data.train", None) and f"{path} changed" in caught.value.problem
    assert built(folder) == []


def test_least_recently_used_files_are_removed_unless_in_use(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [load(write(tmp_path / f"{i}.jsonl", [f"{i}" * 500])) for i in range(3)]
    first, second, third = sorted(built(folder), key=lambda file: file.stat().st_mtime_ns)
    for age, file in ((300, first), (200, second), (100, third)):
        os.utime(file, (time.time() - age, time.time() - age))
    monkeypatch.setattr(cache, "MAX_CACHE_BYTES", 2 * first.stat().st_size + 100)
    del old[1]  # no longer in use
    (folder / "left.arrow.tmp").touch()
    os.utime(folder / "left.arrow.tmp", (0, 0))
    found = load(write(tmp_path / "3.jsonl", ["3" * 500]))
    left = set(built(folder))
    assert second not in left and {first, third} < left and len(left) == 3
    assert not (folder / "left.arrow.tmp").exists()
    assert [texts(part)[0][0] for part in (*old, found)] == ["0", "2", "3"]


def test_cache_files_of_other_hosts_are_removed_a_day_after_their_last_use(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(write(tmp_path / "a.jsonl", ["a" * 500]))
    ages = {"0-other.arrow": 2 * 24, "1-another.arrow": 30, "2-other.arrow": 20}
    for name, hours in ages.items():
        (folder / name).write_bytes(bytes(1000))
        os.utime(folder / name, (time.time() - hours * 3600, time.time() - hours * 3600))
    monkeypatch.setattr(cache, "MAX_CACHE_BYTES", 1)
    load(write(tmp_path / "b.jsonl", ["b" * 500]))
    assert [name for name in ages if (folder / name).exists()] == ["2-other.arrow"]


def test_users_without_a_home_folder_have_the_cache_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache_folders() == [tmp_path / f"distill-{os.getuid()}"]


def test_without_a_writable_cache_folder_data_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "IN_MEMORY_BYTES", 0)
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
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "XDG_CACHE_HOME" in caplog.text


def test_a_private_cache_reads_the_shared_cache_and_leaves_no_file(
    folder: Path, reads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, other = write(tmp_path / "a.jsonl", ["a"]), write(tmp_path / "b.jsonl", ["b"])
    load(shared)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with private_cache():
        tables = load(shared), load(other)
        assert len(list((tmp_path / "temporary").rglob("*.arrow"))) == 1
    assert [texts(table) for table in tables] == [["a"], ["b"]] and reads == [shared, other]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert not list((tmp_path / "temporary").iterdir())


def test_each_split_of_a_saved_dataset_is_read_once(folder: Path, tmp_path: Path) -> None:
    import datasets

    rows = [{"question": f"{i}", "answer": i, "unused": [i]} for i in range(10)]
    parts = datasets.Dataset.from_list(rows).train_test_split(test_size=4, shuffle=False)
    parts.save_to_disk(str(tmp_path / "saved"))

    def read(split: str | None) -> str:
        dataset = DatasetConfig(data_path=str(tmp_path / "saved"), input_key="question", split=split)
        return "".join(texts(load_datasets([dataset])))

    assert [read(split) for split in (None, "test", "test[:2]+train[:50%]")] == ["012345", "6789", "67012"]
    assert len(built(folder)) == 2
    with pytest.raises(UserError, match="train, test") as caught:
        read("dev")
    assert (caught.value.key, caught.value.value) == ("data.train.split", "dev")


def test_problems_behave_like_a_list(folder: Path, tmp_path: Path) -> None:
    first = load(write(tmp_path / "a.jsonl", ["a", "", "b", "c"]))
    joined = Problems.joined([first, load(write(tmp_path / "b.jsonl", ["d"])).repeated(2)])
    assert texts(joined) == list("abcdd")
    assert texts(joined[1:4]) == list("bcd")
    assert texts(joined.select([4, 0])) == ["d", "a"]
    assert (joined[-1].text, joined[0].answer, joined[0].source) == ("d", "1", str(tmp_path / "a.jsonl"))
    assert joined == list(joined) and joined != list(joined)[1:] and joined != 3
    with pytest.raises(IndexError):
        joined[5]
