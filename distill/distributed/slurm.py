"""Read Slurm's environment variables: rank and rendezvous of a task, nodes and GPUs of a job."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess

from distill.distributed.variables import integer
from distill.errors import UserError

_PORT_BASE, _PORT_SPAN = 20000, 12000
"""First port, and number of ports, of the range that is used for the rendezvous.

All ports are below 32768, because Linux uses higher ports for outgoing connections.
"""
LAUNCH_ID = "DISTILL_LAUNCH_ID"
"""Name of the environment variable with the id of an ``srun`` launch; its value is equal on all ranks."""
PORTS_PER_JOB = 31
"""Number of consecutive ports per Slurm job ID, so that jobs with nearby IDs use different ports."""
_FIX = "start the program with srun, or unset the variable"


def torch_environment() -> dict[str, str]:
    """Return the environment variables that ``srun python -m distill.train`` needs but Slurm does not set.

    The dict maps the variables of torch.distributed, and LAUNCH_ID, to their values. It is empty outside of Slurm, if
    the Slurm step has only one task, or if RANK is already set (as by torchrun). srun must start one task per GPU.

    MASTER_ADDR and MASTER_PORT keep their values if they are already set. Otherwise MASTER_ADDR is the step's first
    node, and MASTER_PORT depends on job and step, so that two jobs on one node use different ports. Raises UserError
    for invalid variables of Slurm.
    """
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ:
        return {}
    size = integer(os.environ, "SLURM_NTASKS", 1, default="1", fix=_FIX)
    if size == 1:
        return {}
    tasks_per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE", "")
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    tasks = tasks_of_node(tasks_per_node, integer(os.environ, "SLURM_NODEID", 0, default="0", fix=_FIX))
    return {
        "RANK": str(integer(os.environ, "SLURM_PROCID", 0, size - 1, fix=_FIX)),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(integer(os.environ, "SLURM_LOCALID", 0, tasks - 1, fix=_FIX)),
        "LOCAL_WORLD_SIZE": str(tasks),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or address_of(first_host(nodes)),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(_port_of_step()),
        LAUNCH_ID: ".".join(os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")),
    }


def _port_of_step() -> int:
    job = integer(os.environ, "SLURM_JOB_ID", 0, default="0", fix=_FIX)
    return port(job, integer(os.environ, "SLURM_STEP_ID", 0, default="0", fix=_FIX) + 1)


def job_id() -> int:
    """Return the Slurm job ID of this process, which stays the same after a requeue."""
    return int(os.environ["SLURM_JOB_ID"])


def start_of_job() -> tuple[int, int] | None:
    """Return the Slurm job ID and the number of times the job was requeued; None outside of Slurm."""
    job, restarts = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")
    return (int(job), int(restarts)) if job.isdecimal() and restarts.isdecimal() else None


def job_nodes() -> str:
    """Return the node list of the Slurm job, such as ``jwb[0012-0014,0020]``."""
    return os.environ["SLURM_JOB_NODELIST"]


def is_allocated() -> bool:
    """Return whether this process runs in a Slurm job whose number of nodes is known."""
    return start_of_job() is not None and bool({"SLURM_JOB_NUM_NODES", "SLURM_NNODES"} & os.environ.keys())


def allocation() -> tuple[int, int | None]:
    """Return the number of nodes of the Slurm job, and the number of the job's GPUs on this node.

    The number of GPUs is None if Slurm does not manage GPUs.
    """
    gpus = os.environ.get("SLURM_GPUS_ON_NODE")
    return int(os.environ.get("SLURM_JOB_NUM_NODES") or os.environ["SLURM_NNODES"]), int(gpus) if gpus else None


def gpu_variable() -> str | None:
    """Return the first of Slurm's variables that shows GPUs on this node, as "NAME=value"; None without GPUs."""
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if (value := os.environ.get(name, "")) and not (name == "SLURM_GPUS_ON_NODE" and value == "0"):
            return f"{name}={value}"
    return None


def port(job: int, step: int = 0) -> int:
    """Return the rendezvous port for the Slurm job ID ``job`` and the index ``step``.

    The srun step with Slurm step ID k uses index k + 1. Jobs with nearby IDs have different ports.
    """
    return _PORT_BASE + (job * PORTS_PER_JOB + step) % _PORT_SPAN


def address_of(node: str) -> str:
    """Return ``node`` if this host name can be resolved, else the node's address in Slurm's configuration.

    If Slurm has no address of the node either, return ``node``.
    """
    if not resolves(node) and (scontrol := shutil.which("scontrol")):
        shown = subprocess.run([scontrol, "show", "node", node], capture_output=True, text=True, check=False)
        if found := re.search(r"NodeAddr=(\S+)", shown.stdout):
            return found.group(1)
    return node


def resolves(host: str) -> bool:
    """Return whether this machine can resolve the name ``host``."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def nodes_of_step() -> int:
    """Return the number of nodes of this process's Slurm step; 1 outside of Slurm."""
    return integer(os.environ, "SLURM_STEP_NUM_NODES", 1, default="1", fix=_FIX)


def first_host(nodes: str) -> str:
    """Return the first name of a Slurm node list: ``jwb[0012-0014,0020],x1`` -> ``jwb0012``.

    Raises UserError for an invalid list.
    """
    match = re.match(r"([^\[,]+)(?:\[([^\]]+)\])?", nodes)
    if match is None:
        raise UserError(
            f"environment variable SLURM_JOB_NODELIST={nodes} contains no name of a node",
            _FIX,
            key="SLURM_JOB_NODELIST",
            value=nodes,
        )
    prefix, ranges = match.groups()
    return prefix + re.split(r"[,-]", ranges)[0] if ranges else prefix


def tasks_of_node(tasks_per_node: str, node: int) -> int:
    """Return the number of tasks on the node with index ``node`` from Slurm's list of tasks per node.

    The list ``4(x2),3`` means two nodes with 4 tasks each and one node with 3 tasks.

    Raises UserError for an invalid list.
    """
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(
                f"environment variable SLURM_TASKS_PER_NODE={tasks_per_node} is not a list such as 4(x2),3",
                "start the program with srun, or unset SLURM_PROCID",
                key="SLURM_TASKS_PER_NODE",
                value=tasks_per_node,
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[min(node, len(counts) - 1)]
