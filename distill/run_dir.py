"""Create and lock the run directory; write the recipe, package versions and the changes at each resume."""

from __future__ import annotations

import logging
import os.path
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path

import yaml

from distill.checkpoint import Found, changed_keys
from distill.checkpoint.lock import WAIT_S, DirectoryLock
from distill.checkpoint.recipe_diff import affects_learning
from distill.checkpoint.resume import RunHistory
from distill.config import Arguments, Config
from distill.config.load import parent_of
from distill.distributed import slurm
from distill.errors import UserError, raise_if_not_creatable, reason, writing_run
from distill.metrics.sinks import equal_rows, read_metrics
from distill.run_files import METRICS_FILE, PARENT_FILE, RECIPE_FILE, owner_of
from distill.versions import Start, write_versions

log = logging.getLogger(__name__)

_RECIPE, _KEY = RECIPE_FILE, "runtime.run_dir"
_SAME_RUN_TOO = (
    "data.default.",
    "data.max_input_seq_length",
    "data.shuffle",
    "data.train",
    "checkpointing.enabled",
    "checkpointing.checkpoint_dir",
)
"""Prefixes of keys that are equal in all starts of a run, in addition to those that affect training."""


def open_run_dir(
    arguments: Arguments, run_dir: Path, history: RunHistory, found: Found | None, last_step: int, start: Start
) -> DirectoryLock:
    """Lock the run directory and write the files that describe the run; called on the main rank only.

    The files are the resolved recipe, its parent, the devices and package versions of each start (``start`` is the
    current one), and the differences in recipe and data detected at each resume. A recipe that a resume changes is kept
    as config_until_step_N.yaml. Returns the lock, which the run holds until it ends. Raises UserError if the directory
    contains the metrics of another run.
    """
    with writing_run(run_dir):
        lock = DirectoryLock(run_dir, _KEY)
    _refuse_other_run(run_dir, arguments.config, found, last_step)
    with writing_run(run_dir):
        _write_recipe(run_dir, arguments.resolved, found)
        _write_parent(run_dir, arguments.recipe)
        step = int(found.info["step"]) if found else 0
        write_versions(run_dir, {**start.versions(), "clock": str(history.clock), "start_step": step})
        history.write(run_dir)
    log.info("the run directory is %s", os.path.relpath(run_dir))
    return lock


def _write_recipe(run_dir: Path, text: str, found: Found | None) -> None:
    """Write config.yaml; the file is complete at any time, and an earlier recipe is kept if a resume changes it."""
    recipe, part = run_dir / _RECIPE, run_dir / f"{_RECIPE}.part"
    if found is not None and recipe.exists() and recipe.read_text() != text:
        first = f"config_until_step_{found.info['step']}"
        names = (f"{first}.yaml" if number == 1 else f"{first}_{number}.yaml" for number in count(1))
        shutil.copyfile(recipe, next(path for name in names if not (path := run_dir / name).exists()))
    part.write_text(text)
    part.replace(recipe)


def _write_parent(run_dir: Path, recipe: Path) -> None:
    """Write the parent of the recipe, so that the report can show how the run differs from it on any machine."""
    try:
        name, values = parent_of(recipe)
    except Exception as error:  # a parent need not be a complete recipe
        log.debug("the parent of the recipe %s cannot be read: %s", recipe, reason(error))
        return
    text = yaml.safe_dump({"parent": name, "recipe": values}, sort_keys=False, allow_unicode=True)
    (run_dir / PARENT_FILE).write_text(text, encoding="utf-8")


def new_run_dir(log_dir: str, run_dir: str | None) -> Path:
    """Create a directory and return its path: ``run_dir``, or a new ``log_dir/exp_NNN`` if it is None."""
    with _creating(log_dir, run_dir):
        if run_dir is not None:
            path = Path(run_dir)
            path.mkdir(parents=True, exist_ok=True)
            return path
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        while True:
            taken = [int(path.name[4:]) for path in Path(log_dir).glob("exp_*") if path.name[4:].isdigit()]
            path = Path(log_dir) / f"exp_{max(taken, default=0) + 1:03d}"
            try:
                path.mkdir()
            except FileExistsError:  # another run created it at the same time
                continue
            return path


def check_run_dir(config: Config, found: Found | None, last_step: int | None, contents: bool = True) -> None:
    """Raise the UserError with which a run would refuse its run directory; write nothing.

    ``last_step``: number of steps of the run; None if it is unknown. ``contents``: whether to check the metrics in the
    directory, or only that it can be created.
    """
    log_dir, run_dir = config.logger.log_dir, config.runtime.run_dir
    with _creating(log_dir, run_dir):
        raise_if_not_creatable(Path(run_dir or log_dir))
    if run_dir is None or not contents:
        return
    if owner := owner_of(Path(run_dir)):
        log.warning(
            "%s=%s is in use by %s: a run waits up to %g s until that process exits", _KEY, run_dir, owner, WAIT_S
        )
    _refuse_other_run(Path(run_dir), config, found, sys.maxsize if last_step is None else last_step)


@contextmanager
def _creating(log_dir: str, run_dir: str | None) -> Iterator[None]:
    """Raise UserError if the ``with`` block fails to create the run directory; see ``new_run_dir``."""
    try:
        yield
    except OSError as error:
        key, value = ("logger.log_dir", log_dir) if run_dir is None else (_KEY, run_dir)
        raise UserError(
            f"{key}={value} cannot be created ({error.strerror})",
            "set it to a writable directory",
            key=key,
            value=value,
        ) from error


def _refuse_other_run(run_dir: Path, config: Config, found: Found | None, last_step: int) -> None:
    """Raise UserError if ``run_dir`` contains the metrics of another run.

    The metrics belong to this run if the rows up to the checkpoint's step equal those in the checkpoint. They also
    belong to it if ``run_dir`` contains the recipe of this run: the rows may differ because steps ran again in another
    run directory. Without a checkpoint, the run starts at step 0, so metrics of a finished run are refused. Exception:
    a requeued Slurm job may have written all its metrics and no checkpoint.
    """
    rows = read_metrics(run_dir / METRICS_FILE) if (run_dir / METRICS_FILE).exists() else []
    if not rows:
        return
    step = 0 if found is None else int(found.info["step"])
    earlier = [row for row in rows if int(row["step"] or 0) <= step]
    shared = 0 if found is None else min(len(found.history), len(earlier))
    if found is not None and shared and equal_rows(found.history, earlier) == shared:
        return
    other = _differences(run_dir / _RECIPE, config)
    final, job = max(int(row["step"] or 0) for row in rows), slurm.start_of_job()
    if not other and found is None and final >= last_step and not (job and job[1]):
        other = f"that has finished {final} steps"
    if other:
        raise UserError(
            f"{_KEY}={run_dir} contains the metrics of another run, {other}",
            f"set {_KEY} to another directory, or remove this one",
            key=_KEY,
            value=str(run_dir),
        )


def _differences(recipe: Path, config: Config) -> str:
    """Return a clause on how the file ``recipe`` and ``config`` differ; "" if both belong to the same run.

    Differences that change only the rounding are ignored.
    """
    try:
        saved = yaml.safe_load(recipe.read_text())
        changes = changed_keys(saved, asdict(config), _SAME_RUN_TOO)
    except (OSError, yaml.YAMLError, AttributeError, ValueError):
        return f"whose recipe {_RECIPE} cannot be read"
    changed = [change for key, change in changes.items() if affects_learning(key)]
    return f"in which {'; '.join(changed[:3])}" if changed else ""
