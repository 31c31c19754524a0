"""Train a tiny model for 200 short steps and fail if a resource of a rank grows.

The resources are memory, open files, threads, child processes and shared memory. This process reads the resources of
each rank after every step. The values after a warm-up are split into equal intervals of steps, and a line is fitted to
the means of the intervals. For memory, the line is fitted to the minima, because memory use falls after each
checkpoint. A resource leaks if its line rises by more than three standard errors and by more than a small tolerance.
The exit code is 1 if a resource leaks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import psutil

from distill.run_files import METRICS_FILE
from scripts.launch import ENVIRONMENT, ROOT, torchrun

RUN = ROOT / "runs" / "soak"
COMPLETE_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
INTERVALS = 10
PERIOD = 15
"""Steps between two checkpoints. With the default arguments, an interval has the same length."""
AFTER = 5
"""Number of steps after the last measured step, so that the end of the run does not affect the last interval."""
TAIL = 2**16
"""Bytes at the end of the metrics that are read; they have at least two lines."""
ERRORS = 3.0
"""Number of standard errors by which a line may rise."""
TOLERANCE = {"memory MiB": 4.0, "open files": 0.5, "threads": 0.5, "child processes": 0.5, "shared memory MiB": 0.5}
"""Allowed growth over the run by quantity: noise of the memory allocator, or less than one item."""


@dataclass(frozen=True)
class Growth:
    """Growth of a quantity from the end of the warm-up to the last step."""

    quantity: str
    start: float
    """Mean value in the first interval; for memory, the minimum."""
    end: float
    """Mean value in the last interval; for memory, the minimum."""
    grown: float
    """Rise of the fitted line over all measured steps."""
    error: float
    """Standard error of ``grown``."""

    @property
    def leaks(self) -> bool:
        """Return whether the growth exceeds both ERRORS standard errors and the tolerance."""
        return self.grown > max(ERRORS * self.error, TOLERANCE[self.quantity])


def growth(quantity: str, values: Sequence[float]) -> Growth:
    """Return the growth of a quantity: the slope of a least-squares line through INTERVALS interval levels.

    ``values``: one value per step. An interval's level is the mean of its values; for memory, the minimum. Consecutive
    values are correlated, so a fit to single values would underestimate the error. Raises ValueError if there are fewer
    values than intervals.
    """
    length = len(values) // INTERVALS
    if length < 1:
        raise ValueError(f"{len(values)} measured steps are too few for {INTERVALS} intervals: increase --steps")
    level_of = min if quantity == "memory MiB" else mean
    levels = [level_of(values[len(values) - (INTERVALS - i) * length :][:length]) for i in range(INTERVALS)]
    middle, level = (INTERVALS - 1) / 2, mean(levels)
    spread = sum((i - middle) ** 2 for i in range(INTERVALS))
    slope = sum((i - middle) * value for i, value in enumerate(levels)) / spread
    rest = sum((value - level - slope * (i - middle)) ** 2 for i, value in enumerate(levels))
    error = math.sqrt(rest / (INTERVALS - 2) / spread)
    return Growth(quantity, levels[0], levels[-1], slope * INTERVALS, error * INTERVALS)


def resources(process: psutil.Process) -> dict[str, float]:
    """Return the current resource use of a process, by quantity."""
    return {
        "memory MiB": process.memory_info().rss / 2**20,
        "open files": float(process.num_fds()),
        "threads": float(process.num_threads()),
        "child processes": float(len(process.children(recursive=True))),
        "shared memory MiB": shared_memory(process) / 2**20,
    }


def shared_memory(process: psutil.Process) -> int:
    """Return the bytes of all files in /dev/shm that a process maps or has open, including deleted files."""
    mapped = sum(
        int(end, 16) - int(begin, 16)
        for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        if "/dev/shm/" in line
        for begin, end in [line.split()[0].split("-")]
    )
    opened = 0
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            if os.readlink(link).startswith("/dev/shm/"):
                opened += link.stat().st_size
        except OSError:  # the process closed the file after iterdir
            continue
    return mapped + opened


def make_models(folder: Path) -> None:
    """Write two tiny random models with SmolLM2's tokenizer: a 2-layer student and a 3-layer teacher."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    for name, layers in (("student", 2), ("teacher", 3)):
        torch.manual_seed(layers)
        config = AutoConfig.from_pretrained(COMPLETE_MODEL)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "head_dim": 32}
        config.update({**sizes, "num_attention_heads": 2, "num_key_value_heads": 2})
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(COMPLETE_MODEL).save_pretrained(folder / name)


