"""Collect results and checks of the benchmark and format them as tables and JSON."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Result:
    """Measurements of one contender at one size."""

    case: str
    contender: str
    seconds: float | None = None
    peak_bytes: int | None = None
    flops: int | None = None
    share: float | None = None
    """Roofline time divided by measured time."""
    errors: dict[str, float] = field(default_factory=dict)
    """Relative errors of loss and gradients against the float64 reference, by name."""
    wrong: str = ""
    """Errors that exceed their tolerance, or the exception of a failed run."""
    note: str = ""


@dataclass(frozen=True)
class Check:
    """Measured value and its bound; without a relation, the limit is a goal that is reported but not checked."""

    name: str
    value: float
    relation: str = ""
    limit: float = math.nan
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Return whether the bound holds, or None without a bound; a NaN value fails."""
        if not self.relation:
            return None
        return {"<=": self.value <= self.limit, ">=": self.value >= self.limit, "==": self.value == self.limit}[
            self.relation
        ]


class Report:
    """Results and checks of the benchmark, in order, and printed progress."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.about = about
        self.results: list[Result] = []
        self.checks: list[Check] = []
        self._start = time.monotonic()

    def progress(self, text: str) -> None:
        """Print a progress line with the elapsed seconds."""
        print(f"{time.monotonic() - self._start:6.1f} s  {text}", flush=True)

    @property
    def passed(self) -> bool:
        """Return whether all contenders are correct and every bound holds."""
        return not any(r.wrong for r in self.results) and all(check.passed is not False for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            "about": self.about,
            "results": [_finite(dataclasses.asdict(result)) for result in self.results],
            "checks": [_finite({**dataclasses.asdict(check), "passed": check.passed}) for check in self.checks],
            "passed": self.passed,
        }

    def tables(self) -> str:
        """Return a table of the contenders' results and a table of checks, as text."""
        sides = [("case", "contender", "ms", "peak MB", "GFLOP", "roofline", "worst error", "", "")]
        for r in self.results:
            verdict = "WRONG" if r.wrong else "correct" if r.errors else "-"
            sides.append(
                (
                    r.case,
                    r.contender,
                    _cell(r.seconds, "{:.1f}", 1e3),
                    _cell(r.peak_bytes, "{:.1f}", 1e-6),
                    _cell(r.flops, "{:.2f}", 1e-9),
                    _cell(r.share, "{:.0%}"),
                    _cell(max(r.errors.values(), default=None), "{:.1e}"),
                    verdict,
                    r.wrong or r.note,
                )
            )
        bounds = [("check", "value", "bound", "", "")]
        for c in self.checks:
            verdict = {None: "", True: "ok", False: "FAILED"}[c.passed]
            limit = "" if math.isnan(c.limit) else f"{c.relation or 'goal'} {c.limit:.4g}"
            bounds.append((c.name, f"{c.value:.4g}", limit, verdict, c.note))
        return f"{_aligned(sides, left=(0, 1, 7, 8))}\n\n{_aligned(bounds, left=(0, 2, 3, 4))}"


def _finite(value: Any) -> Any:
    """Return ``value`` with NaN and infinity replaced by None, because JSON cannot represent them."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else form.format(value * unit)


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    sides = [str.ljust if i in left else str.rjust for i in range(len(widths))]
    cells = [[side(text, width) for side, text, width in zip(sides, row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)
