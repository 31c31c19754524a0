"""Find resource leaks: train a tiny model for hundreds of steps and measure the resources of each rank.

Memory, open files, threads, child processes and shared memory of every rank are read from outside after each step. The
steps after a warm-up are divided into equal segments. A line is fitted to the segments' means; for memory to their
minima, because a checkpoint returns freed memory. Growth above three standard errors and above a minimum for each
resource is a leak: exit code 1.
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

from distill.metrics.sinks import METRICS_FILE
from scripts.launch import ENVIRONMENT, ROOT, torchrun

RUN = ROOT / "runs" / "soak"
BASE_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
SEGMENTS = 10
PERIOD = 25
"""Steps between checkpoints: the length of a segment for 300 steps with a warm-up of 50."""
EXTRA_STEPS = 5
"""Steps after the evaluated ones, so that the end of the run is outside the last segment."""
STANDARD_ERRORS = 3.0
MIN_GROWTH = {"memory MiB": 4.0, "open files": 0.5, "threads": 0.5, "child processes": 0.5, "shared memory MiB": 0.5}
"""Growth over the run that is no leak: noise of the allocator, or less than one file, thread or process."""


@dataclass(frozen=True)
class Growth:
    """Growth of a resource from the end of the warm-up to the last step."""

    resource: str
    start: float
    """Level of the first segment."""
    end: float
    """Level of the last segment."""
    grown: float
    """Rise of the fitted line over all steps."""
    error: float
    """Standard error of ``grown``."""

    @property
    def leaks(self) -> bool:
        """Return whether the growth is larger than noise."""
        return self.grown > max(STANDARD_ERRORS * self.error, MIN_GROWTH[self.resource])


def growth(resource: str, values: Sequence[float]) -> Growth:
    """Fit a least-squares line to the means (memory: minima) of SEGMENTS equal segments of ``values``, one per step.

    Values of neighbouring steps are correlated, so a fit to single values would underestimate the error.
    """
    length = len(values) // SEGMENTS
    if length < 1:
        raise ValueError(f"{len(values)} values are fewer than {SEGMENTS} segments: set more --steps")
    level_of = min if resource == "memory MiB" else mean
    levels = [level_of(values[len(values) - (SEGMENTS - i) * length :][:length]) for i in range(SEGMENTS)]
    middle, level = (SEGMENTS - 1) / 2, mean(levels)
    variation = sum((i - middle) ** 2 for i in range(SEGMENTS))
    slope = sum((i - middle) * value for i, value in enumerate(levels)) / variation
    rest = sum((value - level - slope * (i - middle)) ** 2 for i, value in enumerate(levels))
    error = math.sqrt(rest / (SEGMENTS - 2) / variation)
    return Growth(resource, levels[0], levels[-1], slope * SEGMENTS, error * SEGMENTS)


def resources_of(process: psutil.Process) -> dict[str, float]:
    """Return a process's current resources by name."""
    return {
        "memory MiB": process.memory_info().rss / 2**20,
        "open files": float(process.num_fds()),
        "threads": float(process.num_threads()),
        "child processes": float(len(process.children(recursive=True))),
        "shared memory MiB": shared_memory(process) / 2**20,
    }


def shared_memory(process: psutil.Process) -> int:
    """Return the bytes of files in /dev/shm that a process maps or has open, including unlinked ones."""
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
        except OSError:  # closed in the meantime
            continue
    return mapped + opened


