"""Find and verify the checkpoint that a run resumes from."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.checkpoint.manifest import (
    CheckpointError,
    Checksums,
    files_of,
    find_damage,
    info_or_error,
    read_failed,
    read_history,
)
from distill.config import CheckpointingConfig
from distill.distributed import slurm
from distill.distributed.world import World
from distill.errors import CollectiveUserError, UserError, writing_to

log = logging.getLogger(__name__)

DIR_KEY = "checkpointing.checkpoint_dir"
JOB = "slurm_job"
"""Key of training_info.json with the Slurm job ID of the run that saved the checkpoint; null outside of Slurm."""
SOURCE = "resumed_from"
"""Key of training_info.json with the path in checkpointing.resume_from from which the run started, or null."""
_SOURCE_KEY = "checkpointing.resume_from"
_DAMAGED = "damaged_"
_FIX_WRITING = f"free space there, or set {DIR_KEY} to a writable directory"


@dataclass(frozen=True)
class Found:
    """A verified checkpoint that a run resumes from."""

    path: Path
    info: dict[str, Any]
    """Content of training_info.json: the ``info`` passed to ``Checkpoints.save``, plus two more keys.

    ``files`` maps the path of each file to its size and SHA-256. ``metrics`` maps metric names to the values
    that ``Checkpoints.record_metrics`` added; this key may be missing.
    """
    history: list[dict[str, float | None]]
    """Rows of the run's metrics.jsonl up to the checkpoint's step; empty on ranks other than 0."""


def step_of(checkpoint: Path) -> int:
    """Return the step N of the checkpoint directory ``step_N``."""
    return int(checkpoint.name.removeprefix("step_"))


def steps_in(folder: Path) -> list[Path]:
    """Return the ``step_N`` directories in ``folder`` in increasing order of N."""
    named = [path for path in folder.glob("step_*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(named, key=step_of)


def source_of(config: CheckpointingConfig) -> str | None:
    """Return the absolute path in checkpointing.resume_from; None for ``latest`` and ``never``."""
    return None if config.resume_from in ("latest", "never") else str(Path(config.resume_from).resolve())


def find_checkpoint(config: CheckpointingConfig, folder: Path, world: World, read_only: bool = False) -> Found | None:
    """Return the checkpoint that checkpointing.resume_from selects, after verifying its files; collective.

    Returns None for a start at step 0. ``folder``: the run's checkpoint directory. ``read_only``: rename no damaged
    checkpoint, and verify only the sizes of the files, as a dry run does. Raises UserError if ``resume_from`` conflicts
    with the checkpoints in ``folder``, or if all checkpoints are damaged. Raises RunFailed if a transient I/O error
    persists.
    """
    found = _newest(folder, world, read_only)
    source = source_of(config)
    if source is None:
        job = slurm.start_of_job()
        requeued = found is not None and job is not None and found.info.get(JOB) == job[0]
        if config.resume_from == "never" and found is not None and not requeued:
            raise CollectiveUserError(
                f"{_SOURCE_KEY}=never, but {DIR_KEY}={folder} contains the checkpoint {found.path.name}",
                f"set {DIR_KEY} to a new directory, or set {_SOURCE_KEY}=latest to resume from the checkpoint",
                key=_SOURCE_KEY,
                value="never",
            )
        return found
    if found is None:
        return _given(Path(source), world, read_only)
    given = world.broadcast([Path(source), *steps_in(Path(source))[-1:]] if world.is_main else [])
    if found.info.get(SOURCE) != source and found.path.resolve() not in given:
        raise CollectiveUserError(
            f"{_SOURCE_KEY}={config.resume_from}, but {DIR_KEY}={folder} contains the checkpoint {found.path.name},"
            " which does not continue from it",
            f"set {DIR_KEY} to a new directory, or set {_SOURCE_KEY}=latest to resume from {found.path.name}",
            key=_SOURCE_KEY,
            value=config.resume_from,
        )
    return found


def _given(source: Path, world: World, read_only: bool) -> Found:
    """Return the checkpoint ``source``, or the newest checkpoint in the directory ``source``; collective.

    Raises UserError if there is no checkpoint, or if it is damaged. A damaged checkpoint is not renamed, because it may
    belong to another run.
    """
    path = source
    with world.all_or_none("finding the checkpoint to resume from"):
        if world.is_main and not source.name.startswith("step_"):
            path = (steps_in(source) or [source])[-1]
        if world.is_main and not (path.is_dir() and path.name[5:].isdigit()):
            raise UserError(
                f"{_SOURCE_KEY}={source} is not a checkpoint and contains none",
                "set it to a step_N directory, to a directory with step_N directories, or to latest or never",
                key=_SOURCE_KEY,
                value=str(source),
            )
    path = world.broadcast(path)  # a network file system may show other ranks an older list of files
    found, error = _verified(path, world, read_only)
    if error is None:
        return found
    if error.retryable:
        raise read_failed(path, error)
    raise CollectiveUserError(
        f"{_SOURCE_KEY}={source} selects the damaged checkpoint {path.name} ({error.reason})",
        "set it to an undamaged checkpoint",
        key=_SOURCE_KEY,
        value=str(source),
    )


def _newest(folder: Path, world: World, read_only: bool) -> Found | None:
    """Return the newest undamaged checkpoint in ``folder``, or None if there is no checkpoint; collective.

    Damaged checkpoints are logged, renamed (unless ``read_only``) and skipped. Raises UserError if all checkpoints are
    damaged, so that the run does not silently start from step 0. Raises RunFailed, and renames no checkpoint, if a
    transient I/O error persists. All other errors of reading a file count as damage.
    """
    damaged: dict[str, str] = {}
    for path in reversed(world.broadcast(steps_in(folder) if world.is_main else [])):
        found, error = _verified(path, world, read_only)
        if error is None:
            if not read_only:
                _rename_damaged(damaged, found.path, world)
            elif damaged:
                log.warning("damaged checkpoints, which a run renames and skips: %s", _reasons(damaged))
            return found
        if error.retryable:
            raise read_failed(path, error)
        damaged[path.name] = error.reason
    if damaged:
        raise CollectiveUserError(
            f"{DIR_KEY}={folder} contains only damaged checkpoints ({_reasons(damaged)})",
            "repair one of these checkpoints, or remove all of them to start from step 0",
            key=DIR_KEY,
            value=str(folder),
        )
    return None


def _reasons(damaged: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {error}" for name, error in damaged.items())


def _verified(path: Path, world: World, read_only: bool) -> tuple[Found, CheckpointError | None]:
    """Read and verify the checkpoint ``path``; return it and its error (None if it is intact); collective.

    Each rank verifies the SHA-256 of a part of the files; with ``read_only``, only file sizes are verified.
    """
    with world.all_or_none("reading the checkpoint's training_info.json"):
        read = info_or_error(path) if world.is_main else ({}, None)
    info, error = world.broadcast(read)
    error = error or _find_damage(path, files_of(info), world, read_only)
    return Found(path, info, read_history(path, info) if world.is_main and error is None else []), error


def _find_damage(path: Path, checksums: Checksums, world: World, read_only: bool) -> CheckpointError | None:
    """Return the error of a damaged or unreadable file of the checkpoint, or None if all files are intact.

    Collective: each rank verifies a part of the files, and all ranks return the same error. Damage takes precedence
    over transient I/O errors. ``read_only``: verify only the sizes, but of all files on each rank.
    """
    names = sorted(checksums)
    with world.all_or_none("verifying the checkpoint's files"):
        own = find_damage(path, checksums, names if read_only else names[world.rank :: world.size], not read_only)
    errors = [error for error in world.gather(own) if error is not None]
    return min(errors, key=lambda error: error.retryable, default=None)


def _rename_damaged(damaged: Mapping[str, str], intact: Path, world: World) -> None:
    """Rename damaged checkpoints, so that the next resume ignores them; collective.

    ``damaged`` maps the directory name of each damaged checkpoint to the reason. ``intact``: the checkpoint that
    the run resumes from.
    """
    folder = intact.parent
    with world.all_or_none("renaming damaged checkpoints"), writing(folder):
        if world.is_main:
            for name, reason in damaged.items():
                renamed = folder / f"{_DAMAGED}{name}"
                shutil.rmtree(renamed, ignore_errors=True)
                (folder / name).rename(renamed)
                log.warning(
                    "checkpoint %s is damaged (%s) and was renamed to %s: the run resumes from %s",
                    *(name, reason, renamed, intact),
                )


def writing(folder: Path) -> AbstractContextManager[None]:
    """Return a context manager that raises UserError if its block fails to write to the checkpoint directory."""
    return writing_to(f"{DIR_KEY}={folder}", _FIX_WRITING)
