"""Results of a probe as text, JSON values and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from distill.validation.probe_advice import Lengths, Recommendation
from distill.validation.probe_stats import CandidateResult, Cell, Estimate, Tenth

_HEADER = ("candidate", "start", "accuracy", "student", "difference", "", "responses", "truncated", "length")


def as_text(step: int, results: Sequence[CandidateResult], lengths: Lengths, advice: Recommendation) -> str:
    """Return the tables and the recommendation as text."""
    rows = [_HEADER, *(_row(result, cell) for result in results for cell in result.cells)]
    parts = [
        f"Probe of the student after {step} steps: accuracy of responses that a candidate continues from a start (share"
        " of the student's response that is kept), and of the student's own continuations from there. Errors: one"
        " standard error, clustered by problem; *: more than two standard errors of the paired difference.",
        _table(rows),
        *(
            f"{result.name}: {result.skipped} problems lack a column or are too long"
            for result in results
            if result.skipped
        ),
        *_position_tables(results),
        "\n".join(["Recommendation", *(f"- {sentence}" for sentence in advice.sentences)]),
    ]
    if advice.lines:
        parts.append("\n".join(["Settings to copy", *(f"  {line}" for line in advice.lines)]))
    return "\n\n".join(parts)


def _row(result: CandidateResult, cell: Cell) -> tuple[str, ...]:
    difference = cell.difference
    is_clear = difference.stderr is not None and abs(difference.mean) > 2 * difference.stderr
    return (
        *(result.name, f"{cell.start}%", _percent(cell.accuracy), _percent(cell.student_accuracy)),
        *(_percent(difference, "+"), "*" if is_clear else "", f"{cell.responses} of {cell.problems}"),
        f"{cell.truncated:.0%} ({cell.student_truncated:.0%})",
        f"{cell.avg_length:.0f} ({cell.student_avg_length:.0f})",
    )


def _percent(estimate: Estimate, sign: str = "") -> str:
    error = "?" if estimate.stderr is None else f"{100 * estimate.stderr:.1f}"
    return f"{100 * estimate.mean:{sign}.1f} +- {error}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _position_tables(results: Sequence[CandidateResult]) -> Iterable[str]:
    compared = [result for result in results if result.tenths]
    quantities: tuple[tuple[str, Callable[[Tenth], float | None]], ...] = (
        ("KL(candidate || student) in nats", lambda tenth: tenth.forward_kl),
        ("Top-k overlap of candidate and student", lambda tenth: tenth.topk_overlap),
    )
    for title, value_of in quantities:
        rows = [(result.name, [value_of(tenth) for tenth in result.tenths]) for result in compared]
        if any(value is not None for _, values in rows for value in values):
            head = ["tenth of the response", *map(str, range(1, 11))]
            cells = [[name, *("-" if value is None else f"{value:.3f}" for value in values)] for name, values in rows]
            yield f"{title}, mean over the tokens of each tenth of the student's responses\n{_table([head, *cells])}"


def as_json(step: int, results: Sequence[CandidateResult], lengths: Lengths, advice: Recommendation) -> dict[str, Any]:
    """Return all results as JSON values; numbers that are not finite are None."""
    found = {
        "step": step,
        "lengths": asdict(lengths),
        "candidates": [asdict(result) for result in results],
        "recommendation": asdict(advice),
    }
    return dict(_finite(found))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_metrics(results: Sequence[CandidateResult]) -> dict[str, float]:
    """Return the metrics validation/probe/start_N/NAME of a run with one candidate, the run's teacher."""
    values: dict[str, float] = {}
    for cell in (cell for result in results for cell in result.cells):
        prefix = f"validation/probe/start_{cell.start}/"
        for name in ("accuracy", "student_accuracy", "difference"):
            estimate: Estimate = getattr(cell, name)
            values[prefix + name] = estimate.mean
            if estimate.stderr is not None:
                values[f"{prefix}{name}_stderr"] = estimate.stderr
        values[f"{prefix}truncation_rate"] = cell.truncated
        values[f"{prefix}avg_length"] = cell.avg_length
    return values
