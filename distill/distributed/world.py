"""The ranks of a run: who they are, their mesh, how they agree, where their logs go."""

from __future__ import annotations

import datetime
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distill.distributed import slurm
from distill.distributed.rendezvous import Rendezvous
from distill.errors import CollectiveUserError, UserError
from distill.supervise import progress
from distill.supervise.supervisor import Supervisor
from distill.types import Layout

__all__ = ["CONTROL_TIMEOUT", "World"]
log = logging.getLogger(__name__)
T = TypeVar("T")

_TIMEOUT = datetime.timedelta(minutes=30)
_PARTING = datetime.timedelta(minutes=1)
CONTROL_TIMEOUT = datetime.timedelta(days=7)
"""Ranks wait here for others that may have far more to do: the watch knows who stands still, a timeout doesn't."""


class World:
    """All ranks of the run, seen from one of them.

    Made by every rank at the same point; torchrun's, Slurm's or no variables at all (a world of one) are understood.
    ``control`` is for small objects and agreements, so that they never mix with the collectives of the models on NCCL.
    ``supervisor``: of this rank; without one there is no signal handling and no watchdog. Raises RendezvousError and
    UserError as Rendezvous does.
    """

    def __init__(self, timeout: datetime.timedelta = _TIMEOUT, supervisor: Supervisor | None = None) -> None:
        os.environ.update(slurm.torch_environment())
        cuda = torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if cuda:
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
        meeting = Rendezvous()
        if supervisor is None:
            meeting.meet()
        else:  # from the meeting on: a machine may be lost at any time
            supervisor.watch(meeting.store, meeting.rank, meeting.size, meeting.meet)
        meeting.connect(backend, timeout)
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
        """The gloo group of all ranks. Raises RuntimeError once the process groups are gone."""
        if not dist.is_initialized():
            raise RuntimeError("the process groups are gone: vLLM's engine takes them along, so it is closed last")
        group: dist.ProcessGroup = self._control
        return group

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for all: the console, TensorBoard and the files of the run are its work."""
        return self.rank == 0

    def check_cluster(self, num_nodes: int, gpus_per_node: int, device: str, tp: int, cp: int) -> None:
        """Check the recipe's cluster, device and group sizes against what was started; raises UserError."""
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("runtime.device=cuda but torch sees no CUDA device: set runtime.device=auto or cpu")
        if num_nodes * gpus_per_node != self.size:
            raise UserError(
                f"cluster.num_nodes={num_nodes} x cluster.gpus_per_node={gpus_per_node} asks for"
                f" {num_nodes * gpus_per_node} ranks but {self.size} were started: set the two keys to the allocation,"
                f" or start {gpus_per_node} ranks on each of {num_nodes} nodes"
            )
        if slurm.nodes_of_step() > num_nodes:
            raise UserError(
                f"cluster.num_nodes={num_nodes} but this Slurm step runs on {slurm.nodes_of_step()} nodes, each with a"
                " world of its own: give torchrun --nnodes and --rdzv-endpoint, and set the key to the allocation"
            )
        if self.local_size != gpus_per_node:
            raise UserError(
                f"cluster.gpus_per_node={gpus_per_node} but this node runs {self.local_size} ranks:"
                " start one rank a GPU (torchrun --nproc-per-node) or set the key to that number"
            )
        if self.size % (tp * cp):
            raise UserError(
                f"policy.dtensor_cfg.tensor_parallel_size={tp} x context_parallel_size={cp} does not divide the"
                f" {self.size} ranks: choose sizes whose product divides {self.size}"
            )

    def build_mesh(self, device: str, tp: int, cp: int, replicas: int = 1, teacher: int = 1) -> None:
        """Lay out the mesh (replica, shard, tp), tp innermost, on ``device`` (auto, cpu or cuda); every rank calls it.

        A shard's rank is (dp, cp). Axes that are not used have size 1. ``replicas``: how many groups of ranks hold a
        whole sharded model each. ``teacher``: consecutive ranks that read the teacher's packs together, at least
        cp * tp. ``check_cluster`` comes first.
        """
        use_cuda = device != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")
        shards = self.size // (replicas * tp)
        self.mesh = init_device_mesh(
            self.device.type, (replicas, shards, tp), mesh_dim_names=("replica", "shard", "tp")
        )
        # Who reads together is another matter than who holds which shard, so these groups have meshes of their own.
        reading = (self.size // (cp * tp), cp, tp)
        self._cp_mesh = init_device_mesh(self.device.type, reading, mesh_dim_names=("dp", "cp", "tp"))["cp"]
        self._teacher_size = max(teacher, cp * tp)
        groups = (self.size // self._teacher_size, self._teacher_size)
        self._teacher_mesh = init_device_mesh(self.device.type, groups, mesh_dim_names=("groups", "teacher"))

    def _axes(self, *names: str) -> DeviceMesh:
        assert self.mesh is not None, "build_mesh comes first"
        mesh: DeviceMesh = self.mesh[names] if len(names) > 1 else self.mesh[names[0]]
        return mesh

    @property
    def shard_mesh(self) -> DeviceMesh:
        """The mesh that FSDP shards the student over, all of dp and cp, after the replicas where there are any."""
        return self._axes("shard") if self._axes("replica").size() == 1 else self._axes("replica", "shard")

    @property
    def replica_mesh(self) -> DeviceMesh:
        """The one-dimensional mesh of the ranks that hold one whole model between them: shard and tp flattened."""
        mesh: DeviceMesh = self._axes("shard", "tp")._flatten("shard_tp")
        return mesh

    @property
    def tp_mesh(self) -> DeviceMesh:
        """The mesh of the ranks that share each layer's matrices."""
        return self._axes("tp")

    @property
    def cp_group(self) -> dist.ProcessGroup | None:
        """The ranks that share a micro-batch's positions; None where each reads its own."""
        assert self.mesh is not None, "build_mesh comes first"
        return self._cp_mesh.get_group() if self._cp_mesh.size() > 1 else None

    @property
    def teacher_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the positions of the teacher's packs; None where each reads its own."""
        assert self.mesh is not None, "build_mesh comes first"
        return self._teacher_mesh.get_group("teacher") if self._teacher_size > 1 else None

    @property
    def layout(self) -> Layout:
        """This rank's place among those that train."""
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
        """The values of all ranks, in order of rank; collective."""
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values  # type: ignore[return-value]

    def broadcast(self, value: T) -> T:
        """The main rank's value, on every rank; collective."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier(group=self.control)

    @contextmanager
    def all_or_none(self, doing: str) -> Iterator[None]:
        """Do something that may fail on one rank and not on another; all ranks go on, or all raise.

        Every rank enters it with the same block, in which no collective runs. A UserError of any rank is raised on
        all as CollectiveUserError, the lowest rank's; any other error where it happened and as RuntimeError elsewhere.
        """
        error: Exception | None = None
        with progress.phase(doing):
            try:
                yield
            except Exception as caught:  # every kind must reach the other ranks before anyone leaves
                error = caught
            kinds = self.gather(None if error is None else (isinstance(error, UserError), f"{error}" or repr(error)))
        failed = [(rank, kind) for rank, kind in enumerate(kinds) if kind is not None]
        if not failed:
            return
        if error is not None and not isinstance(error, UserError):
            raise error
        for _, (is_users, message) in failed:
            if is_users:
                raise CollectiveUserError(message) from error
        rank, (_, message) = failed[0]
        raise RuntimeError(f"rank {rank} failed while {doing}: {message}")

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The first rank of each node runs the block before its neighbours: one download, one build of a cache.

        It may take as long as it likes.
        """
        with progress.phase("one rank a node first", timed=False):
            if self.local_rank != 0:
                self.barrier()
            try:
                yield
            finally:
                if self.local_rank == 0:
                    self.barrier()

    def log_to(self, run_dir: Path) -> None:
        """Write this rank's log to ``run_dir/logs/rank_NNNNN.log`` from now on; the main one's stays on the console."""
        folder = run_dir / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"rank_{self.rank:05d}.log"
        self.supervisor.stacks_to = file
        handler = _RankLog(file, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger = logging.getLogger("distill")
        kept = [h for h in logger.handlers if isinstance(h, MemoryHandler)]
        logger.addHandler(handler)
        for early in kept:
            logger.removeHandler(early)  # first: what a full disk makes the log say must not come back to it
            early.setTarget(handler)
            early.close()

    def close(self) -> None:
        """Leave together: wait for all ranks, then end the process groups."""
        if dist.is_initialized():
            self.part()
            dist.destroy_process_group()
        self.supervisor.stop_watching()

    def part(self) -> None:
        """The ranks have done all that they do together, and may end one by one from here on; collective."""
        self.barrier()
        self.supervisor.stop_watching()
        try:  # nobody's end is to be seen by one who still watches
            dist.monitored_barrier(group=self.control, timeout=_PARTING)
        except (dist.DistError, RuntimeError) as error:
            log.warning("the ranks parted early (%s)", str(error).splitlines()[0])


class _RankLog(logging.FileHandler):
    """A rank's file. A disk that refuses ends it with one sentence on the console, not with a traceback a line."""

    refused = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.refused:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self.refused = True
        logger = logging.getLogger("distill")
        logger.removeHandler(self)
        logger.warning("%s can't be written (%s): the rest of this log is lost", self.baseFilename, error.strerror)
