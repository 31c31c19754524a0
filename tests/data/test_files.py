"""Files and folders of problems: formats, compression, projection to columns, and refusals."""

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
from distill.validation.scores import source_names
from tests.data.loading import load_datasets, refusal

ROWS = [
    {"question": "1+1?", "answer": "2"},
    {"question": 'a, "b"\nc', "answer": "007"},
    {"question": "é", "answer": ""},
]


def read(path: Path, **keys: Any) -> list[tuple[str, str]]:
    """Return text and gold answer of each problem."""
    keys = {"input_key": "question", "output_key": "answer"} | keys
    return [(p.text, p.answer) for p in load_datasets([DatasetConfig(data_path=str(path), **keys)])]


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
    ".gz": lambda data: gzip.compress(data[:20]) + gzip.compress(data[20:]),  # two members, as written by cat
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", FORMATS)
def test_all_formats_and_compressions_give_the_same_problems(name: str, compression: str, tmp_path: Path) -> None:
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESS[compression](FORMATS[name]()))
    assert read(path) == [(row["question"], row["answer"]) for row in ROWS]


@pytest.mark.parametrize("compression", [kind for kind in COMPRESS if kind])
def test_truncated_and_invalid_compressed_files_are_refused(compression: str, tmp_path: Path) -> None:
    data = COMPRESS[compression](as_lines([{"question": f"{i * 7919}", "answer": str(i)} for i in range(3000)]))
    path = tmp_path / f"a.jsonl{compression}"
    for content in (data[: len(data) // 2], data[:7], b"plain text, not compressed at all\n"):
        path.write_bytes(content)
        error = refusal(path)
        assert (error.key, error.value) == ("data.train.data_path", str(path))


def test_gold_answers_keep_their_spelling_in_the_file(tmp_path: Path) -> None:
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


def test_gold_answers_from_parquet_numbers_have_their_shortest_spelling(tmp_path: Path) -> None:
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
    error = refusal(tmp_path / "a.parquet")
    assert error.key == "data.train.output_key" and "type date in row 0" in str(error)


def test_parquet_files_with_duplicate_column_names_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["1"]), pa.array(["2"])], ["question", "answer", "answer"])
    pq.write_table(table, tmp_path / "a.parquet")
    error = refusal(tmp_path / "a.parquet")
    assert error.key == "data.train.data_path" and "named answer" in str(error)


