"""The checkpoints of a run: when one is due, written, whole, found again, and which are kept."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from distill.checkpoint.async_save import Write, Written
from distill.checkpoint.lock import DirectoryLock
from distill.checkpoint.manifest import (
    Damaged,
    Fault,
    Sums,
    Unreadable,
    fault_of,
    files_of,
    read_info,
    sums_of,
    write_durably,
    write_info,
)
from distill.checkpoint.retention import to_drop
from distill.checkpoint.storage import SHARDS, CountedLoad, ShardsReader, fault_of_read
from distill.config import CheckpointingConfig
from distill.distributed.world import CONTROL_TIMEOUT, World
from distill.errors import CollectiveUserError, RunFailed, UserError, cannot_write, writing_to
from distill.metrics.sinks import METRICS_FILE, read_metrics, rows_until

log = logging.getLogger(__name__)

_KEY = "checkpointing.checkpoint_dir"
_PROBE = "whether this folder can be written to\n"
_PATIENCE_S = 60.0
"""How long a node may not see what another one has written."""
_UNFINISHED, _SET_ASIDE = "tmp_", "damaged_"
_OTHER_FOLDER = "set checkpointing.checkpoint_dir to another folder"
_REMEDY = "free space there, or set the key to a folder that can be written to"


def has_validation(info: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's info tells a validation of its weights."""
    return any(name.startswith("validation/") for name in info.get("metrics", {}))


@dataclass(frozen=True)
class Found:
    """A checkpoint that a run goes on from, every file of which is as it was written."""

    path: Path
    info: dict[str, Any]
    """What ``save`` was given, and under ``metrics`` what ``note`` was."""
    history: list[dict[str, float | None]]
    """The run's metrics up to there, row by row; on the main rank."""


@dataclass
class _Pending:
    step: int
    beside: Path
    info: dict[str, Any]
    history: Path | None
    write: Write


