"""Files and folders of problems: formats, compression, projection to the named columns, and what is refused."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.config import DatasetConfig
from distill.data import files
from distill.data.columns import TextColumn
from distill.data.sources import load_problems
from distill.errors import UserError
from distill.validation.scores import source_names

ROWS = [
    {"question": "1+1?", "answer": "2"},
    {"question": 'a, "b"\nc', "answer": "007"},
    {"question": "é", "answer": ""},
]


def read(path: Path, **keys: Any) -> list[tuple[str, str]]:
    """Text and gold of each problem."""
    keys = {"input_key": "question", "output_key": "answer"} | keys
    return [(p.text, p.answer) for p in load_problems([DatasetConfig(data_path=str(path), **keys)])]


def refusal(path: Path, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_table(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


FORMATS: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: as_lines(ROWS),
    "a.ndjson": lambda: as_lines(ROWS),
    "lines.json": lambda: as_lines(ROWS),
    "list.json": lambda: json.dumps(ROWS).encode(),
    "pretty.json": lambda: b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=2, ensure_ascii=False).encode() + b"\n",
    "a.csv": lambda: as_table(ROWS),
    "bom.csv": lambda: b"\xef\xbb\xbf" + as_table(ROWS),
    "semicolons.csv": lambda: as_table(ROWS, ";"),
    "macintosh.csv": lambda: as_table(ROWS).replace(b"\r\n", b"\r"),
    "blank.csv": lambda: b"\r\n \n" + as_table(ROWS, ";"),
    "a.tsv": lambda: as_table(ROWS, "\t"),
    "a.parquet": lambda: as_parquet(ROWS),
    "A.JSONL": lambda: as_lines(ROWS),
}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data[:20]) + gzip.compress(data[20:]),  # of two members, as cat makes it
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_problems_compressed_or_not(name: str, compression: str, tmp_path: Path) -> None:
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESS[compression](FORMATS[name]()))
    assert read(path) == [(row["question"], row["answer"]) for row in ROWS]


@pytest.mark.parametrize("compression", [kind for kind in COMPRESS if kind])
def test_a_cut_or_foreign_compressed_file_is_refused(compression: str, tmp_path: Path) -> None:
    data = COMPRESS[compression](as_lines([{"question": f"{i * 7919}", "answer": str(i)} for i in range(3000)]))
    path = tmp_path / f"a.jsonl{compression}"
    for content in (data[: len(data) // 2], data[:7], b"plain text, not compressed at all\n"):
        path.write_bytes(content)
        assert f"data.train.data_path={path} is " in refusal(path)


def test_golds_are_kept_as_the_file_writes_them(tmp_path: Path) -> None:
    written = ["18", "18.0", "1e5", "0.10", "-0.0", "123456789012345678901234567890", '"007"', '"1,234"', "null"]
    lines = "".join(f'{{"question": "q", "x": 1.50, "answer": {gold}}}\n' for gold in written)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text("[" + ",\n".join(lines.splitlines()) + "]")
    expected = [gold.strip('"').replace("null", "") for gold in written]
    for name in ("a.jsonl", "a.json"):
        assert [gold for _, gold in read(tmp_path / name)] == expected
    (tmp_path / "a.csv").write_text("question,answer\nq,1\nq,007\nq,1.0\nq,true\nq,NaN\n")
    assert [gold for _, gold in read(tmp_path / "a.csv")] == ["1", "007", "1.0", "true", "NaN"]
    pq.write_table(pa.table({"question": ["q"] * 3, "answer": [18, None, 7]}), tmp_path / "a.parquet")
    assert [gold for _, gold in read(tmp_path / "a.parquet")] == ["18", "", "7"]


def test_numbers_of_parquet_are_shown_as_they_were_written(tmp_path: Path) -> None:
    decimals = pa.array([Decimal("1.50"), None, Decimal("-0.05")], pa.decimal128(20, 2))
    floats = {"answer": [0.1, None, 1e10]}
    for column, golds in [
        (decimals, ["1.50", "", "-0.05"]),
        (pa.array(floats["answer"], pa.float32()), ["0.1", "", "1e+10"]),
        (pa.array(floats["answer"], pa.float64()), ["0.1", "", "10000000000.0"]),
    ]:
        pq.write_table(pa.table({"question": ["q"] * 3, "answer": column}), tmp_path / "a.parquet")
        assert [gold for _, gold in read(tmp_path / "a.parquet")] == golds
    pq.write_table(pa.table({"question": ["q"], "answer": pa.array([0], pa.date32())}), tmp_path / "a.parquet")
    assert "output_key=answer is of type date in row 0" in refusal(tmp_path / "a.parquet")


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["1"]), pa.array(["2"])], ["question", "answer", "answer"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "has two columns answer in its header" in refusal(tmp_path / "a.parquet")


def test_a_list_is_decoded_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": "é" * i + '"]},{[', "answer": "\\"} for i in range(1, 40)]
    monkeypatch.setattr(files, "_CHUNK", 7)
    for indent in (None, 1):
        (tmp_path / "a.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False))
        assert read(tmp_path / "a.json") == [(row["question"], row["answer"]) for row in rows]


def test_columns_that_are_not_named_may_be_missing_differ_in_type_or_be_no_text(tmp_path: Path) -> None:
    odd = [1, "a", None, [1.5], {"a": {}}, "\ud800"]
    rows = [{"question": f"{i}", "answer": i, "x": value, f"y{i}": i} for i, value in enumerate(odd)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(tmp_path / "a.jsonl") == [(f"{i}", f"{i}") for i in range(6)]


def folder(tmp_path: Path) -> Path:
    """A folder of files whose unused columns differ, of every kind, with files that hold no problems."""
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "1.jsonl").write_bytes(as_lines([{"question": "a", "answer": 1, "level": 3}]))
    (tmp_path / "2.jsonl").write_bytes(as_lines([{"answer": "2", "level": "hard", "question": "b", "more": [1]}]))
    (tmp_path / "3.jsonl.gz").write_bytes(gzip.compress(as_lines([{"question": "c", "answer": 3.5}])))
    (tmp_path / "4.parquet").write_bytes(as_parquet([{"question": "d", "answer": 4, "level": [1.0]}]))
    (tmp_path / "5.csv").write_bytes(as_table([{"level": "", "question": "e", "answer": "5"}]))
    (tmp_path / "sub" / "6.json").write_text(json.dumps([{"question": "f", "answer": "6"}]))
    (tmp_path / "README.md").write_text("# Problems\n")
    (tmp_path / "LICENSE").write_text("free")
    (tmp_path / ".hidden.jsonl").write_text("not JSON")
    (tmp_path / ".hidden" / "a.jsonl").write_text("not JSON")
    (tmp_path / "metadata.json").write_text('{"version": 1}')
    return tmp_path


def test_a_folder_joins_files_of_any_kinds_and_columns(tmp_path: Path) -> None:
    assert sorted(read(folder(tmp_path))) == [("a", "1"), ("b", "2"), ("c", "3.5"), ("d", "4"), ("e", "5"), ("f", "6")]


def test_a_folders_splits_are_those_of_its_file_names_or_its_card(tmp_path: Path) -> None:
    for split, n in (("train", 10), ("test", 4), ("validation", 2)):
        rows = [{"question": f"{split}{i}", "answer": "1", split: i} for i in range(n)]
        (tmp_path / f"{split}.jsonl").write_bytes(as_lines(rows))
    assert [len(read(tmp_path, split=split)) for split in (None, "train", "test", "validation")] == [10, 10, 4, 2]
    assert [text for text, _ in read(tmp_path, split="test[1:3]+train[:10%]")] == ["test1", "test2", "train0"]
    assert "data.train.split=dev is not in" in refusal(tmp_path, split="dev")
    card = "---\nconfigs:\n- config_name: easy\n  data_files:\n  - split: train\n    path: test.jsonl\n"
    (tmp_path / "README.md").write_text(card + "- config_name: hard\n  data_files: validation.jsonl\n---\n")
    assert [len(read(tmp_path, subset=subset)) for subset in ("easy", "hard")] == [4, 2]


@pytest.mark.parametrize(
    ("names", "split", "read_of_these", "left"),
    [
        (["train.jsonl", "extra.jsonl", "part-2.jsonl"], None, 1, "2 data files are in no split by their names"),
        (["train.jsonl", "train2.jsonl", "sub/more.jsonl"], None, 2, "left out (sub/more.jsonl first)"),
        (["a.jsonl", "speed-test.jsonl"], "test", 1, "left out (a.jsonl first)"),
        (["train.jsonl", "test.jsonl", "metadata.jsonl", "config.json", ".b.jsonl", "__x/a.jsonl"], None, 1, ""),
        (["a.jsonl", "b.jsonl"], None, 2, ""),
    ],
)
def test_files_of_a_folder_that_are_in_no_split_are_named(
    names: list[str], split: str | None, read_of_these: int, left: str, tmp_path: Path, caplog: Any
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(as_lines(ROWS[:1]))
    (tmp_path / "README.md").write_text("# No settings\n")
    assert len(read(tmp_path, split=split)) == read_of_these
    if left:
        assert left in caplog.text
    assert len(caplog.records) == bool(left)


def test_folders_with_glob_characters_are_read_and_linked_ones_are_named(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "glob[1]*").mkdir()
    (tmp_path / "glob[1]*" / "a.jsonl").write_bytes(as_lines(ROWS))
    assert len(read(tmp_path / "glob[1]*")) == 3
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "more").symlink_to(tmp_path / "glob[1]*")
    (tmp_path / "links" / "self").symlink_to(tmp_path / "links")
    assert "only in folders that are symbolic links (more/a.jsonl first)" in refusal(tmp_path / "links")
    (tmp_path / "links" / "b.jsonl").write_bytes(as_lines(ROWS[:1]))
    assert len(read(tmp_path / "links")) == 1
    assert "left out (more/a.jsonl first)" in caplog.text
    (tmp_path / "links" / "c.jsonl").symlink_to(tmp_path / "glob[1]*" / "a.jsonl")
    assert len(read(tmp_path / "links")) == 4


def test_a_fault_in_a_folder_names_file_line_and_cause(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "2.jsonl").write_bytes(as_lines([{"question": "a", "answer": 1}]) + b'{"question": "b", "ans')
    assert f"data.train.data_path={path}/2.jsonl is malformed in line 2 (Unterminated string" in refusal(path)
    (path / "2.jsonl").write_bytes(as_lines([{"question": "a", "answer": 1}, {"problem": "b", "answer": 1}]))
    assert f"input_key=question is missing in line 2 of {path}/2.jsonl, which has problem, answer:" in refusal(path)
    (path / "2.jsonl").write_bytes(as_lines([{"question": ["a"], "answer": 1}]))
    assert f"input_key=question is of type list in line 1 of {path}/2.jsonl:" in refusal(path)


BAD = {
    "ragged.csv": (b"question,answer\na,1\nb\n", "malformed in line 3 (1 fields under a header of 2)"),
    "long.csv": (b"question,answer\na,1,2\n", "malformed in line 2 (3 fields under a header of 2)"),
    "quote.csv": (b'question,answer\n"a",1\n"b\nc,1\nd,1\n', "malformed in line 3 (unexpected end of data)"),
    "after.csv": (b'question,answer\n"a"b,1\n', "malformed in line 2 ("),
    "bytes.csv": (b'question,answer\na,1\n"b\n\xff",1\n', "malformed in line 4 ("),
    "twice.csv": (b"question,answer,question\na,1,b\n", "has two columns question in its header"),
    "spaces.csv": (b"id, question\n1,2\n", "which has id, ' question': set"),
    "macintosh.csv": (b"question,answer\ra,1\rb\r", "malformed in line 3 (1 fields under a header of 2)"),
    "utf16.jsonl": ('{"question": "a"}\n'.encode("utf-16"), "write it as UTF-8 text with one JSON object a line"),
    "wrapped.json": (
        b'{\n "data": [\n  {"question": "a", "answer": 1}]}',
        "write one list of JSON objects, or one object a line",
    ),
    "headless.csv": (b"1+1?,2\n2+2?,4\n", "input_key=question is missing in the table of"),
    "header.csv": (b"question,answer\n", "is empty"),
    "nothing.csv": (b"", "is empty"),
    "text.csv": (b"question,answer\n ,1\n", "has any text in question"),
    "open.json": (b'[{"question": "a", "answer": 1}', "malformed in entry 0, line 1 (the list is not closed)"),
    "comma.json": (b'[{"question": "a", "answer": 1},\n]', "has nothing in entry 1, line 2, where an object is needed"),
    "cut.json": (b'[\n{"question": "a",\n "answer"', "malformed in entry 0, line 3 (Expecting ':' delimiter)"),
    "three.json": (b'[{"question": "a", "answer": 1},\n 3]', "has 3 in entry 1, line 2, where an object is needed"),
    "more.json": (b'[{"question": "a", "answer": 1}] [', "(there is more after the list)"),
    "space.json": (b'[{"question": "a", "answer": 1}\n{"q": 1}]', "malformed in entry 0, line 2 (',' or ']' expected)"),
    "bytes.json": (b'[{"question": "a\xff", "answer": 1}]', "malformed in entry 0, line 1 ("),
    "deep.json": (b"[" * 100_000, "[ in entry 0, line 1, where an object is needed"),
    "deeper.json": (b'[{"a": ' + b"[" * 100_000, "malformed in entry 0, line 1 (maximum recursion"),
    "half.json": (b'[{"question": "\\ud800", "answer": 1}]', "malformed in entry 0 ('utf-8'"),
    "entry.json": (b'[{"question": "a", "answer": 1}, {"answer": 1}]', "input_key=question is missing in entry 1 of"),
    "gold.jsonl": (b'{"question": "a", "answer": [1]}', "output_key=answer is of type list in line 1 of"),
    "zip.parquet.gz": (gzip.compress(b"no parquet"), "is not a readable Parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_file_names_the_place_and_the_cause(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    assert message in refusal(tmp_path / name)


def test_metrics_name_a_file_without_its_kind_and_compression() -> None:
    sources = ["x/a.jsonl.gz", "b.csv", "C.PARQUET", "owner/v1.5", "x.tsv.zst/d"]
    assert source_names([(source, "", "") for source in sources]) == ["a", "b", "C", "v1.5", "d"]


def test_nested_fields_are_read_from_every_format_that_has_them(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "a"}], "reward": {"gold": 7}, "extra": {"hint": "h"}}]
    (tmp_path / "a.jsonl").write_bytes(as_lines(rows))
    (tmp_path / "a.parquet").write_bytes(as_parquet(rows))
    for name in ("a.jsonl", "a.parquet"):
        dataset = DatasetConfig(data_path=str(tmp_path / name), input_key="prompt.0.content", output_key="reward.gold")
        (problem,) = load_problems([dataset], columns=[TextColumn("extra.hint", "some.key")])
        assert (problem.text, problem.answer, problem.columns) == ("a", "7", {"extra.hint": "h"})


def test_a_home_folder_may_be_abbreviated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(as_lines(ROWS))
    assert len(read(Path("~/a.jsonl"))) == 3


# -- output_pattern ---------------------------------------------------------------------------------------------------

SOLUTION = "2 + 3 = <<2+3=5>>5\n#### 5 no\n#### 1,234\n"


@pytest.mark.parametrize(
    ("pattern", "gold"),
    [
        ("####", "1,234"),
        (r"#### (\S+)", "1,234"),
        (r"(?:#### )(?P<gold>.*)", "1,234"),
        (r"= <<.*>>(\d+)", "5"),
        (r"(.*)", "#### 1,234"),
    ],
)
def test_output_pattern_extracts_the_gold_from_its_last_match(pattern: str, gold: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_lines([{"question": "q", "answer": SOLUTION}]))
    assert read(tmp_path / "a.jsonl", output_pattern=pattern) == [("q", gold)]


def test_rows_that_output_pattern_does_not_match_are_counted_and_the_first_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    golds = ["#### 1", "", "none", "####", "#### 2"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_lines([{"question": "q", "answer": gold} for gold in golds]))
    with caplog.at_level(logging.WARNING):
        assert [gold for _, gold in read(path, output_pattern="####")] == ["1", "", "", "", "2"]
    assert f"does not match the gold answers of 2 of 5 problems, the first in line 3 of {path}" in caplog.text
    assert "output_pattern=xyz matches no gold answer in answer of" in refusal(path, output_pattern="xyz")
    assert "output_pattern=( is not a regular expression (missing )" in refusal(path, output_pattern="(")
    assert "output_pattern=(a)(b) has 2 groups" in refusal(path, output_pattern="(a)(b)")
