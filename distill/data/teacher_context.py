"""What the teacher reads in context distillation: filled templates or complete messages, before each response."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from distill.config.template import TEACHER_NAMES, Template, teacher_template
from distill.data.columns import TextColumn
from distill.data.conversations import Chat, as_json, chat_of, stored_messages
from distill.data.files import read_text
from distill.errors import UserError
from distill.types import Problem

if TYPE_CHECKING:
    from distill.config import ContextDistillationConfig

log = logging.getLogger(__name__)

_KEY = "distillation.context_distillation"
TEMPLATE_KEY = f"{_KEY}.teacher_prefix_template"
SYSTEM_KEY = f"{_KEY}.teacher_system_prompt_file"
MESSAGES_KEY = f"{_KEY}.teacher_messages_key"
_TRACE_KEY = f"{_KEY}.static_trace.answer_column"
_EXAMPLE, _EXAMPLE_TRACE = "What is 1 + 1?", "<think>It is 2.</think>"


@dataclass(frozen=True)
class TeacherContext:
    """The teacher's templates, and the conversation that the teacher reads for a problem and a trace."""

    config: ContextDistillationConfig
    template: Template
    """Parsed teacher_prefix_template; not used if teacher_messages_key is set."""
    system: Template | None
    """Parsed text of teacher_system_prompt_file; None: no system message of the teacher's own."""

    @classmethod
    def of(cls, config: ContextDistillationConfig) -> TeacherContext:
        """Parse the templates; raise UserError for an unreadable file and for an unknown placeholder."""
        path = config.teacher_system_prompt_file
        system = None
        if path is not None and config.teacher_messages_key is None:
            text = read_text(path, SYSTEM_KEY).strip()
            if not text:
                fix = "write the system message into the file, or set the key to null"
                raise UserError(f"{SYSTEM_KEY}={path} is an empty file", fix, key=SYSTEM_KEY, value=path)
            system = Template(text, TEACHER_NAMES, SYSTEM_KEY, path, columns=True)
        return cls(config, teacher_template(config.teacher_prefix_template), system)

    @property
    def key(self) -> str:
        """Return the configuration key that selects what the teacher reads, for messages."""
        return TEMPLATE_KEY if self.config.teacher_messages_key is None else MESSAGES_KEY

    @property
    def columns(self) -> tuple[TextColumn, ...]:
        """Return the columns of the dataset that the teacher reads, except the trace column."""
        if self.config.teacher_messages_key is not None:
            return (TextColumn(self.config.teacher_messages_key, MESSAGES_KEY, kind="conversation"),)
        keyed = [(TEMPLATE_KEY, self.template), *([(SYSTEM_KEY, self.system)] if self.system else [])]
        names = {name: key for key, template in reversed(keyed) for name in template.names}
        return tuple(
            TextColumn(name, key, kind="placeholder") for name, key in names.items() if name not in TEACHER_NAMES
        )

    @property
    def unread(self) -> tuple[TextColumn, ...]:
        """Return columns that the templates name in braces, but do not read if the dataset has them.

        They are {problem} and {trace}, and literal texts in braces that are no valid placeholders.
        """
        if self.config.teacher_messages_key is not None:
            return ()
        keyed = [(TEMPLATE_KEY, self.template), *([(SYSTEM_KEY, self.system)] if self.system else [])]
        names = {
            name: key
            for key, template in reversed(keyed)
            for name in (*template.literals, *(name for name in TEACHER_NAMES if template.count(name)))
        }
        return tuple(TextColumn(name, key, required=False, kind="unread") for name, key in names.items() if name)

    @property
    def shows_trace(self) -> bool:
        """Return whether the teacher reads a trace: a template contains {trace}."""
        templates = (self.template, *([self.system] if self.system else ()))
        return self.config.teacher_messages_key is None and any(each.count("trace") for each in templates)

    @property
    def has_conversation(self) -> bool:
        """Return whether the teacher reads several turns of the dataset."""
        return self.config.keep_history or self.config.teacher_messages_key is not None

    def lacks(self, problem: Problem) -> TextColumn | None:
        """Return the first column that the teacher's prompt needs and ``problem`` lacks; None if it has all columns."""
        trace = self.config.trace_column
        needed = (*self.columns, *([TextColumn(trace, _TRACE_KEY)] if trace else ()))
        return next((column for column in needed if column.name not in problem.columns), None)

    def text(self, problem: Problem, trace: str) -> str:
        """Return the filled template; not with teacher_messages_key."""
        return self.template.fill(self._values(problem, trace))

    def chat(self, problem: Problem, trace: str) -> Chat:
        """Return the conversation that the teacher reads, with the tools of ``problem``.

        With keep_history it is the student's conversation; the teacher's system message replaces the student's.
        """
        if (name := self.config.teacher_messages_key) is not None:
            tools = chat_of(problem, "").tools
            return Chat(stored_messages(problem.columns[name]), tools)
        system = self.system.fill(self._values(problem, trace)) if self.system else ""
        text = self.text(problem, trace)
        if self.config.keep_history:
            return chat_of(problem, text, system or problem.system)
        return chat_of(replace(problem, messages=""), text, system)

    def example(self) -> Problem:
        """Return a problem with a value for each column that the teacher reads."""
        values = {column.name: self._example_value(column) for column in self.columns}
        if self.config.trace_column is not None:
            values[self.config.trace_column] = _EXAMPLE_TRACE
        return Problem(_EXAMPLE, columns=values)

    def empty(self) -> Problem:
        """Return a problem with an empty text in each column of the templates."""
        return Problem("", columns={column.name: "" for column in self.columns})

    def _values(self, problem: Problem, trace: str) -> dict[str, str]:
        return {**problem.columns, "problem": problem.text, "trace": trace}

    def _example_value(self, column: TextColumn) -> str:
        return as_json([{"role": "user", "content": _EXAMPLE}]) if column.kind == "conversation" else _EXAMPLE


