"""A Slurm of three nodes on this machine: its own configuration, ports, keys and daemons, ended by process id."""

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
_PATIENCE_S = 240.0
"""The longest that anything here may take: a busy machine is slow, a broken one never ends."""

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
"""Names of nodes don't resolve, a requeued job waits little longer than ``cred_expire``, and GPUs are only counted."""


def missing_programs() -> list[str]:
    """What of Slurm isn't installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


class Cluster:
    """The cluster; ``start`` it, and ``stop`` it whatever happens."""

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
            first_job=10_000 + os.getpid(),  # other jobs than another such cluster's, and so other ports
            user=getpass.getuser(),
            folder=self.folder,
        )
        (self.folder / "slurm.conf").write_text(config)
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        (self.folder / "munge.key").touch(0o600)
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon("munged", "--foreground", "--force", *(f"--{k}={self.folder}/munge.{v}" for k, v in files.items()))
        self.until("munge's socket", (self.folder / "munge.socket").exists)
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Start the slurmd of ``node`` and wait until jobs can use it."""
        self._daemon("slurmd", "-D", "-N", node, name=node)
        useful = {"idle", "mixed", "allocated"}  # a job may be waiting for it
        self.until(f"{node} to be up", lambda: self._ask("sinfo", "-h", "-n", node, "-o", "%T") in useful)

    def kill_node(self, node: str) -> None:
        """End ``node`` as a power cut does: its slurmd, and everything of the jobs on it."""
        tasks = self._processes(SLURMD_NODENAME=node, SLURM_CONF=self.environment["SLURM_CONF"])
        parents = {_parent(pid) for pid in tasks} - set(tasks)
        keepers = [pid for pid in parents if b"slurmstepd" in _read(pid, "cmdline")]
        daemon = self._daemons.pop(node)
        for pid in [daemon.pid, *keepers, *tasks]:
            _kill(pid)
        daemon.wait()

    def stop(self) -> None:
        """End all jobs, then the daemons, then whatever is left of the jobs."""
        if "slurmctld" in self._daemons:
            self._ask("scancel", "--user", getpass.getuser())
            with contextlib.suppress(TimeoutError):
                self.until("the jobs to end", lambda: not self._ask("squeue", "-h", "-o", "%i", "-t", "R,CG"), 40)
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
        """Processes that any job left behind, and their command lines."""
        found = self._processes(SLURM_CONF=self.environment["SLURM_CONF"])
        return {pid: _read(pid, "cmdline").replace(b"\0", b" ") for pid in found}

    def submit(self, *arguments: str, **environment: str) -> int:
        """``sbatch`` from the root of a repository that has the same files; returns the job's number."""
        answer = self.run("sbatch", "--parsable", *arguments, **environment)
        assert answer.returncode == 0, answer.stderr
        return int(answer.stdout)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command from there."""
        return subprocess.run(
            command,
            cwd=self.root,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=_PATIENCE_S,
        )

    def job(self, job: int) -> dict[str, str]:
        """What Slurm says of a job: JobState, ExitCode, Restarts and the rest."""
        words = self._ask("scontrol", "show", "job", "-o", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def output(self, job: int) -> str:
        """What the job has printed so far."""
        with contextlib.suppress(FileNotFoundError):
            return (self.root / f"distill-{job}.out").read_text()
        return ""

    def ended(self, job: int) -> dict[str, str]:
        """Wait until the job has ended for good, and return what Slurm says of it."""
        alive = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"}
        self.until(f"job {job} to end", lambda: self.job(job).get("JobState", "PENDING") not in alive, job=job)
        return self.job(job)

    def until(self, what: str, holds: Callable[[], bool], seconds: float = _PATIENCE_S, job: int | None = None) -> None:
        """Wait until ``holds``; raises TimeoutError, with what ``job`` printed."""
        end = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > end:
                said = "" if job is None else f"\n{self.job(job)}\n{self.output(job)}"
                raise TimeoutError(f"waited {seconds:.0f} s for {what}{said}")
            time.sleep(0.1)

    def _daemon(self, program: str, *arguments: str, name: str = "") -> None:
        path = shutil.which(program, path=_PATH)
        assert path is not None, program
        with (self.folder / f"{name or program}.out").open("ab") as out:
            self._daemons[name or program] = subprocess.Popen(
                [path, *arguments], env=self.environment, stdout=out, stderr=out, start_new_session=True
            )

    def _ask(self, *command: str) -> str:
        return self.run(*command).stdout.strip()

    def _processes(self, **variables: str) -> list[int]:
        """Processes with these variables in their environment, but for the daemons and their children, and this one."""
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
