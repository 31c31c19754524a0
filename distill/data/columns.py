"""The columns of a dataset that a run uses: how one row becomes the text, the gold answer and the named columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from distill.errors import UserError, reason

Row = tuple[str, Mapping[str, Any]]
"""A row with its place in its file, for messages: ("line 3", {...})."""
Values = tuple[str | None, ...]
"""A projected row: the text (None: blank), the gold answer (None: output_pattern found none), each named column (None:
absent)."""


@dataclass(frozen=True)
class TextColumn:
    """A column of texts beside the problem and its gold answer."""

    name: str
    """Its name or a dotted path."""
    key: str
    """The configuration key that names it, for messages."""
    needed: bool = True
    """Every row must have it; otherwise a row without it yields a problem without it."""


class WrittenFloat(float):
    """A JSON number that is shown as the file writes it: 1e5 stays 1e5."""

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
    """The columns of one dataset that are read. Raises UserError for a row that lacks one or has another type in it."""

    source: str
    """The dataset's name in messages and in Problem.source."""
    where: str
    """The dataset's configuration key: data.train, data.validation[1]."""
    input_key: str
    output_key: str
    needs_answer: bool
    """The column of the gold answers was named: a row without it is an error."""
    output_pattern: str | None = None
    others: tuple[TextColumn, ...] = ()
    pattern: re.Pattern[str] | None = field(init=False)

    def __post_init__(self) -> None:
        pattern = None if self.output_pattern is None else compile_pattern(self.output_pattern, self.where)
        object.__setattr__(self, "pattern", pattern)

    def project(self, row: Row, origin: str) -> Values:
        """The row's values; ``origin``: the file or dataset that it was read from."""
        text = self._text(row, f"{self.where}.input_key", self.input_key, origin)
        others = [
            self._text(row, column.key, column.name, origin) if column.needed or _has(row[1], column.name) else None
            for column in self.others
        ]
        return (text if text.strip() else None, self._answer(row, origin), *others)

    def answer_is_float(self, row: Mapping[str, Any]) -> bool:
        """Whether the gold answer is a float, whose spelling in the file is lost by parsing."""
        return _has(row, self.output_key) and type(pick(row, self.output_key)) is float

    def select(self, names: Sequence[str], origin: str) -> list[str]:
        """Those of a table's columns ``names`` that have to be read."""
        wanted = [(f"{self.where}.input_key", self.input_key, True)]
        wanted.append((f"{self.where}.output_key", self.output_key, self.needs_answer))
        wanted += [(column.key, column.name, column.needed) for column in self.others]
        roots = []
        for key, name, needed in wanted:
            root = name if name in names else name.split(".")[0]
            if root in names:
                roots.append(root)
            elif needed:
                raise self._missing(key, name, f"the table of {origin}", names)
        return list(dict.fromkeys(roots))

    def _text(self, row: Row, key: str, name: str, origin: str) -> str:
        text = self._value(row, key, name, origin)
        if not isinstance(text, str | None):
            raise self._wrong_type(row, key, name, text, "strings", origin)
        return self._encodable(text or "", row, origin)

    def _answer(self, row: Row, origin: str) -> str | None:
        if not self.needs_answer and not _has(row[1], self.output_key):
            return ""
        key = f"{self.where}.output_key"
        answer = self._value(row, key, self.output_key, origin)
        if isinstance(answer, bool) or not isinstance(answer, str | int | float | Decimal | None):
            raise self._wrong_type(row, key, self.output_key, answer, "strings or numbers", origin)
        text = "" if answer is None else self._encodable(str(answer), row, origin)
        return text if self.pattern is None or not text else extract(self.pattern, text)

    def _encodable(self, text: str, row: Row, origin: str) -> str:
        """Half of a surrogate pair is a string in JSON, but no text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{self.where}: {origin} is malformed in {row[0]} ({reason(error)}): write it as UTF-8 text"
            ) from None
        return text

    def _value(self, row: Row, key: str, name: str, origin: str) -> Any:
        try:
            return pick(row[1], name)
        except KeyError:
            raise self._missing(key, name, f"{row[0]} of {origin}", row[1]) from None

    def _missing(self, key: str, name: str, place: str, there: Iterable[str]) -> UserError:
        columns = ", ".join(name if name == name.strip() else repr(name) for name in there) or "nothing"
        columns = columns if len(columns) <= 400 else columns[:397] + "..."
        return UserError(f"{key}={name} is missing in {place}, which has {columns}: set {key} to one of these")

    def _wrong_type(self, row: Row, key: str, name: str, found: Any, wanted: str, origin: str) -> UserError:
        kind = type(found).__name__
        return UserError(f"{key}={name} is of type {kind} in {row[0]} of {origin}: name a column of {wanted}")


def compile_pattern(pattern: str, where: str) -> re.Pattern[str]:
    """The regular expression ``where``.output_pattern; refused unless it has one group at most."""
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(
            f"{where}.output_pattern={pattern} is not a regular expression ({reason(error)}): correct it"
        ) from None
    if compiled.groups > 1:
        raise UserError(
            f"{where}.output_pattern={pattern} has {compiled.groups} groups, and the gold answer is one: keep one group"
            " and write every other group as (?:...)"
        )
    return compiled


def extract(pattern: re.Pattern[str], text: str) -> str | None:
    """The pattern's group in its last match that has one, or without a group the text after it; None: no match.

    An empty extraction is no match.
    """
    for match in reversed(list(pattern.finditer(text))):
        found = match.group(1) if pattern.groups else text[match.end() :]
        if found and found.strip():
            return found.strip()
    return None


def pick(row: Mapping[str, Any], name: str) -> Any:
    """The column ``name``, or the value at a dotted path such as ``prompt.0.content``; KeyError where it is absent."""
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
