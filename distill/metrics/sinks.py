"""Write metrics to the console, metrics.jsonl, TensorBoard and Weights & Biases.

A sink is one of these destinations. Only rank 0 (the main rank) writes: on every other rank the Recorder has no sinks.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import threading
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from distill.config import LoggerConfig
from distill.errors import UserError, writing_run
from distill.metrics.summary import Row, console_line, is_validation, validation_line

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class Sink(Protocol):
    """Interface of a destination for metrics and sample texts."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of one step or one validation; ``step`` must not be lower than in earlier calls."""

    def show(self, step: int, texts: Sequence[str]) -> None:
        """Write sample texts of a validation; sinks that store only numbers ignore the texts."""

    def close(self) -> None:
        """Close the sink; no other method may be called afterwards."""


class JsonlSink:
    """Sink that writes metrics.jsonl: one JSON object per line, with nan and inf written as null.

    When an existing file is opened, rows of steps after ``resumed_step`` are removed, because these steps run again. A
    truncated last line is removed, too. If no row remains, the rows in ``history`` (from the loaded checkpoint) are
    written first.
    """

    def __init__(self, path: Path, resumed_step: int = 0, history: Sequence[Row] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept: Sequence[Row] = rows_until(path, resumed_step) or history
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in kept))
        part.replace(path)
        self._file = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line with the metrics and flush it."""
        row = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def show(self, step: int, texts: Sequence[str]) -> None:
        """Do nothing: the file contains only numbers."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """Sink that writes TensorBoard events.

    In an existing directory, earlier events of steps after ``resumed_step`` are hidden. In a new directory, the rows in
    ``history`` (from the loaded checkpoint) are written first.
    """

    def __init__(self, folder: Path, resumed_step: int = 0, history: Sequence[Row] = ()) -> None:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _ignore_tensorboard_thread
        is_new = not folder.exists()
        self._writer: Any = SummaryWriter(str(folder), purge_step=None if is_new else resumed_step + 1)
        for row in history if is_new else ():
            self.write(int(row["step"] or 0), {n: v for n, v in row.items() if n != "step" and v is not None})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one scalar per metric; values that are not finite are omitted."""
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def show(self, step: int, texts: Sequence[str]) -> None:
        """Write each text unchanged, under the name ``validation/sample_N``."""
        for i, text in enumerate(texts):
            self._writer.add_text(f"validation/sample_{i}", _verbatim(text), step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


def _ignore_tensorboard_thread(args: threading.ExceptHookArgs) -> None:
    """Ignore an error in TensorBoard's writer thread; the next write raises the same error again."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(args)


class WandbSink:
    """Sink that logs to Weights & Biases; a resumed run continues the same curves.

    The Weights & Biases id of the run is stored in the run directory. With ``logger.wandb.mode=offline`` or
    WANDB_MODE=offline, no data is sent.
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
        """Log the metrics of one step or one validation."""
        self._run.log(dict(values), step=step)

    def show(self, step: int, texts: Sequence[str]) -> None:
        """Do nothing: sample texts are not sent, but stored in the run directory."""

    def close(self) -> None:
        """Finish the Weights & Biases run."""
        self._run.finish()


class ConsoleSink:
    """Sink that logs one line per step or validation."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log one line with the main metrics."""
        line = validation_line if is_validation(values) else console_line
        log.info("%s", line(step, self._total, values))

    def show(self, step: int, texts: Sequence[str]) -> None:
        """Log the sample texts of a validation."""
        for text in texts:
            log.info("%s\n", text)

    def close(self) -> None:
        """Do nothing: the console has nothing to close."""


class Recorder:
    """Writes metrics and sample texts to all sinks (destinations) of a run.

    All methods raise UserError if writing to ``run_dir`` fails, for example because the disk is full.
    """

    def __init__(self, sinks: Sequence[Sink], run_dir: Path) -> None:
        self._sinks = tuple(sinks)
        self._writing = partial(writing_run, run_dir)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of one step or one validation to all sinks."""
        for sink in self._sinks:
            with self._writing():
                sink.write(step, values)

    def show(self, step: int, texts: Sequence[str]) -> None:
        """Write sample texts of the validation after ``step`` steps to the sinks that support text."""
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
    """Return the run's recorder of metrics, which writes on rank 0 only; not collective.

    ``main``: whether this is rank 0. ``resumed_step``: step of the loaded checkpoint, 0 for a new run; metrics of later
    steps are removed from the files. ``recipe``: the resolved configuration, for Weights & Biases. ``history``: rows of
    metrics up to ``resumed_step``, written to a new run directory. Raises UserError on every rank if wandb is enabled
    but not installed.
    """
    if config.wandb_enabled and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "logger.wandb_enabled=true requires the package wandb, which is not installed",
            "install it with `pip install wandb`, or set logger.wandb_enabled=false",
            key="logger.wandb_enabled",
            value=True,
        )
    if not main:
        return Recorder([], run_dir)
    sinks: list[Sink] = [JsonlSink(run_dir / METRICS_FILE, resumed_step, history)]
    if config.tensorboard_enabled:
        sinks.append(TensorBoardSink(run_dir / TENSORBOARD_FOLDER, resumed_step, history))
    if config.wandb_enabled:
        sinks.append(WandbSink(config, run_dir, recipe or {}))
    return Recorder([*sinks, ConsoleSink(total_steps)], run_dir)


def _verbatim(text: str) -> str:
    """Return the text as an indented Markdown block, which TensorBoard shows unchanged."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """Return the rows of a metrics.jsonl file; skip a truncated last line, which a killed run may leave."""
    rows = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise RuntimeError(f"{path}:{number} is not valid JSON: {line[:80]!r}") from None
    return rows


def rows_until(path: Path, step: int) -> list[dict[str, float | None]]:
    """Return the rows of a metrics.jsonl file up to and including ``step``; empty if there is no file."""
    return [row for row in read_metrics(path) if int(row["step"] or 0) <= step] if path.exists() else []
