"""Dispatch mode that counts memory, operators and host syncs of a program on fake CUDA tensors."""

from __future__ import annotations

import contextlib
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from tests.fakecuda import ops
from tests.fakecuda.memory import DeviceMemory, Peak, PinnedMemory, is_on_device


class Scope(NamedTuple):
    """The current part of a training step: phase of ``distill.train``, and part of the phase."""

    phase: str
    part: str = ""
    """"targets" (a teacher's micro-batch), "forward", "backward" or "optimizer"; empty outside of these."""


@dataclass
class Work:
    """Kernels of one class in one scope."""

    launches: int = 0
    flops: float = 0.0
    bytes: int = 0


class Watch(TorchDispatchMode):
    """Records what the operators inside of the ``with`` block do; the block must be inside of a FakeTensorMode.

    Values that the host reads from the device are made up: 2.0 for a float, 1 for an integer, False for a bool,
    and no rows for ``nonzero``. A list of bools from ``tolist`` is True.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode
        self.device, self.pinned = DeviceMemory(), PinnedMemory()
        self.scope = Scope("build")
        self.work: dict[tuple[Scope, str], Work] = defaultdict(Work)
        self.by_name: dict[tuple[Scope, str, str], Work] = defaultdict(Work)
        self.syncs: Counter[tuple[Scope, str, str]] = Counter()
        self.collectives: dict[tuple[Scope, str], Work] = defaultdict(Work)
        self.peaks: dict[str, Peak] = {}
        self.paused = False

    def new_case(self) -> None:
        """Forget all counts; memory of earlier cases, which reference cycles may keep, is not counted any more."""
        self.device, self.pinned = DeviceMemory(), PinnedMemory()
        self.reset()

    def reset(self) -> None:
        """Forget all counts except the memory that is in use."""
        for counts in (self.work, self.by_name, self.syncs, self.collectives, self.peaks):
            counts.clear()
        self.pinned.reset_peak()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the ``with`` block as phase ``name``, and record its peak of device memory."""
        before, self.scope = self.scope, Scope(name)
        self.device.begin_phase()
        try:
            yield
        finally:
            self.peaks[name] = self.device.end_phase()
            self.scope = before

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the ``with`` block as part ``name`` of the current phase."""
        before, self.scope = self.scope, Scope(self.scope.phase, name)
        try:
            yield
        finally:
            self.scope = before

    def sync(self, kind: str) -> None:
        """Count a wait of the host for the device."""
        if not self.paused:
            self.syncs[self.scope, kind, ops.place_of(sys._getframe(1))] += 1

    def kernel(self, name: str, bytes_: int) -> None:
        """Count the launch of a Triton kernel."""
        self._count(name, ops.class_of(name, sys._getframe(1)), bytes_, 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls the operator again with local tensors
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if _runs_on_host(tensors, args, kwargs):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if self.paused:
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        inputs = [tensor for tensor in tensors if is_on_device(tensor)]
        made_up = self._read_by_host(name, [tensor for tensor in tensors if isinstance(tensor, FakeTensor)])
        if made_up is not None:
            return made_up
        if func._schema.name in OPDEFS and inputs:
            return self._run_custom_op(func, args, kwargs)
        if name in ("_to_copy", "copy_"):
            self._copy(name, args, kwargs)
        pins = bool(kwargs.pop("pin_memory", None))
        for tensor in inputs:
            self._see(tensor, name)
        args, kwargs = tree_map(self._as_fake, (args, kwargs))
        out = _out_of_dtype_matmul(func, args, kwargs)
        out = func(*args, **kwargs) if out is None else out
        outputs = [value for value in tree_leaves(out) if isinstance(value, FakeTensor)]
        for tensor in outputs:
            if is_on_device(tensor):
                self._see(tensor, name)
            elif pins:
                self.pinned.see(tensor)
        if inputs or any(map(is_on_device, outputs)):
            self._record(name, func, args, kwargs, out, inputs)
        return out

    def _run_custom_op(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the host code of a custom operator, and compare its result with that of its fake implementation."""
        with self:
            out = OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        self.paused, before = True, self.paused
        try:
            expected = func(*args, **kwargs)
        finally:
            self.paused = before
        for real, fake in zip(tree_leaves(out), tree_leaves(expected), strict=True):
            properties = [(t.shape, t.stride(), t.dtype, t.device) for t in (real, fake)]
            assert properties[0] == properties[1], (func, *properties)
        return out

    def _as_fake(self, value: Any) -> Any:
        is_real = isinstance(value, Tensor) and not isinstance(value, FakeTensor) and value.device.type == "cpu"
        return self._mode.from_tensor(value) if is_real else value

    def _read_by_host(self, name: str, inputs: list[Tensor]) -> Any:
        """Count operators whose result the host must wait for; return a made-up result if they have one."""
        if not inputs:
            return None
        first = inputs[0]
        if name in ("_local_scalar_dense", "item"):
            if is_on_device(first):
                self.sync("item")
            return False if first.dtype == torch.bool else 2.0 if first.is_floating_point() else 1
        if not is_on_device(first):
            return None
        if name in ("nonzero", "masked_select"):
            self.sync(name)
            return first.new_empty(0, first.dim(), dtype=torch.int64)
        if name == "index" and inputs[-1].dtype == torch.bool:  # by a mask: no element is selected
            self.sync(name)
            return first.new_empty(0, *first.shape[inputs[-1].dim() :])
        if name in ("_unique2", "unique_dim", "equal"):
            self.sync(name)
        return None

    def _copy(self, name: str, args: Any, kwargs: Any) -> None:
        """Count a copy between host and device that blocks the host.

        A copy from pageable memory blocks even with ``non_blocking=True``: the driver copies it to a pinned buffer.
        """
        source = args[0] if name == "_to_copy" else args[1]
        target = torch.device(kwargs.get("device") or source.device) if name == "_to_copy" else args[0].device
        if {source.device.type, target.type} != {"cpu", "cuda"}:
            return
        is_async = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
        to_device = target.type == "cuda"
        host = source if to_device else args[0]
        pageable = isinstance(host, Tensor) and host.device.type == "cpu" and host not in self.pinned
        if not is_async or (to_device and pageable and host.numel()):
            kind = "copy to device" if to_device else "copy to host"
            self.sync(f"{kind} from pageable memory" if is_async else kind)

    def _see(self, tensor: Tensor, name: str) -> None:
        if tensor.untyped_storage() in self.device:
            return
        size = tensor.untyped_storage().nbytes()
        frame = sys._getframe(2)
        place = ops.place_of(frame) if size >= 2**20 else "small tensors"
        scope = self.scope
        self.device.see(tensor, f"{scope.phase}/{scope.part or '-'}: {place}: {name} {_shape(tensor, size)}")

    def _record(self, name: str, func: Any, args: Any, kwargs: Any, out: Any, inputs: list[Tensor]) -> None:
        namespace = func._schema.name.partition("::")[0]
        if namespace in ("c10d", "_c10d_functional"):
            work = self.collectives[self.scope, name]
            work.launches += 1
            work.bytes += max(map(ops.size_of, inputs), default=0)
        elif ops.launches_kernel(func):
            class_ = ops.class_of(name, sys._getframe(2))
            self._count(name, class_, ops.bytes_moved(func, args, kwargs, out), ops.flops(func, args, kwargs, out))

    def _count(self, name: str, class_: str, bytes_: int, flops: float) -> None:
        if self.paused:
            return
        for work in (self.work[self.scope, class_], self.by_name[self.scope, class_, name]):
            work.launches += 1
            work.bytes += bytes_
            work.flops += flops


