"""Compare time, memory and errors of the loss head with eager PyTorch, torch.compile and Liger.

    python -m scripts.bench_loss [--device cpu|cuda] [--quick] [--repeats n] [--json FILE]

Each contender computes the logits from hidden rows, then the top-k KL, then the gradients of the hidden rows and the
head. The contenders are:

- fused: ``fused_linear_kl``.
- eager and torch.compile: ``hidden @ head.T`` and ``lean_kl``, the exact formula that needs the least memory in plain
  PyTorch. (``topk_kl`` needs a third more memory. The formula log1p(-sum q) for the tail needs less, but is inaccurate
  if the tail is small.)
- liger jsd: Liger's fused linear JSD, because Liger has no top-k loss. It also computes the teacher's logits, and its
  loss covers the complete vocabulary. It is verified against the definition of the JSD.

The N rows repeat 16 distinct rows with different weights. So a float64 reference of 16 rows is enough to verify the
loss and both complete gradients at every size. The contenders run alternately, so that other load on the machine slows
all of them. The exit code is 1 if a contender is wrong or a bound does not hold.

Peak memory excludes the inputs. On a CPU it is measured by a dispatch mode, which counts storages without the final
gradients and without an operator's internal memory. For eager it is measured on fake tensors, and real tensors verify
the result. On CUDA it is the peak of the allocator, including gradients.

A size with fewer tokens than vocabulary entries, as tokenizers have, shows the cost of an odd number of columns.

The roofline is the time of the matmuls at the measured peak, plus the time of two reads and one write of the logits at
the measured copy bandwidth. The goals in ms are for an H200.
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
"""Goals for the time of the fused head on an H200, by hidden width."""


@dataclass(frozen=True)
class Plan:
    """Sizes and numbers of timed runs of the benchmark."""

    dtype: torch.dtype
    raced: tuple[Size, ...]
    memory: tuple[Size, ...]
    kernels: Size | None
    repeats: int
    copied: int
    """Bytes that are copied to measure the bandwidth."""
    side: int
    """Number of rows of the square matrices that are multiplied to measure the matmul peak."""


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
    raced=tuple(Size(16_384, 151_936, d, 64, valid=valid) for d in (2560, 4096) for valid in (None, 151_669)),
    memory=(),
    kernels=Size(16_384, 151_936, 0, 64),
    repeats=20,
    copied=2**32,
    side=8192,
)
SMALL = Size(192, 2048, 48, 16, chunk_rows=16)
SMALL_ODD = dataclasses.replace(SMALL, valid=1999)


def quick(plan: Plan) -> Plan:
    """Return the plan with tiny sizes, for a run of a few seconds."""
    kernels = None if plan.kernels is None else Size(64, 2048, 0, 16)
    memory = (SMALL,) if plan.memory else ()
    return dataclasses.replace(
        plan, raced=(SMALL, SMALL_ODD), memory=memory, kernels=kernels, repeats=2, copied=2**24, side=512
    )


def run_section(report: Report, name: str, section: Callable[[], None]) -> None:
    """Run one section; report an exception as a failed check, so that the next sections still run."""
    try:
        section()
    except Exception as error:
        traceback.print_exc()
        note = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]:.100}"
        report.checks.append(Check(f"{name}: ran", 0, "==", 1, note))


def measure(report: Report, plan: Plan, device: torch.device, rivals: Sequence[Contender]) -> None:
    """Run all sections of the plan; ``rivals``: the contenders, ``fused`` first."""
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
        raced = rivals if size.valid is None else rivals[:1]  # only the fused head supports vocabulary padding
        run_section(
            report,
            str(size),
            lambda size=size, raced=raced: race_at(report, plan, size, device, raced, machine, goals),  # type: ignore[misc]
        )
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
    """Compare all contenders at one size and add checks of time and memory to the report."""
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
    if device.type == "cpu" and "eager" in of and (counted_peak := of["eager"].peak_bytes) is not None:
        share = race.fake_eager(size, plan.dtype)[0] / counted_peak
        report.checks.append(Check(f"{size}: eager's peak, fake / real", share, "==", 1.0))


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or, for a CPU device, of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print the tables; return 0 if all contenders are correct and every bound holds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if available")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes; takes seconds")
    parser.add_argument("--repeats", type=int, help="timed runs per contender (default: 3 on a CPU, 20 on a GPU)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this JSON file")
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
