"""Texts of problems: titles without the chat template, and problems that several runs have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from distill.report.samples import Problem, Sample, SampleSet

_TITLE = 160
"""Most characters of a problem's title."""
_ELLIPSIS = "…"


@dataclass(frozen=True)
class Template:
    """The texts with which all prompts of a set begin and end, such as those of a chat template."""

    start: str = ""
    end: str = ""

    def problem(self, prompt: str) -> str | None:
        """Return the text of ``prompt`` between start and end; None if it does not have both, or nothing is left."""
        start, end = self.start, self.end
        inside = prompt.startswith(start) and prompt.endswith(end) and len(prompt) > len(start) + len(end)
        return prompt[len(start) : len(prompt) - len(end)] if inside else None


def template_of(prompts: Iterable[str]) -> Template:
    """Return the texts that all ``prompts`` have in common; empty for fewer than two different prompts."""
    different = set(prompts)
    start = _common(different)
    return Template(start, _common({prompt[len(start) :][::-1] for prompt in different})[::-1])


def _common(texts: Iterable[str]) -> str:
    """Return the longest text with which all ``texts`` begin; "" for fewer than two texts."""
    first, last = min(texts, default=""), max(texts, default="")
    if first == last:
        return ""
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _of_chat(common: Template) -> Template:
    """Return the template without the words that the problems have in common: it ends at a line end or a tag."""
    begin = max(common.start.rfind("\n"), common.start.rfind(">")) + 1
    marks = [start for mark in "\n<" if (start := common.end.find(mark)) >= 0]
    return Template(common.start[:begin], common.end[min(marks, default=len(common.end)) :])


def titles(prompts: Sequence[str], sets: Sequence[tuple[int, SampleSet]] = ()) -> list[str]:
    """Return a short title of each prompt: its first characters without the chat template.

    ``sets``: pairs of the index of the run and a set of its samples. The template is that of the run's prompts of the
    same kind, because prompts of training and validation may differ in it. If a kind has one prompt, another template
    with which the prompt begins and ends is removed. Without sets, all prompts are of one kind.
    """
    groups: dict[tuple[int, bool], list[str]] = {}
    for run, each in sets:
        groups.setdefault((run, each.kind == "train"), []).extend(sample.problem[1] for sample in each.samples)
    members = list(groups.values()) if groups else [list(prompts)]
    templates = [_of_chat(template_of(group)) for group in members]
    own = {p: template for group, template in zip(members[::-1], templates[::-1], strict=True) for p in group}
    templates.sort(key=lambda template: -len(template.start))
    found = []
    for prompt in prompts:
        candidates = [own.get(prompt, Template())]
        candidates = candidates if candidates[0] != Template() else templates
        inside = [text for each in candidates if (text := each.problem(prompt)) is not None and text.strip()]
        found.append(shortened(inside[0] if inside else prompt))
    return found


def shortened(text: str) -> str:
    """Return ``text`` in one line; a long text is cut at the end of a word and ends with an ellipsis."""
    line = " ".join(text.split())
    if len(line) <= _TITLE:
        return line
    words = line[:_TITLE].rpartition(" ")[0]
    return (words if len(words) > _TITLE // 2 else line[: _TITLE - 1]) + _ELLIPSIS


def match_problems(runs: Sequence[Sequence[SampleSet]], names: Sequence[str]) -> list[str]:
    """Give equal problems of several runs the prompt of the first of these runs; return notes on the problems.

    ``runs``: the sets of each run, which are changed in place; ``names``: the names of the runs. Runs with different
    chat templates have different prompts for one problem. Problems are equal if source, prompt id and gold answer are
    equal, and the rest of each prompt, without the texts that all prompts of its run have in common, is in the other.
    """
    known: dict[tuple[str, str], list[_Asked]] = {}
    notes = []
    for sets, name in zip(runs, names, strict=True):
        asked = _asked([each for each in sets if each.kind == "validation"])
        same = {problem: _equal(each, known.get(each.id, ())) for problem, each in asked.items()}
        for problem, each in asked.items():
            if same[problem] is None:
                known.setdefault(each.id, []).append(each)
        renamed = {problem: each.problem for problem, each in same.items() if each and each.problem != problem}
        for of_kind in sets:
            of_kind.samples = [_with_problem(sample, renamed) for sample in of_kind.samples]
        if renamed:
            notes.append(
                f"{name}: the prompts of {len(renamed)} problems differ from those of an earlier run only by the text"
                " that all prompts of a run have in common; the page shows the earlier prompt, and the prompt of this"
                " run as the teacher's text."
            )
    return notes + _unmatched(runs, names)


@dataclass(frozen=True)
class _Asked:
    """A problem as a run's models read it."""

    problem: Problem
    id: tuple[str, str]
    gold: str | None
    text: str | None
    """The problem without the chat template; None if the template is unknown."""


def _asked(sets: Sequence[SampleSet]) -> dict[Problem, _Asked]:
    samples = [sample for each in sets for sample in each.samples]
    template = template_of(sample.problem[1] for sample in samples)
    return {
        sample.problem: _Asked(
            sample.problem, (sample.problem[0], sample.prompt_id), sample.gold, template.problem(sample.problem[1])
        )
        for sample in samples
    }


def _equal(asked: _Asked, known: Iterable[_Asked]) -> _Asked | None:
    """Return the entry of ``known`` with the same problem; None without one."""
    entries = list(known)
    exact = next((each for each in entries if each.problem == asked.problem), None)
    return exact or next((each for each in entries if _is_equal(each, asked)), None)


def _is_equal(one: _Asked, other: _Asked) -> bool:
    if one.gold != other.gold or one.text is None or other.text is None:
        return False
    pairs = ((one.text, other.problem[1]), (other.text, one.problem[1]))
    return all(" ".join(text.split()) in " ".join(prompt.split()) for text, prompt in pairs)


def _with_problem(sample: Sample, renamed: Mapping[Problem, Problem]) -> Sample:
    return replace(sample, problem=renamed[sample.problem]) if sample.problem in renamed else sample


def _unmatched(runs: Sequence[Sequence[SampleSet]], names: Sequence[str]) -> list[str]:
    """Return a note for each run whose last validation has other problems than that of the first run."""
    last = [last_validation(sets) for sets in runs]
    problems = [{sample.problem[1] for sample in each.samples} if each else set() for each in last]
    notes = []
    for name, of_run in zip(names[1:], problems[1:], strict=True):
        if of_run and problems[0] and (different := len(of_run ^ problems[0])):
            notes.append(
                f"{different} problems are only in the last validation of {names[0]} or only in that of {name}:"
                f" the differences between both runs are over the {len(of_run & problems[0])} common problems."
            )
    return notes


def last_validation(sets: Sequence[SampleSet]) -> SampleSet | None:
    """Return the set of the last validation; None without one."""
    return max((each for each in sets if each.kind == "validation"), key=lambda each: each.step, default=None)
