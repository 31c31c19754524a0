"""Triton kernels for the exact top-k of each row of logits, with log tail mass and entropy.

The kernels read the logits little more than once. The reference implementation is
``loss.targets.TeacherScorer.topk_of_ids`` with the ids of ``torch.topk``. No kernel makes the host wait for the device.

1. ``_scan_tiles`` reads a row in tiles and writes the largest logit of each tile. Let t be the k-th largest of these
   maxima. Then k tiles have a logit of at least t, so t is a lower bound of the k-th largest logit.
2. ``_select`` reads again only the tiles with a maximum of at least t, about k tiles. Their logits of at least t are
   the candidates, usually few more than k. The kernel selects the k largest candidates.
3. With hundreds of equal logits, which occur in bf16, the candidates can overflow their buffer. ``_select`` marks such
   a row, and ``_full_row`` computes it. ``_full_row`` needs no buffer, but it reads the row in every bisection step.

A tile is not contiguous: it consists of ``W / VEC`` runs of 16 bytes, with a large stride. A single thread reads a
complete tile, so it computes the tile's maximum and sums without communication, which would take longer than the read.
This layout also distributes adjacent logits, which are often large together, over many tiles.

Suffixes of names in the kernels: R x S x VEC a group of S tiles with R runs of VEC adjacent logits each, T the tiles of
a row, G the groups of a row, B a block of logits, A the candidate buffer.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TILED_K = 2048
"""Largest k for which tiles are used.

For a larger k, or a k close to the vocabulary size, ``_full_row`` computes all rows.
"""

_GROUP = 8192
"""Number of logits that a program of ``_scan_tiles`` reads: 64 per thread, which fit into registers."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_FAR = tl.constexpr(-1e30)
"""Finite replacement of a logit difference of -inf: exp(-inf) * -inf would be NaN."""
_LOWEST = tl.constexpr(-(2**31))
"""Key below the keys of all float32 values; see ``_key``."""
_HIGHEST = tl.constexpr(2**31 - 1)
"""Key of NaN; see ``_key``."""


class Tiling(NamedTuple):
    """Numbers and sizes of the tiles of a row."""

    width: int
    """Number of logits in a tile."""
    per_group: int
    """Number of tiles in a group; a group is a contiguous range of logits."""
    groups: int
    """Number of groups in a row; the last group may extend past the end of the row."""
    room: int
    """Number of candidates that the buffer of a row can hold."""

    @property
    def tiles(self) -> int:
        """Return the number of tiles of a row, including tiles past the end of the row."""
        return self.per_group * self.groups


