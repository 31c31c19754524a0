"""Measure time, peak memory, FLOPs, bandwidth and matmul peak."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts.bench_loss.problem import Outcome
from scripts.live_bytes import LiveBytes


def counted(run: Callable[[], Outcome], gradient_numels: Sequence[int]) -> tuple[Outcome, int, int]:
    """Return the result of ``run``, its peak memory in bytes and its FLOPs."""
    memory = LiveBytes(gradient_numels)
    # PyTorch's counter does not count the in-place form of addmm.
    flops = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})
    with flops, memory:
        outcome = run()
    return outcome, memory.peak, flops.get_total_flops()


def _addmm_flops(into_shape: Any, a_shape: Any, b_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(a_shape) * b_shape[1]


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return the duration of one run in seconds, measured with CUDA events on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def typical(times: Sequence[float], device: torch.device) -> float:
    """Return the median on a GPU; on a CPU the minimum, because other processes slow down some runs."""
    return statistics.median(times) if device.type == "cuda" else min(times)


def timed(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the ``typical`` duration in seconds of ``repeats`` runs, after two warm-up runs."""
    return typical([seconds_of(run, device) for _ in range(repeats + 2)][2:], device)


@dataclass(frozen=True)
class Machine:
    """Bandwidth and matmul peak of the device, measured in this run."""

    bytes_per_s: float
    """Bytes per second that a copy reads and writes, added together."""
    flops_per_s: float

    def floor(self, flops: float, moved: float) -> float:
        """Return the roofline in seconds: time for ``flops`` of matmuls plus time to move ``moved`` bytes."""
        return flops / self.flops_per_s + moved / self.bytes_per_s


def measure_machine(device: torch.device, dtype: torch.dtype, copied: int, side: int) -> Machine:
    """Measure the bandwidth by copying ``copied`` bytes, and the matmul peak with ``side`` x ``side`` matrices."""
    source, target = (torch.zeros(copied, dtype=torch.uint8, device=device) for _ in range(2))
    bandwidth = 2 * copied / timed(lambda: target.copy_(source), device, 5)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return Machine(bandwidth, 2 * side**3 / timed(lambda: a @ b, device, 5))
