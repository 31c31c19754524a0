"""Store problems in Arrow tables, and access them as a sequence that creates each Problem on access."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from distill.data.cache import open_table
from distill.data.columns import Columns, Row
from distill.errors import UserError
from distill.types import Problem

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 1024
_BATCH_CHARACTERS = 2**20


@dataclass(frozen=True)
class Source:
    """A source of rows: a data file, or a dataset that the ``datasets`` library has loaded."""

    origin: str
    """Name of the source in messages: a path or a dataset name."""
    size: int
    """Size of the source in bytes."""
    identity: Callable[[], Any]
    """Function that returns a JSON value for the cache key; the value changes whenever the rows change."""
    rows: Callable[[], Iterator[Row]]
    """Function that yields (location, row) for each row."""


@dataclass(frozen=True)
class ProblemTable:
    """All rows of one split of a dataset, including rows without a problem text."""

    columns: Columns
    """Columns that were read from the dataset."""
    origins: Sequence[str]
    """Names of the sources of the rows; the table's column "origin" contains indices into this list."""
    table: pa.Table
    """Arrow table of the problem texts, gold answers, extra columns and locations in the sources."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def problem(self, row: int) -> Problem:
        """Return the problem in row ``row`` of the table; the row must have a problem text."""
        text, answer, *extra = (self.table.column(i)[row].as_py() for i in range(2 + len(self.columns.extra)))
        named = zip(self.columns.extra, extra, strict=True)
        given = {column.name: value for column, value in named if value is not None}
        return Problem(text, answer or "", self.columns.source, given)

    def location(self, row: int) -> str:
        """Return the location of row ``row`` of the table for messages, such as "line 3 of FILE"."""
        origin = self.origins[self.table.column("origin")[row].as_py()]
        return f"{self.table.column('place')[row].as_py()} of {origin}"

    def with_text(self, start: int, stop: int) -> Sequence[int]:
        """Return the numbers of all rows in [start, stop) that have a problem text."""
        texts = self.table.column("text").slice(start, stop - start)
        if texts.null_count == 0:
            return range(start, stop)
        return _rows_where(texts, start, lambda column: column.is_valid())

    def without_match(self, rows: Sequence[int]) -> list[int]:
        """Return those row numbers in ``rows`` whose gold answer the regex output_pattern does not match."""
        answers = self.table.column("answer")
        if answers.null_count == 0:
            return []
        unmatched = set(_rows_where(answers, 0, lambda column: column.is_null()))
        return [row for row in rows if row in unmatched]


def _rows_where(column: pa.ChunkedArray, start: int, holds: Callable[[Any], Any]) -> array[int]:
    import pyarrow.compute as pc

    return array("q", (start + row for row in pc.indices_nonzero(holds(column)).to_pylist()))


def read_table(sources: Sequence[Source], columns: Columns) -> ProblemTable:
    """Return a table with the used columns of all rows of ``sources``.

    Large tables are stored in a cache file (see open_table). Raises UserError for a malformed row, and for a file that
    changes while it is read.
    """
    identities = [source.identity() for source in sources]
    main = [columns.input_key, columns.output_key, columns.answer_required, columns.output_pattern]
    extra = [[column.name, column.required] for column in columns.extra]
    table = open_table(
        [main, extra, identities],
        sum(source.size for source in sources),
        _schema(columns),
        lambda: _batches(sources, identities, columns),
    )
    return ProblemTable(columns, [source.origin for source in sources], table)


def _schema(columns: Columns) -> pa.Schema:
    import pyarrow as pa

    extra = [(f"column {i}", pa.string()) for i in range(len(columns.extra))]
    location = [("place", pa.string()), ("origin", pa.int32())]
    return pa.schema([("text", pa.string()), ("answer", pa.string()), *extra, *location])


def _batches(sources: Sequence[Source], identities: Sequence[Any], columns: Columns) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    schema = _schema(columns)
    rows: list[tuple[Any, ...]] = []
    characters = 0
    for i, source in enumerate(sources):
        for row in source.rows():
            values = columns.project(row, source.origin)
            rows.append((*values, row[0], i))
            characters += sum(len(value) for value in values if value)
            if len(rows) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
                yield pa.record_batch(list(zip(*rows, strict=True)), schema=schema)
                rows, characters = [], 0
        if source.identity() != identities[i]:
            problem = f"{columns.key}: {source.origin} changed while it was read"
            raise UserError(problem, "start the run again after the file is complete", key=columns.key)
    if rows:
        yield pa.record_batch(list(zip(*rows, strict=True)), schema=schema)


class Problems(Sequence[Problem]):
    """Sequence of the problems in selected rows of ``tables``. A Problem is created on access.

    ``rows``: numbers of the selected rows, counted from 0 through all ``tables``.
    """

    def __init__(self, tables: Sequence[ProblemTable], rows: Sequence[int]) -> None:
        self._tables = tables
        self._starts = [0]
        for table in tables:
            self._starts.append(self._starts[-1] + len(table))
        self._rows = rows

    @classmethod
    def joined(cls, parts: Sequence[Problems]) -> Problems:
        """Return the problems of all ``parts``, one part after the other."""
        if len(parts) == 1:
            return parts[0]
        rows, start = array("q"), 0
        for part in parts:
            rows.extend(start + row for row in part._rows)
            start += part._starts[-1]
        return cls([table for part in parts for table in part._tables], rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> Problem: ...
    @overload
    def __getitem__(self, at: slice) -> Problems: ...
    def __getitem__(self, at: int | slice) -> Problem | Problems:
        if isinstance(at, slice):
            return Problems(self._tables, self._rows[at])
        row = self._rows[at]
        i = bisect_right(self._starts, row) - 1
        return self._tables[i].problem(row - self._starts[i])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def select(self, positions: Sequence[int]) -> Problems:
        """Return the problems at the indices ``positions`` of this sequence, in the order of ``positions``."""
        return Problems(self._tables, array("q", (self._rows[i] for i in positions)))

    def repeated(self, times: int) -> Problems:
        """Return ``times`` copies of the problems, one after the other; all copies share the tables."""
        return self if times == 1 else Problems(self._tables, array("q", self._rows) * times)
