"""Measure the peak memory of live tensor storages with a dispatch mode."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Dispatch mode that records the peak bytes of live storages that were allocated while the mode is active.

    Views of one storage are counted once. ``gradient_numels``: numbers of elements of the gradients. For each number,
    the smallest live storage with this number of elements is not counted, because every implementation needs memory for
    the gradient.
    """

    def __init__(self, gradient_numels: Sequence[int] = ()) -> None:
        super().__init__()
        self.peak = self.live = 0
        self._gradients: dict[int, Counter[int]] = {numel: Counter() for numel in gradient_numels}
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._track(leaf, ours=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._track(leaf, ours=True)
        left_out = sum(min(+sizes, default=0) for sizes in self._gradients.values())
        self.peak = max(self.peak, self.live - left_out)
        return result

    def _track(self, tensor: Tensor, ours: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        sizes = self._gradients.get(size // tensor.element_size()) if ours else None

        def freed(_: Any) -> None:
            del self._known[key]
            self._add(-size if ours else 0, sizes, size, -1)

        self._known[key] = weakref.ref(storage, freed)
        self._add(size if ours else 0, sizes, size, 1)

    def _add(self, live: int, sizes: Counter[int] | None, size: int, count: int) -> None:
        self.live += live
        if sizes is not None:
            sizes[size] += count
