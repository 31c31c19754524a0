"""Seconds of each phase of a step: the median of 10 steps of 8 prompts x 2 answers x 48 tokens, after one to warm up.

    python -m scripts.bench_step [--ranks 2] [--steps 10] [key.path=value ...]

Context self-distillation of SmolLM2-135M in bfloat16. No token ends an answer, so every step generates the same number.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys

from distill.runtime.metrics_sinks import METRICS_FILE, TIMING, read_metrics
from scripts.launch import ROOT, run, torchrun

RUN_DIR = ROOT / "runs" / "bench_step"


def measure(ranks: int, steps: int, overrides: list[str]) -> dict[str, list[float]]:
    """Seconds of every step by phase, the first step left out."""
    shutil.rmtree(RUN_DIR, ignore_errors=True)
    command = torchrun(
        ranks,
        *("-m", "distill.train", "--config", "recipes/smollm2-context-cpu.yaml"),
        f"distillation.max_num_steps={steps + 1}",
        f"cluster.gpus_per_node={ranks}",
        f"runtime.run_dir={RUN_DIR.relative_to(ROOT)}",
        "policy.generation.stop_token_ids=[]",
        "checkpointing.enabled=false",
        *overrides,
    )
    if code := run(command):
        sys.exit(code)
    rows = read_metrics(RUN_DIR / METRICS_FILE)[1:]
    phases = [n for n in rows[0] if n.startswith(TIMING) and "tokens_per_sec" not in n]
    return {name[len(TIMING) :]: [float(row[name] or 0.0) for row in rows] for name in phases}


def main() -> None:
    """Measure, print the table, and leave the numbers in the run's folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_args()
    seconds = measure(args.ranks, args.steps, args.overrides)
    (RUN_DIR / "bench_step.json").write_text(json.dumps(seconds, indent=2) + "\n")
    print(f"\nseconds a step, {args.ranks} ranks, {args.steps} steps   median   fastest   slowest")
    for name, values in sorted(seconds.items(), key=lambda item: -statistics.median(item[1])):
        print(f"{name:38s} {statistics.median(values):8.2f}  {min(values):8.2f}  {max(values):8.2f}")


if __name__ == "__main__":
    main()
