"""Load problems from JSON, CSV and Parquet files, folders and datasets of the Hugging Face hub.

Files are read row by row, and only the columns that the run uses are kept. If the kept values exceed a few MiB, they
are stored in a memory-mapped file (see cache.py), which all ranks of a node share.
"""

from __future__ import annotations

import logging
import os.path
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.data.columns import Columns, Row, TextColumn, setting_error, without_used
from distill.data.files import COMPRESSIONS, KINDS, DataFile, kind_of, read_rows, table_rows
from distill.data.folders import split_files
from distill.data.grading import THINK_TAGS
from distill.data.row_checks import check_rows, log_golds
from distill.data.table import Problems, ProblemTable, Source, read_table
from distill.errors import MissingError, NotCachedError, UserError, reason
from distill.hub import cause_and_fix, is_hub_name, is_missing

if TYPE_CHECKING:
    from distill.config import DatasetConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KnownDataset:
    """A built-in dataset: a dataset on the Hugging Face hub, with defaults for its configuration keys."""

    hub: str
    """Name of the dataset on the Hugging Face hub (owner/name)."""
    input_key: str
    """Default of the configuration key input_key: the column with the problem text."""
    output_key: str
    """Default of the configuration key output_key: the column with the gold answer."""
    subsets: tuple[str | None, ...] = (None,)
    """Subsets to load and concatenate if the recipe sets no subset; None: the hub's default subset."""
    split: str = "train"
    """Default of the configuration key split: the split to load."""
    output_pattern: str | None = None
    """Default of the configuration key output_pattern: a regular expression to extract the gold answer.

    It is not used if the recipe sets another output_key. None: the gold answer is the complete value of its column.
    """


@dataclass(frozen=True)
class HubDataset:
    """Parts of a dataset that a run loads with the ``datasets`` library."""

    key: str
    """Configuration key that selects the dataset: data.train.data_path or data.train.dataset_name, for example."""
    name: str
    """Name of the dataset on the hub (owner/name), or a folder that the library reads."""
    subsets: tuple[str | None, ...]
    """Subsets to load and concatenate; None: the hub's default subset."""
    split: str
    """Split to load, such as train or train[:90%]."""


KNOWN_DATASETS = {
    "DeepScaler": KnownDataset("agentica-org/DeepScaleR-Preview-Dataset", "problem", "answer"),
    "AIME2024": KnownDataset("HuggingFaceH4/aime_2024", "problem", "answer"),
    "AIME2025": KnownDataset("opencompass/AIME2025", "question", "answer", ("AIME2025-I", "AIME2025-II"), "test"),
    "AIME2026": KnownDataset("MathArena/aime_2026", "problem", "answer"),
    "MATH500": KnownDataset("HuggingFaceH4/MATH-500", "problem", "answer", split="test"),
    "GSM8K": KnownDataset("openai/gsm8k", "question", "answer", ("main",), output_pattern="####"),
    "OpenMathInstruct-2": KnownDataset("nvidia/OpenMathInstruct-2", "problem", "expected_answer", split="train_1M"),
    "OpenR1-Math-220k": KnownDataset("open-r1/OpenR1-Math-220k", "problem", "answer", ("default",)),
    "DAPOMath17K": KnownDataset("BytedTsinghua-SIA/DAPO-Math-17k", "prompt.0.content", "reward_model.ground_truth"),
}
"""Maps short names to built-in datasets; short names and columns are the same as in NeMo-RL."""


_TRACE_KEY = "distillation.context_distillation.static_trace.answer_column"


def keyed(datasets: Sequence[DatasetConfig], key: str) -> Iterator[tuple[str, DatasetConfig]]:
    """Yield (configuration key, dataset) for each dataset.

    With ``key`` "data.train", the key is "data.train" for a single dataset, and "data.train.0", "data.train.1", ... for
    several datasets. Raises UserError if ``datasets`` is empty.
    """
    if not datasets:
        raise _no_dataset(key)
    for i, dataset in enumerate(datasets):
        yield (key if len(datasets) == 1 else f"{key}.{i}"), dataset


def _no_dataset(key: str) -> UserError:
    return UserError(f"{key} does not select a dataset", f"set {key}.data_path or {key}.dataset_name", key=key)


