"""Read from the rows of a dataset the columns that a run uses: problem, gold answer, tools, trace and others.

A problem is a text or a conversation. A trace is a text with reasoning that the teacher reads with the problem.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Literal, TypeVar

from distill.data.conversations import (
    ROLES,
    Conversation,
    ConversationError,
    as_json,
    is_content_parts,
    may_be_messages,
    read_conversation,
    read_tools,
)
from distill.data.grading import THINK_TAGS
from distill.errors import UserError, reason

T = TypeVar("T")

Row = tuple[str, Mapping[str, Any]]
"""Pair (location of a row in its file, mapping of column names to values).

Example: ("line 3", {"input": "1+1"}). The location is used in messages.
"""
Values = tuple[str | None, ...]
"""Values of the used columns of a row: the columns in FIXED, then each extra column.

The problem text is None if it is blank. The gold answer is None if the regular expression output_pattern does not
match it, and "" if it is absent. All other columns are None if they are absent.
"""
FIXED = ("text", "answer", "reference", "messages", "tools")
"""Names of the columns of each table: problem text, gold answer, reference response, and JSON of messages and tools."""


def setting_error(key: str, value: str, problem: str, fix: str, kind: type[UserError] = UserError) -> UserError:
    """Return an error of the type ``kind`` about the configuration key ``key``: "key=value problem: fix"."""
    return kind(f"{key}={value} {problem}", fix, key=key, value=value)


class ArrowRow(dict[str, Any]):
    """A row of an Arrow table, in which nested objects have the value null in place of absent keys."""


@dataclass(frozen=True)
class TextColumn:
    """A column to read in addition to the problem and the gold answer; its values are stored as texts."""

    name: str
    """Name of the column, or a dotted path to a nested value such as ``prompt.0.content``."""
    key: str
    """Configuration key that selects the column, for messages."""
    required: bool = True
    """Whether a row without the column is an error. If false, Problem.columns omits it for such a row."""
    kind: Literal["text", "placeholder", "conversation", "unread", "message"] = "text"
    """Type of the values. text: texts; placeholder: texts or numbers for a template, in which it replaces ``{name}``;
    conversation: lists of messages that end with a user or tool message, stored as JSON; unread: only the presence of
    the column is stored, because it does not replace ``{name}`` in a template; message: no column, but the assistant
    message at the end of each conversation."""


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
    """Name of the column with the problem, or a dotted path to a nested value (prompt.0.content)."""
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
    tools_key: str | None = None
    """Name of the column with the tools, or a dotted path to a nested value; None: no tools."""
    reference: TextColumn | None = None
    """Column of the reference responses. None, or the kind message: the assistant message after the prompt of a
    conversation; the kind message refuses a message that calls tools."""
    think_tags: tuple[str, str] = THINK_TAGS
    """Opening and closing tag of a think block, for the separate reasoning of a message."""
    pattern: re.Pattern[str] | None = field(init=False)
    """Compiled ``output_pattern``; None if ``output_pattern`` is None."""

    def __post_init__(self) -> None:
        pattern = None if self.output_pattern is None else compile_pattern(self.output_pattern, self.key)
        object.__setattr__(self, "pattern", pattern)

    def project(self, row: Row, origin: str) -> Values:
        """Return the values of ``row`` for the columns in FIXED and the extra columns.

        ``origin``: the file or dataset that contains the row, for messages.
        """
        key = f"{self.key}.input_key"
        found = self._value(row, key, self.input_key, origin)
        conversation = self._conversation(found, row, key, origin)
        if conversation is None:
            text, reference, gold, messages = self._text(row, key, self.input_key, origin), None, "", None
        else:
            text, reference, gold = conversation.text, conversation.reference, conversation.gold
            messages = self._json(row, key, self.input_key, conversation.messages, origin)
        if self.reference is not None and self.reference.kind != "message":
            reference = self._extra(row, self.reference, origin)
        elif reference:
            self._encodable(reference, row, origin)
        own = gold if gold and not self.answer_required else None
        answer = self._answer(row, origin) if own is None else self._extracted(self._encodable(own, row, origin))
        extra = [self._extra(row, column, origin) for column in self.extra]
        return (text if text.strip() else None, answer, reference or None, messages, self._tools(row, origin), *extra)

    def _conversation(self, found: Any, row: Row, key: str, origin: str) -> Conversation | None:
        """Return the conversation in ``found``, the value of input_key; None if it is another value."""
        if is_content_parts(found) and (path := re.fullmatch(r"(.+)\.\d+\.(?:content|value)", self.input_key)):
            problem = f"has a list of content parts in {row[0]} of {origin}"
            fix = f"set {key} to {path.group(1)}, so that complete conversations are read"
            raise setting_error(key, self.input_key, problem, fix)
        if not (isinstance(found, str) or may_be_messages(found)):
            return None
        arrow, tags = _is_arrow(row), self.think_tags
        made = self._checked(row, key, self.input_key, origin, lambda: read_conversation(found, arrow, tags))
        if made is not None and made.calls_tools and self.reference is not None and self.reference.kind == "message":
            key = self.reference.key
            raise UserError(
                f"{key}=null selects the assistant message at the end of each conversation, but in {row[0]} of {origin}"
                " this message calls tools, which is not supported",
                f"set {key} to a column of texts, remove the row, or set distillation.off_policy.share=0",
                key=key,
            )
        return made

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
        main = [TextColumn(self.input_key, f"{self.key}.input_key")]
        main.append(TextColumn(self.output_key, f"{self.key}.output_key", self.answer_required))
        tools = [] if self.tools_key is None else [TextColumn(self.tools_key, f"{self.key}.tools_key")]
        reference = [] if self.reference is None or self.reference.kind == "message" else [self.reference]
        roots = []
        for column in (*main, *tools, *reference, *self.extra):
            root = column.name if column.name in names else column.name.split(".")[0]
            if root in names:
                roots.append(root)
            elif column.required:
                raise _missing(column, f"the table of {origin}", names)
        return list(dict.fromkeys(roots))

    def _extra(self, row: Row, column: TextColumn, origin: str) -> str | None:
        """Return the value of ``column`` as text; None if an optional column is absent."""
        if not column.required and not _has(row[1], column.name):
            return None
        if column.kind == "unread":
            return ""
        found = self._value(row, column.key, column.name, origin, column)
        if column.kind == "conversation":
            return self._context(row, column, found, origin)
        is_number = isinstance(found, int | float | Decimal) and not isinstance(found, bool)
        if column.kind == "placeholder" and is_number:
            return str(found)
        if not isinstance(found, str | None):
            wanted = "strings or numbers" if column.kind == "placeholder" else "strings"
            raise _wrong_type(row, column.key, column.name, found, wanted, origin, column)
        return self._encodable(found or "", row, origin)

    def _context(self, row: Row, column: TextColumn, found: Any, origin: str) -> str:
        """Return the JSON of the messages in ``found``, which end with a user or tool message."""
        name = column.name

        def read() -> Any:
            conversation = read_conversation(found, _is_arrow(row))
            if conversation is None:
                raise ConversationError(f"it is the text {found[:40]!r}", "write a list of messages")
            if not conversation.is_prompt:
                raise ConversationError("it ends with an assistant message", "end it with a user or tool message")
            return conversation.messages

        return self._json(row, column.key, name, self._checked(row, column.key, name, origin, read), origin)

    def _tools(self, row: Row, origin: str) -> str | None:
        if self.tools_key is None:
            return None
        key, name = f"{self.key}.tools_key", self.tools_key
        found = self._value(row, key, name, origin)
        tools = self._checked(row, key, name, origin, lambda: read_tools(found, _is_arrow(row)))
        return self._json(row, key, name, tools, origin) if tools else None

    def _json(self, row: Row, key: str, name: str, value: Any, origin: str) -> str:
        text = self._checked(row, key, name, origin, lambda: as_json(value))
        return self._encodable(text, row, origin)

    def _checked(self, row: Row, key: str, name: str, origin: str, read: Callable[[], T]) -> T:
        """Return ``read()``; an error about a conversation or tools gets the configuration key and the row."""
        try:
            return read()
        except ConversationError as error:
            what = "list of tools" if key.endswith(".tools_key") else "conversation"
            problem = f"has a malformed {what} in {row[0]} of {origin} ({error})"
            raise setting_error(key, name, problem, error.fix) from None

    def _text(self, row: Row, key: str, name: str, origin: str) -> str:
        text = self._value(row, key, name, origin)
        if not isinstance(text, str | None):
            raise _wrong_type(row, key, name, text, "strings or lists of messages", origin)
        return self._encodable(text or "", row, origin)

    def _answer(self, row: Row, origin: str) -> str | None:
        if not self.answer_required and not _has(row[1], self.output_key):
            return ""
        key = f"{self.key}.output_key"
        answer = self._value(row, key, self.output_key, origin)
        if isinstance(answer, bool) or not isinstance(answer, str | int | float | Decimal | None):
            raise _wrong_type(row, key, self.output_key, answer, "strings or numbers", origin)
        return self._extracted("" if answer is None else self._encodable(str(answer), row, origin))

    def _extracted(self, text: str) -> str | None:
        return text if self.pattern is None or not text else extract(self.pattern, text)

    def _encodable(self, text: str, row: Row, origin: str) -> str:
        """Return ``text``; raise UserError for an unpaired surrogate, which JSON allows but UTF-8 does not."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problem = f"{self.key}: {origin} has text in {row[0]} that cannot be encoded as UTF-8 ({reason(error)})"
            raise UserError(problem, "correct the text of this row", key=self.key) from None
        return text

    def _value(self, row: Row, key: str, name: str, origin: str, column: TextColumn | None = None) -> Any:
        try:
            return pick(row[1], name)
        except KeyError:
            column = column or TextColumn(name, key)
            raise _missing(column, f"{row[0]} of {origin}", row[1], ", or add the column to this row") from None


