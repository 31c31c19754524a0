"""Find gold answers that look unusable for their grader, and suggest a fix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from distill.data.grading import Grader, check_gold
from distill.errors import UserError

T = TypeVar("T")

SECONDS = 2.0
"""Time limit for grading one gold answer, in seconds."""
_SAMPLE = 50
"""Maximum number of gold answers checked per dataset. They are evenly spaced in the dataset."""
_NUMBER = re.compile(r"[-+]?\\?\$?[\d.,]+\\?%?")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_MAX_WORDS = 8
"""Maximum number of words of a usable mathematical gold answer. A longer text is usually a solution."""
_MARKS = (("####", "####"), ("\\boxed{", r"\\boxed\{(.*)\}"), ("answer is", "answer is"), ("Answer:", "Answer:"))
"""Pairs (mark, output_pattern), used to suggest a fix for gold answers that are complete solutions.

``mark`` precedes the final answer in a solution; ``output_pattern`` extracts this answer.
"""


def sample_of(values: Sequence[T]) -> Sequence[T]:
    """Return at most ``_SAMPLE`` values, evenly spaced in ``values``."""
    return values[:: -(-len(values) // _SAMPLE) or 1]


def unusable_golds(golds: Sequence[str], grader: str, grade: Grader) -> list[str]:
    """Return the gold answers with which ``grader`` cannot grade a response as right.

    They are complete solutions, prose, or texts of several lines. ``grade`` may start a worker process, which takes a
    few seconds.
    """
    return [gold for gold in golds if not _is_usable(gold, grader, grade)]


def _is_usable(gold: str, grader: str, grade: Grader) -> bool:
    """Return whether ``grader`` can grade a response as right if its final answer is ``gold``."""
    if grader in ("regex", "choice"):
        return is_valid(gold, grader)
    if "\n" in gold.strip():
        return False
    if grader == "exact":
        return grade(grader, gold, gold) == "right"
    if _NUMBER.fullmatch(gold.strip()):
        return True
    if len(_WORD.findall(gold)) > _MAX_WORDS:
        return False
    return grade(grader, f"\\boxed{{{gold}}}", gold) == "right"


def is_valid(gold: str, grader: str) -> bool:
    """Return whether the graders choice and regex accept ``gold``; other graders accept every gold answer."""
    try:
        check_gold(grader, gold, "")
    except UserError:
        return False
    return True


def pattern_for(golds: Sequence[str]) -> tuple[str, str] | None:
    """Return (mark, output_pattern) for a mark that most of ``golds`` contain before their final answer, or None."""
    return next((pair for pair in _MARKS if 2 * sum(pair[0] in gold for gold in golds) > len(golds)), None)


def shortened(gold: str) -> str:
    """Return ``gold`` without its middle if it is long, for messages."""
    return gold if len(gold) <= 80 else gold[:40] + "..." + gold[-37:]
