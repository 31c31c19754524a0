"""The student's two passes over a chunk of logits, one Triton program per row; plain twins in ``loss.topk_reduction``.

``reduce_rows`` reads a row once, ``gradient_rows`` reads it once more and writes the gradient: two reads and one write
in total; the PyTorch twin needs about ten. Sums are float32 for any dtype of the logits.

Suffixes inside the kernels: K the kept ids, B a block of them, G x L a tile of the row: G runs of L adjacent logits.
A thread has the same lanes of all G runs, so that it sums a tile without other threads, with one maximum for G logits.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of logits and gradients."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_FAR = tl.constexpr(-1e30)
"""Replaces a distance of -inf that is multiplied by e^distance = 0: 0 * -inf would be NaN."""


class Launch(NamedTuple):
    """Launch parameters of a kernel that reads ``runs`` x ``lanes`` logits of a row at a time."""

    runs: int
    lanes: int
    num_warps: int


def launch(vocab: int, dtype: torch.dtype) -> Launch:
    """Return the launch for rows of ``vocab`` logits: each thread reads 16 bytes of each run."""
    per_thread = 16 // dtype.itemsize
    num_warps = 8 if vocab >= 16384 else 4 if vocab >= 2048 else 1
    return Launch(runs=4, lanes=32 * num_warps * per_thread, num_warps=num_warps)


def id_block(k: int) -> int:
    """Return the number of kept ids that a program processes at a time."""
    return min(int(triton.next_power_of_2(k)), 1024)


def reduce_rows(z_CV: Tensor, ids_CK: Tensor, inverse_temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the kept logits and the tail sums of each row; write -inf at the kept ids.

    The plain twin is ``loss.topk_reduction.reduce_in_place``.

    Args:
        z_CV: raw logits, float32 or bf16, with column stride 1; the row stride may exceed V. Overwritten at the ids.
        ids_CK: int32 or int64 in [0, V), no id twice in a row; -1 is padding.
        inverse_temperature: factor of the logits in all outputs.

    Returns:
        float32: logits_CK (-inf for padding), and of the tail the largest logit m_C, the sum of e^(z - m), and the sum
        of (z - m) e^(z - m). An empty tail (all -inf) has m = -inf and sums of 0. A NaN logit makes the sums NaN.

    Raises ``ValueError`` for other dtypes, shapes or strides. Ids out of range are not detected.
    """
    _check_rows("z_CV", z_CV)
    _check_ids(z_CV, ids_CK)
    (rows, vocab), k = z_CV.shape, ids_CK.shape[1]
    logits_CK = torch.empty(rows, k, dtype=torch.float32, device=z_CV.device)
    tail_max_C, tail_sum_C, tail_product_C = (torch.empty_like(logits_CK[:, 0]) for _ in range(3))
    if rows:
        tile = launch(vocab, z_CV.dtype)
        with torch.cuda.device(z_CV.device) if z_CV.is_cuda else nullcontext():
            _reduce[(rows,)](
                z_CV,
                ids_CK.contiguous(),
                logits_CK,
                tail_max_C,
                tail_sum_C,
                tail_product_C,
                z_CV.stride(0),
                vocab,
                k,
                inverse_temperature,
                BLOCK=id_block(k),
                RUNS=tile.runs,
                LANES=tile.lanes,
                num_warps=tile.num_warps,
                enable_fp_fusion=True,
            )
    return logits_CK, tail_max_C, tail_sum_C, tail_product_C


