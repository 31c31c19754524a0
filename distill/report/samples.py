"""Scan files of responses: statistics of each file, and which responses the page contains.

A file may have hundreds of megabytes. So a scan keeps only a few numbers of each response and its position in the file;
the texts are read again for the responses that the page contains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill.report.numbers import Positions, Sums
from distill.report.read import Kind, RunFiles, SampleFile, json_lines, number

VERDICTS = ("right", "wrong", "failed", "not graded")
Problem = tuple[str, str]
"""Source and prompt of a problem."""


@dataclass(frozen=True)
class Limits:
    """Bounds for the size of a page."""

    steps: int = 8
    """Most files of validations, and most files of training samples, that are read per run."""
    samples: int = 2000
    """Most responses in a page."""
    tokens: int = 2_200_000
    """Most response tokens in a page."""


@dataclass(frozen=True)
class Sample:
    """Numbers of one response, and its position in the file."""

    problem: Problem
    prompt_id: str
    gold: str | None
    response: int
    verdict: str
    finish: str
    tokens: int
    forward: float | None
    """Mean of KL(teacher || student) over the response's tokens, in nats; None if not measured."""
    reverse: float | None
    has_tokens: bool
    """Whether the texts of the tokens are known."""
    offset: int
    """Byte offset of the response's line in the file."""


@dataclass
class SampleSet:
    """The responses of one file, and their KL by position."""

    file: SampleFile
    samples: list[Sample] = field(default_factory=list)
    forward: Positions = field(default_factory=Positions)
    reverse: Positions = field(default_factory=Positions)

    @property
    def kind(self) -> Kind:
        """Return the kind of the file."""
        return self.file.kind

    @property
    def step(self) -> int:
        """Return the number of finished steps (validation), or the step (training), of the responses."""
        return self.file.step

    def verdicts(self) -> dict[Problem, list[bool]]:
        """Return for each problem whether each of its graded responses is right."""
        found: dict[Problem, list[bool]] = {}
        for sample in self.samples:
            if sample.verdict != VERDICTS[3]:
                found.setdefault(sample.problem, []).append(sample.verdict == VERDICTS[0])
        return found

    def kl_of_prompts(self) -> Sums:
        """Return for each prompt the sum of KL(teacher || student) over the tokens of its responses, in nats."""
        return self._sums((s, s.forward * s.tokens, s.tokens) for s in self.samples if s.forward is not None)

    def accuracy_of_prompts(self) -> Sums:
        """Return for each prompt the number of right responses, and of graded responses."""
        return self._sums((s, s.verdict == VERDICTS[0], 1) for s in self.samples if s.verdict != VERDICTS[3])

    def length_of_prompts(self) -> Sums:
        """Return for each prompt the number of tokens of its responses, and the number of responses."""
        return self._sums((s, s.tokens, 1) for s in self.samples)

    @staticmethod
    def _sums(values: Iterable[tuple[Sample, float, int]]) -> Sums:
        found: dict[str, tuple[float, float]] = {}
        for sample, value, number_ in values:
            total, numbers = found.get(sample.problem[1], (0.0, 0.0))
            found[sample.problem[1]] = total + value, numbers + number_
        return found


