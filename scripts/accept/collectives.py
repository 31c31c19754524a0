"""Collectives over all ranks: one call of each with values that are known, and the bandwidth by message size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from scripts.accept.results import Check, exactly
from scripts.accept.settings import Context

_MIB = 2**20
_LENGTH = 1000
"""Elements per rank of a verified message; all values are small integers, which bfloat16 represents exactly."""


def values(context: Context) -> Iterator[Check]:
    """Check the values of each collective on the device's backend, and on gloo with host memory; collective."""
    world = context.world()
    yield Check("ranks at the rendezvous", float(world.size), "", exactly(context.size))
    devices = [world.device] if world.device.type == "cpu" else [world.device, torch.device("cpu")]
    for device in devices:
        backend = "gloo" if device.type == "cpu" else "NCCL"
        for dtype in (torch.float32, torch.bfloat16):
            for name, wrong in wrong_elements(world.rank, world.size, device, dtype).items():
                everyone = world.gather(wrong)
                note = f"wrong elements on ranks {[rank for rank, n in enumerate(everyone) if n]}"
                kind = str(dtype).removeprefix("torch.")
                yield Check(f"{backend} {name}, {kind}", float(sum(everyone)), "", exactly(0), note * any(everyone))


def wrong_elements(rank: int, size: int, device: torch.device, dtype: torch.dtype) -> dict[str, int]:
    """Return the number of wrong elements on this rank by collective; collective."""

    def full(value: float, count: int = _LENGTH) -> Tensor:
        return torch.full((count,), value, device=device, dtype=dtype)

    def blocks(block: Callable[[int], float]) -> Tensor:
        return torch.cat([full(block(i)) for i in range(size)])

    found: dict[str, int] = {}

    def compare(name: str, actual: Tensor, expected: Tensor) -> None:
        found[name] = int((actual != expected).sum())

    gathered = torch.empty(size * _LENGTH, device=device, dtype=dtype)
    dist.all_gather_into_tensor(gathered, full(rank + 1))
    compare("all-gather", gathered, blocks(lambda i: i + 1))
    scattered = full(0)
    dist.reduce_scatter_tensor(scattered, blocks(lambda i: float(i % 2 + rank % 3)))
    compare("reduce-scatter", scattered, full(sum(rank % 2 + i % 3 for i in range(size))))
    summed = full(rank % 3)
    dist.all_reduce(summed)
    compare("all-reduce, sum", summed, full(sum(i % 3 for i in range(size))))
    largest = full(rank)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    compare("all-reduce, max", largest, full(size - 1))
    exchanged = torch.empty(size * _LENGTH, device=device, dtype=dtype)
    dist.all_to_all_single(exchanged, blocks(lambda i: float(rank % 8 * 8 + i % 8)))
    compare("all-to-all", exchanged, blocks(lambda i: float(i % 8 * 8 + rank % 8)))
    sent = full(7 if rank == size - 1 else 0)
    dist.broadcast(sent, src=size - 1)
    compare("broadcast", sent, full(7))
    return found


def bandwidth(context: Context) -> Iterator[Check]:
    """Measure the bus bandwidth of the collectives that training uses, by size of the complete message; collective."""
    world = context.world()
    sizes = (1, 16) if context.settings.quick else (1, 64, 1024)
    for name in ("all-gather", "reduce-scatter", "all-to-all"):
        for mib in sizes:
            seconds = world.gather(_median_seconds(name, mib * _MIB, world.size, world.device))
            moved = mib * _MIB * (world.size - 1) / world.size
            note = f"{max(seconds) * 1e3:.3g} ms, slowest rank"
            yield Check(f"{name}, {mib} MiB", moved / max(seconds) / 1e9, "GB/s", note=note)


def _median_seconds(name: str, size: int, ranks: int, device: torch.device) -> float:
    """Return the median duration of a collective whose complete message has ``size`` bytes of bfloat16."""
    shard = torch.zeros(size // 2 // ranks, dtype=torch.bfloat16, device=device)
    complete = torch.zeros(shard.numel() * ranks, dtype=torch.bfloat16, device=device)
    other = torch.zeros_like(complete)
    run: Callable[[], object] = {
        "all-gather": lambda: dist.all_gather_into_tensor(complete, shard),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(shard, complete),
        "all-to-all": lambda: dist.all_to_all_single(other, complete),
    }[name]
    times = []
    for _ in range(8):
        _synchronize(device)
        dist.barrier()
        started = time.perf_counter()
        run()
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
