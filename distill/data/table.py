"""Store problems in Arrow tables, and access them as a sequence that creates each Problem on access."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

from distill.data.cache import open_table
from distill.data.columns import FIXED, Columns, Row
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
    """Arrow table of the columns in FIXED, the extra columns and the locations in the sources."""
    system: str = ""
    """System message of the dataset, for Problem.system."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def problem(self, row: int) -> Problem:
        """Return the problem in row ``row`` of the table; the row must have a problem text."""
        values = [None if column is None else column[row].as_py() for column in self._used]
        text, answer, reference, messages, tools = values[: len(FIXED)]
        named = zip(self.columns.extra, values[len(FIXED) :], strict=True)
        given = {column.name: value for column, value in named if value is not None}
        source = self.columns.source
        return Problem(
            text or "", answer or "", source, given, reference or "", messages or "", tools or "", self.system
        )

    @cached_property
    def _used(self) -> list[pa.ChunkedArray | None]:
        """Return the columns of a problem; None for a column of nulls, which takes no time to read."""
        columns = [self.table.column(i) for i in range(len(FIXED) + len(self.columns.extra))]
        return [None if column.null_count == len(self) else column for column in columns]

    @property
    def has_conversations(self) -> bool:
        """Return whether a row of the table has messages or tools."""
        return any(self.table.column(name).null_count < len(self) for name in ("messages", "tools"))

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

    def null_rows(self, name: str, rows: Sequence[int]) -> list[int]:
        """Return those row numbers in ``rows`` whose column ``name`` of the table is null."""
        column = self.table.column(name)
        if column.null_count == 0:
            return []
        if column.null_count == len(self):
            return list(rows)
        null = set(_rows_where(column, 0, lambda found: found.is_null()))
        return [row for row in rows if row in null]

    def empty_rows(self, name: str, rows: Sequence[int]) -> list[int]:
        """Return those row numbers in ``rows`` whose column ``name`` of the table is an empty text."""
        import pyarrow.compute as pc

        empty = set(_rows_where(self.table.column(name), 0, lambda found: pc.equal(found, "").fill_null(False)))
        return [row for row in rows if row in empty] if empty else []

    def own_golds(self) -> int:
        """Return the number of rows whose conversation has both a reference and a gold answer."""
        import pyarrow.compute as pc

        reference, answer = (pc.fill_null(self.table.column(name), "") for name in ("reference", "answer"))
        both = pc.and_(pc.not_equal(reference, ""), pc.not_equal(answer, ""))
        return int(pc.sum(pc.and_(both, self.table.column("messages").is_valid())).as_py() or 0)

    def without_match(self, rows: Sequence[int]) -> list[int]:
        """Return those row numbers in ``rows`` whose gold answer the regex output_pattern does not match."""
        return self.null_rows("answer", rows)


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
    extra = [[column.name, column.required, column.kind] for column in columns.extra]
    reference = columns.reference and columns.reference.name
    table = open_table(
        [main, columns.tools_key, reference, columns.think_tags, extra, identities],
        sum(source.size for source in sources),
        _schema(columns),
        lambda: _batches(sources, identities, columns),
    )
    return ProblemTable(columns, [source.origin for source in sources], table)


def _schema(columns: Columns) -> pa.Schema:
    import pyarrow as pa

    extra = [(f"column {i}", pa.string()) for i in range(len(columns.extra))]
    location = [("place", pa.string()), ("origin", pa.int32())]
    return pa.schema([*((name, pa.string()) for name in FIXED), *extra, *location])


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

    def location(self, at: int) -> str:
        """Return the location of the problem at the index ``at`` for messages, such as "line 3 of FILE"."""
        i = bisect_right(self._starts, self._rows[at]) - 1
        return self._tables[i].location(self._rows[at] - self._starts[i])

    @property
    def has_conversations(self) -> bool:
        """Return whether a row of the tables has messages or tools."""
        return any(table.has_conversations for table in self._tables)

    def with_system(self, system: str | None) -> Problems:
        """Return the problems with ``system`` as Problem.system."""
        return Problems([replace(table, system=system) for table in self._tables], self._rows) if system else self

    def select(self, positions: Sequence[int]) -> Problems:
        """Return the problems at the indices ``positions`` of this sequence, in the order of ``positions``."""
        return Problems(self._tables, array("q", (self._rows[i] for i in positions)))

    def repeated(self, times: int) -> Problems:
        """Return ``times`` copies of the problems, one after the other; all copies share the tables."""
        return self if times == 1 else Problems(self._tables, array("q", self._rows) * times)