def load_problems(
    dataset: DatasetConfig,
    key: str,
    trace_column: str | None = None,
    trace_required: bool = True,
    extra: Sequence[TextColumn] = (),
    reference: TextColumn | None = None,
    think_tags: tuple[str, str] = THINK_TAGS,
) -> Problems:
    """Load the problems of one dataset, concatenated ``dataset.repeat`` times.

    ``key``: the dataset's configuration key, for messages. ``trace_column``: the column of the traces (texts with
    reasoning for the teacher), to store in Problem.columns; a null value is stored as "". None: no such column.
    ``extra``: other columns for Problem.columns, such as those in the teacher's template. ``trace_required``: whether
    each row must have the trace column and the columns ``extra``. ``reference``: the column for Problem.reference;
    see Columns.reference. ``think_tags``: the tags of a think block. Raises UserError for a missing file, an empty
    dataset, a missing column, a value of the wrong type, a malformed line or conversation, or if the Hugging Face hub
    cannot be reached.
    """
    if dataset.repeat < 1:
        repeat = dataset.repeat
        raise UserError(
            f"{key}.repeat={repeat} is less than 1", "set it to at least 1", key=f"{key}.repeat", value=repeat
        )
    trace = () if trace_column is None else (TextColumn(trace_column, _TRACE_KEY, trace_required),)
    others = (
        replace(column, required=trace_required and column.required) for column in extra if column.name != trace_column
    )
    columns = without_used(replace(_columns(dataset, key, (*trace, *others), reference), think_tags=think_tags))
    slices = _tables(dataset, columns)
    rows = sum(stop - start for _, start, stop in slices)
    source = columns.source
    if not rows:
        fix = f"add at least one problem, or select other rows with {key}.split"
        raise UserError(f"{key}: {source} is empty", fix, key=key)
    found = [(table, table.with_text(start, stop)) for table, start, stop in slices]
    skipped = rows - sum(len(kept) for _, kept in found)
    if skipped == rows:
        raise setting_error(
            *(f"{key}.input_key", columns.input_key),
            f"has no text in any row of {source}",
            f"set {key}.input_key to the column of the problem texts",
        )
    if skipped:
        log.warning("%s: %d of %d rows of %s have no problem text and are skipped", key, skipped, rows, source)
    check_rows(found, columns)
    log_golds(found, columns, dataset.env_name)
    return Problems.joined([Problems([table], kept) for table, kept in found]).repeated(dataset.repeat)


def _columns(dataset: DatasetConfig, key: str, extra: tuple[TextColumn, ...], reference: TextColumn | None) -> Columns:
    """Return the columns to read from ``dataset``.

    ``extra``, ``reference``: columns to read in addition to problem and gold answer. If the recipe does not set
    input_key or output_key, the default of the built-in dataset is used. For other datasets, the defaults are "input"
    and "output".
    """
    known = None if dataset.data_path else _known(dataset.dataset_name)
    pattern = dataset.output_pattern
    if pattern is None and known is not None and dataset.output_key in (None, known.output_key):
        pattern = known.output_pattern
    return Columns(
        source=dataset.data_path or (known.hub if known else dataset.dataset_name) or "",
        key=key,
        input_key=dataset.input_key or (known.input_key if known else "input"),
        output_key=dataset.output_key or (known.output_key if known else "output"),
        answer_required=dataset.output_key is not None or known is not None,
        output_pattern=pattern,
        extra=extra,
        tools_key=dataset.tools_key,
        reference=reference,
    )


def _known(name: str | None) -> KnownDataset | None:
    for short, known in KNOWN_DATASETS.items():
        if name is not None and name.lower() in (short.lower(), known.hub.lower()):
            return known
    return None


Slice = tuple[ProblemTable, int, int]
"""(table, start, stop): the run uses the rows of the table with start <= row number < stop."""


def _tables(dataset: DatasetConfig, columns: Columns) -> Sequence[Slice]:
    """Read the dataset from a file, a folder or the Hugging Face hub.

    The configuration key data_path has priority over dataset_name.
    """
    if dataset.data_path:
        path = Path(dataset.data_path).expanduser()
        if os.path.exists(path) or not _is_hub_name(dataset.data_path):
            return _path_tables(path, dataset, columns)
    found = hub_dataset(dataset, columns.key)
    assert found is not None, "a path that is no hub name was handled above"
    return _hub_tables(found, columns)


