"""Simulation of PyTorch's caching allocator: how many bytes it reserves for the bytes that tensors use."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

_MIB = 2**20


@dataclass(eq=False)
class Block:
    """A part of a segment; ``before`` and ``after`` are its neighbours in the segment."""

    size: int
    pool: list[tuple[int, int, Block]]
    small: bool
    before: Block | None = None
    after: Block | None = None
    free: bool = True


class CachingAllocator:
    """The rules of ``CUDACachingAllocator`` without expandable segments.

    Sizes are rounded up to 512 bytes. Requests of at most 1 MiB come from segments of 2 MiB; requests below 10 MiB from
    segments of 20 MiB; larger requests get a segment rounded up to 2 MiB. Every stream has its own pools. The smallest
    sufficient free block is used, and split if the rest is large enough. A freed block merges with free neighbours.
    """

    def __init__(self) -> None:
        self.reserved = self.peak_reserved = 0
        self._pools: dict[tuple[int, bool], list[tuple[int, int, Block]]] = {}

    def allocate(self, size: int, stream: int) -> Block:
        """Return a block of at least ``size`` bytes in the pool of ``stream``."""
        size = max(512, -(-size // 512) * 512)
        small = size <= _MIB
        pool = self._pools.setdefault((stream, small), [])
        at = bisect.bisect_left(pool, (size, -1))
        block = pool.pop(at)[2] if at < len(pool) else self._segment(size, small, pool)
        rest = block.size - size
        if rest >= 512 if small else rest > _MIB:
            remainder = Block(rest, pool, small, before=block, after=block.after)
            if block.after is not None:
                block.after.before = remainder
            block.after, block.size = remainder, size
            self._insert(remainder)
        block.free = False
        return block

    def release(self, block: Block) -> None:
        """Free a block, and merge it with free neighbours."""
        block.free = True
        before, after = block.before, block.after
        if after is not None and after.free:
            self._remove(after)
            block.size, block.after = block.size + after.size, after.after
            if block.after is not None:
                block.after.before = block
        if before is not None and before.free:
            self._remove(before)
            before.size, before.after = before.size + block.size, block.after
            if block.after is not None:
                block.after.before = before
            block = before
        self._insert(block)

    def empty_cache(self) -> None:
        """Return all segments without used blocks to the device."""
        for pool in self._pools.values():
            kept = [entry for entry in pool if entry[2].before is not None or entry[2].after is not None]
            self.reserved -= sum(size for size, _, _ in pool) - sum(size for size, _, _ in kept)
            pool[:] = kept

    def reset_peak(self) -> None:
        """Begin to measure the peak of the reserved bytes."""
        self.peak_reserved = self.reserved

    def _segment(self, size: int, small: bool, pool: list[tuple[int, int, Block]]) -> Block:
        segment = 2 * _MIB if small else 20 * _MIB if size < 10 * _MIB else -(-size // (2 * _MIB)) * 2 * _MIB
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return Block(segment, pool, small)

    def _insert(self, block: Block) -> None:
        bisect.insort(block.pool, (block.size, id(block), block))

    def _remove(self, block: Block) -> None:
        block.pool.pop(bisect.bisect_left(block.pool, (block.size, id(block))))