def command(ranks: int, steps: int, backend: str, overrides: Sequence[str]) -> list[str]:
    """Return the training's command line, with a checkpoint and a validation every PERIOD steps."""
    folder = RUN.relative_to(ROOT)
    return torchrun(
        ranks,
        *("-m", "distill.train", "--config", "recipes/smollm2-distillation-cpu.yaml"),
        *(f"policy.model_name={folder}/student", f"teacher.model_name={folder}/teacher", "policy.precision=float32"),
        *(f"cluster.gpus_per_node={ranks}", f"policy.generation.backend={backend}", f"runtime.run_dir={folder}/run"),
        *(f"distillation.max_num_steps={steps + AFTER}", "distillation.max_num_epochs=100000"),
        *("distillation.num_prompts_per_step=4", "policy.train_global_batch_size=8"),
        *("policy.generation.max_new_tokens=8", f"distillation.val_period={PERIOD}", "distillation.max_val_samples=4"),
        *(f"checkpointing.checkpoint_dir={folder}/checkpoints", f"checkpointing.save_period={PERIOD}"),
        *("checkpointing.keep_top_k=2", "logger.num_val_samples_to_print=0"),
        *overrides,
    )


def watch(line: Sequence[str]) -> list[list[dict[str, float]]]:
    """Run the training command and return the resource use by step and rank; exit if the training fails."""
    RUN.joinpath("run").mkdir(parents=True)
    with (RUN / "output.txt").open("w") as output:
        launcher = psutil.Popen(line, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdout=output, stderr=output)
        held: list[list[dict[str, float]]] = []
        seen = 0
        while launcher.poll() is None:
            time.sleep(0.02)
            steps = steps_done(RUN / "run" / METRICS_FILE)
            if steps > seen:
                try:
                    ranks = [child for child in launcher.children() if "distill.train" in child.cmdline()]
                    held.append([resources(rank) for rank in ranks])
                except (psutil.Error, OSError):  # a rank exited while its resources were read
                    continue
                seen = steps
        code = launcher.wait()
    if code:
        sys.exit(f"soak: the training failed with exit code {code}; its output is in {RUN / 'output.txt'}")
    return [step for step in held if len(step) == max(map(len, held))]


def steps_done(metrics: Path) -> int:
    """Return the last training step in a metrics.jsonl, or 0 without one; ignore an incomplete last line."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:  # Read only the end: reading the complete file at each poll would slow the ranks
        file.seek(max(0, metrics.stat().st_size - TAIL))
        lines = file.read().decode(errors="replace").rpartition("\n")[0].splitlines()
    return max((json.loads(line)["step"] for line in lines[-2:] if '"train/loss"' in line), default=0)


def table(growths: Sequence[tuple[int, Growth]], steps: int) -> str:
    """Return a text table of growths, with one line per rank and quantity."""
    rows = [f"{'over ' + str(steps) + ' steps':22}{'start':>10}{'end':>10}{'growth':>10}{'± error':>10}"]
    for rank, found in growths:
        rows.append(
            f"{f'rank {rank} {found.quantity}':22}{found.start:10.1f}{found.end:10.1f}{found.grown:+10.2f}"
            f"{found.error:10.2f}{'  grows' if found.leaks else ''}"
        )
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    """Run the training, print the growth of each resource, and exit with code 1 if a resource leaks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="number of training steps")
    parser.add_argument(
        "--warm-up",
        type=int,
        default=50,
        help="number of first steps to ignore, while caches fill and threads start",
    )
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks")
    parser.add_argument("--backend", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="configuration overrides for the training"
    )
    args = parser.parse_args(argv)
    shutil.rmtree(RUN, ignore_errors=True)
    make_models(RUN)
    shared_before = set(os.listdir("/dev/shm"))
    began = time.perf_counter()
    held = watch(command(args.ranks, args.steps, args.backend, args.set))
    (RUN / "held.json").write_text(json.dumps(held))
    measured = held[args.warm_up :]
    growths = [
        (rank, growth(quantity, [step[rank][quantity] for step in measured]))
        for rank in range(args.ranks)
        for quantity in TOLERANCE
    ]
    print(table(growths, len(measured)))
    left = sorted(name for name in set(os.listdir("/dev/shm")) - shared_before if Path("/dev/shm", name).exists())
    print(f"files left in shared memory: {', '.join(left) or 'none'}; {time.perf_counter() - began:.0f} s")
    if leaks := [f"{found.quantity} of rank {rank}" for rank, found in growths if found.leaks]:
        sys.exit(f"soak: {', '.join(leaks)} grew by more than the tolerance")
    print(f"soak passed: no resource grew by more than the tolerance on {args.ranks} rank(s) with {args.backend}")


if __name__ == "__main__":
    main()
