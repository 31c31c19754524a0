"""Texts with placeholders: prompt files (``{}``) and the teacher's template (``{problem}``, ``{trace}``).

The syntax is that of ``str.format`` cut down to what is safe: a placeholder is a bare name, a doubled brace is a
literal one, and the values are put in as they are, so braces in the data mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.types import UserError

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


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
            raise UserError(f"{self._where} has a single {piece.group()} on line {line}: {rule}")
        if name not in self._names:
            raise UserError(f"{self._where} has the unknown placeholder {piece.group()} on line {line}: {rule}")
        return name

    def count(self, name: str) -> int:
        """How often the placeholder ``name`` stands in the text."""
        return sum(name == found for _, found in self._pieces)

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with each placeholder replaced by its value."""
        return "".join(literal + ("" if name is None else values[name]) for literal, name in self._pieces)


def read_text(path: str, where: str) -> str:
    """The whole text of a UTF-8 file, unchanged; UserError where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{where}={path} does not exist (looked in {Path.cwd()}): correct the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}={path} is not a readable UTF-8 text file ({error}): correct the file") from None


def read_prompt_file(path: str, where: str) -> Template:
    """A prompt file: a text with ``{}`` once, where the problem goes.

    Two are refused, because the usual cause is a ``\\boxed{}`` that was to be literal and would swallow the problem.
    """
    template = Template(read_text(path, where), ("",), f"{where}={path}")
    if template.count("") == 0:
        raise UserError(f"{where}={path} has no {{}}: put one where the problem goes")
    if template.count("") > 1:
        raise UserError(
            f"{where}={path} has {template.count('')} {{}}: keep the problem's, write literal ones as {{{{}}}}"
        )
    return template
