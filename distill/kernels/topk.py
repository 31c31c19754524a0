"""Triton kernels for the exact top-k of each row of logits, with log tail mass and entropy.

The log tail mass is the log of the total probability of all tokens outside the top-k. Usually the kernels read all
logits once, and a small part of them twice. The reference implementation is ``loss.targets.TeacherScorer.topk_of_ids``
with the ids of ``torch.topk``. No kernel makes the host wait for the device.

1. ``scan_tiles`` reads a row in tiles and writes the largest logit of each tile. Let t be the k-th largest of these
   maxima. Then k tiles have a logit of at least t, so t is a lower bound of the k-th largest logit.
2. ``select`` reads again only the tiles with a maximum of at least t, about k tiles. Their logits of at least t are the
   candidates, usually a few more than k. The kernel selects the k largest candidates.
3. With hundreds of equal logits, which occur in bf16, the candidates can overflow their buffer. ``select`` marks such a
   row, and ``full_row`` computes it. ``full_row`` needs no buffer, but it usually reads the row five times: it
   counts the logits in 128 intervals, then in 64 parts of the interval of the k-th largest logit, and so on.

A tile is not contiguous: it consists of ``W / VEC`` runs of 16 bytes, with a large stride. A single thread reads a
complete tile, so it computes the tile's maximum and sums without communication, which would take longer than the read.
This layout also distributes adjacent logits, which are often large together, over many tiles.

Suffixes of names in the kernels are axes: R = runs of a tile, S = tiles of a group, VEC = adjacent logits of a run, T =
tiles of a row, G = groups of a row, B = a block of logits, A = entries of the candidate buffer.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from distill.kernels.topk_programs import full_row, scan_tiles, select

MAX_TILED_K = 2048
"""Largest k for which the algorithm with tiles (``scan_tiles`` and ``select``) is used.

For a larger k, or a k close to the vocabulary size, the kernel ``full_row`` computes all rows.
"""

_GROUP = 8192
"""Number of logits that one program of the kernel ``scan_tiles`` reads.

Each thread reads 64 of them, which fit into registers.
"""


class Tiling(NamedTuple):
    """Division of a row of logits into groups of tiles.

    A tile is a set of logits that a single thread reads. A group is a contiguous range of logits that consists of
    tiles.
    """

    width: int
    """Number of logits in a tile."""
    per_group: int
    """Number of tiles in a group; a group is a contiguous range of logits of the row."""
    groups: int
    """Number of groups in a row; the last group may extend past the end of the row."""
    room: int
    """Size of the buffer for a row's candidates, the logits that may belong to the top-k."""

    @property
    def tiles(self) -> int:
        """Return the number of tiles in all groups of a row, including tiles past the end of the row."""
        return self.per_group * self.groups


