"""Estimated device memory that is not in tensors of the trainer: libraries, the sleeping engine, fragmentation.

None of these numbers was measured on a GPU with this program.
"""

from __future__ import annotations

from distill.config import Config
from distill.memory.shapes import teacher_group

_MIB = 2**20
CONTEXT = 700 * _MIB
"""CUDA context and loaded kernels. About 500 MiB for a process of torch on an A100 or H100 (nvidia-smi), and kernels of
cuBLAS, NCCL, FlashAttention and Triton, which are loaded at their first use."""
COMMUNICATOR = 256 * _MIB
"""Buffers of one NCCL communicator. NCCL has one buffer of 4 MiB (NCCL_BUFFSIZE) per channel and connection, with 16 to
32 channels within a node: 200 to 500 MiB for large groups and less for small ones."""
CUBLAS = 128 * _MIB
"""Workspaces of matrix products. torch allocates 32 MiB on Hopper (8 MiB on other GPUs) per thread and stream for
cuBLAS and as much for cuBLASLt; forward and backward run in two threads."""
GRAPHS = 768 * _MIB
"""CUDA graphs of a sleeping engine; the sleep mode of vLLM does not free them. vLLM reports 0.5 to 1.5 GiB."""
ENGINE_TP = 512 * _MIB
"""NCCL communicator, custom all-reduce and symmetric memory of an engine on several GPUs."""
FRAGMENTATION = 0.05
"""Fraction of the trainer's tensors that torch's allocator reserves in addition, with expandable segments.

Without them, a simulation of the allocator reserves 19% to 38% more than it allocates. The allocator returns unused
segments to the device before it raises an out-of-memory error.
"""


def communicators(config: Config) -> int:
    """Return the number of NCCL communicators of the trainer on one rank.

    Meshes of all ranks share one communicator. Further communicators are those of FSDP's shards, of replicas, of
    tensor and context parallelism, and of the teacher's groups, if they have more than one rank, but not all ranks.
    """
    parallel, ranks = config.policy.dtensor_cfg, config.cluster.num_nodes * config.cluster.gpus_per_node
    tp, cp, replicas = parallel.tensor_parallel_size, parallel.context_parallel_size, parallel.replicate_size
    replica = ranks // replicas
    groups = [replica // tp, *([replica] if tp > 1 else []), replicas, tp, cp]
    if teacher_group(config) > tp * cp:
        groups.append(teacher_group(config))
    return (ranks > 1) + sum(1 < size < ranks for size in groups)


def reserve(config: Config, allocated: int, asleep: bool) -> dict[str, int]:
    """Return the estimated bytes per rank outside the trainer's tensors, as a dict from purpose to bytes.

    ``allocated``: bytes of the trainer's tensors. ``asleep``: whether a vLLM engine sleeps; an awake engine counts all
    of its memory in its fraction of the GPU.
    """
    generation = config.policy.generation
    parts = {"context": CONTEXT, "NCCL": COMMUNICATOR * communicators(config), "cuBLAS": CUBLAS}
    if asleep and generation.backend == "vllm":
        parts["engine graphs"] = 0 if generation.vllm_cfg.enforce_eager else GRAPHS
        parts["engine buffers"] = ENGINE_TP if generation.vllm_cfg.tensor_parallel_size > 1 else 0
    return parts | {"fragmentation": int(FRAGMENTATION * allocated)}
