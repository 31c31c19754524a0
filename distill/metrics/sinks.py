"""Where a step's numbers go: the console, metrics.jsonl, TensorBoard, Weights & Biases; and the table at the end.

Only the main rank writes; on the others a Recorder has no sinks, so the loop need not ask which rank it is.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import statistics
import threading
import uuid
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from distill.config import LoggerConfig
from distill.errors import UserError, writing_run
from distill.metrics.step import OUTSIDE_THROUGHPUT

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
TIMING = "timing/train/"
VALIDATION = "validation/"

Row = Mapping[str, float | None]
"""One line of metrics.jsonl: ``step`` and the numbers; None for what was not finite."""

_SHORT_PHASES = {
    "data_processing": "data",
    "prepare_for_generation": "sync",
    "generation": "generate",
    "teacher_logprob_inference": "teacher",
    "policy_training": "train",
    "validation": "validate",
    "checkpointing": "save",
}


class Sink(Protocol):
    """A place that takes the numbers of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step, or of a validation of the weights after it, in order."""

    def show(self, step: int, texts: Sequence[str]) -> None:
        """Take a few texts of a validation, for readers; a place without room for texts leaves them out."""

    def close(self) -> None:
        """Finish; nothing is written afterwards."""


class JsonlSink:
    """metrics.jsonl: one JSON object a step, on disk when ``write`` returns; nan and inf are written as null.

    Lines after ``resumed_step`` (and a torn last one) belong to steps that will be done again: they are removed. Where
    there are none up to there, the file begins with ``history``.
    """

    def __init__(self, path: Path, resumed_step: int = 0, history: Sequence[Row] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept: Sequence[Row] = rows_until(path, resumed_step) or history
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in kept))
        part.replace(path)
        self._file = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the step's line and flush it."""
        row = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def show(self, step: int, texts: Sequence[str]) -> None:
        """Nothing: this file is for numbers."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """TensorBoard events; those after ``resumed_step`` are hidden when a run goes on from there.

    A new folder begins with ``history``.
    """

    def __init__(self, folder: Path, resumed_step: int = 0, history: Sequence[Row] = ()) -> None:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _without_tensorboards
        fresh = not folder.exists()
        self._writer: Any = SummaryWriter(str(folder), purge_step=None if fresh else resumed_step + 1)
        for row in history if fresh else ():
            self.write(int(row["step"] or 0), {n: v for n, v in row.items() if n != "step" and v is not None})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one scalar a name; what is not finite is left out."""
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def show(self, step: int, texts: Sequence[str]) -> None:
        """Write the texts under ``validation/sample_N``, as they are."""
        for i, text in enumerate(texts):
            self._writer.add_text(f"validation/sample_{i}", _verbatim(text), step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


def _without_tensorboards(args: threading.ExceptHookArgs) -> None:
    """Say nothing of an error of TensorBoard's thread, as on a full disk: the next write raises it again."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(args)


class WandbSink:
    """Weights & Biases; the run's id is kept in its folder, so that a resumed run goes on in the same curve.

    ``logger.wandb.mode`` or WANDB_MODE may say offline: then nothing leaves the machine.
    """

    def __init__(self, config: LoggerConfig, run_dir: Path, recipe: Mapping[str, Any]) -> None:
        import wandb

        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=config.wandb.project,
            name=config.wandb.name or run_dir.name,
            entity=config.wandb.entity,
            group=config.wandb.group,
            mode=config.wandb.mode,
            dir=str(run_dir),
            id=id_file.read_text().strip(),
            resume="allow",
            config=dict(recipe),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the step's numbers."""
        self._run.log(dict(values), step=step)

    def show(self, step: int, texts: Sequence[str]) -> None:
        """Nothing: the texts are in the run's folder."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class ConsoleSink:
    """One line a step in the log."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the step's line."""
        line = validation_line if _validates(values) else console_line
        log.info("%s", line(step, self._total, values))

    def show(self, step: int, texts: Sequence[str]) -> None:
        """Log the texts."""
        for text in texts:
            log.info("%s\n", text)

    def close(self) -> None:
        """Nothing to finish."""


class Recorder:
    """All sinks of a run as one.

    What can't be written to ``run_dir``, on a full disk say, is a UserError of the rank that writes.
    """

    def __init__(self, sinks: Sequence[Sink], run_dir: Path) -> None:
        self._sinks = tuple(sinks)
        self._writing = partial(writing_run, run_dir)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Write a finished step's numbers everywhere, or those of a validation after it; ``step`` counts from 1."""
        for sink in self._sinks:
            with self._writing():
                sink.write(step, values)

    def show(self, step: int, texts: Sequence[str]) -> None:
        """Show a few texts of the validation after ``step`` steps wherever there is room for them."""
        for sink in self._sinks:
            with self._writing():
                sink.show(step, texts)

    def close(self) -> None:
        """Close all sinks."""
        for sink in self._sinks:
            with self._writing():
                sink.close()


def open_recorder(
    config: LoggerConfig,
    run_dir: Path,
    *,
    main: bool,
    total_steps: int,
    resumed_step: int = 0,
    recipe: Mapping[str, Any] | None = None,
    history: Sequence[Row] = (),
) -> Recorder:
    """The run's recorder; every rank may call it, only the ``main`` one gets sinks.

    ``resumed_step`` is the last step that the loaded checkpoint holds (0: a fresh run); later lines are taken back.
    ``recipe`` is the resolved configuration, shown by Weights & Biases. ``history``: the rows up to there, for a run
    folder that has none. Raises UserError, on every rank, where wandb is
    asked for and missing. No collectives.
    """
    if config.wandb_enabled and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "logger.wandb_enabled=True needs the package wandb, which is not installed: pip install wandb, or set"
            " logger.wandb_enabled=False"
        )
    if not main:
        return Recorder([], run_dir)
    sinks: list[Sink] = [JsonlSink(run_dir / METRICS_FILE, resumed_step, history)]
    if config.tensorboard_enabled:
        sinks.append(TensorBoardSink(run_dir / TENSORBOARD_FOLDER, resumed_step, history))
    if config.wandb_enabled:
        sinks.append(WandbSink(config, run_dir, recipe or {}))
    return Recorder([*sinks, ConsoleSink(total_steps)], run_dir)