def gradient_rows(
    z_CV: Tensor,
    ids_CK: Tensor,
    tail_max_C: Tensor,
    factor_C: Tensor,
    slope_C: Tensor | None,
    d_logits_CK: Tensor,
    inverse_temperature: float,
    out_CV: Tensor,
) -> Tensor:
    """Write the gradient of each row: e^(z - m) (factor + slope (z - m)) in the tail, ``d_logits_CK`` at the kept ids.

    The plain twin is ``loss.topk_reduction.TorchReduced.gradient``.

    Args:
        z_CV: the raw logits as ``reduce_rows`` left them, -inf at the kept ids.
        ids_CK: the same ids.
        tail_max_C: float32, m; an m of -inf means an empty tail, whose gradient is 0 for any factor and slope.
        factor_C: float32.
        slope_C: float32; None means 0 and is faster.
        d_logits_CK: float32; not read at padding.
        inverse_temperature: as for ``reduce_rows``; it scales z only, not the gradient.
        out_CV: float32 or bf16, column stride 1; every column is written. It may be ``z_CV`` itself.

    Returns:
        ``out_CV``.

    Raises ``ValueError`` for other dtypes, shapes or strides.
    """
    _check_rows("z_CV", z_CV)
    _check_rows("out_CV", out_CV)
    _check_ids(z_CV, ids_CK)
    (rows, vocab), k = z_CV.shape, ids_CK.shape[1]
    if out_CV.shape != z_CV.shape:
        raise ValueError(f"out_CV is {list(out_CV.shape)}, z_CV is {list(z_CV.shape)}")
    if out_CV.data_ptr() == z_CV.data_ptr() and (out_CV.dtype, out_CV.stride()) != (z_CV.dtype, z_CV.stride()):
        raise ValueError("out_CV and z_CV share memory but differ in dtype or row stride")
    per_row = {"tail_max_C": tail_max_C, "factor_C": factor_C} | ({} if slope_C is None else {"slope_C": slope_C})
    for name, numbers_C in per_row.items():
        _check_numbers(name, numbers_C, (rows,))
    _check_numbers("d_logits_CK", d_logits_CK, (rows, k))
    if rows:
        tile = launch(vocab, out_CV.dtype)
        with torch.cuda.device(z_CV.device) if z_CV.is_cuda else nullcontext():
            _gradient[(rows,)](
                z_CV,
                ids_CK.contiguous(),
                tail_max_C.contiguous(),
                factor_C.contiguous(),
                None if slope_C is None else slope_C.contiguous(),
                d_logits_CK.contiguous(),
                out_CV,
                z_CV.stride(0),
                out_CV.stride(0),
                vocab,
                k,
                inverse_temperature,
                BLOCK=id_block(k),
                RUNS=tile.runs,
                LANES=tile.lanes,
                num_warps=tile.num_warps,
                enable_fp_fusion=True,
            )
    return out_CV


@triton.jit  # type: ignore[untyped-decorator]
def _add_tile(
    z_GL: tl.tensor, top_L: tl.tensor, sum_L: tl.tensor, product_L: tl.tensor, to_log2: tl.tensor
) -> tl.tensor:
    """Return each lane's running maximum and sums, in raw logits, after one more tile."""
    new_top_L = tl.maximum(top_L, tl.max(z_GL, axis=0))
    # A lane with only -inf so far would compute -inf - -inf, which is NaN.
    base_L = tl.where(new_top_L == float("-inf"), 0.0, new_top_L)
    moved_L = tl.maximum(top_L - base_L, _FAR)
    shrink_L = tl.exp2(moved_L * to_log2)
    product_L = (product_L + sum_L * moved_L) * shrink_L
    # Subtract before dividing by the temperature: the difference of two near logits is exact.
    distance_GL = z_GL - base_L[None, :]
    mass_GL = tl.exp2(distance_GL * to_log2)  # without maximum(), which would hide a NaN
    product_L += tl.sum(mass_GL * tl.maximum(distance_GL, _FAR), axis=0)
    sum_L = sum_L * shrink_L + tl.sum(mass_GL, axis=0)
    return new_top_L, sum_L, product_L


