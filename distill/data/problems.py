"""Problems from JSONL and Parquet files, folders and hub datasets.

Files are read into memory directly: nothing is written to a cache, so any number of ranks may read the same file at
once, and a small file takes milliseconds. Hub datasets and dataset folders go through the ``datasets`` library, whose
cache is locked by itself.
"""

from __future__ import annotations

import json
import logging
import os.path
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.config.build import reason, show
from distill.types import Problem, UserError

if TYPE_CHECKING:
    from distill.config import DatasetConfig

logger = logging.getLogger(__name__)

Row = tuple[str, Mapping[str, Any]]
"""A row and its place in messages: ("line 3", {...})."""


@dataclass(frozen=True)
class Known:
    """What a short name stands for: a hub dataset and the columns that matter."""

    hub: str
    input_key: str
    output_key: str
    subsets: tuple[str | None, ...] = (None,)
    """Read one after the other."""
    split: str = "train"
    answer_after: str = ""
    """The gold answer is what follows this mark, where it is set."""


KNOWN = {
    "DeepScaler": Known("agentica-org/DeepScaleR-Preview-Dataset", "problem", "answer"),
    "AIME2024": Known("HuggingFaceH4/aime_2024", "problem", "answer"),
    "AIME2025": Known("opencompass/AIME2025", "question", "answer", ("AIME2025-I", "AIME2025-II"), "test"),
    "AIME2026": Known("MathArena/aime_2026", "problem", "answer"),
    "MATH500": Known("HuggingFaceH4/MATH-500", "problem", "answer", split="test"),
    "GSM8K": Known("openai/gsm8k", "question", "answer", ("main",), answer_after="####"),
    "OpenMathInstruct-2": Known("nvidia/OpenMathInstruct-2", "problem", "expected_answer", split="train_1M"),
    "OpenR1-Math-220k": Known("open-r1/OpenR1-Math-220k", "problem", "answer", ("default",)),
    "DAPOMath17K": Known("BytedTsinghua-SIA/DAPO-Math-17k", "prompt.0.content", "reward_model.ground_truth"),
}
"""The reference system's short names, with its columns."""


_TRACE_KEY = "distillation.context_distillation.static_trace.answer_column"


def load_problems(
    datasets: Sequence[DatasetConfig], where: str = "data.train", trace_column: str | None = None
) -> list[Problem]:
    """All problems of ``datasets``, one after the other, each dataset repeated as it asks.

    ``where`` is the key that a message names. ``trace_column``, where it is set, must be in every row, a text or null;
    null becomes "". Raises UserError for whatever the user can put right: a missing file, an empty dataset, a missing
    column, a malformed line, a column of the wrong type, a hub that can't be reached.
    """
    problems: list[Problem] = []
    for key, dataset in keyed(datasets, where):
        problems += load_dataset_problems(dataset, key, trace_column)
    return problems


def keyed(datasets: Sequence[DatasetConfig], where: str) -> Iterator[tuple[str, DatasetConfig]]:
    """Each dataset with its key: "data.train" for a single one, "data.train[1]" for one of several."""
    if not datasets:
        raise UserError(f"{where} names no dataset: set {where}.data_path or {where}.dataset_name")
    for i, dataset in enumerate(datasets):
        yield (where if len(datasets) == 1 else f"{where}[{i}]"), dataset


def load_dataset_problems(
    dataset: DatasetConfig, where: str, trace_column: str | None = None, trace_needed: bool = True
) -> list[Problem]:
    """The problems of one dataset, ``repeat`` times over: first all of them once, then all of them again.

    Without ``trace_needed`` a row may lack ``trace_column``, and its problem lacks it then.
    """
    if dataset.repeat < 1:
        raise UserError(f"{where}.repeat={dataset.repeat} is no number of times to read it: set it to at least 1")
    columns = _Columns.of(dataset, where, trace_column, trace_needed)
    rows = _rows(dataset, columns)
    if not rows:
        raise UserError(f"{where}: {columns.source} is empty: give it at least one problem")
    problems = [problem for problem in map(columns.problem, rows) if problem.text.strip()]
    skipped = len(rows) - len(problems)
    if skipped:
        logger.warning(
            "%s: %d of the %d rows of %s have no text and are skipped", where, skipped, len(rows), columns.source
        )
    if not problems:
        raise UserError(
            f"{where}: no row of {columns.source} has any text in {columns.input_key}: check {where}.input_key"
        )
    return problems * dataset.repeat


