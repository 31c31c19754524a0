"""Results of the acceptance test: measured values with bounds, status of each part, text table and JSON."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "FAILED", "n/a", "not run"]
"""ok: all bounds hold; n/a: this machine cannot run the part; not run: no time was left, or a signal came."""


class NotApplicable(Exception):
    """This machine cannot run a part; the message is the reason, such as "needs a GPU"."""


@dataclass(frozen=True)
class Bound:
    """Limit of a measured value."""

    relation: Literal["<=", ">=", "=="]
    limit: float

    def holds(self, value: float) -> bool:
        """Return whether ``value`` is within the limit; False for nan."""
        if self.relation == "==":
            return value == self.limit
        return value <= self.limit if self.relation == "<=" else value >= self.limit

    def __str__(self) -> str:
        return f"{self.relation} {self.limit:g}"


def at_most(limit: float) -> Bound:
    """Return the bound value <= limit."""
    return Bound("<=", limit)


def at_least(limit: float) -> Bound:
    """Return the bound value >= limit."""
    return Bound(">=", limit)


def exactly(limit: float) -> Bound:
    """Return the bound value == limit."""
    return Bound("==", limit)


@dataclass(frozen=True)
class Check:
    """One measured value, with or without a bound. ``value`` is None if this machine cannot measure it."""

    name: str
    value: float | None
    unit: str = ""
    bound: Bound | None = None
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Return whether the value is within the bound; None without bound or value."""
        return None if self.bound is None or self.value is None else self.bound.holds(self.value)

    @property
    def verdict(self) -> str:
        """Return ``passed`` as a word for the table."""
        if self.passed is None:
            return "" if self.value is not None else "n/a"
        return "ok" if self.passed else "FAILED"

    def as_json(self) -> dict[str, Any]:
        """Return a JSON object; nan and infinity are strings, because JSON has no such numbers."""
        value = self.value if self.value is None or math.isfinite(self.value) else str(self.value)
        bound = None if self.bound is None else str(self.bound)
        fields = {"name": self.name, "value": value, "unit": self.unit, "bound": bound}
        return {**fields, "passed": self.passed, "note": self.note}

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Check:
        """Return the check of a JSON object that ``as_json`` made."""
        value, bound = found["value"], found["bound"]
        made = Bound(bound.split()[0], float(bound.split()[1])) if bound else None
        return Check(found["name"], None if value is None else float(value), found["unit"], made, found["note"])


@dataclass
class PartResult:
    """Result of one part. ``reason``: why it has another status than ok."""

    name: str
    kind: str
    status: Status = "not run"
    seconds: float = 0.0
    reason: str = ""
    checks: list[Check] = field(default_factory=list)

    def set_status(self) -> None:
        """Set the status after the part has ended without an error."""
        failed = [check.name for check in self.checks if check.passed is False]
        self.status = "FAILED" if failed else "ok"
        self.reason = f"out of bounds: {', '.join(failed)}" if failed else ""

    def fail(self, reason: str) -> None:
        """Set the status FAILED with a reason, which becomes one line of at most 300 characters."""
        self.status, self.reason = "FAILED", " ".join(reason.split())[:300]

    def as_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        fields = {"name": self.name, "kind": self.kind, "status": self.status, "seconds": round(self.seconds, 1)}
        return {**fields, "reason": self.reason, "numbers": [check.as_json() for check in self.checks]}


@dataclass
class Report:
    """Results of all parts. ``write`` replaces accept.json and accept.txt in ``folder``."""

    folder: Path
    about: dict[str, Any]
    parts: list[PartResult]
    finished: bool = False
    """Whether no part is outstanding."""

    @property
    def passed(self) -> bool:
        """Return whether no part failed, at least one is ok, and no proof was left out for lack of time."""
        statuses = [part.status for part in self.parts]
        missing = any(part.status == "not run" and part.kind == "proof" for part in self.parts)
        return "FAILED" not in statuses and "ok" in statuses and not missing

    def write(self) -> None:
        """Write both files; a reader never sees an incomplete file."""
        parts = [part.as_json() for part in self.parts]
        found = {**self.about, "finished": self.finished, "passed": self.passed, "parts": parts}
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("accept.json", json.dumps(found, indent=2)), ("accept.txt", self.table())):
            partial = self.folder / f".{name}.{os.getpid()}"
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(self.folder / name)

    def table(self) -> str:
        """Return a text table: one line per part, followed by one line per measured value."""
        rows: list[tuple[str, ...]] = [("part", "status", "seconds", "bound", "reason")]
        for part in self.parts:
            ran = part.status in ("ok", "FAILED")
            rows.append((part.name, part.status, f"{part.seconds:.1f}" if ran else "", "", part.reason))
            rows += [_row(check) for check in part.checks]
        return "\n".join(["  ".join(self._title()), _aligned(rows), self.verdict()])

    def verdict(self) -> str:
        """Return the last line of the table."""
        counts = [f"{sum(p.status == s for p in self.parts)} {s}" for s in ("ok", "FAILED", "n/a", "not run")]
        word = "passed" if self.passed else "FAILED"
        seconds = [f"{k}s {sum(p.seconds for p in self.parts if p.kind == k):.0f} s" for k in ("proof", "timing")]
        return f"{word if self.finished else 'unfinished'}: {', '.join(counts)}; {', '.join(seconds)}"

    def _title(self) -> list[str]:
        return [str(value) for key, value in self.about.items() if key in ("date", "node", "devices", "size")]


def _row(check: Check) -> tuple[str, ...]:
    value = "-" if check.value is None else f"{check.value:.4g} {check.unit}".rstrip()
    return f"  {check.name}", check.verdict, value, str(check.bound or ""), check.note


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = []
    for name, verdict, value, bound, note in rows:
        cells = (name.ljust(widths[0]), verdict.ljust(widths[1]), value.rjust(widths[2]), bound.ljust(widths[3]))
        lines.append("  ".join([*cells, note]).rstrip())
    return "\n".join(lines)


def last_error(text: str) -> str:
    """Return the last line of a log that names an error, else its last line; empty for an empty log."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"^\w*(Error|Exception)\b|^error:|Fatal Python|Killed", line)]
    return ([*lines[-1:], *errors[-1:]] or [""])[-1]
