"""Weights in host memory outside their phase."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class HostCopy:
    """A permanent copy of frozen tensors in (pinned) host memory, so that going away is only letting go.

    ``release`` frees the tensors' own storage without copying anything; ``restore`` allocates it again and fills it
    from the copy, asynchronously on CUDA. The tensors stay the same objects, so whoever holds them need not know.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._storages = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in tensors]
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

    def restore(self) -> None:
        """Allocate and fill the tensors' storage; does nothing where they are in place."""
        if not self.released:
            return
        for storage, size, copy in zip(self._storages, self._sizes, self._host, strict=True):
            storage.resize_(size)
            _bytes_of(storage).copy_(copy, non_blocking=True)
        self.released = False


def _host_copy(storage: torch.UntypedStorage) -> Tensor:
    pinned = storage.device.type == "cuda"
    copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
    return copy.copy_(_bytes_of(storage))


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
