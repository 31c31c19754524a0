"""Check the cluster settings of the recipe (configuration) against the ranks that were started."""

from __future__ import annotations

import logging

from distill.distributed import slurm
from distill.distributed.hardware import check_gpus
from distill.distributed.world import World
from distill.errors import UserError

log = logging.getLogger(__name__)


def check_cluster(world: World, num_nodes: int, gpus_per_node: int, device: str, tp: int, cp: int) -> None:
    """Raise UserError if the configured device, nodes or GPUs per node do not match the started ranks.

    ``world`` has the started ranks; ``num_nodes``, ``gpus_per_node`` and ``device`` are configuration settings.
    ``tp``, ``cp``: tensor- and context-parallel size of the student; tp * cp must divide the number of ranks.
    """
    check_gpus(device)
    if num_nodes * gpus_per_node != world.size:
        raise UserError(
            f"cluster.num_nodes={num_nodes} x cluster.gpus_per_node={gpus_per_node} needs {num_nodes * gpus_per_node}"
            f" ranks, but the number of started ranks is {world.size}",
            f"start the ranks with {_torchrun(num_nodes, gpus_per_node)}, or set"
            f" cluster.num_nodes={world.size // world.local_size} and cluster.gpus_per_node={world.local_size}",
            key="cluster.gpus_per_node",
            value=gpus_per_node,
        )
    if (nodes := slurm.nodes_of_step()) > num_nodes:
        raise UserError(
            f"cluster.num_nodes={num_nodes} but this Slurm step runs on {nodes} nodes, and torchrun started a separate"
            " run on each of them",
            f"add --nnodes and --rdzv-endpoint to torchrun's options, and set cluster.num_nodes={nodes}",
            key="cluster.num_nodes",
            value=num_nodes,
        )
    if world.local_size != gpus_per_node:
        raise UserError(
            f"cluster.gpus_per_node={gpus_per_node} but this node runs {world.local_size} ranks",
            f"start {gpus_per_node} ranks per node (torchrun --nproc-per-node={gpus_per_node}), or set"
            f" cluster.gpus_per_node={world.local_size}",
            key="cluster.gpus_per_node",
            value=gpus_per_node,
        )
    if world.size % (tp * cp):
        raise UserError(
            f"policy.dtensor_cfg.tensor_parallel_size={tp} x context_parallel_size={cp} does not divide the"
            f" {world.size} ranks",
            f"choose sizes with a product that divides {world.size}",
            key="policy.dtensor_cfg.tensor_parallel_size",
            value=tp,
        )


def warn_of_cpu(world: World, device: str, gpu: str | None) -> None:
    """Log a warning if the run uses the CPU because no GPU was found, and if it names a GPU.

    ``device``, ``gpu``: the settings runtime.device and cluster.gpu.
    """
    if world.device.type != "cpu" or not world.is_main:
        return
    if device == "auto":
        log.warning("no GPU was found: the run uses the CPU; set runtime.device=cpu if this is intended")
    if gpu is not None:
        log.warning(
            "cluster.gpu=%s is not used, because the run uses the CPU: --dry-run with runtime.device=auto forecasts"
            " memory and time for this GPU",
            gpu,
        )


def _torchrun(num_nodes: int, gpus_per_node: int) -> str:
    """Return the command that starts the ranks."""
    program = "-m distill.train --config ..."
    if num_nodes == 1:
        return f"`torchrun --nproc-per-node {gpus_per_node} {program}`"
    nodes = f"--nnodes {num_nodes} --nproc-per-node {gpus_per_node}"
    rendezvous = "--rdzv-backend c10d --rdzv-endpoint HOST:29500"
    return f"`torchrun {nodes} {rendezvous} {program}` on each node, where HOST is the name of the first node"
