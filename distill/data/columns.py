"""Select the columns that a run uses from the rows of a dataset: problem text, gold answer and trace."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from distill.errors import UserError, reason

Row = tuple[str, Mapping[str, Any]]
"""(location in the file, row), for example ("line 3", {...}). The location is used in messages."""
Values = tuple[str | None, ...]
"""Values of the used columns of a row: text (None if blank), gold answer (None if output_pattern does not match), then
each extra column (None if absent)."""


def setting_error(key: str, value: str, problem: str, fix: str) -> UserError:
    """Return the UserError for one setting; its message is "key=value problem: fix"."""
    return UserError(f"{key}={value} {problem}", fix, key=key, value=value)


@dataclass(frozen=True)
class TextColumn:
    """A column of texts in addition to the problem and its gold answer."""

    name: str
    """Name of the column, or a dotted path."""
    key: str
    """Configuration key that names the column, for messages."""
    required: bool = True
    """Whether a row without the column is an error. If not, the problem of such a row lacks the column."""


class WrittenFloat(float):
    """A JSON number with the spelling in the file as its str(): 1e5 stays 1e5."""

    def __new__(cls, text: str) -> WrittenFloat:
        """Parse the number ``text`` and keep its spelling."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Columns:
    """Columns to read from one dataset. Methods raise UserError for a missing column or a wrong type."""

    source: str
    """Name of the dataset in messages and in Problem.source."""
    key: str
    """Configuration key of the dataset, such as data.train or data.validation.1."""
    input_key: str
    """Column of the problem's text, or a dotted path."""
    output_key: str
    """Column of the gold answer, or a dotted path."""
    answer_required: bool
    """Whether a row without the column ``output_key`` is an error; true if the recipe or the short name sets the
    column."""
    output_pattern: str | None = None
    """Regular expression that extracts the gold answer from its column."""
    extra: tuple[TextColumn, ...] = ()
    """Additional columns to read."""
    pattern: re.Pattern[str] | None = field(init=False)
    """Compiled ``output_pattern``."""

    def __post_init__(self) -> None:
        pattern = None if self.output_pattern is None else compile_pattern(self.output_pattern, self.key)
        object.__setattr__(self, "pattern", pattern)

    def project(self, row: Row, origin: str) -> Values:
        """Return the values of the used columns; ``origin``: the file or dataset of the row, for messages."""
        text = self._text(row, f"{self.key}.input_key", self.input_key, origin)
        extra = [
            self._text(row, column.key, column.name, origin) if column.required or _has(row[1], column.name) else None
            for column in self.extra
        ]
        return (text if text.strip() else None, self._answer(row, origin), *extra)

    def answer_is_float(self, row: Mapping[str, Any]) -> bool:
        """Return whether the gold answer of ``row`` is a float, so that parsing loses its spelling in the file."""
        return _has(row, self.output_key) and type(pick(row, self.output_key)) is float

    def select(self, names: Sequence[str], origin: str) -> list[str]:
        """Return the columns to read from a table with the column ``names``."""
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
        """Return ``text``; raise UserError for an unpaired surrogate, which JSON allows but UTF-8 does not."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problem = f"{self.key}: {origin} is malformed in {row[0]} ({reason(error)})"
            raise UserError(problem, "write it as UTF-8 text", key=self.key) from None
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
        key, name, f"is missing in {location} (columns: {columns})", f"set {key} to one of these columns"
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
        raise setting_error(key, pattern, problem, "correct the pattern") from None
    if compiled.groups > 1:
        problem = f"has {compiled.groups} groups, but at most one can be the gold answer"
        raise setting_error(key, pattern, problem, "keep one group and write the rest as (?:...)")
    return compiled


def extract(pattern: re.Pattern[str], text: str) -> str | None:
    """Return the last non-blank text that ``pattern`` extracts from ``text``, stripped; None without a match.

    The extracted text is the pattern's group or, for a pattern without a group, the text after the match.
    """
    for match in reversed(list(pattern.finditer(text))):
        found = match.group(1) if pattern.groups else text[match.end() :]
        if found and found.strip():
            return found.strip()
    return None


def pick(row: Mapping[str, Any], name: str) -> Any:
    """Return the column ``name``, or the value at a dotted path such as ``prompt.0.content``.

    Raises KeyError if it is missing.
    """
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
