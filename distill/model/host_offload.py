"""Offload of weights and optimizer state to host memory while a training step does not use them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from distill.model.dtensor import local_shard

PINNED_UNIT = 2**20
"""Size in bytes of the smallest block of pinned memory that ``HostSlab`` allocates; a power of two."""


def pinned_blocks(nbytes: int) -> list[int]:
    """Return sizes of pinned blocks for ``nbytes`` bytes in total, rounded up to ``PINNED_UNIT``.

    torch rounds each pinned block up to a power of two, which wastes up to half of the memory. The sizes are distinct
    powers of two, so that no memory is wasted.
    """
    units = -(-nbytes // PINNED_UNIT)
    return [PINNED_UNIT << bit for bit in reversed(range(units.bit_length())) if units >> bit & 1]


class HostSlab:
    """Host memory for copies of storages whose sizes do not change; pinned for storages on a GPU.

    The memory is allocated once, as few large blocks. Copies are asynchronous on CUDA, on the current stream. They do
    not change the storages' sizes.
    """

    def __init__(self, sizes: Sequence[int], pinned: bool) -> None:
        self.sizes = tuple(sizes)
        """Sizes of the storages in bytes."""
        blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in pinned_blocks(sum(sizes))]
        self._pieces = list(_cut(sizes, blocks))

    def store(self, storages: Sequence[torch.UntypedStorage]) -> None:
        """Copy the storages to host memory."""
        for on_device, on_host in self._pairs(storages):
            on_host.copy_(on_device, non_blocking=True)

    def load(self, storages: Sequence[torch.UntypedStorage]) -> None:
        """Copy the host memory to the storages."""
        for on_device, on_host in self._pairs(storages):
            on_device.copy_(on_host, non_blocking=True)

    def _pairs(self, storages: Sequence[torch.UntypedStorage]) -> Iterator[tuple[Tensor, Tensor]]:
        for storage, pieces in zip(storages, self._pieces, strict=True):
            if pieces:  # a rank may have no rows of a small tensor
                sizes = [piece.numel() for piece in pieces]
                yield from zip(torch.split(_bytes_of(storage), sizes), pieces, strict=True)


def _cut(sizes: Sequence[int], blocks: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield, for each size, views of consecutive parts of ``blocks`` with this size in total."""
    rest, left = iter(blocks), torch.empty(0, dtype=torch.uint8)
    for size in sizes:
        pieces = []
        while size > 0:
            if left.numel() == 0:
                left = next(rest)
            pieces.append(left[:size])
            left, size = left[size:], size - pieces[-1].numel()
        yield pieces


class FrozenOffload:
    """Offload of frozen tensors, with a permanent copy in host memory (pinned for CUDA tensors).

    ``release`` frees the device storage of the tensors without copying it, because the host copy is up to date.
    ``restore`` allocates the storage again and fills it from the host copy, asynchronously on CUDA. References to the
    tensors stay valid.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._storages = [_storage_of(tensor) for tensor in tensors]
        self._on_cuda = _is_on_cuda(self._storages)
        self._host = HostSlab([storage.nbytes() for storage in self._storages], self._on_cuda)
        self.released = False
        self.update_copy()

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of device memory that ``release`` frees on this rank."""
        return sum(self._host.sizes)

    def release(self) -> None:
        """Free the device storage of the tensors; does nothing if it is already free.

        On CUDA, also return torch's cached memory to the device. FSDP allocates on separate streams, and memory that
        is cached for one stream cannot be reused by the next model's streams.
        """
        if self.released:
            return
        if self._on_cuda:
            torch.cuda.synchronize()  # a gather on another stream may still read the storage
        for storage in self._storages:
            storage.resize_(0)
        if self._on_cuda:
            torch.cuda.empty_cache()
        self.released = True

    def update_copy(self) -> None:
        """Update the host copy with the current values of the tensors, which must be on the device."""
        assert not self.released
        self._host.store(self._storages)  # ``release`` waits for it

    def restore(self) -> None:
        """Allocate the device storage of the tensors and fill it from the host copy.

        Does nothing if the tensors are on the device.
        """
        if not self.released:
            return
        for storage, size in zip(self._storages, self._host.sizes, strict=True):
            storage.resize_(size)
        self._host.load(self._storages)
        self.released = False


class OptimizerOffload:
    """Offload of an optimizer's moments (AdamW's averages) to host memory.

    Every ``release`` copies the moments to host memory, because each optimizer step changes them. Every call looks up
    the moments in the optimizer, because none exist before the first step. The host memory is allocated by the first
    ``release`` with moments and then reused. Scalars (the step count) are not moved. On CUDA the host memory is pinned,
    and the copies are asynchronous: copies to host memory run on the current stream, copies to the device on a separate
    stream. Call ``wait`` before an optimizer step and before reading the moments. References to the tensors stay valid.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._host: HostSlab | None = None
        self._released: list[torch.UntypedStorage] = []
        self._filling: torch.cuda.Stream | None = None

    @property
    def nbytes(self) -> int:
        """Return the total bytes of this rank's moments, on the device or in host memory."""
        if self._host is not None and self._released:
            return sum(self._host.sizes)
        return sum(storage.nbytes() for storage in self._storages())

    def release(self) -> None:
        """Copy the moments to host memory and free their device storage; does nothing if they are in host memory."""
        self.wait()
        storages = self._storages()
        if not any(storage.nbytes() for storage in storages):
            return
        self.restore()  # moments that were created after the last release need another slab
        self.wait()
        sizes = tuple(storage.nbytes() for storage in storages)
        if self._host is None or self._host.sizes != sizes:
            self._host = HostSlab(sizes, _is_on_cuda(storages))
        self._host.store(storages)
        for storage in storages:
            storage.resize_(0)  # safe: the memory is reused on the same stream, after the copy
        self._released = storages

    def restore(self) -> None:
        """Start to copy the moments from host memory back to the device; ``wait`` waits for the copies."""
        if self._host is None or not self._released:
            return
        for storage, size in zip(self._released, self._host.sizes, strict=True):
            storage.resize_(size)
        if _is_on_cuda(self._released):
            self._filling = self._filling or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._filling.wait_stream(torch.cuda.current_stream())  # the current stream may still use this memory
        with torch.cuda.stream(self._filling):
            self._host.load(self._released)
        self._released = []

    def wait(self) -> None:
        """Make the current CUDA stream wait for the copies to the device that ``restore`` started."""
        if self._filling is not None:
            torch.cuda.current_stream().wait_stream(self._filling)

    def _storages(self) -> list[torch.UntypedStorage]:
        moments = (tensor for state in self._optimizer.state.values() for tensor in state.values())
        return [_storage_of(tensor) for tensor in moments if isinstance(tensor, Tensor) and tensor.ndim > 0]


def _storage_of(tensor: Tensor) -> torch.UntypedStorage:
    return local_shard(tensor).untyped_storage()


def _is_on_cuda(storages: Sequence[torch.UntypedStorage]) -> bool:
    return any(storage.device.type == "cuda" for storage in storages)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
