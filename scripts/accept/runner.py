"""Run the parts one after another: each has its own limit, and its hang or crash ends only this part."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from scripts.accept.parts import RANK_GROUPS, START_LIMIT, START_OF_ENGINE, Part, missing
from scripts.accept.processes import Place, Ranks, child_environment, log_folder
from scripts.accept.results import Check, PartResult, Report
from scripts.accept.settings import Order, Settings

ENVIRONMENT_PART = "environment"
"""Part that runs first and finds out what this machine can run."""
_PORTS_PER_GROUP = 6
_STARTS_PER_GROUP = 3
"""Largest number of starts of a group of ranks: one per part that fails."""
_POLL_S = 0.05
_END_S = 5.0
"""Seconds in which processes end by themselves after their last part; then they are killed."""
_LEAST_S = 5.0
"""A part is not started with less time left."""


@dataclass
class Runner:
    """Runs the selected parts of ``report``; call ``run`` once."""

    settings: Settings
    place: Place
    report: Report
    seconds: float
    """Time limit of all parts together."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Maps a need of parts to whether this machine fulfills it; the part ``environment`` finds out."""
    _started: float = field(default_factory=time.monotonic)
    _groups: list[str] = field(default_factory=list)

    def run(self, parts: Sequence[Part]) -> None:
        """Run the parts; the results are in ``report``, which is written after every part."""
        waiting = list(parts)
        self.report.write()  # replaces the results of an earlier run
        if waiting and waiting[0].name == ENVIRONMENT_PART:
            self._run_group([waiting.pop(0)])
            self._use_facts()
        for _, group in groupby(waiting, key=lambda part: (part.group, part.kind)):
            self._run_group(list(group))
        self.report.finished = True
        self.report.write()

    @property
    def left(self) -> float:
        """Return the seconds until the time limit of all parts."""
        return self.seconds - (time.monotonic() - self._started)

    def result(self, part: Part) -> PartResult:
        """Return the result of a part."""
        return next(result for result in self.report.parts if result.name == part.name)

    def _use_facts(self) -> None:
        """Complete facts and settings with what the part ``environment`` found; it found nothing if it failed."""
        found = self.report.about.pop("facts", {})
        gpus = int(found.get("gpus", 0))
        self.facts = {"engine": True, "vllm timings": gpus > 0, **found, **self.facts}
        self.settings = replace(
            self.settings,
            device="cuda" if gpus else "cpu",
            ranks=self.settings.ranks or gpus or 2,
            size=self.settings.size or ("0.6b" if gpus else "tiny"),
        )
        self.facts["ranks"] = bool(found.get("torch")) and self.settings.ranks * self.place.nodes > 1
        self.facts["model"] = bool(self.settings.model)
        self.report.about["size"] = f"size {self.settings.size}"

    def _run_group(self, parts: list[Part]) -> None:
        """Run parts of one group, in new processes after each failure."""
        waiting = [part for part in parts if self._applies(part)]
        while waiting:
            if self.left < _LEAST_S:
                for part in waiting:
                    self._finish(part, reason="no time was left: increase --minutes")
                return
            waiting = waiting[self._start(waiting) :]
            waiting = [part for part in waiting if self._applies(part)]

    def _applies(self, part: Part) -> bool:
        reason = missing(part, self.facts)
        if reason:
            result = self.result(part)
            result.status, result.reason = "n/a", reason
            self._finish(part, reason=reason)
        return not reason

    def _start(self, parts: list[Part]) -> int:
        """Run parts in new processes until all have ended, or one fails; return the number of ended parts."""
        group = parts[0].group
        folder = log_folder(self.settings.folder, group, self._groups)
        ports = self.place.ports(self._port_offset(group), _PORTS_PER_GROUP)
        self._groups.append(group)
        work = [(part.name, part.source, part.limit + START_LIMIT * (done == 0)) for done, part in enumerate(parts)]
        order = Order(work, asdict(self.settings), ports, str(folder / "events"))
        per_node = 1 if group == "model" else self.settings.ranks  # one process per node writes or awaits the model
        distributed = group in RANK_GROUPS and per_node * self.place.nodes > 1
        local_size = per_node if distributed else 1
        environment = child_environment(Path(self.settings.scratch), self.settings.on_gpu)
        if group == "kernels" and not self.settings.on_gpu:
            environment["TRITON_INTERPRET"] = "1"
        with Ranks(order, folder, self.place, local_size, distributed, environment) as ranks:
            return self._follow(parts, ranks)

    def _port_offset(self, group: str) -> int:
        """Return the offset of the ports of the next start of ``group``; it must be equal on all nodes.

        It does not depend on other groups, because a part may fail, and its group start again, on one node only.
        """
        index = RANK_GROUPS.index(group) if group in RANK_GROUPS else 0
        return (index * _STARTS_PER_GROUP + self._groups.count(group)) * _PORTS_PER_GROUP

    def _follow(self, parts: list[Part], ranks: Ranks) -> int:
        """Read events until all parts have ended or one fails; return the number of ended parts."""
        for done, part in enumerate(parts):
            began = time.monotonic()
            result = self.result(part)
            end = self._await_end(result, ranks, min(ranks.order.parts[done][2], self.left))
            result.seconds = time.monotonic() - began
            if end == "ok":
                result.set_status()
            elif end:
                result.fail(end)
                self.facts["engine"] = self.facts.get("engine") and part.name != START_OF_ENGINE
            self._finish(part)
            if end not in ("ok", ""):
                return done + 1
        ranks.wait(_END_S)
        return len(parts)

    def _await_end(self, result: PartResult, ranks: Ranks, limit: float) -> str:
        """Return "ok", "" if the part is not applicable, or why it failed; adds checks to ``result`` as they arrive."""
        deadline = time.monotonic() + limit
        while True:
            alive = ranks.running()  # before the events are read, so that the last ones are not missed
            for event in ranks.events():
                if event["event"] == "check":
                    result.checks.append(Check.from_json(event["check"]))
                elif event["event"] == "about":
                    self.report.about |= event["about"]
                elif event["event"] == "end" and event["status"] == "n/a":
                    result.status, result.reason = "n/a", event["reason"]
                    return ""
                elif event["event"] == "end" and event["status"] == "ok":
                    return "ok"
            if not alive:
                return ranks.failure()
            if time.monotonic() > deadline:
                ranks.dump()
                return f"did not end within {limit:.0f} s (limit); tracebacks: {ranks.log(0)}"
            time.sleep(_POLL_S)

    def _finish(self, part: Part, reason: str = "") -> None:
        """Report the result of a part, and write all results."""
        result = self.result(part)
        if reason:
            result.reason = reason
        if part.name == "model" and result.status == "ok":
            self.facts["model"] = True
        self.report.write()
        print(f"{result.status:7} {result.seconds:6.1f} s  {part.name}: {result.reason or part.about}", flush=True)
