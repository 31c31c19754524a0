"""What the answers to held-out problems amount to: numbers, lines of a file, a few texts. Pure functions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from torch import Tensor

from distill.data.files import kind_of
from distill.data.grading import Verdict
from distill.types import Rollout

Decode = Callable[[Sequence[int]], str]
"""Token ids as text, special tokens included."""


@dataclass(frozen=True)
class Sample:
    """One answer to a held-out problem."""

    rollout: Rollout
    source: str
    """The dataset, as metrics name it."""
    verdict: Verdict | None = None
    """None: nobody judges it."""
    forward_kl_R: Tensor | None = None
    """float32 [R]: KL(teacher || student) at each token of the answer, in nats; None: not measured."""
    reverse_kl_R: Tensor | None = None
    """float32 [R]: KL(student || teacher)."""
    read_ids: tuple[int, ...] | None = None
    """What was read before the answer, where that is not the student's prompt."""


def source_names(datasets: Sequence[tuple[str, str, str]]) -> list[str]:
    """A short name for metrics of each (source, subset, split): a file's without its kind, a hub dataset's without its
    owner.

    Those that would share a name have subset and split behind it; if that is not enough, the whole path, dots for
    slashes, and at last their number.
    """
    paths = [PurePath(source) for source, _, _ in datasets]
    endings = [len("".join(kind_of(path))) if kind_of(path)[0] else 0 for path in paths]
    short = [path.name[: len(path.name) - ending] for path, ending in zip(paths, endings, strict=True)]
    details = [re.sub(r"[^\w.-]+", "_", ".".join(filter(None, detail))) for _, *detail in datasets]
    whole = [source.replace("/", ".") for source, _, _ in datasets]
    names = short
    for longer in (
        [f"{name}.{detail}" if detail else name for name, detail in zip(short, details, strict=True)],
        [f"{name}.{detail}" if detail else name for name, detail in zip(whole, details, strict=True)],
    ):
        names = [better if names.count(name) > 1 else name for name, better in zip(names, longer, strict=True)]
    return [f"{name}.{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def scores(samples: Sequence[Sample]) -> dict[str, float]:
    """The numbers of a set of answers by name; what was not judged or not measured has none.

    - ``accuracy``: right answers over judged ones (avg@n, where each problem has n); ``judge_failures`` count as wrong.
    - ``accuracy_stderr``: its standard error, of the problems as a sample: answers to one problem, also where a dataset
      repeats it, are not independent. With m answers to P problems, sqrt(P / (P - 1) * sum_p (right_p - accuracy *
      answers_p)^2) / m; with equally many answers a problem it is the deviation of the problems' means over sqrt(P).
    - ``avg_length``: tokens an answer; ``truncation_rate``: answers cut short; ``num_answers``, ``num_problems``.
    - ``forward_kl``, ``reverse_kl``: nats a token, over all tokens of the ``num_compared`` measured answers.
    """
    if not samples:
        return {}
    values = {
        "avg_length": _mean([len(s.rollout.response_ids) for s in samples]),
        "truncation_rate": _mean([s.rollout.finish == "length" for s in samples]),
        "num_answers": float(len(samples)),
        "num_problems": float(len({_problem(s) for s in samples})),
        "num_compared": float(sum(s.forward_kl_R is not None for s in samples)),
    }
    judged = [s for s in samples if s.verdict is not None]
    if judged:
        values |= _accuracy(judged)
    for name in ("forward_kl", "reverse_kl"):
        measured = [kl for s in samples if (kl := getattr(s, f"{name}_R")) is not None]
        if measured:
            tokens = sum(len(kl_R) for kl_R in measured)
            values[name] = math.fsum(float(kl_R.double().sum()) for kl_R in measured) / tokens
    return values


def _problem(sample: Sample) -> tuple[str, str]:
    return sample.source, sample.rollout.prompt.problem.text


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def _accuracy(judged: Sequence[Sample]) -> dict[str, float]:
    right: dict[tuple[str, str], int] = {}
    answers: dict[tuple[str, str], int] = {}
    for sample in judged:
        problem = _problem(sample)
        answers[problem] = answers.get(problem, 0) + 1
        right[problem] = right.get(problem, 0) + (sample.verdict == "right")
    accuracy = sum(right.values()) / len(judged)
    values = {"accuracy": accuracy, "judge_failures": float(sum(s.verdict == "failed" for s in judged))}
    problems = len(answers)
    if problems > 1:
        squares = math.fsum((right[p] - accuracy * answers[p]) ** 2 for p in answers)
        values["accuracy_stderr"] = math.sqrt(problems / (problems - 1) * squares) / len(judged)
    return values


def by_source(samples: Sequence[Sample], prefix: str = "") -> dict[str, float]:
    """``scores`` of all answers as ``validation/NAME``, and of each dataset's as ``validation/DATASET/NAME``.

    ``prefix`` stands before each NAME.
    """
    values = {f"validation/{prefix}{name}": value for name, value in scores(samples).items()}
    for source in dict.fromkeys(s.source for s in samples):
        own = scores([s for s in samples if s.source == source])
        values |= {f"validation/{source}/{prefix}{name}": value for name, value in own.items()}
    return values


def answer_text(rollout: Rollout, decode: Decode) -> str:
    """An answer as text, without the token that stopped it; other special tokens, as think tags may be, included."""
    ids = rollout.response_ids
    return decode(ids[:-1] if rollout.finish == "stop" else ids)


def jsonl_line(sample: Sample, decode: Decode) -> str:
    """A sample as a JSON object: prompt, answer, gold, verdict, source, finish, and the KL of each token."""
    rollout = sample.rollout
    row: dict[str, Any] = {
        "prompt_id": rollout.prompt.prompt_id,
        "answer_number": rollout.response_index,
        "source": sample.source,
        "prompt": decode(rollout.prompt.student_ids if sample.read_ids is None else sample.read_ids),
        "answer": answer_text(rollout, decode),
        "gold": rollout.prompt.problem.answer,
        "verdict": sample.verdict,
        "finish": rollout.finish,
        "tokens": len(rollout.response_ids),
    }
    for name in ("forward_kl", "reverse_kl"):
        kl_R = getattr(sample, f"{name}_R")
        row[name] = None if kl_R is None else [round(value, 5) for value in kl_R.tolist()]
    return json.dumps(row, ensure_ascii=False)


def shown(sample: Sample, decode: Decode) -> str:
    """A sample for a reader: the problem, the answer, the gold answer and the verdict."""
    rollout = sample.rollout
    gold = f" (gold: {rollout.prompt.problem.answer})" if rollout.prompt.problem.answer else ""
    ending = "" if rollout.finish == "stop" else " [cut short]"
    verdict = sample.verdict or "not judged"
    problem = rollout.prompt.problem.text.strip()
    return f"problem: {problem}\nanswer: {answer_text(rollout, decode).strip()}{ending}\n{verdict}{gold}"
