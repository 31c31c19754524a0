"""Triton kernels that ``distill.kernels.topk`` launches to compute the top-k of rows of logits.

The docstring of ``distill.kernels.topk`` describes the algorithm and the suffixes of names. A key is an int32 number
that represents a float32 logit; keys have the same order as their logits (see ``_key``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from distill.kernels.loss_student import add_tile

_LOG2_E = tl.constexpr(1.4426950408889634)
_FAR = tl.constexpr(-1e30)
"""Finite number that replaces a logit difference of -inf, because exp(-inf) * -inf would be NaN."""
_LOWEST = tl.constexpr(-(2**31))
"""Int32 number below all sort keys; ``_key`` converts a float32 logit to an int32 sort key."""
_HIGHEST = tl.constexpr(2**31 - 1)
"""Largest sort key, which represents NaN; ``_key`` converts a float32 logit to an int32 sort key."""


@triton.jit  # type: ignore[untyped-decorator]
def _key(z: tl.tensor) -> tl.tensor:
    """Return int32 sort keys of the float32 values ``z``, in the same order as the values.

    -0 and 0 have the same key, and NaN has the largest key.
    """
    bits = z.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(z == 0.0, 0, key)
    return tl.where(z != z, _HIGHEST, key)


@triton.jit  # type: ignore[untyped-decorator]
def _number(key: tl.tensor) -> tl.tensor:
    """Return the float32 value that has the int32 sort key ``key``; inverse of ``_key``."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _finite(top: tl.tensor) -> tl.tensor:
    """Return the maxima ``top`` with -inf replaced by 0, so that -inf - result is -inf and not NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit  # type: ignore[untyped-decorator]
def _threshold(keys: tl.tensor, k: tl.tensor, slack: tl.tensor, low: tl.tensor) -> tl.tensor:
    """Return an int32 threshold t for which the number of ``keys`` >= t is between k and k + ``slack``.

    If equal keys make this impossible, t is the k-th largest key. The search is a bisection that starts at ``low``; at
    least k keys must be >= ``low``. It stops at the first suitable threshold, usually after 10 to 20 of at most 32
    steps.
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
    """Add selected logits to the running maximum and sum of the tail (all tokens outside the top-k).

    ``taken`` is a mask that selects entries of the logits ``z``. ``top`` is the maximum m of the tail so far, and
    ``total`` the sum of exp((z - m) / temperature). ``to_log2`` is log2(e) / temperature. Returns the new maximum and
    sum.
    """
    z = tl.where(taken, z, float("-inf"))
    new_top = tl.maximum(top, tl.max(z, axis=0))
    base = _finite(new_top)
    total = total * tl.exp2((top - base) * to_log2) + tl.sum(tl.exp2((z - base) * to_log2), axis=0)
    return new_top, total


