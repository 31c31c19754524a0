"""Weights and optimizer state in host memory outside their phase."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class FrozenOffload:
    """A permanent copy of frozen tensors in (pinned) host memory, so that going away is only letting go.

    ``release`` frees the tensors' own storage without copying anything; ``restore`` allocates it again and fills it
    from the copy, asynchronously on CUDA. The tensors stay the same objects, so whoever holds them need not know.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._storages = [_storage_of(tensor) for tensor in tensors]
        self._sizes = [storage.nbytes() for storage in self._storages]
        self._host = [_host_copy(storage) for storage in self._storages]
        self.released = False

    @property
    def nbytes(self) -> int:
        """Bytes that ``release`` frees on this rank."""
        return sum(self._sizes)

    def release(self) -> None:
        """Free the tensors' storage; does nothing where it is free already."""
        if not self.released:
            if any(storage.device.type == "cuda" for storage in self._storages):
                torch.cuda.synchronize()  # a gather on another stream may still be reading
            for storage in self._storages:
                storage.resize_(0)
        self.released = True

    def push_weights(self) -> None:
        """Copy tensors that have changed, and are in place, anew."""
        assert not self.released
        for storage, copy in zip(self._storages, self._host, strict=True):
            copy.copy_(_bytes_of(storage), non_blocking=True)  # ``release`` waits for it

    def restore(self) -> None:
        """Allocate and fill the tensors' storage; does nothing where they are in place."""
        if not self.released:
            return
        for storage, size, copy in zip(self._storages, self._sizes, self._host, strict=True):
            storage.resize_(size)
            _bytes_of(storage).copy_(copy, non_blocking=True)
        self.released = False


class OptimizerOffload:
    """An optimizer's moments, in (pinned) host memory between ``release`` and ``restore``.

    Unlike frozen weights they change, so every ``release`` copies them out. What there is to move is looked up each
    time: nothing before the first step. Scalars (the count of steps) stay where they are. On CUDA both ways are
    asynchronous: out on the stream that computes, back on one of its own, so whoever reads or steps calls ``wait``
    first. The tensors stay the same objects; while they are away nobody may read them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._away: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._filling: torch.cuda.Stream | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the moments on this rank, away or not."""
        return sum(storage.nbytes() for storage in self._storages()) + sum(copy.numel() for _, copy in self._away)

    def release(self) -> None:
        """Copy what is on the device to the host and free its storage; what is away already stays away."""
        self.wait()
        for storage in self._storages():
            if storage.nbytes() > 0:
                self._away.append((storage, _host_copy(storage)))
                storage.resize_(0)  # used again only behind the copy, for both are on one stream

    def restore(self) -> None:
        """Allocate the storage of what is away and begin to fill it; ``wait`` before it is read."""
        if not self._away:
            return
        for storage, copy in self._away:
            storage.resize_(copy.numel())
        if self._away[0][0].device.type == "cuda":
            self._filling = self._filling or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._filling.wait_stream(torch.cuda.current_stream())  # the memory may be in use till then
        with torch.cuda.stream(self._filling):
            for storage, copy in self._away:
                _bytes_of(storage).copy_(copy, non_blocking=True)
        self._away.clear()

    def wait(self) -> None:
        """Let the stream that computes wait until what ``restore`` began is done."""
        if self._filling is not None:
            torch.cuda.current_stream().wait_stream(self._filling)

    def _storages(self) -> list[torch.UntypedStorage]:
        moments = (tensor for state in self._optimizer.state.values() for tensor in state.values())
        return [_storage_of(tensor) for tensor in moments if isinstance(tensor, Tensor) and tensor.ndim > 0]


def _storage_of(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


def _host_copy(storage: torch.UntypedStorage) -> Tensor:
    """A copy in host memory, pinned where the storage is on a GPU: then it is whole only behind the stream."""
    pinned = storage.device.type == "cuda"
    copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
    return copy.copy_(_bytes_of(storage), non_blocking=True)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
