"""Slurm's variables: what srun tells a task of its place in the world."""

from __future__ import annotations

import os
import re

_PORT_BASE, _PORT_SPAN = 20000, 20000


def torch_environment() -> dict[str, str]:
    """The variables that torch.distributed reads, from those of ``srun python -m distill.train`` (one task a GPU).

    Empty where torchrun has set them already, or where there is no step of more than one task (a lone process needs
    no rendezvous). The address is the step's first node; the port comes from job and step, so that two jobs on one
    node don't clash.
    """
    if "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) <= 1 or "SLURM_PROCID" not in os.environ:
        return {}
    tasks_per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ["SLURM_TASKS_PER_NODE"]
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    job = int(os.environ.get("SLURM_JOB_ID", "0")) * 31 + int(os.environ.get("SLURM_STEP_ID", "0"))
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_NTASKS"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_of_node(tasks_per_node, int(os.environ.get("SLURM_NODEID", "0")))),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(_PORT_BASE + job % _PORT_SPAN),
    }


def nodes_of_step() -> int:
    """Nodes of the Slurm step that this process is a task of; 1 outside of Slurm."""
    return int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: ``jwb[0012-0014,0020],x1`` -> ``jwb0012``."""
    match = re.match(r"([^\[,]+)(?:\[([^\]]+)\])?", nodes)
    if match is None:
        raise RuntimeError(f"SLURM_JOB_NODELIST={nodes!r} names no node")
    prefix, ranges = match.groups()
    return prefix + re.split(r"[,-]", ranges)[0] if ranges else prefix


def tasks_of_node(tasks_per_node: str, node: int) -> int:
    """Tasks on node ``node`` of a list such as ``4(x2),3``: two nodes of four, then one of three."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[min(node, len(counts) - 1)]
