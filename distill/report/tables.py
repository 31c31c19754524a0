"""Curves of a run as columns: one table for training steps, one for validations, and KL by position."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from distill.metrics.names import timing_tag
from distill.report.numbers import bin_edges, ks_of, pass_at, quantile
from distill.report.read import RunFiles, number
from distill.report.samples import SampleSet

MOST_ROWS = 2000
"""Most rows of a table; of more rows, those with the lowest and highest loss of each interval are kept."""
FORECAST = "forecast/"
"""Prefix of the names of predicted values in a page; the rest of the name is that of the measured value."""
_PREDICTED = re.compile(r"memory/predicted_(\w+)")
"""Names of predicted memory in metrics.jsonl."""
_PASS_AT = re.compile(r"validation/(pass@\d+(?:_stderr)?)")
"""Names of pass@k over all problems in metrics.jsonl."""
_NO_METRICS = ("step", "timestamp")
_QUANTILES = {"length_p10": 0.1, "length_p50": 0.5, "length_p90": 0.9}


def tables(run: RunFiles, sets: Sequence[SampleSet]) -> dict[str, Any]:
    """Return the tables of training and validation: steps, tokens, hours, and each metric as a column."""
    rows = _with_axes(run)
    measured = {each.step: from_samples(each) for each in sets if each.kind == "validation"}
    known = {row["step"] for row in run.validation}
    validations = [*run.validation, *({"step": step} for step in measured if step not in known)]
    axes = {row["step"]: (row["tokens"], row["hours"]) for row in rows}
    shown = []
    for row in sorted(validations, key=lambda row: int(row["step"])):
        tokens, hours = axes.get(int(row["step"]), (0, 0.0) if not int(row["step"]) else (None, None))
        shown.append({**_renamed(row), **measured.get(int(row["step"]), {}), "tokens": tokens, "hours": hours})
    return {"train": _columns(_thinned([_renamed(row) for row in rows])), "validation": _columns(shown)}


def _renamed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with the page's names of predicted values and of pass@k."""

    def renamed(name: str) -> str:
        if match := _PREDICTED.fullmatch(name):
            return f"{FORECAST}memory/{match[1]}"
        return match[1] if (match := _PASS_AT.fullmatch(name)) else name

    return {renamed(name): value for name, value in row.items()}


def _with_axes(run: RunFiles) -> list[dict[str, Any]]:
    """Return the rows of training steps with the number of tokens and of hours up to each step."""
    found, tokens, seconds = [], 0.0, 0.0
    for row in run.train:
        tokens = number(row.get("progress/total_tokens")) or tokens + (number(row.get("train/total_num_tokens")) or 0.0)
        seconds += number(row.get(timing_tag("total_step_time"))) or 0.0
        found.append({**row, "step": int(row["step"]), "tokens": tokens, "hours": seconds / 3600})
    return found


def totals(run: RunFiles) -> tuple[float, float]:
    """Return the number of tokens and of hours of all steps."""
    rows = _with_axes(run)
    return (rows[-1]["tokens"], rows[-1]["hours"]) if rows else (0.0, 0.0)


def from_samples(each: SampleSet) -> dict[str, float | None]:
    """Return pass@k with its standard error, and quantiles of the response length, of one validation."""
    verdicts = list(each.verdicts().values())
    found: dict[str, float | None] = {}
    for k in ks_of(verdicts):
        if estimate := pass_at(verdicts, k):
            found[f"pass@{k}"], found[f"pass@{k}_stderr"] = estimate
    lengths = [sample.tokens for sample in each.samples]
    return found | {name: quantile(lengths, fraction) for name, fraction in _QUANTILES.items()}


def positions(sets: Sequence[SampleSet]) -> dict[str, Any] | None:
    """Return the mean KL of each bin of positions, one curve per validation; None without a measured KL."""
    measured = [each for each in sets if each.kind == "validation" and each.forward.counts]
    bins = max((len(each.forward.counts) for each in measured), default=0)
    if not bins:
        return None
    curves = [
        {
            "step": each.step,
            "forward": [_short(value) for value in each.forward.means(bins)],
            "reverse": [_short(value) for value in each.reverse.means(bins)],
            "count": [*each.forward.counts, *[0] * (bins - len(each.forward.counts))],
        }
        for each in measured
    ]
    return {"edges": [0, *(bin_edges(i)[1] for i in range(bins))], "curves": curves}


def _thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return at most about MOST_ROWS rows; peaks of the loss and the first and last row are kept."""
    if len(rows) <= MOST_ROWS:
        return rows
    width = -(-2 * len(rows) // MOST_ROWS)
    kept = {0, len(rows) - 1}
    for start in range(0, len(rows), width):
        interval = range(start, min(start + width, len(rows)))
        kept |= {min(interval, key=lambda i: _loss(rows[i])), max(interval, key=lambda i: _loss(rows[i]))}
    return [rows[i] for i in sorted(kept)]


def _loss(row: Mapping[str, Any]) -> float:
    loss = number(row.get("train/loss"))
    return float("inf") if loss is None else loss  # a loss that is not finite is the highest


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the rows as columns; metrics without any finite value are omitted."""
    axes = ("tokens", "hours")
    names = [name for name in {name: None for row in rows for name in row} if name not in (*_NO_METRICS, *axes)]
    series = {name: [_short(number(row.get(name))) for row in rows] for name in names}
    return {
        "step": [int(row["step"]) for row in rows],
        **{axis: [_short(row[axis]) for row in rows] for axis in axes},
        "series": {name: values for name, values in series.items() if any(value is not None for value in values)},
    }


def _short(value: float | None) -> float | None:
    """Return ``value`` with six significant digits, to save bytes."""
    return None if value is None else float(f"{value:.6g}")
