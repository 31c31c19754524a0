"""Start the processes of a group of parts, follow their events, and end them; never any other process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.accept.results import last_error
from scripts.accept.settings import Order
from scripts.launch import ENVIRONMENT, ROOT

_LAUNCHERS = ("SLURM_", "PMI", "PET_", "TORCHELASTIC_", "GROUP_", "ROLE_", "DISTILL_")
"""Prefixes of variables that launchers set; the parts' processes get only their own rank variables."""
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_DUMP_S = 1.0
"""Seconds to write tracebacks before a process is killed."""
_KILL_S = 10.0
"""Seconds to wait for the end of a killed process."""


@dataclass(frozen=True)
class Place:
    """Position of this command among the commands of all nodes, which run the same parts in the same order."""

    nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    """Address of the first node."""
    port: int = 0
    """First of the ports of the rendezvous on the first node; 0: any free port, on a single node."""

    @staticmethod
    def of(environment: Mapping[str, str]) -> Place:
        """Return the position that torchrun or Slurm has set; one command per node. Raises ValueError otherwise."""
        names = environment
        if "RANK" not in names and "SLURM_STEP_NUM_TASKS" in names:  # srun
            size, rank = int(names["SLURM_STEP_NUM_TASKS"]), int(names["SLURM_PROCID"])
            if size != int(names["SLURM_STEP_NUM_NODES"]):
                raise ValueError("start one task per node: srun --ntasks-per-node=1 python -m scripts.accept")
        else:
            size, rank = int(names.get("WORLD_SIZE", "1")), int(names.get("RANK", "0"))
        if size == 1:
            return Place()
        if int(names.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise ValueError("start one process per node: torchrun --nproc-per-node 1 -m scripts.accept")
        if "MASTER_ADDR" not in names or "MASTER_PORT" not in names:
            raise ValueError("set MASTER_ADDR and MASTER_PORT to an address and a port of the first node")
        # torchrun listens on its own port.
        return Place(size, rank, names["MASTER_ADDR"], int(names["MASTER_PORT"]) + 1)

    def ports(self, offset: int, count: int) -> list[int]:
        """Return ``count`` ports of the first node; ``offset``: distance from the first port, if it is fixed."""
        if self.port:
            return [self.port + offset + i for i in range(count)]
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
            return [int(found.getsockname()[1]) for found in sockets]


def child_environment(scratch: Path, on_gpu: bool) -> dict[str, str]:
    """Return the environment of the parts' processes: no network, one thread per process.

    On GPUs the caches of compiled code are new folders in ``scratch``, unless the user has set their variables, so that
    vLLM's first start is one without a cache. On a CPU they stay where they are, because compiling takes a minute.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_LAUNCHERS) and name not in _RANK_VARIABLES
    }
    names = ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR") if on_gpu else ()
    caches = {name: str(scratch / name.lower()) for name in names}
    # Every part starts processes, so compiled modules are kept; compiling vLLM's modules takes a minute.
    own = {
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    return {**ENVIRONMENT, "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", **caches, **kept, **own}


@dataclass
class Ranks:
    """Processes of one group on this node. Use it as a context manager: at the end no process of it remains."""

    order: Order
    folder: Path
    """Receives the order, the events and one log per rank."""
    place: Place
    local_size: int
    distributed: bool
    """Whether the processes of all nodes form one world; otherwise the only process has no rank."""
    environment: dict[str, str]
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _read: int = 0

    def __enter__(self) -> Ranks:
        path = self.folder / "order.json"
        self.order.write(path)
        try:
            self._start(path)
        except BaseException:  # a stop signal, or no memory for another process
            self.kill()
            raise
        return self

    def _start(self, path: Path) -> None:
        for local in range(self.local_size):
            rank = self.place.node * self.local_size + local if self.distributed else 0
            own = self._rank_variables(rank, local) if self.distributed else {}
            with (self.folder / f"rank_{rank}.log").open("ab") as log:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "scripts.accept.worker", str(path)],
                        cwd=ROOT,
                        env={**self.environment, **own},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,  # so that its child processes can be killed with it
                    )
                )

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _rank_variables(self, rank: int, local: int) -> dict[str, str]:
        values = (rank, self.place.nodes * self.local_size, local, self.local_size, self.place.address)
        return dict(zip(_RANK_VARIABLES, map(str, (*values, self.order.ports[0])), strict=True))

    @property
    def first(self) -> int:
        """Return the lowest rank of this node, which reports the checks."""
        return self.place.node * self.local_size if self.distributed else 0

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the new events of the first rank of this node."""
        for event in self._events_of(self.first)[self._read :]:
            self._read += 1
            yield event

    def _events_of(self, rank: int) -> list[dict[str, Any]]:
        path = Path(f"{self.order.events}.{rank}.jsonl")
        complete = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
        return [json.loads(line) for line in complete.splitlines()]

    def running(self) -> bool:
        """Return whether all processes run, or have ended with exit code 0."""
        return any(p.poll() is None for p in self._processes) and not any(p.poll() for p in self._processes)

    def failure(self) -> str:
        """Return why the processes ended early: the error that a rank reported, or exit code and last line of a log."""
        for local in range(self.local_size):
            for event in self._events_of(self.first + local)[-1:]:
                if event["event"] == "end" and event["status"] == "FAILED":
                    return f"{event['reason']} ({self.log(local)})"
        for local, process in enumerate(self._processes):
            if code := process.poll():
                text = self.log(local).read_text(encoding="utf-8", errors="replace")
                cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                return f"{cause}: {last_error(text)} ({self.log(local)})"
        return "a process ended before it reported the end of the part"

    def log(self, local: int) -> Path:
        """Return the log of the rank with this index on this node."""
        return self.folder / f"rank_{self.first + local}.log"

    def wait(self, seconds: float) -> None:
        """Wait until all processes have ended, at most ``seconds``."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in self._processes:
                process.wait(max(0.0, deadline - time.monotonic()))

    def dump(self) -> None:
        """Write the tracebacks of all processes to their logs."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGUSR1)
        time.sleep(_DUMP_S)

    def kill(self) -> None:
        """Kill the processes and their child processes, and wait for the processes."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for a driver cannot be killed
                process.wait(_KILL_S)
        self._processes = []


def log_folder(out: Path, group: str, used: Sequence[str]) -> Path:
    """Create and return a new folder for the logs of a group's start."""
    starts = sum(name == group for name in used)
    folder = out / "logs" / (group if not starts else f"{group}_{starts + 1}")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    return folder
