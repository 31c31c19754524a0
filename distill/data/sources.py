"""Problems from JSON, CSV and Parquet files, folders and hub datasets.

Each file is projected to the columns that the run uses, row by row, and the projected rows are joined. More than a few
MiB of them go into a memory-mapped file (see cache.py), so a rank's memory holds neither the data nor unused columns.
"""

from __future__ import annotations

import logging
import os.path
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.data.columns import Columns, Row, TextColumn
from distill.data.files import COMPRESSIONS, KINDS, DataFile, kind_of, read_rows, table_rows
from distill.data.folders import split_files
from distill.data.table import Problems, ProblemTable, Source, read_table
from distill.errors import UserError, reason

if TYPE_CHECKING:
    from distill.config import DatasetConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Known:
    """The hub dataset and the columns behind a short name."""

    hub: str
    input_key: str
    output_key: str
    subsets: tuple[str | None, ...] = (None,)
    """Read one after the other."""
    split: str = "train"
    output_pattern: str | None = None
    """The default of the dataset's output_pattern, as long as its output_key is this one."""


KNOWN = {
    "DeepScaler": Known("agentica-org/DeepScaleR-Preview-Dataset", "problem", "answer"),
    "AIME2024": Known("HuggingFaceH4/aime_2024", "problem", "answer"),
    "AIME2025": Known("opencompass/AIME2025", "question", "answer", ("AIME2025-I", "AIME2025-II"), "test"),
    "AIME2026": Known("MathArena/aime_2026", "problem", "answer"),
    "MATH500": Known("HuggingFaceH4/MATH-500", "problem", "answer", split="test"),
    "GSM8K": Known("openai/gsm8k", "question", "answer", ("main",), output_pattern="####"),
    "OpenMathInstruct-2": Known("nvidia/OpenMathInstruct-2", "problem", "expected_answer", split="train_1M"),
    "OpenR1-Math-220k": Known("open-r1/OpenR1-Math-220k", "problem", "answer", ("default",)),
    "DAPOMath17K": Known("BytedTsinghua-SIA/DAPO-Math-17k", "prompt.0.content", "reward_model.ground_truth"),
}
"""The reference system's short names, with its columns."""


_TRACE_KEY = "distillation.context_distillation.static_trace.answer_column"
_FILE = "file, which is one split"


def load_problems(
    datasets: Sequence[DatasetConfig],
    where: str = "data.train",
    trace_column: str | None = None,
    columns: Sequence[TextColumn] = (),
) -> Problems:
    """All problems of ``datasets``, one after the other, each dataset repeated as it asks.

    ``where`` is the configuration key in messages. Problem.columns holds ``trace_column`` and ``columns``, whose values
    are texts or null; null becomes "". Raises UserError for what the user can correct: a missing file, an empty
    dataset, a missing column, a malformed line, a column of the wrong type, a hub that can't be reached.
    """
    parts = keyed(datasets, where)
    return Problems.joined([load_dataset_problems(part, key, trace_column, columns=columns) for key, part in parts])


def keyed(datasets: Sequence[DatasetConfig], where: str) -> Iterator[tuple[str, DatasetConfig]]:
    """Each dataset with its key: "data.train" for a single one, "data.train[1]" for one of several."""
    if not datasets:
        raise UserError(f"{where} names no dataset: set {where}.data_path or {where}.dataset_name")
    for i, dataset in enumerate(datasets):
        yield (where if len(datasets) == 1 else f"{where}[{i}]"), dataset


def load_dataset_problems(
    dataset: DatasetConfig,
    where: str,
    trace_column: str | None = None,
    trace_needed: bool = True,
    columns: Sequence[TextColumn] = (),
) -> Problems:
    """The problems of one dataset, ``repeat`` times over: first all of them once, then all of them again.

    Without ``trace_needed`` a row may lack ``trace_column``, and its problem lacks it then.
    """
    if dataset.repeat < 1:
        raise UserError(f"{where}.repeat={dataset.repeat} is no number of times to read it: set it to at least 1")
    trace = () if trace_column is None else (TextColumn(trace_column, _TRACE_KEY, trace_needed),)
    used = _columns(dataset, where, (*trace, *columns))
    slices = _tables(dataset, used)
    rows = sum(stop - start for _, start, stop in slices)
    if not rows:
        raise UserError(f"{where}: {used.source} is empty: give it at least one problem")
    found = [(table, table.with_text(start, stop)) for table, start, stop in slices]
    skipped = rows - sum(len(kept) for _, kept in found)
    if skipped == rows:
        raise UserError(f"{where}: no row of {used.source} has any text in {used.input_key}: check {where}.input_key")
    if skipped:
        logger.warning("%s: %d of the %d rows of %s have no text and are skipped", where, skipped, rows, used.source)
    _check_matches(found, used)
    return Problems.joined([Problems([table], kept) for table, kept in found]).repeated(dataset.repeat)


