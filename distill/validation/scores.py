"""Compute validation metrics from graded responses, and format the responses as JSON and as text."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor

from distill.data.files import kind_of
from distill.data.grading import Verdict
from distill.metrics.responses import ends_in_a_loop, repeated_token_stats
from distill.report.numbers import ks_of, pass_at
from distill.supervise.progress import heartbeat
from distill.types import Rollout
from distill.validation.comparison import Likely, TopTokens
from distill.validation.token_texts import Decode, TokenTexts

_KLS = ("forward_kl", "reverse_kl")
_LINE_ENDS = "\x85\u2028\u2029"
"""Characters that ``str.splitlines`` takes for ends of lines, but JSON leaves unchanged."""


@dataclass(frozen=True)
class Sample:
    """One response to a validation or training problem, with its grade and KL divergences."""

    rollout: Rollout
    source: str
    """Name of the problem's dataset, as used in metric names."""
    verdict: Verdict | None = None
    """Grade: "right", "wrong" or "failed" (could not be graded); None if the response is not graded."""
    forward_kl_R: Tensor | None = None
    """float32 [R]: KL(teacher || student) in nats at each token of the response; None if not measured."""
    reverse_kl_R: Tensor | None = None
    """float32 [R]: KL(student || teacher) in nats at each token of the response; None if not measured."""
    top_tokens: tuple[TopTokens, ...] | None = None
    """The most likely tokens of both models at the tokens of highest KL; None if not compared with the teacher."""
    topk_overlap_R: Tensor | None = None
    """float32 [R]: fraction of the most likely tokens that both models have in common; None if not measured."""
    read_ids: tuple[int, ...] | None = None
    """Token ids of the prompt that the response was generated from; None: the student's usual prompt."""


