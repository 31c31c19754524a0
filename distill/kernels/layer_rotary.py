"""RMSNorm of attention heads and rotary position embedding in one Triton kernel for each direction.

For queries or keys [T, H, Dh] with T positions and H heads of Dh channels, the forward reads and writes each head once;
only the input is saved. Without a norm (Llama, Qwen2), nothing but cos and sin is saved. The first and the second half
of a head's channels are rotated together. The computation is float32; the norm is rounded as in transformers, the
rotation once at the end. The reference implementations are ``Qwen3RMSNorm`` or ``Gemma3RMSNorm``, and
``apply_rotary_pos_emb`` of transformers.

Suffixes of names in the kernels are axes: R = rows of a tile (position and head), C = channels of half a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.kernels.layer_norm import check_tensors, on_device_of, times_weight

_TILE, _WARPS = 1024, 4
TILES_PER_PROGRAM = 16
"""Tiles of the backward whose gradients of the weight one Triton program adds."""


@torch.library.custom_op(
    "distill::rotary",
    mutates_args=(),
    schema="(Tensor x, Tensor? w, Tensor cos, Tensor sin, float e, bool p) -> Tensor",
)
def rotary(
    x_THC: Tensor, weight_C: Tensor | None, cos_TC: Tensor, sin_TC: Tensor, eps: float, one_plus: bool
) -> Tensor:
    """Return the rotated heads [T, H, Dh], normalized before if ``weight_C`` [Dh] is given; has a gradient.

    ``cos_TC`` and ``sin_TC`` [T, Dh]: cosine and sine of the rotary angles, with equal halves, as transformers computes
    them; they get no gradient. ``one_plus``: multiply by 1 + weight in float32, as Gemma does. All tensors have the
    same dtype, float32 or bf16, else ``ValueError`` is raised.
    """
    _check(x_THC, weight_C, cos_TC, sin_TC)
    x_THC, cos_TC, sin_TC = x_THC.contiguous(), cos_TC.contiguous(), sin_TC.contiguous()
    out_THC = torch.empty_like(x_THC)
    rows, shape = _shape(x_THC)
    if rows:
        with on_device_of(x_THC):
            _forward[(triton.cdiv(rows, shape["ROWS"]),)](
                x_THC, weight_C, cos_TC, sin_TC, out_THC, rows, eps, ONE_PLUS=one_plus, **shape, num_warps=_WARPS
            )
    return out_THC


@torch.library.custom_op(
    "distill::rotary_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor? x, Tensor? w, Tensor cos, Tensor sin, float e, bool p) -> (Tensor, Tensor)",
)
def rotary_backward(
    d_out_THC: Tensor,
    x_THC: Tensor | None,
    weight_C: Tensor | None,
    cos_TC: Tensor,
    sin_TC: Tensor,
    eps: float,
    one_plus: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``x_THC``, and parts of the weight's gradient, float32 [P, Dh], to be summed over P.

    ``x_THC`` and ``weight_C`` are None if the forward had no norm; there are then no parts (P = 0). ``d_out_THC`` is
    the gradient of the result of ``rotary``.
    """
    _check(d_out_THC, weight_C, cos_TC, sin_TC)
    d_out_THC, cos_TC, sin_TC = d_out_THC.contiguous(), cos_TC.contiguous(), sin_TC.contiguous()
    x_THC = None if x_THC is None else x_THC.contiguous()
    d_x_THC, parts_PC = torch.empty_like(d_out_THC), _parts(d_out_THC, weight_C)
    rows, shape = _shape(d_out_THC)
    if rows:
        tiles = 1 if weight_C is None else TILES_PER_PROGRAM
        with on_device_of(d_out_THC):
            _backward[(triton.cdiv(rows, shape["ROWS"] * tiles),)](
                d_out_THC,
                x_THC,
                weight_C,
                cos_TC,
                sin_TC,
                d_x_THC,
                parts_PC,
                rows,
                eps,
                ONE_PLUS=one_plus,
                TILES=tiles,
                **shape,
                num_warps=_WARPS,
            )
    return d_x_THC, parts_PC


