"""Memory around a sleeping engine: enough before it wakes, no more than before once it sleeps."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Protocol

import torch

log = logging.getLogger(__name__)

_GIB = 2**30


class Memory(Protocol):
    """A device's memory in bytes, as the engine's allocator sees it."""

    def free(self) -> int:
        """What could be allocated now."""

    def others(self) -> int:
        """What is in use on the device and not held by torch's own allocator: the engine, libraries, other programs."""


class CudaMemory:
    """The current CUDA device. Blocks that torch only caches are given back first: the engine can't use them.

    ``pool``: bytes of the engine's own pool, which torch counts as reserved by itself, even while they are unmapped.
    """

    def __init__(self, pool: Callable[[], int]) -> None:
        self._pool = pool

    def free(self) -> int:
        """See Memory.free."""
        gc.collect()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def others(self) -> int:
        """See Memory.others."""
        free, total = torch.cuda.mem_get_info()
        return int(total - free - (torch.cuda.memory_reserved() - self._pool()))


class SleepGuard:
    """What an engine that frees its memory asleep needs and leaves behind.

    ``limit``: bytes by which the memory in use after a sleep may exceed that after the first step's.
    """

    def __init__(self, memory: Memory, limit: int = _GIB) -> None:
        self._memory = memory
        self._limit = limit
        self._first: int | None = None
        self._alarmed_at = 0

    def check_free(self, what: str, needed: int) -> None:
        """Raise RuntimeError, with the figures, where waking ``what`` would run out of memory."""
        free = self._memory.free()
        if free < needed:
            raise RuntimeError(
                f"waking the engine's {what} needs {needed / _GIB:.2f} GiB and {free / _GIB:.2f} GiB are free"
                f" ({self._memory.others() / _GIB:.2f} GiB are held outside torch): lower"
                " policy.generation.vllm_cfg.gpu_memory_utilization"
            )

    def asleep(self) -> int:
        """Note what is still in use after a sleep; warns when it has grown by another ``limit``. Returns it."""
        residual = self._memory.others()
        if self._first is None:
            self._first = self._alarmed_at = residual
        if residual > self._alarmed_at + self._limit:
            self._alarmed_at = residual
            log.warning(
                "the sleeping engine leaves %.2f GiB in use, %.2f GiB after the first step: it grows, and will run out",
                *(residual / _GIB, self._first / _GIB),
            )
        return residual
