"""The house: who may import whom, where foreign packages live, how long files are.

Each rule is a function from a tree of sources to what breaks it. It is held against the repository, and against a small
bad tree that it must refuse: a rule that can't fail is none.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

Sources = dict[str, str]
"""Text by path, from the top of the repository, with slashes."""
Rule = Callable[[Sources], list[str]]

FLOORS = (
    ("types",),
    ("config",),
    ("runtime",),
    ("data", "loss"),
    ("model",),
    ("rollout",),
    ("validation",),
    ("inputs",),
    ("run",),
    ("build",),
    ("train",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

HOMES = {
    "vllm": "distill/rollout/",
    "triton": "distill/kernels/",
    "tyro": "distill/config",
    "omegaconf": "distill/config",
    "tensorboard": "distill/metrics/step",
    "torch.utils.tensorboard": "distill/metrics/step",
    "wandb": "distill/metrics/step",
    "datasets": "distill/data/",
    "math_verify": "distill/data/",
}
"""Foreign package: how the paths begin that may import it."""

MAX_LINES = 450


def house(sources: Sources) -> Iterator[tuple[str, ast.Module]]:
    """The modules of the package, parsed."""
    for path, text in sorted(sources.items()):
        if path.startswith("distill/"):
            yield path, ast.parse(text, path)


def dotted(path: str) -> str:
    """The module's name: distill/data/grading.py is distill.data.grading."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported, lazily inside functions too, also by a literal name."""
    package = dotted(path).split(".") if path.endswith("/__init__.py") else dotted(path).split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield node.lineno, str(argument.value)


def within(name: str, package: str) -> bool:
    """Whether the dotted ``name`` is ``package`` or lies in it."""
    return name == package or name.startswith(package + ".")


def imports_go_down(sources: Sources) -> list[str]:
    """A module imports from lower floors, or from its own room."""
    found = []
    for path, tree in house(sources):
        room = dotted(path).split(".")[1:2]
        for line, name in imports(path, tree):
            target = name.split(".")[1:2] if within(name, "distill") else []
            if not room or not target or target == room:
                continue
            if target[0] not in FLOOR_OF or room[0] not in FLOOR_OF:
                found.append(f"{path}:{line} a room without a floor: {name}")
            elif FLOOR_OF[target[0]] >= FLOOR_OF[room[0]]:
                found.append(f"{path}:{line} {room[0]} may not import {name}")
    return found


def rooms_are_known(sources: Sources) -> list[str]:
    """Every module stands on a floor."""
    rooms = {dotted(path).split(".")[1] for path in sources if path.startswith("distill/") and "." in dotted(path)}
    return [f"distill/{room} stands on no floor" for room in sorted(rooms - set(FLOOR_OF))]


def types_know_only_torch(sources: Sources) -> list[str]:
    """What flows between rooms imports torch and the standard library."""
    allowed = {"__future__", "collections", "dataclasses", "typing", "torch"}
    trees = [(path, tree) for path, tree in house(sources) if path == "distill/types.py"]
    return [
        f"{path}:{line} {name}"
        for path, tree in trees
        for line, name in imports(path, tree)
        if name.split(".")[0] not in allowed
    ]


def foreign_packages_have_one_home(sources: Sources) -> list[str]:
    """A foreign package is imported in one room only."""
    return [
        f"{path}:{line} imports {name}, whose home is {home}"
        for path, tree in house(sources)
        for line, name in imports(path, tree)
        for package, home in HOMES.items()
        if within(name, package) and not path.startswith(home)
    ]