def hub_dataset(dataset: DatasetConfig, key: str) -> HubDataset | None:
    """Return the parts of a dataset that a run loads from the hub; None if data_path is a file or folder.

    ``key``: the dataset's configuration key. Raises UserError if neither data_path nor dataset_name is set, or if
    dataset_name is neither the name of a built-in dataset nor a name on the hub.
    """
    split = dataset.split or "train"
    if path := dataset.data_path:
        is_local = os.path.exists(Path(path).expanduser()) or not _is_hub_name(path)
        return None if is_local else HubDataset(f"{key}.data_path", path, (dataset.subset,), split)
    name, name_key = dataset.dataset_name, f"{key}.dataset_name"
    if not name:
        raise _no_dataset(key)
    known = _known(name)
    if known is not None:
        subsets = (dataset.subset,) if dataset.subset else known.subsets
        return HubDataset(name_key, known.hub, subsets, dataset.split or known.split)
    if not _is_hub_name(name):
        raise setting_error(
            *(name_key, name),
            f"is neither a built-in dataset ({', '.join(KNOWN_DATASETS)}) nor a name on the Hugging Face hub"
            " (owner/name)",
            f"correct the name, or set {key}.data_path to a file",
        )
    return HubDataset(name_key, name, (dataset.subset,), split)


def _is_hub_name(name: str) -> bool:
    return is_hub_name(name) and not kind_of(Path(name))[0]


def _path_tables(path: Path, dataset: DatasetConfig, columns: Columns) -> Sequence[Slice]:
    file = DataFile(path, columns)
    if not os.path.exists(path):
        raise file.error(f"does not exist (working directory: {Path.cwd()})", "correct the path", MissingError)
    if path.is_dir():
        return _folder_tables(path, dataset, columns)
    if not path.is_file():  # reading a named pipe would block forever
        raise file.error("is neither a regular file nor a folder", "write the problems into a regular file")
    if not kind_of(path)[0]:
        raise file.error(
            "has an unknown file type",
            f"use one of {', '.join(KINDS)}, optionally compressed ({', '.join(COMPRESSIONS)})",
        )
    split = dataset.split or "train"
    return _sliced(split, {"train": [path]}, partial(_file_table, columns), columns, single_file=True)


def _file_table(columns: Columns, files: Sequence[Path]) -> ProblemTable:
    return read_table([_file_source(file, columns) for file in files], columns)


def _file_source(path: Path, columns: Columns) -> Source:
    identity = partial(_identity, path, f"{columns.key}.data_path", str(path))
    return Source(str(path), identity()[1], identity, partial(read_rows, DataFile(path, columns)))