@dataclass(frozen=True)
class _Columns:
    """Which columns of a dataset matter, and how a row becomes a problem."""

    source: str
    """The dataset's name in messages and in Problem.source."""
    where: str
    input_key: str
    output_key: str
    needs_answer: bool
    """The user (or the short name) says that there are answers: a row without one is an error."""
    answer_after: str
    trace_column: str | None
    trace_needed: bool

    @classmethod
    def of(cls, dataset: DatasetConfig, where: str, trace_column: str | None, trace_needed: bool) -> _Columns:
        """Keys that the user left out come from the short name's table; else they are "input" and "output"."""
        known = None if dataset.data_path else _known(dataset.dataset_name)
        source = dataset.data_path or (known.hub if known else dataset.dataset_name) or ""
        own_answer = known is not None and dataset.output_key in (None, known.output_key)
        return cls(
            source=source,
            where=where,
            input_key=dataset.input_key or (known.input_key if known else "input"),
            output_key=dataset.output_key or (known.output_key if known else "output"),
            needs_answer=dataset.output_key is not None or known is not None,
            answer_after=known.answer_after if known and own_answer else "",
            trace_column=trace_column,
            trace_needed=trace_needed,
        )

    def problem(self, row: Row) -> Problem:
        text = self._text(row, f"{self.where}.input_key", self.input_key)
        others = {k: v for k, v in row[1].items() if isinstance(v, str) and k not in (self.input_key, self.output_key)}
        if self.trace_column is not None and (self.trace_needed or _has(row[1], self.trace_column)):
            others[self.trace_column] = self._text(row, _TRACE_KEY, self.trace_column)
        return Problem(text, self._answer(row), self.source, others)

    def _text(self, row: Row, key: str, name: str) -> str:
        text = self._value(row, key, name)
        if not isinstance(text, str | None):
            raise self._wrong_type(row, key, name, text, "strings")
        return text or ""

    def _answer(self, row: Row) -> str:
        if not self.needs_answer and self.output_key not in row[1]:
            return ""
        key = f"{self.where}.output_key"
        answer = self._value(row, key, self.output_key)
        if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
            raise self._wrong_type(row, key, self.output_key, answer, "strings or numbers")
        text = "" if answer is None else str(answer)
        return text.rpartition(self.answer_after)[2].strip() if self.answer_after else text

    def _value(self, row: Row, key: str, name: str) -> Any:
        try:
            return _pick(row[1], name)
        except KeyError:
            raise self.missing(key, name, row[0], row[1]) from None

    def missing(self, key: str, name: str, place: str, there: Iterable[str]) -> UserError:
        columns = ", ".join(there) or "nothing"
        return UserError(
            f"{key}={name} is missing in {place} of {self.source}, which has {columns}: set {key} to one of these"
        )

    def _wrong_type(self, row: Row, key: str, name: str, found: Any, wanted: str) -> UserError:
        kind = type(found).__name__
        return UserError(
            f"{key}={name} is of type {kind} in {row[0]} of {self.source}: name a column of {wanted}"
        )

    def table_rows(self, table: Any) -> list[Row]:
        """The rows of an Arrow table, without the columns that no one asks for (long lists, images)."""
        from pyarrow import types

        wanted = [(f"{self.where}.input_key", self.input_key, True)]
        wanted.append((f"{self.where}.output_key", self.output_key, self.needs_answer))
        if self.trace_column is not None:
            wanted.append((_TRACE_KEY, self.trace_column, self.trace_needed))
        roots = []
        for key, name, needed in wanted:
            roots.append(name if name in table.column_names else name.split(".")[0])
            if roots[-1] not in table.column_names and needed:
                raise self.missing(key, name, "the table", table.column_names)
        kept = [
            field.name
            for field in table.schema
            if field.name in roots or types.is_string(field.type) or types.is_large_string(field.type)
        ]
        return [(f"row {i}", row) for i, row in enumerate(table.select(kept).to_pylist())]


def _pick(row: Mapping[str, Any], name: str) -> Any:
    """The column ``name``, or, where there is none, the value at a dotted path: ``prompt.0.content``."""
    if name in row:
        return row[name]
    found: Any = row
    for part in name.split("."):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            raise KeyError(name)
    return found


def _has(row: Mapping[str, Any], name: str) -> bool:
    try:
        _pick(row, name)
    except KeyError:
        return False
    return True


def _known(name: str | None) -> Known | None:
    for short, known in KNOWN.items():
        if name is not None and name.lower() in (short.lower(), known.hub.lower()):
            return known
    return None


