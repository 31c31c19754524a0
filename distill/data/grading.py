"""Grade responses by math-verify, exact text, a regular expression or a multiple-choice option.

Comparing expressions or matching a regular expression can take unlimited time or memory, or crash. Both run in a worker
process, which is killed if it exceeds a time limit. The worker runs this file as a script. Imports of ``distill`` are
inside functions, because they would delay the start of the worker by seconds.
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
"""Result of grading a response. "failed" means a timeout, a crash or an unreadable gold answer.

A "failed" response counts as wrong, and is also counted separately.
"""
THINK_TAGS = ("<think>", "</think>")
"""Default opening and closing tag of a think block (the reasoning in a response)."""

SECONDS = 10.0
"""Default time limit in seconds for grading one response."""
_START_SECONDS = 300.0
"""Time limit in seconds for starting a worker process.

The imports of the worker take minutes if 1000 ranks load them from one file system at the same time.
"""
_MEMORY = 8 * 2**30
"""Limit of the address space of a worker process in bytes."""
_BOX = re.compile(r"\\boxed\s*{")


def final_part(response: str, think_tags: tuple[str, str] = THINK_TAGS, inside_thought: bool = False) -> str:
    """Return the stripped text after the last think block of ``response``; all text if it has no block.

    A think block is the reasoning between the two ``think_tags``. Returns "" if the response ends inside a think block.
    ``inside_thought``: whether the prompt ends with an opening tag, so that the response begins inside a think block.
    """
    opening, closing = think_tags
    _, closed, after = response.rpartition(closing)
    return "" if opening in after or (inside_thought and not closed) else after.strip()


def last_box(text: str) -> str:
    r"""Return the last closed ``\boxed{...}`` in ``text``, or the complete ``text`` if no box is closed."""
    for start in reversed([box.start() for box in _BOX.finditer(text)]):
        depth = 0
        for brace in re.finditer("[{}]", text[start:]):
            depth += 1 if brace.group() == "{" else -1
            if depth == 0:
                return text[start : start + brace.end()]
    return text


# ---- graders: compare the final part of a response with the gold answer ----------------------------------------------


def _grade_exact(final: str, gold: str) -> Verdict:
    return "right" if final == gold.strip() else "wrong"


def _grade_regex(final: str, gold: str) -> Verdict:
    """Return "right" if the regular expression ``gold`` matches anywhere in ``final``, else "wrong"."""
    return "right" if re.search(gold, final) else "wrong"


def _grade_math(final: str, gold: str) -> Verdict:
    r"""Compare the last ``\boxed{...}`` of ``final`` with ``gold`` by math-verify.

    Without a box, math-verify compares the last expression of ``final``. Returns "failed" for an unreadable ``gold``.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    latex, expression = LatexExtractionConfig(), ExprExtractionConfig()
    # math-verify's time limits use alarms, which do not interrupt long arithmetic; the worker's time limit does.
    no_limit = {"parsing_timeout": None, "raise_on_error": True}
    wanted = parse(f"\\boxed{{{gold}}}", [latex], **no_limit) or parse(gold, [latex, expression], **no_limit)
    if not wanted:
        return "failed"
    found = parse(last_box(final), [expression, latex], **no_limit)
    return "right" if verify(wanted, found, timeout_seconds=None, raise_on_error=True) else "wrong"


def _grade_choice(final: str, gold: str) -> Verdict:
    """Compare the option (A to J) that the text ``final`` chooses with the correct option ``gold``.

    Returns "failed" if ``gold`` is not an option.
    """
    from distill.data.choice import chosen_option, named_option

    wanted = named_option(gold)
    if wanted is None:
        return "failed"
    return "right" if chosen_option(final) == wanted else "wrong"


_IN_PROCESS: Mapping[str, Callable[[str, str], Verdict]] = {"exact": _grade_exact, "choice": _grade_choice}
"""Maps grader names to functions that run in the calling process; they can neither hang nor crash."""
_IN_WORKER: Mapping[str, Callable[[str, str], Verdict]] = {"math": _grade_math, "regex": _grade_regex}
"""Maps grader names to functions that run in a worker process with a time limit."""