@triton.jit  # type: ignore[untyped-decorator]
def _join(top_X: tl.tensor, sum_X: tl.tensor, product_X: tl.tensor, to_log2: tl.tensor) -> tl.tensor:
    """Combine the maxima and sums of several sets of logits z into the maximum and sums of their union.

    For a set with maximum m (``top_X``), ``sum_X`` is the sum of w and ``product_X`` the sum of (z - m) w, with w =
    exp((z - m) / temperature). ``to_log2`` is log2(e) / temperature. Returns the maximum and the two sums.
    """
    top = tl.max(top_X, axis=0)
    moved_X = tl.maximum(top_X - _finite(top), _FAR)
    shrink_X = tl.exp2(moved_X * to_log2)
    return top, tl.sum(sum_X * shrink_X, axis=0), tl.sum((product_X + sum_X * moved_X) * shrink_X, axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def scan_tiles(
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
    """Write the maximum m and the sum of exp((z - m) / temperature) of each tile of a row of logits z.

    A tile is a set of logits that a single thread reads. One program processes one group of tiles. For the group it
    writes the maximum m, the same sum, and the sum of (z - m) exp((z - m) / temperature). m is not divided by the
    temperature, because the difference of two close raw logits is exact. Without ``STATS`` only the maxima of the tiles
    are written.
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
def select(
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
    """Write the top-k of a row with log tail mass and entropy, using the results of ``scan_tiles``.

    The log tail mass is the log of the total probability of all other tokens. A candidate is a logit that may belong to
    the top-k. If the row has more than ``ROOM`` candidates, the kernel writes 1 to ``full_row_ptr``, otherwise 0.
    Without ``STATS`` only the ids are written.
    """
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
def _block(z_ptr: tl.tensor, at: tl.tensor, start: tl.tensor, vocab: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Return the ``BLOCK`` logits of a row at the columns ``start + at`` in float32; -inf past the end of the row."""
    if start + BLOCK <= vocab:  # a mask prevents 16-byte loads if V is not a multiple of 16
        z = tl.load(z_ptr + (start + at))
    else:
        z = tl.load(z_ptr + (start + at), mask=start + at < vocab, other=float("-inf"))
    return z.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _digits(key_B: tl.tensor, low: tl.tensor, shift: tl.tensor, BINS: tl.constexpr) -> tl.tensor:
    """Return (key - ``low``) >> ``shift`` for int32 keys, limited to 0..``BINS`` - 1."""
    # An unsigned difference cannot overflow, even if the keys have different signs.
    offset_B = (tl.maximum(key_B, low) - low).to(tl.uint32, bitcast=True)
    return tl.minimum(offset_B >> shift.to(tl.uint32), BINS - 1).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _kth_key(
    z_ptr: tl.tensor,
    vocab: tl.tensor,
    k: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    BITS: tl.constexpr,
) -> tl.tensor:
    """Return the k-th largest key of a row, and the number of keys that equal it and belong to the top-k.

    ``low`` and ``high`` are the smallest and the largest key. The first pass over the row counts the keys in ``BINS``
    intervals of equal size. Each further pass divides the interval of the k-th largest key into 2 ** ``BITS`` =
    ``BINS`` / 2 intervals; keys above them are counted in the other bins. The search stops early if the top-k are the
    keys of complete intervals: the first result is then the lower end of the lowest of them, and the second one is k.
    """
    lane_B, bin_X = tl.arange(0, BLOCK), tl.arange(0, BINS)
    shift = tl.full([], 0, tl.int32)
    while ((high.to(tl.int64) - low.to(tl.int64)) >> shift) >= BINS:
        shift += 1
    need = tl.full([], 0, tl.int32)
    while need == 0:
        # Bin 0 also has the keys below the intervals. So only the sums from another bin to the last one are used.
        count_X = tl.zeros([BINS], tl.int32)
        for start in range(0, vocab, BLOCK):
            key_B = _key(_block(z_ptr, lane_B, start, vocab, BLOCK))
            count_X += tl.histogram(_digits(key_B, low, shift, BINS), BINS)
        from_X = tl.cumsum(count_X, axis=0, reverse=True)
        enough_X = (from_X >= k) | (bin_X == 0)
        chosen = tl.max(tl.where(enough_X, bin_X, 0), axis=0)
        above = tl.max(tl.where(enough_X, 0, from_X), axis=0)
        exact = tl.sum((enough_X & (bin_X > 0) & (from_X == k)).to(tl.int32), axis=0) > 0
        low = (low.to(tl.int64) + (chosen.to(tl.int64) << shift)).to(tl.int32)
        need = tl.where(exact, k, tl.where(shift == 0, k - above, 0))
        shift = tl.maximum(shift - BITS, 0)
    return low, need


@triton.jit  # type: ignore[untyped-decorator]
def full_row(
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
    LANES: tl.constexpr,
) -> None:
    """Write the top-k of a row with log tail mass and entropy, if ``full_row_ptr`` marks the row with 1.

    Rows marked with 0 are skipped. The log tail mass is the log of the total probability of all other tokens. Without
    ``STATS`` only the ids are written. The row is read once for the range of the keys and the sums, usually three times
    and at most six times to find the k-th largest key, and once to write the output. The first pass reads tiles of
    ``BLOCK`` logits as runs of ``LANES`` adjacent ones; a thread keeps one maximum and sums of each of its lanes.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(full_row_ptr + row) == 0:
        return
    z_ptr += row * z_stride
    to_log2 = inverse_temperature * _LOG2_E

    top_L = tl.full([LANES], float("-inf"), tl.float32)
    sum_L = tl.zeros([LANES], tl.float32)
    product_L = tl.zeros([LANES], tl.float32)
    low_L = tl.full([LANES], _HIGHEST, tl.int32)
    high_L = tl.full([LANES], _LOWEST, tl.int32)
    at_GL = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, vocab, BLOCK):
        z_GL = _block(z_ptr, at_GL, start, vocab, BLOCK)
        key_GL = _key(z_GL)
        low_L = tl.minimum(low_L, tl.min(tl.where(start + at_GL < vocab, key_GL, _HIGHEST), axis=0))
        high_L = tl.maximum(high_L, tl.max(key_GL, axis=0))
        if STATS:
            top_L, sum_L, product_L = add_tile(z_GL, top_L, sum_L, product_L, to_log2)
    top, total, product = _join(top_L, sum_L, product_L, to_log2)
    base = _finite(top)

    kth, need = _kth_key(z_ptr, vocab, K, tl.min(low_L, axis=0), tl.max(high_L, axis=0), BLOCK, 128, 6)

    lane_B = tl.arange(0, BLOCK)
    above = tl.full([], 0, tl.int32)
    ties = tl.full([], 0, tl.int32)
    tail_top = tl.full([], float("-inf"), tl.float32)
    tail_sum = tl.full([], 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        held_B = start + lane_B < vocab
        z_B = _block(z_ptr, lane_B, start, vocab, BLOCK)
        key_B = _key(z_B)
        above_B, tie_B = held_B & (key_B > kth), held_B & (key_B == kth)
        # One scan of two counts, of which the lower 16 bits have the ties: a block has at most 2 ** 15 logits.
        counts_B = tl.cumsum((above_B.to(tl.int32) << 16) + tie_B.to(tl.int32), axis=0)
        rank_B = ties + (counts_B & 0xFFFF)
        kept_B = above_B | (tie_B & (rank_B <= need))
        place_B = above + (counts_B >> 16) + tl.minimum(rank_B, need) - 1
        tl.store(ids_ptr + row * K + place_B, start + lane_B, mask=kept_B & (place_B < K))
        above += tl.sum(above_B.to(tl.int32), axis=0)
        ties += tl.sum(tie_B.to(tl.int32), axis=0)
        if STATS:
            logprob_B = (z_B - base) * inverse_temperature - tl.log(total)
            tl.store(logprobs_ptr + row * K + place_B, logprob_B, mask=kept_B & (place_B < K))
            tail_top, tail_sum = _add_sum(z_B, held_B & (kept_B == 0), tail_top, tail_sum, to_log2)
    if STATS:
        tl.store(log_tail_ptr + row, (tail_top - base) * inverse_temperature + tl.log(tail_sum) - tl.log(total))
        tl.store(entropy_ptr + row, tl.log(total) - product * inverse_temperature / total)
