"""Sustained rates of the devices of a run: peak numbers of a GPU times efficiencies, or measured on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.config import Config
from distill.config.gpus import Gpu, gpu_of_device, parse_gpu

MATMUL = 0.63
"""Fraction of the bfloat16 peak that large matrix products reach: 620 of 989 TFLOP/s on an H100; an assumption."""
ATTENTION_FORWARD, ATTENTION_BACKWARD = 0.30, 0.23
"""Fractions of the bfloat16 peak that attention reaches, with causal pairs counted once; an assumption.

They are those of FlashAttention-2 on an H100 (300 and 230 of 989 TFLOP/s). FlashAttention-3 is faster, and
FlashAttention-2 reaches a higher fraction of an A100.
"""
MEMORY = 0.85
"""Fraction of the memory's bandwidth that kernels reach: 2.8 of 3.35 TB/s on an H100; an assumption."""
LINK = 0.73
"""Fraction of the bandwidth between GPUs that collectives reach: 330 of 450 GB/s on an H100; an assumption."""
NETWORK = 0.8
"""Fraction of the bandwidth between nodes that collectives reach; an assumption."""
HOST = 20e9
"""Bytes per second between a GPU and pinned host memory; an assumption (PCIe 4 has 32 GB/s)."""
HOST_MEMORY = 10e9
"""Bytes per second that one CPU thread reads or writes in host memory; an assumption.

torchrun and vLLM set one thread per rank, unless OMP_NUM_THREADS is exported.
"""
STEP_OVERHEAD_S, SEQUENCE_OVERHEAD_S = 1.5e-3, 5e-6
"""Seconds of a decode step of vLLM on a GPU that neither memory nor arithmetic explains: per step and per response.

Assumptions: gaps between kernels of a CUDA graph, sampling, and the part of the scheduler that is not hidden.
"""
FLOAT32 = 1 / 16
"""Rate of float32 matrix products relative to bfloat16, without TF32; an assumption for all GPUs.

It holds for A100 (19.5 and 312 TFLOP/s) and H100 (67 and 989); many other GPUs have a higher fraction.
"""
CPU_STEP_OVERHEAD_S, CPU_SEQUENCE_OVERHEAD_S = 30e-3, 0.5e-3
"""The overheads of a decode step on a CPU: about those of vLLM with the 30 layers of SmolLM2-135M on one core."""
ATTENTION_BACKWARD_FLOPS = 2.5
"""FLOPs of the backward of attention, relative to the forward: five products in place of two, one of them recomputed.

FlashAttention's published rates of the backward count them this way.
"""
_MEASURED_S = 0.02
"""Approximate duration of each measurement on a CPU, in seconds."""


@dataclass(frozen=True)
class Rates:
    """Sustained rates of one rank's device; bytes and FLOPs per second."""

    name: str
    """Name of the device in messages."""
    matmul: float
    """Matrix products in the compute dtype."""
    wide_matmul: float
    """Matrix products with float32 results, as for logits. A CPU computes them with float32 operands."""
    attention_forward: float
    attention_backward: float
    memory: float
    """Bytes per second that are read or written in the device's memory."""
    elementwise: float
    """Bytes per second that small operations (norms, activations, AdamW) read or write."""
    link: float
    """Bytes per second to the other ranks of the node, in one direction."""
    network: float
    """Bytes per second to other nodes per rank, in one direction."""
    host: float
    """Bytes per second between device and pinned host memory (PCIe), in one direction."""
    host_memory: float
    """Bytes per second that the CPU threads of a rank read or write in host memory."""
    step_overhead: float
    """Seconds of a decode step that neither memory nor arithmetic explains."""
    sequence_overhead: float
    """The same, per running response."""
    memory_gb: float | None = None
    """Nominal size of the device's memory in GB; None if unknown."""


def rates_of_gpu(gpu: Gpu, itemsize: int = 2) -> Rates:
    """Return the assumed sustained rates of a GPU; ``itemsize``: 2 for bfloat16, 4 for float32."""
    peak = gpu.tflops * 1e12 * (1 if itemsize == 2 else FLOAT32)
    return Rates(
        gpu.name,
        MATMUL * peak,
        MATMUL * peak,
        ATTENTION_FORWARD * peak,
        ATTENTION_BACKWARD * peak,
        MEMORY * gpu.memory_gbs * 1e9,
        MEMORY * gpu.memory_gbs * 1e9,
        LINK * gpu.link_gbs * 1e9,
        NETWORK * gpu.network_gbs * 1e9,
        HOST,
        HOST_MEMORY,
        STEP_OVERHEAD_S,
        SEQUENCE_OVERHEAD_S,
        gpu.memory_gb,
    )