def _check(x_THC: Tensor, weight_C: Tensor | None, cos_TC: Tensor, sin_TC: Tensor) -> None:
    check_tensors(x_THC, weight=weight_C, cos=cos_TC, sin=sin_TC)
    positions, _, channels = x_THC.shape
    if channels % 2 or cos_TC.shape != (positions, channels) or sin_TC.shape != cos_TC.shape:
        raise ValueError(f"heads {list(x_THC.shape)}, cos {list(cos_TC.shape)} and sin {list(sin_TC.shape)} do not fit")


def _shape(x_THC: Tensor) -> tuple[int, dict[str, int]]:
    """Return the number of rows (heads of all positions) and the constants of the kernels."""
    positions, heads, channels = x_THC.shape
    block = int(triton.next_power_of_2(channels // 2))
    return positions * heads, dict(HEADS=heads, HALF=channels // 2, BLOCK=block, ROWS=max(_TILE // block, 1))


def _parts(x_THC: Tensor, weight_C: Tensor | None) -> Tensor:
    rows, shape = _shape(x_THC)
    programs = 0 if weight_C is None else triton.cdiv(rows, shape["ROWS"] * TILES_PER_PROGRAM)
    return torch.empty(programs, x_THC.shape[2], dtype=torch.float32, device=x_THC.device)


@rotary.register_fake
def _(x_THC: Tensor, weight_C: Tensor | None, cos_TC: Tensor, sin_TC: Tensor, eps: float, one_plus: bool) -> Tensor:
    return torch.empty(x_THC.shape, dtype=x_THC.dtype, device=x_THC.device)


@rotary_backward.register_fake
def _(d_out_THC: Tensor, x_THC: Tensor | None, weight_C: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    d_x_THC = torch.empty(d_out_THC.shape, dtype=d_out_THC.dtype, device=d_out_THC.device)
    return d_x_THC, _parts(d_out_THC, weight_C)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_THC, weight_C, cos_TC, sin_TC, ctx.eps, ctx.one_plus = inputs
    ctx.save_for_backward(None if weight_C is None else x_THC, weight_C, cos_TC, sin_TC)


def _gradients(ctx: Any, d_out_THC: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # activation checkpointing allows only one access
    d_x_THC, parts_PC = torch.ops.distill.rotary_backward(d_out_THC, *saved, ctx.eps, ctx.one_plus)
    d_weight_C = parts_PC.sum(0).to(saved[1].dtype) if ctx.needs_input_grad[1] else None
    return d_x_THC, d_weight_C, None, None, None, None


rotary.register_autograd(_gradients, setup_context=_setup)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _forward(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    ONE_PLUS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at_C = tl.arange(0, BLOCK)
    inside_RC = (row_R < rows)[:, None] & (at_C < HALF)[None, :]
    at_RC = row_R[:, None] * (2 * HALF) + at_C[None, :]
    a_RC = tl.load(x_ptr + at_RC, mask=inside_RC, other=0.0).to(tl.float32)
    b_RC = tl.load(x_ptr + at_RC + HALF, mask=inside_RC, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        weight_a_C = tl.load(weight_ptr + at_C, mask=at_C < HALF, other=0.0).to(tl.float32)
        weight_b_C = tl.load(weight_ptr + HALF + at_C, mask=at_C < HALF, other=0.0).to(tl.float32)
        inverse_R = tl.rsqrt(tl.sum(a_RC * a_RC + b_RC * b_RC, axis=1) / (2 * HALF) + eps)
        a_RC = times_weight(a_RC * inverse_R[:, None], weight_a_C[None, :], ONE_PLUS, dtype).to(dtype).to(tl.float32)
        b_RC = times_weight(b_RC * inverse_R[:, None], weight_b_C[None, :], ONE_PLUS, dtype).to(dtype).to(tl.float32)
    angle_RC = (row_R // HEADS)[:, None] * (2 * HALF) + at_C[None, :]
    cos_RC = tl.load(cos_ptr + angle_RC, mask=inside_RC, other=0.0).to(tl.float32)
    sin_RC = tl.load(sin_ptr + angle_RC, mask=inside_RC, other=0.0).to(tl.float32)
    tl.store(out_ptr + at_RC, (a_RC * cos_RC - b_RC * sin_RC).to(dtype), mask=inside_RC)
    tl.store(out_ptr + at_RC + HALF, (b_RC * cos_RC + a_RC * sin_RC).to(dtype), mask=inside_RC)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _backward(
    d_out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    d_x_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    ONE_PLUS: tl.constexpr,
    TILES: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    dtype: tl.constexpr = d_x_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    at_C = tl.arange(0, BLOCK)
    part_a_RC = tl.zeros([ROWS, BLOCK], tl.float32)
    part_b_RC = tl.zeros([ROWS, BLOCK], tl.float32)
    if weight_ptr is not None:
        scale_a_C = tl.load(weight_ptr + at_C, mask=at_C < HALF, other=0.0).to(tl.float32)
        scale_b_C = tl.load(weight_ptr + HALF + at_C, mask=at_C < HALF, other=0.0).to(tl.float32)
        if ONE_PLUS:
            scale_a_C += 1.0
            scale_b_C += 1.0
    for tile in range(TILES):
        row_R = (program * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside_RC = (row_R < rows)[:, None] & (at_C < HALF)[None, :]
        at_RC = row_R[:, None] * (2 * HALF) + at_C[None, :]
        d_out_a_RC = tl.load(d_out_ptr + at_RC, mask=inside_RC, other=0.0).to(tl.float32)
        d_out_b_RC = tl.load(d_out_ptr + at_RC + HALF, mask=inside_RC, other=0.0).to(tl.float32)
        angle_RC = (row_R // HEADS)[:, None] * (2 * HALF) + at_C[None, :]
        cos_RC = tl.load(cos_ptr + angle_RC, mask=inside_RC, other=0.0).to(tl.float32)
        sin_RC = tl.load(sin_ptr + angle_RC, mask=inside_RC, other=0.0).to(tl.float32)
        d_a_RC = d_out_a_RC * cos_RC + d_out_b_RC * sin_RC
        d_b_RC = d_out_b_RC * cos_RC - d_out_a_RC * sin_RC
        if weight_ptr is not None:
            a_RC = tl.load(x_ptr + at_RC, mask=inside_RC, other=0.0).to(tl.float32)
            b_RC = tl.load(x_ptr + at_RC + HALF, mask=inside_RC, other=0.0).to(tl.float32)
            inverse_R = tl.rsqrt(tl.sum(a_RC * a_RC + b_RC * b_RC, axis=1) / (2 * HALF) + eps)
            a_RC *= inverse_R[:, None]
            b_RC *= inverse_R[:, None]
            part_a_RC += d_a_RC * a_RC
            part_b_RC += d_b_RC * b_RC
            d_a_RC *= scale_a_C[None, :]
            d_b_RC *= scale_b_C[None, :]
            mean_R = tl.sum(d_a_RC * a_RC + d_b_RC * b_RC, axis=1) / (2 * HALF)
            d_a_RC = (d_a_RC - a_RC * mean_R[:, None]) * inverse_R[:, None]
            d_b_RC = (d_b_RC - b_RC * mean_R[:, None]) * inverse_R[:, None]
        tl.store(d_x_ptr + at_RC, d_a_RC.to(dtype), mask=inside_RC)
        tl.store(d_x_ptr + at_RC + HALF, d_b_RC.to(dtype), mask=inside_RC)
    if weight_ptr is not None:
        part_ptr = parts_ptr + program * (2 * HALF)
        tl.store(part_ptr + at_C, tl.sum(part_a_RC, axis=0), mask=at_C < HALF)
        tl.store(part_ptr + HALF + at_C, tl.sum(part_b_RC, axis=0), mask=at_C < HALF)
