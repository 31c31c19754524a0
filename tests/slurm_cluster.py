"""A Slurm cluster of three nodes on this machine, with its own configuration, ports, keys and daemons."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from scripts.launch import ENVIRONMENT, ROOT
from tests.helpers import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
NODES = ("node1", "node2", "node3")
_NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 Gres=gpu:1 State=UNKNOWN"
_TIMEOUT_S = 240.0
"""Seconds to wait for any event; long, because the machine may be busy."""

CONFIG = """
ClusterName=distill
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=20
MinJobAge=3600
ReturnToService=2
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
"""Node names cannot be resolved, a requeued job waits slightly longer than ``cred_expire``, GPUs are only counted."""


def missing_programs() -> list[str]:
    """Return the required programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


class Cluster:
    """A cluster with its daemons. Call ``stop`` also if ``start`` fails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "PET_"))}
        own = {
            "PATH": _PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
        }
        self.environment = {**names, **ENVIRONMENT, **own}
        self.root = folder / "repository"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Write the configuration and start every daemon; returns when all nodes are up."""
        for name in ("state", "repository", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        for name in ("distill", "scripts", "recipes"):
            (self.root / name).symlink_to(ROOT / name)
        host = socket.gethostname()
        config = CONFIG.format(
            host=host,
            port=free_port(),
            nodes="\n".join(_NODE.format(name=node, host=host, port=free_port()) for node in NODES),
            first_job=10_000 + os.getpid(),  # jobs of another cluster on this machine get other numbers and ports
            user=getpass.getuser(),
            folder=self.folder,
        )
        (self.folder / "slurm.conf").write_text(config)
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        (self.folder / "munge.key").touch(0o600)
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._start_daemon(
            "munged", "--foreground", "--force", *(f"--{k}={self.folder}/munge.{v}" for k, v in files.items())
        )
        self.until("munge's socket", (self.folder / "munge.socket").exists)
        self._start_daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Start the slurmd of ``node`` and wait until jobs can use it."""
        self._start_daemon("slurmd", "-D", "-N", node, name=node)
        up = {"idle", "mixed", "allocated"}  # a waiting job may occupy it immediately
        self.until(f"{node} to be up", lambda: self._output_of("sinfo", "-h", "-n", node, "-o", "%T") in up)

    def kill_node(self, node: str) -> None:
        """Kill the slurmd of ``node`` and all job processes on it, as a power failure does."""
        tasks = self._processes(SLURMD_NODENAME=node, SLURM_CONF=self.environment["SLURM_CONF"])
        parents = {_parent(pid) for pid in tasks} - set(tasks)
        stepds = [pid for pid in parents if b"slurmstepd" in _read(pid, "cmdline")]
        daemon = self._daemons.pop(node)
        for pid in [daemon.pid, *stepds, *tasks]:
            _kill(pid)
        daemon.wait()

    def stop(self) -> None:
        """End all jobs, the daemons, and then remaining processes of the jobs."""
        if "slurmctld" in self._daemons:
            self._output_of("scancel", "--user", getpass.getuser())
            with contextlib.suppress(TimeoutError):
                self.until("the jobs to end", lambda: not self._output_of("squeue", "-h", "-o", "%i", "-t", "R,CG"), 40)
        for name in reversed(self._daemons):
            self._daemons[name].terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        self._daemons.clear()
        for pid in self.leftovers():
            _kill(pid)

    def leftovers(self) -> dict[int, bytes]:
        """Return the job processes that still exist: process id -> command line."""
        found = self._processes(SLURM_CONF=self.environment["SLURM_CONF"])
        return {pid: _read(pid, "cmdline").replace(b"\0", b" ") for pid in found}

    def submit(self, *arguments: str, **environment: str) -> int:
        """Run ``sbatch`` in a copy of the repository's root; return the job's number."""
        found = self.run("sbatch", "--parsable", *arguments, **environment)
        assert found.returncode == 0, found.stderr
        return int(found.stdout)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the copy of the repository's root."""
        return subprocess.run(
            command,
            cwd=self.root,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
        )

    def job(self, job: int) -> dict[str, str]:
        """Return Slurm's description of a job: JobState, ExitCode, Restarts and more."""
        words = self._output_of("scontrol", "show", "job", "-o", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def output(self, job: int) -> str:
        """Return the output of the job so far."""
        with contextlib.suppress(FileNotFoundError):
            return (self.root / f"distill-{job}.out").read_text()
        return ""

    def ended(self, job: int) -> dict[str, str]:
        """Wait until the job has ended and is not requeued; return Slurm's description of it."""
        alive = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"}
        self.until(f"job {job} to end", lambda: self.job(job).get("JobState", "PENDING") not in alive, job=job)
        return self.job(job)

    def until(self, what: str, holds: Callable[[], bool], seconds: float = _TIMEOUT_S, job: int | None = None) -> None:
        """Wait until ``holds()`` is true; raises TimeoutError with the output of ``job``."""
        end = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > end:
                output = "" if job is None else f"\n{self.job(job)}\n{self.output(job)}"
                raise TimeoutError(f"waited {seconds:.0f} s for {what}{output}")
            time.sleep(0.1)

    def _start_daemon(self, program: str, *arguments: str, name: str = "") -> None:
        path = shutil.which(program, path=_PATH)
        assert path is not None, program
        with (self.folder / f"{name or program}.out").open("ab") as out:
            self._daemons[name or program] = subprocess.Popen(
                [path, *arguments], env=self.environment, stdout=out, stderr=out, start_new_session=True
            )

    def _output_of(self, *command: str) -> str:
        return self.run(*command).stdout.strip()

    def _processes(self, **variables: str) -> list[int]:
        """Return processes with these environment variables, except this one, the daemons and their children."""
        own = {os.getpid(), *(daemon.pid for daemon in self._daemons.values())}
        found = [pid for pid, names in _environments() if variables.items() <= names.items()]
        return [pid for pid in found if pid not in own and _parent(pid) not in own]


def _environments() -> Iterator[tuple[int, Mapping[str, str]]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            words = _read(int(entry.name), "environ").decode(errors="replace").split("\0")
            yield int(entry.name), dict(word.split("=", 1) for word in words if "=" in word)


def _read(pid: int, name: str) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""


def _parent(pid: int) -> int:
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if fields else 0


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
