"""Causal attention for packed sequences: no padding, and no attention between sequences."""

from __future__ import annotations

from functools import lru_cache
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from distill.model.ulysses import UlyssesAllToAll
from distill.types import SharedPrefixes

PACKED = "distill_packed"
"""Value of transformers' ``attn_implementation`` that selects ``packed_attention``.

The model's forward then requires the argument ``packed_bounds``, the cumulative sequence lengths.
"""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_bounds: tuple[int, ...],
    packed_shared: SharedPrefixes | None = None,
    packed_all_to_all: UlyssesAllToAll | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed_bounds_B: Tensor | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """Compute causal attention separately for each sequence of a packed micro-batch.

    ``query`` is [1, H, T, Dh]; ``key`` and ``value`` are [1, H_kv, T, Dh]: H query heads, H_kv key-value heads, T
    positions, Dh channels per head. ``packed_bounds``: B + 1 cumulative lengths of the B sequences, from 0;
    ``packed_bounds_B``: the same as an int32 tensor on the device, or None. Returns the attention output [1, T, H, Dh],
    and None instead of attention weights. Creates no [T, T] mask. Applies no dropout, because dropout would add noise
    to the student but not to the teacher.

    With ``packed_shared``, a prefix that several sequences share occurs only once among the T positions. The T
    positions are first expanded to the S positions of all sequences. A shared prefix has the same outputs in all
    sequences, so only its first copy is returned. The gradients of the prefix's keys and values are summed over the
    sequences.

    With ``packed_all_to_all``, the positions are split over the ranks of its process group: T is the number of
    positions on this rank, and the call is collective over this group.
    """
    assert attention_mask is None, "packed_attention supports no attention mask"
    assert not unused.get("softcap"), "packed_attention supports no soft cap"
    dtype = query.dtype
    if packed_all_to_all is not None:
        query, key, value = packed_all_to_all.heads(query, key, value)
    if packed_shared is not None:
        query, key, value = (_expand(heads, packed_shared.expand_S) for heads in (query, key, value))
    if dtype == torch.bfloat16 and not query.is_cuda:
        # On CPUs PyTorch's bf16 kernel is half as fast as its float32 kernel and rounds intermediate results.
        query, key, value = query.float(), key.float(), value.float()
    attended = _attend(query, key, value, packed_bounds, packed_bounds_B, scaling, sliding_window).to(dtype)
    if packed_shared is not None:
        attended = attended.index_select(1, packed_shared.source_T)
    if packed_all_to_all is not None:
        attended = packed_all_to_all.positions(attended)
    return attended, None


def _expand(heads: Tensor, expand_S: Tensor) -> Tensor:
    """Copy each position of ``heads`` to all sequences that share it: [1, H, T, Dh] -> [1, H, S, Dh].

    ``expand_S`` maps each of the S positions of the sequences to its index among the T input positions. ``heads`` is
    transposed before it is indexed, because the projections store it as [T, H, Dh] in memory.
    """
    return heads.transpose(1, 2).index_select(1, expand_S).transpose(1, 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[int, ...],
    bounds_B: Tensor | None,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Compute causal attention separately for each sequence, with the fastest supported kernel.

    ``query`` is [1, H, S, Dh]; ``key`` and ``value`` are [1, H_kv, S, Dh]: H query heads, H_kv key-value heads, S
    tokens of all sequences, Dh channels per head. ``bounds``: cumulative sequence lengths, from 0 to S. ``bounds_B``:
    as in ``attend_packed``. ``window``: size of the sliding window in tokens, or None for full causal attention.
    Returns [1, S, H, Dh].
    """
    assert query.shape[0] == 1 and query.shape[2] == bounds[-1], (query.shape, bounds)
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (0, 0)
    if supports_packed_kernel(query.dtype, query.shape[-1], capability):
        return attend_packed(query, key, value, bounds, scaling, window, bounds_B)
    return attend_per_sequence(query, key, value, bounds, scaling, window)


def supports_packed_kernel(dtype: torch.dtype, channels: int, capability: tuple[int, int]) -> bool:
    """Return whether flash attention supports this dtype, number of channels per head and GPU.

    ``capability`` is the GPU's compute capability (major, minor), or (0, 0) without a GPU.
    """
    return dtype in (torch.bfloat16, torch.float16) and channels % 8 == 0 and channels <= 256 and capability >= (8, 0)


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[int, ...],
    scaling: float | None,
    window: int | None,
    bounds_B: Tensor | None = None,
) -> Tensor:
    """Compute the causal attention of all sequences in one flash-attention call.

    ``query`` is [1, H, S, Dh]; ``key`` and ``value`` are [1, H_kv, S, Dh]: H query heads, H_kv key-value heads, S
    tokens of all sequences, Dh channels per head. ``bounds``: cumulative sequence lengths, from 0 to S. ``window``:
    size of the sliding window in tokens, or None for full causal attention. ``bounds_B``: ``bounds`` as an int32 tensor
    [B + 1] on the device; None: it is made from ``bounds``, which waits for the device. Returns [1, S, H, Dh].
    """
    # Imported here, because the import takes a second and only GPUs need it.
    from torch.nn.attention.varlen import varlen_attn

    cumulative = _cumulative(bounds, query.device) if bounds_B is None else bounds_B
    longest = max(stop - start for start, stop in pairwise(bounds))
    before = -1 if window is None or longest <= window else window - 1  # number of previous tokens; -1: all
    options: dict[str, Any] = {"scale": scaling, "window_size": (before, 0)}
    if "enable_gqa" in signature(varlen_attn).parameters:  # not an option of older versions
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    q_SHD, k_SHD, v_SHD = (heads[0].transpose(0, 1) for heads in (query, key, value))
    attended = varlen_attn(q_SHD, k_SHD, v_SHD, cumulative, cumulative, longest, longest, **options)
    assert isinstance(attended, Tensor)  # varlen_attn returns a tuple only if more outputs are requested
    return attended[None]


@lru_cache(maxsize=4)
def _cumulative(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the cumulative lengths ``bounds`` of B sequences as an int32 tensor [B + 1] on ``device``.

    Cached, because all layers of a model use the same tensor.
    """
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def attend_per_sequence(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], scaling: float | None, window: int | None
) -> Tensor:
    """Compute causal attention with one PyTorch call per sequence.

    The arguments and the result are those of ``attend_packed``: ``query`` is [1, H, S, Dh], and ``bounds`` are the
    cumulative lengths of the packed sequences. This simple implementation works for every dtype and device. If the
    sliding window is shorter than a sequence of L tokens, a mask [L, L] is created for this sequence.
    """
    if query.is_cuda and query.dtype == torch.float32 and query.shape[1] != key.shape[1]:
        # PyTorch's memory-efficient kernel needs equal numbers of heads; otherwise it makes a matrix [L, L] per head.
        key, value = (heads.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for heads in (key, value))
    lengths = [stop - start for start, stop in pairwise(bounds)]
    parts = []
    # torch.split instead of slices: the backward of each slice would allocate zeros for all sequences.
    for q, k, v in zip(*(torch.split(heads, lengths, 2) for heads in (query, key, value)), strict=True):
        length = q.shape[2]
        mask = None if window is None or length <= window else _window_mask(length, window, q.device)
        part = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


AttentionInterface.register(PACKED, packed_attention)