def rates_of_cpu(
    matmul: float, wide_matmul: float, attention: tuple[float, float], memory: float, elementwise: float
) -> Rates:
    """Return the rates of one rank on a CPU.

    ``matmul``, ``wide_matmul``: FLOP/s in the compute dtype and in float32; ``attention``: FLOP/s of forward and
    backward; the other two: bytes/s read or written. Ranks exchange data through memory: a collective copies each byte
    about four times.
    """
    return Rates(
        "CPU",
        matmul,
        wide_matmul,
        *attention,
        memory,
        elementwise,
        memory / 4,
        memory / 4,
        memory,
        memory,
        CPU_STEP_OVERHEAD_S,
        CPU_SEQUENCE_OVERHEAD_S,
    )


def measure_cpu(dtype: torch.dtype) -> Rates:
    """Return the rates of this process's CPU threads, measured in about 0.2 s.

    Ranks on one machine share caches and memory, so all of them should measure at the same time.
    """
    source, hidden = torch.ones(2**23), torch.ones(2**18, dtype=dtype)
    target = torch.empty_like(source)
    products = [_product(each) for each in dict.fromkeys((dtype, torch.float32))]
    return rates_of_cpu(
        products[0],
        products[-1],
        _attention(),
        2 * source.nbytes * _per_second(lambda: target.copy_(source)),
        2 * hidden.nbytes * _per_second(lambda: torch.nn.functional.silu(hidden)),
    )


def _product(dtype: torch.dtype) -> float:
    left, right = torch.ones(384, 512, dtype=dtype), torch.ones(1024, 512, dtype=dtype)
    return 2 * 384 * 512 * 1024 * _per_second(lambda: left @ right.T)


def _attention() -> tuple[float, float]:
    """Return the FLOP/s of causal attention in float32, forward and backward; both models compute it so on a CPU."""
    heads, tokens, width = 8, 256, 64
    query, key, value = (torch.ones(1, heads, tokens, width, requires_grad=True) for _ in range(3))

    def forward() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    flops, attended = 4 * heads * width * tokens * tokens / 2, forward()
    gradient = torch.ones_like(attended)
    backward = _per_second(lambda: torch.autograd.grad(attended, (query, key, value), gradient, retain_graph=True))
    with torch.no_grad():
        return flops * _per_second(forward), ATTENTION_BACKWARD_FLOPS * flops * backward


def _per_second(call: Callable[[], object]) -> float:
    """Return how often per second ``call`` runs, from its fastest run in ``_MEASURED_S`` seconds after the first."""
    call()
    fastest, until = float("inf"), time.perf_counter() + _MEASURED_S
    while True:
        before = time.perf_counter()
        call()
        after = time.perf_counter()
        fastest = min(fastest, after - before)
        if after >= until:
            break
    return 1 / max(fastest, 1e-9)


def planned_rates(config: Config, gpu_name: str | None, itemsize: int) -> Rates | None:
    """Return the rates for a dry run: of ``cluster.gpu``, otherwise of the GPU ``gpu_name``; None if it is unknown.

    ``gpu_name``: name that the driver reports; None without a GPU. ``itemsize``: 2 for bfloat16, 4 for float32.
    """
    if config.cluster.gpu is not None:
        return rates_of_gpu(parse_gpu(config.cluster.gpu), itemsize)
    gpu = None if gpu_name is None else gpu_of_device(gpu_name)
    return None if gpu is None else rates_of_gpu(gpu, itemsize)


def running_rates(config: Config, device: torch.device, dtype: torch.dtype) -> Rates | None:
    """Return the rates of the device of this process; of ``cluster.gpu`` if the name of the GPU is unknown.

    The rates of a CPU are measured, which takes about 0.2 seconds.
    """
    if device.type != "cuda":
        return measure_cpu(dtype)
    gpu = gpu_of_device(torch.cuda.get_device_name(device))
    return planned_rates(config, None, dtype.itemsize) if gpu is None else rates_of_gpu(gpu, dtype.itemsize)
