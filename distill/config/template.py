"""Texts with placeholders: prompt files ({}) and the teacher's template ({problem}, {trace})."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from distill.errors import UserError, any_of

_TEACHER_KEY = "distillation.context_distillation.teacher_prefix_template"
_WORD = re.compile(r"\{([A-Za-z_]\w*(?:[.!:\[][^{}]*)?)\}")
"""Matches a word in braces, also with a ``str.format`` suffix (.attribute, [index], !conversion or :format)."""
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Temporary replacements of literal { and } during parsing: code points that Unicode reserves for internal use."""


class Template:
    """A text with placeholders: ``{name}`` for each of ``names``, or ``{}`` for the name "".

    Any other word in single braces raises UserError. A matching pair of doubled braces becomes a pair of literal single
    braces: ``{{word}}`` becomes ``{word}``, and ``{{}}`` becomes ``{}``. All other braces, including unpaired doubled
    braces, are literal and stay as written. For messages: ``key``, the configuration key that sets the text or its
    file, and ``path``, the file; None if ``key`` sets the text itself.
    """

    def __init__(self, text: str, names: Sequence[str], key: str, path: str | None = None) -> None:
        name = "|".join(map(re.escape, names))
        doubled = re.compile(rf"(?<!\{{)((?:\{{\{{)*)\{{\{{((?:[^{{}}]|\{{(?:{name})\}})*)\}}\}}")
        while (marked := doubled.sub(rf"\1{_OPEN}\2{_CLOSE}", text)) != text:  # innermost braces first
            text = marked
        for word in _WORD.finditer(text):
            if word.group(1) not in names:
                setting = key if path is None else f"{key}={path}"
                line = text.count("\n", 0, word.start()) + 1
                raise UserError(
                    f"{setting} has the unknown placeholder {word.group()} on line {line}",
                    f"write {any_of(f'{{{name}}}' for name in names)}, or {{{word.group()}}} for literal text",
                    key=key,
                    value=word.group() if path is None else path,
                )
        self._pieces = re.split(rf"\{{({name})\}}", text)
        """Literal texts at even indices, names of placeholders at odd indices."""
        self._pieces[::2] = [literal.replace(_OPEN, "{").replace(_CLOSE, "}") for literal in self._pieces[::2]]

    def count(self, name: str) -> int:
        """Return how often the text contains the placeholder ``{name}``."""
        return self._pieces[1::2].count(name)

    def fill(self, values: Mapping[str, str]) -> str:
        """Return the text with its placeholders filled.

        ``values`` maps the name of each placeholder to its text. Braces in these texts are literal.
        """
        return "".join(values[piece] if i % 2 else piece for i, piece in enumerate(self._pieces))


def teacher_template(text: str) -> Template:
    """Parse ``text``, the value of teacher_prefix_template, from which the teacher's prompts are built.

    Raises UserError if {problem} is missing, or if the text has a placeholder other than {problem} and {trace}.
    """
    template = Template(text, ("problem", "trace"), _TEACHER_KEY)
    if not template.count("problem"):
        raise UserError(
            f"{_TEACHER_KEY} does not contain {{problem}}",
            "add {problem}, because otherwise the teacher does not read the problem",
            key=_TEACHER_KEY,
            value=text,
        )
    return template


def reads_traces(template: str) -> bool:
    """Return whether the teacher's prompts contain traces; ``template``: the value of teacher_prefix_template."""
    return teacher_template(template).count("trace") > 0