def without_used(columns: Columns) -> Columns:
    """Return ``columns`` without the extra columns of the kind unread that the run reads for another purpose."""
    reference = columns.reference.name if columns.reference else None
    used = {columns.input_key, columns.output_key, columns.tools_key, reference}
    used |= {column.name for column in columns.extra if column.kind != "unread"}
    extra = tuple(column for column in columns.extra if column.kind != "unread" or column.name not in used)
    return replace(columns, extra=extra)


def _is_arrow(row: Row) -> bool:
    return isinstance(row[1], ArrowRow)


def _missing(column: TextColumn, location: str, names: Iterable[str], other_fix: str = "") -> UserError:
    key, given = column.key, list(names)
    columns = ", ".join(name if name == name.strip() else repr(name) for name in given) or "no columns"
    columns = columns if len(columns) <= 400 else columns[:397] + "..."
    lack = f"missing in {location} (columns: {columns})"
    close = difflib.get_close_matches(column.name, given, 1, 0.6)
    if column.kind != "placeholder":
        fix = f"set {key} to {close[0]} or another of these columns" if close else f"set {key} to one of these columns"
        no_tools = ", or set it to null" if key.endswith(".tools_key") else ""
        return setting_error(key, column.name, f"is {lack}", fix + other_fix + no_tools)
    word = f"{{{column.name}}}"
    known = ", ".join(f"{{{name}}}" for name in (*close, "problem", "trace"))
    fix = f"write {known} or the name of another column in braces, or {{{word}}} for literal text"
    return UserError(f"{key} has the placeholder {word}, whose column is {lack}", fix + other_fix, key=key, value=word)


