"""Change of the accuracy since the first validation of a run, paired by problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.report.numbers import paired_difference
from distill.validation.scores import Sample, problem_of

FIRST_VALIDATION = "first_validation"
"""Key of a checkpoint's training_info.json with the grades of the first validation; null without grades."""


def grades(samples: Sequence[Sample], step: int) -> dict[str, Any] | None:
    """Return the grades of the validation at ``step`` as JSON values; None if no response is graded.

    The key ``problems`` maps the first prompt id of each problem, as text, to the numbers of right and of graded
    responses. Repeats of a problem in a dataset count as one problem.
    """
    first_ids: dict[object, str] = {}
    problems: dict[str, list[int]] = {}
    for sample in sorted(samples, key=lambda sample: sample.rollout.prompt.prompt_id):
        if sample.verdict is not None:
            key = first_ids.setdefault(problem_of(sample), str(sample.rollout.prompt.prompt_id))
            counts = problems.setdefault(key, [0, 0])
            counts[0] += sample.verdict == "right"
            counts[1] += 1
    return {"step": step, "problems": problems} if problems else None


def accuracy_change(first: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the metrics of the change between two validations (results of ``grades``) by logged name.

    ``validation/accuracy_change`` is the accuracy now minus that of the first validation, over the problems of both.
    ``validation/accuracy_change_stderr`` is its standard error, with one difference per problem, so the difficulty of a
    problem does not count. It is missing with fewer than two problems. ``validation/accuracy_change_num_problems`` is
    the number of common problems. Empty if ``now`` is the first validation.
    """
    if not first or not now or first["step"] == now["step"]:
        return {}
    before, after = ({p: (r, n) for p, (r, n) in each["problems"].items()} for each in (first, now))
    if (found := paired_difference(before, after)) is None:
        return {}
    (change, stderr), number = found
    values = {"validation/accuracy_change": change, "validation/accuracy_change_num_problems": float(number)}
    return values if stderr is None else values | {"validation/accuracy_change_stderr": stderr}
