"""Texts with placeholders: prompt files (``{}``) and the teacher's template (``{problem}``, ``{trace}``)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from distill.errors import UserError, any_of

_TEACHER_KEY = "distillation.context_distillation.teacher_prefix_template"
_WORD = re.compile(r"\{([A-Za-z_]\w*(?:[.!:\[][^{}]*)?)\}")
"""A word in braces, with the attribute, index, conversion or format that ``str.format`` allows after it."""
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Literal braces while a text is split. Unicode reserves both code points for internal use."""


class Template:
    """A text with placeholders ``{name}``, one for each of ``names`` ("" is ``{}``).

    A word in braces that is not among ``names`` raises UserError. Doubled braces become literal braces: ``{{word}}`` is
    ``{word}``. All other braces are literal. ``key`` is the configuration key of the text, or of the file ``path`` with
    the text.
    """

    def __init__(self, text: str, names: Sequence[str], key: str, path: str | None = None) -> None:
        name = "|".join(map(re.escape, names))
        doubled = re.compile(rf"(?<!\{{)\{{\{{((?:[^{{}}]|\{{(?:{name})\}})*)\}}\}}")
        while (marked := doubled.sub(rf"{_OPEN}\1{_CLOSE}", text)) != text:  # innermost braces first
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
        """Literal text and names of placeholders in turn."""
        self._pieces[::2] = [literal.replace(_OPEN, "{").replace(_CLOSE, "}") for literal in self._pieces[::2]]

    def count(self, name: str) -> int:
        """Return the number of placeholders ``name``."""
        return self._pieces[1::2].count(name)

    def fill(self, values: Mapping[str, str]) -> str:
        """Return the text with each placeholder replaced by its value; braces in values have no meaning."""
        return "".join(values[piece] if i % 2 else piece for i, piece in enumerate(self._pieces))


def teacher_template(text: str) -> Template:
    """Parse the teacher's template; raises UserError if it has no ``{problem}``."""
    template = Template(text, ("problem", "trace"), _TEACHER_KEY)
    if not template.count("problem"):
        raise UserError(
            f"{_TEACHER_KEY} has no {{problem}}",
            "add it, or the teacher does not see the problem",
            key=_TEACHER_KEY,
            value=text,
        )
    return template
