"""Triton kernels that reduce the student's logits and compute the gradient of the logits.

A row has the logits of one response token. Its kept ids are the K token ids of a top-k; its tail consists of all other
logits. ``reduce_rows`` reads the logits once and reduces each row to the logits at the kept ids and three numbers about
the tail. ``gradient_rows`` reads the logits again and writes the gradient. The reference implementations in
``loss.topk_reduction`` need about ten passes over the logits. Each Triton program processes one row. Sums are float32
for all dtypes.

Suffixes of names in the kernels are axes: K = kept ids, B = a block of kept ids, GL = a tile, which has G runs of L
adjacent logits. Each thread processes the same lanes (indices in 0..L-1) of all G runs. It can therefore sum a tile
without communication between threads, and it updates the running maximum once per G logits.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of logits and gradients that the kernels support."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_FAR = tl.constexpr(-1e30)
"""Finite number that replaces a logit difference of -inf, because exp(-inf) * -inf would be NaN."""


class Launch(NamedTuple):
    """Launch parameters of a Triton kernel that reads a row of logits in tiles of ``runs`` x ``lanes``.

    A tile consists of ``runs`` runs of ``lanes`` adjacent logits. ``num_warps`` is the number of warps of the program.
    """

    runs: int
    lanes: int
    num_warps: int


def launch(vocab: int, dtype: torch.dtype) -> Launch:
    """Return the launch parameters for rows of ``vocab`` logits of ``dtype``.

    Each thread reads 16 bytes of each run.
    """
    per_thread = 16 // dtype.itemsize
    num_warps = 8 if vocab >= 16384 else 4 if vocab >= 2048 else 1
    return Launch(runs=4, lanes=32 * num_warps * per_thread, num_warps=num_warps)


def id_block(k: int) -> int:
    """Return the number of top-k ids per iteration of a kernel's loop over the ``k`` ids of a row.

    It is a power of 2, at most 1024.
    """
    return min(int(triton.next_power_of_2(k)), 1024)


def reduce_rows(z_CV: Tensor, ids_CK: Tensor, inverse_temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the logits at the kept ids (the top-k), and three numbers about the tail of each row.

    The tail consists of all other logits of the row. Overwrites the logits in ``z_CV`` at the kept ids with -inf. The
    reference implementation is ``loss.topk_reduction.reduce_in_place``.

    Args:
        z_CV: raw logits, float32 or bf16, with column stride 1; the row stride may exceed V.
        ids_CK: kept ids (columns of ``z_CV``), int32 or int64 in [0, V), distinct within a row; -1 is padding.
        inverse_temperature: 1 / temperature; all outputs are computed from z = logit * inverse_temperature.

    Returns:
        Four float32 tensors: z at the kept ids [C, K] (-inf for padding), m = the largest z of the tail [C], the sum of
        exp(z - m) over the tail [C], and the sum of (z - m) exp(z - m) over the tail [C]. If all logits of the tail are
        -inf, m is -inf and the sums are 0. If a logit is NaN, the sums are NaN.

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
    """Write the gradient of the loss with respect to the student's logits to ``out_CV``.

    At the kept ids (the top-k) the gradient is ``d_logits_CK``. At any other logit it is
    exp(z - m) * (factor + slope * (z - m)), with z = logit * ``inverse_temperature`` and m = ``tail_max_C``. The
    reference implementation is ``loss.topk_reduction.TorchReduced.gradient``.

    Args:
        z_CV: the raw logits after ``reduce_rows``, with -inf at the kept ids.
        ids_CK: the kept ids that were passed to ``reduce_rows``.
        tail_max_C: float32, m from ``reduce_rows``; if it is -inf, the tail is empty and has gradient 0.
        factor_C: float32, the factor of each row.
        slope_C: float32, the slope of each row; None means 0 and is faster.
        d_logits_CK: float32, the gradient at the kept ids; ignored at padding.
        inverse_temperature: 1 / temperature; it scales the logits, but not the gradient.
        out_CV: float32 or bf16 with column stride 1; it may be ``z_CV`` itself.

    Returns:
        ``out_CV``.

    Raises ``ValueError`` for other dtypes, shapes or strides.
    """
    _check_rows("z_CV", z_CV)
    _check_rows("out_CV", out_CV)
    _check_ids(z_CV, ids_CK)
    (rows, vocab), k = z_CV.shape, ids_CK.shape[1]
    if out_CV.shape != z_CV.shape:
        raise ValueError(f"out_CV must have the shape of z_CV, {list(z_CV.shape)}, but has shape {list(out_CV.shape)}")
    if out_CV.data_ptr() == z_CV.data_ptr() and (out_CV.dtype, out_CV.stride()) != (z_CV.dtype, z_CV.stride()):
        raise ValueError("out_CV and z_CV share memory, but they have different dtypes or row strides")
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
def add_tile(
    z_GL: tl.tensor, top_L: tl.tensor, sum_L: tl.tensor, product_L: tl.tensor, to_log2: tl.tensor
) -> tl.tensor:
    """Update the running maximum and the two running sums of each column with a tile of raw logits z.

    The columns are those of the tile ``z_GL``. ``top_L`` is the maximum m of each column. ``sum_L`` and ``product_L``
    are the sums of w and of (z - m) w, with w = exp((z - m) / temperature). ``to_log2`` is log2(e) / temperature.
    Returns the new maximum and sums.
    """
    new_top_L = tl.maximum(top_L, tl.max(z_GL, axis=0))
    # If a lane has only read -inf, -inf - -inf would be NaN.
    base_L = tl.where(new_top_L == float("-inf"), 0.0, new_top_L)
    moved_L = tl.maximum(top_L - base_L, _FAR)
    shrink_L = tl.exp2(moved_L * to_log2)
    product_L = (product_L + sum_L * moved_L) * shrink_L
    # Subtract before scaling: the difference of two close logits is exact.
    distance_GL = z_GL - base_L[None, :]
    mass_GL = tl.exp2(distance_GL * to_log2)  # no maximum() here: it would hide a NaN
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
    row = tl.program_id(0).to(tl.int64)  # row * stride can exceed 32 bits
    z_ptr += row * z_stride
    for start in range(0, k, BLOCK):
        at_B = start + tl.arange(0, BLOCK)
        ids_B = tl.load(ids_ptr + row * k + at_B, mask=at_B < k, other=-1)
        logits_B = tl.load(z_ptr + ids_B, mask=ids_B >= 0, other=float("-inf")).to(tl.float32)
        tl.store(logits_ptr + row * k + at_B, logits_B * inverse_temperature, mask=at_B < k)
        # Several threads may read the same logit: all must read before a thread overwrites it.
        tl.debug_barrier()
        tl.store(z_ptr + ids_B, float("-inf"), mask=ids_B >= 0)
    tl.debug_barrier()

    to_log2 = inverse_temperature * _LOG2_E
    top_L = tl.full([LANES], float("-inf"), tl.float32)
    sum_L = tl.zeros([LANES], tl.float32)
    product_L = tl.zeros([LANES], tl.float32)
    at_GL = tl.arange(0, RUNS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    # Only the last tile uses a mask: a mask prevents 16-byte loads if V is not a multiple of 16.
    full = vocab // (RUNS * LANES) * (RUNS * LANES)
    for start in range(0, full, RUNS * LANES):
        z_GL = tl.load(z_ptr + (start + at_GL)).to(tl.float32)
        top_L, sum_L, product_L = add_tile(z_GL, top_L, sum_L, product_L, to_log2)
    if full < vocab:
        z_GL = tl.load(z_ptr + (full + at_GL), mask=full + at_GL < vocab, other=float("-inf")).to(tl.float32)
        top_L, sum_L, product_L = add_tile(z_GL, top_L, sum_L, product_L, to_log2)

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
    """Return exp(z - top) * (factor + slope * (z - top)) for a tile of raw logits.

    z is logit / temperature, and ``top`` the largest z of the tail of the row. ``slope=None`` means 0.
    """
    distance_GL = z_GL.to(tl.float32) * inverse_temperature - top
    mass_GL = tl.exp2(distance_GL * _LOG2_E)
    if slope is None:
        gradient_GL = mass_GL * factor
    else:
        # exp(-1e4) is 0. _FAR is not used here: slope * _FAR could overflow.
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
    # The factor of an empty tail is not finite: it was divided by a sum of 0.
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

    tl.debug_barrier()  # the loop above has written 0 at the kept ids
    for start in range(0, k, BLOCK):
        at_B = start + tl.arange(0, BLOCK)
        ids_B = tl.load(ids_ptr + row * k + at_B, mask=at_B < k, other=-1)
        d_logits_B = tl.load(d_logits_ptr + row * k + at_B, mask=ids_B >= 0, other=0.0)
        tl.store(out_ptr + ids_B, d_logits_B.to(out_ptr.dtype.element_ty), mask=ids_B >= 0)


def _check_rows(name: str, rows_CV: Tensor) -> None:
    if rows_CV.dim() != 2 or rows_CV.dtype not in DTYPES:
        raise ValueError(
            f"{name} must be a [C, V] tensor of float32 or bf16, not {rows_CV.dtype} of shape {list(rows_CV.shape)}"
        )
    if rows_CV.stride(1) != 1 and rows_CV.shape[1] > 1:
        raise ValueError(f"{name} must have stride 1 in the last dimension, but has stride {rows_CV.stride(1)}")


def _check_ids(z_CV: Tensor, ids_CK: Tensor) -> None:
    if ids_CK.dim() != 2 or ids_CK.shape[0] != z_CV.shape[0] or ids_CK.shape[1] < 1:
        raise ValueError(f"ids_CK must have shape [{z_CV.shape[0]}, K] with K >= 1, but has shape {list(ids_CK.shape)}")
    if ids_CK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids_CK must have dtype int32 or int64, but has {ids_CK.dtype}")


def _check_numbers(name: str, numbers: Tensor, shape: tuple[int, ...]) -> None:
    if numbers.dtype != torch.float32 or numbers.shape != shape:
        raise ValueError(
            f"{name} must be float32 of shape {list(shape)}, not {numbers.dtype} of shape {list(numbers.shape)}"
        )
