"""Count the bytes of fake tensors: device storages by owner with the peak of each phase, and pinned host memory."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tests.fakecuda.allocator import Block, CachingAllocator
from tests.fakecuda.device import current_stream


@dataclass
class Storage:
    """One counted device storage."""

    size: int
    owner: str
    block: Block | None
    alive: Any
    """Weak reference with the callback that counts the end of the storage."""


@dataclass
class Peak:
    """Device memory of one phase."""

    bytes: int
    """Largest number of bytes in live storages."""
    reserved: int
    """Largest number of bytes that the simulated allocator reserved."""
    owners: dict[str, int]
    """Bytes at the peak by owner, largest first."""


@dataclass
class DeviceMemory:
    """Live device storages. Sizes are those of the storages, without the allocator's rounding."""

    allocator: CachingAllocator = field(default_factory=CachingAllocator)
    live: int = 0
    _storages: dict[int, Storage] = field(default_factory=dict)
    _events: list[tuple[int, str]] = field(default_factory=list)
    _begin: Counter[str] = field(default_factory=Counter)

    def __contains__(self, storage: torch.UntypedStorage) -> bool:
        return storage._cdata in self._storages

    def see(self, tensor: Tensor, owner: str) -> None:
        """Count the storage of a fake tensor, unless it is already counted."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return

        def dies(_: object) -> None:
            gone = self._storages.pop(key, None)
            if gone is not None:
                self._change(gone, 0)

        new = self._storages[key] = Storage(0, owner, None, weakref.ref(storage, dies))
        self._change(new, storage.nbytes())

    def resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """Count a storage that was resized; FSDP frees and allocates gathered weights this way."""
        known = self._storages.get(storage._cdata)
        if known is not None:
            self._change(known, size)

    def begin_phase(self) -> None:
        """Begin to record the peak of a phase."""
        self._events = []
        self._begin = Counter()
        for storage in self._storages.values():
            self._begin[storage.owner] += storage.size
        self.allocator.reset_peak()

    def end_phase(self) -> Peak:
        """Return the peak since ``begin_phase``."""
        total = peak = sum(self._begin.values())
        at = 0
        for i, (change, _) in enumerate(self._events):
            total += change
            if total > peak:
                peak, at = total, i + 1
        owners = self._begin.copy()
        for change, owner in self._events[:at]:
            owners[owner] += change
        largest = {owner: size for owner, size in owners.most_common() if size > 0}
        return Peak(peak, self.allocator.peak_reserved, largest)

    def _change(self, storage: Storage, size: int) -> None:
        if storage.block is not None:
            self.allocator.release(storage.block)
        storage.block = self.allocator.allocate(size, current_stream().number) if size else None
        change, storage.size = size - storage.size, size
        self.live += change
        self._events.append((change, storage.owner))


@dataclass
class PinnedMemory:
    """Pinned host memory: bytes of the tensors, and bytes after the rounding of PyTorch's pinned allocator."""

    bytes: int = 0
    rounded: int = 0
    """PyTorch's allocator of pinned memory rounds every block up to a power of two."""
    blocks: int = 0
    peak: tuple[int, int, int] = (0, 0, 0)
    """Largest bytes, rounded bytes and number of blocks since the last reset."""
    _storages: dict[int, Any] = field(default_factory=dict)

    def see(self, tensor: Tensor) -> None:
        """Count the storage of a pinned tensor."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or not size:
            return

        def dies(_: object) -> None:
            self._storages.pop(key, None)
            self._add(size, -1)

        self._storages[key] = weakref.ref(storage, dies)
        self._add(size, 1)

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages

    def _add(self, size: int, sign: int) -> None:
        self.bytes += sign * size
        self.rounded += sign * (1 << (size - 1).bit_length())
        self.blocks += sign
        now = (self.bytes, self.rounded, self.blocks)
        self.peak = (max(now[0], self.peak[0]), max(now[1], self.peak[1]), max(now[2], self.peak[2]))

    def reset_peak(self) -> None:
        """Begin to measure the peak."""
        self.peak = (self.bytes, self.rounded, self.blocks)


def is_on_device(value: object) -> bool:
    """Return whether ``value`` is a fake tensor on the fake device."""
    return isinstance(value, FakeTensor) and value.device.type == "cuda"
