"""Write metrics to the console, metrics.jsonl, TensorBoard and Weights & Biases.

A sink is one of these destinations. Only rank 0 (the main rank) writes: on every other rank the Recorder has no sinks.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from distill.config import LoggerConfig
from distill.errors import MissingError, UserError, reason, writing_run
from distill.metrics.names import timing_tag
from distill.metrics.summary import Row, console_line, is_validation, validation_line
from distill.metrics.tags import tensorboard_layout, tensorboard_scalars
from distill.run_files import METRICS_FILE, REPLACED_FILE

log = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"
_STEP_TOKENS, _STEP_TIME = "train/total_num_tokens", timing_tag("total_step_time")
_ROW_KEYS = ("step", "timestamp")
"""Keys of a row of metrics.jsonl that are no metrics."""


@dataclass(frozen=True)
class Samples:
    """Responses of one step, as ``texts`` for reading and as ``rows`` of a table; all rows have the same keys."""

    group: str
    """Kind of the responses: ``train`` or ``validation``."""
    texts: Sequence[str]
    rows: Sequence[Mapping[str, Any]] = ()


class Sink(Protocol):
    """Interface of a destination for metrics and sample texts."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of one step or one validation; ``step`` must not be lower than in earlier calls."""

    def show(self, step: int, samples: Samples) -> None:
        """Write samples of responses; sinks that store only numbers ignore them."""

    def close(self) -> None:
        """Close the sink; no other method may be called afterwards."""


