"""The ranks of a run: who they are, their mesh, how they agree, where their logs go."""

from __future__ import annotations

import datetime
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distill.runtime import place, slurm
from distill.runtime.guard import Guard, leave, log_to_console
from distill.runtime.launch import deny_others_writing, rank_by_launcher
from distill.runtime.rendezvous import AbsentError, Rendezvous
from distill.runtime.status import Ending, lost
from distill.types import Layout, UserError

__all__ = ["AgreedError", "AgreedFailure", "World", "guarded", "leave", "log_to_console", "new_run_dir"]
log = logging.getLogger(__name__)
T = TypeVar("T")

_TIMEOUT = datetime.timedelta(minutes=30)
_PARTING = datetime.timedelta(minutes=1)
CONTROL_TIMEOUT = datetime.timedelta(days=7)
"""Ranks wait here for others that may have far more to do: the watch knows who stands still, a timeout doesn't."""


class AgreedError(UserError):
    """A UserError that all ranks raise together, so that they can leave together."""


class AgreedFailure(RuntimeError):
    """What no user can put right beforehand, said in a sentence; raised by all ranks together.

    ``passes``: the same may go well when the run starts again.
    """

    def __init__(self, reason: str, passes: bool = False) -> None:
        super().__init__(reason)
        self.passes = passes


class World:
    """All ranks of the run, seen from one of them.

    Made by every rank at the same point; torchrun's, Slurm's or no variables at all (a world of one) are understood.
    ``control`` is for small objects and agreements, so that they never mix with the collectives of the models on NCCL.
    ``guard``: of this rank; where none is given, nobody listens to signals and nobody watches. Raises AbsentError and
    UserError as Rendezvous does.
    """

    def __init__(self, timeout: datetime.timedelta = _TIMEOUT, guard: Guard | None = None) -> None:
        os.environ.update(slurm.torch_environment())
        cuda = torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if cuda:
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
        meeting = Rendezvous()
        if guard is None:
            meeting.meet()
        else:  # from the meeting on: a machine may be lost at any time
            guard.watch(meeting.store, meeting.rank, meeting.size, meeting.meet)
        meeting.connect(backend, timeout)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(self.size)))
        self._control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        self.guard = guard or Guard(self.rank == 0)
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
    def main(self) -> bool:
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
    def agreed(self, doing: str) -> Iterator[None]:
        """Do something that may fail on one rank and not on another; all ranks go on, or all raise.

        Every rank enters it with the same block, in which no collective runs. A UserError of any rank is raised on
        all as AgreedError, the lowest rank's; any other error where it happened and as RuntimeError elsewhere.
        """
        error: Exception | None = None
        with place.doing(doing):
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
                raise AgreedError(message) from error
        rank, (_, message) = failed[0]
        raise RuntimeError(f"rank {rank} failed while {doing}: {message}")

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The first rank of each node runs the block before its neighbours: one download, one build of a cache.

        It may take as long as it likes.
        """
        with place.doing("one rank a node first", timed=False):
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
        self.guard.stacks_to = file
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
        self.guard.stop_watching()

    def part(self) -> None:
        """The ranks have done all that they do together, and may end one by one from here on; collective."""
        self.barrier()
        self.guard.stop_watching()
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


def guarded(program: Callable[[World | None], None], needs_world: bool) -> int:
    """Run a program in its world and turn how it ended into an exit code, the same on every rank.

    A UserError that all ranks agreed on is one sentence on the main rank's console and code 2, an AgreedFailure one and
    code 1. A UserError that this rank met alone is said by this rank, which leaves at once and takes the others along.
    Any other error keeps its traceback and does the same. Only the main rank prints. Ranks that don't come are waited
    for, but not for ever. From here on the process obeys signals as Guard says, and how it ended stands in the run's
    status.
    """
    deny_others_writing()
    try:
        main = rank_by_launcher() == 0
    except UserError as error:  # nobody knows who the main rank is
        _say(str(error))
        return 2
    log_to_console(main)
    if not needs_world:
        return _without_world(program)
    guard = Guard(main)
    guard.listen()
    try:
        world = World(guard=guard)
    except UserError as error:
        ending = Ending("refused", str(error), 2)
        if guard.watches:
            guard.wait_for_the_cause()
            of_others = error.__cause__ is not None and _lost_by(error.__cause__)
            guard.leave_alone(lost(str(error.__cause__)) if of_others else ending, _say)
        return _without_the_others(guard, ending)
    except AbsentError as error:
        return _without_the_others(guard, lost(str(error)), error.speaks)
    except Exception as error:
        traceback.print_exc()
        ending = Ending("failed", f"before the ranks were together: {error}", 1, _lost_by(error))
        if guard.watches:
            guard.wait_for_the_cause()
            guard.leave_alone(ending)
        return _without_the_others(guard, ending, speaks=False)
    alone = False
    try:
        with nullcontext() if main else redirect_stdout(io.StringIO()):
            program(world)
        ending = Ending("finished" if guard.stopped is None else "stopped", guard.stopped or "", 0)
    except UserError as error:
        ending, alone = Ending("refused", str(error), 2), world.size > 1 and not isinstance(error, AgreedError)
    except AgreedFailure as error:
        ending = Ending("failed", str(error), 1, error.passes)
    except Exception as error:
        ending = Ending("failed", f"rank {world.rank}: {type(error).__name__}: {error}", 1, _lost_by(error))
        if world.size == 1:
            guard.ends(ending)
            guard.close()
            raise
        if _comes_of_others(error):
            guard.wait_for_the_cause()
        # The interpreter's own end may wait for ranks that wait for this one.
        traceback.print_exc()
        guard.leave_alone(ending)
    if alone:
        guard.leave_alone(ending, _say)
    if ending.exit_code and main:
        _say(ending.reason)
    guard.ends(ending)
    world.close()
    guard.close()
    return ending.exit_code


def _without_the_others(guard: Guard, ending: Ending, speaks: bool = True) -> int:
    """The end of a rank that never had a world."""
    if speaks:
        _say(ending.reason)
    guard.ends(ending, alone=True)
    guard.close()
    return ending.exit_code


def _without_world(program: Callable[[None], None]) -> int:
    try:
        program(None)
    except UserError as error:
        _say(str(error))
        return 2
    return 0


def _say(reason: str) -> None:
    """One line on the console, whatever a path or a library's own words have in them."""
    print(f"error: {' '.join(reason.split())}", file=sys.stderr, flush=True)


