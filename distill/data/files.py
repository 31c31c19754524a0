"""Rows of JSON, CSV and Parquet files, read as a stream: a file's rows are never in memory together.

Every reader yields (place, row) pairs and raises UserError that names the configuration key, the file, the place in it
and the cause.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from distill.data.columns import Columns, Row, WrittenFloat
from distill.errors import UserError, reason, show

KINDS = (".jsonl", ".json", ".parquet", ".ndjson", ".csv", ".tsv")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_BOM = codecs.BOM_UTF8
_CHUNK = 2**20
_BATCH = 1000
"""Rows of a Parquet file decoded at a time."""


def kind_of(path: PurePath) -> tuple[str, str]:
    """A file's kind and its compression, by its name: (".jsonl", ".gz"); "" for none or an unknown one."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    kind = suffixes[-1] if suffixes else ""
    return (kind if kind in KINDS else ""), compression


@dataclass(frozen=True)
class DataFile:
    """A file to be read, and the columns that are read of it."""

    path: Path
    """Its kind is one of KINDS."""
    columns: Columns

    @property
    def key(self) -> str:
        """How a message about the file begins."""
        return f"{self.columns.where}.data_path={self.path}"


def read_rows(file: DataFile) -> Iterator[Row]:
    """The rows of one file."""
    kind, compression = kind_of(file.path)
    try:
        with _opened(file.path, compression, seekable=kind == ".parquet") as stream:
            yield from _READERS[kind](stream, file)
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise _undecodable(file.key, compression, error) from None
    except OSError as error:
        if compression and error.errno is None:  # bz2 and zstd have no exceptions of their own
            raise _undecodable(file.key, compression, error) from None
        raise UserError(f"{file.key} can't be read ({reason(error)}): correct its permissions or the path") from None


def _undecodable(key: str, compression: str, error: Exception) -> UserError:
    return UserError(f"{key} is not a complete {compression} file ({reason(error)}): compress it again")


@contextmanager
def _opened(path: Path, compression: str, seekable: bool) -> Iterator[BinaryIO]:
    """The file's decompressed bytes; a compressed file that has to be seekable is decompressed to a temporary file."""
    with _decompressed(path, compression) as stream:
        if not (seekable and compression):
            yield stream
            return
        with tempfile.TemporaryFile() as plain:
            shutil.copyfileobj(stream, plain, _CHUNK)
            plain.seek(0)
            yield plain


def _decompressed(path: Path, compression: str) -> Any:
    if compression == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd", buffer_size=_CHUNK))
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(compression, open)(path, "rb")