def scan_run(run: RunFiles, limits: Limits) -> list[SampleSet]:
    """Scan at most ``limits.steps`` files of each kind; add notes on omitted and incomplete files to ``run``."""
    found: list[SampleSet] = []
    prompts: dict[tuple[str, Any], str] = {}
    for kind in ("validation", "in_context", "train"):
        files = [file for file in run.sample_files if file.kind == kind]
        kept = evenly(files, limits.steps)
        if len(kept) < len(files):
            steps = ", ".join(str(file.step) for file in kept)
            run.notes.append(
                f"The responses of {len(files) - len(kept)} of {len(files)} {kind} files are left out (option --steps);"
                f" kept are those of the steps {steps}."
            )
        found += [scan(file, prompts, run.notes) for file in kept]
    if any(sample.forward is None for each in found if each.kind == "validation" for sample in each.samples):
        run.notes.append("Some responses of validations were not compared with the teacher, so they have no KL.")
    return [each for each in found if each.samples]


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most ``most`` of the items: the last, the first, and evenly spaced ones between them."""
    if len(items) <= most:
        return list(items)
    if most <= 1:
        return list(items[len(items) - most :])
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def scan(file: SampleFile, prompts: dict[tuple[str, Any], str], notes: list[str]) -> SampleSet:
    """Return the numbers of all responses in ``file``.

    ``prompts`` maps (source, prompt id) of the validation's problems to the prompt; responses with the teacher's
    context in view have another prompt, but belong to the same problem.
    """
    found = SampleSet(file)
    for offset, row in json_lines(file.path, notes):
        source, prompt, id_ = str(row.get("source")), str(row.get("prompt")), str(row.get("prompt_id"))
        if file.kind == "validation":
            prompt = prompts.setdefault((source, id_), prompt)
        elif file.kind == "in_context":
            prompt = prompts.get((source, id_), prompt)
        forward_R, reverse_R = kls(row, "forward_kl"), kls(row, "reverse_kl")
        if file.kind == "validation":
            found.forward.add(forward_R or ())
            found.reverse.add(reverse_R or ())
        verdict = row.get("verdict")
        found.samples.append(
            Sample(
                problem=(source, prompt),
                prompt_id=id_,
                gold=gold_of(row),
                response=response_of(row),
                verdict=verdict if verdict in VERDICTS[:3] else VERDICTS[3],
                finish=str(row.get("finish")),
                tokens=int(number(row.get("tokens")) or 0),
                forward=_mean(forward_R),
                reverse=_mean(reverse_R),
                has_tokens=bool(token_texts(row)),
                offset=offset,
            )
        )
    return found


def response_of(row: Mapping[str, Any]) -> int:
    """Return the number of the response among those to its prompt."""
    return int(number(row.get("answer_number")) or 0)


def gold_of(row: Mapping[str, Any]) -> str | None:
    """Return the gold answer of the response's problem; None if it has none."""
    gold = row.get("gold")
    return gold if isinstance(gold, str) else None


def kls(row: Mapping[str, Any], name: str) -> list[float | None] | None:
    """Return the KL of each token of a response; None for a token whose KL is not finite, and if not measured."""
    values = row.get(name)
    return [number(value) for value in values] if isinstance(values, list) and values else None


def token_texts(row: Mapping[str, Any]) -> list[str]:
    """Return the text of each token of a response; [] if unknown: earlier versions of the program wrote none."""
    texts = row.get("token_texts")
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else []


def _mean(values: Iterable[float | None] | None) -> float | None:
    finite = [value for value in values or () if value is not None]
    return math.fsum(finite) / len(finite) if finite else None


def select(sets: Sequence[SampleSet], limits: Limits) -> tuple[dict[str, int], str | None]:
    """Return the prompts whose responses the page contains, numbered in order, and a note on omitted responses.

    If the responses exceed the limits, evenly spaced prompts are kept, the same in all sets, so that their responses
    stand side by side. If these still exceed the limits, the prompts with the longest responses are left out.
    """
    responses: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for sample in (sample for each in sets for sample in each.samples):
        prompt = sample.problem[1]
        responses[prompt] = responses.get(prompt, 0) + 1
        tokens[prompt] = tokens.get(prompt, 0) + sample.tokens
    total = sum(responses.values())
    too_many = max(total / max(1, limits.samples), sum(tokens.values()) / max(1, limits.tokens))
    prompts = list(responses)
    rule = "the page has those to evenly spaced problems"
    if too_many > 1:
        even = evenly(prompts, max(1, int(len(prompts) / too_many)))
        prompts = _within(even, responses, tokens, limits)
        if len(prompts) < len(even):
            rule += f", without the {len(even) - len(prompts)} of them that have the longest responses"
    kept = sum(responses[prompt] for prompt in prompts)
    note = f"{total - kept} of {total} responses are left out (options --samples and --tokens): {rule}."
    return {prompt: i for i, prompt in enumerate(prompts)}, note if kept < total else None


def _within(prompts: list[str], responses: Mapping[str, int], tokens: Mapping[str, int], limits: Limits) -> list[str]:
    """Return the prompts without the longest ones that exceed the limits; at least one prompt remains."""
    kept = list(prompts)
    while len(kept) > 1 and (
        sum(responses[prompt] for prompt in kept) > limits.samples
        or sum(tokens[prompt] for prompt in kept) > limits.tokens
    ):
        longest = max(kept, key=lambda prompt: tokens[prompt])
        kept.remove(longest)
    return kept
