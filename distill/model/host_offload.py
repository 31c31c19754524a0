"""Offload of weights and optimizer state to host memory, outside the phases that use them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from distill.model.dtensor import local_shard


class FrozenOffload:
    """A permanent copy of frozen tensors in (pinned) host memory.

    ``release`` frees the tensors' device storage without a copy. ``restore`` allocates it again and fills it from the
    host, asynchronously on CUDA. The tensors stay the same objects, so references to them stay valid.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._storages = [_storage_of(tensor) for tensor in tensors]
        self._sizes = [storage.nbytes() for storage in self._storages]
        self._host = [_host_copy(storage) for storage in self._storages]
        self.released = False

    @property
    def nbytes(self) -> int:
        """Return the bytes that ``release`` frees on this rank."""
        return sum(self._sizes)

    def release(self) -> None:
        """Free the tensors' storage; does nothing if it is already free."""
        if not self.released:
            if any(storage.device.type == "cuda" for storage in self._storages):
                torch.cuda.synchronize()  # a gather on another stream may still read the storage
            for storage in self._storages:
                storage.resize_(0)
        self.released = True

    def update_copy(self) -> None:
        """Update the host copy after the tensors changed; they must be on the device."""
        assert not self.released
        for storage, copy in zip(self._storages, self._host, strict=True):
            copy.copy_(_bytes_of(storage), non_blocking=True)  # ``release`` synchronises

    def restore(self) -> None:
        """Allocate and fill the tensors' storage; does nothing if they are on the device."""
        if not self.released:
            return
        for storage, size, copy in zip(self._storages, self._sizes, self._host, strict=True):
            storage.resize_(size)
            _bytes_of(storage).copy_(copy, non_blocking=True)
        self.released = False


class OptimizerOffload:
    """An optimizer's moments, in (pinned) host memory between ``release`` and ``restore``.

    Moments change, unlike frozen weights, so every ``release`` copies them to the host. The moments are looked up on
    every call: none exist before the first step. Scalars (the step count) are not moved. On CUDA both copies are
    asynchronous: to the host on the current stream, back on a separate stream. Call ``wait`` before reading the moments
    or stepping. The tensors stay the same objects; they have no data while they are released.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._released: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._filling: torch.cuda.Stream | None = None

    @property
    def nbytes(self) -> int:
        """Return the bytes of the moments on this rank, released or not."""
        return sum(storage.nbytes() for storage in self._storages()) + sum(copy.numel() for _, copy in self._released)

    def release(self) -> None:
        """Copy the moments on the device to the host and free their storage; skips released moments."""
        self.wait()
        for storage in self._storages():
            if storage.nbytes() > 0:
                self._released.append((storage, _host_copy(storage)))
                storage.resize_(0)  # the stream reuses the memory only after the copy, which is on the same stream

    def restore(self) -> None:
        """Allocate the storage of released moments and start to fill it; call ``wait`` before reading them."""
        if not self._released:
            return
        for storage, copy in self._released:
            storage.resize_(copy.numel())
        if self._released[0][0].device.type == "cuda":
            self._filling = self._filling or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._filling.wait_stream(torch.cuda.current_stream())  # the new storage may still be in use there
        with torch.cuda.stream(self._filling):
            for storage, copy in self._released:
                _bytes_of(storage).copy_(copy, non_blocking=True)
        self._released.clear()

    def wait(self) -> None:
        """Make the current stream wait for the copies that ``restore`` started."""
        if self._filling is not None:
            torch.cuda.current_stream().wait_stream(self._filling)

    def _storages(self) -> list[torch.UntypedStorage]:
        moments = (tensor for state in self._optimizer.state.values() for tensor in state.values())
        return [_storage_of(tensor) for tensor in moments if isinstance(tensor, Tensor) and tensor.ndim > 0]


def _storage_of(tensor: Tensor) -> torch.UntypedStorage:
    return local_shard(tensor).untyped_storage()


def _host_copy(storage: torch.UntypedStorage) -> Tensor:
    """Copy the storage to host memory; on CUDA into pinned memory, asynchronously on the current stream."""
    pinned = storage.device.type == "cuda"
    copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
    return copy.copy_(_bytes_of(storage), non_blocking=True)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