class JsonlSink:
    """Sink that writes metrics.jsonl: one JSON object per line, with nan and inf written as null.

    When an existing file is opened, a truncated last line is removed, and two kinds of rows are moved to
    metrics.replaced.jsonl. The first are rows of steps after ``resumed_step``, which run again. The second are all rows
    from the first one that differs from ``history`` (the rows in the loaded checkpoint): these steps ran again in
    another run directory. If ``history`` has more rows than remain, its rows are written instead. Each row has the Unix
    time as ``timestamp``; ``clock`` returns this time in seconds.
    """

    def __init__(
        self, path: Path, resumed_step: int = 0, history: Sequence[Row] = (), clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_metrics(path) if path.exists() else []
        until = [row for row in rows if _step(row) <= resumed_step]
        equal = equal_rows(history, until)
        kept: Sequence[Row] = until if equal == min(len(history), len(until)) else until[:equal]
        if replaced := rows[len(kept) :]:
            with path.with_name(REPLACED_FILE).open("a") as file:
                file.write(_lines(replaced))
        part = path.with_suffix(".part")
        kept = max(kept, history, key=len)
        part.write_text(_lines(kept))
        part.replace(path)
        self._file = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line with the metrics and flush it."""
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        row = {"step": step, "timestamp": round(self._clock(), 3), **numbers}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def show(self, step: int, samples: Samples) -> None:
        """Do nothing: the file contains only numbers."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """Sink that writes TensorBoard events.

    In an existing directory, earlier events of steps after ``resumed_step`` are hidden. In a new directory, the rows in
    ``history`` (from the loaded checkpoint) are written first, and a layout that groups the main charts.
    """

    def __init__(self, folder: Path, resumed_step: int = 0, history: Sequence[Row] = ()) -> None:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _ignore_tensorboard_thread
        is_new = not folder.exists()
        self._writer: Any = SummaryWriter(str(folder), purge_step=None if is_new else resumed_step + 1)
        if is_new:
            self._writer.add_custom_scalars(tensorboard_layout())
        for row in history if is_new else ():
            numbers = {name: value for name, value in row.items() if value is not None and name not in _ROW_KEYS}
            self.write(_step(row), numbers)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one scalar per metric under its TensorBoard tag; values that are not finite are omitted."""
        for tag, value in tensorboard_scalars(values).items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def show(self, step: int, samples: Samples) -> None:
        """Write each text unchanged, under the name ``GROUP/sample_N``."""
        for i, text in enumerate(samples.texts):
            self._writer.add_text(f"{samples.group}/sample_{i}", _verbatim(text), step)
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
    WANDB_MODE=offline, no data is sent. Raises UserError if wandb does not start, for example without a login.
    """

    def __init__(self, config: LoggerConfig, run_dir: Path, recipe: Mapping[str, Any]) -> None:
        import wandb

        self._table = wandb.Table
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        try:
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
        except Exception as error:  # wandb raises many kinds of exception: no login, no network, an unknown entity
            raise UserError(
                f"logger.wandb_enabled=true, but Weights & Biases did not start ({reason(error)})",
                "run `wandb login`, or set logger.wandb.mode=offline or logger.wandb_enabled=false",
                key="logger.wandb_enabled",
                value=True,
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of one step or one validation."""
        self._run.log(dict(values), step=step)

    def show(self, step: int, samples: Samples) -> None:
        """Log the samples as the table ``GROUP/samples``."""
        if samples.rows:
            table = self._table(columns=list(samples.rows[0]), data=[list(row.values()) for row in samples.rows])
            self._run.log({f"{samples.group}/samples": table}, step=step)

    def close(self) -> None:
        """Finish the Weights & Biases run."""
        self._run.finish()


class ConsoleSink:
    """Sink that logs one line per step or validation.

    ``shows_traces``: whether a step's line has the fraction of responses with a trace. ``clock``: returns the time in
    seconds, from which the remaining time is estimated.
    """

    def __init__(
        self, total_steps: int, shows_traces: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total = total_steps
        self._shows_traces = shows_traces
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log one line with the main metrics."""
        if is_validation(values):
            line = validation_line(step, self._total, values)
        else:
            line = console_line(step, self._total, values, self._left_s(step, values), self._shows_traces)
        log.info("%s", line)

    def _left_s(self, step: int, values: Mapping[str, float]) -> float:
        """Return the remaining time in seconds: the steps left, times the mean time since the first line.

        At the first step, which is slower than later steps, only the duration of this step is known.
        """
        now = self._clock()
        self._first = self._first or (step, now)
        first_step, then = self._first
        per_step = (now - then) / (step - first_step) if step > first_step else values.get(_STEP_TIME, math.nan)
        return (self._total - step) * per_step

    def show(self, step: int, samples: Samples) -> None:
        """Log the sample texts, separated by blank lines."""
        if samples.texts:
            log.info("\n%s\n", "\n\n".join(samples.texts))

    def close(self) -> None:
        """Do nothing: the console has nothing to close."""


class Recorder:
    """Writes metrics and sample texts to all sinks (destinations) of a run.

    All methods raise UserError if writing to ``run_dir`` fails, for example because the disk is full. ``total_tokens``:
    number of tokens of the steps before this start.
    """

    def __init__(self, sinks: Sequence[Sink], run_dir: Path, total_tokens: float = 0.0) -> None:
        self._sinks = tuple(sinks)
        self._total_tokens = total_tokens
        self._writing = partial(writing_run, run_dir)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of one step or one validation to all sinks.

        Adds the metric ``progress/total_tokens`` to a step: the number of tokens of all steps up to this one.
        """
        if _STEP_TOKENS in values:
            self._total_tokens += values[_STEP_TOKENS]
            values = {**values, "progress/total_tokens": self._total_tokens}
        for sink in self._sinks:
            with self._writing():
                sink.write(step, values)

    def show(self, step: int, samples: Samples) -> None:
        """Write samples of the responses after ``step`` steps to the sinks that support text."""
        for sink in self._sinks:
            with self._writing():
                sink.show(step, samples)

    def close(self) -> None:
        """Close all sinks."""
        for sink in self._sinks:
            with self._writing():
                sink.close()


def check_packages(config: LoggerConfig) -> None:
    """Raise UserError if an enabled sink (Weights & Biases, TensorBoard) needs a package that is not installed."""
    for package, enabled in (("wandb", config.wandb_enabled), ("tensorboard", config.tensorboard_enabled)):
        if enabled and importlib.util.find_spec(package) is None:
            key = f"logger.{package}_enabled"
            raise MissingError(
                f"{key}=true requires the package {package}, which is not installed",
                f"install it with `pip install {package}`, or set {key}=false",
                key=key,
                value=True,
            )


def open_recorder(
    config: LoggerConfig,
    run_dir: Path,
    *,
    main: bool,
    total_steps: int,
    resumed_step: int = 0,
    recipe: Mapping[str, Any] | None = None,
    history: Sequence[Row] = (),
    total_tokens: float = 0.0,
    shows_traces: bool = False,
) -> Recorder:
    """Return the run's recorder of metrics, which writes on rank 0 only; not collective.

    ``main``: whether this is rank 0. ``resumed_step``: step of the loaded checkpoint, 0 for a new run; metrics of later
    steps are removed from the files. ``recipe``: the resolved configuration, for Weights & Biases. ``history``: rows of
    metrics up to ``resumed_step``, written to a new run directory. ``total_tokens``: number of tokens of all steps up
    to ``resumed_step``. ``shows_traces``: whether the console shows the fraction of responses with a trace. Raises
    UserError on every rank if a package for the enabled sinks is missing.
    """
    check_packages(config)
    if not main:
        return Recorder([], run_dir)
    sinks: list[Sink] = [JsonlSink(run_dir / METRICS_FILE, resumed_step, history)]
    if config.tensorboard_enabled:
        sinks.append(TensorBoardSink(run_dir / TENSORBOARD_FOLDER, resumed_step, history))
    if config.wandb_enabled:
        sinks.append(WandbSink(config, run_dir, recipe or {}))
    return Recorder([*sinks, ConsoleSink(total_steps, shows_traces)], run_dir, total_tokens)


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
    return [row for row in read_metrics(path) if _step(row) <= step] if path.exists() else []


def equal_rows(history: Sequence[Row], rows: Sequence[Row]) -> int:
    """Return how many leading rows of ``rows`` contain all values of the row of ``history`` at the same index."""
    pairs = zip(history, rows, strict=False)
    return next(
        (i for i, (saved, row) in enumerate(pairs) if not saved.items() <= row.items()), min(len(history), len(rows))
    )


def tokens_of(rows: Sequence[Row]) -> float:
    """Return the number of tokens of all steps in ``rows``."""
    return sum(row.get(_STEP_TOKENS) or 0.0 for row in rows)


def _step(row: Row) -> int:
    return int(row["step"] or 0)


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
