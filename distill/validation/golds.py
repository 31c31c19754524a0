"""Warn at start if the gold (reference) answers of validation problems look unusable for their grader."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from distill.data.grading import Grader
from distill.validation.held_out import HeldOut

log = logging.getLogger(__name__)

_SAMPLE = 50
"""Maximum number of gold answers checked per dataset. They are evenly spaced in the dataset."""
_SECONDS = 2.0
"""Time limit for grading one gold answer, in seconds."""
_NUMBER = re.compile(r"[-+]?\\?\$?[\d.,]+\\?%?")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_MAX_WORDS = 8
"""Maximum number of words of a usable mathematical gold answer. A longer text is usually a solution."""
_MARKS = (("####", "####"), ("\\boxed{", r"\\boxed\{(.*)\}"), ("answer is", "answer is"), ("Answer:", "Answer:"))
"""Pairs (mark, output_pattern), used to suggest a fix for gold answers that are complete solutions.

``mark`` precedes the final answer in a solution; ``output_pattern`` extracts this answer.
"""


def warn_of_unusable_golds(held_out: HeldOut) -> None:
    """Warn of each validation dataset in which most gold (reference) answers cannot match a response.

    Unusable gold answers are complete solutions, prose, or texts of several lines. Call it on one rank only: grading a
    sample of gold answers starts a process and takes a few seconds.
    """
    golds: dict[tuple[str, str], list[str]] = {}
    for prompt in held_out.prompts:
        if grader := held_out.grader(prompt):
            golds.setdefault((held_out.name(prompt), grader), []).append(prompt.problem.answer)
    with Grader(_SECONDS) as grade:
        for (name, grader), found in golds.items():
            sample = found[:: -(-len(found) // _SAMPLE)]
            unusable = [gold for gold in sample if not _is_usable(gold, grader, grade)]
            if 2 * len(unusable) > len(sample):
                log.warning(
                    "data.validation: %d of %d checked gold answers of %s look unusable for env_name=%s (for example"
                    " %r), so correct responses may count as wrong: %s",
                    *(len(unusable), len(sample), name, grader, _shortened(unusable[0]), _fix(unusable)),
                )


def _is_usable(gold: str, grader: str, grade: Grader) -> bool:
    """Return whether ``grader`` can grade a response as right if its final answer is ``gold``."""
    if grader in ("regex", "choice"):  # each gold answer is checked when it is loaded
        return True
    if "\n" in gold.strip():
        return False
    if grader == "exact":
        return grade(grader, gold, gold) == "right"
    if _NUMBER.fullmatch(gold.strip()):
        return True
    if len(_WORD.findall(gold)) > _MAX_WORDS:
        return False
    return grade(grader, f"\\boxed{{{gold}}}", gold) == "right"


def _fix(unusable: Sequence[str]) -> str:
    for mark, pattern in _MARKS:
        if 2 * sum(mark in gold for gold in unusable) > len(unusable):
            return f"set data.validation.output_pattern='{pattern}', which extracts the text after {mark}"
    return "set data.validation.output_key to the column of the final answers, or set output_pattern to extract them"


def _shortened(gold: str) -> str:
    return gold if len(gold) <= 80 else gold[:40] + "..." + gold[-37:]
