"""Check that enough device memory is free to wake a generation engine, and that its sleep leaks none."""

from __future__ import annotations

import gc
import logging
from typing import Literal, Protocol

import torch

log = logging.getLogger(__name__)

Tag = Literal["weights", "kv_cache"]
"""Part of an engine's memory that wakes on its own: the weights with all other tensors, or the key-value cache."""
_GIB = 2**30
_DEFAULT_POOL = (0, 0)
"""Id of the pool in which torch allocates tensors; vLLM's sleeping memory and CUDA graphs have their own pools."""


class Memory(Protocol):
    """Interface to the memory usage of a device, in bytes."""

    def free(self) -> int:
        """Return the number of bytes that the engine can allocate now."""

    def release(self) -> None:
        """Release memory that no tensor uses, so that the engine can allocate it."""

    def needed(self, tag: Tag) -> int:
        """Return the number of bytes that the engine allocates when it wakes its part ``tag``."""

    def outside_torch(self) -> int:
        """Return the bytes in use outside torch's default pool: by the engine, libraries and other programs."""


class CudaMemory:
    """Memory usage of the current CUDA device and of vLLM's memory pool."""

    def free(self) -> int:
        """Return the number of free bytes on the device."""
        return int(torch.cuda.mem_get_info()[0])

    def release(self) -> None:
        """Collect Python's garbage, then free the memory that torch caches."""
        gc.collect()
        torch.cuda.empty_cache()

    def needed(self, tag: Tag) -> int:
        """Return the bytes of vLLM's pool that waking ``tag`` maps.

        vLLM allocates more than the parameters while it loads the weights, for example its sampler's counts of output
        tokens. All of its memory but the key-value cache is mapped with the weights.
        """
        from vllm.device_allocator.cumem import CuMemAllocator

        pool = CuMemAllocator.get_instance().pointer_to_data.values()
        return sum(int(data.handle[1]) for data in pool if (data.tag == "kv_cache") == (tag == "kv_cache"))

    def outside_torch(self) -> int:
        """Return ``used - own`` in bytes.

        ``used``: device memory in use. ``own``: memory that torch's default pool has allocated or caches, which the
        trainer uses. Torch's other pools belong to vLLM. Torch counts their memory as reserved even after vLLM has
        freed it, so ``memory_reserved`` would be too large.
        """
        free, total = torch.cuda.mem_get_info()
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        own = sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == _DEFAULT_POOL)
        return int(total - free - own)


def pool_bytes() -> int:
    """Return the size of vLLM's memory pool in bytes; sleeping does not change this number."""
    from vllm.device_allocator.cumem import CuMemAllocator

    return int(CuMemAllocator.get_instance().get_current_usage())


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

    def check_free(self, tag: Tag) -> None:
        """Raise RuntimeError if too little device memory is free to wake the engine's part ``tag``.

        Memory that torch caches is released only if it is needed, because collecting garbage takes 0.1 s or more.
        """
        needed = self._memory.needed(tag)
        if self._memory.free() < needed:
            self._memory.release()
        free = self._memory.free()
        if free < needed:
            raise RuntimeError(
                f"waking the engine's {tag} needs {needed / _GIB:.2f} GiB, but {free / _GIB:.2f} GiB of device memory"
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
