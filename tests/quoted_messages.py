"""Count string constants of the tests that quote a message of the product.

    python -m tests.quoted_messages

A quote is a constant of three or more words, docstrings and lines of data files included, that also occurs in a
string literal or in an f-string piece of distill/, docstrings excepted. A test that quotes a message breaks when the
message is improved; tests assert on ``UserError.key`` and on values instead.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = (".txt", ".yaml", ".json", ".jsonl", ".md")


def constants(path: Path, docstrings: bool) -> Iterator[tuple[int, str]]:
    """Line and text of each string constant in a Python file; an f-string gives its literal pieces."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set() if docstrings else {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, " ".join(node.value.split())


def texts_of_tests(tests: Path) -> Iterator[tuple[Path, int, str]]:
    """Path, line and text of all string constants in ``tests`` and of all lines of its data files."""
    for path in sorted(tests.rglob("*")):
        if path.suffix == ".py":
            yield from ((path, line, text) for line, text in constants(path, docstrings=True))
        elif path.suffix in DATA:
            for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                yield path, line, " ".join(text.split())


def quotes(root: Path = ROOT) -> list[str]:
    """All quotes in the tests of ``root``, as "path:line text"."""
    literals = [text for path in (root / "distill").rglob("*.py") for _, text in constants(path, docstrings=False)]
    messages = "\n".join(literals)
    return [
        f"{path.relative_to(root)}:{line} {text}"
        for path, line, text in texts_of_tests(root / "tests")
        if len(text.split()) >= 3 and text in messages
    ]


if __name__ == "__main__":
    found = quotes()
    print("\n".join([*found, f"{len(found)} quotes"]))