def _columns(dataset: DatasetConfig, where: str, others: tuple[TextColumn, ...]) -> Columns:
    """Keys that the user left out come from the short name's table; else they are "input" and "output"."""
    known = None if dataset.data_path else _known(dataset.dataset_name)
    pattern = dataset.output_pattern
    if pattern is None and known is not None and dataset.output_key in (None, known.output_key):
        pattern = known.output_pattern
    return Columns(
        source=dataset.data_path or (known.hub if known else dataset.dataset_name) or "",
        where=where,
        input_key=dataset.input_key or (known.input_key if known else "input"),
        output_key=dataset.output_key or (known.output_key if known else "output"),
        needs_answer=dataset.output_key is not None or known is not None,
        output_pattern=pattern,
        others=others,
    )


def _check_matches(found: Sequence[tuple[ProblemTable, Sequence[int]]], used: Columns) -> None:
    """Refuse an output_pattern that no gold answer matches, and warn of those that don't match."""
    lacking = [(table, row) for table, kept in found for row in table.without_match(kept)]
    if not lacking:
        return
    table, row = lacking[0]
    pattern = f"{used.where}.output_pattern={used.output_pattern}"
    if not any(table.problem(row).answer for table, kept in found for row in kept):
        raise UserError(
            f"{pattern} matches no gold answer in {used.output_key} of {used.source} (the first is in"
            f" {table.place(row)}): correct it, or set it to null where the column holds nothing but the gold answer"
        )
    logger.warning(
        "%s does not match the gold answers of %d of %d problems, the first in %s: they have no gold answer now",
        *(pattern, len(lacking), sum(len(kept) for _, kept in found), table.place(row)),
    )


def _known(name: str | None) -> Known | None:
    for short, known in KNOWN.items():
        if name is not None and name.lower() in (short.lower(), known.hub.lower()):
            return known
    return None


Slice = tuple[ProblemTable, int, int]
"""Rows of a table, from the first to before the last."""


def _tables(dataset: DatasetConfig, columns: Columns) -> Sequence[Slice]:
    """The rows of a file, a folder or a hub dataset; a path wins over a name."""
    where = columns.where
    if dataset.data_path:
        path = Path(dataset.data_path).expanduser()
        if os.path.exists(path) or not _is_hub_name(dataset.data_path):
            return _path_tables(path, dataset, columns)
        return _hub_tables(dataset.data_path, (dataset.subset,), dataset.split or "train", columns, "data_path")
    if not dataset.dataset_name:
        raise UserError(f"{where} names no dataset: set {where}.data_path or {where}.dataset_name")
    known = _known(dataset.dataset_name)
    if known is not None:
        subsets = (dataset.subset,) if dataset.subset else known.subsets
        return _hub_tables(known.hub, subsets, dataset.split or known.split, columns, "dataset_name")
    if not _is_hub_name(dataset.dataset_name):
        raise UserError(
            f"{where}.dataset_name={dataset.dataset_name} is not among the known names ({', '.join(KNOWN)}): "
            f"write it as the hub does, owner/name, or set {where}.data_path to a file"
        )
    return _hub_tables(dataset.dataset_name, (dataset.subset,), dataset.split or "train", columns, "dataset_name")


def _is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not kind_of(Path(name))[0]


def _path_tables(path: Path, dataset: DatasetConfig, columns: Columns) -> Sequence[Slice]:
    key = f"{columns.where}.data_path={path}"
    if not os.path.exists(path):
        raise UserError(f"{key} does not exist (looked in {Path.cwd()}): correct the path")
    if path.is_dir():
        return _folder_tables(path, dataset, columns)
    if not path.is_file():  # a pipe, say, whose reader waits for ever
        raise UserError(f"{key} is neither a file nor a folder: write the problems into a file")
    if not kind_of(path)[0]:
        raise UserError(
            f"{key} is of no kind that can be read: use one of {', '.join(KINDS)}, also with {', '.join(COMPRESSIONS)}"
        )
    return _sliced(dataset.split or "train", {"train": [path]}, partial(_file_table, columns), columns, _FILE)


def _file_table(columns: Columns, files: Sequence[Path]) -> ProblemTable:
    return read_table([_file_source(file, columns) for file in files], columns)