class Checkpoints:
    """The ``step_N`` folders of ``checkpointing.checkpoint_dir``: shards, the run's metrics so far, and an info.

    Tensors are stored by name and place, not by rank, so another number of ranks can load them. They are copied to
    host memory and written in the background into ``tmp_step_N``, which ``settle`` renames when every rank has written
    its part: so nothing half written has a checkpoint's name. One write at a time. All ranks call every method
    together, but ``due``.
    """

    def __init__(self, config: CheckpointingConfig, world: World) -> None:
        self._config = config
        self._world = world
        self._dir = Path(config.checkpoint_dir)
        self._pending: _Pending | None = None
        self._group: dist.ProcessGroup | None = None
        self._claim: DirectoryLock | None = None
        self.newest_step: int | None = None
        """The step of the newest checkpoint that this object has written; None before there is one."""
        self.slowest_s = 0.0
        """Seconds of the longest write so far, in the background."""
        self._said: set[str] = set()
        """What was warned of once."""

    def due(self, step: int, last: bool) -> bool:
        """Whether a checkpoint is written after ``step`` finished steps."""
        period = self._config.save_period
        return self._config.enabled and (last or (period > 0 and step % period == 0))

    # ---- at the start ----

    def prepare(self) -> None:
        """Make the folder, claim it, see that every rank can write there and that it is one folder for all, and remove
        what a killed run left half written. Raises UserError on all ranks alike."""
        if not self._config.enabled:
            return
        token = self._world.broadcast(uuid.uuid4().hex[:8])
        mains, own = (self._dir / f".probe_{token}_{rank}" for rank in (0, self._world.rank))
        with self._world.all_or_none("making the checkpoints' folder"), self._writing():
            if self._world.is_main:
                self._dir.mkdir(parents=True, exist_ok=True)
                self._claim = self._claim or DirectoryLock(self._dir, _KEY)
                for left in self._dir.glob(f"{_UNFINISHED}*"):
                    shutil.rmtree(left, ignore_errors=True)
                    what = "could not be removed" if left.exists() else "removed"
                    log.warning("%s is of a run that ended before it was whole: %s", left, what)
                mains.write_text(_PROBE)
        with self._world.all_or_none("looking at the checkpoints' folder"), self._writing():
            if not _appears(mains):
                raise UserError(
                    f"{_KEY}={self._config.checkpoint_dir} is not one folder for all ranks (rank {self._world.rank}"
                    " does not see what rank 0 wrote there): choose a folder on a file system that all nodes share"
                )
            own.write_text(_PROBE)
        with self._world.all_or_none("looking at the checkpoints' folder"), self._writing():
            own.unlink()

    def newest(self) -> Found | None:
        """The newest checkpoint that is whole; None if there is none at all, or checkpoints are off.

        Every file is compared with the sum taken when it was written, each rank reading its share. One that is damaged
        is named, set aside and passed over. Raises UserError where there are some and none is whole: a run must not
        begin anew over them; and RunFailed where a disk doesn't answer, for which no checkpoint is given up.
        """
        if not self._config.enabled:
            return None
        faults: dict[str, str] = {}
        for path in reversed(self._world.broadcast(self._steps() if self._world.is_main else [])):
            with self._world.all_or_none("reading the checkpoint's info"):
                read = _info_or_fault(path) if self._world.is_main else ({}, None)
            info, fault = self._world.broadcast(read)
            fault = fault or self._fault(path, files_of(info))
            if fault is None:
                self._set_aside(faults, path)
                return Found(path, info, _history(path, info) if self._world.is_main else [])
            if fault.retryable:
                raise _unreadable(path, fault)
            faults[path.name] = fault.text
        if faults:
            told = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
            raise CollectiveUserError(
                f"{_KEY}={self._config.checkpoint_dir} holds checkpoints and none of them is whole ({told}): repair"
                " one, or remove them to begin anew"
            )
        return None

    def _fault(self, path: Path, sums: Sums) -> Fault | None:
        """What is wrong with a file, if anything is; each rank reads every n-th."""
        with self._world.all_or_none("comparing the checkpoint's files with their sums"):
            own = fault_of(path, sums, sorted(sums)[self._world.rank :: self._world.size])
        found = [fault for fault in self._world.gather(own) if fault is not None]
        return min(found, key=lambda fault: fault.retryable, default=None)  # what is damaged surely, before what may be

    def _set_aside(self, faults: Mapping[str, str], whole: Path) -> None:
        """Rename damaged checkpoints, so that they don't count among the kept, nor are read again at the next start."""
        with self._world.all_or_none("setting damaged checkpoints aside"), self._writing():
            if self._world.is_main:
                for name, fault in faults.items():
                    aside = self._dir / f"{_SET_ASIDE}{name}"
                    shutil.rmtree(aside, ignore_errors=True)
                    (self._dir / name).rename(aside)
                    log.warning("%s is damaged (%s): it is %s from now on, and %s is used", name, fault, aside, whole)

    def load(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Fill ``tensors`` in place from a checkpoint. Raises UserError where they don't fit, and RunFailed where
        the disk fails.
        """
        reader = ShardsReader(path / SHARDS)
        with self._world.all_or_none("reading which tensors the checkpoint has"):
            stored, fault = reader.shapes_or_fault()
        self._refuse(path, {rank: fault for rank, fault in enumerate(self._world.gather(fault)) if fault})
        with self._world.all_or_none("comparing the checkpoint with the model"):
            for name, tensor in tensors.items():
                if stored.get(name) != tensor.shape:
                    raise UserError(
                        f"the checkpoint {path} does not fit the model ({name}: {stored.get(name)} against"
                        f" {tuple(tensor.shape)}): {_OTHER_FOLDER}, or the model to the checkpoint's"
                    )
        try:
            dcp.load(tensors, storage_reader=reader, planner=CountedLoad(), process_group=self._world.control)
        except dcp.CheckpointException as failed:  # of any ranks, on all; it is no Exception
            errors = {rank: error for rank, (error, _) in failed.failures.items() if isinstance(error, OSError)}
            if len(errors) < len(failed.failures):
                raise RuntimeError(f"{failed}") from failed
            self._refuse(path, {rank: fault_of_read(error) for rank, error in errors.items()})

    def _refuse(self, path: Path, faults: Mapping[int, Fault]) -> None:
        """Raise RunFailed where ranks can't read ``path``: for a fault that doesn't pass, if there is one."""
        if faults:
            rank = min(faults, key=lambda rank: faults[rank].retryable)
            raise _unreadable(path, faults[rank], f" by rank {rank}" if self._world.size > 1 else "")

    # ---- while the run goes ----

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        info: Mapping[str, Any],
        export: Callable[[Path], None] | None = None,
        history: Path | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Begin to write ``step_N``; ``settle`` makes it a checkpoint. An earlier one that is on its way is awaited.

        ``tensors`` are copied before it returns. ``info`` is plain JSON. ``export`` writes more into the folder, is
        called on all ranks at once, and may fail on one of them only behind its last collective. ``history``: the run's
        metrics.jsonl, of which the rows up to ``step`` that are there when it settles become part of the checkpoint.
        ``files``: small files that this rank adds, content by path in the checkpoint.
        """
        self.finalize_pending(block=True)
        beside = self._dir / f"{_UNFINISHED}step_{step}"
        with self._world.all_or_none("making the checkpoint's folder"), self._writing():
            if self._world.is_main:
                if self._claim is not None:
                    self._claim.check()
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
        if export is not None:
            with self._removed_on_error(beside), self._world.all_or_none("exporting the model"), self._writing():
                export(beside)
        if self._group is None and dist.is_initialized():
            # A group of its own: the background's collectives must not meet the run's.
            self._group = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        write = Write(tensors, beside, self._group, self._world.rank, files or {})
        self._pending = _Pending(step, beside, dict(info), history, write)

    def finalize_pending(self, block: bool) -> None:
        """Make a checkpoint of what is written, if all ranks have written their part, or after having waited for them;
        then drop what isn't kept.

        Nothing happens where nothing is on its way. Raises, on all ranks alike, UserError where a disk refused and
        RuntimeError for anything else that kept it from being written; the checkpoints before it stay.
        """
        pending = self._pending
        if pending is None:
            return
        if block:
            pending.write.wait()
        ended = [part for part in self._world.gather(pending.write.ended()) if part is not None]
        if len(ended) < self._world.size:
            return
        self._pending = None
        self.slowest_s = max(self.slowest_s, pending.write.seconds)
        with self._removed_on_error(pending.beside):
            self._raise_first_error(ended, pending.step)
            with self._world.all_or_none("finishing the checkpoint"), self._writing():
                if self._world.is_main:
                    self._finish(pending, ended)
        self.newest_step = pending.step
        log.info("checkpoint %s", self._dir / f"step_{pending.step}")

    def _finish(self, pending: _Pending, parts: list[Written]) -> None:
        sums = {name: sum_ for part in parts for name, sum_ in part.sums.items()}
        absent = sorted(parts[0].expected - sums.keys())
        if absent:
            raise RuntimeError(f"{pending.beside} lacks {absent[0]}, which a rank should have written there")
        if pending.history is not None:
            rows = rows_until(pending.history, pending.step)
            write_durably(pending.beside / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
            sums |= sums_of(pending.beside, [METRICS_FILE])
        write_info(pending.beside, pending.info, sums)
        self._give_name(pending)
        self._drop_old()

    def _give_name(self, pending: _Pending) -> None:
        final = self._dir / f"step_{pending.step}"
        if final.exists():
            self._remove(final)
        pending.beside.rename(final)
        _sync(self._dir)

    def _raise_first_error(self, parts: list[Written], step: int) -> None:
        errors = [(rank, part.error) for rank, part in enumerate(parts) if part.error is not None]
        for _, error in errors:
            if isinstance(error, OSError):
                what = f"the checkpoint of step {step} to {_KEY}={self._config.checkpoint_dir}"
                remedy = f"{_REMEDY}, and start again: the run goes on from the newest checkpoint that is whole"
                raise CollectiveUserError(f"{cannot_write(what, error, remedy)}") from error
        if errors:
            rank, error = errors[0]
            raise RuntimeError(f"rank {rank} failed while writing the checkpoint of step {step}: {error!r}") from error

    @contextmanager
    def _removed_on_error(self, beside: Path) -> Iterator[None]:
        """A folder that can't become a checkpoint gives its space back."""
        try:
            yield
        except Exception:
            if self._world.is_main:
                shutil.rmtree(beside, ignore_errors=True)
            raise

    def record_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write what was measured of the weights after ``step`` steps to their checkpoint, and drop what isn't kept.

        ``values``: as in the logs, ``train/loss`` and ``validation/accuracy`` for two; validation's are kept, and the
        metric that ranks. Without such a checkpoint nothing happens. The names are the same on every rank.
        """
        if not self._config.enabled:
            return
        self._warn_of_absent(values)
        kept = {n: v for n, v in values.items() if n.startswith("validation/") or n == self._metric}
        if not kept:
            return
        finite = {name: value for name, value in kept.items() if math.isfinite(value)}
        if self._pending is not None and self._pending.step == step:
            info = self._pending.info
            info["metrics"] = info.get("metrics", {}) | finite
            return
        with self._world.all_or_none("rating the checkpoint"), self._writing():
            path = self._dir / f"step_{step}"
            found = self._info(path) if self._world.is_main and path.exists() else None
            if found is not None:
                found["metrics"] = found.get("metrics", {}) | finite
                write_info(path, found)
                self._drop_old()

    def _warn_of_absent(self, values: Mapping[str, float]) -> None:
        kind = self._metric.partition("/")[0]
        there = sorted(name for name in values if self._metric and name.startswith(f"{kind}/"))
        if there and self._metric not in there:
            names = ", ".join(name.removeprefix(f"{kind}/") for name in there)
            self._warn_once(f"checkpointing.metric_name={self._config.metric_name} was not measured, but {names}")

    # ---- which there are, and which are kept ----

    def _steps(self) -> list[Path]:
        """The folders that have a checkpoint's name, oldest first."""
        named = [p for p in self._dir.glob("step_*") if p.name[5:].isdigit() and p.is_dir()]
        return sorted(named, key=lambda p: int(p.name[5:]))

    @property
    def _metric(self) -> str:
        """The metric that ranks, as the logs name it; empty for none."""
        kind, _, name = (self._config.metric_name or "").partition(":")
        return f"{'validation' if kind == 'val' else kind}/{name}" if name else ""

    def _drop_old(self) -> None:
        """Drop what ``keep_top_k`` leaves out; what has no readable info is neither counted nor dropped."""
        infos = {path: info for path in self._steps() if (info := self._info(path)) is not None}
        rated = {path: info.get("metrics", {}).get(self._metric) for path, info in infos.items()}
        if self._metric and any(value is not None for value in rated.values()):
            for path in [p for p in list(rated)[:-1] if rated[p] is None]:
                self._warn_once(f"{path} is not ranked: {self._config.metric_name} was not measured")
        for old in to_drop(rated, self._config.keep_top_k, self._config.higher_is_better):
            try:
                self._remove(old)
            except OSError as error:  # somebody reads it, say: no reason to end a run
                self._warn_once(f"checkpoint {old} can't be removed wholly ({error.strerror}): it takes space")
            log.info("checkpoint %s dropped: checkpointing.keep_top_k=%d", old, self._config.keep_top_k)

    def _info(self, path: Path) -> dict[str, Any] | None:
        try:
            return read_info(path)
        except Damaged as fault:
            self._warn_once(f"checkpoint {path} is damaged: {fault}")
            return None

    def _remove(self, path: Path) -> None:
        """Under another name first: killed in the middle, nothing half removed looks like a checkpoint."""
        going = self._dir / f"{_UNFINISHED}dropped_{path.name}"
        shutil.rmtree(going, ignore_errors=True)
        path.rename(going)
        shutil.rmtree(going)

    def _warn_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing_to(f"{_KEY}={self._config.checkpoint_dir}", _REMEDY)


def _appears(file: Path) -> bool:
    """Whether a file that another node has written is there, at once or after what a network file system may take."""
    until = time.monotonic() + _PATIENCE_S
    while not file.exists():
        if time.monotonic() >= until:
            return False
        time.sleep(0.2)
    return True


def _unreadable(path: Path, fault: Fault, by: str = "") -> RunFailed:
    again = "which may pass: start again when the disk answers" if fault.retryable else "mend that"
    return RunFailed(
        f"{path}: {fault.text}{by}, {again}, or move the folder away to go on from the checkpoint before it",
        retryable=fault.retryable,
    )


def _info_or_fault(path: Path) -> tuple[dict[str, Any], Fault | None]:
    try:
        return read_info(path), None
    except Damaged as fault:
        return {}, Fault(f"{fault}", isinstance(fault, Unreadable))


def _history(path: Path, info: Mapping[str, Any]) -> list[dict[str, float | None]]:
    """The rows that travelled along, and the validation that was noted after they were written."""
    file = path / METRICS_FILE
    rows = read_metrics(file) if METRICS_FILE in files_of(info) else []
    step = int(path.name.removeprefix("step_"))
    late = {name: value for name, value in info.get("metrics", {}).items() if name.startswith("validation/")}
    if late and rows and not any(row["step"] == step and late.keys() & row.keys() for row in rows):
        rows.append({"step": step, **late})
    return rows


def _sync(folder: Path) -> None:
    """Have a rename survive a machine that loses power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems know no such thing for folders
            os.fsync(handle)
    finally:
        os.close(handle)
