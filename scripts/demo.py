"""Demonstrate on held-out problems that SmolLM2-135M learns from its teacher; two ranks, no GPU.

    python -m scripts.demo context|control|heal [key.path=value ...]

``context``: the student learns a rule that only the teacher reads. ``control``: without the context in training, it
does not. ``heal``: a student without every sixth layer recovers most of its distance to the complete model.

Each demonstration runs distill.train in runs/demo and reads the validation samples. It prints a table and writes
``demo.json``. The exit code is 1 if a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.metrics.sinks import read_metrics
from distill.run_files import METRICS_FILE, VALIDATION_FOLDER
from scripts.launch import ROOT, run, torchrun
from scripts.prepare_models import EVENLY, prepare, pruned

RUNS = ROOT / "runs" / "demo"
COMPLETE_MODEL = "models/SmolLM2-135M-Instruct"
MIN_CLOSED = 0.6
"""Smallest fraction of the held-out KL that ``context`` must remove."""
MIN_RECOVERED = 0.5
"""Smallest fraction of the held-out KL that ``heal`` must remove."""
MAX_CLOSED_BY_CONTROL = 0.1
"""Largest fraction of the held-out KL that ``control`` may remove; not 0 because of rounding and sampling."""

ONLY_INITIAL_WEIGHTS = (
    "distillation.max_num_steps=1",
    "distillation.val_at_start=true",
    "distillation.val_at_end=false",
)
"""Overrides for a run that only validates its initial weights; the minimum number of steps is 1."""

Samples = Sequence[Mapping[str, Any]]
"""Parsed lines of a validation's JSONL file."""


@dataclass(frozen=True)
class Rise:
    """Difference of two rates of right responses, with its 95% confidence interval."""

    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} points, 95% interval {100 * self.low:+.1f} to {100 * self.high:+.1f}"


def rise(before: Samples, after: Samples) -> Rise:
    """Return the mean over problems of the difference of their rates, with its 95% confidence interval.

    The problems are the sample, because responses to one problem are not independent.
    """
    first, second = _rates(before), _rates(after)
    differences = [second[problem] - rate for problem, rate in first.items()]
    mean = statistics.fmean(differences)
    half = statistics.NormalDist().inv_cdf(0.975) * statistics.stdev(differences) / len(differences) ** 0.5
    return Rise(mean, mean - half, mean + half)


def _rates(samples: Samples) -> dict[str, float]:
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


def train(name: str, recipe: str, *overrides: str) -> Path:
    """Run ``recipe`` on two ranks in an empty run directory; return the directory. Exits if the run fails."""
    run_dir = RUNS / name
    shutil.rmtree(run_dir, ignore_errors=True)
    folder = f"runtime.run_dir={run_dir.relative_to(ROOT)}"
    line = torchrun(2, "-m", "distill.train", "--config", f"recipes/{recipe}", folder, *overrides)
    print(f"\n== {name}: torchrun {' '.join(line[3:])}", flush=True)
    if code := run(line):
        sys.exit(f"demo: the run {name} failed with exit code {code}; its logs are in {run_dir / 'logs'}")
    return run_dir