def _lines(stream: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Numbered lines from 1, without a byte order mark."""
    for number, line in enumerate(stream, start=1):
        yield number, line.removeprefix(_BOM) if number == 1 else line


def _json_lines(stream: Iterable[bytes], file: DataFile) -> Iterator[Row]:
    """A JSON object a line."""
    for number, line in _lines(stream):
        if line.strip():
            yield _json_line(f"line {number}", line, file)


def _json_line(place: str, line: bytes, file: DataFile) -> Row:
    try:
        row = json.loads(line)
        if isinstance(row, dict) and file.columns.answer_is_float(row):
            row = json.loads(line, parse_float=WrittenFloat)
    except (ValueError, RecursionError) as error:
        form = "one list of JSON objects, or one object a line" if _is_json(file) else "one JSON object a line"
        if b"\0" in line:  # UTF-16 or UTF-32
            form = f"it as UTF-8 text with {form}"
        raise UserError(f"{file.key} is malformed in {place} ({reason(error)}): write {form}") from None
    if not isinstance(row, dict):
        raise UserError(
            f"{file.key} has {show(row)} in {place}, where an object is needed: write one JSON object a line"
        )
    return place, row


def _is_json(file: DataFile) -> bool:
    return kind_of(file.path)[0] == ".json"


def _json(stream: BinaryIO, file: DataFile) -> Iterator[Row]:
    """One list of JSON objects, or a JSON object a line."""
    head = stream.read(_CHUNK).removeprefix(_BOM)
    if head.lstrip().startswith(b"["):
        yield from _JsonList(stream, head, file).rows()
    else:
        yield from _json_lines(chain(io.BytesIO(head + stream.readline()), stream), file)


class _JsonList:
    """A list of JSON objects that is decoded one entry at a time."""

    def __init__(self, stream: BinaryIO, head: bytes, file: DataFile) -> None:
        self._stream, self._file = stream, file
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._pending = head
        self._text, self._at, self._line = "", 0, 1
        self._entry = 0
        self._ended = False

    def rows(self) -> Iterator[Row]:
        """The entries; the list must be closed, and nothing may follow it."""
        self._next_character()
        self._at += 1  # the opening bracket
        if self._next_character() != "]":
            while True:
                yield self._row()
                separator = self._next_character()
                if separator == "]":
                    break
                if separator != ",":
                    raise self._malformed("',' or ']' expected" if separator else "the list is not closed")
                self._at += 1
                self._entry += 1
        self._at += 1
        if self._next_character():
            raise self._malformed("there is more after the list")

    def _row(self) -> Row:
        place = f"entry {self._entry}"
        if self._next_character() != "{":
            value = self._text[self._at : self._at + 20].split(",")[0].split("]")[0].strip()
            raise UserError(
                f"{self._file.key} has {value or 'nothing'} in {place}, line {self._line}, where an object is needed:"
                " write one list of JSON objects, or one object a line"
            )
        row, end = self._decoded(json.JSONDecoder())
        if self._file.columns.answer_is_float(row):
            row, end = self._decoded(json.JSONDecoder(parse_float=WrittenFloat))
        self._line += self._text.count("\n", self._at, end)
        self._at = end
        return place, row

    def _decoded(self, decoder: json.JSONDecoder) -> tuple[dict[str, Any], int]:
        """The object at the current position and its end; reads on while it is incomplete, twice as far each time."""
        while True:
            try:
                return decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended:
                    self._line += self._text.count("\n", self._at, error.pos)
                    raise self._malformed(error.msg) from None
                self._read(max(_CHUNK, len(self._text) - self._at))
            except (ValueError, RecursionError) as error:
                raise self._malformed(reason(error)) from None

    def _next_character(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._line += self._text[self._at] == "\n"
                self._at += 1
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read(_CHUNK)

    def _read(self, size: int) -> None:
        data, self._pending = self._pending or self._stream.read(size), b""
        self._ended = not data
        try:
            self._text = self._text[self._at :] + self._decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise self._malformed(reason(error)) from None
        self._at = 0

    def _malformed(self, cause: str) -> UserError:
        return UserError(
            f"{self._file.key} is malformed in entry {self._entry}, line {self._line} ({cause}): write one list of JSON"
            " objects, or one object a line"
        )


def _csv(stream: BinaryIO, file: DataFile) -> Iterator[Row]:
    return _separated(stream, file, (",", ";", "\t", "|"))


def _tsv(stream: BinaryIO, file: DataFile) -> Iterator[Row]:
    return _separated(stream, file, ("\t",))


def _separated(stream: BinaryIO, file: DataFile, delimiters: tuple[str, ...]) -> Iterator[Row]:
    """A header and rows of as many fields; quoted fields may hold line breaks. All values are strings."""
    csv.field_size_limit(sys.maxsize)
    lines = _decoded_lines(stream, file)
    head: list[str] = []
    while not any(map(str.strip, head)) and (line := next(lines, "")):
        head.append(line)
    first = "".join(head[-1:])
    delimiter = next((d for d in delimiters if file.columns.input_key in _fields(first, d)), delimiters[0])
    reader = csv.reader(chain(head, lines), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        place = f"line {reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{file.key} is malformed in {place} ({reason(error)}): put fields with quotes, separators or line"
                ' breaks into quotes, and write a quote inside as ""'
            ) from None
        if not fields or not (header or any(map(str.strip, fields))):
            continue
        if not header:
            header = fields
            _check_header(header, file)
        elif len(fields) != len(header):
            raise UserError(
                f"{file.key} is malformed in {place} ({len(fields)} fields under a header of {len(header)}): give every"
                " row the header's fields, and put those with separators into quotes"
            )
        else:
            yield place, dict(zip(header, fields, strict=True))


def _decoded_lines(stream: BinaryIO, file: DataFile) -> Iterator[str]:
    """Lines that end with LF, CRLF or, as old Macintosh programs write them, CR."""
    ended_by_any = chain.from_iterable(line.splitlines(keepends=True) for line in stream)
    for number, line in _lines(ended_by_any):
        try:
            if b"\0" in line:
                raise ValueError("a NUL byte")
            yield line.decode()
        except ValueError as error:
            fault = f"is malformed in line {number} ({reason(error)})"
            raise UserError(f"{file.key} {fault}: write it as UTF-8 text") from None


def _fields(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line.rstrip("\r\n")], delimiter=delimiter), [])


def _check_header(header: list[str], file: DataFile) -> list[str]:
    """The columns to read; two of one name are refused, of which only one could be read."""
    used = file.columns.select(header, str(file.path))
    if twice := [name for name in used if header.count(name) > 1]:
        raise UserError(f"{file.key} has two columns {twice[0]} in its header: rename one of them")
    return used


def _parquet(stream: BinaryIO, file: DataFile) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(stream, buffer_size=_CHUNK) as table:
            names = _check_header(table.schema_arrow.names, file)
            yield from table_rows(table.iter_batches(_BATCH, columns=names, use_threads=False))
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{file.key} is not a readable Parquet file ({reason(error)}): write it again") from None


def table_rows(batches: Iterable[Any]) -> Iterator[Row]:
    """The rows of Arrow record batches or tables, numbered from 0."""
    number = 0
    for batch in batches:
        for row in _short_floats(batch).to_pylist():
            yield f"row {number}", row
            number += 1


def _short_floats(batch: Any) -> Any:
    """Narrow floats as their shortest texts: as a Python float, a float32 0.1 is 0.10000000149011612."""
    import pyarrow as pa

    for i, field in enumerate(batch.schema):
        if field.type in (pa.float16(), pa.float32()):
            batch = batch.set_column(i, field.name, batch.column(i).cast(pa.string()))
    return batch


_READERS: dict[str, Callable[[Any, DataFile], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _tsv,
}