@triton.jit  # type: ignore[untyped-decorator]
def _reduce(
    z_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    max_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    product_ptr: tl.tensor,
    z_stride: tl.tensor,
    vocab: tl.tensor,
    k: tl.tensor,
    inverse_temperature: tl.tensor,
    BLOCK: tl.constexpr,
    RUNS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # row * stride exceeds 32 bits
    z_ptr += row * z_stride
    for start in range(0, k, BLOCK):
        at_B = start + tl.arange(0, BLOCK)
        ids_B = tl.load(ids_ptr + row * k + at_B, mask=at_B < k, other=-1)
        logits_B = tl.load(z_ptr + ids_B, mask=ids_B >= 0, other=float("-inf")).to(tl.float32)
        tl.store(logits_ptr + row * k + at_B, logits_B * inverse_temperature, mask=at_B < k)
        # Several threads may read the same id: all must read before one writes.
        tl.debug_barrier()
        tl.store(z_ptr + ids_B, float("-inf"), mask=ids_B >= 0)
    tl.debug_barrier()

    to_log2 = inverse_temperature * _LOG2_E
    top_L = tl.full([LANES], float("-inf"), tl.float32)
    sum_L = tl.zeros([LANES], tl.float32)
    product_L = tl.zeros([LANES], tl.float32)
    at_GL = tl.arange(0, RUNS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    # The last tile is separate: a mask would prevent 16-byte loads in all tiles if V is not a multiple of 16.
    full = vocab // (RUNS * LANES) * (RUNS * LANES)
    for start in range(0, full, RUNS * LANES):
        z_GL = tl.load(z_ptr + (start + at_GL)).to(tl.float32)
        top_L, sum_L, product_L = _add_tile(z_GL, top_L, sum_L, product_L, to_log2)
    if full < vocab:
        z_GL = tl.load(z_ptr + (full + at_GL), mask=full + at_GL < vocab, other=float("-inf")).to(tl.float32)
        top_L, sum_L, product_L = _add_tile(z_GL, top_L, sum_L, product_L, to_log2)

    top = tl.max(top_L, axis=0)
    moved_L = tl.maximum(top_L - tl.where(top == float("-inf"), 0.0, top), _FAR)
    shrink_L = tl.exp2(moved_L * to_log2)
    tl.store(max_ptr + row, top * inverse_temperature)
    tl.store(sum_ptr + row, tl.sum(sum_L * shrink_L, axis=0))
    product = tl.sum((product_L + sum_L * moved_L) * shrink_L, axis=0)
    tl.store(product_ptr + row, product * inverse_temperature)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_of_tile(
    z_GL: tl.tensor, top: tl.tensor, factor: tl.tensor, slope: tl.tensor, inverse_temperature: tl.tensor
) -> tl.tensor:
    """Return the gradient of the tail's logits in a tile; ``slope`` may be None."""
    distance_GL = z_GL.to(tl.float32) * inverse_temperature - top
    mass_GL = tl.exp2(distance_GL * _LOG2_E)
    if slope is None:
        gradient_GL = mass_GL * factor
    else:
        # e^distance is 0 far below -1e4. _FAR is not used: the slope times it must stay finite.
        gradient_GL = mass_GL * (factor + slope * tl.maximum(distance_GL, -1e4))
    return gradient_GL


@triton.jit  # type: ignore[untyped-decorator]
def _gradient(
    z_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    max_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    slope_ptr: tl.tensor,
    d_logits_ptr: tl.tensor,
    out_ptr: tl.tensor,
    z_stride: tl.tensor,
    out_stride: tl.tensor,
    vocab: tl.tensor,
    k: tl.tensor,
    inverse_temperature: tl.tensor,
    BLOCK: tl.constexpr,
    RUNS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    out_ptr += row * out_stride
    top = tl.load(max_ptr + row)
    # The factor of an empty tail was divided by a sum of 0.
    empty = top == float("-inf")
    top = tl.where(empty, 0.0, top)
    factor = tl.where(empty, 0.0, tl.load(factor_ptr + row))
    slope = slope_ptr
    if slope_ptr is not None:
        slope = tl.where(empty, 0.0, tl.load(slope_ptr + row))

    at_GL = tl.arange(0, RUNS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    full = vocab // (RUNS * LANES) * (RUNS * LANES)
    for start in range(0, full, RUNS * LANES):
        z_GL = tl.load(z_ptr + (start + at_GL))
        gradient_GL = _gradient_of_tile(z_GL, top, factor, slope, inverse_temperature)
        tl.store(out_ptr + (start + at_GL), gradient_GL.to(out_ptr.dtype.element_ty))
    if full < vocab:
        inside_GL = full + at_GL < vocab
        z_GL = tl.load(z_ptr + (full + at_GL), mask=inside_GL, other=float("-inf"))
        gradient_GL = _gradient_of_tile(z_GL, top, factor, slope, inverse_temperature)
        tl.store(out_ptr + (full + at_GL), gradient_GL.to(out_ptr.dtype.element_ty), mask=inside_GL)

    tl.debug_barrier()  # the tail's pass has written 0 at the kept ids
    for start in range(0, k, BLOCK):
        at_B = start + tl.arange(0, BLOCK)
        ids_B = tl.load(ids_ptr + row * k + at_B, mask=at_B < k, other=-1)
        d_logits_B = tl.load(d_logits_ptr + row * k + at_B, mask=ids_B >= 0, other=0.0)
        tl.store(out_ptr + ids_B, d_logits_B.to(out_ptr.dtype.element_ty), mask=ids_B >= 0)


def _check_rows(name: str, rows_CV: Tensor) -> None:
    if rows_CV.dim() != 2 or rows_CV.dtype not in DTYPES:
        raise ValueError(f"{name} must be [C, V], float32 or bf16, not {list(rows_CV.shape)}, {rows_CV.dtype}")
    if rows_CV.stride(1) != 1 and rows_CV.shape[1] > 1:
        raise ValueError(f"{name} must have column stride 1, not {rows_CV.stride(1)}")


def _check_ids(z_CV: Tensor, ids_CK: Tensor) -> None:
    if ids_CK.dim() != 2 or ids_CK.shape[0] != z_CV.shape[0] or ids_CK.shape[1] < 1:
        raise ValueError(f"ids_CK must be [{z_CV.shape[0]}, K >= 1], not {list(ids_CK.shape)}")
    if ids_CK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids_CK must be int32 or int64, not {ids_CK.dtype}")


def _check_numbers(name: str, numbers: Tensor, shape: tuple[int, ...]) -> None:
    if numbers.dtype != torch.float32 or numbers.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, float32, not {list(numbers.shape)}, {numbers.dtype}")