def validated(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """Return the samples of a validation: ``step_N`` or ``in_context``."""
    lines = (run_dir / VALIDATION_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def first_and_last(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the samples of the validations before the first step and after the last step."""
    steps = [int(row["step"] or 0) for row in read_metrics(run_dir / METRICS_FILE)]
    return validated(run_dir, "step_0"), validated(run_dir, f"step_{max(steps)}")


def context(overrides: Sequence[str]) -> dict[str, Any]:
    """Train with the rule in the teacher's context only; return the measurements."""
    run_dir = train("context", "demo-context-cpu.yaml", *overrides)
    before, after = first_and_last(run_dir)
    in_view = validated(run_dir, "in_context")
    found = compared(before, after) | {"rule_in_context": rate(in_view), "steps": _steps(run_dir)}
    print(f"\n{_heading(before)}")
    print(_row("", "before", "after", "context in view"))
    print(_row("KL(teacher || student), nats per token", f"{found['kl_before']:.4f}", f"{found['kl_after']:.4f}", "0"))
    print(_row("rule followed", *(f"{100 * found[f'rule_{at}']:.1f}%" for at in ("before", "after", "in_context"))))
    print(f"{found['closed']:.0%} of the gap in KL closed; the rate of the rule rose by {rise(before, after)}")
    print(f"for example: {after[0]['answer'].strip()!r}")
    claims = {
        f"at least {MIN_CLOSED:.0%} of the gap in KL closed": found["closed"] >= MIN_CLOSED,
        "the 95% interval of the rise of the rate is above 0": found["rise_low"] > 0,
    }
    return found | {"claims": claims}


def control(overrides: Sequence[str]) -> dict[str, Any]:
    """Train without the context, then compare with the teacher that reads it; return the measurements."""
    recipe = "demo-context-cpu.yaml"
    base = validated(train("control-base", recipe, *overrides, *ONLY_INITIAL_WEIGHTS), "step_0")
    checkpoints = (RUNS / "control" / "checkpoints").relative_to(ROOT)
    without = (
        "distillation.context_distillation.enabled=false",
        "distillation.allow_degenerate=true",
        "distillation.val_at_start=false",
        "distillation.val_at_end=false",
        "checkpointing.enabled=true",
        f"checkpointing.checkpoint_dir={checkpoints}",
        "checkpointing.save_period=1000",  # only after the last step
    )
    run_dir = train("control", recipe, *without, *overrides)
    steps = _steps(run_dir)
    trained = (
        f"policy.model_name={checkpoints}/step_{steps}/hf",
        f"teacher.model_name={COMPLETE_MODEL}",
        "distillation.context_distillation.mode=frozen",
    )
    after = validated(train("control-measured", recipe, *overrides, *trained, *ONLY_INITIAL_WEIGHTS), "step_0")
    found = compared(base, after) | {"steps": steps}
    print(f"\n{_heading(base)}, the context removed from training")
    print(_row("", "before", "after"))
    print(_row("KL(teacher || student), nats per token", f"{found['kl_before']:.4f}", f"{found['kl_after']:.4f}"))
    print(_row("rule followed", *(f"{100 * found[f'rule_{at}']:.1f}%" for at in ("before", "after"))))
    print(f"{found['closed']:.0%} of the gap in KL closed; the rate of the rule rose by {rise(base, after)}")
    claims = {
        f"less than {MAX_CLOSED_BY_CONTROL:.0%} of the gap in KL closed": found["closed"] < MAX_CLOSED_BY_CONTROL,
        "the 95% interval of the rise of the rate includes 0": found["rise_low"] <= 0 <= found["rise_high"],
    }
    return found | {"claims": claims}


def heal(overrides: Sequence[str]) -> dict[str, Any]:
    """Train a student without every sixth layer with the complete model as teacher; return the measurements."""
    student = RUNS / "heal-student"
    prepare(student, lambda: pruned(ROOT / COMPLETE_MODEL, EVENLY))
    run_dir = train("heal", "demo-heal-cpu.yaml", f"policy.model_name={student.relative_to(ROOT)}", *overrides)
    before, after = first_and_last(run_dir)
    kl_before, kl_after = token_kl(before), token_kl(after)
    recovered = 1 - kl_after / kl_before
    found = {"responses": len(after), "kl_before": kl_before, "kl_after": kl_after, "recovered": recovered}
    print(f"\n{_heading(before)}, 26 of 30 layers")
    print(_row("", "before", "after"))
    print(_row("KL(complete || pruned), nats per token", f"{kl_before:.4f}", f"{kl_after:.4f}"))
    print(f"{recovered:.0%} of it removed in {_steps(run_dir)} steps")
    claims = {f"at least {MIN_RECOVERED:.0%} of the KL removed": recovered >= MIN_RECOVERED}
    return found | {"steps": _steps(run_dir), "claims": claims}


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


def _steps(run_dir: Path) -> int:
    return max(int(row["step"] or 0) for row in read_metrics(run_dir / METRICS_FILE))


def _heading(samples: Samples) -> str:
    return f"{len(samples)} responses to {len(_rates(samples))} held-out problems"


def _row(name: str, *cells: str) -> str:
    return f"{name:38}" + "".join(f"{cell:>17}" for cell in cells)


DEMOS: dict[str, Callable[[Sequence[str]], dict[str, Any]]] = {"context": context, "control": control, "heal": heal}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a demonstration and write its numbers to runs/demo/NAME/demo.json; exit with 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(DEMOS))
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    found = DEMOS[args.name](args.overrides)
    found["seconds"] = round(time.perf_counter() - start)
    (RUNS / args.name / "demo.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{found['seconds'] // 60} min {found['seconds'] % 60} s")
    if failed := [claim for claim, holds in found["claims"].items() if not holds]:
        sys.exit(f"demo: these claims do not hold: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
