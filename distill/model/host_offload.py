"""Offload of weights and optimizer state to host memory while a training step does not use them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from distill.model.dtensor import local_shard


class FrozenOffload:
    """Offload of frozen tensors, with a permanent copy in host memory (pinned for CUDA tensors).

    ``release`` frees the device storage of the tensors without copying it, because the host copy is up to date.
    ``restore`` allocates the storage again and fills it from the host copy, asynchronously on CUDA. References to the
    tensors stay valid.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._storages = [_storage_of(tensor) for tensor in tensors]
        self._sizes = [storage.nbytes() for storage in self._storages]
        self._host = [_host_copy(storage) for storage in self._storages]
        self.released = False

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of device memory that ``release`` frees on this rank."""
        return sum(self._sizes)

    def release(self) -> None:
        """Free the device storage of the tensors; does nothing if it is already free."""
        if not self.released:
            if any(storage.device.type == "cuda" for storage in self._storages):
                torch.cuda.synchronize()  # a gather on another stream may still read the storage
            for storage in self._storages:
                storage.resize_(0)
        self.released = True

    def update_copy(self) -> None:
        """Update the host copy with the current values of the tensors, which must be on the device."""
        assert not self.released
        for storage, copy in zip(self._storages, self._host, strict=True):
            copy.copy_(_bytes_of(storage), non_blocking=True)  # ``release`` waits for it

    def restore(self) -> None:
        """Allocate the device storage of the tensors and fill it from the host copy.

        Does nothing if the tensors are on the device.
        """
        if not self.released:
            return
        for storage, size, copy in zip(self._storages, self._sizes, self._host, strict=True):
            storage.resize_(size)
            _bytes_of(storage).copy_(copy, non_blocking=True)
        self.released = False


class OptimizerOffload:
    """Offload of an optimizer's moments (AdamW's averages) to host memory.

    Every ``release`` copies the moments to host memory, because each optimizer step changes them. Every call looks up
    the moments in the optimizer, because none exist before the first step. Scalars (the step count) are not moved. On
    CUDA the host memory is pinned, and the copies are asynchronous: copies to host memory run on the current stream,
    copies to the device on a separate stream. Call ``wait`` before an optimizer step and before reading the moments.
    References to the tensors stay valid.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._released: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._filling: torch.cuda.Stream | None = None

    @property
    def nbytes(self) -> int:
        """Return the total bytes of this rank's moments, on the device plus in host memory."""
        return sum(storage.nbytes() for storage in self._storages()) + sum(copy.numel() for _, copy in self._released)

    def release(self) -> None:
        """Copy the moments to host memory and free their device storage.

        Skips moments that are already in host memory.
        """
        self.wait()
        for storage in self._storages():
            if storage.nbytes() > 0:
                self._released.append((storage, _host_copy(storage)))
                storage.resize_(0)  # safe: the memory is reused on the same stream, after the copy

    def restore(self) -> None:
        """Start to copy the moments from host memory back to the device; ``wait`` waits for the copies."""
        if not self._released:
            return
        for storage, copy in self._released:
            storage.resize_(copy.numel())
        if self._released[0][0].device.type == "cuda":
            self._filling = self._filling or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._filling.wait_stream(torch.cuda.current_stream())  # the current stream may still use this memory
        with torch.cuda.stream(self._filling):
            for storage, copy in self._released:
                _bytes_of(storage).copy_(copy, non_blocking=True)
        self._released.clear()

    def wait(self) -> None:
        """Make the current CUDA stream wait for the copies to the device that ``restore`` started."""
        if self._filling is not None:
            torch.cuda.current_stream().wait_stream(self._filling)

    def _storages(self) -> list[torch.UntypedStorage]:
        moments = (tensor for state in self._optimizer.state.values() for tensor in state.values())
        return [_storage_of(tensor) for tensor in moments if isinstance(tensor, Tensor) and tensor.ndim > 0]


def _storage_of(tensor: Tensor) -> torch.UntypedStorage:
    return local_shard(tensor).untyped_storage()


def _host_copy(storage: torch.UntypedStorage) -> Tensor:
    """Return a copy of ``storage`` in host memory.

    For CUDA storage, the host memory is pinned and the copy runs asynchronously on the current stream.
    """
    pinned = storage.device.type == "cuda"
    copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
    return copy.copy_(_bytes_of(storage), non_blocking=True)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
