"""Print what a training step does on fake CUDA tensors: memory, bytes moved, kernel launches, host syncs.

    .venv/bin/python -m tests.fakecuda.drive --student 4b --teacher 32b --ranks 8 --layers 2 key=value ...

No GPU and no weights are needed. With all layers of Qwen3-4B and Qwen3-32B it takes about two minutes and 3 GB.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from tests.fakecuda.preload import run_preloaded

    run_preloaded("tests.fakecuda.drive", sys.argv[1:])

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fakecuda.build import Case

GIB = 2**30


def parse(argv: Sequence[str]) -> tuple[Case, argparse.Namespace]:
    """Return the case that the command line describes, and all arguments."""
    parser = argparse.ArgumentParser(prog="python -m tests.fakecuda.drive", description=__doc__)
    parser.add_argument("--recipe", default=Case.recipe, help="default: distillation_math with tp = cp = 1")
    parser.add_argument("--student", help="size of a Qwen3 model, such as 4b, or a model folder")
    parser.add_argument("--teacher")
    parser.add_argument("--layers", type=int, default=0, help="layers of both models; 0: all")
    parser.add_argument("--ranks", type=int, help="GPUs of one node; default: those of the recipe")
    parser.add_argument("--tp", type=int)
    parser.add_argument("--cp", type=int)
    parser.add_argument("--teacher-ranks", type=int, help="ranks that compute the teacher's micro-batches together")
    parser.add_argument("--replicas", type=int, default=1, help="copies of the student (HSDP)")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--prompt", type=int, default=300, help="tokens of the student's prompt")
    parser.add_argument("--teacher-prefix", type=int, default=0, help="0: the student's prompt")
    parser.add_argument("--responses", default="2430,2430,2430", help="tokens of one micro-batch's responses")
    parser.add_argument("--micro-batches", type=int, default=2, help="per rank and step")
    parser.add_argument("--steps", type=int, default=2, help="the last step is counted")
    parser.add_argument("--show", type=int, default=12, help="lines of each list")
    parser.add_argument("--json", type=Path, help="file for all counts")
    parser.add_argument("overrides", nargs="*", help="settings of the recipe")
    given = parser.parse_intermixed_args(argv)
    fields = {name: value for name, value in vars(given).items() if name in Case.__dataclass_fields__}
    fields["responses"] = tuple(int(length) for length in given.responses.split(","))
    fields["overrides"] = tuple(given.overrides)
    return Case(**fields), given


def counts(case: Case) -> dict[str, Any]:
    """Run a case and return everything that was counted as JSON values.

    Keys: ``memory`` (phase -> counted peak, forecast without engine, reserved, owners at the peak),
    ``pinned``, ``work`` (phase/part -> class -> launches, bytes, flops), ``by_name``, ``syncs``, ``collectives``.
    """
    from tests.fakecuda.run import PHASES, WATCH, run_case

    result = run_case(case)
    memory = {
        phase: {
            "counted": peak.bytes,
            "forecast": sum(result.forecast.trainer[phase].values()),
            "reserved": peak.reserved,
            "owners": peak.owners,
            "forecast by purpose": result.forecast.trainer[phase],
        }
        for phase, peak in WATCH.peaks.items()
        if phase in PHASES
    }
    work: dict[str, dict[str, Any]] = {}
    for (scope, class_), done in WATCH.work.items():
        work.setdefault("/".join(filter(None, scope)), {})[class_] = vars(done)
    by_name = [("/".join(filter(None, s)), c, n, vars(done)) for (s, c, n), done in WATCH.by_name.items()]
    return {
        "micro_batches": result.micro_batches,
        "layers": result.layers,
        "memory": memory,
        "pinned": dict(zip(("bytes", "rounded", "blocks"), WATCH.pinned.peak, strict=True))
        | {"micro-batches": result.transferred, "forecast": result.forecast.host},
        "work": work,
        "by_name": by_name,
        "syncs": [("/".join(filter(None, scope)), *rest, n) for (scope, *rest), n in WATCH.syncs.items()],
        "collectives": [("/".join(filter(None, s)), n, vars(done)) for (s, n), done in WATCH.collectives.items()],
    }


def report(found: dict[str, Any], show: int) -> None:
    """Print the counts."""
    print("== peak of allocated device memory per rank, GiB (forecast without engine and reserve)")
    for phase, peak in found["memory"].items():
        error = peak["forecast"] / peak["counted"] - 1
        print(
            f"{phase:10} counted {peak['counted'] / GIB:8.3f}  forecast {peak['forecast'] / GIB:8.3f} ({error:+.1%})"
            f"  reserved by the simulated allocator {peak['reserved'] / GIB:.2f}"
        )
        for purpose, size in sorted(peak["forecast by purpose"].items(), key=lambda line: -line[1]):
            if size >= 2**20:
                print(f"     forecast {size / GIB:8.3f}  {purpose}")
        for owner, size in list(peak["owners"].items())[:show]:
            print(f"     counted  {size / GIB:8.3f}  {owner}")
    pinned = found["pinned"]
    print(
        f"== pinned host memory per rank: {pinned['bytes']} bytes ({pinned['bytes'] / GIB:.3f} GiB) in"
        f" {pinned['blocks']} blocks, {pinned['rounded'] / GIB:.3f} GiB with blocks rounded up to powers of two;"
        f" micro-batches {pinned['micro-batches']} bytes, forecast {pinned['forecast']}"
    )
    print("== kernels by class")
    for scope, classes in found["work"].items():
        for class_, done in classes.items():
            layers = found["layers"][scope.startswith("teacher")]
            each = done["launches"] / layers / found["micro_batches"]
            print(
                f"{scope:22}{class_:12}{done['bytes'] / 1e9:10.2f} GB {done['flops'] / 1e12:9.1f} TFLOP"
                f" {done['launches']:7d} launches ({each:.1f} per layer and micro-batch of the student)"
            )
    print("== kernels by name")
    largest: dict[str, list[Any]] = {}
    for scope, class_, name, done in found["by_name"]:
        largest.setdefault(scope, []).append((done["bytes"], done["launches"], class_, name))
    for scope, rows in largest.items():
        for size, launches, class_, name in sorted(rows, reverse=True)[:show]:
            print(f"{scope:22}{class_:12}{size / 1e9:10.2f} GB {launches:7d}  {name}")
    print(f"== host syncs of a step with {found['micro_batches']} micro-batches of the student")
    for scope, kind, place, count in sorted(found["syncs"]):
        print(f"{count:6d}  {scope:22}{kind:36}{place}")
    print("== collectives (bytes of the largest input)")
    for scope, name, done in found["collectives"]:
        print(f"{scope:22}{name:36}{done['launches']:7d} {done['bytes'] / 1e9:10.2f} GB")


def main(argv: Sequence[str]) -> int:
    """Run the case of the command line and print its counts."""
    case, given = parse(argv)
    started = time.monotonic()
    found = counts(case)
    report(found, given.show)
    print(f"== {time.monotonic() - started:.0f} s")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
