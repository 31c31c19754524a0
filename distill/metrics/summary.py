"""Format metrics as text: one console line per step or validation, and the table and paths at the end of a run."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from distill.data.teacher_prefix import TRACE_COVERAGE
from distill.metrics.names import OUTSIDE_THROUGHPUT, PHASES, TIMING, timing_tag
from distill.supervise.quantities import duration, short_count

Row = Mapping[str, float | None]
"""One row of metrics.jsonl: maps "step" and metric names to values; None replaces nan and infinity."""

_VALIDATION = "validation/"
_ALARM = "alarm/"
_STEP_TIME = timing_tag("total_step_time")
WIDTH = 111
"""Maximum number of characters of a console line: 120 with the time of day."""


def is_validation(names: Iterable[str]) -> bool:
    """Return whether metrics with these names belong to a validation instead of a training step."""
    return any(name.startswith(_VALIDATION) for name in names)


def console_line(
    step: int, total_steps: int, values: Mapping[str, float], left_s: float = math.nan, shows_traces: bool = False
) -> str:
    """Return the console line of a step; metrics that were not measured are omitted.

    ``left_s``: estimated time until the last step, in seconds. ``shows_traces``: whether to show the fraction of
    responses with a trace for the teacher.
    """
    part = partial(_part, values)
    tokens = _tokens_per_second(values)
    traces = part("trace {:.0%}", f"train/{TRACE_COVERAGE}") if shows_traces else ""
    parts = [
        (0, f"step {step}/{total_steps}"),
        (0, f"loss {values.get('train/loss', values.get('train/off_policy_loss', math.nan)):.4f}"),
        (3, part("grad {:.3g}", "train/grad_norm")),
        (1, part("length {:.0f}", "train/mean_gen_tokens_per_sample")),
        (1, part("truncated {:.0%}", "train/truncation_rate")),
        (0, traces),
        (0, _alarms(values)),
        (2, f"{short_count(tokens)} tok/s" if tokens else ""),
        (0, part("{:.1f} s", _STEP_TIME)),
        (0, part("{:.1f} GiB", "memory/peak_gib")),
        (0, "" if math.isnan(left_s) or step == total_steps else f"ETA {duration(left_s)}"),
    ]
    return _joined(parts)


def _tokens_per_second(values: Mapping[str, float]) -> float:
    """Return the tokens/s of a step over all ranks, without the time of validation and checkpoints."""
    seconds = values.get(_STEP_TIME, 0.0) - sum(values.get(timing_tag(phase), 0.0) for phase in OUTSIDE_THROUGHPUT)
    return values.get("train/total_num_tokens", 0.0) / seconds if seconds > 0 else 0.0


def validation_line(step: int, total_steps: int, values: Mapping[str, float]) -> str:
    """Return the console line of a validation; metrics that were not measured are omitted."""
    part = partial(_part, values)
    in_context = part("(in context {:.1%}", "validation/in_context_accuracy")
    in_context += part(" +- {:.1%}", "validation/in_context_accuracy_stderr")
    at_end = part("(in context now {:.1%}", "validation/in_context_at_end_accuracy")
    at_end += part(" +- {:.1%}", "validation/in_context_at_end_accuracy_stderr")
    parts = [
        (0, f"validation at {step}/{total_steps}"),
        (0, part("accuracy {:.1%}", "validation/accuracy") + part(" +- {:.1%}", "validation/accuracy_stderr")),
        (0, in_context + part(")", "validation/in_context_accuracy")),
        (0, at_end + part(")", "validation/in_context_at_end_accuracy")),
        (1, part("KL fwd {:.4f} rev {:.4f}", "validation/forward_kl", "validation/reverse_kl")),
        (1, part("probe from 0% {:+.1%}", "validation/probe/start_0/difference")),
        (2, part("length {:.0f}", "validation/avg_length")),
        (2, part("truncated {:.0%}", "validation/truncation_rate")),
        (3, part("{:.0f} responses to {:.0f} problems", "validation/num_answers", "validation/num_problems")),
        (0, _alarms(values)),
        (0, part("{:.1f} s", "timing/validation/total_validation_time")),
    ]
    return _joined(parts)


def _alarms(values: Mapping[str, float]) -> str:
    """Return the names of the active alarms as text; empty without any."""
    active = [name.removeprefix(_ALARM) for name, value in values.items() if name.startswith(_ALARM) and value]
    return f"alarm: {', '.join(active)}" if active else ""


def _joined(parts: Sequence[tuple[int, str]]) -> str:
    """Return the texts in one line of at most WIDTH characters.

    ``parts``: pairs of priority and text, in the order of the line. If the line is too long, parts with the largest
    priority numbers are omitted first; parts of priority 0 are always kept.
    """
    kept = [part for part in parts if part[1]]
    while len(line := "  ".join(text for _, text in kept)) > WIDTH and (least := max(number for number, _ in kept)):
        kept = [part for part in kept if part[0] < least]
    return line


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
    at_end = "validation/in_context_at_end_accuracy"
    line("  in context, at the end", (_ends(rows, at_end, "{:.1%}", first=False) for rows in tables))
    line("validation forward KL", (_ends(rows, "validation/forward_kl", "{:.4f}") for rows in tables))
    line("response length, mean", (_ends(rows, "train/mean_gen_tokens_per_sample", "{:.1f}") for rows in tables))
    line("response length, longest", (_ends(rows, "train/max_gen_tokens_per_sample", "{:.0f}") for rows in tables))
    line("truncated responses", (_ends(rows, "train/truncation_rate", "{:.0%}") for rows in tables))
    line("alarms", (_alarm_steps(rows) for rows in tables))
    line("tokens/s per rank, median", (_median(rows, "train/tokens_per_sec_per_gpu", "{:.0f}") for rows in tables))
    line("seconds per step, median", (_median(rows, TIMING + "total_step_time", "{:.2f}") for rows in tables))
    for phase in PHASES:
        least = 0.005 if phase in OUTSIDE_THROUGHPUT else 0.0  # excludes steps without validation or checkpoint
        line(f"  {phase}", (_median(rows, timing_tag(phase), "{:.2f}", least) for rows in tables))
    line("MFU of training, median", (_median(rows, "throughput/mfu", "{:.1%}") for rows in tables))
    line("peak memory per rank, GiB", (_largest(rows, "memory/peak_gib", "{:.1f}") for rows in tables))
    line("time of all steps", (_total(rows, _STEP_TIME, duration) for rows in tables))
    line("tokens of all steps", (_total(rows, "train/total_num_tokens", short_count) for rows in tables))
    line("run directory", (relative_path(folder) for _, folder in runs.values()))
    return _columns([labels, *columns])


def _values(rows: Sequence[Row], name: str) -> list[float]:
    return [value for row in rows if (value := row.get(name)) is not None]


def _ends(rows: Sequence[Row], name: str, form: str, first: bool = True) -> str:
    """Return a metric's first and last value as ``FIRST -> LAST``; if not ``first``, only the last value."""
    values = _values(rows, name)
    start = f"{form.format(values[0])} -> " if values and first else ""
    return f"{start}{form.format(values[-1])}" if values else ""


