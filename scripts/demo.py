"""Demonstrate on held-out problems that SmolLM2-135M learns from its teacher; two ranks, no GPU.

    python -m scripts.demo context|context-lora|control|heal [key.path=value ...]

``context``: the student learns a rule that only the teacher reads. ``context-lora``: the same with low-rank adapters.
``control``: without the context in training, it does not. ``heal``: a student without every sixth layer recovers most
of its distance to the complete model.

Each demonstration runs distill.train in runs/demo and reads the validation samples. It prints a table and writes
``demo.json``. The exit code is 1 if a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from scripts.experiments import (
    COMPLETE_MODEL,
    compared,
    first_and_last,
    heading,
    rate,
    rise,
    steps,
    table_row,
    token_kl,
    train,
    validated,
)
from scripts.launch import ROOT
from scripts.prepare_models import EVENLY, prepare, pruned

RUNS = ROOT / "runs" / "demo"
MIN_CLOSED = 0.6
"""Smallest fraction of the held-out KL that ``context`` must remove."""
MIN_RECOVERED = 0.5
"""Smallest fraction of the held-out KL that ``heal`` must remove."""
MAX_CLOSED_BY_CONTROL = 0.1
"""Largest fraction of the held-out KL that ``control`` may remove; not 0 because of rounding and sampling."""


def context(overrides: Sequence[str], name: str = "context") -> dict[str, Any]:
    """Train with the rule in the teacher's context only; return the measurements.

    ``name``: name of the demonstration, which is part of the recipe's name.
    """
    run_dir = train(RUNS / name, f"demo-{name}-cpu.yaml", *overrides)
    before, after = first_and_last(run_dir)
    in_view = validated(run_dir, "in_context")
    found = compared(before, after) | {"rule_in_context": rate(in_view), "steps": steps(run_dir)}
    print(f"\n{heading(before)}")
    print(table_row("", "before", "after", "context in view"))
    print(
        table_row(
            "KL(teacher || student), nats per token", f"{found['kl_before']:.4f}", f"{found['kl_after']:.4f}", "0"
        )
    )
    print(
        table_row("rule followed", *(f"{100 * found[f'rule_{at}']:.1f}%" for at in ("before", "after", "in_context")))
    )
    print(f"{found['closed']:.0%} of the gap in KL closed; the rate of the rule rose by {rise(before, after)}")
    print(f"for example: {after[0]['answer'].strip()!r}")
    claims = {
        f"at least {MIN_CLOSED:.0%} of the gap in KL closed": found["closed"] >= MIN_CLOSED,
        "the 95% interval of the rise of the rate is above 0": found["rise_low"] > 0,
    }
    return found | {"claims": claims}


def context_lora(overrides: Sequence[str]) -> dict[str, Any]:
    """Train low-rank adapters as ``context`` trains all weights; return the measurements."""
    return context(overrides, "context-lora")


def control(overrides: Sequence[str]) -> dict[str, Any]:
    """Train without the context; validations compare with the teacher that reads it. Return the measurements."""
    run_dir = train(RUNS / "control", "demo-context-cpu.yaml", "distillation.control=true", *overrides)
    before, after = first_and_last(run_dir)
    found = compared(before, after) | {"steps": steps(run_dir)}
    print(f"\n{heading(before)}, the context removed from training")
    print(table_row("", "before", "after"))
    print(table_row("KL(teacher || student), nats per token", f"{found['kl_before']:.4f}", f"{found['kl_after']:.4f}"))
    print(table_row("rule followed", *(f"{100 * found[f'rule_{at}']:.1f}%" for at in ("before", "after"))))
    print(f"{found['closed']:.0%} of the gap in KL closed; the rate of the rule rose by {rise(before, after)}")
    claims = {
        f"less than {MAX_CLOSED_BY_CONTROL:.0%} of the gap in KL closed": found["closed"] < MAX_CLOSED_BY_CONTROL,
        "the 95% interval of the rise of the rate includes 0": found["rise_low"] <= 0 <= found["rise_high"],
    }
    return found | {"claims": claims}


def heal(overrides: Sequence[str]) -> dict[str, Any]:
    """Train a student without every sixth layer with the complete model as teacher; return the measurements."""
    student = RUNS / "heal-student"
    prepare(student, lambda: pruned(ROOT / COMPLETE_MODEL, EVENLY))
    run_dir = train(RUNS / "heal", "demo-heal-cpu.yaml", f"policy.model_name={student.relative_to(ROOT)}", *overrides)
    before, after = first_and_last(run_dir)
    kl_before, kl_after = token_kl(before), token_kl(after)
    recovered = 1 - kl_after / kl_before
    found = {"responses": len(after), "kl_before": kl_before, "kl_after": kl_after, "recovered": recovered}
    print(f"\n{heading(before)}, 26 of 30 layers")
    print(table_row("", "before", "after"))
    print(table_row("KL(complete || pruned), nats per token", f"{kl_before:.4f}", f"{kl_after:.4f}"))
    print(f"{recovered:.0%} of it removed in {steps(run_dir)} steps")
    claims = {f"at least {MIN_RECOVERED:.0%} of the KL removed": recovered >= MIN_RECOVERED}
    return found | {"steps": steps(run_dir), "claims": claims}


DEMOS: dict[str, Callable[[Sequence[str]], dict[str, Any]]] = {
    "context": context,
    "context-lora": context_lora,
    "control": control,
    "heal": heal,
}


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
