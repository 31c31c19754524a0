"""Texts with placeholders: prompt files ({}) and the teacher's templates ({problem}, {trace}, {column})."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from distill.errors import UserError, any_of

_TEACHER_KEY = "distillation.context_distillation.teacher_prefix_template"
_WORD = re.compile(r"\{([A-Za-z_]\w*(?:[.!:\[][^{}]*)?)\}")
"""Matches a word in braces, also with a ``str.format`` suffix (.attribute, [index], !conversion or :format)."""
_COLUMN = r"[A-Za-z_]\w*(?:\.\w+)*"
"""Matches the name of a dataset's column, or a dotted path to a nested value."""
_LITERAL = re.compile(r"\{([^{}\n]+)\}")
TEACHER_NAMES = ("problem", "trace")
"""Placeholders of the teacher's templates that are not names of columns."""
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Temporary replacements of literal { and } during parsing: code points that Unicode reserves for internal use."""


class Template:
    """A text with placeholders: ``{name}`` for each of ``names``, or ``{}`` for the name "".

    Any other word in single braces raises UserError. With ``columns``, names of columns and dotted paths are also
    placeholders, except paths that begin with one of ``names``. A matching pair of doubled braces becomes a pair of
    literal single braces: ``{{word}}`` becomes ``{word}``, and ``{{}}`` becomes ``{}``. All other braces, including
    unpaired doubled braces, are literal and stay as written. For messages: ``key``, the configuration key that sets the
    text or its file, and ``path``, the file; None if ``key`` sets the text itself.
    """

    def __init__(
        self, text: str, names: Sequence[str], key: str, path: str | None = None, columns: bool = False
    ) -> None:
        name = _COLUMN if columns else "|".join(map(re.escape, names))
        doubled = re.compile(rf"(?<!\{{)((?:\{{\{{)*)\{{\{{((?:[^{{}}]|\{{(?:{name})\}})*)\}}\}}")
        while (marked := doubled.sub(rf"\1{_OPEN}\2{_CLOSE}", text)) != text:  # innermost braces first
            text = marked
        for word in _WORD.finditer(text):
            is_column = columns and re.fullmatch(_COLUMN, word.group(1)) and word.group(1).split(".")[0] not in names
            if word.group(1) not in names and not is_column:
                setting = key if path is None else f"{key}={path}"
                known = [f"{{{name}}}" for name in names] + ["the name of a column in braces"] * columns
                line = text.count("\n", 0, word.start()) + 1
                raise UserError(
                    f"{setting} has the unknown placeholder {word.group()} on line {line}",
                    f"write {any_of(known)}, or {{{word.group()}}} for literal text",
                    key=key,
                    value=word.group() if path is None else path,
                )
        self._pieces = re.split(rf"\{{({name})\}}", text)
        """Literal texts at even indices, names of placeholders at odd indices."""
        self.literals = tuple(dict.fromkeys(w.strip() for t in self._pieces[::2] for w in _LITERAL.findall(t)))
        """Texts in single braces that are no placeholders, such as 1 in ``\\frac{1}{2}``."""
        self._pieces[::2] = [literal.replace(_OPEN, "{").replace(_CLOSE, "}") for literal in self._pieces[::2]]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the placeholders in the text, each once."""
        return tuple(dict.fromkeys(self._pieces[1::2]))

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

    Its placeholders are {problem}, {trace} and names of columns. Raises UserError for a placeholder of another form,
    and if the text has neither {problem} nor a column.
    """
    template = Template(text, TEACHER_NAMES, _TEACHER_KEY, columns=True)
    if not template.count("problem") and not set(template.names) - set(TEACHER_NAMES):
        raise UserError(
            f"{_TEACHER_KEY} does not contain {{problem}}",
            "add {problem}, because otherwise the teacher does not read the problem",
            key=_TEACHER_KEY,
            value=text,
        )
    return template
