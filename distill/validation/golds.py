"""Warn at start if the gold answers of validation problems look unusable for their grader."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from distill.data.golds import SECONDS, pattern_for, sample_of, shortened, unusable_golds
from distill.data.grading import Grader
from distill.validation.held_out import HeldOut

log = logging.getLogger(__name__)


def warn_of_unusable_golds(held_out: HeldOut) -> None:
    """Warn of each validation dataset in which most gold answers cannot match a response.

    Unusable gold answers are complete solutions, prose, or texts of several lines. Call it on one rank only: grading a
    sample of gold answers starts a process and takes a few seconds.
    """
    golds: dict[tuple[str, str], list[str]] = {}
    for prompt in held_out.prompts:
        if grader := held_out.grader(prompt):
            golds.setdefault((held_out.name(prompt), grader), []).append(prompt.problem.answer)
    with Grader(SECONDS) as grade:
        for (name, grader), found in golds.items():
            sample = sample_of(found)
            unusable = unusable_golds(sample, grader, grade)
            if 2 * len(unusable) > len(sample):
                log.warning(
                    "data.validation: %d of %d checked gold answers of %s look unusable for env_name=%s (for example"
                    " %r), so correct responses may count as wrong: %s",
                    *(len(unusable), len(sample), name, grader, shortened(unusable[0]), _fix(unusable)),
                )


def _fix(unusable: Sequence[str]) -> str:
    if pair := pattern_for(unusable):
        return f"set data.validation.output_pattern='{pair[1]}', which extracts the text after {pair[0]}"
    return "set data.validation.output_key to the column of the final answers, or set output_pattern to extract them"