def _comes_of_others(error: Exception) -> bool:
    """Whether an error is what a collective says when another rank is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "nccl" in str(error).lower()


_LOST = re.compile(
    r"connection (was )?(likely )?(closed|reset)|closed by peer|broken pipe|pair closure|(got|sent|of) 0 bytes"
    r"|remote process exit|ncclRemoteError|unhandled system error|no route to host|unreachable"
    r"|uncorrectable ECC|fallen off the bus",
    re.IGNORECASE,
)
"""What gloo, NCCL, torch's store and CUDA say of a rank, a machine or a device that is gone."""


def _lost_by(error: BaseException) -> bool:
    """Whether an error says that another rank, or this one's device, is gone; else the program may be to blame."""
    return _LOST.search(str(error)) is not None


def new_run_dir(log_dir: str, run_dir: str | None) -> Path:
    """The run's folder, made by the main rank: ``run_dir`` itself, or the first unused ``log_dir/exp_NNN``."""
    try:
        if run_dir is not None:
            path = Path(run_dir)
            path.mkdir(parents=True, exist_ok=True)
            return path
        taken = [int(p.name[4:]) for p in Path(log_dir).glob("exp_*") if p.name[4:].isdigit()]
        path = Path(log_dir) / f"exp_{max(taken, default=0) + 1:03d}"
        path.mkdir(parents=True)
        return path
    except OSError as error:
        key = "runtime.run_dir" if run_dir is not None else "logger.log_dir"
        raise UserError(
            f"{key}={run_dir or log_dir} can't be made ({error.strerror}): choose a writable folder"
        ) from error