def _rows(dataset: DatasetConfig, columns: _Columns) -> Sequence[Row]:
    """The rows of a file, a folder or a hub dataset; a path wins over a name."""
    where = columns.where
    if dataset.data_path:
        path = Path(dataset.data_path)
        if os.path.exists(path) or not _is_hub_name(dataset.data_path):
            return _path_rows(path, dataset, columns)
        return _hub_rows(dataset.data_path, (dataset.subset,), dataset.split or "train", columns, "data_path")
    if not dataset.dataset_name:
        raise UserError(f"{where} names no dataset: set {where}.data_path or {where}.dataset_name")
    known = _known(dataset.dataset_name)
    if known is not None:
        subsets = (dataset.subset,) if dataset.subset else known.subsets
        return _hub_rows(known.hub, subsets, dataset.split or known.split, columns, "dataset_name")
    if not _is_hub_name(dataset.dataset_name):
        raise UserError(
            f"{where}.dataset_name={dataset.dataset_name} is not among the known names ({', '.join(KNOWN)}): "
            f"write it as the hub does, owner/name, or set {where}.data_path to a file"
        )
    return _hub_rows(dataset.dataset_name, (dataset.subset,), dataset.split or "train", columns, "dataset_name")


def _is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and Path(name).suffix not in _FILE_KINDS


_FILE_KINDS = (".jsonl", ".json", ".parquet")


def _path_rows(path: Path, dataset: DatasetConfig, columns: _Columns) -> Sequence[Row]:
    key = f"{columns.where}.data_path={path}"
    if not os.path.exists(path):
        raise UserError(f"{key} does not exist (looked in {Path.cwd()}): correct the path")
    if path.is_dir():
        return _folder_rows(path, dataset, columns)
    if not path.is_file():  # a pipe, say, whose reader waits for ever
        raise UserError(f"{key} is neither a file nor a folder: write the problems into a file")
    if path.suffix not in _FILE_KINDS:
        raise UserError(f"{key} is of no kind that can be read: use one of {', '.join(_FILE_KINDS)}")
    try:
        rows = _parquet(path, columns) if path.suffix == ".parquet" else _json_rows(path, key)
    except OSError as error:
        raise UserError(f"{key} can't be read ({reason(error)}): correct its permissions or the path") from None
    return _slice(rows, dataset.split, columns.where)


def _slice(rows: Sequence[Row], split: str | None, where: str) -> Sequence[Row]:
    """A file is one split, "train"; a slice such as ``train[:10%]`` takes part of it."""
    if split is None or split == "train":
        return rows
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    except (ValueError, AssertionError):
        raise UserError(
            f"{where}.split={split} does not fit a file, which is one split: use null, train or a slice, train[:90%]"
        ) from None
    return [row for part in parts for row in rows[slice(part.from_, part.to)]]


def _json_rows(path: Path, key: str) -> Sequence[Row]:
    """A JSON object a line; a .json file may hold one list of objects instead."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".json" and data.lstrip().startswith(b"["):
        return [(f"entry {i}", _object(row, f"entry {i}", key)) for i, row in enumerate(_parsed(data, "the list", key))]
    lines = ((f"line {number}", line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip())
    return [(place, _object(_parsed(line, place, key), place, key)) for place, line in lines]


def _parsed(data: bytes, place: str, key: str) -> Any:
    """The value in ``data``; a line that was cut, or that is no UTF-8, would be a problem lost: it is refused."""
    try:
        value = json.loads(data)
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is a string, but no text
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key} is malformed in {place} ({reason(error)}): write one JSON object a line") from None
    return value


def _object(value: Any, place: str, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            f"{key} has {show(value)} in {place}, where an object was to be: write one JSON object a line"
        )
    return value


def _parquet(path: Path, columns: _Columns) -> Sequence[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return columns.table_rows(pq.read_table(path))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        key = f"{columns.where}.data_path={path}"
        raise UserError(f"{key} is not a readable Parquet file ({reason(error)}): write it again") from None


def _folder_rows(path: Path, dataset: DatasetConfig, columns: _Columns) -> Sequence[Row]:
    """A folder that ``save_to_disk`` wrote, or one of data files as the hub has them."""
    split = dataset.split or "train"
    if not any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        return _hub_rows(str(path), (dataset.subset,), split, columns, "data_path")
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # whatever the library's readers meet in a damaged folder
        key = f"{columns.where}.data_path={path}"
        raise UserError(f"{key} is no folder that save_to_disk wrote whole ({reason(error)}): write it again") from None
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            where = columns.where
            raise UserError(f"{where}.split={split} is not in {path}: set {where}.split to one of {', '.join(loaded)}")
        loaded = loaded[split]
    return columns.table_rows(loaded.with_format("arrow")[:])


def _hub_rows(name: str, subsets: Sequence[str | None], split: str, columns: _Columns, key: str) -> Sequence[Row]:
    from datasets import load_dataset

    try:
        parts = [load_dataset(name, subset, split=split) for subset in subsets]
    except Exception as error:  # the library's dozen kinds, and those of every format's reader
        raise UserError(
            f"{columns.where}.{key}={name} with split {split} can't be loaded ({reason(error)}): "
            "check name, subset and split, or fetch it once where the hub can be reached"
        ) from None
    return [row for part in parts for row in columns.table_rows(part.with_format("arrow")[:])]