def console_line(step: int, total_steps: int, values: Mapping[str, float]) -> str:
    """The step in one line; what wasn't measured is left out."""
    part = partial(_part, values)
    phases = " ".join(
        f"{short} {values[TIMING + phase]:.1f}"
        for phase, short in _SHORT_PHASES.items()
        if values.get(TIMING + phase, 0.0) >= 0.05
    )
    parts = [
        f"step {step}/{total_steps}",
        f"loss {values.get('train/loss', math.nan):.4f}",
        part("KL fwd {:.4f} rev {:.4f}", "train/forward_kl", "train/reverse_kl"),
        part("length {:.1f}", "train/mean_gen_tokens_per_sample"),
        part("cut {:.0%}", "train/truncation_rate"),
        part("grad {:.3g}", "train/grad_norm"),
        part("lr {:.2e}", "train/lr"),
        part("{:.0f} tok/s/rank", "train/tokens_per_sec_per_gpu"),
        part("{:.1f} s", TIMING + "total_step_time") + (f" ({phases})" if phases else ""),
    ]
    return "  ".join(text for text in parts if text)


def validation_line(step: int, total_steps: int, values: Mapping[str, float]) -> str:
    """A validation in one line; what wasn't measured is left out."""
    part = partial(_part, values)
    parts = [
        f"validation at {step}/{total_steps}",
        part("accuracy {:.1%}", "validation/accuracy") + part(" +- {:.1%}", "validation/accuracy_stderr"),
        part("(in context {:.1%}", "validation/in_context_accuracy")
        + part(" +- {:.1%}", "validation/in_context_accuracy_stderr")
        + part(")", "validation/in_context_accuracy"),
        part("KL fwd {:.4f} rev {:.4f}", "validation/forward_kl", "validation/reverse_kl"),
        part("length {:.1f}", "validation/avg_length"),
        part("cut {:.0%}", "validation/truncation_rate"),
        part("{:.0f} answers to {:.0f} problems", "validation/num_answers", "validation/num_problems"),
        part("{:.1f} s", "timing/validation/total_validation_time"),
    ]
    return "  ".join(text for text in parts if text)


