"""Experiments on SmolLM2-135M: what a method changes, over three seeds named beforehand; two ranks, no GPU.

    python -m scripts.study rule|short|selection|right_only|collapse|probe|partial [--keep] [key.path=value ...]

``rule``: a system prompt that only the teacher reads is learnt. ``short``: responses of 16 tokens against 48 at equal
training time. ``selection``: half of the tokens against all, after the same number of steps. ``right_only``: training
on right responses against all responses. ``collapse``: a run that is made to collapse is stopped by an alarm.
``probe``: the recommendation of scripts.probe against the runs. ``partial``: partial rollouts against steps that wait
for their longest response, at equal training time.

The recipes are in recipes/study. Every run is reported. Each experiment prints a table with mean and 95% interval over
SEEDS and writes runs/study/NAME/study.json. ``--keep``: do not repeat runs that finished with the same settings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from distill.run_files import RECIPE_FILE
from scripts.experiments import (
    COMPLETE_MODEL,
    RANKS,
    Estimate,
    compared,
    estimate,
    first_and_last,
    heading,
    rate,
    step_rows,
    step_seconds,
    steps,
    stop_reason,
    token_kl,
    train,
    training_seconds,
    validated,
)
from scripts.launch import ROOT, run, torchrun
from scripts.prepare_models import EVENLY, prepare, pruned

SEEDS = (1, 2, 3)
"""Values of distillation.seed, chosen before the first run. All of them are reported."""
RUNS = ROOT / "runs" / "study"
PILOT_STEPS = 5
"""Steps of the run that measures the seconds of a step of the arm that must fit into the time of the other arm."""
MORE_STEPS = 1.6
"""Experiment partial: steps of the arm with partial rollouts, as a multiple of the steps of the other arm."""
AVERAGED = 3
"""Experiment partial: number of validations, the last ones of the training time, whose mean KL is reported."""

Result = dict[str, float]
"""Measurements of one run, by name."""


@dataclass(frozen=True)
class Arm:
    """One of the settings that an experiment compares."""

    name: str
    recipe: str
    """Path of the recipe below recipes/."""
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """Arguments of the command line."""

    overrides: tuple[str, ...]
    keep: bool

    def train(self, experiment: str, arm: Arm, seed: int, *more: str) -> Path:
        """Train ``arm`` with ``seed``; return the run directory.

        ``more``: overrides of the experiment, such as the steps of equal time, which override the command line.
        """
        folder = RUNS / experiment / f"{arm.name.replace(' ', '-')}-seed{seed}"
        settings = (*arm.overrides, *self.overrides, *more, f"distillation.seed={seed}")
        return train(folder, f"study/{arm.recipe}", *settings, keep=self.keep)


# ---- tables ----------------------------------------------------------------------------------------------------------


def summary(results: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
    """Return the estimate over seeds of each measurement that all ``results`` have, one result per seed."""
    names = [name for name in results[0] if all(name in result for result in results)]
    return {name: estimate([result[name] for result in results]) for name in names}


def differences(first: Sequence[Mapping[str, float]], second: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
    """Return the estimates of ``second`` - ``first``, paired by seed, of the measurements that both have."""
    pairs = list(zip(first, second, strict=True))
    names = [name for name in first[0] if all(name in a and name in b for a, b in pairs)]
    return {name: estimate([b[name] - a[name] for a, b in pairs]) for name in names}


def table(columns: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Return the lines of a table: a row per measurement, mean and interval per arm, the values of the seeds."""
    lines = [f"{'':30}" + "".join(f"{name:>34}" for name in columns)]
    estimates = {name: summary(results) for name, results in columns.items()}
    for row in dict.fromkeys(row for found in estimates.values() for row in found):
        cells = [_cell(found[row]) if row in found else "" for found in estimates.values()]
        lines.append(f"{row:30}" + "".join(f"{cell:>34}" for cell in cells))
        seeds = [_seeds(results, row) if row in estimates[name] else "" for name, results in columns.items()]
        lines.append(f"{'  by seed':30}" + "".join(f"{cell:>34}" for cell in seeds))
    return lines


def _cell(found: Estimate) -> str:
    interval = "" if math.isnan(found.low) else f" ({found.low:.4g} to {found.high:.4g})"
    return f"{found.mean:.4g}{interval}"


def _seeds(results: Sequence[Mapping[str, float]], row: str) -> str:
    return ", ".join(f"{result[row]:.4g}" for result in results)


