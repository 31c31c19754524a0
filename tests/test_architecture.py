"""Rules of the source tree that neither ruff nor import-linter checks.

Each rule is a function from a source tree to the list of violations. The tests apply it to the repository and to a
small bad tree that it must refuse.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_MEDIAN_LINES, MAX_LOOP_LINES = 450, 80, 8, 45

Sources = dict[str, str]
"""Text by path, from the top of the repository, with slashes."""
Rule = Callable[[Sources], list[str]]


@cache
def parse(text: str) -> ast.Module:
    """The syntax tree of a file, parsed once."""
    return ast.parse(text)


def product(sources: Sources, *folders: str) -> Iterator[tuple[str, str, ast.Module]]:
    """Path, text and syntax tree of the Python files in ``folders``, by default distill."""
    for path, text in sorted(sources.items()):
        if path.endswith(".py") and path.split("/")[0] in (folders or ("distill",)):
            yield path, text, parse(text)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """All functions and methods, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def lines_of_code(function: ast.FunctionDef) -> int:
    """Number of lines from ``def`` to the end, without the docstring."""
    first = function.body[0]
    is_doc = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    docstring = (first.end_lineno or 0) - first.lineno + 1 if is_doc else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def slurm_variables_have_one_file(sources: Sources) -> list[str]:
    """Only distributed/slurm*.py name variables SLURM_*; docstrings may mention them."""
    found = []
    for path, _, tree in product(sources):
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and id(node) not in docstrings and "SLURM_" in str(node.value):
                found.append(f"{path}:{node.lineno}")
    return [violation for violation in found if not violation.startswith("distill/distributed/slurm")]


def files_are_short(sources: Sources) -> list[str]:
    """A file that exceeds the limit becomes a folder."""
    lengths = {path: len(text.splitlines()) for path, text, _ in product(sources, "distill", "scripts")}
    return [f"{path}: {n} lines" for path, n in lengths.items() if n > MAX_FILE_LINES]


def functions_are_short(sources: Sources) -> list[str]:
    """No function exceeds the limit; kernels may."""
    return [
        f"{path}:{function.lineno} {function.name}: {lines_of_code(function)} lines"
        for path, _, tree in product(sources)
        for function in functions(tree)
        if lines_of_code(function) > MAX_FUNCTION_LINES and not path.startswith("distill/kernels/")
    ]


def the_median_function_is_short(sources: Sources) -> list[str]:
    """Half of all functions have at most eight lines."""
    lengths = [lines_of_code(function) for _, _, tree in product(sources) for function in functions(tree)]
    median = statistics.median(lengths or [0])
    return [f"median {median} lines"] if median > MAX_MEDIAN_LINES else []


def the_loop_is_short(sources: Sources) -> list[str]:
    """The training loop and its step fit on one screen each."""
    return [
        f"{path}:{function.lineno} {function.end_lineno} {function.name}() is too long"
        for path, _, tree in product(sources)
        for function in functions(tree)
        if path == "distill/train.py" and function.name in ("train", "train_step")
        if (function.end_lineno or 0) - function.lineno + 1 > MAX_LOOP_LINES
    ]


def the_loop_has_no_arithmetic(sources: Sources) -> list[str]:
    """train.py imports no torch and no numpy, and compares no rank numbers."""
    found = []
    for path, _, tree in product(sources):
        for node in ast.walk(tree) if path == "distill/train.py" else ():
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path}: {name}" for name in modules if name.split(".")[0] in ("torch", "numpy")]
            if isinstance(node, ast.Compare) and "rank" in ast.unparse(node).lower():
                found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
    return found


def imported(tree: ast.Module) -> Iterator[str]:
    """Full names of the imported modules, also those imported by a literal name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant))


def types_import_only_torch(sources: Sources) -> list[str]:
    """types.py imports torch and the standard library's typing modules."""
    allowed = {"__future__", "collections", "dataclasses", "typing", "torch"}
    trees = [tree for path, _, tree in product(sources) if path == "distill/types.py"]
    return [name for tree in trees for name in imported(tree) if name.split(".")[0] not in allowed]


def errors_import_only_the_standard_library(sources: Sources) -> list[str]:
    """errors.py imports neither distill nor an external package."""
    trees = [tree for path, _, tree in product(sources) if path == "distill/errors.py"]
    return [name for tree in trees for name in imported(tree) if name.split(".")[0] not in sys.stdlib_module_names]


def distill_is_not_imported_by_a_literal_name(sources: Sources) -> list[str]:
    """import-linter does not see importlib.import_module("distill.x"), so no module of distill calls it."""
    found = []
    for path, _, tree in product(sources):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
                names = [str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)]
                found += [f"{path}:{node.lineno} {name}" for name in names if name.split(".")[0] in ("distill", "")]
    return found


def names_are_specific(sources: Sources) -> list[str]:
    """No module is called utils or the like."""
    vague = {"utils", "util", "helpers", "misc", "common"}
    return [path for path, _, _ in product(sources) if vague & set(re.split(r"[./]", path))]


