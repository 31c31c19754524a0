"""Malformed data: JSON lines, JSON, Parquet, paths and keys of a dataset."""

from __future__ import annotations

import json
import os
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.malformed.case import Case, Workshop, way


def problem_rows(shop: Workshop) -> list[dict[str, Any]]:
    return [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(shop.rng.randrange(4, 30))]


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def data_case(shop: Workshop, name: str, content: bytes, names: str | None = None) -> Case:
    path = shop.file(name, content)
    return shop.case(names or name, f"data.train.data_path={path}", detail=repr(content[-80:]))


@way
def _cut_line(shop: Workshop) -> Case:
    data = json_lines(problem_rows(shop))
    last = data.rstrip(b"\n").rfind(b"\n") + 1
    return data_case(shop, "cut.jsonl", data[: shop.rng.randrange(last + 1, len(data) - 2)])


@way
def _bad_line(shop: Workshop) -> Case:
    lines = json_lines(problem_rows(shop)).splitlines()
    bad = shop.rng.choice(
        [
            b"{",
            b"}",
            b"[]",
            b"3",
            b"null",
            b'"text"',
            b"{'question': 'a'}",
            b'{"question": "a"} {"question": "b"}',
            b'{"question": "a",}',
            b"[" * 100_000,
            b'{"question": ' + b"9" * 5000 + b"}",
            b'{"question": "\\ud800"}',
            b'{"question": "a\xff"}',
            b'{"question": "\xc3\x28"}',
            b'{"question": 3}',
            b'{"question": {"a": "b"}}',
            b'{"question": ["a"]}',
            b'{"question": true, "answer": "3"}',
            b'{"question": "a", "answer": {"a": 1}}',
            b'{"question": "a", "answer": true}',
            b'{"problem": "a", "answer": "3"}',
            b'{"question": "a"}',
            b"{}",
            shop.noise(20).replace(b"\n", b"") + b"\xff",
        ]
    )
    at = shop.rng.randrange(len(lines) + 1)
    return data_case(shop, "bad.jsonl", b"\n".join([*lines[:at], bad, *lines[at:]]) + b"\n", f"in line {at + 1}")


@way
def _data_without_problems(shop: Workshop) -> Case:
    name, content = shop.rng.choice(
        [
            ("none.jsonl", b""),
            ("none.jsonl", b"\n\n \n"),
            ("none.jsonl", b'{"question": "", "answer": "1"}\n' * 3),
            ("none.jsonl", b'{"question": null, "answer": "1"}\n'),
            ("none.jsonl", b"\xef\xbb\xbf"),
            ("none.json", b"[]"),
            ("none.json", b""),
        ]
    )
    return data_case(shop, name, content)


@way
def _data_of_other_bytes(shop: Workshop) -> Case:
    text = json_lines(problem_rows(shop)).decode()
    name, content = shop.rng.choice(
        [
            ("other.jsonl", text.encode("utf-16")),
            ("other.jsonl", shop.noise(300) + b"\xff"),
            ("other.jsonl", b"PK\x03\x04" + shop.noise(100)),
            ("other.jsonl", b"\x1f\x8b\x08\x00" + shop.noise(100)),
            ("other.jsonl", b"\x00" * 100),
            ("other.json", text.encode()[:-3]),
            ("other.json", b'[{"question": "a"'),
            ("other.json", b'[{"question": "a"}, 3]'),
            ("other.json", b'{"data": [{"question": "a"}]}'),
            ("other.csv", b"question,answer\na,b,c\n"),
            ("other", text.encode()),
            ("other.jsonl.gz", b"\x1f\x8b\x08\x00"),
            ("other.pkl", b"\x80\x04."),
        ]
    )
    return data_case(shop, name, content)


@way
def _bad_parquet(shop: Workshop) -> Case:
    path = shop.folder / "bad.parquet"
    kind = shop.rng.randrange(8)
    rows = problem_rows(shop)
    table = pa.Table.from_pylist(rows)
    names = "bad.parquet"
    if kind == 0:
        table = table.rename_columns(["problem", "solution"])
    elif kind == 1:
        table = pa.table({"question": [[1.0]] * 4, "answer": ["1"] * 4})
    elif kind == 2:
        table = table.slice(0, 0)
    elif kind == 3:
        table = pa.table({"question": pa.array([None] * 4, pa.string()), "answer": ["1"] * 4})
    elif kind == 4:
        table = pa.table({"question": [b"a\xff"] * 4, "answer": ["1"] * 4})
    pq.write_table(table, path)
    content = path.read_bytes()
    if kind == 5:
        path.write_bytes(shop.cut(content))
    elif kind == 6:
        path.write_bytes(shop.noise(100))
    elif kind == 7:  # valid header and footer, overwritten pages
        path.write_bytes(content[:4] + b"\xff" * 60 + content[64:])
    return shop.case(names, f"data.train.data_path={path}", detail=str(kind))


@way
def _parquet_of_text_that_is_none(shop: Workshop) -> Case:
    """A string column with bytes that are not UTF-8."""
    path = shop.folder / "bytes.parquet"
    values = pa.array([b"a", b"\xff\xfe", b"c", b"d"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"question": values, "answer": ["1"] * 4}), path)
    return shop.case("bytes.parquet", f"data.train.data_path={path}")


@way
def _data_path_is_no_file(shop: Workshop) -> Case:
    kind = shop.rng.randrange(6)
    path = shop.folder / ("data.jsonl" if kind < 5 else "data.parquet")
    if kind == 0:
        path = shop.folder / "empty"
        path.mkdir()
    elif kind in (1, 5):
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(shop.folder / "gone.jsonl")
    elif kind == 3:
        path.symlink_to(path)
    return shop.case(path.name, f"data.train.data_path={path}", detail=str(kind))


@way
def _broken_dataset_folder(shop: Workshop) -> Case:
    folder = shop.folder / "saved"
    folder.mkdir()
    name, content = shop.rng.choice(
        [
            ("dataset_info.json", "{"),
            ("dataset_dict.json", "{"),
            ("dataset_dict.json", '{"splits": ["train"]}'),
            ("dataset_info.json", "{}"),
            ("train.jsonl", '{"question": "a"'),
            ("train.txt.zip", "PK"),
            ("load.py", "open(__file__ + '.ran', 'w')"),
        ]
    )
    (folder / name).write_text(content)
    return shop.case("data.train", f"data.train.data_path={folder}", detail=f"{name}: {content}")


@way
def _data_keys_that_fit_nothing(shop: Workshop) -> Case:
    names, override = shop.rng.choice(
        [
            ("data.train.input_key=", "data.train.input_key=problem"),
            ("data.train.input_key=", "data.train.input_key=question.0"),
            ("data.train.output_key=", "data.train.output_key=gold"),
            ("data.train.dataset_name", "data.train.dataset_name=DeepScalr"),
            ("data.train.dataset_name", "data.train.dataset_name=no-one/nothing-at-all"),
            ("data.train.dataset_name", "data.train.dataset_name=AIME2024"),
            ("data.train.data_path", "data.train.data_path=no-one/nothing-at-all"),
            ("data.train", "data.train=[]"),
            ("data.train", "data.train=[{data_path: nowhere.jsonl}, {data_path: nowhere.jsonl}]"),
            ("data.max_input_seq_length", "data.max_input_seq_length=1"),
        ]
    )
    return shop.case(names, override)