def _validates(values: Iterable[str]) -> bool:
    """Whether numbers of these names are a validation's, not a step's."""
    return any(name.startswith(VALIDATION) for name in values)


def _part(values: Mapping[str, float], form: str, *names: str) -> str:
    found = [values.get(name, math.nan) for name in names]
    return "" if any(math.isnan(value) for value in found) else form.format(*found)


def _verbatim(text: str) -> str:
    """A text that TensorBoard, which reads Markdown, shows as it is: an indented block."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """The lines of a metrics.jsonl; a torn last line (of a run that was killed) is left out."""
    rows = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise RuntimeError(f"{path}:{number} is not JSON: {line[:80]!r}") from None
    return rows


def rows_until(path: Path, step: int) -> list[dict[str, float | None]]:
    """The lines of the steps up to ``step``; none where there is no file."""
    return [row for row in read_metrics(path) if int(row["step"] or 0) <= step] if path.exists() else []


def summary(runs: Mapping[str, tuple[Sequence[Row], Path]]) -> str:
    """The table at the end: a column for each run, given as its rows and its folder by name; validations among them.

    KL first and last, lengths of answers, median seconds by phase, where the run folder is. Paths below the working
    folder are shown from there.
    """
    labels = ["", "steps"]
    columns = [[name, str(sum(not _validates(row) for row in rows))] for name, (rows, _) in runs.items()]

    def line(label: str, cells: Iterable[str]) -> None:
        found = list(cells)
        if any(found):
            labels.append(label)
            for column, cell in zip(columns, found, strict=True):
                column.append(cell or "-")

    tables = [rows for rows, _ in runs.values()]
    line("loss, first and last", (_ends(rows, "train/loss", "{:.4f}") for rows in tables))
    line("forward KL", (_ends(rows, "train/forward_kl", "{:.4f}") for rows in tables))
    line("reverse KL", (_ends(rows, "train/reverse_kl", "{:.4f}") for rows in tables))
    line("validation accuracy", (_ends(rows, "validation/accuracy", "{:.1%}") for rows in tables))
    line("  in context", (_ends(rows, "validation/in_context_accuracy", "{:.1%}", first=False) for rows in tables))
    line("validation forward KL", (_ends(rows, "validation/forward_kl", "{:.4f}") for rows in tables))
    line("answer length, mean", (_ends(rows, "train/mean_gen_tokens_per_sample", "{:.1f}") for rows in tables))
    line("answer length, longest", (_ends(rows, "train/max_gen_tokens_per_sample", "{:.0f}") for rows in tables))
    line("answers cut short", (_ends(rows, "train/truncation_rate", "{:.0%}") for rows in tables))
    line("tokens/s per rank, median", (_median(rows, "train/tokens_per_sec_per_gpu", "{:.0f}") for rows in tables))
    line("seconds a step, median", (_median(rows, TIMING + "total_step_time", "{:.2f}") for rows in tables))
    for phase in _SHORT_PHASES:
        least = 0.005 if phase in OUTSIDE_THROUGHPUT else 0.0  # of the steps that validate or save, not of all
        line(f"  {phase}", (_median(rows, TIMING + phase, "{:.2f}", least) for rows in tables))
    line("run folder", (_shown(folder) for _, folder in runs.values()))
    return _columns([labels, *columns])


def _present(rows: Sequence[Row], name: str) -> list[float]:
    return [value for row in rows if (value := row.get(name)) is not None]


def _ends(rows: Sequence[Row], name: str, form: str, first: bool = True) -> str:
    found = _present(rows, name)
    begin = f"{form.format(found[0])} -> " if found and first else ""
    return f"{begin}{form.format(found[-1])}" if found else ""


def _median(rows: Sequence[Row], name: str, form: str, least: float = 0.0) -> str:
    found = [value for value in _present(rows, name) if value >= least]
    return form.format(statistics.median(found)) if found else ""


def _shown(folder: Path) -> str:
    relative = os.path.relpath(folder)
    return str(folder) if relative.startswith("..") else relative


def _columns(columns: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in lines)