def _wrong_type(
    row: Row, key: str, name: str, found: Any, wanted: str, origin: str, column: TextColumn | None = None
) -> UserError:
    kind = type(found).__name__
    problem = f"has a value of type {kind} in {row[0]} of {origin}"
    if column is not None and column.kind == "placeholder":
        word = f"{{{name}}}"
        problem = f"{key} has the placeholder {word}, whose column has a value of type {kind} in {row[0]} of {origin}"
        return UserError(problem, f"write the name of a column of {wanted} in braces", key=key, value=word)
    is_response = key.endswith((".output_key", ".off_policy.column"))
    if path := _message_path(found, "assistant" if is_response else "user"):
        return setting_error(key, name, problem, f"set {key} to the text of a message, such as {name}.{path}")
    inner = f", or to the dotted path of a value in it, such as {name}.0" if isinstance(found, list) else ""
    inner = f", or to one of {_inner_paths(name, found)}" if isinstance(found, Mapping) and found else inner
    return setting_error(key, name, problem, f"set {key} to a column of {wanted}{inner}")


def _message_path(found: Any, role: str) -> str | None:
    """Return the path of the text of a message of ``role`` in the chat ``found``, such as "0.content".

    It is the first user message, or the last assistant message. Returns None if ``found`` is not a chat, a list of
    messages (see conversations.py), or has no such message.
    """
    paths = [
        f"{i}.{text}"
        for i, message in enumerate(found if isinstance(found, list) else ())
        for key, text in (("role", "content"), ("from", "value"))
        if isinstance(message, Mapping) and ROLES.get(str(message.get(key))) == role
        if isinstance(message.get(text), str)
    ]
    return paths[-1 if role == "assistant" else 0] if paths else None


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