def the_repository_is_self_contained(sources: Sources) -> list[str]:
    """No file names a folder next to the repository or a folder of one machine."""
    pattern = re.compile(r"(?<![\w.])(\.\./|/(home|root|mnt|work)/)")
    return [
        f"{path}:{number} {line.strip()}"
        for path, text in sources.items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line) and path != "tests/test_architecture.py" and not path.endswith(".md")
    ] + [path for path, text in sources.items() if path.endswith(".md") and re.search(r"/(home|root|work)/", text)]


def long_function(lines: int, name: str = "f") -> str:
    """Source of a function with ``lines`` lines."""
    return f"def {name}():\n" + "    x = 1\n" * (lines - 1)


BAD: dict[Rule, Sources] = {
    slurm_variables_have_one_file: {"distill/distributed/world.py": "x = 'SLURM_NODEID'\n"},
    files_are_short: {"scripts/x.py": "x = 1\n" * (MAX_FILE_LINES + 1)},
    functions_are_short: {"distill/run.py": long_function(MAX_FUNCTION_LINES + 1)},
    the_median_function_is_short: {"distill/run.py": long_function(MAX_MEDIAN_LINES + 1)},
    the_loop_is_short: {"distill/train.py": long_function(MAX_LOOP_LINES + 1, "train_step")},
    the_loop_has_no_arithmetic: {"distill/train.py": "if 0 != get_rank():\n    pass\n"},
    types_import_only_torch: {"distill/types.py": "import numpy\n"},
    errors_import_only_the_standard_library: {"distill/errors.py": "import json\nfrom distill import types\n"},
    distill_is_not_imported_by_a_literal_name: {"distill/types.py": "x = importlib.import_module('distill.data')\n"},
    names_are_specific: {"distill/data/utils.py": ""},
    the_repository_is_self_contained: {"recipes/x.yaml": "path: ../data/x\n"},
}

GOOD: Sources = {
    "distill/types.py": '"""m"""\nimport torch\nfrom collections.abc import Mapping\n',
    "distill/errors.py": "import re\nfrom pathlib import Path\n",
    "distill/distributed/slurm.py": 'x = os.environ["SLURM_NODEID"]\n',
    "distill/data/verify.py": '"""SLURM_NODEID is only mentioned."""\nx = importlib.import_module("math_verify")\n',
    "distill/run.py": long_function(MAX_MEDIAN_LINES) + "y = 1\n" * (MAX_FILE_LINES - MAX_MEDIAN_LINES),
    "distill/kernels/kl.py": long_function(MAX_FUNCTION_LINES + 1) + long_function(2, "g"),
    "distill/train.py": "def train():\n    if world.is_main and step == last:\n        pass\n",
    "recipes/x.yaml": "path: data/x\n",
    "scripts/x.py": "import torch\nx = os.environ\n",
}


@pytest.fixture(scope="module")
def repository() -> Sources:
    """All text files of the repository's own folders."""
    kinds = (".py", ".yaml", ".txt", ".md", ".cfg", ".toml", ".jsonl", ".sbatch")
    folders = ("distill", "scripts", "recipes", "prompts", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.suffix in kinds]
    files += [file for file in ROOT.iterdir() if file.suffix in kinds or file.name == "Makefile"]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


@pytest.mark.parametrize("rule", BAD, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_the_rule(rule: Rule, repository: Sources) -> None:
    assert rule(repository) == []


@pytest.mark.parametrize("rule", BAD, ids=lambda rule: rule.__name__)
def test_the_rule_refuses_a_bad_tree(rule: Rule) -> None:
    assert len(rule(BAD[rule])) == 1


@pytest.mark.parametrize("rule", BAD, ids=lambda rule: rule.__name__)
def test_the_rule_accepts_a_good_tree(rule: Rule) -> None:
    assert rule(GOOD) == []


def test_the_repository_is_read(repository: Sources) -> None:
    assert len(repository) > 100
    assert {"distill/train.py", "distill/types.py", "distill/errors.py", "Makefile", "setup.cfg"} <= set(repository)


def test_the_top_of_the_repository_is_tidy() -> None:
    """Only documented files and folders are at the top; git ignores the folders that runs and tools write."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()]
    known = {"distill", "scripts", "recipes", "prompts", "tests", "Makefile", "README.md", ".ci", ".git", ".gitignore"}
    known |= {"setup.cfg", ".ruff.toml", "pyproject.toml", "requirements-cpu.lock", "requirements-gpu.lock"}
    found = {path.name for path in ROOT.iterdir()} - known
    assert {name for name in found if not any(fnmatch(name, pattern) for pattern in ignored)} == set()


def test_git_ignores_links_to_folders() -> None:
    """A pattern with a trailing slash matches folders only, but on a cluster .venv or models may be a symbolic link."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.endswith("/")] == []
