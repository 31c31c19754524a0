"""Run trainings of SmolLM2-135M on two ranks, and read what they measured on held-out problems.

Used by demo.py (one run per claim) and study.py (several seeds per experiment).
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.metrics.names import OUTSIDE_THROUGHPUT, timing_tag
from distill.metrics.sinks import read_metrics
from distill.run_files import METRICS_FILE, VALIDATION_FOLDER
from distill.supervise.status import STATUS_FILE
from scripts.launch import ROOT, run, torchrun

COMPLETE_MODEL = "models/SmolLM2-135M-Instruct"
RANKS = 2
COMMAND_FILE = "command.json"
"""File in the directory of a finished run: its recipe and overrides."""

Samples = Sequence[Mapping[str, Any]]
"""Parsed lines of a validation's JSONL file."""

T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Maps degrees of freedom to the 97.5% quantile of Student's t distribution."""


@dataclass(frozen=True)
class Rise:
    """Difference of two rates of right responses, with its 95% confidence interval."""

    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} points, 95% interval {100 * self.low:+.1f} to {100 * self.high:+.1f}"


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds, with its 95% confidence interval; NaN bounds if only one seed was run."""

    mean: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of ``values``, one per seed, with the 95% interval of Student's t distribution.

    The seeds are the sample. With three seeds the interval is wide: 2.48 standard deviations on each side.
    Raises ValueError without values, or with more than 10.
    """
    if not 1 <= len(values) <= len(T_QUANTILES) + 1:
        raise ValueError(f"{len(values)} values: expected 1 to {len(T_QUANTILES) + 1}")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean, math.nan, math.nan)
    half = T_QUANTILES[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return Estimate(mean, mean - half, mean + half)


def rise(before: Samples, after: Samples) -> Rise:
    """Return the mean over problems of the difference of their rates, with its 95% confidence interval.

    The problems are the sample, because responses to one problem are not independent.
    """
    first, second = rates(before), rates(after)
    differences = [second[problem] - rate for problem, rate in first.items()]
    mean = statistics.fmean(differences)
    half = statistics.NormalDist().inv_cdf(0.975) * statistics.stdev(differences) / len(differences) ** 0.5
    return Rise(mean, mean - half, mean + half)


def rates(samples: Samples) -> dict[str, float]:
    """Return the fraction of right responses to each problem, by prompt id."""
    verdicts: dict[str, list[bool]] = {}
    for sample in samples:
        verdicts.setdefault(f"{sample['prompt_id']}", []).append(sample["verdict"] == "right")
    return {problem: statistics.fmean(right) for problem, right in verdicts.items()}


def rate(samples: Samples) -> float:
    """Return the fraction of right responses."""
    return statistics.fmean(sample["verdict"] == "right" for sample in samples)


def token_kl(samples: Samples) -> float:
    """Return the mean KL(teacher || student) in nats per token."""
    return statistics.fmean(kl for sample in samples for kl in sample["forward_kl"] or ())


def compared(before: Samples, after: Samples) -> dict[str, float]:
    """Return held-out KL and rate of the rule before and after training. With the context in view, the KL is 0."""
    rose = rise(before, after)
    return {
        "responses": len(after),
        "kl_before": token_kl(before),
        "kl_after": token_kl(after),
        "closed": 1 - token_kl(after) / token_kl(before),
        "rule_before": rate(before),
        "rule_after": rate(after),
        "rise": rose.difference,
        "rise_low": rose.low,
        "rise_high": rose.high,
    }


def train(run_dir: Path, recipe: str, *overrides: str, keep: bool = False) -> Path:
    """Run ``recipe`` on two ranks in an empty run directory; return the directory.

    Exits if the run fails. A run that an alarm stopped has not failed.

    ``recipe``: path below recipes/. ``keep``: do not repeat a run that finished with the same recipe and overrides.
    """
    command = [recipe, *overrides]
    if keep and _finished_command(run_dir) == command:
        print(f"\n== {run_dir.name}: kept", flush=True)
        return run_dir
    shutil.rmtree(run_dir, ignore_errors=True)
    folder = f"runtime.run_dir={run_dir.relative_to(ROOT)}"
    line = torchrun(RANKS, "-m", "distill.train", "--config", f"recipes/{recipe}", folder, *overrides)
    print(f"\n== {run_dir.name}: torchrun {' '.join(line[3:])}", flush=True)
    code = run(line)
    if code and not stop_reason(run_dir).startswith("alarm "):
        sys.exit(f"the run {run_dir.name} failed with exit code {code}; its logs are in {run_dir / 'logs'}")
    (run_dir / COMMAND_FILE).write_text(json.dumps(command) + "\n", encoding="utf-8")
    return run_dir


def stop_reason(run_dir: Path) -> str:
    """Return why the run stopped, from its status.json; "" for a run without this file."""
    file = run_dir / STATUS_FILE
    return str(json.loads(file.read_text(encoding="utf-8"))["reason"]) if file.is_file() else ""


def _finished_command(run_dir: Path) -> list[str] | None:
    file = run_dir / COMMAND_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def validated(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """Return the samples of a validation: ``step_N`` or ``in_context``."""
    lines = (run_dir / VALIDATION_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def first_and_last(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the samples of the validations before the first step and after the last step."""
    return validated(run_dir, "step_0"), validated(run_dir, f"step_{steps(run_dir)}")


def step_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics of the training steps, without the row of a validation before the first step."""
    rows = [dict(row) for row in read_metrics(run_dir / METRICS_FILE)]
    return [row for row in rows if row.get(timing_tag("training")) is not None]


def steps(run_dir: Path) -> int:
    """Return the number of finished training steps."""
    return max(int(row["step"] or 0) for row in read_metrics(run_dir / METRICS_FILE))


def step_seconds(row: Mapping[str, Any]) -> float:
    """Return the seconds of a training step without validation, checkpoint and samples."""
    outside = sum(row.get(timing_tag(phase)) or 0.0 for phase in OUTSIDE_THROUGHPUT)
    return float(row[timing_tag("total_step_time")]) - outside


def training_seconds(run_dir: Path) -> float:
    """Return the seconds of all training steps, without validations, checkpoints, samples and the start."""
    return sum(map(step_seconds, step_rows(run_dir)))


def heading(samples: Samples) -> str:
    """Return the number of responses and problems of a validation, for the first line of a table."""
    return f"{len(samples)} responses to {len(rates(samples))} held-out problems"


def table_row(name: str, *cells: str) -> str:
    """Return a line of a table: a name and right-aligned cells."""
    return f"{name:38}" + "".join(f"{cell:>17}" for cell in cells)
