"""Read from the rows of a dataset the columns that a run uses: problem text, gold answer and trace.

A trace is a text with reasoning that the teacher reads together with the problem.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from distill.errors import UserError, reason

Row = tuple[str, Mapping[str, Any]]
"""Pair (location of a row in its file, mapping of column names to values).

Example: ("line 3", {"input": "1+1"}). The location is used in messages.
"""
Values = tuple[str | None, ...]
"""Values of the used columns of a row: problem text, gold answer, then each extra column.

The problem text is None if it is blank. The gold answer is None if the regular expression output_pattern does not
match it, and "" if it is absent. An extra column is None if it is absent.
"""


def setting_error(key: str, value: str, problem: str, fix: str, kind: type[UserError] = UserError) -> UserError:
    """Return an error of the type ``kind`` about the configuration key ``key``: "key=value problem: fix"."""
    return kind(f"{key}={value} {problem}", fix, key=key, value=value)


@dataclass(frozen=True)
class TextColumn:
    """A text column to read in addition to the problem text and the gold answer."""

    name: str
    """Name of the column, or a dotted path to a nested value such as ``prompt.0.content``."""
    key: str
    """Configuration key that selects the column, for messages."""
    required: bool = True
    """Whether a row without the column is an error. If false, Problem.columns omits it for such a row."""


class WrittenFloat(float):
    """A float read from JSON; its str() is the number as written in the file, for example 1e5."""

    def __new__(cls, text: str) -> WrittenFloat:
        """Return the float of ``text``, and keep ``text`` for str()."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Columns:
    """The columns to read from one dataset.

    The methods raise UserError for a missing column and for a value of the wrong type.
    """

    source: str
    """Name of the dataset in messages and in Problem.source."""
    key: str
    """Configuration key of the dataset, such as data.train or data.validation.1."""
    input_key: str
    """Name of the column with the problem text, or a dotted path to a nested value (prompt.0.content)."""
    output_key: str
    """Name of the column with the gold answer, or a dotted path to a nested value."""
    answer_required: bool
    """Whether a row without the column ``output_key`` is an error.

    True if the recipe sets output_key, or if dataset_name selects a built-in dataset.
    """
    output_pattern: str | None = None
    """Regular expression that extracts the gold answer from its column; None: the complete value is used."""
    extra: tuple[TextColumn, ...] = ()
    """Columns to read in addition to the problem text and the gold answer."""
    pattern: re.Pattern[str] | None = field(init=False)
    """Compiled ``output_pattern``; None if ``output_pattern`` is None."""

    def __post_init__(self) -> None:
        pattern = None if self.output_pattern is None else compile_pattern(self.output_pattern, self.key)
        object.__setattr__(self, "pattern", pattern)

    def project(self, row: Row, origin: str) -> Values:
        """Return the problem text, gold answer and extra columns of ``row``.

        ``origin``: the file or dataset that contains the row, for messages.
        """
        text = self._text(row, f"{self.key}.input_key", self.input_key, origin)
        extra = [
            self._text(row, column.key, column.name, origin) if column.required or _has(row[1], column.name) else None
            for column in self.extra
        ]
        return (text if text.strip() else None, self._answer(row, origin), *extra)

    def answer_is_float(self, row: Mapping[str, Any]) -> bool:
        """Return whether the gold answer of ``row`` is a float.

        If so, the caller parses the row again with WrittenFloat, because str() of a float may differ from the number as
        written in the file.
        """
        return _has(row, self.output_key) and type(pick(row, self.output_key)) is float

    def select(self, names: Sequence[str], origin: str) -> list[str]:
        """Return the names of the columns to read from a table that has the columns ``names``.

        For a dotted path to a nested value (``prompt.0.content``), the name of the outermost column (``prompt``) is
        returned. ``origin``: the file or dataset of the table, for messages. Raises UserError if a required column is
        missing.
        """
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
            problem = f"{self.key}: {origin} has text in {row[0]} that cannot be encoded as UTF-8 ({reason(error)})"
            raise UserError(problem, "correct the text of this row", key=self.key) from None
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
    problem = f"has a value of type {kind} in {row[0]} of {origin}"
    if path := _first_message(found, "assistant" if key.endswith(".output_key") else "user"):
        return setting_error(key, name, problem, f"set {key} to the text of a message, such as {name}.{path}")
    inner = f", or to the dotted path of a value in it, such as {name}.0" if isinstance(found, list) else ""
    inner = f", or to one of {_inner_paths(name, found)}" if isinstance(found, Mapping) and found else inner
    return setting_error(key, name, problem, f"set {key} to a column of {wanted}{inner}")


def _first_message(found: Any, role: str) -> str | None:
    """Return the path of the text of the first message of ``role`` in the chat ``found``, such as "0.content".

    Returns None if ``found`` is not a chat, a list of mappings with the keys role and content, or has no such message.
    """
    for i, message in enumerate(found if isinstance(found, list) else ()):
        if isinstance(message, Mapping) and message.get("role") == role and isinstance(message.get("content"), str):
            return f"{i}.content"
    return None


def _inner_paths(name: str, found: Mapping[str, Any]) -> str:
    paths = ", ".join(f"{name}.{key}" for key in found)
    return paths if len(paths) <= 200 else paths[:197] + "..."


def compile_pattern(pattern: str, key: str) -> re.Pattern[str]:
    """Compile the output_pattern of a dataset, the regular expression that extracts the gold answer.

    ``key``: the dataset's configuration key. Raises UserError if ``pattern`` is not a valid regular expression or has
    more than one capturing group.
    """
    key = f"{key}.output_pattern"
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        problem = f"is not a valid regular expression ({reason(error)})"
        raise setting_error(key, pattern, problem, "correct the pattern") from None
    if compiled.groups > 1:
        problem = f"has {compiled.groups} capturing groups, but only one group can extract the gold answer"
        raise setting_error(key, pattern, problem, "keep one capturing group and write the other groups as (?:...)")
    return compiled


def extract(pattern: re.Pattern[str], text: str) -> str | None:
    """Return the last text that ``pattern`` extracts from ``text``, stripped; None if it extracts no text.

    Blank texts are ignored. A pattern with a group extracts the group's text. A pattern without a group extracts the
    text after the match.
    """
    for match in reversed(list(pattern.finditer(text))):
        found = match.group(1) if pattern.groups else text[match.end() :]
        if found and found.strip():
            return found.strip()
    return None


def pick(row: Mapping[str, Any], name: str) -> Any:
    """Return the value of the column ``name`` in ``row``.

    ``name`` may be the dotted path of a nested value, such as ``prompt.0.content``. Raises KeyError if the value is
    missing.
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
