"""Prose of the repository uses ordinary technical English; tests quote few messages of the product."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.quoted_messages import ROOT, quotes

AVOID = {
    r"whole(?! numbers?\b)": "complete, full",
    r"there is none|(?-i:none is)": "missing",
    r"go(es)? on|goes by": "continues, follows",
    r"as it is|as far as": "current, as long as",
    r"the others": "other ranks, the remaining ...",
    r"of (its|their|our) own": "its own ...",
    r"mend(s|ed)?": "fix",
    r"dear(est)?": "expensive, slowest",
    r"apart": "difference",
    r"settled?s?": "finalize",
    r"told|tells?(?! a story)|said|says?|heard|hears?|speaks?": "report, log, state, receive",
    r"judges?|judged|prove[sdn]?|proven": "grade, verify",
    r"whoever|whatever|nobody|somebody": "name the process or the data",
    r"anew|come(s)? to an end|may pass": "again, finish, retryable",
    r"stands? (for|in)|knows|asks": "is, means, holds, reads, requests",
    r"besides?": "next to, with, also",
    r"(?-i:rooms|(an?|the|this|that|its|each|every|another|generation|loss|data|model) room)(?! for\b)": "package",
}
"""Regular expression of words to avoid -> words to write instead."""
PATTERN = re.compile("|".join(rf"\b(?:{words})\b" for words in AVOID), re.IGNORECASE)
FILES = (
    "distill/**/*.py",
    "scripts/**/*.py",
    "scripts/*.sbatch",
    "tests/**/*.py",
    "**/*.md",
    "Makefile",
    "setup.cfg",
    ".ci/run",
    ".ruff.toml",
    "recipes/**/*",
)
EXEMPT = ("tests/test_language.py",)
SAMPLES = {"distill/data/tokenizer_checks.py": "I'LL say it's DON'T"}
"""Beginning of the sample text in each file; its line is data, not prose."""
MAX_QUOTES = 50


def prose() -> Iterator[tuple[str, str]]:
    """Place ("path:line") and text of every line of the checked files."""
    for path in sorted({path for pattern in FILES for path in ROOT.glob(pattern)}):
        name = path.relative_to(ROOT).as_posix()
        is_package = path.relative_to(ROOT).parts[0].startswith(".venv")
        if path.is_file() and name not in EXEMPT and not is_package:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if name not in SAMPLES or not line.startswith(f'    "{SAMPLES[name]}'):
                    yield f"{name}:{number}", line


def violations(lines: Iterator[tuple[str, str]]) -> list[str]:
    """Places that use a word to avoid."""
    return [f"{place} {match.group()}" for place, line in lines if (match := PATTERN.search(line))]


def test_prose_avoids_the_listed_words() -> None:
    assert violations(prose()) == []


@pytest.mark.parametrize(
    "line", ["# the whole model", "nobody waits for it", "judged by the teacher", "in this room it saves"]
)
def test_a_listed_word_is_found(line: str) -> None:
    assert violations(iter([("x.py:1", line)]))


@pytest.mark.parametrize("name", ["setup.cfg", ".ci/run", ".ruff.toml", "distill/train.py", "tests/test_train.py"])
def test_prose_is_read(name: str) -> None:
    assert any(place == f"{name}:1" for place, _ in prose())


def test_only_the_sample_text_is_exempt() -> None:
    lines = {line for place, line in prose() if place.startswith("distill/data/tokenizer_checks.py")}
    skipped = [
        line for line in (ROOT / "distill/data/tokenizer_checks.py").read_text().splitlines() if line not in lines
    ]
    assert len(skipped) == 1


@pytest.mark.parametrize("line", ["is not a whole number", "leaves no room for a response", "if cut.room < 0:"])
def test_other_meanings_are_allowed(line: str) -> None:
    assert not violations(iter([("x.py:1", line)]))


def test_tests_quote_few_messages_of_the_product() -> None:
    found = quotes()
    assert len(found) <= MAX_QUOTES, "\n".join(found)


def test_a_quoted_message_is_found(tmp_path: Path) -> None:
    (tmp_path / "distill").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "distill" / "a.py").write_text(
        'def f(n):\n    raise ValueError(f"{n} is not a prime number: choose one")\n'
    )
    (tmp_path / "tests" / "test_a.py").write_text('assert "is not a prime" in text\nassert "a prime" in text\n')
    assert quotes(tmp_path) == ["tests/test_a.py:1 is not a prime"]
