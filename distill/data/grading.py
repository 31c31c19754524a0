"""Whether an answer is right: as mathematics, as exact text, by a regular expression, or by the option it chooses.

To compare expressions may take for ever, take all memory or crash, and so may a regular expression. Both are done in a
process of their own, which is ended when it takes too long. This file is that process's program too: it is started by
its path, so at its top it imports nothing of this package, whose import takes seconds.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from types import TracebackType
from typing import Literal

Verdict = Literal["right", "wrong", "failed"]
"""failed: the judge came to no end, or could not read the gold answer; it counts as wrong and is counted itself."""
JUDGES = ("math", "exact", "regex", "choice")
THINK_TAGS = ("<think>", "</think>")
"""The tags that open and close a thought, unless a recipe sets others."""

SECONDS = 10.0
"""How long one answer may take to judge."""
_STARTING = 300.0
"""How long the process may take to begin: on a shared file system at 1000 ranks, minutes."""
_MEMORY = 8 * 2**30
_BOX = re.compile(r"\\boxed\s*{")


def final_part(answer: str, think_tags: tuple[str, str] = THINK_TAGS, inside_thought: bool = False) -> str:
    """The text after the last closing tag, stripped; all of the answer if it has no thoughts.

    Empty if the answer ends inside a thought. ``inside_thought``: the prompt opened a thought, so the answer begins
    inside it.
    """
    opening, closing = think_tags
    _, closed, after = answer.rpartition(closing)
    return "" if opening in after or (inside_thought and not closed) else after.strip()


def last_box(text: str) -> str:
    """The last ``\\boxed{...}`` of ``text`` that is closed; all of ``text`` where there is none."""
    for start in reversed([box.start() for box in _BOX.finditer(text)]):
        depth = 0
        for brace in re.finditer("[{}]", text[start:]):
            depth += 1 if brace.group() == "{" else -1
            if depth == 0:
                return text[start : start + brace.end()]
    return text


def exact(answer: str, gold: str) -> Verdict:
    """Whether the final part of ``answer`` is ``gold``, blanks around both aside."""
    return _exact(final_part(answer), gold)


def by_regex(answer: str, gold: str) -> Verdict:
    """Whether the regular expression ``gold`` is found in the final part of ``answer``; ^ and $ are its ends."""
    return _by_regex(final_part(answer), gold)


def by_math(answer: str, gold: str) -> Verdict:
    """Whether math-verify finds the last box of the final part of ``answer``, or else its last expression, equal to
    ``gold``."""
    return _by_math(final_part(answer), gold)


def _exact(final: str, gold: str) -> Verdict:
    return "right" if final == gold.strip() else "wrong"


def _by_regex(final: str, gold: str) -> Verdict:
    return "right" if re.search(gold, final) else "wrong"


def _by_math(final: str, gold: str) -> Verdict:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    latex, expression = LatexExtractionConfig(), ExprExtractionConfig()
    no_limit = {"parsing_timeout": None, "raise_on_error": True}  # its alarms don't stop long arithmetic; ours does
    wanted = parse(f"\\boxed{{{gold}}}", [latex], **no_limit) or parse(gold, [latex, expression], **no_limit)
    if not wanted:
        return "failed"
    found = parse(last_box(final), [expression, latex], **no_limit)
    return "right" if verify(wanted, found, timeout_seconds=None, raise_on_error=True) else "wrong"


def by_choice(answer: str, gold: str) -> Verdict:
    """Whether the final part of ``answer`` chooses the option, A to J, that ``gold`` names."""
    return _by_choice(final_part(answer), gold)


def _by_choice(final: str, gold: str) -> Verdict:
    from distill.data.choice import chosen, option

    wanted = option(gold)
    if wanted is None:
        return "failed"
    return "right" if chosen(final) == wanted else "wrong"


_HERE: Mapping[str, Callable[[str, str], Verdict]] = {"exact": _exact, "choice": _by_choice}
_IN_A_PROCESS: Mapping[str, Callable[[str, str], Verdict]] = {"math": _by_math, "regex": _by_regex}
"""Graders of a final part: those of _HERE can neither hang nor crash."""


class Judge:
    """Judges answers one after the other; a context manager, which ends the processes that were needed.

    ``seconds``: how long one answer may take.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._children: dict[str, _Child] = {}

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for child in self._children.values():
            child.end()
        self._children.clear()

    def __call__(
        self,
        name: str,
        answer: str,
        gold: str,
        *,
        think_tags: tuple[str, str] = THINK_TAGS,
        inside_thought: bool = False,
    ) -> Verdict:
        """The verdict of the judge ``name``, one of JUDGES, on the ``final_part`` of ``answer``.

        Raises RuntimeError where its process doesn't start.
        """
        final = final_part(answer, think_tags, inside_thought)
        if name in _HERE:
            return _HERE[name](final, gold)
        if name not in self._children:
            self._children[name] = _Child(name)
        verdict = self._children[name].ask(final, gold, self._seconds)
        if verdict is None:
            self._children.pop(name).end()  # the next answer gets another one
        return verdict or "failed"


class _Child:
    """A process that judges by one judge."""

    def __init__(self, name: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if self._said(_STARTING) != "ready":
            self.end()
            raise RuntimeError(f"the process that judges by {name} does not start: try {sys.executable} {__file__}")

    def ask(self, final: str, gold: str, seconds: float) -> Verdict | None:
        """The verdict; None where there was none in time."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([final, gold, seconds]).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        said = self._said(seconds)
        return said if said in ("right", "wrong", "failed") else None  # type: ignore[return-value]

    def _said(self, seconds: float) -> str:
        """The next line; empty where it is not there in time, or the process is gone."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        ready, _, _ = select.select([pipe], [], [], seconds)
        return os.read(pipe, 64).decode().strip() if ready else ""

    def end(self) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()


def check_judge(name: str, where: str) -> None:
    """Refuse a judge that can't be asked here; ``where`` is the key of the dataset that names it."""
    from distill.errors import UserError

    if name == "math" and find_spec("math_verify") is None:
        raise UserError(
            f"{where}.env_name=math but math-verify is not installed: pip install math-verify, or set env_name to"
            " exact, regex, choice or null"
        )


def check_gold(name: str, gold: str, where: str) -> None:
    """Refuse a gold answer that the judge ``name`` can't read: no regular expression, no option."""
    from distill.errors import UserError

    if name == "choice":
        from distill.data.choice import option

        if option(gold) is None:
            raise UserError(
                f"{where}.env_name=choice but the gold answer {gold[:80]!r} names no option from A to J: write the gold"
                f" answers as letters (A for the first option), name the column of the letters in {where}.output_key,"
                f" or extract them with {where}.output_pattern"
            )
    if name != "regex":
        return
    try:
        re.compile(gold)
    except re.error as error:
        raise UserError(
            f"{where}.env_name=regex but the gold answer {gold!r} is no regular expression ({error}): correct it, or"
            " set env_name to exact"
        ) from None


def _serve(name: str) -> None:
    """Judge what standard input asks, a line a question, until it ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no verdict
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    judge = _IN_A_PROCESS[name]
    judge("1", "1")  # imports what it needs
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        final, gold, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_VIRTUAL, 2 * seconds)  # ends the process even where nobody is left to do it
        try:
            verdict: str = judge(final, gold)
        except Exception:  # of any kind: expressions of an untrained model reach every corner of a library
            verdict = "failed"
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        print(verdict, file=out, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
