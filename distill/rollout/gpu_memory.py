"""Checks of device memory around a sleeping engine: enough before it wakes, no growth from sleep to sleep."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Protocol

import torch

log = logging.getLogger(__name__)

_GIB = 2**30


class Memory(Protocol):
    """Memory of a device, in bytes."""

    def free(self) -> int:
        """Return the bytes that the engine could allocate now."""

    def outside_torch(self) -> int:
        """Return the bytes in use on the device but not by torch's allocator: engine, libraries, other programs."""


class CudaMemory:
    """Memory of the current CUDA device.

    ``pool_bytes``: returns the size of the engine's memory pool; torch counts it as reserved even while it is unmapped.
    """

    def __init__(self, pool_bytes: Callable[[], int]) -> None:
        self._pool_bytes = pool_bytes

    def free(self) -> int:
        """See Memory.free. Releases torch's cached blocks first, because the engine cannot use them."""
        gc.collect()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def outside_torch(self) -> int:
        """See Memory.outside_torch."""
        free, total = torch.cuda.mem_get_info()
        return int(total - free - (torch.cuda.memory_reserved() - self._pool_bytes()))


class SleepGuard:
    """Verify that waking an engine cannot run out of memory, and warn if its memory while asleep grows.

    ``limit``: bytes of growth since the previous warning, or since the first sleep, that cause a warning.
    """

    def __init__(self, memory: Memory, limit: int = _GIB) -> None:
        self._memory = memory
        self._limit = limit
        self._first: int | None = None
        self._last_warning = 0

    def check_free(self, what: str, needed: int) -> None:
        """Raise RuntimeError if fewer than ``needed`` bytes are free for ``what``, a part of the engine's memory."""
        free = self._memory.free()
        if free < needed:
            raise RuntimeError(
                f"waking the engine's {what} needs {needed / _GIB:.2f} GiB, but {free / _GIB:.2f} GiB are free"
                f" ({self._memory.outside_torch() / _GIB:.2f} GiB are in use outside torch): lower"
                " policy.generation.vllm_cfg.gpu_memory_utilization"
            )

    def after_sleep(self) -> int:
        """Return the bytes still in use outside torch after a sleep; warn if they have grown."""
        residual = self._memory.outside_torch()
        if self._first is None:
            self._first = self._last_warning = residual
        if residual > self._last_warning + self._limit:
            self._last_warning = residual
            log.warning(
                "the sleeping engine keeps %.2f GiB of device memory, up from %.2f GiB in the first step: a memory leak"
                " will end this run",
                *(residual / _GIB, self._first / _GIB),
            )
        return residual
