"""A warning at start where the gold answers of held-out problems look unusable for their grader."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from distill.data.grading import Grader
from distill.validation.held_out import HeldOut

logger = logging.getLogger(__name__)

_SAMPLE = 50
"""Gold answers of a dataset that are tried, evenly spaced."""
_SECONDS = 2.0
_NUMBER = re.compile(r"[-+]?\\?\$?[\d.,]+\\?%?")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_MOST_WORDS = 8
"""A mathematical answer of more words is a solution or an explanation."""
_MARKS = (("####", "####"), ("\\boxed{", r"\\boxed\{(.*)\}"), ("answer is", "answer is"), ("Answer:", "Answer:"))
"""Marks before the final answer of a solution, each with an output_pattern that finds it."""


def warn_of_unusable_golds(held_out: HeldOut) -> None:
    """Warn of datasets most of whose gold answers can't be compared with an answer: solutions, prose, several lines.

    Call it on one rank: grading a sample of mathematical answers takes a process and a few seconds.
    """
    golds: dict[tuple[str, str], list[str]] = {}
    for prompt in held_out.prompts:
        if judge := held_out.judge(prompt):
            golds.setdefault((held_out.name(prompt), judge), []).append(prompt.problem.answer)
    with Grader(_SECONDS) as judge_of:
        for (name, judge), found in golds.items():
            sample = found[:: -(-len(found) // _SAMPLE)]
            unusable = [gold for gold in sample if not _usable(gold, judge, judge_of)]
            if 2 * len(unusable) > len(sample):
                logger.warning(
                    "data.validation: %d of %d gold answers of %s look unusable for env_name=%s (%r, say), so right"
                    " answers may count as wrong: %s",
                    *(len(unusable), len(sample), name, judge, _short(unusable[0]), _remedy(unusable)),
                )


def _usable(gold: str, judge: str, judge_of: Grader) -> bool:
    """Whether an answer that states ``gold`` would count as right."""
    if judge in ("regex", "choice"):  # each gold answer is checked when it is loaded
        return True
    if "\n" in gold.strip():
        return False
    if judge == "exact":
        return judge_of(judge, gold, gold) == "right"
    if _NUMBER.fullmatch(gold.strip()):
        return True
    if len(_WORD.findall(gold)) > _MOST_WORDS:
        return False
    return judge_of(judge, f"\\boxed{{{gold}}}", gold) == "right"


def _remedy(unusable: Sequence[str]) -> str:
    for mark, pattern in _MARKS:
        if 2 * sum(mark in gold for gold in unusable) > len(unusable):
            return f"set data.validation.output_pattern='{pattern}', which takes the gold answer from behind {mark}"
    return "name the column of the final answers in data.validation.output_key, or extract them by output_pattern"


def _short(gold: str) -> str:
    return gold if len(gold) <= 80 else gold[:40] + "..." + gold[-37:]