def _shape(tensor: Tensor, size: int) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" if size >= 2**20 else ""


def _runs_on_host(tensors: list[Tensor], args: Any, kwargs: Any) -> bool:
    """Return whether an operator has only real CPU tensors or creates a small one, so that it can be computed."""
    if torch.device(kwargs.get("device") or "cpu").type != "cpu" or kwargs.get("pin_memory"):
        return False
    if not tensors:
        sizes = [math.prod(value) for value in args if isinstance(value, (list, tuple))]
        return max(sizes, default=0) < 2**20
    return not any(isinstance(tensor, FakeTensor) or tensor.device.type != "cpu" for tensor in tensors)


def _out_of_dtype_matmul(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Check matrix products with a float32 result of bf16 operands, and return ``out``; PyTorch has no fake for them.

    Returns None for other operators.
    """
    overloads = [getattr(getattr(torch.ops.aten, name), "dtype_out", None) for name in ("mm", "addmm")]
    if func not in overloads:
        return None
    out = kwargs["out"]
    a, b = [value for value in args if isinstance(value, Tensor)][-2:]
    assert out.dtype == torch.float32 and a.dtype == b.dtype == torch.bfloat16, (out, a, b)
    assert is_on_device(out) and is_on_device(a) and is_on_device(b), (out, a, b)
    assert a.shape[1] == b.shape[0] and out.shape == (a.shape[0], b.shape[1]), (out, a, b)
    return out


def made_up_list(watch: Watch, tensor: Tensor) -> Any:
    """Return what ``Tensor.tolist`` returns for a fake tensor; counts one sync if it is on the device."""
    if is_on_device(tensor):
        watch.sync("tolist")
    value: Any = True if tensor.dtype == torch.bool else 2.0 if tensor.is_floating_point() else 1

    def filled(shape: list[int]) -> Any:
        return [filled(shape[1:]) for _ in range(shape[0])] if shape else value

    assert math.prod(tensor.shape) < 10**6, tensor
    return filled(list(tensor.shape))
