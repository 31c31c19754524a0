"""Malformed data: CSV, compressed and JSON files, folders, and settings of the gold answer."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.malformed.case import Case, Workshop, way
from tests.malformed.data import data_case, json_lines, problem_rows


@way
def _malformed_csv(shop: Workshop) -> Case:
    good = "".join(f"What is {i}?,{i}\n" for i in range(shop.rng.randrange(1, 20)))
    header = "question,answer\n"
    name, content, names = shop.rng.choice(
        [
            ("bad.csv", header + good + "a\n", "bad.csv"),
            ("bad.csv", header + good + "a,1,2\n", "bad.csv"),
            ("bad.csv", header + good + '"a,1\n', "bad.csv"),
            ("bad.csv", header + good + '"a"b,1\n', "bad.csv"),
            ("bad.csv", "question,answer,question\na,1,b\n", "bad.csv"),
            ("bad.csv", good, "data.train.input_key="),
            ("bad.csv", "question;gold\na;1\n", "data.train.output_key="),
            ("bad.csv", header, "bad.csv"),
            ("bad.csv", "", "bad.csv"),
            ("bad.tsv", header + good, "data.train.input_key="),
            ("bad.tsv", "question\tanswer\na\n", "bad.tsv"),
        ]
    )
    return data_case(shop, name, content.encode(), names)


@way
def _csv_with_invalid_bytes(shop: Workshop) -> Case:
    text = b"question,answer\na,1\n"
    others = [text.decode().encode("utf-16"), b"\x00" * 50, shop.noise(80) + b"\xff"]
    return data_case(shop, "bytes.csv", shop.rng.choice([text + b"b\xff,1\n", text + b"b\x00,1\n", *others]))


@way
def _damaged_compressed_file(shop: Workshop) -> Case:
    data = json_lines(problem_rows(shop))
    kinds = {
        ".gz": gzip.compress(data),
        ".bz2": bz2.compress(data),
        ".xz": lzma.compress(data),
        ".zst": pa.compress(data, codec="zstd", asbytes=True),
    }
    kind = shop.rng.choice(list(kinds))
    complete = kinds[kind]
    content = shop.rng.choice([data, complete[: len(complete) // 2], complete[:5], shop.noise(100)])
    name = shop.rng.choice(["bad.jsonl", "bad.json", "bad.csv", "bad.parquet"]) + kind
    return data_case(shop, name, content)


@way
def _malformed_json_list(shop: Workshop) -> Case:
    rows = json.dumps(problem_rows(shop), indent=shop.rng.choice([None, 2]))
    content = shop.rng.choice(
        [
            rows[:-1],
            rows[: len(rows) // 2],
            rows + "]",
            rows + "\n" + rows,
            rows[:-1] + ",]",
            rows[:-1] + ", null]",
            rows[:-1] + ", {}]",
            rows[:-1] + ', {"question": "\\ud800", "answer": 1}]',
            rows[:-1] + ', {"question": ["a"], "answer": 1}]',
            rows.replace("},", "}", 1),
            "[" + rows + "]",
            "[" * 5000,
        ]
    )
    return data_case(shop, "bad.json", content.encode())


@way
def _folder_with_a_malformed_file(shop: Workshop) -> Case:
    folder = shop.folder / "files"
    folder.mkdir()
    rows = problem_rows(shop)
    (folder / "1.jsonl").write_bytes(json_lines(rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "2.parquet")
    name, content = shop.rng.choice(
        [
            ("3.jsonl", b'{"question": "a", "ans'),
            ("3.jsonl", b'{"problem": "a", "answer": "1"}\n'),
            ("3.jsonl", b'{"question": ["a"], "answer": "1"}\n'),
            ("3.csv", b"question,answer\na\n"),
            ("3.csv", b"problem,answer\na,1\n"),
            ("3.parquet", b"PAR1"),
            ("3.json.gz", b"\x1f\x8b"),
            ("1.jsonl", b"[1]\n"),
        ]
    )
    (folder / name).write_bytes(content)
    return shop.case(f"{folder}/{name}", f"data.train.data_path={folder}", detail=f"{name}: {content!r}")


@way
def _folder_without_the_split(shop: Workshop) -> Case:
    folder: Path = shop.folder / "files"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_bytes(json_lines(problem_rows(shop)))
    split = shop.rng.choice(["validation", "tset", "train+dev", "train[", "test[:x]", "dev[:10%]"])
    return shop.case("data.train.split", f"data.train.data_path={folder}", f"data.train.split={split}")


@way
def _folder_with_an_invalid_card(shop: Workshop) -> Case:
    folder = shop.folder / "files"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(json_lines(problem_rows(shop)))
    card = shop.rng.choice(
        [
            "configs:\n- config_name: a\n  data_files: gone.jsonl\n",
            "configs: 3\n",
            "configs:\n- data_files: train.jsonl\n",
            "configs:\n- config_name: a\n  data_files: 5\n",
            "configs: [\n",
        ]
    )
    (folder / "README.md").write_text(f"---\n{card}---\n")
    return shop.case("data.train.data_path", f"data.train.data_path={folder}", detail=card)


@way
def _invalid_output_pattern(shop: Workshop) -> Case:
    pattern = shop.rng.choice(["(", "[a", "*", "(?P<a", "(a)(b)", "(?<=a*)b", "####", "nowhere"])
    return shop.case("data.train.output_pattern=", f"data.train.output_pattern='{pattern}'")


@way
def _gold_answer_that_is_not_an_option(shop: Workshop) -> Case:
    gold = shop.rng.choice(["1", "K", "A, B", "Paris", "A or B", "none of these"])
    path = shop.file("choices.jsonl", json_lines([{"question": "a", "answer": "B"}, {"question": "b", "answer": gold}]))
    return shop.case(
        "env_name=choice", f"data.validation={{data_path: {path}, env_name: choice}}", "distillation.val_period=1"
    )