def _alarm_steps(rows: Sequence[Row]) -> str:
    """Return each alarm with the first step at which it was active."""
    first: dict[str, int] = {}
    for row in rows:
        active = [name for name, value in row.items() if name.startswith(_ALARM) and value]
        first |= {name: int(row["step"] or 0) for name in active if name not in first}
    return ", ".join(f"{name.removeprefix(_ALARM)} from step {step}" for name, step in first.items())


def _median(rows: Sequence[Row], name: str, form: str, least: float = 0.0) -> str:
    values = [value for value in _values(rows, name) if value >= least]
    return form.format(statistics.median(values)) if values else ""


def _largest(rows: Sequence[Row], name: str, form: str) -> str:
    values = _values(rows, name)
    return form.format(max(values)) if values else ""


def _total(rows: Sequence[Row], name: str, text: Callable[[float], str]) -> str:
    values = _values(rows, name)
    return text(sum(values)) if values else ""


def relative_path(folder: Path) -> str:
    """Return the path as text; a path inside the working directory is relative to it."""
    relative = os.path.relpath(folder)
    return str(folder) if relative.startswith("..") else relative


def _columns(columns: Sequence[Sequence[str]]) -> str:
    """Return a table as text with aligned columns; ``columns``: the texts of the cells of each column."""
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in lines)


def ending(
    seconds: float,
    checkpoint: Path | None,
    stopped: bool,
    enabled: bool = True,
    page: Path | None = None,
    by_alarm: bool = False,
) -> str:
    """Return the lines below the table of a run: duration, checkpoint, export, and the next command.

    ``seconds``: duration of this start of the program. ``checkpoint``: the newest checkpoint; None if there is
    no checkpoint. ``stopped``: whether the run stopped before its last step. ``enabled``: checkpointing.enabled.
    ``page``: the page of the run; None if it was not written. ``by_alarm``: whether an alarm stopped the run.
    """
    exports = [] if checkpoint is None else [checkpoint / name for name in ("hf", "peft")]
    export = next((folder for folder in exports if folder.is_dir()), None)
    is_adapter = export is not None and export.name == "peft"
    if by_alarm:
        following = "look for the cause of the alarm before you continue: the same command continues the run"
    elif stopped and checkpoint is not None:
        following = "run the same command again to continue from this checkpoint"
    elif checkpoint is not None and (export is None or is_adapter):
        following = f"python -m scripts.export_hf {relative_path(checkpoint)} OUT{' --merge' if is_adapter else ''}"
    elif export is not None:
        call = f"pipeline('text-generation', '{relative_path(export)}')('Hello')"
        following = f'python -c "from transformers import pipeline; print({call})"'
    elif enabled:
        following = "run the same command again; it starts at step 0, because no checkpoint was saved before the stop"
    else:
        following = "set checkpointing.enabled=true to keep the weights of a run"
    name = "adapter (PEFT)" if is_adapter else "Hugging Face export"
    rows = {
        "time since the start": duration(seconds),
        "checkpoint": "not saved" if checkpoint is None else relative_path(checkpoint),
        name: "" if export is None else relative_path(export),
        "report": "" if page is None else relative_path(page),
        "next": following,
    }
    return _columns([[name for name, text in rows.items() if text], [text for text in rows.values() if text]])
