"""Read runs and return the data of a page; write the page."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from distill.report.blocks import Blocks
from distill.report.charts import charts
from distill.report.compare import final_table, recipe_differences
from distill.report.html import PageData, build_page
from distill.report.overview import (
    Final,
    alarms_of,
    ending_of,
    facts,
    final_of,
    headline,
    is_control,
    recipe_of,
    resume_notes,
)
from distill.report.prompts import match_problems
from distill.report.read import RunFiles, read_run
from distill.report.samples import VERDICTS, Limits, SampleSet, scan_run, select
from distill.report.tables import positions, tables
from distill.run_files import REPORT_FILE


class Report:
    """Runs of a page, read from their folders. Raises UserError if a folder is not a run directory.

    ``state``: how the run ends whose process makes the page and holds the lock of its folder; None if another process
    makes it.
    """

    def __init__(self, folders: Sequence[str | Path], limits: Limits, state: str | None = None) -> None:
        self.limits = limits
        self.runs = [read_run(folder, owned=state is not None) for folder in folders]
        if state is not None:
            for run in self.runs:
                run.status.update({"state": state, "reason": ""})
        for run in self.runs:
            run.notes += resume_notes(run)
        self.sets = [scan_run(run, limits) for run in self.runs]
        self.finals = [final_of(run, sets) for run, sets in zip(self.runs, self.sets, strict=True)]
        self.endings = [ending_of(run) for run in self.runs]
        self.names = _names(self.runs)
        self._matching = match_problems(self.sets, self.names)

    @property
    def table(self) -> dict[str, Any]:
        """Return the table of final numbers."""
        return final_table(self.names, [ending.state for ending in self.endings], self.finals, self.sets)

    @property
    def notes(self) -> list[str]:
        """Return what is missing in the runs."""
        names = [f"{name}: " if len(self.runs) > 1 else "" for name in self.names]
        found = [(name, note) for name, run in zip(names, self.runs, strict=True) for note in run.notes]
        return [f"{name}{note}" for name, note in found] + self._matching

    def page_data(self) -> PageData:
        """Return the data of the page; read the texts of its responses."""
        shown = [(number, each) for number, sets in enumerate(self.sets) for each in sets]
        prompts, omitted = select([each for _, each in shown], self.limits)
        notes = self.notes + ([omitted] if omitted else [])
        blocks = Blocks(shown, prompts, notes)
        runs = [self._run(number) for number in range(len(self.runs))]
        if blocks.without_tokens:
            notes.append(f"{blocks.without_tokens} responses have no texts of tokens: an earlier version wrote them.")
        index = {
            "title": f"distill: {', '.join(self.names)}",
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "notes": notes,
            "runs": runs,
            "charts": charts(runs),
            "recipe_differences": recipe_differences(self.runs),
            "final": self.table,
            "sample_sets": blocks.sets,
            "samples": blocks.columns,
            "prompts": blocks.prompts,
            "sources": blocks.sources,
            "verdicts": list(VERDICTS),
            "finishes": blocks.finishes,
        }
        return PageData(index, blocks)

    def _run(self, number: int) -> dict[str, Any]:
        run, ending, alarms = self.runs[number], self.endings[number], alarms_of(self.runs[number])
        sets: Sequence[SampleSet] = self.sets[number]
        return {
            "name": self.names[number],
            "folder": str(run.folder),
            "status": ending.state,
            "ending": ending.text,
            "headline": headline(self.finals[number], self._control_of(number), alarms),
            "alarms": [{"label": f"{a['label']} {a['steps']}", "value": a["value"]} for a in alarms],
            "facts": facts(run),
            "recipe": recipe_of(run),
            "tables": tables(run, sets),
            "positions": positions(sets),
        }

    def _control_of(self, number: int) -> tuple[str, Final] | None:
        """Return name and numbers of the page's control run for run ``number``; None if there is no control."""
        if is_control(self.runs[number]):
            return None
        names = zip(self.names, self.finals, self.runs, strict=True)
        return next(((name, final) for name, final, run in names if is_control(run) and final.accuracy.last), None)


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """Return a different name for each run: the folder's name, with its parents where names are equal."""
    names = [run.name for run in runs]
    for parents in range(1, 9):
        longer = ["/".join(run.folder.resolve().parts[-1 - parents :]) for run in runs]
        names = [long if names.count(name) > 1 else name for name, long in zip(names, longer, strict=True)]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def write_page(out: Path, data: PageData) -> None:
    """Write the page to ``out``; an existing page is replaced at once, so a browser never reads half a page."""
    part = out.with_name(f"{out.name}.part")
    part.write_text(build_page(data), encoding="utf-8")
    part.replace(out)


def write_run_page(run_dir: Path, state: Literal["finished", "stopped", "failed"]) -> Path:
    """Write the page of a run of this process, which ends now, into its run directory; return its path.

    ``state``: how the run ends. The status file does not show it yet, because it is written when the process exits.
    """
    out = run_dir / REPORT_FILE
    write_page(out, Report([run_dir], Limits(), state).page_data())
    return out
