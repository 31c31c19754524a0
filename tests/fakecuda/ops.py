"""Bytes moved, floating-point operations and class of one PyTorch operator call on fake CUDA tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tests.fakecuda.memory import is_on_device
from tests.fakecuda.preload import ROOT

MATMULS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "_scaled_mm"}
CLASSES = ("matmul", "attention", "elementwise", "fsdp", "head")
"""Classes of operators. ``head``: LM head, loss and top-k. ``fsdp``: copies of weights and gradients by FSDP."""

_NO_KERNEL = {"_unsafe_view", "lift_fresh", "set_", "resize_", "record_stream", "is_pinned", "_reshape_alias", "device"}
_EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}
_WRITE_ONLY = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "_foreach_copy_", "_foreach_zero_"}
_LOOKUPS = {"embedding", "index_select", "gather", "index"}
_DISTILL = str(ROOT / "distill") + "/"
_FSDP = str(Path(torch.__file__).parent / "distributed/fsdp") + "/"
_HEAD = tuple(_DISTILL + path for path in ("loss/", "kernels/topk", "kernels/loss_"))


def launches_kernel(func: Any) -> bool:
    """Return whether a call of ``func`` launches a kernel; views and empty tensors need none."""
    name = func._schema.name.partition("::")[2]
    return not (func.is_view or name in _NO_KERNEL or name in _EMPTY)


def size_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements; elements that a broadcast repeats count once."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride else 1
    return elements * tensor.element_size()


@cache
def _written(func: Any) -> frozenset[int]:
    arguments = enumerate(func._schema.arguments)
    return frozenset(i for i, argument in arguments if argument.alias_info and argument.alias_info.is_write)


def bytes_moved(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Return the bytes that the kernel of an operator reads and writes on the device."""
    name = func._schema.name.partition("::")[2]
    if name in _LOOKUPS:
        return 2 * _total(tree_leaves(out))
    if name == "all_gather_copy_in":  # one argument is the complete output of the all-gather
        return 2 * _total(tree_leaves(args[0]))
    written, moved = _written(func), 0
    mutated: set[int] = set()
    names = {argument.name: i for i, argument in enumerate(func._schema.arguments)}
    for i, value in [*enumerate(args), *((names[key], value) for key, value in kwargs.items())]:
        leaves = [leaf for leaf in tree_leaves(value) if is_on_device(leaf)]
        if i in written:
            mutated.update(map(id, leaves))
            overwrites = name in _WRITE_ONLY or func._schema.arguments[i].kwarg_only  # the argument "out"
            moved += _total(leaves) * (1 if overwrites else 2)
        else:
            moved += _total(leaves)
    return moved + _total(leaf for leaf in tree_leaves(out) if id(leaf) not in mutated)


def _total(values: Iterable[Any]) -> int:
    return sum(size_of(value) for value in values if is_on_device(value))


def flops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> float:
    """Return the floating-point operations of matrix products and attention; 0 for other operators."""
    if func._overloadpacket not in flop_registry:
        return 0.0
    try:
        return float(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
    except TypeError:  # overloads with other arguments, such as mm.dtype
        a, b = [leaf for leaf in args if isinstance(leaf, Tensor)][-2:]
        return 2.0 * a.shape[0] * a.shape[1] * b.shape[-1]


def class_of(name: str, frame: FrameType | None) -> str:
    """Return the class of the operator ``name`` that is called from ``frame``."""
    if "attn" in name or "attention" in name or "flash" in name:
        return "attention"
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_HEAD):
            return "head"
        if path.startswith(_FSDP):
            return "fsdp"
        frame = frame.f_back
    return "matmul" if name in MATMULS else "elementwise"


def place_of(frame: FrameType | None = None) -> str:
    """Return the innermost function of distill on the call stack, such as ``types.py View.to``.

    If the stack has none, return the innermost function of FSDP, or "autograd".
    """
    frame = frame or sys._getframe(1)
    fallback = "autograd"
    at: FrameType | None = frame
    while at is not None:
        path = at.f_code.co_filename
        if path.startswith(_DISTILL):
            return f"{path.removeprefix(_DISTILL)} {at.f_code.co_qualname}"
        if path.startswith(_FSDP) and fallback == "autograd":
            fallback = f"FSDP {at.f_code.co_qualname}"
        at = at.f_back
    return fallback
