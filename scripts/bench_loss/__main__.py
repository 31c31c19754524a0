"""Compare time, memory and errors of the loss head with eager PyTorch, torch.compile and Liger.

    python -m scripts.bench_loss [--device cpu|cuda] [--quick] [--repeats n] [--json FILE]

The task is hidden rows -> logits -> top-k KL -> gradients of hidden rows and head. Eager and compiled PyTorch use
``hidden @ head.T`` and ``lean_kl``, the exact form with the least memory that we found in plain PyTorch (``topk_kl``
takes a third more; log1p(-sum q) for the tail takes less but loses a small tail's digits). Liger has no top-k loss: its
fused linear JSD also runs the teacher's head, over the complete vocabulary, and is compared with its own definition.
The N rows repeat 16 distinct rows with different weights, so that a float64 reference of 16 rows verifies the loss and
both complete gradients at every size. The exit code is 1 if a contender is wrong or a bound is missed. Contenders run
in turn: other load on the machine slows all of them.

Peak memory excludes the inputs. On a CPU a dispatch mode counts storages (not an operator's internal memory) without
one gradient of hidden rows and of the head; eager's is counted on fake tensors, and the count is verified on real ones.
On CUDA it is the allocator's peak, gradients included.

The roofline is the time of the matmuls at the measured peak plus the time of two reads and one write of the logits at
the measured bandwidth of a copy. Goals in ms are for an H200.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from scripts.bench_loss import race
from scripts.bench_loss.contenders import Contender, contenders, installed
from scripts.bench_loss.kernels import bench_kernels
from scripts.bench_loss.measure import Machine, measure_machine
from scripts.bench_loss.problem import Size, make_problem
from scripts.bench_loss.report import Check, Report

HEAD_MS = {4096: 95.0}
"""Goals of the fused head on an H200, by hidden width."""


@dataclass(frozen=True)
class Plan:
    """Sizes and repetitions of the benchmark."""

    dtype: torch.dtype
    raced: tuple[Size, ...]
    memory: tuple[Size, ...]
    kernels: Size | None
    repeats: int
    copied: int
    """Bytes of the copy that measures the bandwidth."""
    side: int
    """Side of the square matmul that measures the peak."""


CPU = Plan(
    torch.float32,
    raced=(Size(512, 49_152, 576, 64),),
    memory=tuple(Size(n, v, 576, 64) for v in race.MEMORY_BOUNDS for n in (1024, 4096)),
    kernels=None,
    repeats=3,
    copied=2**28,
    side=2048,
)
GPU = Plan(
    torch.bfloat16,
    raced=tuple(Size(16_384, 151_936, d, 64) for d in (2560, 4096)),
    memory=(),
    kernels=Size(16_384, 151_936, 0, 64),
    repeats=20,
    copied=2**32,
    side=8192,
)
SMALL = Size(192, 2048, 48, 16, chunk_rows=16)


def quick(plan: Plan) -> Plan:
    """Return the plan with tiny sizes."""
    kernels = None if plan.kernels is None else Size(64, 2048, 0, 16)
    memory = (SMALL,) if plan.memory else ()
    return dataclasses.replace(plan, raced=(SMALL,), memory=memory, kernels=kernels, repeats=2, copied=2**24, side=512)


def run_section(report: Report, name: str, section: Callable[[], None]) -> None:
    """Run a section; an exception becomes a failed check, and the next sections still run."""
    try:
        section()
    except Exception as error:
        traceback.print_exc()
        note = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]:.100}"
        report.checks.append(Check(f"{name}: ran", 0, "==", 1, note))


def measure(report: Report, plan: Plan, device: torch.device, rivals: Sequence[Contender]) -> None:
    """Measure everything in the plan."""
    report.progress("bandwidth and matmul peak")
    machine = measure_machine(device, plan.dtype, plan.copied, plan.side)
    report.about |= {"GB_per_s": machine.bytes_per_s / 1e9, "TFLOP_per_s": machine.flops_per_s / 1e12}
    verdict = device.type == "cuda" and plan.raced == GPU.raced
    goals = verdict and "H200" in report.about["device"]
    if (kernels := plan.kernels) is not None:
        run_section(
            report,
            "kernels",
            lambda: bench_kernels(report, kernels, device, machine, plan.repeats, verdict, goals),
        )
    for size in plan.raced:
        run_section(report, str(size), lambda size=size: race_at(report, plan, size, device, rivals, machine, goals))  # type: ignore[misc]
    for size in plan.memory:
        run_section(report, str(size), lambda size=size: race.compare_memory(report, size, device, rivals[0]))  # type: ignore[misc]


def race_at(
    report: Report,
    plan: Plan,
    size: Size,
    device: torch.device,
    rivals: Sequence[Contender],
    machine: Machine,
    goals: bool,
) -> None:
    """Run one race and check its bounds."""
    race.race(report, make_problem(size, device, plan.dtype), rivals, machine, plan.repeats)
    of = {result.contender: result for result in report.results if result.case == str(size)}
    ours = of.pop("fused").seconds
    if ours is None:
        return
    if size.width in HEAD_MS:
        bound = ("<=" if goals else "", HEAD_MS[size.width])
        report.checks.append(Check(f"{size}: fused head, ms", ours * 1e3, *bound))
    for name, theirs in of.items():
        if theirs.seconds is not None:
            report.checks.append(Check(f"{size}: time, {name} / fused", theirs.seconds / ours))
    if device.type == "cpu" and (counted_peak := of["eager"].peak_bytes) is not None:
        share = race.fake_eager(size, plan.dtype)[0] / counted_peak
        report.checks.append(Check(f"{size}: eager's peak, fake / real", share, "==", 1.0))


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the file; return 0 if all are correct and every bound holds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: seconds")
    parser.add_argument("--repeats", type=int, help="timed runs: 3 on a CPU, 20 on a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the results")
    args = parser.parse_args(argv)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    plan = GPU if device.type == "cuda" else CPU
    plan = quick(plan) if args.quick else plan
    plan = dataclasses.replace(plan, repeats=args.repeats or plan.repeats)
    report = Report(
        {
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "versions": {name: installed(name) for name in ("torch", "triton", "liger-kernel")},
            "date": datetime.date.today().isoformat(),
            "dtype": str(plan.dtype)[6:],
        }
    )
    measure(report, plan, device, contenders(args.quick))
    if args.json:
        args.json.write_text(json.dumps(report.as_json(), indent=2) + "\n")
    print(f"\n{', '.join(f'{name} {value}' for name, value in report.about.items())}\n{report.tables()}")
    print("passed" if report.passed else "FAILED")
    return 0 if report.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
