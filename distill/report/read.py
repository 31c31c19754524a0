"""Read the files of a run directory, also while the run writes them or after it was killed.

A missing or incomplete file is no error: it becomes a note for the reader of the page.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from distill.config.paths import normalize
from distill.errors import UserError, any_of
from distill.run_files import (
    ALARMS_FILE,
    IN_CONTEXT,
    IN_CONTEXT_AT_END,
    METRICS_FILE,
    PARENT_FILE,
    RECIPE_FILE,
    TRAIN_SAMPLES_FOLDER,
    VALIDATION_FOLDER,
    VERSIONS_FILE,
    owner_of,
)
from distill.supervise.status import STATUS_FILE, read_status

Kind = Literal["validation", "in_context", "train"]
"""Kind of a file of samples: of a validation, with the teacher's context in the prompt, or of training."""
Rows = list[dict[str, Any]]
_RUN_FILES = (RECIPE_FILE, METRICS_FILE, STATUS_FILE, VERSIONS_FILE)
_STEP_FILE = re.compile(r"step_(\d+)\.jsonl")
_EARLIER_RECIPE = re.compile(r"config_until_step_(\d+)(?:_(\d+))?\.yaml")


@dataclass(frozen=True)
class SampleFile:
    """A JSON Lines file with one response per line."""

    path: Path
    kind: Kind
    step: int


@dataclass
class RunFiles:
    """Content of a run directory, except the samples."""

    folder: Path
    name: str
    recipe: dict[str, Any]
    """The complete recipe; empty if the file is missing."""
    recipe_text: str
    parent: str | None
    """Name of the recipe's parent; None if unknown."""
    parent_recipe: dict[str, Any]
    versions: dict[str, Any]
    status: dict[str, Any]
    is_written: bool
    """Whether a process on this machine writes to the directory."""
    train: Rows
    """Rows of metrics of training steps, in order of steps."""
    validation: Rows
    """Rows of metrics of validations and probes, one per step, in order of steps."""
    sample_files: list[SampleFile]
    earlier_recipes: list[tuple[int, dict[str, Any]]]
    """The recipes that resumes changed, each with the last step for which it was used."""
    notes: list[str] = field(default_factory=list)
    """What is missing or incomplete."""
    alarms: Rows = field(default_factory=list)
    """Starts and ends of alarms, in order of time."""


def read_run(folder: str | Path, owned: bool = False) -> RunFiles:
    """Read the run directory ``folder``. Raises UserError if it is not a run directory.

    ``owned``: whether this process holds the lock of the directory, which a look at its file would release.
    """
    path = Path(normalize(str(folder), "RUN"))
    if not _is_run(path):
        raise _no_run(path)
    notes: list[str] = []
    rows = [row for _, row in json_lines(path / METRICS_FILE, notes)] if _is_file(path / METRICS_FILE) else []
    numbered = [row for row in rows if (step := number(row.get("step"))) is not None and step >= 0]
    recipe_text = _text(path / RECIPE_FILE)
    parent = _yaml(_text(path / PARENT_FILE))
    files = RunFiles(
        folder=path,
        name=path.resolve().name,
        recipe=_yaml(recipe_text),
        recipe_text=recipe_text,
        parent=parent.get("parent") if isinstance(parent.get("parent"), str) else None,
        parent_recipe=mapping(parent.get("recipe")),
        versions=_json(path / VERSIONS_FILE),
        status=dict(read_status(path / STATUS_FILE)),
        is_written=owned or owner_of(path) is not None,
        train=_by_step(row for row in numbered if not _is_validation(row)),
        validation=_by_step(row for row in numbered if _is_validation(row)),
        sample_files=_sample_files(path, numbered),
        earlier_recipes=_earlier_recipes(path),
        notes=notes,
        alarms=[row for _, row in json_lines(path / ALARMS_FILE, notes)] if _is_file(path / ALARMS_FILE) else [],
    )
    files.notes += _missing(files)
    return files


def _no_run(path: Path) -> UserError:
    fix = "give the folder of a run, which contains config.yaml and metrics.jsonl"
    try:
        inside = sorted(each.name for each in path.iterdir() if _is_run(each))
    except NotADirectoryError:
        return UserError(f"{path} is not a folder", fix, key="RUN", value=str(path))
    except FileNotFoundError:
        return UserError(f"{path} does not exist", fix, key="RUN", value=str(path))
    except OSError as error:
        fix = "allow this user to read the folder of the run"
        return UserError(f"{path} cannot be read ({error.strerror})", fix, key="RUN", value=str(path))
    fix = f"give a run in it, such as {any_of(inside[-3:])}" if inside else fix
    return UserError(f"{path} is not the folder of a run", fix, key="RUN", value=str(path))