class Grader:
    """Grader of responses; a context manager that ends its worker processes on exit.

    Worker processes run the graders math and regex. ``seconds``: time limit in seconds for one response.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._workers: dict[str, _Worker] = {}

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes; a later call of the grader starts new ones."""
        for worker in self._workers.values():
            worker.end()
        self._workers.clear()

    def __call__(
        self,
        name: str,
        response: str,
        gold: str,
        *,
        think_tags: tuple[str, str] = THINK_TAGS,
        inside_thought: bool = False,
    ) -> Verdict:
        """Grade ``response`` against the gold answer ``gold`` with the grader ``name``.

        The graders are math, exact, regex and choice. Only the text after the last think block is graded (see
        final_part). Raises RuntimeError if the worker process of the grader does not start.
        """
        final = final_part(response, think_tags, inside_thought)
        if name in _IN_PROCESS:
            return _IN_PROCESS[name](final, gold)
        if name not in self._workers:
            self._workers[name] = _Worker(name)
        verdict = self._workers[name].grade(final, gold, self._seconds)
        if verdict is None:
            self._workers.pop(name).end()  # the next response gets a new worker
        return verdict or "failed"


class _Worker:
    """A worker process that grades responses with one grader."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, "-P", __file__, name]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        if self._read_line(_START_SECONDS) != "ready":
            self.end()
            raise RuntimeError(
                f"the worker process of the grader {name} did not start: run {' '.join(command)} to see the error"
            )

    def grade(self, final: str, gold: str, seconds: float) -> Verdict | None:
        """Return the worker's verdict on ``final``; None if the worker crashed or took more than ``seconds``."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([final, gold, seconds]).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        reply = self._read_line(seconds)
        return reply if reply in ("right", "wrong", "failed") else None  # type: ignore[return-value]

    def _read_line(self, seconds: float) -> str:
        """Return the next line of the worker's output; "" if it exits or prints no line within ``seconds``."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        ready, _, _ = select.select([pipe], [], [], seconds)
        return os.read(pipe, 64).decode().strip() if ready else ""

    def end(self) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()


# ---- checks at start -------------------------------------------------------------------------------------------------


def check_grader(name: str, where: str) -> None:
    """Raise UserError if the Python package that the grader ``name`` needs is not installed.

    ``where``: the dataset's configuration key.
    """
    from distill.errors import MissingError

    if name == "math" and find_spec("math_verify") is None:
        raise MissingError(
            f"{where}.env_name=math needs the package math-verify, which is not installed",
            f"run pip install math-verify, or set {where}.env_name to exact, regex, choice or null",
            key=f"{where}.env_name",
            value=name,
        )


def check_gold(name: str, gold: str, where: str) -> None:
    """Raise UserError if the gold answer ``gold`` is invalid for the grader ``name``.

    Only the graders choice and regex restrict gold answers. ``where``: the dataset's configuration key.
    """
    if name == "choice":
        _check_option(gold, where)
    elif name == "regex":
        _check_regex(gold, where)


def _check_option(gold: str, where: str) -> None:
    from distill.data.choice import named_option
    from distill.errors import UserError

    if named_option(gold) is None:
        raise UserError(
            f"{where}.env_name=choice requires gold answers that name one option from A to J, but one gold answer is"
            f" {gold[:80]!r}",
            f"write the gold answers as letters (A for the first option), set {where}.output_key to the column of the"
            f" letters, or extract the letters with {where}.output_pattern",
            key=f"{where}.env_name",
            value="choice",
        )


def _check_regex(gold: str, where: str) -> None:
    from distill.errors import UserError

    try:
        re.compile(gold)
    except re.error as error:
        raise UserError(
            f"{where}.env_name=regex requires regular expressions as gold answers, but {gold!r} is not a valid one"
            f" ({error})",
            f"correct the gold answer, or set {where}.env_name to exact",
            key=f"{where}.env_name",
            value="regex",
        ) from None


# ---- the worker's program --------------------------------------------------------------------------------------------


def _serve(name: str) -> None:
    """Grade the requests on standard input, and print one verdict per request.

    ``name``: the grader. Each request is a line with the JSON list [text to grade, gold answer, time limit in seconds].
    Ignores stop signals. Returns when standard input is closed.
    """
    # A scheduler or a terminal signals every process of a run, but the run grades the responses of its last step.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # redirect stdout, so that text printed by a library is not read as a verdict
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    grade = _IN_WORKER[name]
    grade("1", "1")  # imports the grader's packages before the first time limit starts
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        final, gold, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_VIRTUAL, 2 * seconds)  # ends this worker if the parent process was killed
        try:
            verdict: str = grade(final, gold)
        except Exception:  # responses of an untrained model trigger many kinds of library errors
            verdict = "failed"
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        print(verdict, file=out, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
