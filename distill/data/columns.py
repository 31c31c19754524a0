"""Projection of a dataset's rows to the columns that a run uses: text, gold answer and trace."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from distill.errors import UserError, reason

Row = tuple[str, Mapping[str, Any]]
"""A row after its location in its file (for messages): ("line 3", {...})."""
Values = tuple[str | None, ...]
"""A projected row: text (None: blank), gold answer (None: output_pattern found none), then each extra column (None:
absent)."""


def setting_error(key: str, value: str, problem: str, fix: str) -> UserError:
    """Return an error about one setting; ``problem`` continues a sentence that begins with key and value."""
    return UserError(f"{key}={value} {problem}", fix, key=key, value=value)


@dataclass(frozen=True)
class TextColumn:
    """A column of texts in addition to the problem and its gold answer."""

    name: str
    """Name of the column, or a dotted path."""
    key: str
    """Configuration key that names the column, for messages."""
    required: bool = True
    """Whether a row without the column is an error; otherwise its problem has no such column."""


class WrittenFloat(float):
    """A JSON number whose str() is its spelling in the file: 1e5 stays 1e5."""

    def __new__(cls, text: str) -> WrittenFloat:
        """Parse ``text`` and keep it."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Columns:
    """The columns of one dataset to read; methods raise UserError for a missing column or a wrong type."""

    source: str
    """Name of the dataset in messages and in Problem.source."""
    key: str
    """Configuration key of the dataset: data.train, data.validation[1]."""
    input_key: str
    """Column of the problem's text, or a dotted path."""
    output_key: str
    """Column of the gold answer, or a dotted path."""
    answer_required: bool
    """Whether a row without a gold answer's column is an error: the configuration names the column."""
    output_pattern: str | None = None
    """Regular expression that extracts the gold answer from its column."""
    extra: tuple[TextColumn, ...] = ()
    """Further columns to read."""
    pattern: re.Pattern[str] | None = field(init=False)
    """Compiled ``output_pattern``."""

    def __post_init__(self) -> None:
        pattern = None if self.output_pattern is None else compile_pattern(self.output_pattern, self.key)
        object.__setattr__(self, "pattern", pattern)

    def project(self, row: Row, origin: str) -> Values:
        """Return the row's values; ``origin`` is the file or dataset of the row, for messages."""
        text = self._text(row, f"{self.key}.input_key", self.input_key, origin)
        extra = [
            self._text(row, column.key, column.name, origin) if column.required or _has(row[1], column.name) else None
            for column in self.extra
        ]
        return (text if text.strip() else None, self._answer(row, origin), *extra)

    def answer_is_float(self, row: Mapping[str, Any]) -> bool:
        """Return whether the gold answer is a float: parsing loses its spelling in the file."""
        return _has(row, self.output_key) and type(pick(row, self.output_key)) is float

    def select(self, names: Sequence[str], origin: str) -> list[str]:
        """Return those of a table's column ``names`` that must be read."""
        wanted = [(f"{self.key}.input_key", self.input_key, True)]
        wanted.append((f"{self.key}.output_key", self.output_key, self.answer_required))
        wanted += [(column.key, column.name, column.required) for column in self.extra]
        roots = []
        for key, name, required in wanted:
            root = name if name in names else name.split(".")[0]
            if root in names:
                roots.append(root)
            elif required:
                raise _missing(key, name, f"the table of {origin}", names)
        return list(dict.fromkeys(roots))

    def _text(self, row: Row, key: str, name: str, origin: str) -> str:
        text = self._value(row, key, name, origin)
        if not isinstance(text, str | None):
            raise _wrong_type(row, key, name, text, "strings", origin)
        return self._encodable(text or "", row, origin)

    def _answer(self, row: Row, origin: str) -> str | None:
        if not self.answer_required and not _has(row[1], self.output_key):
            return ""
        key = f"{self.key}.output_key"
        answer = self._value(row, key, self.output_key, origin)
        if isinstance(answer, bool) or not isinstance(answer, str | int | float | Decimal | None):
            raise _wrong_type(row, key, self.output_key, answer, "strings or numbers", origin)
        text = "" if answer is None else self._encodable(str(answer), row, origin)
        return text if self.pattern is None or not text else extract(self.pattern, text)

    def _encodable(self, text: str, row: Row, origin: str) -> str:
        """Return ``text``; raise UserError for half of a surrogate pair, which JSON allows and UTF-8 does not."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problem = f"{self.key}: {origin} is malformed in {row[0]} ({reason(error)})"
            raise UserError(problem, "write it as UTF-8 text", key=self.key, value=origin) from None
        return text

    def _value(self, row: Row, key: str, name: str, origin: str) -> Any:
        try:
            return pick(row[1], name)
        except KeyError:
            raise _missing(key, name, f"{row[0]} of {origin}", row[1]) from None


def _missing(key: str, name: str, location: str, names: Iterable[str]) -> UserError:
    columns = ", ".join(name if name == name.strip() else repr(name) for name in names) or "no columns"
    columns = columns if len(columns) <= 400 else columns[:397] + "..."
    return setting_error(
        key, name, f"is missing in {location}, whose columns are: {columns}", f"set {key} to one of these"
    )


def _wrong_type(row: Row, key: str, name: str, found: Any, wanted: str, origin: str) -> UserError:
    kind = type(found).__name__
    return setting_error(key, name, f"has type {kind} in {row[0]} of {origin}", f"set {key} to a column of {wanted}")


def compile_pattern(pattern: str, key: str) -> re.Pattern[str]:
    """Compile ``output_pattern`` of the dataset ``key``; raise UserError unless it has at most one group."""
    key = f"{key}.output_pattern"
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        problem = f"is not a valid regular expression ({reason(error)})"
        raise setting_error(key, pattern, problem, "correct it") from None
    if compiled.groups > 1:
        problem = f"has {compiled.groups} groups, but at most one can be the gold answer"
        raise setting_error(key, pattern, problem, "keep one group and write the rest as (?:...)")
    return compiled


def extract(pattern: re.Pattern[str], text: str) -> str | None:
    """Return the last non-blank extraction: the pattern's group or, without a group, the text after the match.

    Return None if no match has one.
    """
    for match in reversed(list(pattern.finditer(text))):
        found = match.group(1) if pattern.groups else text[match.end() :]
        if found and found.strip():
            return found.strip()
    return None


def pick(row: Mapping[str, Any], name: str) -> Any:
    """Return the column ``name`` or the value at a dotted path such as ``prompt.0.content``; raises KeyError."""
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
        pick(row, name)
    except KeyError:
        return False
    return True
