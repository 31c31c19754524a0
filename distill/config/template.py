"""Texts with placeholders: prompt files (``{}``) and the teacher's template (``{problem}``, ``{trace}``).

The syntax is that of ``str.format`` cut down to what is safe: a placeholder is a bare name, a doubled brace is a
literal one, and the values are put in as they are, so braces in the data mean nothing. In the teacher's template, whose
placeholders have names, a brace that begins or ends none is literal too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from distill.config.parse import refuse

_TEACHER_KEY = "distillation.context_distillation.teacher_prefix_template"
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_NAMED = re.compile(r"\{\{|\{[A-Za-z_]\w*(?:[.!:\[][^{}]*)?\}|[{}]")
"""A doubled brace, a placeholder of a name (with what ``str.format`` allows after it), or a brace."""


class Template:
    """A text whose placeholders are among ``names`` ("" is the bare ``{}``).

    ``where`` says in errors what the user set, "data.train.prompt_file=cot.txt" for one. Raises UserError for an
    unknown placeholder (attributes, indices, conversions and format specs are unknown too) and for a single brace.
    """

    def __init__(self, text: str, names: Sequence[str], where: str) -> None:
        self._names = tuple(names)
        self._where = where
        self._pieces: list[tuple[str, str | None]] = []
        """(literal text, the placeholder after it); None ends the text."""
        literal, end = "", 0
        for piece in _PIECE.finditer(text):
            literal += text[end : piece.start()]
            end = piece.end()
            if piece.group() in ("{{", "}}"):
                literal += piece.group()[0]
            else:
                line = text.count("\n", 0, piece.start()) + 1
                self._pieces.append((literal, self._checked(piece, line)))
                literal = ""
        self._pieces.append((literal + text[end:], None))

    def _checked(self, piece: re.Match[str], line: int) -> str:
        known = " and ".join(f"{{{name}}}" for name in self._names)
        rule = f"only {known} may stand in it, and a literal brace is written twice, {{{{ or }}}}"
        name: str | None = piece.group(1)
        if name is None:
            refuse(f"{self._where} has a single {piece.group()} on line {line}: {rule}")
        if name not in self._names:
            refuse(f"{self._where} has the unknown placeholder {piece.group()} on line {line}: {rule}")
        return name

    def count(self, name: str) -> int:
        """How often the placeholder ``name`` stands in the text."""
        return sum(name == found for _, found in self._pieces)

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with each placeholder replaced by its value."""
        return "".join(literal + ("" if name is None else values[name]) for literal, name in self._pieces)


def teacher_template(text: str) -> Template:
    """The teacher's template, in which a brace that belongs to no placeholder is literal; raises UserError also where
    it has no ``{problem}``.
    """
    template = Template(_literals_doubled(text), ("problem", "trace"), _TEACHER_KEY)
    if template.count("problem") == 0:
        refuse(f"{_TEACHER_KEY} has no {{problem}}: put it in, or the teacher does not know what is asked")
    return template


def _literals_doubled(text: str) -> str:
    """The text with every literal brace written twice; two that stand together are one written twice already, unless
    the first closes a single one, as in ``\\frac{\\sqrt{2}}{3}``.
    """
    written, at = "", 0
    opened: list[str] = []
    while found := _NAMED.search(text, at):
        written, piece, at = written + text[at : found.start()], found.group(), found.end()
        if piece == "}":
            pair = opened[-1:] != ["{"] and text.startswith("}", at)
            if opened and (pair or opened[-1] == "{"):
                opened.pop()
            at += pair
        elif piece in ("{", "{{"):
            opened.append(piece)
        written += {"{": "{{", "}": "}}"}.get(piece, piece)
    return written + text[at:]
