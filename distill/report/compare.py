"""Comparison of runs: differences of their recipes, and the table of their final numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill.report.numbers import Sums, ks_of, paired_difference, pass_at
from distill.report.overview import ABSENT as NO_KEY
from distill.report.overview import Ends, Final, Measured, estimate, flat, nats, percent, spent
from distill.report.prompts import last_validation
from distill.report.read import RunFiles
from distill.report.samples import SampleSet
from distill.supervise.quantities import short_count

ABSENT = "-"
Row = tuple[str, list[str], str | None]
"""Label, one cell per run, and explanation."""


def recipe_differences(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Return the keys whose values differ between the runs, with the value of each run; [] for one run."""
    recipes = [flat(run.recipe) for run in runs]
    keys = list({key: None for recipe in recipes for key in recipe})
    rows = [(key, [recipe.get(key, NO_KEY) for recipe in recipes]) for key in keys]
    return [{"key": key, "values": values} for key, values in rows if len(set(values)) > 1]


def final_table(
    names: Sequence[str], states: Sequence[str], finals: Sequence[Final], sets: Sequence[Sequence[SampleSet]]
) -> dict[str, Any]:
    """Return the table of final numbers with one column per run; rows without any number are omitted.

    ``sets``: the sets of samples of each run. Differences are to the first run, over the problems that both runs
    answered in their last validations. Numbers of different steps have the step in the cell.
    """
    last = [last_validation(each) for each in sets]
    rows: list[Row] = []

    def row(label: str, text: Callable[[Final], str], help_: str | None = None) -> None:
        rows.append((label, [text(final) for final in finals], help_))

    rows.append(("state", list(states), None))
    row("steps", lambda final: str(final.steps))
    row("validations", _validated, "Steps of the first and the last validation with a KL or an accuracy")
    rows.append(("gap closed", _closed(finals), "1 - KL of the last / KL of the first validation"))
    kl, accuracy = [final.kl for final in finals], [final.accuracy for final in finals]
    rows += _ends("KL", kl, _measured_nats, _KL)
    rows.append(("  difference to the first run", _differences(last, SampleSet.kl_of_prompts, _nats), _PAIRED))
    rows += _ends("accuracy", accuracy, estimate, "Fraction of right responses")
    rows.append(("  difference to the first run", _differences(last, SampleSet.accuracy_of_prompts, _points), _PAIRED))
    for k in sorted({k for each in last if each for k in _ks(each)}):
        rows.append((f"pass@{k}", _pass_at(last, k), "Probability that one of k responses is right ± standard error"))
    row("accuracy, context in view", lambda final: estimate(final.in_context), "The untrained student's accuracy")
    row("  at the end", lambda final: estimate(final.in_context_at_end), "The trained student's, context in view")
    rows += _ends("mean length", [final.length for final in finals], _measured_tokens, "Tokens of a response")
    row("truncated responses", lambda final: percent(final.truncated))
    row("loss, last step", lambda final: nats(final.loss.last.value) if final.loss.last else ABSENT)
    row("tokens", lambda final: short_count(final.tokens) if final.steps else ABSENT)
    row("time of all steps", lambda final: spent(final) if final.steps else ABSENT)
    shown = [each for each in rows if any(cell != ABSENT for cell in each[1])]
    return {
        "columns": list(names),
        "rows": [{"label": label, "cells": cells, "help": help_} for label, cells, help_ in shown],
    }


_KL = "KL(teacher || student) in nats per token, mean over all tokens of the responses to held-out problems"
_PAIRED = "Difference of the means over the problems that both runs answered ± its standard error"


def _validated(final: Final) -> str:
    measured = [each for ends in (final.kl, final.accuracy) for each in (ends.first, ends.last) if each]
    steps = sorted({each.step for each in measured})
    if not steps:
        return ABSENT
    return f"steps {steps[0]} and {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"


def _ends(label: str, ends: Sequence[Ends], text: Callable[[Measured], str], help_: str) -> list[Row]:
    """Return the rows of the first and the last value of a metric."""
    help_ += " ± its standard error over problems"
    return [
        (f"{label}, first", _cells([each.first for each in ends], text), help_),
        (f"{label}, last", _cells([each.last for each in ends], text), help_),
    ]


def _cells(values: Sequence[Measured | None], text: Callable[[Measured], str]) -> list[str]:
    """Return the numbers as text, with their steps if these differ."""
    steps = [each.step if each else None for each in values]
    return _with_steps([text(each) if each else ABSENT for each in values], steps)


def _with_steps(cells: Sequence[str], steps: Sequence[Any], name: str = "step") -> list[str]:
    """Return the cells, with the steps at which they were measured if these differ between runs; None: not measured."""
    differ = len({step for step in steps if step is not None}) > 1
    both = zip(cells, steps, strict=True)
    return [
        f"{cell} ({name} {step})" if differ and step is not None and cell != ABSENT else cell for cell, step in both
    ]


def _closed(finals: Sequence[Final]) -> list[str]:
    steps = [
        f"{f.kl.first.step} to {f.kl.last.step}" if f.closed and f.kl.first and f.kl.last else None for f in finals
    ]
    return _with_steps([estimate(final.closed) for final in finals], steps, "steps")


def _differences(
    last: Sequence[SampleSet | None],
    of_prompts: Callable[[SampleSet], Sums],
    text: Callable[[float, float | None], str],
) -> list[str]:
    """Return the paired difference of each run to the first run as text; ``of_prompts``: sums of each prompt."""
    first = of_prompts(last[0]) if last and last[0] else {}
    found = [ABSENT]
    for each in last[1:]:
        paired = paired_difference(first, of_prompts(each)) if each else None
        steps = f"; steps {each.step} and {last[0].step}" if each and last[0] and each.step != last[0].step else ""
        found.append(f"{text(*paired[0])} ({paired[1]} problems{steps})" if paired else ABSENT)
    return found


def _points(mean: float, stderr: float | None) -> str:
    return f"{100 * mean:+.1f}" + (f" ± {100 * stderr:.1f}" if stderr is not None else "") + " points"


def _nats(mean: float, stderr: float | None) -> str:
    return f"{mean:+.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")


def _ks(each: SampleSet) -> list[int]:
    return ks_of(each.verdicts().values())


def _pass_at(last: Sequence[SampleSet | None], k: int) -> list[str]:
    cells = [estimate(pass_at(each.verdicts().values(), k)) if each else ABSENT for each in last]
    return _with_steps(cells, [each.step if each else None for each in last])


def _measured_nats(measured: Measured) -> str:
    return nats(measured.value) + (f" ± {measured.stderr:.4f}" if measured.stderr is not None else "")


def _measured_tokens(measured: Measured) -> str:
    return f"{measured.value:.1f}" + (f" ± {measured.stderr:.1f}" if measured.stderr is not None else "")


def as_text(table: Mapping[str, Any]) -> str:
    """Return the table of final numbers as aligned text for a terminal; control characters are replaced by "?"."""
    lines = [["", *table["columns"]], *([row["label"], *row["cells"]] for row in table["rows"])]
    texts = [["".join(c if c.isprintable() else "?" for c in cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in texts)
