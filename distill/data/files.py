"""Read JSON, CSV and Parquet files row by row, so that a file is never completely in memory.

Every reader yields (location, row) pairs. For malformed content, a reader raises UserError with the configuration key,
the file, the location in the file and the cause.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os.path
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

from distill.data.columns import ArrowRow, Columns, Row, WrittenFloat, setting_error
from distill.errors import MissingError, UserError, reason, show

KINDS = (".jsonl", ".json", ".parquet", ".ndjson", ".csv", ".tsv")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_BOM = codecs.BOM_UTF8
_CHUNK = 2**20
_LIST_OR_LINES = "one list of JSON objects, or one object per line"
_BATCH = 1000
"""Number of rows of a Parquet file to decode in one batch."""


def kind_of(path: PurePath) -> tuple[str, str]:
    """Return the file type and the compression from the suffixes of ``path``, such as (".jsonl", ".gz").

    Each value is "" if its suffix is missing or unknown.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    kind = suffixes[-1] if suffixes else ""
    return (kind if kind in KINDS else ""), compression


def read_text(path: str, key: str) -> str:
    """Return the text of the UTF-8 file ``path``; raise UserError if it is missing or unreadable.

    A byte order mark is removed, because it would be part of every prompt.
    ``key``: the configuration key that contains ``path``, for messages.
    """
    if not os.path.isfile(path):  # reading a named pipe would block forever
        exists = os.path.exists(path)
        problem = f"{'is not a regular file' if exists else 'does not exist'} (working directory: {Path.cwd()})"
        raise setting_error(key, path, problem, "correct the path", UserError if exists else MissingError)
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise setting_error(key, path, f"is not a readable UTF-8 text file ({error})", "correct the file") from None


@dataclass(frozen=True)
class DataFile:
    """A data file and the columns to read from it."""

    path: Path
    """Path of the file. Its file type is one of KINDS (such as .jsonl); it may be compressed."""
    columns: Columns
    """Columns to read from the file."""

    def error(self, problem: str, fix: str, kind: type[UserError] = UserError) -> UserError:
        """Return an error of the type ``kind`` about this file: "KEY.data_path=PATH problem: fix"."""
        return setting_error(f"{self.columns.key}.data_path", str(self.path), problem, fix, kind)


def read_rows(file: DataFile) -> Iterator[Row]:
    """Yield (location, row) for each row; raise UserError if the file is unreadable or malformed."""
    kind, compression = kind_of(file.path)
    try:
        with _opened(file.path, compression, seekable=kind == ".parquet") as stream:
            yield from _READERS[kind](stream, file)
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise _undecodable(file, compression, error) from None
    except OSError as error:
        if compression and error.errno is None:  # bz2 and zstd report damage as a plain OSError
            raise _undecodable(file, compression, error) from None
        raise file.error(f"cannot be read ({reason(error)})", "correct the path or the file's permissions") from None


def _undecodable(file: DataFile, compression: str, error: Exception) -> UserError:
    return file.error(f"is an incomplete or damaged {compression} file ({reason(error)})", "compress the data again")


@contextmanager
def _opened(path: Path, compression: str, seekable: bool) -> Iterator[BinaryIO]:
    """Open a file as a stream of decompressed bytes.

    ``seekable``: whether the stream must support seeking; a compressed file is then decompressed to a temporary file.
    """
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
    """Yield (line number, line); numbers start at 1. A byte order mark before the first line is removed."""
    for number, line in enumerate(stream, start=1):
        yield number, line.removeprefix(_BOM) if number == 1 else line


def _json_lines(stream: Iterable[bytes], file: DataFile) -> Iterator[Row]:
    """Yield the rows of a file with one JSON object per line; blank lines are skipped."""
    for number, line in _lines(stream):
        if line.strip():
            yield _json_line(f"line {number}", line, file)


def _json_line(location: str, line: bytes, file: DataFile) -> Row:
    try:
        row = json.loads(line)
        if isinstance(row, dict) and file.columns.answer_is_float(row):
            row = json.loads(line, parse_float=WrittenFloat)
    except (ValueError, RecursionError) as error:
        form = _LIST_OR_LINES if kind_of(file.path)[0] == ".json" else "one JSON object per line"
        encoding = "UTF-8 text with " if b"\0" in line else ""  # NUL bytes: UTF-16 or UTF-32
        raise file.error(f"is malformed in {location} ({reason(error)})", f"write {encoding}{form}") from None
    if not isinstance(row, dict):
        raise file.error(f"has {show(row)} instead of a JSON object in {location}", "write one JSON object per line")
    return location, row


def _json(stream: BinaryIO, file: DataFile) -> Iterator[Row]:
    """Yield the rows of a file that contains one list of JSON objects, or one JSON object per line."""
    head = stream.read(_CHUNK).removeprefix(_BOM)
    if head.lstrip().startswith(b"["):
        yield from _JsonList(stream, head, file).rows()
    else:
        yield from _json_lines(chain(io.BytesIO(head + stream.readline()), stream), file)