def make_models(folder: Path) -> None:
    """Write two tiny random models with SmolLM2's tokenizer: a student of two layers, a teacher of three."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    for name, layers in (("student", 2), ("teacher", 3)):
        torch.manual_seed(layers)
        config = AutoConfig.from_pretrained(BASE_MODEL)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "head_dim": 32}
        config.update({**sizes, "num_attention_heads": 2, "num_key_value_heads": 2})
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(BASE_MODEL).save_pretrained(folder / name)


def command(ranks: int, steps: int, backend: str, overrides: Sequence[str]) -> list[str]:
    """Return the training command, with a checkpoint and a validation every PERIOD steps."""
    folder = RUN.relative_to(ROOT)
    return torchrun(
        ranks,
        *("-m", "distill.train", "--config", "recipes/smollm2-distillation-cpu.yaml"),
        *(f"policy.model_name={folder}/student", f"teacher.model_name={folder}/teacher", "policy.precision=float32"),
        *(f"cluster.gpus_per_node={ranks}", f"policy.generation.backend={backend}", f"runtime.run_dir={folder}/run"),
        *(f"distillation.max_num_steps={steps + EXTRA_STEPS}", "distillation.max_num_epochs=100000"),
        *("distillation.num_prompts_per_step=4", "policy.train_global_batch_size=8"),
        *("policy.generation.max_new_tokens=8", f"distillation.val_period={PERIOD}", "distillation.max_val_samples=4"),
        *(f"checkpointing.checkpoint_dir={folder}/checkpoints", f"checkpointing.save_period={PERIOD}"),
        *("checkpointing.keep_top_k=2", "logger.num_val_samples_to_print=0"),
        *overrides,
    )


def measure(line: Sequence[str]) -> list[list[dict[str, float]]]:
    """Run the training command; return each rank's resources after each step. Exits if the training fails."""
    RUN.joinpath("run").mkdir(parents=True)
    with (RUN / "output.txt").open("w") as output:
        launcher = psutil.Popen(line, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdout=output, stderr=output)
        measured: list[list[dict[str, float]]] = []
        seen = 0
        while launcher.poll() is None:
            time.sleep(0.02)
            steps = steps_done(RUN / "run" / METRICS_FILE)
            if steps > seen:
                try:
                    ranks = [child for child in launcher.children() if "distill.train" in child.cmdline()]
                    measured.append([resources_of(rank) for rank in ranks])
                except (psutil.Error, OSError):  # the ranks are exiting
                    continue
                seen = steps
        code = launcher.wait()
    if code:
        sys.exit(f"soak: training failed with exit code {code}; its output is in {RUN / 'output.txt'}")
    return [step for step in measured if len(step) == max(map(len, measured))]


def steps_done(metrics: Path) -> int:
    """Return the last training step in the run's metrics; 0 if there are no steps."""
    if not metrics.exists():
        return 0
    lines = metrics.read_text().rpartition("\n")[0].splitlines()
    return max((json.loads(line)["step"] for line in lines[-2:] if '"train/loss"' in line), default=0)


def table(growths: Sequence[tuple[int, Growth]], steps: int) -> str:
    """Return the table: one line per rank and resource."""
    rows = [f"{'over ' + str(steps) + ' steps':22}{'start':>10}{'end':>10}{'growth':>10}{'± error':>10}"]
    for rank, found in growths:
        rows.append(
            f"{f'rank {rank} {found.resource}':22}{found.start:10.1f}{found.end:10.1f}{found.grown:+10.2f}"
            f"{found.error:10.2f}{'  grows' if found.leaks else ''}"
        )
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    """Train, measure and report leaks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--warm-up", type=int, default=50, help="steps that are not evaluated: caches fill, threads start"
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--backend", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more overrides of the recipe")
    args = parser.parse_args(argv)
    shutil.rmtree(RUN, ignore_errors=True)
    make_models(RUN)
    shared_before = set(os.listdir("/dev/shm"))
    start = time.perf_counter()
    measured = measure(command(args.ranks, args.steps, args.backend, args.set))
    (RUN / "resources.json").write_text(json.dumps(measured))
    evaluated = measured[args.warm_up :]
    growths = [
        (rank, growth(resource, [step[rank][resource] for step in evaluated]))
        for rank in range(args.ranks)
        for resource in MIN_GROWTH
    ]
    print(table(growths, len(evaluated)))
    left = sorted(name for name in set(os.listdir("/dev/shm")) - shared_before if Path("/dev/shm", name).exists())
    print(f"files left in /dev/shm: {', '.join(left) or 'none'}; {time.perf_counter() - start:.0f} s")
    if leaks := [f"{found.resource} of rank {rank}" for rank, found in growths if found.leaks]:
        sys.exit(f"soak: leak of {', '.join(leaks)}")
    print(f"soak passed: no leaks on {args.ranks} rank(s) with {args.backend}")


if __name__ == "__main__":
    main()
