"""Check the rows of a dataset that has been read: gold answers, mixed problems, empty texts for the teacher."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from distill.config.template import TEACHER_NAMES
from distill.data.columns import Columns, setting_error
from distill.data.table import ProblemTable
from distill.errors import UserError

log = logging.getLogger(__name__)

Found = Sequence[tuple[ProblemTable, Sequence[int]]]
"""Pairs (table, numbers of the rows with a problem text)."""


def check_rows(found: Found, columns: Columns) -> None:
    """Check all rows of a dataset; raise UserError or log a warning, as described at each check."""
    _check_mixture(found, columns)
    _check_matches(found, columns)
    _check_unread(found, columns)
    _warn_of_empty(found, columns)


def log_golds(found: Found, columns: Columns, grader: str | None) -> None:
    """Log that assistant messages are the gold answers, if no output_key is set and they are graded."""
    own = columns.reference is None or columns.reference.kind == "message"
    if grader is None or columns.answer_required or not own:
        return
    if any(table.own_golds() for table, _ in found):
        log.info("gold answers of %s are the last assistant messages, graded with %s", columns.key, grader)


def _check_unread(found: Found, columns: Columns) -> None:
    """Check that the dataset has no column that a template names in braces without reading it.

    Raises UserError for a literal text in braces that is the name of a column, and warns of a column problem or trace.
    """
    for i, column in enumerate(columns.extra):
        rows = sum(len(kept) for _, kept in found)
        if column.kind != "unread" or sum(len(t.null_rows(f"column {i}", kept)) for t, kept in found) == rows:
            continue
        word = f"{{{column.name}}}"
        if column.name not in TEACHER_NAMES:
            raise UserError(
                f"{column.key} has {word} as literal text, but {columns.source} has a column of this name, and names in"
                " braces may have only letters, digits, underscores and dots",
                f"rename the column, or write {{{word}}} for literal text",
                key=column.key,
                value=word,
            )
        log.warning("%s: %s", column.key, _SHADOWED[column.name] % columns.source)


_SHADOWED = {
    "problem": "{problem} is the problem of input_key, not the column problem of %s: rename the column to use it",
    "trace": "{trace} is not the column trace of %s: set distillation.context_distillation.trace_source=static_dataset"
    " and static_trace.answer_column=trace to use this column as the trace",
}
"""Maps the placeholders of the teacher's template to the warning if the dataset has an unused column of this name."""


def _check_mixture(found: Found, columns: Columns) -> None:
    """Raise UserError if some problems are conversations and others are plain texts.

    A row that should be a conversation would otherwise be read as the text of its JSON.
    """
    texts = [(table, row) for table, kept in found for row in table.null_rows("messages", kept)]
    if not texts or len(texts) == sum(len(kept) for _, kept in found):
        return
    table, row = texts[0]
    raise setting_error(
        *(f"{columns.key}.input_key", columns.input_key),
        f"has conversations in some rows and a plain text in {table.location(row)}",
        "write a list of messages with role and content in every row",
    )


def _check_matches(found: Found, columns: Columns) -> None:
    """Raise UserError if output_pattern matches no gold answer; log a warning if it matches only some.

    output_pattern is the regular expression that extracts the gold answer from its column.
    """
    unmatched = [(table, row) for table, kept in found for row in table.without_match(kept)]
    if not unmatched:
        return
    table, row = unmatched[0]
    key, pattern = f"{columns.key}.output_pattern", columns.output_pattern or ""
    if not any(table.problem(row).answer for table, kept in found for row in kept):
        raise setting_error(
            *(key, pattern),
            f"matches no gold answer in the column {columns.output_key} of {columns.source} (first row:"
            f" {table.location(row)})",
            "correct the pattern, or set it to null if the column contains only gold answers",
        )
    log.warning(
        "%s=%s matches nothing in the gold-answer column of %d of %d problems (first: %s), so these problems have no"
        " gold answer: correct the pattern, or correct these rows",
        *(key, pattern, len(unmatched), sum(len(kept) for _, kept in found), table.location(row)),
    )


def _warn_of_empty(found: Found, columns: Columns) -> None:
    """Log a warning for each column of a template that is null or empty in some rows, because it fills with ""."""
    for i, column in enumerate(columns.extra):
        if column.kind != "placeholder":
            continue
        empty = [(table, row) for table, kept in found for row in table.empty_rows(f"column {i}", kept)]
        if empty:
            table, row = empty[0]
            log.warning(
                "%s: {%s} is replaced by an empty text for %d of %d problems, because the column %s is null or empty"
                " (first: %s): correct these rows, or remove them",
                *(column.key, column.name, len(empty), sum(len(kept) for _, kept in found)),
                *(column.name, table.location(row)),
            )
