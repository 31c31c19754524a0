"""Patches of PyTorch, Triton and distill that let a training step run on fake CUDA tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests.fakecuda import device, ops
from tests.fakecuda.memory import is_on_device
from tests.fakecuda.watch import Watch, made_up_list

_MESH_METHODS = (
    *("__init__", "__getitem__", "_flatten", "_concatenate", "_compute_coordinates_from_mesh", "get_group"),
    "_get_mesh_tensor",
)
KERNEL_BYTES: dict[str, Callable[[dict[str, Any]], int]] = {
    # These two read only some of the logits: about the tiles of the top-k, and rows that are usually empty.
    "select": lambda arguments: 2 * ops.size_of(arguments["top_ptr"]) if "top_ptr" in arguments else 0,
    "full_row": lambda arguments: 0,
}
"""Bytes that a Triton kernel reads and writes, from its arguments by name; for all other kernels they are the sum of
the bytes of all tensor arguments."""


def install(watch: Watch) -> None:
    """Patch PyTorch and Triton for the rest of the process; import distill afterwards."""
    device.install(watch.sync, lambda: watch.device.allocator.empty_cache())
    _patch_tensors(watch)
    _patch_storages(watch)
    _patch_meshes(watch)
    _patch_triton(watch)


def _patch_tensors(watch: Watch) -> None:
    to_list = Tensor.tolist

    def tolist(self: Tensor) -> Any:
        if isinstance(self, FakeTensor):
            return made_up_list(watch, self)
        return to_list(self)

    def pin_memory(self: Tensor, *_: object) -> Tensor:
        copy = self.clone()
        watch.pinned.see(copy)
        return copy

    replaced: dict[str, Any] = {
        "pin_memory": pin_memory,
        "is_pinned": lambda self, *_: self in watch.pinned,
    }
    for name, value in replaced.items():
        setattr(Tensor, name, value)
    for kind in (Tensor, FakeTensor):
        kind.tolist = tolist  # type: ignore[method-assign]
    # Kernels compare addresses to find out whether two tensors share memory.
    FakeTensor.data_ptr = lambda self: (  # type: ignore[method-assign]
        self.untyped_storage()._cdata * 2**8 + self.storage_offset() * self.element_size()
    )


def _patch_storages(watch: Watch) -> None:
    resize = torch.UntypedStorage.resize_
    real_device = torch.UntypedStorage.device

    def resize_(self: torch.UntypedStorage, size: int) -> Any:
        result = resize(self, size)
        watch.device.resize(self, size)
        return result

    def device_of(self: torch.UntypedStorage) -> torch.device:
        # Fake tensors have storages on the device meta.
        return torch.device("cuda", 0) if self in watch.device else real_device.__get__(self)

    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
    torch.UntypedStorage.device = property(device_of)  # type: ignore[assignment]


def _patch_meshes(watch: Watch) -> None:
    """Let device meshes compute with real tensors, and ignore the tensors of DTensor's shape propagation."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    def real(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return function(*args, **kwargs)

        return call

    def paused(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            before, watch.paused = watch.paused, True
            try:
                return function(*args, **kwargs)
            finally:
                watch.paused = before

        return call

    _wrap(DeviceMesh, _MESH_METHODS, real)
    _wrap(ShardingPropagator, ("_propagate_tensor_meta_non_cached", "_propagate_tensor_meta"), paused)


def _wrap(owner: type, names: tuple[str, ...], wrapper: Callable[[Any], Any]) -> None:
    """Wrap those methods ``names`` of a class that this version of PyTorch has."""
    for name in names:
        method = owner.__dict__.get(name)
        if isinstance(method, (staticmethod, classmethod)):
            setattr(owner, name, type(method)(wrapper(method.__func__)))
        elif method is not None:
            setattr(owner, name, wrapper(method))


def _patch_triton(watch: Watch) -> None:
    """Replace kernel launches: check the devices of the arguments, and count the bytes."""
    from triton.runtime.autotuner import Autotuner, Heuristics
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, grid: Any, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        name = self.fn.__name__
        unknown = kwargs.keys() - {*self.arg_names, *_OPTIONS}
        assert not unknown, f"kernel {name} has no parameter {unknown}"
        tensors = [value for value in tree_leaves(list(arguments.values())) if isinstance(value, Tensor)]
        for tensor in tensors:
            assert is_on_device(tensor), f"kernel {name} got {tensor}"
        size = KERNEL_BYTES[name](arguments) if name in KERNEL_BYTES else sum(map(ops.size_of, tensors))
        watch.kernel(name, size)

    JITFunction.run = run
    Autotuner.run = lambda self, *args, **kwargs: self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())
    Heuristics.run = lambda self, *args, **kwargs: self.fn.run(
        *args,
        **kwargs,
        **{name: value(dict(zip(self.arg_names, args, strict=False)) | kwargs) for name, value in self.values.items()},
    )


_OPTIONS = (
    *("warmup", "num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "debug", "launch_pdl"),
    *("launch_cooperative_grid", "ptx_options"),
)
"""Launch options that are not parameters of a kernel."""
