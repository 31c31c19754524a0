"""Slurm's variables: what srun tells a task of its place in the world."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess

from distill.errors import UserError

_PORT_BASE, _PORT_SPAN = 20000, 12000
"""Below the ports that Linux gives to any connection (from 32768 on): one of those may be taken."""
START = "DISTILL_START"
"""The variable that names a start of ``srun python -m distill.train``, the same on all its ranks and on no others."""
PORTS_OF_JOB = 31
"""So many are no other job's whose number is near."""


def torch_environment() -> dict[str, str]:
    """The variables that torch.distributed reads, and START, from those of ``srun python -m distill.train`` (one task a
    GPU).

    Empty where torchrun has set them already, or where there is no step of more than one task (a lone process needs
    no rendezvous). The address is the step's first node; the port comes from job and step, so that two jobs on one
    node don't clash. What MASTER_ADDR and MASTER_PORT say goes before. Raises UserError for variables that tell no
    place.
    """
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ:
        return {}
    size = _number("SLURM_NTASKS", "1", least=1)
    if size == 1:
        return {}
    tasks_per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE", "")
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    tasks = tasks_of_node(tasks_per_node, _number("SLURM_NODEID", "0"))
    return {
        "RANK": str(_number("SLURM_PROCID", below=size)),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(_number("SLURM_LOCALID", below=tasks)),
        "LOCAL_WORLD_SIZE": str(tasks),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or address_of(first_host(nodes)),
        "MASTER_PORT": os.environ.get("MASTER_PORT")
        or str(port(_number("SLURM_JOB_ID", "0"), _number("SLURM_STEP_ID", "0") + 1)),
        START: ".".join(os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")),
    }


def _number(name: str, default: str = "", least: int = 0, below: int | None = None) -> int:
    text = os.environ.get(name, default)
    if text.isdecimal() and least <= int(text) and (below is None or int(text) < below):
        return int(text)
    wanted = f"at least {least}" if below is None else f"in {least}..{below - 1}"
    raise UserError(f"Slurm's variable {name}={text} is no whole number {wanted}: start by srun, or unset it")


def job_id() -> int:
    """The number of the job that this process runs in, the same after a requeue."""
    return int(os.environ["SLURM_JOB_ID"])


def start_of_job() -> tuple[int, int] | None:
    """The job that this process runs in, and how often it was requeued before; None outside of Slurm."""
    job, restarts = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")
    return (int(job), int(restarts)) if job.isdecimal() and restarts.isdecimal() else None


def job_nodes() -> str:
    """The nodes of the job, as Slurm lists them."""
    return os.environ["SLURM_JOB_NODELIST"]


def allocation() -> tuple[int, int | None]:
    """Nodes of the job, and GPUs of its first node; None where Slurm counts none."""
    gpus = os.environ.get("SLURM_GPUS_ON_NODE")
    return int(os.environ.get("SLURM_JOB_NUM_NODES") or os.environ["SLURM_NNODES"]), int(gpus) if gpus else None


def port(job: int, step: int = 0) -> int:
    """A port for the rendezvous of a job, or of one of its steps: jobs that run side by side have different ones."""
    return _PORT_BASE + (job * PORTS_OF_JOB + step) % _PORT_SPAN


def address_of(node: str) -> str:
    """The node's name, or where that can't be resolved the address that Slurm reaches it by."""
    if not resolves(node) and (scontrol := shutil.which("scontrol")):
        shown = subprocess.run([scontrol, "show", "node", node], capture_output=True, text=True, check=False)
        if found := re.search(r"NodeAddr=(\S+)", shown.stdout):
            return found.group(1)
    return node


def resolves(host: str) -> bool:
    """Whether this machine knows the address of that name."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def nodes_of_step() -> int:
    """Nodes of the Slurm step that this process is a task of; 1 outside of Slurm."""
    return _number("SLURM_STEP_NUM_NODES", "1", least=1)


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: ``jwb[0012-0014,0020],x1`` -> ``jwb0012``. UserError where there is none."""
    match = re.match(r"([^\[,]+)(?:\[([^\]]+)\])?", nodes)
    if match is None:
        raise UserError(f"Slurm's variable SLURM_JOB_NODELIST={nodes} names no node: start by srun, or unset it")
    prefix, ranges = match.groups()
    return prefix + re.split(r"[,-]", ranges)[0] if ranges else prefix


def tasks_of_node(tasks_per_node: str, node: int) -> int:
    """Tasks on node ``node`` of a list such as ``4(x2),3``: two nodes of four, then one of three.

    Raises UserError for another list.
    """
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(
                f"Slurm's variable SLURM_TASKS_PER_NODE={tasks_per_node} is no list such as 4(x2),3: start by srun, or"
                " unset SLURM_PROCID"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[min(node, len(counts) - 1)]