def context_columns(config: ContextDistillationConfig) -> Sequence[TextColumn]:
    """Return the columns that the teacher reads in addition to the trace column; empty without context distillation.

    Includes columns of the kind unread, which are checked while the data are read.
    """
    context = TeacherContext.of(config) if config.enabled else None
    return (*context.columns, *context.unread) if context else ()


def check_history(
    config: ContextDistillationConfig, problems: Sequence[Problem], location: Callable[[int], str], key: str
) -> None:
    """Check how much of each conversation the teacher reads if it reads neither the history nor complete messages.

    Raises UserError if a prompt ends with a tool message, because the student's response continues the result of the
    tool, which the teacher would not read. Logs one warning with the number of problems whose earlier turns the teacher
    does not read. ``location``: returns the location of problem i; ``key``: the datasets' configuration key.
    """
    if config.keep_history or config.teacher_messages_key is not None:
        return
    cut = 0
    for i, problem in enumerate(problems):
        messages = stored_messages(problem.messages) if problem.messages else []
        if messages and messages[-1]["role"] == "tool":
            raise UserError(
                f"{_KEY}.keep_history=false lets the teacher read only the template with the last user message, but the"
                f" conversation in {location(i)} ends with the result of a tool, which the response continues",
                f"set {_KEY}.keep_history=true, or teacher_messages_key to a column of complete messages",
                key=f"{_KEY}.keep_history",
                value=False,
            )
        cut += sum(message["role"] != "system" for message in messages) > 1
    if cut:
        log.warning(
            "%s: %d of %d problems have more than one turn, and the teacher reads only the last user message of them:"
            " set %s.keep_history=true to show it the complete conversation",
            *(key, cut, len(problems), _KEY),
        )


def reads_traces(config: ContextDistillationConfig) -> bool:
    """Return whether the teacher's prompts contain traces."""
    return TeacherContext.of(config).shows_trace
