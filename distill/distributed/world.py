"""All ranks of a run: device meshes, small collectives, and errors that all ranks raise together."""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distill.distributed import slurm
from distill.distributed.launcher import launcher_error
from distill.distributed.rendezvous import Rendezvous
from distill.errors import CollectiveUserError, UserError, show
from distill.supervise import progress
from distill.supervise.supervisor import Supervisor
from distill.types import Layout

__all__ = ["CONTROL_TIMEOUT", "World"]
log = logging.getLogger(__name__)
T = TypeVar("T")

_TIMEOUT = datetime.timedelta(minutes=30)
_SHUTDOWN_TIMEOUT = datetime.timedelta(minutes=1)
CONTROL_TIMEOUT = datetime.timedelta(days=7)
"""Timeout of collectives on the process group ``World.control``.

It is longer than any training step. A shorter one is not needed: the watchdog detects hanging ranks much earlier.
"""


class World:
    """This rank's connection to all ranks of the run: process groups, device meshes and collectives.

    Creating it is collective. The rank number and the number of ranks are read from the environment variables of
    torchrun or Slurm; without them the world has one rank. ``supervisor`` handles signals, watchdog and exit status of
    this rank; with None no watchdog detects failed ranks. Raises RendezvousError or UserError if the ranks cannot
    connect.
    """

    def __init__(self, timeout: datetime.timedelta = _TIMEOUT, supervisor: Supervisor | None = None) -> None:
        os.environ.update(slurm.torch_environment())
        cuda = torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if cuda:
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
        rendezvous = Rendezvous()
        if supervisor is None:
            rendezvous.barrier()
        else:
            supervisor.start_watchdog(
                rendezvous.store,
                rendezvous.rank,
                rendezvous.size,
                rendezvous.barrier,
                partial(launcher_error, rendezvous.rank),
                rendezvous.holds_store,
            )
        rendezvous.connect(backend, timeout)
        self.store = rendezvous.store
        """Key-value store of all ranks, for messages that need no collective."""
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(self.size)))
        self._control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        self.supervisor = supervisor or Supervisor(self.rank == 0)
        self.device = torch.device("cpu")
        self.mesh: DeviceMesh | None = None
        self._teacher_size = 1

    @property
    def control(self) -> dist.ProcessGroup:
        """Return the gloo process group of all ranks, for small Python objects; models use other groups.

        Raises RuntimeError after the process groups were destroyed.
        """
        if not dist.is_initialized():
            raise RuntimeError(
                "the process groups were destroyed, perhaps when vLLM's engine was closed: close the engine last"
            )
        group: dist.ProcessGroup = self._control
        return group

    @property
    def is_main(self) -> bool:
        """Return whether this is the main rank, which writes to console, TensorBoard and run directory."""
        return self.rank == 0

    @property
    def gpu_bytes(self) -> int | None:
        """Return the memory of this rank's GPU in bytes; None on the CPU."""
        return torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else None

    def build_mesh(self, device: str, tp: int, cp: int, replicas: int = 1, teacher: int | None = 1) -> None:
        """Create the device mesh (replica, shard, tp) on ``device`` (auto, cpu or cuda); collective.

        tp is the innermost axis: it varies fastest with the rank. The shard axis combines the data-parallel and the
        context-parallel axis (dp, cp). Unused axes have size 1. Call ``check_cluster`` first: tp * cp must divide the
        number of ranks.

        ``tp``, ``cp``: tensor- and context-parallel size. ``replicas``: number of copies of the model; the ranks are
        divided evenly among them. ``teacher``: number of consecutive ranks that compute the teacher's micro-batches
        together; values below cp * tp are raised to cp * tp. None: the teacher is the student's module, and its
        micro-batches are split over the same context-parallel ranks.
        """
        use_cuda = device != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")
        shards = self.size // (replicas * tp)
        self.mesh = init_device_mesh(
            self.device.type, (replicas, shards, tp), mesh_dim_names=("replica", "shard", "tp")
        )
        # Ranks that share a sequence are not the ranks that share a parameter, so they need separate meshes.
        sequence = (self.size // (cp * tp), cp, tp)
        self._cp_mesh = init_device_mesh(self.device.type, sequence, mesh_dim_names=("dp", "cp", "tp"))["cp"]
        self._teacher_size, self._teacher_mesh = cp, self._cp_mesh
        if teacher is not None:
            self._teacher_size = max(teacher, cp * tp)
            groups = (self.size // self._teacher_size, self._teacher_size)
            names = ("groups", "teacher")
            self._teacher_mesh = init_device_mesh(self.device.type, groups, mesh_dim_names=names)["teacher"]

    def _axes(self, *names: str) -> DeviceMesh:
        assert self.mesh is not None, "build_mesh comes first"
        mesh: DeviceMesh = self.mesh[names] if len(names) > 1 else self.mesh[names[0]]
        return mesh

    @property
    def shard_mesh(self) -> DeviceMesh:
        """Return the device mesh for FSDP: (shard), or (replica, shard) with several copies of the model."""
        return self._axes("shard") if self._axes("replica").size() == 1 else self._axes("replica", "shard")

    @property
    def replica_mesh(self) -> DeviceMesh:
        """Return the one-dimensional device mesh of the ranks that hold one complete copy of the student.

        It combines the axes (shard, tp).
        """
        mesh: DeviceMesh = self._axes("shard", "tp")._flatten("shard_tp")
        return mesh

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """Return the group of ranks that hold the same shards in all replicas; None if only one replica exists."""
        replicas = self._axes("replica")
        return replicas.get_group() if replicas.size() > 1 else None

    @property
    def tp_mesh(self) -> DeviceMesh:
        """Return the tensor-parallel device mesh: the ranks over which each layer's matrices are split."""
        return self._axes("tp")

    @property
    def cp_group(self) -> dist.ProcessGroup | None:
        """Return the group of ranks that split a micro-batch's token positions; None if cp_size is 1."""
        assert self.mesh is not None, "build_mesh comes first"
        return self._cp_mesh.get_group() if self._cp_mesh.size() > 1 else None

    @property
    def teacher_group(self) -> dist.ProcessGroup | None:
        """Return the ranks that compute the teacher's micro-batches together; None if this is only one rank."""
        assert self.mesh is not None, "build_mesh comes first"
        return self._teacher_mesh.get_group() if self._teacher_size > 1 else None

    @property
    def layout(self) -> Layout:
        """Return this rank's data-, context- and tensor-parallel rank numbers, and the sizes of these axes."""
        tp, cp = self._axes("tp"), self._cp_mesh
        group = cp.size() * tp.size()
        return Layout(
            dp_rank=self.rank // group,
            dp_size=self.size // group,
            cp_rank=cp.get_local_rank(),
            cp_size=cp.size(),
            tp_rank=tp.get_local_rank(),
            tp_size=tp.size(),
            teacher_size=self._teacher_size,
        )

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order of rank; collective."""
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values  # type: ignore[return-value]

    def broadcast(self, value: T) -> T:
        """Return the main rank's value on every rank; collective."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def barrier(self) -> None:
        """Wait until every rank has called this method; collective."""
        dist.barrier(group=self.control)

    @contextmanager
    def all_or_none(self, action: str) -> Iterator[None]:
        """Run the ``with`` block; if it fails on any rank, raise an error on all ranks; collective.

        The block must not contain a collective. A rank whose block raises an error other than UserError raises this
        error. All other ranks raise CollectiveUserError, which repeats the UserError of the lowest rank that has one.
        If no rank has a UserError, they raise RuntimeError instead. ``action`` describes the block, such as
        "reading the data"; it is part of the RuntimeError's message and the name of this rank's phase meanwhile.
        """
        error: Exception | None = None
        with progress.phase(action):
            try:
                yield
            except Exception as caught:  # of any type: other ranks wait in the gather below
                error = caught
            errors = self.gather(None if error is None else _fields(error))
        failed = [(rank, fields) for rank, fields in enumerate(errors) if fields is not None]
        if not failed:
            return
        if error is not None and not isinstance(error, UserError):
            raise error
        for _, (is_user_error, fields) in failed:
            if is_user_error:
                raise CollectiveUserError(*fields) from error
        rank, (_, fields) = failed[0]
        raise RuntimeError(f"rank {rank} failed while {action}: {fields[0]}")

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the ``with`` block on the first rank of each node before the node's other ranks; collective.

        A download or the build of a cache then happens once per node. ``runtime.phase_timeout_s`` does not apply to
        the block.
        """
        with progress.untimed():
            if self.local_rank != 0:
                self.barrier()
            try:
                yield
            finally:
                if self.local_rank == 0:
                    self.barrier()

    def close(self) -> None:
        """Wait for all ranks, then destroy the process groups; collective."""
        if dist.is_initialized():
            self.shutdown_barrier()
            dist.destroy_process_group()
        self.supervisor.stop_watchdog()

    def shutdown_barrier(self) -> None:
        """Wait for all ranks and stop the watchdogs of all ranks; the last collective of a run.

        Afterwards ranks may exit at different times without being reported as failed.
        """
        self.barrier()
        self.supervisor.stop_watchdog()
        try:  # every watchdog must have stopped before the first rank exits, or it would report a dead rank
            dist.monitored_barrier(group=self.control, timeout=_SHUTDOWN_TIMEOUT)
        except (dist.DistError, RuntimeError) as error:
            log.warning(
                "the barrier at the end of the run failed, perhaps because another rank exited early (%s)",
                str(error).splitlines()[0],
            )


def _fields(error: Exception) -> tuple[bool, tuple[str, str, str, str | None]]:
    """Return whether ``error`` is a UserError, and its (problem, fix, key, value) as text.

    If it is not a UserError, ``problem`` is its message, and the remaining values are empty.
    """
    if isinstance(error, UserError):
        return True, (error.problem, error.fix, error.key, None if error.value is None else show(error.value))
    return False, (f"{error}" or repr(error), "", "", None)