def _identity(path: Path, key: str, value: str) -> list[Any]:
    """Return path, size, mtime, ctime and inode of a file, to detect a change of the file's content.

    ``key``, ``value``: the configuration key and value that select the file, for messages.
    """
    try:
        found = path.stat()
    except OSError as error:
        problem, fix = f"cannot be read ({reason(error)})", "correct its permissions or the path"
        raise setting_error(key, value, problem, fix) from None
    return [os.path.abspath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _sliced(
    spec: str,
    splits: Mapping[str, Any],
    table_of: Callable[[Any], ProblemTable],
    columns: Columns,
    single_file: bool = False,
) -> Sequence[Slice]:
    """Return the rows that the split ``spec`` selects, such as ``train[:90%]`` or ``train+test[:10]``.

    ``splits``: maps the name of each split to its data (files or a loaded dataset). ``table_of``: function that reads
    the data of one split as a table. ``single_file``: whether the data are one file, for messages.
    """
    key = f"{columns.key}.split"
    names = [part.partition("[")[0].strip() for part in spec.split("+")]
    if unknown := [name for name in names if name not in splits]:
        if single_file:
            problem = "is not possible for a single file, which has only the split train"
            raise setting_error(key, spec, problem, "set it to null, train or a slice such as train[:90%]")
        problem = f"selects the split {unknown[0]}, which does not exist in {columns.source}"
        raise setting_error(key, spec, problem, f"set {key} to one of {', '.join(splits)}")
    tables = {name: table_of(splits[name]) for name in dict.fromkeys(names)}
    if spec in tables:
        return [(tables[spec], 0, len(tables[spec]))]
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(spec).to_absolute({name: len(table) for name, table in tables.items()})
    except (ValueError, AssertionError):
        fix = f"write a slice such as {names[0]}[:90%] or {names[0]}[10:20]"
        raise setting_error(key, spec, "has an invalid slice", fix) from None
    taken = [(tables[part.splitname], slice(part.from_, part.to)) for part in parts]
    ends = [(table, *part.indices(len(table))[:2]) for table, part in taken]
    return [(table, start, max(start, stop)) for table, start, stop in ends]


def _folder_tables(path: Path, dataset: DatasetConfig, columns: Columns) -> Sequence[Slice]:
    """Read a folder that the ``datasets`` method ``save_to_disk`` wrote, or a folder of data files."""
    split = dataset.split or "train"
    if any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        return _saved_tables(path, split, columns)
    files = split_files(path, dataset.subset, f"{columns.key}.data_path")
    if files is None:
        return _hub_tables(HubDataset(f"{columns.key}.data_path", str(path), (dataset.subset,), split), columns)
    return _sliced(split, files, partial(_file_table, columns), columns)


def _saved_tables(path: Path, split: str, columns: Columns) -> Sequence[Slice]:
    from datasets import DatasetDict, load_from_disk

    key = f"{columns.key}.data_path"
    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # the library raises many kinds of exception for a damaged folder
        problem = f"is a damaged or incomplete folder of a dataset saved by save_to_disk ({reason(error)})"
        raise setting_error(key, str(path), problem, "save the dataset again with save_to_disk") from None
    name = split.partition("[")[0].strip()  # a Dataset without splits is used for any split name
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {name: loaded}
    return _sliced(split, splits, lambda part: _library_table(part, key, str(path), columns), columns)


def _hub_tables(found: HubDataset, columns: Columns) -> Sequence[Slice]:
    """Load a dataset, and return the complete table of each subset."""
    tables = [_library_table(part, found.key, found.name, columns) for part in load_subsets(found)]
    return [(table, 0, len(table)) for table in tables]


def load_subsets(found: HubDataset) -> list[Any]:
    """Load each subset with ``datasets.load_dataset``, from its cache or from the hub.

    Raises UserError if the dataset is not cached and the hub does not send it, or has no such subset or split.
    """
    if find_spec("datasets") is None:
        problem, fix = "needs the package datasets, which is not installed", "run pip install datasets"
        raise setting_error(found.key, found.name, problem, f"{fix}, or set data_path to a file", MissingError)
    from datasets import load_dataset

    try:
        return [load_dataset(found.name, subset, split=found.split) for subset in found.subsets]
    except Exception as error:  # the library and its readers raise many kinds of exception
        kind: type[UserError] = UserError
        if is_missing(error):
            cause, fix = cause_and_fix(error, found.name, "dataset")
            problem = f"(split {found.split}) is not in the cache {dataset_cache()}, and {cause}"
            kind = NotCachedError
        else:
            problem = f"cannot be loaded with split {found.split} ({reason(error)})"
            fix = "correct the name, the subset or the split"
        raise setting_error(found.key, found.name, problem, fix, kind) from None


def dataset_cache() -> str:
    """Return the folder in which the ``datasets`` library keeps datasets of the hub."""
    from datasets import config

    return str(config.HF_DATASETS_CACHE)


def cached_dataset(name: str) -> Path:
    """Return the folder in which the ``datasets`` library keeps the dataset ``name`` of the hub."""
    from datasets.naming import camelcase_to_snakecase

    owner, _, own = name.rpartition("/")
    return Path(dataset_cache(), f"{owner}___{camelcase_to_snakecase(own)}" if owner else camelcase_to_snakecase(own))


def _library_table(loaded: Any, key: str, value: str, columns: Columns) -> ProblemTable:
    """Read the table of a dataset that the ``datasets`` library has loaded.

    ``key``, ``value``: the configuration key and value that select the dataset, for messages.
    """
    import pyarrow as pa

    def rows() -> Iterator[Row]:
        used = loaded.select_columns(columns.select(loaded.column_names, columns.source))
        try:
            yield from table_rows(used.with_format("arrow").iter(1000))
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            problem = f"cannot be read ({reason(error)})"
            raise setting_error(key, value, problem, "save or download the dataset again") from None

    def identity() -> list[Any]:
        stored = [_identity(Path(file["filename"]), key, value) for file in loaded.cache_files]
        return ["datasets", loaded._fingerprint, len(loaded), stored]

    return read_table([Source(columns.source, loaded.data.nbytes, identity, rows)], columns)