def _file_source(path: Path, columns: Columns) -> Source:
    file = DataFile(path, columns)
    identity = partial(_identity, path, file.key)
    return Source(str(path), identity()[1], identity, partial(read_rows, file))


def _identity(path: Path, key: str) -> list[Any]:
    """The path, size, times and inode of a file, which change with its content."""
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{key} can't be read ({reason(error)}): correct its permissions or the path") from None
    return [os.path.abspath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _sliced(
    spec: str,
    splits: Mapping[str, Any],
    table_of: Callable[[Any], ProblemTable],
    columns: Columns,
    what: str = "",
) -> Sequence[Slice]:
    """The rows that a split's specification takes: ``train``, ``train[:90%]``, ``train+test[:10]``.

    ``table_of`` reads one of ``splits``; ``what``: a file, where there is only one.
    """
    names = [part.partition("[")[0].strip() for part in spec.split("+")]
    if unknown := [name for name in names if name not in splits]:
        if what:
            raise _wrong_slice(spec, what, columns.where)
        raise UserError(
            f"{columns.where}.split={spec} is not in {columns.source}, which has no {unknown[0]}: set"
            f" {columns.where}.split to one of {', '.join(splits)}"
        )
    tables = {name: table_of(splits[name]) for name in dict.fromkeys(names)}
    if spec in tables:
        return [(tables[spec], 0, len(tables[spec]))]
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(spec).to_absolute({name: len(table) for name, table in tables.items()})
    except (ValueError, AssertionError):
        raise _wrong_slice(spec, what or "split", columns.where) from None
    taken = [(tables[part.splitname], slice(part.from_, part.to)) for part in parts]
    ends = [(table, *part.indices(len(table))[:2]) for table, part in taken]
    return [(table, start, max(start, stop)) for table, start, stop in ends]


def _wrong_slice(spec: str, what: str, where: str) -> UserError:
    return UserError(f"{where}.split={spec} does not fit a {what}: use null, train or a slice, train[:90%]")


def _folder_tables(path: Path, dataset: DatasetConfig, columns: Columns) -> Sequence[Slice]:
    """A folder that ``save_to_disk`` wrote, or one of data files as the hub has them."""
    split = dataset.split or "train"
    if any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        return _saved_tables(path, split, columns)
    files = split_files(path, dataset.subset, f"{columns.where}.data_path={path}")
    if files is None:
        return _hub_tables(str(path), (dataset.subset,), split, columns, "data_path")
    return _sliced(split, files, partial(_file_table, columns), columns)


def _saved_tables(path: Path, split: str, columns: Columns) -> Sequence[Slice]:
    from datasets import DatasetDict, load_from_disk

    key = f"{columns.where}.data_path={path}"
    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # of many kinds, raised by the library's readers for a damaged folder
        raise UserError(f"{key} is not a complete folder of save_to_disk ({reason(error)}): write it again") from None
    name = split.partition("[")[0].strip()  # a single dataset is its own split, by any name
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {name: loaded}
    return _sliced(split, splits, lambda part: _library_table(part, key, columns), columns)


def _hub_tables(name: str, subsets: Sequence[str | None], split: str, columns: Columns, key: str) -> Sequence[Slice]:
    from datasets import load_dataset

    try:
        parts = [load_dataset(name, subset, split=split) for subset in subsets]
    except Exception as error:  # the library's dozen kinds, and those of every format's reader
        raise UserError(
            f"{columns.where}.{key}={name} with split {split} can't be loaded ({reason(error)}): "
            "check name, subset and split, or fetch it once where the hub can be reached"
        ) from None
    tables = [_library_table(part, f"{columns.where}.{key}={name}", columns) for part in parts]
    return [(table, 0, len(table)) for table in tables]


def _library_table(loaded: Any, key: str, columns: Columns) -> ProblemTable:
    """The table of a dataset of the ``datasets`` library, which has it memory-mapped."""
    import pyarrow as pa

    def rows() -> Iterator[Row]:
        used = loaded.select_columns(columns.select(loaded.column_names, columns.source))
        try:
            yield from table_rows(used.with_format("arrow").iter(1000))
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            raise UserError(f"{key} can't be read ({reason(error)}): write or fetch it again") from None

    def identity() -> list[Any]:
        stored = [_identity(Path(file["filename"]), key) for file in loaded.cache_files]
        return ["datasets", loaded._fingerprint, len(loaded), stored]

    return read_table([Source(columns.source, loaded.data.nbytes, identity, rows)], columns)
