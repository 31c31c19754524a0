"""Check the cluster settings of the recipe (configuration) against the ranks that were started."""

from __future__ import annotations

import torch

from distill.distributed import slurm
from distill.distributed.world import World
from distill.errors import UserError


def check_cluster(world: World, num_nodes: int, gpus_per_node: int, device: str, tp: int, cp: int) -> None:
    """Raise UserError if the configured device, nodes or GPUs per node do not match the started ranks.

    ``world`` has the started ranks; ``num_nodes``, ``gpus_per_node`` and ``device`` are configuration settings.
    ``tp``, ``cp``: tensor- and context-parallel size of the student; tp * cp must divide the number of ranks.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "runtime.device=cuda but torch finds no CUDA device",
            "set runtime.device=auto or cpu",
            key="runtime.device",
            value=device,
        )
    if num_nodes * gpus_per_node != world.size:
        raise UserError(
            f"cluster.num_nodes={num_nodes} x cluster.gpus_per_node={gpus_per_node} needs {num_nodes * gpus_per_node}"
            f" ranks but {world.size} were started",
            f"set cluster.num_nodes and cluster.gpus_per_node to the nodes and the ranks per node that were started, or"
            f" start {gpus_per_node} ranks on each of {num_nodes} nodes",
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
