"""Check that enough device memory is free to wake a generation engine, and that its sleep leaks none."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Protocol

import torch

log = logging.getLogger(__name__)

_GIB = 2**30


class Memory(Protocol):
    """Interface to the memory usage of a device, in bytes."""

    def free(self) -> int:
        """Return the number of bytes that the engine can allocate now."""

    def outside_torch(self) -> int:
        """Return the bytes in use outside torch's allocator: by the engine, libraries and other programs."""


class CudaMemory:
    """Memory usage of the current CUDA device.

    ``pool_bytes``: function that returns the size of the engine's memory pool in bytes. Torch counts the pool as
    reserved even while the engine sleeps and the pool uses no device memory.
    """

    def __init__(self, pool_bytes: Callable[[], int]) -> None:
        self._pool_bytes = pool_bytes

    def free(self) -> int:
        """Release the memory that torch caches, then return the number of free bytes on the device."""
        gc.collect()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def outside_torch(self) -> int:
        """Return ``used - (reserved - pool)`` in bytes, the memory used outside torch's allocator.

        ``used``: device memory in use; ``reserved``: memory that torch counts as reserved; ``pool``: size of the
        engine's memory pool, which torch includes in ``reserved``.
        """
        free, total = torch.cuda.mem_get_info()
        return int(total - free - (torch.cuda.memory_reserved() - self._pool_bytes()))


class SleepGuard:
    """Checks of an engine's device memory: enough is free to wake the engine, and sleeping leaks none.

    ``limit``: growth in bytes, above which a warning is logged. The growth is that of the device memory in use outside
    torch's allocator while the engine sleeps. It is measured since the first call of ``after_sleep``, or since the last
    warning if there was one.
    """

    def __init__(self, memory: Memory, limit: int = _GIB) -> None:
        self._memory = memory
        self._limit = limit
        self._first: int | None = None
        self._last_warning = 0

    def check_free(self, what: str, needed: int) -> None:
        """Raise RuntimeError if fewer than ``needed`` bytes of device memory are free.

        ``what``: the part of the engine that needs the memory, "weights" or "kv_cache", for the message.
        """
        free = self._memory.free()
        if free < needed:
            raise RuntimeError(
                f"waking the engine's {what} needs {needed / _GIB:.2f} GiB, but {free / _GIB:.2f} GiB of device memory"
                f" are free ({self._memory.outside_torch() / _GIB:.2f} GiB are in use outside torch): lower"
                " policy.generation.vllm_cfg.gpu_memory_utilization"
            )

    def after_sleep(self) -> int:
        """Return the bytes of device memory in use outside torch's allocator, and warn of a leak.

        Call this method each time the engine has been put to sleep. It logs a warning if the memory has grown by more
        than the constructor's ``limit`` since the first call, or since the last warning if there was one.
        """
        residual = self._memory.outside_torch()
        if self._first is None:
            self._first = self._last_warning = residual
        if residual > self._last_warning + self._limit:
            self._last_warning = residual
            log.warning(
                "%.2f GiB of device memory are used outside torch while vLLM is in sleep mode, up from %.2f GiB when"
                " it first slept after a weight sync: if this memory continues to grow, the run will fail with an"
                " out-of-memory error",
                *(residual / _GIB, self._first / _GIB),
            )
        return residual