def tiling(vocab: int, k: int) -> Tiling | None:
    """Return the tiling for the ``k`` largest of ``vocab`` logits; None if ``_full_row`` is as fast.

    The memory traffic consists of two 4-byte numbers per tile, written and read, and of about k tiles that are read
    again. It is smallest for a width of about sqrt(2 V / k). With few tiles in comparison to k, nearly all logits would
    be candidates; then the result is None.
    """
    width = 64
    while width > 8 and width * width * k > 4 * vocab:
        width //= 2
    if k > MAX_TILED_K or 4 * -(-vocab // width) < 5 * k:
        return None
    group = min(_GROUP, max(_power_of_2(vocab), width))
    return Tiling(width, group // width, -(-vocab // group), _power_of_2(3 * k))


def topk_ids(z_CV: Tensor, k: int) -> Tensor:
    """Return the exact ids of the ``k`` largest logits of each row; among equal logits the lowest ids.

    The reference implementation is ``torch.topk``.

    Args:
        z_CV: logits, float32 or bf16, with column stride 1; the row stride may exceed V. If it is a multiple of 16, the
            kernels use 16-byte loads. Logits may be -inf. In a row with NaN the ids are distinct and in range, but
            otherwise undefined.
        k: number of ids, from 1 to V.

    Returns:
        int32 [C, K]; the order within a row is arbitrary, but equal for equal inputs.

    Raises ``ValueError`` for other dtypes, shapes, strides or values of k.
    """
    return _topk(z_CV, k, inverse_temperature=None)[0]


def topk_with_tail(z_CV: Tensor, k: int, inverse_temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the ids of ``topk_ids`` with log-probs, log tail mass and entropy.

    The reference implementation is ``loss.targets.TeacherScorer.topk_of_ids`` with ``TorchKernels``.

    Args:
        z_CV: raw logits, as for ``topk_ids``.
        k: number of ids, from 1 to V; with k = V the tail is empty.
        inverse_temperature: 1 / temperature, above 0; all outputs use the logits multiplied by it.

    Returns:
        ids [C, K] (int32), log-probs [C, K], log tail mass [C] and entropy [C] (float32, nats). Log-probs and entropy
        are those of the complete row. The log tail mass is computed from the tail alone, so it is precise for a small
        tail; it is -inf for an empty tail. A row with NaN or +inf has NaN among its log-probs.

    Raises ``ValueError`` as ``topk_ids`` does, and for an inverse temperature that is not above 0.
    """
    if not inverse_temperature > 0:
        raise ValueError(f"inverse_temperature must be above 0, not {inverse_temperature}")
    return _topk(z_CV, k, inverse_temperature)


def _topk(z_CV: Tensor, k: int, inverse_temperature: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ids, log-probs, log tail mass and entropy; the last three are empty without temperature."""
    _check(z_CV, k)
    (rows, vocab), device = z_CV.shape, z_CV.device
    stats = inverse_temperature is not None
    ids_CK = torch.empty(rows, k, dtype=torch.int32, device=device)
    logprobs_CK = torch.empty(rows, k if stats else 0, dtype=torch.float32, device=device)
    log_tail_C, entropy_C = (torch.empty(rows if stats else 0, dtype=torch.float32, device=device) for _ in range(2))
    outputs = (ids_CK, logprobs_CK, log_tail_C, entropy_C)
    if rows == 0:
        return outputs
    cut = tiling(vocab, k)
    full_row_C = torch.empty(rows, dtype=torch.int32, device=device)
    rest = (vocab, z_CV.stride(0), inverse_temperature or 1.0)
    with torch.cuda.device(device) if z_CV.is_cuda else nullcontext():
        if cut is None:
            full_row_C.fill_(1)
        else:
            _by_tiles(z_CV, cut, full_row_C, outputs, rest, k, stats)
        block = min(_power_of_2(vocab), 4096)
        _full_row[(rows,)](z_CV, full_row_C, *outputs, *rest, K=k, STATS=stats, BLOCK=block, num_warps=8)
    return outputs


def _by_tiles(
    z_CV: Tensor,
    cut: Tiling,
    full_row_C: Tensor,
    outputs: tuple[Tensor, ...],
    rest: tuple[int, int, float],
    k: int,
    stats: bool,
) -> None:
    """Compute the outputs of all rows by tiles.

    Sets ``full_row_C`` to 1 for rows that ``_full_row`` must compute, and to 0 for the other rows.
    """
    (rows, vocab), device = z_CV.shape, z_CV.device
    top_CT = torch.empty(rows, cut.tiles, dtype=torch.float32, device=device)
    sum_CT = torch.empty_like(top_CT) if stats else top_CT
    groups_C3G = torch.empty(rows if stats else 0, 3, cut.groups, dtype=torch.float32, device=device)
    found_C3A = torch.empty(rows, 3, cut.room, dtype=torch.int32, device=device)
    shape = {"W": cut.width, "S": cut.per_group, "VEC": min(16 // z_CV.element_size(), cut.width), "STATS": stats}
    _scan_tiles[(rows * cut.groups,)](
        z_CV, top_CT, sum_CT, groups_C3G, *rest, cut.groups, **shape, num_warps=4 if vocab >= 1024 else 1
    )
    tiles = _power_of_2(cut.tiles)
    # 16 tiles and 16 candidates per thread. The steps of a row are short and sequential, so throughput depends on the
    # number of concurrent rows. With 64 registers per thread a multiprocessor runs 1024 threads, with few spills.
    num_warps = min(max(max(tiles, cut.room) // 512, 4), 32)
    _select[(rows,)](
        *(z_CV, top_CT, sum_CT, groups_C3G, found_C3A, full_row_C, *outputs, *rest, cut.groups),
        **{**shape, "K": k, "TILES": tiles, "GROUPS": _power_of_2(cut.groups), "ROOM": cut.room},
        BLOCK=min(256 * num_warps, 4096),
        num_warps=num_warps,
        maxnreg=64,
    )


def _check(z_CV: Tensor, k: int) -> None:
    if z_CV.dim() != 2 or z_CV.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"z_CV must be [C, V], float32 or bf16, not {list(z_CV.shape)}, {z_CV.dtype}")
    if z_CV.stride(1) != 1 and z_CV.shape[1] > 1:
        raise ValueError(f"z_CV must have column stride 1, not {z_CV.stride(1)}")
    if not 1 <= k <= z_CV.shape[1]:
        raise ValueError(f"k must be between 1 and the number of columns, {z_CV.shape[1]}, not {k}")


def _power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is at least ``number``."""
    return 1 << max(number - 1, 0).bit_length()


@triton.jit  # type: ignore[untyped-decorator]
def _key(z: tl.tensor) -> tl.tensor:
    """Return int32 keys that sort like the float32 values; -0 equals 0, and NaN has the largest key."""
    bits = z.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(z == 0.0, 0, key)
    return tl.where(z != z, _HIGHEST, key)


@triton.jit  # type: ignore[untyped-decorator]
def _number(key: tl.tensor) -> tl.tensor:
    """Return the float32 value of a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _finite(top: tl.tensor) -> tl.tensor:
    """Return ``top``, with -inf replaced by 0, because -inf - -inf would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit  # type: ignore[untyped-decorator]
def _threshold(keys: tl.tensor, k: tl.tensor, slack: tl.tensor, low: tl.tensor) -> tl.tensor:
    """Return a bound such that k to k + ``slack`` keys are at least the bound, by bisection.

    If no such bound exists, the result is the k-th largest key. At least k keys must be at least ``low``. The search
    stops at the first suitable bound, usually after ten to twenty of at most 32 steps.
    """
    low = low.to(tl.int64)
    high = tl.max(keys, axis=0).to(tl.int64)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        count = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), axis=0)
        high = tl.where(count < k, middle - 1, tl.where(count <= k + slack, middle, high))
        low = tl.where(count < k, low, middle)
    return low.to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _add_sum(z: tl.tensor, taken: tl.tensor, top: tl.tensor, total: tl.tensor, to_log2: tl.tensor) -> tl.tensor:
    """Add the selected entries of ``z`` to a tail; return its maximum m and sum of exp(z - m)."""
    z = tl.where(taken, z, float("-inf"))
    new_top = tl.maximum(top, tl.max(z, axis=0))
    base = _finite(new_top)
    total = total * tl.exp2((top - base) * to_log2) + tl.sum(tl.exp2((z - base) * to_log2), axis=0)
    return new_top, total


@triton.jit  # type: ignore[untyped-decorator]
def _join(top_X: tl.tensor, sum_X: tl.tensor, product_X: tl.tensor, to_log2: tl.tensor) -> tl.tensor:
    """Combine partial results: the maximum m and the sums of exp(z - m) and (z - m) exp(z - m)."""
    top = tl.max(top_X, axis=0)
    moved_X = tl.maximum(top_X - _finite(top), _FAR)
    shrink_X = tl.exp2(moved_X * to_log2)
    return top, tl.sum(sum_X * shrink_X, axis=0), tl.sum((product_X + sum_X * moved_X) * shrink_X, axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _scan_tiles(
    z_ptr: tl.tensor,
    top_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    groups_ptr: tl.tensor,
    vocab: tl.tensor,
    z_stride: tl.tensor,
    inverse_temperature: tl.tensor,
    groups: tl.tensor,
    W: tl.constexpr,
    S: tl.constexpr,
    VEC: tl.constexpr,
    STATS: tl.constexpr,
) -> None:
    """Write the largest logit m and the sum of exp(z - m) of each tile.

    For each group of tiles also write m, the sum of exp(z - m), and the sum of (z - m) exp(z - m). m is a raw logit:
    subtracting before scaling by the temperature makes the difference of two close logits exact.
    """
    row = tl.program_id(0).to(tl.int64) // groups  # row * stride can exceed 32 bits
    group = tl.program_id(0) % groups
    z_ptr += row * z_stride
    runs_R11 = tl.arange(0, W // VEC)[:, None, None] * (S * VEC)
    column_RSV = runs_R11 + tl.arange(0, S)[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
    column_RSV += group * (S * W)
    if (group + 1) * (S * W) <= vocab:  # a mask prevents 16-byte loads if V is not a multiple of 16
        z_RSV = tl.load(z_ptr + column_RSV)
    else:
        z_RSV = tl.load(z_ptr + column_RSV, mask=column_RSV < vocab, other=float("-inf"))
    z_RSV = z_RSV.to(tl.float32)
    top_S = tl.max(tl.max(z_RSV, axis=0), axis=1)  # first the axis within a thread
    at_S = (row * groups + group) * S + tl.arange(0, S)
    tl.store(top_ptr + at_S, top_S)
    if STATS:
        to_log2 = inverse_temperature * _LOG2_E
        base_S = _finite(top_S)
        distance_RSV = z_RSV - base_S[None, :, None]
        mass_RSV = tl.exp2(distance_RSV * to_log2)
        sum_S = tl.sum(tl.sum(mass_RSV, axis=0), axis=1)
        tl.store(sum_ptr + at_S, sum_S)
        # maximum() hides a NaN difference, but then mass_RSV is NaN.
        product_S = tl.sum(tl.sum(mass_RSV * tl.maximum(distance_RSV, _FAR), axis=0), axis=1)
        top, total, product = _join(top_S, sum_S, product_S, to_log2)
        groups_ptr += row * 3 * groups + group
        tl.store(groups_ptr, top)
        tl.store(groups_ptr + groups, total)
        tl.store(groups_ptr + 2 * groups, product)


@triton.jit  # type: ignore[untyped-decorator]
def _select(
    z_ptr: tl.tensor,
    top_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    groups_ptr: tl.tensor,
    found_ptr: tl.tensor,
    full_row_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    logprobs_ptr: tl.tensor,
    log_tail_ptr: tl.tensor,
    entropy_ptr: tl.tensor,
    vocab: tl.tensor,
    z_stride: tl.tensor,
    inverse_temperature: tl.tensor,
    groups: tl.tensor,
    K: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    VEC: tl.constexpr,
    STATS: tl.constexpr,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the outputs of a row from its tiles, or mark the row if its candidates overflow the buffer."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_stride
    keys_ptr = found_ptr + row * 3 * ROOM
    columns_ptr, tiles_ptr = keys_ptr + ROOM, keys_ptr + 2 * ROOM
    to_log2 = inverse_temperature * _LOG2_E

    # Choose the tiles to read again. Exclude tiles past the end of the row, which would lengthen the search.
    tile_T = tl.arange(0, TILES)
    real_T = (tile_T < groups * S) & (tile_T // S * (S * W) + tile_T % S * VEC < vocab)
    top_T = tl.load(top_ptr + row * groups * S + tile_T, mask=real_T, other=float("-inf"))
    key_T = tl.where(real_T, _key(top_T), _LOWEST)
    least = tl.min(tl.where(real_T, key_T, _HIGHEST), axis=0)
    bound = _threshold(key_T, K, K // 8, least)
    chosen_T = key_T >= bound
    chosen = tl.sum(chosen_T.to(tl.int32), axis=0)
    slot_T = tl.cumsum(chosen_T.to(tl.int32), axis=0) - 1
    tl.store(tiles_ptr + slot_T, tile_T, mask=chosen_T & (slot_T < ROOM))
    tail_top = tl.full([], float("-inf"), tl.float32)
    tail_sum = tl.full([], 0.0, tl.float32)
    if STATS:
        # Recompute the maxima from the keys, because keeping top_T would occupy registers.
        rest_T = tl.where(chosen_T | (key_T == _LOWEST), float("-inf"), _number(key_T))
        tail_top = tl.max(rest_T, axis=0)
        sum_T = tl.load(sum_ptr + row * groups * S + tile_T, mask=real_T & (key_T < bound), other=0.0)
        tail_sum = tl.sum(sum_T * tl.exp2((rest_T - _finite(tail_top)) * to_log2), axis=0)

    # Split the logits of the chosen tiles into candidates and tail.
    tl.debug_barrier()  # wait for the stores to tiles_ptr by other threads
    count = tl.full([], 0, tl.int32)
    for start in range(0, tl.minimum(chosen, ROOM) * W, BLOCK):
        lane_B = start + tl.arange(0, BLOCK)
        held_B = lane_B < tl.minimum(chosen, ROOM) * W
        tile_B = tl.load(tiles_ptr + lane_B // W, mask=held_B, other=0)
        within_B = lane_B % W
        column_B = tile_B // S * (S * W) + tile_B % S * VEC + within_B // VEC * (S * VEC) + within_B % VEC
        held_B = held_B & (column_B < vocab)
        z_B = tl.load(z_ptr + column_B, mask=held_B, other=float("-inf")).to(tl.float32)
        key_B = _key(z_B)
        candidate_B = held_B & (key_B >= bound)
        place_B = count + tl.cumsum(candidate_B.to(tl.int32), axis=0) - 1
        room_B = candidate_B & (place_B < ROOM)
        tl.store(keys_ptr + place_B, key_B, mask=room_B)
        tl.store(columns_ptr + place_B, column_B, mask=room_B)
        count += tl.sum(candidate_B.to(tl.int32), axis=0)
        if STATS:
            tail_top, tail_sum = _add_sum(z_B, held_B & (key_B < bound), tail_top, tail_sum, to_log2)
    overflow = (chosen > ROOM) | (count > ROOM)
    tl.store(full_row_ptr + row, overflow.to(tl.int32))

    # Select the k largest candidates, and among equal candidates the lowest ids.
    tl.debug_barrier()
    live_A = tl.arange(0, ROOM) < count
    key_A = tl.load(keys_ptr + tl.arange(0, ROOM), mask=live_A, other=_LOWEST)
    column_A = tl.load(columns_ptr + tl.arange(0, ROOM), mask=live_A, other=0)
    kth = _threshold(key_A, K, 0, bound)
    need = K - tl.sum((key_A > kth).to(tl.int32), axis=0)
    ties = tl.sum((key_A == kth).to(tl.int32), axis=0)
    order_A = tl.where(key_A == kth, -column_A, _LOWEST)
    last = tl.full([], _LOWEST, tl.int32)
    if ties > need:
        last = _threshold(order_A, need, 0, -vocab)
    kept_A = (key_A > kth) | ((key_A == kth) & (order_A >= last))
    place_A = tl.cumsum(kept_A.to(tl.int32), axis=0) - 1
    kept_A = kept_A & (place_A < K)
    tl.store(ids_ptr + row * K + place_A, column_A, mask=kept_A)
    if STATS:
        tail_top, tail_sum = _add_sum(_number(key_A), live_A & (kept_A == 0), tail_top, tail_sum, to_log2)
        group_G = tl.arange(0, GROUPS)
        groups_ptr += row * 3 * groups
        group_top_G = tl.load(groups_ptr + group_G, mask=group_G < groups, other=float("-inf"))
        group_sum_G = tl.load(groups_ptr + groups + group_G, mask=group_G < groups, other=0.0)
        group_product_G = tl.load(groups_ptr + 2 * groups + group_G, mask=group_G < groups, other=0.0)
        top, total, product = _join(group_top_G, group_sum_G, group_product_G, to_log2)
        logprob_A = (_number(key_A) - top) * inverse_temperature - tl.log(total)
        tl.store(logprobs_ptr + row * K + place_A, logprob_A, mask=kept_A)
        tl.store(log_tail_ptr + row, (tail_top - top) * inverse_temperature + tl.log(tail_sum) - tl.log(total))
        tl.store(entropy_ptr + row, tl.log(total) - product * inverse_temperature / total)


@triton.jit  # type: ignore[untyped-decorator]
def _full_row(
    z_ptr: tl.tensor,
    full_row_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    logprobs_ptr: tl.tensor,
    log_tail_ptr: tl.tensor,
    entropy_ptr: tl.tensor,
    vocab: tl.tensor,
    z_stride: tl.tensor,
    inverse_temperature: tl.tensor,
    K: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the outputs of a marked row.

    At most 32 passes over the row find the k-th largest logit by bisection. Three more passes compute the search range,
    the sums and the outputs.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(full_row_ptr + row) == 0:
        return
    z_ptr += row * z_stride
    lane_B = tl.arange(0, BLOCK)
    to_log2 = inverse_temperature * _LOG2_E

    top_B = tl.full([BLOCK], float("-inf"), tl.float32)
    low_B = tl.full([BLOCK], _HIGHEST, tl.int32)
    high_B = tl.full([BLOCK], _LOWEST, tl.int32)
    for start in range(0, vocab, BLOCK):
        z_B = tl.load(z_ptr + start + lane_B, mask=start + lane_B < vocab, other=float("-inf")).to(tl.float32)
        top_B = tl.maximum(top_B, z_B)
        low_B = tl.minimum(low_B, tl.where(start + lane_B < vocab, _key(z_B), _HIGHEST))
        high_B = tl.maximum(high_B, _key(z_B))
    low, high = tl.min(low_B, axis=0).to(tl.int64), tl.max(high_B, axis=0).to(tl.int64)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        count_B = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocab, BLOCK):
            held_B = start + lane_B < vocab
            z_B = tl.load(z_ptr + start + lane_B, mask=held_B, other=float("-inf")).to(tl.float32)
            count_B += (held_B & (_key(z_B) >= middle.to(tl.int32))).to(tl.int32)
        count = tl.sum(count_B, axis=0)
        high = tl.where(count < K, middle - 1, tl.where(count == K, middle, high))
        low = tl.where(count < K, low, middle)
    kth = low.to(tl.int32)

    base = _finite(tl.max(top_B, axis=0))
    above_B = tl.zeros([BLOCK], tl.int32)
    sum_B = tl.zeros([BLOCK], tl.float32)
    product_B = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        z_B = tl.load(z_ptr + start + lane_B, mask=start + lane_B < vocab, other=float("-inf")).to(tl.float32)
        above_B += ((_key(z_B) > kth) & (start + lane_B < vocab)).to(tl.int32)
        if STATS:
            mass_B = tl.exp2((z_B - base) * to_log2)
            sum_B += mass_B
            product_B += mass_B * tl.maximum(z_B - base, _FAR)
    need = K - tl.sum(above_B, axis=0)
    total = tl.sum(sum_B, axis=0)

    kept = tl.full([], 0, tl.int32)
    ties = tl.full([], 0, tl.int32)
    tail_top = tl.full([], float("-inf"), tl.float32)
    tail_sum = tl.full([], 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        held_B = start + lane_B < vocab
        z_B = tl.load(z_ptr + start + lane_B, mask=held_B, other=float("-inf")).to(tl.float32)
        tie_B = held_B & (_key(z_B) == kth)
        rank_B = ties + tl.cumsum(tie_B.to(tl.int32), axis=0) - 1
        kept_B = (held_B & (_key(z_B) > kth)) | (tie_B & (rank_B < need))
        place_B = kept + tl.cumsum(kept_B.to(tl.int32), axis=0) - 1
        tl.store(ids_ptr + row * K + place_B, start + lane_B, mask=kept_B & (place_B < K))
        ties += tl.sum(tie_B.to(tl.int32), axis=0)
        kept += tl.sum(kept_B.to(tl.int32), axis=0)
        if STATS:
            logprob_B = (z_B - base) * inverse_temperature - tl.log(total)
            tl.store(logprobs_ptr + row * K + place_B, logprob_B, mask=kept_B & (place_B < K))
            tail_top, tail_sum = _add_sum(z_B, held_B & (kept_B == 0), tail_top, tail_sum, to_log2)
    if STATS:
        tl.store(log_tail_ptr + row, (tail_top - base) * inverse_temperature + tl.log(tail_sum) - tl.log(total))
        product = tl.sum(product_B, axis=0)
        tl.store(entropy_ptr + row, tl.log(total) - product * inverse_temperature / total)