def environment_is_read_in_runtime(sources: Sources) -> list[str]:
    """os.environ and its relatives are named in runtime/ only."""
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    found = []
    for path, tree in house(sources):
        if path.startswith("distill/runtime/"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "os":
                found.append(f"{path}:{node.lineno} os.{node.attr}")
        found += [f"{path}:{line} {name}" for line, name in imports(path, tree) if name in {f"os.{n}" for n in names}]
    return found


def slurm_is_known_in_one_file(sources: Sources) -> list[str]:
    """Variables SLURM_* are named in runtime/slurm only; docstrings may speak of them."""
    found = []
    for path, tree in house(sources):
        if path.startswith("distill/distributed/slurm"):
            continue
        spoken = {id(doc) for doc in docstrings(tree)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and id(node) not in spoken and "SLURM_" in str(node.value):
                found.append(f"{path}:{node.lineno} {node.value!r}")
    return found


def docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Every string that stands alone as a statement: docstrings of modules, classes, functions and fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value


def files_are_short(sources: Sources) -> list[str]:
    """A file that grows past the limit becomes a folder."""
    lengths = {path: len(text.splitlines()) for path, text in sources.items() if path.startswith("distill/")}
    return [f"{path} has {length} lines" for path, length in lengths.items() if length > MAX_LINES]


def nothing_is_called_utils(sources: Sources) -> list[str]:
    """A module is named for what it holds."""
    vague = {"utils", "util", "helpers", "misc", "common"}
    return [path for path in sources if path.startswith("distill/") and vague & set(re.split(r"[./]", path))]


def loop_holds_no_arithmetic(sources: Sources) -> list[str]:
    """train.py tells the algorithm: no torch, no numpy, no rank asked for by number."""
    found = []
    for path, tree in house(sources):
        if not re.match(r"distill/train(\.py|/)", path):
            continue
        for line, name in imports(path, tree):
            if name.split(".")[0] in ("torch", "numpy"):
                found.append(f"{path}:{line} imports {name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare) and "rank" in ast.unparse(node).lower():
                found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
    return found


def public_names_have_docstrings(sources: Sources) -> list[str]:
    """Modules, and public classes, functions and methods at their top, say what they are."""
    return [
        f"{path}:{getattr(node, 'lineno', 1)} {name}"
        for path, tree in house(sources)
        for name, node in public(path, tree)
        if not (ast.get_docstring(node) or "").strip()
    ]


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def public(path: str, tree: ast.Module) -> Iterator[tuple[str, Documented]]:
    """The module and its public classes and functions, with the public methods of public classes.

    An override that is marked so, a property's setter and an overload have their words elsewhere.
    """
    if tree.body:
        yield dotted(path), tree
    scopes: list[tuple[str, ast.Module | ast.ClassDef]] = [("", tree)]
    while scopes:
        prefix, scope = scopes.pop()
        for node in scope.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
                continue
            marks = {ast.unparse(mark).split(".")[-1] for mark in node.decorator_list}
            if not marks & {"override", "setter", "overload"}:
                yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                scopes.append((f"{prefix}{node.name}.", node))


def nothing_reaches_outside_the_repository(sources: Sources) -> list[str]:
    """The repository stands alone: no file names a folder beside it or one of a single machine."""
    pattern = re.compile(r"(?<![\w.])(\.\./|/(home|root|mnt|work)/)")
    return [
        f"{path}:{number} {line.strip()}"
        for path, text in sources.items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line) and path != "tests/test_architecture.py"
    ]


BAD: dict[Rule, dict[str, Sources]] = {
    imports_go_down: {
        "up": {"distill/distributed/world.py": "from distill.model.student import Student\n"},
        "lazily": {"distill/data/prompts.py": "def f():\n    import distill.train\n"},
        "sideways": {"distill/loss/fused.py": "from distill.data import verify\n"},
        "relative": {"distill/model/hf_load.py": "from ..rollout import engine\n"},
        "relative, from a room's front": {"distill/model/__init__.py": "from ..rollout import engine\n"},
        "of the package": {"distill/types.py": "from distill import runtime\n"},
        "by name": {"distill/types.py": "import importlib\nx = importlib.import_module('distill.data')\n"},
        "of no floor": {"distill/train.py": "import distill.magic\n"},
        "for types only": {
            "distill/loss/fused.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import distill.model\n"
        },
    },
    rooms_are_known: {"a new room": {"distill/magic.py": "x = 1\n"}},
    types_know_only_torch: {"numpy": {"distill/types.py": "import numpy\n"}},
    foreign_packages_have_one_home: {
        "vllm": {"distill/model/student.py": "def f():\n    from vllm import LLM\n"},
        "triton": {"distill/loss/fused.py": "import triton.language as tl\n"},
        "tyro": {"distill/train.py": "import tyro\n"},
        "omegaconf": {"distill/data/sources.py": "from omegaconf import OmegaConf\n"},
        "tensorboard": {"distill/distributed/world.py": "from torch.utils.tensorboard import SummaryWriter\n"},
        "tensorboard's module": {"distill/distributed/world.py": "from torch.utils import tensorboard\n"},
        "wandb": {"distill/train.py": "import wandb\n"},
        "datasets": {"distill/model/hf_load.py": "import datasets\n"},
        "math_verify": {"distill/rollout/engine.py": "from math_verify import parse\n"},
    },
    environment_is_read_in_runtime: {
        "environ": {"distill/model/hf_load.py": "import os\nx = os.environ['HOME']\n"},
        "getenv": {"distill/train.py": "import os\nx = os.getenv('HOME')\n"},
        "from os": {"distill/train.py": "from os import environ\n"},
    },
    slurm_is_known_in_one_file: {"a variable": {"distill/distributed/world.py": "x = 'SLURM_NODEID'\n"}},
    files_are_short: {"one line more": {"distill/train.py": "x = 1\n" * (MAX_LINES + 1)}},
    nothing_is_called_utils: {
        "a file": {"distill/data/utils.py": ""},
        "a folder": {"distill/utils/text.py": ""},
    },
    loop_holds_no_arithmetic: {
        "torch": {"distill/train.py": "import torch\n"},
        "a rank": {"distill/train.py": "if world.rank == 0:\n    pass\n"},
        "a rank, turned round": {"distill/train.py": "if 0 != get_rank():\n    pass\n"},
    },
    public_names_have_docstrings: {
        "a function": {"distill/train.py": '"""m"""\ndef run():\n    pass\n'},
        "a class": {"distill/train.py": '"""m"""\nclass Run:\n    x = 1\n'},
        "a method": {"distill/train.py": '"""m"""\nclass Run:\n    """r"""\n    def go(self):\n        pass\n'},
        "a module": {"distill/train.py": "x = 1\n"},
    },
    nothing_reaches_outside_the_repository: {
        "beside": {"recipes/x.yaml": "path: ../data/x\n"},
        "absolute": {"README.md": "see /home/me/notes\n"},
    },
}

GOOD: Sources = {
    "distill/__init__.py": "",
    "distill/types.py": '"""m"""\nimport torch\n',
    "distill/config/__init__.py": '"""m"""\nfrom distill.config.schema import Config\nimport tyro\nimport omegaconf\n',
    "distill/distributed/slurm.py": '"""m"""\nimport os\nx = os.environ["SLURM_NODEID"]\n',
    "distill/metrics/step.py": '"""m"""\nfrom . import slurm\nfrom torch.utils.tensorboard import Writer\n',
    "distill/kernels/kl.py": '"""m"""\nimport triton\nfrom ..head import head\nfrom distill import config\n',
    "distill/data/grading.py": '"""SLURM_NODEID is only spoken of."""\nimport math_verify\nimport datasets\n',
    "distill/rollout/vllm.py": '"""m"""\nimport distill.model.hf_load\nfrom vllm import LLM\n',
    "distill/train.py": (
        '"""m"""\nimport distill.rollout.vllm\nfrom distill import data\n'
        "def _private():\n    pass\n"
        'def main():\n    """d"""\n    if world.is_main and step == last:\n        pass\n'
    ),
    "scripts/x.py": "import os\nimport vllm\nx = os.environ\n",
}


@pytest.fixture(scope="module")
def repository() -> Sources:
    """Every text file of ours in the repository."""
    kinds = (".py", ".yaml", ".txt", ".md", ".cfg", ".toml", ".jsonl")
    rooms = ("distill", "scripts", "recipes", "prompts", "tests")
    files = [file for room in rooms for file in (ROOT / room).rglob("*") if file.suffix in kinds]
    files += [file for file in ROOT.iterdir() if file.suffix in kinds or file.name == "Makefile"]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


@pytest.mark.parametrize("rule", BAD, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_the_rule(rule: Rule, repository: Sources) -> None:
    assert rule(repository) == []


@pytest.mark.parametrize(
    ("rule", "sources"),
    [pytest.param(rule, bad, id=f"{rule.__name__}: {what}") for rule in BAD for what, bad in BAD[rule].items()],
)
def test_a_bad_tree_is_refused(rule: Rule, sources: Sources) -> None:
    assert len(rule(sources)) == 1


@pytest.mark.parametrize("rule", BAD, ids=lambda rule: rule.__name__)
def test_a_good_tree_is_not_refused(rule: Rule) -> None:
    assert rule(GOOD) == []


def test_the_repository_was_read(repository: Sources) -> None:
    assert {"distill/types.py", "distill/metrics/step.py", "Makefile", "setup.cfg"} <= set(repository)


def test_the_top_of_the_repository_is_tidy() -> None:
    """Only what a newcomer is told about stands at the top; folders made by runs and tools are git's to ignore."""
    ignored = {line.strip("/\n") for line in (ROOT / ".gitignore").read_text().splitlines()}
    known = {"distill", "scripts", "recipes", "prompts", "tests", "Makefile", "setup.cfg", "README.md", ".ci", ".git"}
    known |= {".gitignore", "pyproject.toml", "requirements-cpu.lock"}
    found = {path.name for path in ROOT.iterdir()}
    assert {name for name in found - known - ignored if not name.endswith(".egg-info")} == set()