def tiling(vocab: int, k: int) -> Tiling | None:
    """Return the division of rows of ``vocab`` logits into tiles for a top-``k``.

    Returns None if k is above ``MAX_TILED_K``, or if a row has few tiles in comparison to k. In the second case nearly
    all logits would be candidates for the top-k, so tiles would not be faster than the kernel ``full_row``. The tile
    width of about sqrt(2 * vocab / k) minimises the additional memory traffic: two 4-byte numbers are written and read
    for each tile, and about k tiles are read again.
    """
    width = 64
    while width > 8 and width * width * k > 4 * vocab:
        width //= 2
    if k > MAX_TILED_K or 4 * -(-vocab // width) < 5 * k:
        return None
    group = min(_GROUP, max(_power_of_2(vocab), width))
    return Tiling(width, group // width, -(-vocab // group), _power_of_2(3 * k))


def topk_ids(z_CV: Tensor, k: int) -> Tensor:
    """Return the exact ids (columns) of the ``k`` largest logits of each row.

    If several logits equal the k-th largest, the lowest of their ids are returned. The reference implementation is
    ``torch.topk``.

    Args:
        z_CV: logits, float32 or bf16, with column stride 1; the row stride may exceed V. If the row stride is a
            multiple of 16 elements, the kernels use 16-byte loads. Logits may be -inf. In a row with NaN the ids are
            distinct and in range, but otherwise undefined.
        k: number of ids, from 1 to V.

    Returns:
        int32 [C, k] for C rows; the order within a row is arbitrary, but equal for equal inputs.

    Raises ``ValueError`` for other dtypes, shapes, strides or values of k.
    """
    return _topk(z_CV, k, inverse_temperature=None)[0]


def topk_with_tail(z_CV: Tensor, k: int, inverse_temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the ids of the ``k`` largest logits of each row, with log-probs, log tail mass and entropy.

    The log tail mass is the log of the total probability of all other tokens. The reference implementation is
    ``loss.targets.TeacherScorer.topk_of_ids`` with ``TorchKernels``.

    Args:
        z_CV: raw logits, with the dtypes and strides that ``topk_ids`` supports.
        k: number of ids, from 1 to V; with k = V the tail is empty.
        inverse_temperature: 1 / temperature, above 0; all outputs use the logits multiplied by it.

    Returns:
        ids [C, K] (int32), log-probs [C, K], log tail mass [C] and entropy [C] (float32, nats). Log-probs and entropy
        are those of the complete row. The log tail mass is computed from the other tokens alone, so it is precise even
        if it is small; it is -inf for k = V. A row with NaN or +inf has NaN among its log-probs.

    Raises ``ValueError`` as ``topk_ids`` does, and for an inverse temperature that is not above 0.
    """
    if not inverse_temperature > 0:
        raise ValueError(f"inverse_temperature must be above 0, but is {inverse_temperature}")
    return _topk(z_CV, k, inverse_temperature)


def _topk(z_CV: Tensor, k: int, inverse_temperature: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the top-k of each row: ids and log-probs [C, K], log tail mass and entropy [C].

    The log tail mass is the log of the total probability of all other tokens. The entropy is that of the complete row.
    If ``inverse_temperature`` is None, only the ids are computed, and the other results have no elements.
    """
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
        block = min(max(_power_of_2(vocab), 128), 2048)
        lanes = min(block, 128 * 16 // z_CV.element_size())  # 16 bytes for each thread
        full_row[(rows,)](z_CV, full_row_C, *outputs, *rest, K=k, STATS=stats, BLOCK=block, LANES=lanes, num_warps=4)
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
    """Write the top-k of all rows to ``outputs``, with the kernels ``scan_tiles`` and ``select``.

    ``outputs`` has the tensors for ids, log-probs, log tail mass and entropy. Without ``stats`` only the ids are
    written. ``cut`` is the division of a row into tiles. ``rest`` has the vocabulary size, the row stride and
    1 / temperature. A row with too many candidates for the top-k overflows its buffer: the kernel ``full_row`` must
    compute it later. ``full_row_C`` is set to 1 for these rows, and to 0 for all other rows.
    """
    (rows, vocab), device = z_CV.shape, z_CV.device
    top_CT = torch.empty(rows, cut.tiles, dtype=torch.float32, device=device)
    sum_CT = torch.empty_like(top_CT) if stats else top_CT
    groups_C3G = torch.empty(rows if stats else 0, 3, cut.groups, dtype=torch.float32, device=device)
    found_C3A = torch.empty(rows, 3, cut.room, dtype=torch.int32, device=device)
    shape = {"W": cut.width, "S": cut.per_group, "VEC": min(16 // z_CV.element_size(), cut.width), "STATS": stats}
    scan_tiles[(rows * cut.groups,)](
        z_CV, top_CT, sum_CT, groups_C3G, *rest, cut.groups, **shape, num_warps=4 if vocab >= 1024 else 1
    )
    tiles = _power_of_2(cut.tiles)
    # 16 tiles and 16 candidates per thread. The steps of a row are short and sequential, so throughput depends on the
    # number of concurrent rows. With 64 registers per thread a multiprocessor runs 1024 threads, with few spills.
    num_warps = min(max(max(tiles, cut.room) // 512, 4), 32)
    select[(rows,)](
        *(z_CV, top_CT, sum_CT, groups_C3G, found_C3A, full_row_C, *outputs, *rest, cut.groups),
        **{**shape, "K": k, "TILES": tiles, "GROUPS": _power_of_2(cut.groups), "ROOM": cut.room},
        BLOCK=min(256 * num_warps, 4096),
        num_warps=num_warps,
        maxnreg=64,
    )


def _check(z_CV: Tensor, k: int) -> None:
    if z_CV.dim() != 2 or z_CV.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"z_CV must be a [C, V] tensor of float32 or bf16, not {z_CV.dtype} of shape {list(z_CV.shape)}"
        )
    if z_CV.stride(1) != 1 and z_CV.shape[1] > 1:
        raise ValueError(f"z_CV must have stride 1 in the last dimension, but has stride {z_CV.stride(1)}")
    if not 1 <= k <= z_CV.shape[1]:
        raise ValueError(f"k must be from 1 to the number of columns of z_CV, {z_CV.shape[1]}, but is {k}")


def _power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is at least ``number``."""
    return 1 << max(number - 1, 0).bit_length()