def test_json_lists_are_decoded_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": "é" * i + '"]},{[', "answer": "\\"} for i in range(1, 40)]
    monkeypatch.setattr(files, "_CHUNK", 7)
    for indent in (None, 1):
        (tmp_path / "a.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False))
        assert read(tmp_path / "a.json") == [(row["question"], row["answer"]) for row in rows]


def test_unused_columns_may_be_missing_or_differ_in_type(tmp_path: Path) -> None:
    odd = [1, "a", None, [1.5], {"a": {}}, "\ud800"]
    rows = [{"question": f"{i}", "answer": i, "x": value, f"y{i}": i} for i, value in enumerate(odd)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(tmp_path / "a.jsonl") == [(f"{i}", f"{i}") for i in range(6)]


def folder(tmp_path: Path) -> Path:
    """Write a folder of files of all types with different unused columns, and some files without problems."""
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


def test_a_folder_may_mix_file_types_and_columns(tmp_path: Path) -> None:
    assert sorted(read(folder(tmp_path))) == [("a", "1"), ("b", "2"), ("c", "3.5"), ("d", "4"), ("e", "5"), ("f", "6")]


def test_splits_of_a_folder_follow_file_names_or_the_dataset_card(tmp_path: Path) -> None:
    for split, n in (("train", 10), ("test", 4), ("validation", 2)):
        rows = [{"question": f"{split}{i}", "answer": "1", split: i} for i in range(n)]
        (tmp_path / f"{split}.jsonl").write_bytes(as_lines(rows))
    assert [len(read(tmp_path, split=split)) for split in (None, "train", "test", "validation")] == [10, 10, 4, 2]
    assert [text for text, _ in read(tmp_path, split="test[1:3]+train[:10%]")] == ["test1", "test2", "train0"]
    error = refusal(tmp_path, split="dev")
    assert (error.key, error.value) == ("data.train.split", "dev")
    card = "---\nconfigs:\n- config_name: easy\n  data_files:\n  - split: train\n    path: test.jsonl\n"
    (tmp_path / "README.md").write_text(card + "- config_name: hard\n  data_files: validation.jsonl\n---\n")
    assert [len(read(tmp_path, subset=subset)) for subset in ("easy", "hard")] == [4, 2]


@pytest.mark.parametrize(
    ("names", "split", "expected", "warning"),
    [
        (["train.jsonl", "extra.jsonl", "part-2.jsonl"], None, 1, "2 data files"),
        (["train.jsonl", "train2.jsonl", "sub/more.jsonl"], None, 2, "first: sub/more.jsonl"),
        (["a.jsonl", "speed-test.jsonl"], "test", 1, "first: a.jsonl"),
        (["train.jsonl", "test.jsonl", "metadata.jsonl", "config.json", ".b.jsonl", "__x/a.jsonl"], None, 1, ""),
        (["a.jsonl", "b.jsonl"], None, 2, ""),
    ],
)
def test_files_of_a_folder_in_no_split_are_named_in_a_warning(
    names: list[str], split: str | None, expected: int, warning: str, tmp_path: Path, caplog: Any
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(as_lines(ROWS[:1]))
    (tmp_path / "README.md").write_text("# No settings\n")
    assert len(read(tmp_path, split=split)) == expected
    assert warning in caplog.text
    assert len(caplog.records) == bool(warning)


def test_folder_names_may_contain_glob_characters_and_linked_folders_are_named(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "glob[1]*").mkdir()
    (tmp_path / "glob[1]*" / "a.jsonl").write_bytes(as_lines(ROWS))
    assert len(read(tmp_path / "glob[1]*")) == 3
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "more").symlink_to(tmp_path / "glob[1]*")
    (tmp_path / "links" / "self").symlink_to(tmp_path / "links")
    assert "first: more/a.jsonl" in str(refusal(tmp_path / "links"))
    (tmp_path / "links" / "b.jsonl").write_bytes(as_lines(ROWS[:1]))
    assert len(read(tmp_path / "links")) == 1
    assert "first: more/a.jsonl" in caplog.text
    (tmp_path / "links" / "c.jsonl").symlink_to(tmp_path / "glob[1]*" / "a.jsonl")
    assert len(read(tmp_path / "links")) == 4


def test_errors_in_a_folder_name_file_line_and_cause(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "2.jsonl").write_bytes(as_lines([{"question": "a", "answer": 1}]) + b'{"question": "b", "ans')
    error = refusal(path)
    assert error.value == f"{path}/2.jsonl" and "line 2 (Unterminated" in str(error)
    (path / "2.jsonl").write_bytes(as_lines([{"question": "a", "answer": 1}, {"problem": "b", "answer": 1}]))
    error = refusal(path)
    assert error.key == "data.train.input_key" and f"line 2 of {path}/2.jsonl" in str(error)
    assert "problem, answer)" in str(error)
    (path / "2.jsonl").write_bytes(as_lines([{"question": ["a"], "answer": 1}]))
    error = refusal(path)
    assert error.key == "data.train.input_key" and f"type list in line 1 of {path}/2.jsonl" in str(error)


def test_a_message_is_a_problem_or_answer_by_its_path(tmp_path: Path) -> None:
    turns = [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant")]
    (tmp_path / "chats.jsonl").write_bytes(as_lines([{"messages": turns, "inner": {"a": "1", "b": "2"}}]))
    error = refusal(tmp_path / "chats.jsonl", input_key="messages.1.content", output_key="messages")
    assert error.key == "data.train.output_key" and "messages.2.content" in error.fix
    error = refusal(tmp_path / "chats.jsonl", input_key="inner")
    assert "inner.a, inner.b" in error.fix
    path = str(tmp_path / "chats.jsonl")
    dataset = DatasetConfig(data_path=path, input_key="messages.1.content", output_key="messages.2.content")
    (problem,) = load_datasets([dataset])
    assert (problem.text, problem.answer) == ("USER", "ASSISTANT")


BAD = {
    "ragged.csv": (b"question,answer\na,1\nb\n", "data_path", "line 3 (number of fields: 1, in the header: 2)"),
    "long.csv": (b"question,answer\na,1,2\n", "data_path", "line 2 (number of fields: 3, in the header: 2)"),
    "quote.csv": (b'question,answer\n"a",1\n"b\nc,1\nd,1\n', "data_path", "line 3 (unexpected end of data)"),
    "after.csv": (b'question,answer\n"a"b,1\n', "data_path", "line 2 ("),
    "bytes.csv": (b'question,answer\na,1\n"b\n\xff",1\n', "data_path", "line 4 ("),
    "twice.csv": (b"question,answer,question\na,1,b\n", "data_path", "named question"),
    "spaces.csv": (b"id, question\n1,2\n", "input_key", "id, ' question'"),
    "macintosh.csv": (b"question,answer\ra,1\rb\r", "data_path", "line 3 ("),
    "utf16.jsonl": ('{"question": "a"}\n'.encode("utf-16"), "data_path", "UTF-8"),
    "wrapped.json": (b'{\n "data": [\n  {"question": "a", "answer": 1}]}', "data_path", "line 1"),
    "headless.csv": (b"1+1?,2\n2+2?,4\n", "input_key", "1+1?, 2"),
    "header.csv": (b"question,answer\n", "", "is empty"),
    "nothing.csv": (b"", "", "is empty"),
    "text.csv": (b"question,answer\n ,1\n", "input_key", "no text"),
    "open.json": (b'[{"question": "a", "answer": 1}', "data_path", "entry 0, line 1 ("),
    "comma.json": (b'[{"question": "a", "answer": 1},\n]', "data_path", "entry 1, line 2"),
    "cut.json": (b'[\n{"question": "a",\n "answer"', "data_path", "entry 0, line 3 (Expecting ':' delimiter)"),
    "three.json": (b'[{"question": "a", "answer": 1},\n 3]', "data_path", "entry 1, line 2"),
    "more.json": (b'[{"question": "a", "answer": 1}] [', "data_path", "entry 0, line 1 ("),
    "space.json": (b'[{"question": "a", "answer": 1}\n{"q": 1}]', "data_path", "entry 0, line 2 (',' or ']'"),
    "bytes.json": (b'[{"question": "a\xff", "answer": 1}]', "data_path", "entry 0, line 1 ("),
    "deep.json": (b"[" * 100_000, "data_path", "entry 0, line 1"),
    "deeper.json": (b'[{"a": ' + b"[" * 100_000, "data_path", "line 1 (maximum recursion"),
    "half.json": (b'[{"question": "\\ud800", "answer": 1}]', "", "in entry 0"),
    "entry.json": (b'[{"question": "a", "answer": 1}, {"answer": 1}]', "input_key", "entry 1 of"),
    "gold.jsonl": (b'{"question": "a", "answer": [1]}', "output_key", "type list in line 1 of"),
    "zip.parquet.gz": (gzip.compress(b"no parquet"), "data_path", "Parquet"),
}
"""The content of a file, the key of the refusal below data.train, and a fragment of the message."""


@pytest.mark.parametrize("name", BAD)
def test_malformed_files_are_refused_with_location_and_cause(name: str, tmp_path: Path) -> None:
    content, key, fragment = BAD[name]
    (tmp_path / name).write_bytes(content)
    error = refusal(tmp_path / name)
    assert error.key == f"data.train.{key}".rstrip(".")
    assert (error.value is None) == (key == "")  # a file or row is not the value of data.train
    assert fragment in str(error) and str(tmp_path / name) in error.problem


def test_metric_names_omit_file_type_and_compression() -> None:
    sources = ["x/a.jsonl.gz", "b.csv", "C.PARQUET", "owner/v1.5", "x.tsv.zst/d"]
    assert source_names([(source, "", "") for source in sources]) == ["a", "b", "C", "v1.5", "d"]


def test_dotted_paths_select_nested_fields_in_json_and_parquet(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "a"}], "reward": {"gold": 7}, "extra": {"hint": "h"}}]
    (tmp_path / "a.jsonl").write_bytes(as_lines(rows))
    (tmp_path / "a.parquet").write_bytes(as_parquet(rows))
    for name in ("a.jsonl", "a.parquet"):
        dataset = DatasetConfig(data_path=str(tmp_path / name), input_key="prompt.0.content", output_key="reward.gold")
        (problem,) = load_datasets([dataset], trace_column="extra.hint")
        assert (problem.text, problem.answer, problem.columns) == ("a", "7", {"extra.hint": "h"})


def test_a_tilde_in_data_path_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_output_pattern_extracts_the_gold_answer_from_its_last_match(pattern: str, gold: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_lines([{"question": "q", "answer": SOLUTION}]))
    assert read(tmp_path / "a.jsonl", output_pattern=pattern) == [("q", gold)]


def test_gold_answers_without_a_match_are_counted_and_the_first_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    golds = ["#### 1", "", "none", "####", "#### 2"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_lines([{"question": "q", "answer": gold} for gold in golds]))
    with caplog.at_level(logging.WARNING):
        assert [gold for _, gold in read(path, output_pattern="####")] == ["1", "", "", "", "2"]
    assert "2 of 5 problems" in caplog.text and f"line 3 of {path}" in caplog.text
    for pattern, fragment in (("xyz", f"line 1 of {path}"), ("(", "(missing )"), ("(a)(b)", "2 capturing")):
        error = refusal(path, output_pattern=pattern)
        assert (error.key, error.value) == ("data.train.output_pattern", pattern) and fragment in str(error)
