"""RMSNorm of transformers' Llama, Qwen and Gemma layers in one Triton kernel for each direction.

The forward reads and writes each row once, the backward reads two rows and writes one; only the input is saved. The
computation is float32. Llama and Qwen round the normalized row to the dtype of the input and multiply it by the weight;
Gemma multiplies in float32 by 1 + weight. The reference implementations are the modules of transformers
(``LlamaRMSNorm``, ``Gemma3RMSNorm``). Triton programs add gradients of the weight in a fixed order, without atomics.

Suffixes of names in the kernels are axes: D = channels of a row.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes that the kernels of layers support."""
ROWS_PER_PROGRAM = 32
"""Rows of the backward whose gradients of the weight one Triton program adds."""


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which Triton launches kernels on the device of ``tensor``."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def check_tensors(first: Tensor, **others: Tensor | None) -> None:
    """Raise ``ValueError`` if a dtype is not supported, or if tensors have different dtypes or devices."""
    if first.dtype not in DTYPES:
        raise ValueError(f"the kernels of layers support float32 and bf16, not {first.dtype}")
    for name, other in others.items():
        if other is not None and (other.dtype, other.device) != (first.dtype, first.device):
            raise ValueError(f"{name} must be {first.dtype} on {first.device}, not {other.dtype} on {other.device}")


def warps_of(block: int) -> int:
    """Return the number of warps of a program that processes a row of ``block`` channels."""
    return min(max(block // 512, 1), 16)


@torch.library.custom_op("distill::rms_norm", mutates_args=(), schema="(Tensor x, Tensor w, float e, bool p) -> Tensor")
def rms_norm(x: Tensor, weight_D: Tensor, eps: float, one_plus: bool) -> Tensor:
    """Return the RMSNorm of ``x`` [..., D] over the last axis, times the weight; has a gradient.

    ``one_plus``: multiply by 1 + weight in float32, as Gemma does. ``x`` and ``weight_D`` have the same dtype, float32
    or bf16, else ``ValueError`` is raised.
    """
    check_tensors(x, weight=weight_D)
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    if x.numel():
        with on_device_of(x):
            _forward[(x.numel() // width,)](
                x, weight_D, out, eps, ONE_PLUS=one_plus, WIDTH=width, BLOCK=block, num_warps=warps_of(block)
            )
    return out


@torch.library.custom_op(
    "distill::rms_norm_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor x, Tensor w, float e, bool p) -> (Tensor, Tensor)",
)
def rms_norm_backward(d_out: Tensor, x: Tensor, weight_D: Tensor, eps: float, one_plus: bool) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``x``, and parts of the weight's gradient, float32 [P, D], to be summed over P.

    Each part belongs to ``ROWS_PER_PROGRAM`` rows. ``d_out`` is the gradient of the result of ``rms_norm``.
    """
    check_tensors(x, weight=weight_D, d_out=d_out)
    x, d_out = x.contiguous(), d_out.contiguous()
    width = x.shape[-1]
    rows, block = x.numel() // width, triton.next_power_of_2(width)
    d_x, parts_PD = torch.empty_like(x), _parts(x)
    if rows:
        with on_device_of(x):
            _backward[(len(parts_PD),)](
                d_out,
                x,
                weight_D,
                d_x,
                parts_PD,
                rows,
                eps,
                ONE_PLUS=one_plus,
                WIDTH=width,
                BLOCK=block,
                ROWS=ROWS_PER_PROGRAM,
                num_warps=warps_of(block),
            )
    return d_x, parts_PD


def _parts(x: Tensor) -> Tensor:
    programs = triton.cdiv(x.numel() // x.shape[-1], ROWS_PER_PROGRAM)
    return torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)


@rms_norm.register_fake
def _(x: Tensor, weight_D: Tensor, eps: float, one_plus: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@rms_norm_backward.register_fake
def _(d_out: Tensor, x: Tensor, weight_D: Tensor, eps: float, one_plus: bool) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), _parts(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_D, ctx.eps, ctx.one_plus = inputs
    ctx.save_for_backward(x, weight_D)


def _gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
    x, weight_D = ctx.saved_tensors
    d_x, parts_PD = torch.ops.distill.rms_norm_backward(d_out, x, weight_D, ctx.eps, ctx.one_plus)
    return d_x, parts_PD.sum(0).to(weight_D.dtype) if ctx.needs_input_grad[1] else None, None, None


rms_norm.register_autograd(_gradients, setup_context=_setup)


@triton.jit  # type: ignore[untyped-decorator]
def times_weight(unit: tl.tensor, weight: tl.tensor, ONE_PLUS: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """Return normalized values times the weight in float32, rounded as transformers rounds them."""
    if ONE_PLUS:
        out = unit * (1.0 + weight)
    else:
        out = unit.to(dtype).to(tl.float32) * weight
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _forward(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    eps: tl.tensor,
    ONE_PLUS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * WIDTH  # can exceed 32 bits
    at_D = tl.arange(0, BLOCK)
    inside_D = at_D < WIDTH
    x_D = tl.load(x_ptr + start + at_D, mask=inside_D, other=0.0).to(tl.float32)
    weight_D = tl.load(weight_ptr + at_D, mask=inside_D, other=0.0).to(tl.float32)
    unit_D = x_D * tl.rsqrt(tl.sum(x_D * x_D, axis=0) / WIDTH + eps)
    out_D = times_weight(unit_D, weight_D, ONE_PLUS, out_ptr.dtype.element_ty)
    tl.store(out_ptr + start + at_D, out_D.to(out_ptr.dtype.element_ty), mask=inside_D)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _backward(
    d_out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    d_x_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    ONE_PLUS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    first = program * ROWS
    at_D = tl.arange(0, BLOCK)
    inside_D = at_D < WIDTH
    scale_D = tl.load(weight_ptr + at_D, mask=inside_D, other=0.0).to(tl.float32)
    if ONE_PLUS:
        scale_D += 1.0
    part_D = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.minimum(rows - first, ROWS)):
        start = (first + row) * WIDTH
        x_D = tl.load(x_ptr + start + at_D, mask=inside_D, other=0.0).to(tl.float32)
        d_out_D = tl.load(d_out_ptr + start + at_D, mask=inside_D, other=0.0).to(tl.float32)
        d_unit_D = d_out_D * scale_D
        inverse = tl.rsqrt(tl.sum(x_D * x_D, axis=0) / WIDTH + eps)
        mean = tl.sum(d_unit_D * x_D, axis=0) * inverse / WIDTH
        unit_D = x_D * inverse
        d_x_D = (d_unit_D - unit_D * mean) * inverse
        tl.store(d_x_ptr + start + at_D, d_x_D.to(d_x_ptr.dtype.element_ty), mask=inside_D)
        part_D += d_out_D * unit_D
    tl.store(parts_ptr + program * WIDTH + at_D, part_D, mask=inside_D)
