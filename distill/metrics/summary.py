"""Format metrics as text: one console line per step or validation, and a table at the end of a run."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from distill.metrics.phases import OUTSIDE_THROUGHPUT, PHASES, TIMING, timing_tag

Row = Mapping[str, float | None]
"""One row of metrics.jsonl: maps "step" and metric names to values; None replaces nan and infinity."""

_VALIDATION = "validation/"


def is_validation(names: Iterable[str]) -> bool:
    """Return whether metrics with these names belong to a validation instead of a training step."""
    return any(name.startswith(_VALIDATION) for name in names)


def console_line(step: int, total_steps: int, values: Mapping[str, float]) -> str:
    """Return the console line of a step; metrics that were not measured are omitted."""
    part = partial(_part, values)
    phases = " ".join(
        f"{phase} {seconds:.1f}" for phase in PHASES if (seconds := values.get(timing_tag(phase), 0.0)) >= 0.05
    )
    parts = [
        f"step {step}/{total_steps}",
        f"loss {values.get('train/loss', math.nan):.4f}",
        part("KL fwd {:.4f} rev {:.4f}", "train/forward_kl", "train/reverse_kl"),
        part("response length {:.1f}", "train/mean_gen_tokens_per_sample"),
        part("truncated {:.0%}", "train/truncation_rate"),
        part("grad {:.3g}", "train/grad_norm"),
        part("lr {:.2e}", "train/lr"),
        part("{:.0f} tok/s/rank", "train/tokens_per_sec_per_gpu"),
        part("{:.1f} s", TIMING + "total_step_time") + (f" ({phases})" if phases else ""),
    ]
    return "  ".join(text for text in parts if text)


def validation_line(step: int, total_steps: int, values: Mapping[str, float]) -> str:
    """Return the console line of a validation; metrics that were not measured are omitted."""
    part = partial(_part, values)
    parts = [
        f"validation at {step}/{total_steps}",
        part("accuracy {:.1%}", "validation/accuracy") + part(" +- {:.1%}", "validation/accuracy_stderr"),
        part("(in context {:.1%}", "validation/in_context_accuracy")
        + part(" +- {:.1%}", "validation/in_context_accuracy_stderr")
        + part(")", "validation/in_context_accuracy"),
        part("KL fwd {:.4f} rev {:.4f}", "validation/forward_kl", "validation/reverse_kl"),
        part("response length {:.1f}", "validation/avg_length"),
        part("truncated {:.0%}", "validation/truncation_rate"),
        part("{:.0f} responses to {:.0f} problems", "validation/num_answers", "validation/num_problems"),
        part("{:.1f} s", "timing/validation/total_validation_time"),
    ]
    return "  ".join(text for text in parts if text)


def _part(values: Mapping[str, float], form: str, *names: str) -> str:
    """Return the format string ``form`` filled with the named values; empty if a value is missing or nan."""
    numbers = [values.get(name, math.nan) for name in names]
    return "" if any(math.isnan(value) for value in numbers) else form.format(*numbers)


def summary(runs: Mapping[str, tuple[Sequence[Row], Path]]) -> str:
    """Return a table of the main metrics as text, with one column per run.

    ``runs`` maps each run's name to its rows of metrics.jsonl and its run directory. Metrics without a value in any run
    are omitted. Paths inside the working directory are printed as relative paths.
    """
    labels = ["", "steps"]
    columns = [[name, str(sum(not is_validation(row) for row in rows))] for name, (rows, _) in runs.items()]

    def line(label: str, cells: Iterable[str]) -> None:
        texts = list(cells)
        if any(texts):
            labels.append(label)
            for column, cell in zip(columns, texts, strict=True):
                column.append(cell or "-")

    tables = [rows for rows, _ in runs.values()]
    line("loss, first and last", (_ends(rows, "train/loss", "{:.4f}") for rows in tables))
    line("forward KL", (_ends(rows, "train/forward_kl", "{:.4f}") for rows in tables))
    line("reverse KL", (_ends(rows, "train/reverse_kl", "{:.4f}") for rows in tables))
    line("validation accuracy", (_ends(rows, "validation/accuracy", "{:.1%}") for rows in tables))
    line("  in context", (_ends(rows, "validation/in_context_accuracy", "{:.1%}", first=False) for rows in tables))
    line("validation forward KL", (_ends(rows, "validation/forward_kl", "{:.4f}") for rows in tables))
    line("response length, mean", (_ends(rows, "train/mean_gen_tokens_per_sample", "{:.1f}") for rows in tables))
    line("response length, longest", (_ends(rows, "train/max_gen_tokens_per_sample", "{:.0f}") for rows in tables))
    line("truncated responses", (_ends(rows, "train/truncation_rate", "{:.0%}") for rows in tables))
    line("tokens/s per rank, median", (_median(rows, "train/tokens_per_sec_per_gpu", "{:.0f}") for rows in tables))
    line("seconds per step, median", (_median(rows, TIMING + "total_step_time", "{:.2f}") for rows in tables))
    for phase in PHASES:
        least = 0.005 if phase in OUTSIDE_THROUGHPUT else 0.0  # excludes steps without validation or checkpoint
        line(f"  {phase}", (_median(rows, timing_tag(phase), "{:.2f}", least) for rows in tables))
    line("run directory", (_relative(folder) for _, folder in runs.values()))
    return _columns([labels, *columns])


def _values(rows: Sequence[Row], name: str) -> list[float]:
    return [value for row in rows if (value := row.get(name)) is not None]


def _ends(rows: Sequence[Row], name: str, form: str, first: bool = True) -> str:
    """Return a metric's first and last value as ``FIRST -> LAST``; if not ``first``, only the last value."""
    values = _values(rows, name)
    start = f"{form.format(values[0])} -> " if values and first else ""
    return f"{start}{form.format(values[-1])}" if values else ""


def _median(rows: Sequence[Row], name: str, form: str, least: float = 0.0) -> str:
    values = [value for value in _values(rows, name) if value >= least]
    return form.format(statistics.median(values)) if values else ""


def _relative(folder: Path) -> str:
    relative = os.path.relpath(folder)
    return str(folder) if relative.startswith("..") else relative


def _columns(columns: Sequence[Sequence[str]]) -> str:
    """Return a table as text with aligned columns; ``columns``: the texts of the cells of each column."""
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in lines)