def _is_run(path: Path) -> bool:
    return any(_is_file(path / name) for name in _RUN_FILES)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the folder may not be read
        return False


def json_lines(path: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the byte offset and the JSON object of each line; other lines are counted in one note.

    A file that is removed or unreadable gives a note and no more lines.
    """
    offset, skipped, cut = 0, 0, False
    name = f"{path.parent.name}/{path.name}"
    try:
        with path.open("rb") as file:
            for line in file:
                if row := parsed(line):
                    yield offset, row
                elif line.strip():
                    cut = not line.endswith(b"\n")
                    skipped += not cut
                offset += len(line)
    except OSError as error:
        notes.append(f"{name} could not be read completely ({error.strerror}).")
    if cut:
        notes.append(f"The last line of {name} is incomplete and left out: the file was cut off or is being written.")
    if skipped:
        notes.append(f"{skipped} lines of {name} are not JSON objects and left out.")


def parsed(text: str | bytes) -> dict[str, Any]:
    """Return the JSON object in ``text``; an empty dict if ``text`` is anything else."""
    try:
        return mapping(json.loads(text))
    except (ValueError, RecursionError):  # also if the bytes are not UTF-8
        return {}


def number(value: Any) -> float | None:
    """Return ``value`` if it is a finite number, otherwise None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def mapping(value: Any) -> dict[str, Any]:
    """Return ``value`` if it is a dict, otherwise an empty dict."""
    return value if isinstance(value, dict) else {}


def last(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the last value of the metric ``name``; None if no row has a value."""
    return next((value for row in reversed(rows) if (value := number(row.get(name))) is not None), None)


def _is_validation(row: Mapping[str, Any]) -> bool:
    return any(name.startswith("validation/") for name in row)


def _by_step(rows: Iterator[dict[str, Any]]) -> Rows:
    """Return one row per step with all its metrics, because a probe is a second row; later values take precedence."""
    by_step: dict[int, dict[str, Any]] = {}
    for row in rows:
        by_step.setdefault(int(row["step"]), {}).update(row)
    return [by_step[step] for step in sorted(by_step)]


def _earlier_recipes(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    matches = [match for path in _files(folder) if (match := _EARLIER_RECIPE.fullmatch(path.name))]
    ordered = sorted(matches, key=lambda match: (int(match[1]), int(match[2] or 1)))
    return [(int(match[1]), _yaml(_text(folder / match[0]))) for match in ordered]


def _files(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _sample_files(folder: Path, rows: Rows) -> list[SampleFile]:
    found: list[SampleFile] = []
    kinds: tuple[tuple[str, Kind], ...] = ((VALIDATION_FOLDER, "validation"), (TRAIN_SAMPLES_FOLDER, "train"))
    for name, kind in kinds:
        steps = {int(match[1]): path for path in _files(folder / name) if (match := _STEP_FILE.fullmatch(path.name))}
        found += [SampleFile(steps[step], kind, step) for step in sorted(steps)]
    prefix = f"validation/{IN_CONTEXT_AT_END}_"
    at_end = max((int(row["step"]) for row in rows if any(name.startswith(prefix) for name in row)), default=1)
    for name, step in ((IN_CONTEXT, 0), (IN_CONTEXT_AT_END, at_end)):
        in_context = folder / VALIDATION_FOLDER / f"{name}.jsonl"
        found += [SampleFile(in_context, "in_context", step)] if _is_file(in_context) else []
    return found


def _missing(files: RunFiles) -> list[str]:
    kinds = {file.kind for file in files.sample_files}
    absent = {
        "no recipe (config.yaml is missing or unreadable)": not files.recipe,
        "no versions (versions.json is missing or unreadable)": not files.versions,
        "no finished training step": not files.train,
        "no validation, so accuracy and KL on held-out problems are unknown": not files.validation,
        "no responses of a validation": bool(files.validation) and "validation" not in kinds,
    }
    return [f"The run has {what}." for what, is_absent in absent.items() if is_absent]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _yaml(text: str) -> dict[str, Any]:
    try:
        return mapping(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}


def _json(path: Path) -> dict[str, Any]:
    return parsed(_text(path))
