"""Checkpoints of a run: background saving, verification, loading and retention."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from distill.checkpoint.async_save import Write, WriteResult
from distill.checkpoint.lock import WAIT_S, DirectoryLock
from distill.checkpoint.manifest import (
    CheckpointError,
    checksums_of,
    flush_directory,
    read_failed,
    read_info,
    write_durably,
    write_info,
)
from distill.checkpoint.retention import to_drop
from distill.checkpoint.search import DIR_KEY, Found, find_checkpoint, step_of, steps_in, writing
from distill.checkpoint.storage import SHARDS, HeartbeatLoadPlanner, ShardsReader, read_error
from distill.config import CheckpointingConfig
from distill.distributed.world import CONTROL_TIMEOUT, World
from distill.errors import CollectiveUserError, UserError, cannot_write, raise_if_not_creatable
from distill.metrics.sinks import rows_until
from distill.run_files import METRICS_FILE, owner_of

log = logging.getLogger(__name__)

_PROBE_TEXT = "test of write access\n"
_VISIBLE_WITHIN_S = 60.0
"""Time limit in seconds for a file written on one node to become visible on all nodes."""
_UNFINISHED = "tmp_"
_FOR_ALARM = "saved_for_alarm"
"""Key of training_info.json that is true if an alarm saved the checkpoint."""


def has_validation(info: Mapping[str, Any]) -> bool:
    """Return whether ``info``, the content of training_info.json, contains validation metrics."""
    return any(name.startswith("validation/") for name in info.get("metrics", {}))


@dataclass
class _Pending:
    """A checkpoint whose files are being written in the background."""

    step: int
    folder: Path
    info: dict[str, Any]
    history: Path | None
    write: Write


class Checkpoints:
    """Manager of the ``step_N`` directories in ``checkpointing.checkpoint_dir``.

    N is the number of finished training steps. Each shard is stored with its tensor's name and its offset in the
    tensor, so a checkpoint can be loaded on any number of ranks. ``save`` copies the tensors to host memory, and a
    thread writes them to ``tmp_step_N``. After every rank has written its shards, ``finalize_pending`` renames the
    directory to ``step_N``. Only one checkpoint is written at a time. All public methods except ``due`` and
    ``before`` are collective.
    """

    def __init__(self, config: CheckpointingConfig, world: World) -> None:
        self._config = config
        self._world = world
        assert config.checkpoint_dir is not None, "build.py sets it to a folder in the run directory"
        self._dir = Path(config.checkpoint_dir)
        self._pending: _Pending | None = None
        self._group: dist.ProcessGroup | None = None
        self._lock: DirectoryLock | None = None
        self.newest: Path | None = None
        """Newest checkpoint: the one that ``find`` returned, or that this process has completed; None before that."""
        self.slowest_s = 0.0
        """Longest duration of a background checkpoint write of this rank so far, in seconds."""
        self._warnings: set[str] = set()
        """Texts of the warnings that ``_warn_once`` has logged, so that each text is logged only once."""

    def due(self, step: int, last: bool) -> bool:
        """Return whether to save a checkpoint after ``step`` finished steps; ``last``: whether the run ends."""
        period = self._config.save_period
        return self._config.enabled and (last or (period > 0 and step % period == 0))

    # ---- start of a run ----

    def prepare(self) -> None:
        """Create and lock checkpoint_dir, test write access on all ranks, and remove unfinished checkpoints.

        Collective. Raises UserError on all ranks if the directory cannot be written, is locked by another run, or is
        not the same directory on all ranks.
        """
        if not self._config.enabled:
            return
        token = self._world.broadcast(uuid.uuid4().hex[:8])
        main_probe, own_probe = (self._dir / f".probe_{token}_{rank}" for rank in (0, self._world.rank))
        with self._world.all_or_none("creating the checkpoint directory"), self._writing():
            if self._world.is_main:
                self._dir.mkdir(parents=True, exist_ok=True)
                self._lock = self._lock or DirectoryLock(self._dir, DIR_KEY)
                self._remove_unfinished()
                main_probe.write_text(_PROBE_TEXT)
        with self._world.all_or_none("testing the checkpoint directory"), self._writing():
            if not _wait_for_file(main_probe):
                raise UserError(
                    f"{DIR_KEY}={self._dir} is not the same directory on all ranks (rank"
                    f" {self._world.rank} does not find a file that rank 0 wrote)",
                    "choose a directory on a file system that all nodes share",
                    key=DIR_KEY,
                    value=str(self._dir),
                )
            own_probe.write_text(_PROBE_TEXT)
        with self._world.all_or_none("testing the checkpoint directory"), self._writing():
            own_probe.unlink()

    def _remove_unfinished(self) -> None:
        for folder in self._dir.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(folder, ignore_errors=True)
            outcome = "could not be removed" if folder.exists() else "was removed"
            log.warning("the unfinished checkpoint %s of an earlier run %s", folder, outcome)

    def check_only(self) -> Found | None:
        """Check checkpoint_dir and return the checkpoint to resume from, as ``prepare`` and ``find``; write nothing.

        A lock that another run holds is logged as a warning, because that run may end before this one starts.
        """
        if not self._config.enabled:
            return None
        with self._writing():
            raise_if_not_creatable(self._dir)
        if owner := owner_of(self._dir):
            text = "%s=%s is in use by %s: a run waits up to %g s until that process exits"
            log.warning(text, DIR_KEY, self._dir, owner, WAIT_S)
        return find_checkpoint(self._config, self._dir, self._world, read_only=True)

    def find(self) -> Found | None:
        """Return the verified checkpoint to resume from, or None for a start at step 0; collective.

        checkpointing.resume_from selects the checkpoint. Returns None if checkpointing is disabled.
        """
        found = find_checkpoint(self._config, self._dir, self._world) if self._config.enabled else None
        self.newest = None if found is None else found.path
        return found

    def load(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Read the tensors of the checkpoint ``path`` into ``tensors``, in place; collective.

        ``tensors`` maps the name of each tensor to load to its destination. Raises UserError if a tensor is missing in
        the checkpoint or has another shape there. Raises RunFailed if a file of the checkpoint cannot be read.
        """
        reader = ShardsReader(path / SHARDS)
        with self._world.all_or_none("reading the shapes of the checkpoint's tensors"):
            stored, error = reader.shapes_or_error()
        self._raise_read_failed(path, {rank: error for rank, error in enumerate(self._world.gather(error)) if error})
        with self._world.all_or_none("comparing the checkpoint with the model"):
            for name, tensor in tensors.items():
                if (shape := stored.get(name)) != tensor.shape:
                    found = "is missing" if shape is None else f"has shape {tuple(shape)}"
                    raise UserError(
                        f"checkpoint {path} does not match the model ({name} {found} in the checkpoint and has shape"
                        f" {tuple(tensor.shape)} in the model)",
                        f"set policy.model_name to the model of the checkpoint, or set {DIR_KEY} to another directory",
                        key=DIR_KEY,
                        value=str(self._dir),
                    )
        try:
            dcp.load(tensors, storage_reader=reader, planner=HeartbeatLoadPlanner(), process_group=self._world.control)
        except dcp.CheckpointException as failed:  # a BaseException, raised on all ranks
            errors = {rank: error for rank, (error, _) in failed.failures.items() if isinstance(error, OSError)}
            if len(errors) < len(failed.failures):
                raise RuntimeError(f"{failed}") from failed
            self._raise_read_failed(path, {rank: read_error(error) for rank, error in errors.items()})

    def _raise_read_failed(self, path: Path, errors: Mapping[int, CheckpointError]) -> None:
        """Raise RunFailed if ``errors`` is not empty; ``errors`` maps ranks to their read errors.

        A permanent error takes precedence over transient errors.
        """
        if errors:
            rank = min(errors, key=lambda rank: errors[rank].retryable)
            raise read_failed(path, errors[rank], f" on rank {rank}" if self._world.size > 1 else "")

    # ---- during the run ----

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        info: Mapping[str, Any],
        export: Callable[[Path], None] | None = None,
        history: Path | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Start writing the checkpoint of step ``step`` in the background; collective.

        First completes the previous checkpoint. ``finalize_pending`` later completes this checkpoint. ``tensors`` maps
        names to tensors, which are copied before ``save`` returns. ``info``: JSON values for training_info.json.
        ``export``: called on all ranks with the checkpoint's directory, to write additional files; if it raises an
        exception on only some ranks, it must do so after its last collective. ``history``: path of the run's
        metrics.jsonl, whose rows up to ``step`` are copied into the checkpoint. ``files`` maps the path of each small
        file of this rank, relative to the checkpoint, to its content.
        """
        self.finalize_pending(block=True)
        folder = self._dir / f"{_UNFINISHED}step_{step}"
        with self._world.all_or_none("creating the checkpoint's directory"), self._writing():
            if self._world.is_main:
                if self._lock is not None:
                    self._lock.check()
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
        if export is not None:
            with self._removed_on_error(folder), self._world.all_or_none("exporting the model"), self._writing():
                export(folder)
        if self._group is None and dist.is_initialized():
            # A separate group, because collectives of the background thread must not mix with those of training.
            self._group = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        write = Write(tensors, folder, self._group, self._world.rank, files or {})
        self._pending = _Pending(step, folder, dict(info), history, write)

    def finalize_pending(self, block: bool) -> None:
        """Complete the checkpoint that is being written, if all ranks have written their parts; collective.

        Then removes the checkpoints that checkpointing.keep_top_k does not keep. ``block``: whether to wait until the
        background write has finished. If the write failed, raises UserError on all ranks for a disk error, and
        RuntimeError for any other error; earlier checkpoints are then kept.
        """
        pending = self._pending
        if pending is None:
            return
        if block:
            pending.write.wait()
        results = [result for result in self._world.gather(pending.write.result()) if result is not None]
        if len(results) < self._world.size:
            return
        self._pending = None
        self.slowest_s = max(self.slowest_s, pending.write.seconds)
        with self._removed_on_error(pending.folder):
            self._raise_write_error(results, pending.step)
            with self._world.all_or_none("completing the checkpoint"), self._writing():
                if self._world.is_main:
                    self._finish(pending, results)
        self.newest = self._dir / f"step_{pending.step}"
        log.info("saved checkpoint %s", self.newest)

    def _finish(self, pending: _Pending, results: list[WriteResult]) -> None:
        checksums = {name: entry for result in results for name, entry in result.checksums.items()}
        missing = sorted(results[0].expected - checksums.keys())
        if missing:
            raise RuntimeError(f"no rank wrote the file {missing[0]} of the checkpoint {pending.folder}")
        if pending.history is not None:
            rows = rows_until(pending.history, pending.step)
            write_durably(pending.folder / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
            checksums |= checksums_of(pending.folder, [METRICS_FILE])
        write_info(pending.folder, pending.info, checksums)
        self._give_name(pending)
        self._drop_old()

    def _give_name(self, pending: _Pending) -> None:
        final = self._dir / f"step_{pending.step}"
        if final.exists():
            self._remove(final)
        pending.folder.rename(final)
        flush_directory(self._dir)

    def _raise_write_error(self, results: list[WriteResult], step: int) -> None:
        errors = [(rank, result.error) for rank, result in enumerate(results) if result.error is not None]
        for _, error in errors:
            if isinstance(error, OSError):
                fix = "free space there, then start the run again to resume from the newest complete checkpoint"
                found = cannot_write(f"{DIR_KEY}={self._dir}", error, fix)
                problem = f"writing the checkpoint of step {step} failed: {found.problem}"
                raise CollectiveUserError(problem, found.fix, found.key, found.value) from error
        if errors:
            rank, error = errors[0]
            raise RuntimeError(f"rank {rank} failed to write the checkpoint of step {step}: {error!r}") from error

    @contextmanager
    def _removed_on_error(self, folder: Path) -> Iterator[None]:
        """Remove the unfinished checkpoint ``folder`` if the block raises an exception, to free disk space."""
        try:
            yield
        except Exception:
            if self._world.is_main:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def before(self, step: int) -> Path | None:
        """Return the newest complete checkpoint with fewer than ``step`` finished steps, or None."""
        older = [path for path in steps_in(self._dir) if step_of(path) < step] if self._config.enabled else []
        return older[-1] if older else None

    def record_metrics(self, step: int, values: Mapping[str, float], more: Mapping[str, Any] | None = None) -> None:
        """Add metrics to the checkpoint of ``step``, if that checkpoint exists; then apply keep_top_k.

        Collective. ``values`` maps logged names, such as ``train/loss``, to the metrics after ``step`` training steps;
        all ranks must pass the same names. Only validation metrics and the metric that checkpointing.metric_name
        selects are stored. ``more``: more JSON values by name to store.
        """
        if not self._config.enabled:
            return
        self._warn_if_not_measured(values)
        kept = {n: v for n, v in values.items() if n.startswith("validation/") or n == self._metric}
        if not kept:
            return
        finite = {name: value for name, value in kept.items() if math.isfinite(value)}
        self._update_info(step, lambda info: {"metrics": info.get("metrics", {}) | finite, **(more or {})})

    def keep_for_alarm(self, step: int) -> None:
        """Exempt the checkpoint of ``step``, if that checkpoint exists, from keep_top_k; collective.

        Only the newest checkpoints of alarms are exempt, see ``retention.to_drop``.
        """
        if self._config.enabled:
            self._update_info(step, lambda info: {_FOR_ALARM: True})

    def _update_info(self, step: int, changes: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        """Change training_info.json of ``step``, if that checkpoint exists; then apply keep_top_k; collective."""
        if self._pending is not None and self._pending.step == step:
            self._pending.info.update(changes(self._pending.info))
            return
        with self._world.all_or_none("updating the checkpoint's information"), self._writing():
            path = self._dir / f"step_{step}"
            found = self._info(path) if self._world.is_main and path.exists() else None
            if found is not None:
                write_info(path, found | changes(found))
                self._drop_old()

    def _warn_if_not_measured(self, values: Mapping[str, float]) -> None:
        kind = self._metric.partition("/")[0]
        measured = sorted(name for name in values if self._metric and name.startswith(f"{kind}/"))
        if measured and self._metric not in measured:
            names = ", ".join(name.removeprefix(f"{kind}/") for name in measured)
            self._warn_once(
                f"checkpointing.metric_name={self._config.metric_name} is not a measured metric, so it cannot select"
                f" the best checkpoints: set it to {'val' if kind == 'validation' else kind}:NAME with one of the"
                f" measured names ({names})"
            )

    # ---- existing checkpoints ----

    @property
    def _metric(self) -> str:
        """Return the name of checkpointing.metric_name in the logs, such as validation/accuracy; "" if it is null."""
        kind, _, name = (self._config.metric_name or "").partition(":")
        return f"{'validation' if kind == 'val' else kind}/{name}" if name else ""

    def _drop_old(self) -> None:
        """Remove the checkpoints that checkpointing.keep_top_k does not keep; ignore unreadable checkpoints."""
        infos = {path: info for path in steps_in(self._dir) if (info := self._info(path)) is not None}
        metrics = {path: info.get("metrics", {}).get(self._metric) for path, info in infos.items()}
        for_alarms = {path for path, info in infos.items() if info.get(_FOR_ALARM)}
        if self._metric and any(value is not None for value in metrics.values()):
            for path in [p for p in list(metrics)[:-1] if metrics[p] is None and p not in for_alarms]:
                self._warn_once(
                    f"checkpoint {path} counts as the worst checkpoint for checkpointing.keep_top_k, because"
                    f" checkpointing.metric_name={self._config.metric_name} was not measured for it"
                )
        for old in to_drop(metrics, self._config.keep_top_k, self._config.higher_is_better, for_alarms):
            try:
                self._remove(old)
            except OSError as error:  # another process may be reading it; the run can continue
                self._warn_once(
                    f"checkpoint {old} could not be fully removed ({error.strerror}): the next run removes the rest"
                )
            log.info("removed checkpoint %s because of checkpointing.keep_top_k=%d", old, self._config.keep_top_k)

    def _info(self, path: Path) -> dict[str, Any] | None:
        try:
            return read_info(path)
        except CheckpointError as error:
            self._warn_once(f"checkpoint {path} is ignored, because it is damaged or unreadable: {error}")
            return None

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint; rename it first, so that a killed process leaves no partial ``step_N``."""
        renamed = self._dir / f"{_UNFINISHED}dropped_{path.name}"
        shutil.rmtree(renamed, ignore_errors=True)
        path.rename(renamed)
        shutil.rmtree(renamed)

    def _warn_once(self, text: str) -> None:
        if text not in self._warnings:
            self._warnings.add(text)
            log.warning("%s", text)

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self._dir)


def _wait_for_file(file: Path) -> bool:
    """Wait up to _VISIBLE_WITHIN_S seconds until ``file`` is visible on this node; return whether it is."""
    until = time.monotonic() + _VISIBLE_WITHIN_S
    while not file.exists():
        if time.monotonic() >= until:
            return False
        time.sleep(0.2)
    return True