def source_names(datasets: Sequence[tuple[str, str, str]]) -> list[str]:
    """Return a short, unique name of each dataset (source, subset, split) for metrics.

    The name is a file's name without suffix, or a hub dataset's name without owner. If names are equal, subset and
    split are appended. If names are still equal, the full path (with dots instead of slashes) replaces the short name.
    If even these names are equal, the index of the dataset is appended.
    """
    paths = [PurePath(source) for source, _, _ in datasets]
    endings = [len("".join(kind_of(path))) if kind_of(path)[0] else 0 for path in paths]
    short = [path.name[: len(path.name) - ending] for path, ending in zip(paths, endings, strict=True)]
    details = [re.sub(r"[^\w.-]+", "_", ".".join(filter(None, detail))) for _, *detail in datasets]
    full = [source.replace("/", ".") for source, _, _ in datasets]
    names = short
    for longer in (
        [f"{name}.{detail}" if detail else name for name, detail in zip(short, details, strict=True)],
        [f"{name}.{detail}" if detail else name for name, detail in zip(full, details, strict=True)],
    ):
        names = [long if names.count(name) > 1 else name for name, long in zip(names, longer, strict=True)]
    return [f"{name}.{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def scores(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the metrics of ``samples`` by name; metrics that were not measured are omitted.

    - ``accuracy``: fraction of right responses among graded responses (avg@n for n responses per problem);
      ``judge_failures``: number of responses that could not be graded, which count as wrong.
    - ``accuracy_stderr``: standard error of the accuracy, clustered by problem, because responses to the same problem
      are not independent. A problem that a dataset repeats counts as one problem. For m graded responses to P problems
      the formula is sqrt(P / (P - 1) * sum_p (right_p - accuracy * responses_p)^2) / m. Problem p has responses_p
      graded responses, of which right_p are right. With the same number of responses per problem this is the standard
      deviation of the problems' mean accuracies, divided by sqrt(P).
    - ``pass@k``: probability that at least one of k responses is right, for k = 2, 4, 8, ... and the number n of graded
      responses that at least half of the problems have. It is the mean over problems of 1 - C(n - right, k) / C(n, k).
      Problems with fewer than k graded responses are not counted. ``pass@k_stderr``: the standard deviation of the
      problems' values, divided by the square root of their number.
    - ``avg_length``: mean number of tokens of a response; ``truncation_rate``: fraction of truncated responses;
      ``repetition_rate``: fraction of responses that end in a loop (``metrics.responses.ends_in_a_loop``);
      ``repeated_token_share``: fraction of tokens in a repeated 8-gram (``metrics.responses.repeated_tokens``);
      ``num_answers``: number of responses; ``num_problems``: number of different problems.
    - ``forward_kl``, ``reverse_kl``: mean of KL(teacher || student) and of KL(student || teacher), in nats, over all
      tokens of the ``num_compared`` responses that were compared with the teacher.
    """
    if not samples:
        return {}
    values = {
        "avg_length": _mean([len(s.rollout.response_ids) for s in samples]),
        "truncation_rate": _mean([s.rollout.finish == "length" for s in samples]),
        "repetition_rate": _mean([ends_in_a_loop(s.rollout) for s in samples]),
        "repeated_token_share": _repeated_token_share(samples),
        "num_answers": float(len(samples)),
        "num_problems": float(len({problem_of(s) for s in samples})),
        "num_compared": float(sum(s.forward_kl_R is not None for s in samples)),
    }
    graded = [s for s in samples if s.verdict is not None]
    if graded:
        values |= _accuracy(graded)
    for name in _KLS:
        measured = [kl for s in samples if (kl := getattr(s, f"{name}_R")) is not None]
        if measured:
            tokens = sum(len(kl_R) for kl_R in measured)
            values[name] = math.fsum(float(kl_R.double().sum()) for kl_R in measured) / tokens
    return values


def problem_of(sample: Sample) -> tuple[str, str]:
    """Return dataset and text of the sample's problem; equal conversations in a dataset are the same problem."""
    problem = sample.rollout.prompt.problem
    return sample.source, problem.text + problem.messages


def _repeated_token_share(samples: Sequence[Sample]) -> float:
    repeated, tokens = repeated_token_stats([sample.rollout for sample in samples])
    return repeated / tokens


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def _accuracy(graded: Sequence[Sample]) -> dict[str, float]:
    verdicts: dict[tuple[str, str], list[bool]] = {}
    for sample in graded:
        verdicts.setdefault(problem_of(sample), []).append(sample.verdict == "right")
    accuracy = sum(map(sum, verdicts.values())) / len(graded)
    values = {"accuracy": accuracy, "judge_failures": float(sum(s.verdict == "failed" for s in graded))}
    problems = len(verdicts)
    if problems > 1:
        squares = math.fsum((sum(right) - accuracy * len(right)) ** 2 for right in verdicts.values())
        values["accuracy_stderr"] = math.sqrt(problems / (problems - 1) * squares) / len(graded)
    return values | _pass_at(list(verdicts.values()))


def _pass_at(verdicts: Sequence[Sequence[bool]]) -> dict[str, float]:
    values: dict[str, float] = {}
    for k in ks_of(verdicts):
        mean, stderr = pass_at(verdicts, k) or (math.nan, None)
        values |= {f"pass@{k}": mean} | ({} if stderr is None else {f"pass@{k}_stderr": stderr})
    return values


def by_source(samples: Sequence[Sample], prefix: str = "") -> dict[str, float]:
    """Return the metrics of all samples together and of each dataset, keyed by logged name.

    The names are ``validation/NAME`` and ``validation/DATASET/NAME``, where NAME is a key of ``scores``. ``prefix`` is
    prepended to each NAME.
    """
    values = {f"validation/{prefix}{name}": value for name, value in scores(samples).items()}
    for source in dict.fromkeys(s.source for s in samples):
        own = scores([s for s in samples if s.source == source])
        values |= {f"validation/{source}/{prefix}{name}": value for name, value in own.items()}
    return values


def response_text(rollout: Rollout, decode: Decode) -> str:
    """Return the response as text without the stop token, but with other special tokens (think tags)."""
    ids = rollout.response_ids
    return decode(ids[:-1] if rollout.finish == "stop" else ids)


def sample_row(sample: Sample, decode: Decode) -> dict[str, Any]:
    """Return prompts, response, gold answer, verdict and length of a sample as JSON values.

    ``teacher_prompt``, the text that the teacher read before the response, is None if it equals ``prompt``, or if the
    response was not compared with the teacher.
    """
    rollout = sample.rollout
    prompt = decode(rollout.prompt.student_ids if sample.read_ids is None else sample.read_ids)
    read = prompt if sample.forward_kl_R is None else decode(rollout.teacher_prefix_ids)
    return {
        "prompt_id": rollout.prompt.prompt_id,
        "answer_number": rollout.response_index,
        "source": sample.source,
        "prompt": prompt,
        "teacher_prompt": None if read == prompt else read,
        "answer": response_text(rollout, decode),
        "gold": rollout.prompt.problem.answer,
        "verdict": sample.verdict,
        "finish": rollout.finish,
        "tokens": len(rollout.response_ids),
    }


def table_row(sample: Sample, decode: Decode) -> dict[str, Any]:
    """Return the values of ``sample_row``, and the mean of each KL over the response in nats; None if not compared."""
    means = {
        f"mean_{name}": None if (kl_R := getattr(sample, f"{name}_R")) is None else _number(float(kl_R.mean()))
        for name in _KLS
    }
    return sample_row(sample, decode) | means


def jsonl_line(sample: Sample, decode: Decode, texts: TokenTexts | None = None, **more: Any) -> str:
    """Return a JSON object with the values of ``sample_row`` and ``more``, and lists with one value per token.

    The lists are the KL divergences, ids and texts of the tokens; ``top_tokens`` has only the tokens of highest KL. A
    KL that is not finite is null.
    ``texts`` splits responses into the texts of their tokens; None: a new ``TokenTexts``.
    """
    texts = texts or TokenTexts(decode)
    row = sample_row(sample, decode) | more
    for name in _KLS:
        kl_R = getattr(sample, f"{name}_R")
        row[name] = None if kl_R is None else [_number(value) for value in kl_R.tolist()]
    ids = sample.rollout.response_ids
    top = None if sample.top_tokens is None else [_top_tokens(each, texts) for each in sample.top_tokens]
    row |= {"token_ids": ids, "token_texts": texts(ids), "top_tokens": top}
    line = json.dumps(row, ensure_ascii=False, allow_nan=False)
    for end in _LINE_ENDS:  # faster than str.translate
        if end in line:
            line = line.replace(end, f"\\u{ord(end):04x}")
    return line


def _number(value: float) -> float | None:
    """Return ``value`` rounded to five digits; None if it is not finite, because JSON has no such numbers."""
    return round(value, 5) if math.isfinite(value) else None


def _top_tokens(found: TopTokens, texts: TokenTexts) -> dict[str, Any]:
    def listed(likely: Likely) -> list[list[Any]]:
        return [[id_, texts.of(id_), _number(prob)] for id_, prob in likely]

    return {"at": found.at, "student": listed(found.student), "teacher": listed(found.teacher)}


def write_samples(path: Path, samples: Sequence[Sample], decode: Decode, **more: Any) -> None:
    """Write one ``jsonl_line`` per sample; a reader sees the previous or the complete file. Creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts, part = TokenTexts(decode), path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        for sample in samples:
            heartbeat()
            file.write(jsonl_line(sample, decode, texts, **more) + "\n")
    os.replace(part, path)


def format_sample(sample: Sample, decode: Decode) -> str:
    """Return the sample as text for the log: problem, response, verdict and gold answer."""
    rollout = sample.rollout
    gold = f" (gold: {rollout.prompt.problem.answer})" if rollout.prompt.problem.answer else ""
    ending = "" if rollout.finish == "stop" else " [truncated]"
    verdict = sample.verdict or "not graded"
    problem = rollout.prompt.problem.text.strip()
    return f"problem: {problem}\nresponse: {response_text(rollout, decode).strip()}{ending}\n{verdict}{gold}"