def compare(columns: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """Print the table of several arms; with two arms also their difference. Return everything as plain data."""
    print("\n".join(["", f"seeds {', '.join(map(str, SEEDS))}; mean (95% interval over seeds)", *table(columns)]))
    found: dict[str, Any] = {"seeds": list(SEEDS), "runs": {name: list(results) for name, results in columns.items()}}
    found["estimates"] = {name: _plain(summary(results)) for name, results in columns.items()}
    if len(columns) == 2:
        (one, first), (other, second) = columns.items()
        differing = differences(first, second)
        print(f"\n{other} - {one}, paired by seed")
        print("\n".join(f"{name:30}{_cell(difference):>34}" for name, difference in differing.items()))
        found["differences"] = _plain(differing)
    return found


def _plain(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    return {name: asdict(found) for name, found in estimates.items()}


# ---- measurements of a run -------------------------------------------------------------------------------------------


def measured(run_dir: Path, last: int | None = None) -> Result:
    """Return what every experiment reports: held-out KL, size and cost of the training.

    ``last``: step after which the run is measured; it needs a validation. None: the last step of the run.
    """
    last = steps(run_dir) if last is None else last
    rows = step_rows(run_dir)[:last]
    return {
        "KL before, nats per token": token_kl(validated(run_dir, "step_0")),
        "KL after, nats per token": token_kl(validated(run_dir, f"step_{last}")),
        "steps": float(last),
        "training seconds": sum(map(step_seconds, rows)),
        "trained tokens per step": statistics.fmean(map(trained_tokens, rows)),
        "training TFLOP per step": statistics.fmean(row.get("throughput/training_tflop") or 0.0 for row in rows),
    }


def trained_tokens(row: Mapping[str, Any]) -> float:
    """Return the number of response tokens with a weight in the step of the metrics ``row``."""
    trained = row.get("train/trained_tokens")
    return float(row["train/global_valid_toks"] if trained is None else trained)


def graded(run_dir: Path) -> Result:
    """Return the rates of right responses before and after training, and with the context in view before."""
    before, after = first_and_last(run_dir)
    found = compared(before, after)
    return {
        "right before": found["rule_before"],
        "right after": found["rule_after"],
        "right with the context": rate(validated(run_dir, "in_context")),
        "rise": found["rise"],
    }


def scheduled(run_dir: Path, last: int) -> Result:
    """Return the time of the generation phase, the tokens that were trained, and their lengths and age.

    ``last``: see ``measured``.
    """
    lengths = _by_step(run_dir, _LENGTH)[:last]
    third = max(1, last // 3)
    averaged = range(max(1, last - AVERAGED + 1), last + 1)
    return measured(run_dir, last) | {
        "KL, mean of the last validations": statistics.fmean(
            token_kl(validated(run_dir, f"step_{step}")) for step in averaged
        ),
        "generation seconds per step": statistics.fmean(_by_step(run_dir, "timing/train/generation_slowest")[:last]),
        "wait share": statistics.fmean(_by_step(run_dir, "timing/train/generation_wait_share")[:last]),
        "trained tokens": sum(map(trained_tokens, step_rows(run_dir)[:last])),
        "length, first third of steps": statistics.fmean(lengths[:third]),
        "length, last third of steps": statistics.fmean(lengths[-third:]),
        "share of older tokens": statistics.fmean(_by_step(run_dir, "train/partial/older_token_share")[:last]),
    }


def _by_step(run_dir: Path, name: str) -> list[float]:
    """Return the metric ``name`` of each step; 0 where it was not measured."""
    return [float(row.get(name) or 0.0) for row in step_rows(run_dir)]


def finished_within(seconds: float, run_dir: Path) -> int:
    """Return the number of steps of the run that finished within ``seconds`` of training, at least 1."""
    totals = itertools.accumulate(map(step_seconds, step_rows(run_dir)))
    return max(1, sum(total <= seconds for total in totals))


def kl_by_seconds(run_dir: Path) -> list[tuple[float, float]]:
    """Return training seconds and held-out KL (nats per token) after each step of a run that validates each step."""
    totals = itertools.accumulate(map(step_seconds, step_rows(run_dir)), initial=0.0)
    return [(total, token_kl(validated(run_dir, f"step_{step}"))) for step, total in enumerate(totals)]


def steps_that_fit(seconds: float, pilot: Sequence[float]) -> int:
    """Return the estimated number of steps that fit into ``seconds``, at least 1; all steps must do equal work.

    ``pilot``: seconds of the first steps. The first step is slower (caches, compilation), so it counts as measured;
    each later step counts as the median of all later steps.
    """
    first, *others = pilot
    return max(1, 1 + math.floor((seconds - first) / statistics.median(others)))


# ---- experiments -----------------------------------------------------------------------------------------------------


def rule(request: Request) -> dict[str, Any]:
    """Train with a system prompt that only the teacher reads."""
    arm = Arm("rule", "rule-cpu.yaml")
    folders = [request.train("rule", arm, seed) for seed in SEEDS]
    print(f"\n{heading(first_and_last(folders[0])[0])} per seed")
    return compare({arm.name: [measured(folder) | graded(folder) for folder in folders]})


def short(request: Request) -> dict[str, Any]:
    """Train with 48 tokens per response, then with 16 tokens for as many steps as fit into the same time."""
    student = _pruned_student()
    full = Arm("48 tokens", "heal-cpu.yaml", student)
    cut = Arm("16 tokens", "heal-cpu.yaml", (*student, "policy.generation.max_new_tokens=16"))
    results: dict[str, list[Result]] = {full.name: [], cut.name: []}
    for seed in SEEDS:
        complete = request.train("short", full, seed)
        fitting = steps_that_fit(training_seconds(complete), _pilot(request, "short", cut, seed))
        results[full.name].append(measured(complete))
        results[cut.name].append(measured(request.train("short", cut, seed, f"distillation.max_num_steps={fitting}")))
    return compare(results)


def selection(request: Request) -> dict[str, Any]:
    """Train on all tokens, and on the half of each response's tokens with the highest entropy of the student."""
    student = _pruned_student()
    half = "loss_fn.token_weights.select={score: student_entropy, share: 0.5}"
    return _compare_arms(
        request,
        "selection",
        Arm("all tokens", "heal-cpu.yaml", student),
        Arm("half", "heal-cpu.yaml", (*student, half)),
        measured,
    )


def right_only(request: Request) -> dict[str, Any]:
    """Train on all responses, and on the right responses only."""
    return _compare_arms(
        request,
        "right_only",
        Arm("all", "sums-cpu.yaml"),
        Arm("right", "sums-cpu.yaml", ("distillation.train_on=right",)),
        lambda folder: graded(folder) | measured(folder),
    )


def collapse(request: Request) -> dict[str, Any]:
    """Train with a learning rate that destroys the student; an alarm must stop the run before its last step."""
    arm = Arm("collapse", "collapse-cpu.yaml")
    folders = [request.train("collapse", arm, seed) for seed in SEEDS]
    results = [_collapsed(folder) for folder in folders]
    reasons = [stop_reason(folder) for folder in folders]
    print("\n".join(f"{folder.name}: {reason}" for folder, reason in zip(folders, reasons, strict=True)))
    by_alarm = all(reason.startswith("alarm ") for reason in reasons)
    return compare({arm.name: results}) | {"reasons": reasons, "claims": {"an alarm stopped every run": by_alarm}}


def probe(request: Request) -> dict[str, Any]:
    """Probe two contexts, then train with each: the recommended context should give the higher accuracy."""
    answer, story = (Path("prompts") / f"sum_{name}.txt" for name in ("answer", "story"))
    folder = RUNS / "probe" / "probe"
    words = ["--config", "recipes/study/sums-cpu.yaml", "--template", str(answer), "--template", str(story)]
    place = f"runtime.run_dir={folder.relative_to(ROOT)}"
    if code := run(torchrun(RANKS, "-m", "scripts.probe", *words, place, *request.overrides)):
        sys.exit(f"scripts.probe failed with exit code {code}")
    advice = json.loads((folder / "probe.json").read_text(encoding="utf-8"))
    results: dict[str, list[Result]] = {}
    for file in (answer, story):
        text = (ROOT / file).read_text(encoding="utf-8").strip()
        template = f"distillation.context_distillation.teacher_prefix_template={json.dumps(text)}"
        arm = Arm(file.stem, "sums-cpu.yaml", (template,))
        results[file.stem] = [graded(request.train("probe", arm, seed)) for seed in SEEDS]
    print(f"\nrecommendation of the probe: {json.dumps(advice['recommendation'], indent=2)}")
    claims = {"the recommendation agrees with the runs": agrees(advice["recommendation"]["candidate"], results)}
    return compare(results) | {"recommendation": advice["recommendation"], "claims": claims}


def partial(request: Request) -> dict[str, Any]:
    """Train with steps that wait for their longest response, then with partial rollouts for the same time.

    The first steps with partial rollouts are short, so their time predicts no later step. This arm therefore trains
    more steps than fit and is measured after the last step that fits. Both validate after each step: the responses of
    a validation are sampled, so its KL varies by about 0.02 nats; the mean of several is compared.
    """
    lockstep = Arm("lockstep", "long-cpu.yaml", _EVERY_STEP)
    early = Arm("partial", "long-cpu.yaml", (*_EVERY_STEP, *PARTIAL))
    results: dict[str, list[Result]] = {lockstep.name: [], early.name: []}
    lengths: dict[str, list[list[float]]] = {lockstep.name: [], early.name: []}
    kls: dict[str, list[list[tuple[float, float]]]] = {lockstep.name: [], early.name: []}
    for seed in SEEDS:
        complete = request.train("partial", lockstep, seed)
        count = steps(complete)
        planned = math.ceil(MORE_STEPS * count)
        more = request.train("partial", early, seed, f"distillation.max_num_steps={planned}")
        fitting = finished_within(training_seconds(complete), more)
        if fitting == planned:
            print(f"seed {seed}: partial rollouts did not use all of the time; increase MORE_STEPS={MORE_STEPS}")
        for arm, folder, last in ((lockstep, complete, count), (early, more, fitting)):
            results[arm.name].append(scheduled(folder, last))
            kls[arm.name].append(kl_by_seconds(folder))
            lengths[arm.name].append(_by_step(folder, _LENGTH))
    for name, by_seed in lengths.items():
        print(f"\nmean length of the responses by step, {name}")
        print("\n".join(f"  seed {seed}: {_joined(each)}" for seed, each in zip(SEEDS, by_seed, strict=True)))
    return compare(results) | {"lengths": lengths, "held-out KL by training seconds": kls}


def _joined(lengths: Sequence[float]) -> str:
    return " ".join(f"{length:.0f}" for length in lengths)


def agrees(candidate: str | None, results: Mapping[str, Sequence[Result]]) -> bool:
    """Return whether the runs agree with the recommended candidate of a probe, which names its template's file.

    The runs with the candidate's template must have the highest mean accuracy after training. Without a recommended
    candidate, no template may raise the accuracy: the 95% interval over seeds must not be above 0.
    """
    after = {name: estimate([result["right after"] for result in runs]).mean for name, runs in results.items()}
    if candidate is not None:
        return max(after, key=lambda name: after[name]) in candidate
    return all(estimate([result["rise"] for result in runs]).low <= 0 for runs in results.values())


_EVERY_STEP = ("distillation.val_period=1",)
PARTIAL = ("distillation.partial_rollouts.enabled=true", "distillation.partial_rollouts.finish_share=0.75")
"""Overrides for partial rollouts: 16 responses per step of 22 in progress."""
_LENGTH = "train/mean_gen_tokens_per_sample"
_WITHOUT_VALIDATION = ("distillation.val_at_start=false", "distillation.val_at_end=false")


def _pilot(request: Request, name: str, arm: Arm, seed: int) -> list[float]:
    """Train ``arm`` for a few steps without validation; return the seconds of each step."""
    few = (f"distillation.max_num_steps={PILOT_STEPS}", *_WITHOUT_VALIDATION)
    folder = request.train(name, Arm("pilot", arm.recipe, arm.overrides), seed, *few)
    return [step_seconds(row) for row in step_rows(folder)]


def _pruned_student() -> tuple[str, ...]:
    """Write the student without every sixth layer if it is missing; return the override that selects it."""
    folder = RUNS / "pruned-student"
    prepare(folder, lambda: pruned(ROOT / COMPLETE_MODEL, EVENLY))
    return (f"policy.model_name={folder.relative_to(ROOT)}",)


def _compare_arms(
    request: Request, name: str, one: Arm, other: Arm, measure: Callable[[Path], Result]
) -> dict[str, Any]:
    """Train both arms with each seed, in turns, so that a change of the machine's speed affects both."""
    results: dict[str, list[Result]] = {one.name: [], other.name: []}
    for seed in SEEDS:
        for arm in (one, other):
            results[arm.name].append(measure(request.train(name, arm, seed)))
    return compare(results)


def _collapsed(folder: Path) -> Result:
    """Return when the run stopped, and what shows the collapse, at the first and at the last step."""
    rows = step_rows(folder)
    found = {"planned steps": float(_planned_steps(folder)), "stopped at step": float(steps(folder))}
    shown = {
        "overlap of the top-k": "train/topk_overlap",
        "repeated tokens": "train/repeated_token_share",
        "entropy, nats": "train/student_entropy",
    }
    for name, key in shown.items():
        found |= {f"{name}, first": float(rows[0][key]), f"{name}, last": float(rows[-1][key])}
    return found


def _planned_steps(folder: Path) -> int:
    return int(yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))["distillation"]["max_num_steps"])


EXPERIMENTS: dict[str, Callable[[Request], dict[str, Any]]] = {
    experiment.__name__: experiment for experiment in (rule, short, selection, right_only, collapse, probe, partial)
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run an experiment and write its numbers to runs/study/NAME/study.json; exit with 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(EXPERIMENTS))
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--keep", action="store_true", help="do not repeat runs that finished with the same settings")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    found = EXPERIMENTS[args.name](Request(tuple(args.overrides), args.keep))
    found |= {"seconds": round(time.perf_counter() - start), "overrides": args.overrides}
    (RUNS / args.name / "study.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{found['seconds'] // 60} min {found['seconds'] % 60} s")
    if failed := [claim for claim, holds in found.get("claims", {}).items() if not holds]:
        sys.exit(f"study: these claims do not hold: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