class _JsonList:
    """Decoder of a file that contains a list of JSON objects; it reads the file in chunks."""

    def __init__(self, stream: BinaryIO, head: bytes, file: DataFile) -> None:
        self._stream, self._file = stream, file
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._pending = head
        self._text, self._at, self._line = "", 0, 1
        self._entry = 0
        self._ended = False

    def rows(self) -> Iterator[Row]:
        """Yield (location, entry) for each entry of the list; raise UserError if the file is malformed."""
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
            raise self._malformed("text after the end of the list")

    def _row(self) -> Row:
        location = f"entry {self._entry}"
        if self._next_character() != "{":
            value = self._text[self._at : self._at + 20].split(",")[0].split("]")[0].strip()
            problem = f"has {value or 'nothing'} instead of a JSON object in {location}, line {self._line}"
            raise self._file.error(problem, f"write {_LIST_OR_LINES}")
        row, end = self._decoded(json.JSONDecoder())
        if self._file.columns.answer_is_float(row):
            row, end = self._decoded(json.JSONDecoder(parse_float=WrittenFloat))
        self._line += self._text.count("\n", self._at, end)
        self._at = end
        return location, row

    def _decoded(self, decoder: json.JSONDecoder) -> tuple[dict[str, Any], int]:
        """Decode the JSON object at the current position; return the object and the position after it.

        While the object is incomplete, more text is read and the decoding starts again. Each read at least doubles the
        text in memory, so the total time is linear in the size of the object.
        """
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
        """Skip white space and return the next character without consuming it; "" at the end of the file."""
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
        location = f"entry {self._entry}, line {self._line}"
        return self._file.error(f"is malformed in {location} ({cause})", f"write {_LIST_OR_LINES}")


def _csv(stream: BinaryIO, file: DataFile) -> Iterator[Row]:
    return _separated(stream, file, (",", ";", "\t", "|"))


def _tsv(stream: BinaryIO, file: DataFile) -> Iterator[Row]:
    return _separated(stream, file, ("\t",))


def _separated(stream: BinaryIO, file: DataFile, delimiters: tuple[str, ...]) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file with a header line.

    All values are strings; quoted fields may contain line breaks. ``delimiters`` are tried in order, until one
    splits the header into names that include ``input_key``, the column of the problem text. If no delimiter does, the
    first one is used.
    """
    lines = _decoded_lines(stream, file)
    head: list[str] = []
    while not any(map(str.strip, head)) and (line := next(lines, "")):
        head.append(line)
    first = "".join(head[-1:])
    delimiter = next((d for d in delimiters if file.columns.input_key in _fields(first, d)), delimiters[0])
    header: list[str] = []
    for location, fields in _csv_records(chain(head, lines), delimiter, file):
        if not fields or not (header or any(map(str.strip, fields))):
            continue  # skip empty lines, and blank lines before the header
        if not header:
            header = fields
            _check_header(header, file)
        elif len(fields) != len(header):
            raise file.error(
                f"is malformed in {location} (number of fields: {len(fields)}, in the header: {len(header)})",
                "write the same number of fields in every row, and quote fields that contain separators",
            )
        else:
            yield location, dict(zip(header, fields, strict=True))


def _csv_records(lines: Iterable[str], delimiter: str, file: DataFile) -> Iterator[tuple[str, list[str]]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        location = f"line {reader.line_num + 1}"
        try:
            yield location, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise file.error(
                f"is malformed in {location} ({reason(error)})",
                'quote fields that contain quotes, separators or line breaks, and write a quote inside a field as ""',
            ) from None


def _decoded_lines(stream: BinaryIO, file: DataFile) -> Iterator[str]:
    """Yield the lines of a UTF-8 file; a line may end with LF, CRLF or CR (old Macintosh files)."""
    ended_by_any = chain.from_iterable(line.splitlines(keepends=True) for line in stream)
    for number, line in _lines(ended_by_any):
        try:
            if b"\0" in line:
                raise ValueError("the line contains a NUL byte")
            yield line.decode()
        except ValueError as error:
            raise file.error(f"is malformed in line {number} ({reason(error)})", "write it as UTF-8 text") from None


def _fields(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line.rstrip("\r\n")], delimiter=delimiter), [])


def _check_header(header: list[str], file: DataFile) -> list[str]:
    """Return the names of the columns to read; raise UserError if ``header`` lacks or repeats one of them."""
    used = file.columns.select(header, str(file.path))
    if repeated := [name for name in used if header.count(name) > 1]:
        raise file.error(f"has several columns named {repeated[0]}", "rename all of these columns but one")
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
        raise file.error(f"is not a readable Parquet file ({reason(error)})", "create the file again") from None


def table_rows(batches: Iterable[Any]) -> Iterator[Row]:
    """Yield (location, row) for each row of Arrow record batches or tables; rows are numbered from 0."""
    number = 0
    for batch in batches:
        for row in _short_floats(batch).to_pylist():
            yield f"row {number}", ArrowRow(row)
            number += 1


def _short_floats(batch: Any) -> Any:
    """Return the batch with float16 and float32 columns converted to text.

    As a Python float, the float32 value 0.1 would become 0.10000000149011612.
    """
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
