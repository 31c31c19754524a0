"""A drawn malformed run (``Case``), the folder to build it in (``Workshop``) and the registry of ways to break a run.

Each way changes one thing of a working run, so that the program must refuse it. ``malformed(root, count, seed, ranks)``
draws cases for a folder that ``make_tiny_run`` filled.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CANARY = "executed"
"""Name of a file in the root that exists only if the program executed code from its input."""


@dataclass
class Case:
    """One run that the program must refuse."""

    way: str
    """Name of the way in which the run is malformed."""
    argv: list[str]
    names: str
    """Key, file or variable that the error must name; a bar separates alternatives."""
    env: Mapping[str, str | None] = field(default_factory=dict)
    """Environment variables to set; None: to unset."""
    detail: str = ""
    """Drawn values, for the report of a failure."""
    absent: str = ""
    """Name of a package that must seem not to be installed; only for runs in the test's process."""


class Workshop:
    """A folder for malformed files, and a random generator."""

    def __init__(self, root: Path, rng: random.Random, name: str, ranks: int) -> None:
        self.root, self.rng, self.name, self.ranks = root, rng, name, ranks
        self.folder = root / "malformed" / name
        self.folder.mkdir(parents=True)

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def tree(self) -> dict[str, Any]:
        """Return the keys of a working recipe."""
        tree: dict[str, Any] = yaml.safe_load((self.root / "recipe.yaml").read_text())
        tree["cluster"]["gpus_per_node"] = self.ranks
        tree["runtime"] = {"run_dir": f"{self.root}/runs/{self.name}"}
        tree["checkpointing"]["checkpoint_dir"] = f"{self.root}/checkpoints/{self.name}"
        return tree

    def case(self, names: str, *overrides: str, env: Mapping[str, str | None] | None = None, detail: str = "") -> Case:
        """Return the working recipe with overrides."""
        return self.recipe(yaml.safe_dump(self.tree()), names, *overrides, env=env, detail=detail)

    def recipe(
        self,
        text: str | bytes,
        names: str,
        *overrides: str,
        env: Mapping[str, str | None] | None = None,
        detail: str = "",
    ) -> Case:
        """Return a recipe with the given text."""
        path = self.file("recipe.yaml", text)
        return Case("", ["--config", str(path), *overrides], names, env or {}, detail or " ".join(overrides)[:200])

    def keyed(self, key: str, value: Any, names: str | None = None) -> Case:
        """Return the working recipe with another value of one key."""
        tree: Any = self.tree()
        place = tree
        *sections, last = key.split(".")
        for section in sections:
            place[section] = place[section] if isinstance(place.get(section), dict) else {}
            place = place[section]
        place[last] = value
        return self.recipe(yaml.safe_dump(tree), names or shown(key), detail=f"{key}: {value!r}"[:200])

    def context(self, names: str, *overrides: str) -> Case:
        """Return the working recipe with context distillation."""
        return self.case(
            names,
            "distillation.context_distillation.enabled=true",
            f"teacher.model_name={self.root}/student",
            "teacher.max_total_sequence_length=256",
            *overrides,
        )

    def model(self) -> Path:
        """Copy the student's folder."""
        return Path(shutil.copytree(self.root / "student", self.folder / "model"))

    def cut(self, data: bytes, least: int = 1) -> bytes:
        """Return ``data`` without a random number of bytes at its end."""
        return data[: self.rng.randrange(least, len(data))]

    def noise(self, length: int = 64) -> bytes:
        return bytes(self.rng.randrange(256) for _ in range(length))


def shown(key: str) -> str:
    """Return the name of a key in errors; keys of data.default appear as keys of data.train."""
    return key.rpartition(".")[2] if key.startswith("data.default.") else key


Way = Callable[[Workshop], Case]
WAYS: dict[str, Way] = {}


def way(function: Way) -> Way:
    """Register a way to break a run under its name."""
    WAYS[function.__name__.strip("_")] = function
    return function


def malformed(root: Path, count: int, seed: int, ranks: int, among: Callable[[str], bool] = bool) -> list[Case]:
    """Draw ``count`` cases by a seed; no way is repeated before all have been used."""
    rng = random.Random(seed)
    ways = [name for name in WAYS if among(name)]
    cases: list[Case] = []
    while len(cases) < count:
        for name in rng.sample(ways, len(ways))[: count - len(cases)]:
            shop = Workshop(root, random.Random(rng.random()), f"{seed}-{len(cases):03d}-{name}", ranks)
            case = WAYS[name](shop)
            case.way = name
            cases.append(case)
    return cases
