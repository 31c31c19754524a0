"""Attention over packed sequences: each sees itself and its own past, none its neighbours, and nothing is padded."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from distill.model.exchange import Exchange
from distill.types import Shared

PACKED = "distill_packed"
"""The name under which transformers knows it (``attn_implementation``); the model's forward takes ``packed_bounds``."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_bounds: tuple[int, ...],
    packed_shared: Shared | None = None,
    packed_exchange: Exchange | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence of a pack, one call of PyTorch's own kernel a sequence.

    ``query`` [1, H, T, Dh], ``key`` and ``value`` [1, H_kv, T, Dh]; ``packed_bounds`` are B + 1 cumulative lengths;
    returns [1, T, H, Dh]. Dropout is left out on purpose: teacher and student read the same text, and noise in one of
    them is no signal. No [T, T] mask is made; a sliding window makes one of a single sequence's length.

    With ``packed_shared`` the T positions are spread over the S places of all sequences first, a common prefix standing
    in each. It comes out the same in all of them, so the first is kept; gradients of the others' keys and values add
    up at the one position.
    """
    assert attention_mask is None, "a pack has bounds, not a mask"
    assert not unused.get("softcap"), "soft-capped attention is refused when the model is loaded"
    dtype = query.dtype
    if packed_exchange is not None:
        query, key, value = packed_exchange.heads(query, key, value)
    if packed_shared is not None:
        query, key, value = (_spread(heads, packed_shared.spread_S) for heads in (query, key, value))
    if dtype == torch.bfloat16 and not query.is_cuda:
        # PyTorch's kernel for the CPU takes twice as long in bf16, and rounds inside.
        query, key, value = query.float(), key.float(), value.float()
    attended = _attend(query, key, value, packed_bounds, scaling, sliding_window).to(dtype)
    if packed_shared is not None:
        attended = attended.index_select(1, packed_shared.first_T)
    if packed_exchange is not None:
        attended = packed_exchange.positions(attended)
    return attended, None


def _spread(heads: Tensor, spread_S: Tensor) -> Tensor:
    """[1, H, T, Dh] to [1, H, S, Dh]; transposed, because heads come as columns of [T, H * Dh]."""
    return heads.transpose(1, 2).index_select(1, spread_S).transpose(1, 2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], scaling: float | None, window: int | None
) -> Tensor:
    """[1, S, H, Dh] from queries [1, H, S, Dh], keys and values."""
    assert query.shape[0] == 1 and query.shape[2] == bounds[-1], (query.shape, bounds)
    lengths = [stop - start for start, stop in pairwise(bounds)]
    parts = []
    # Split, not sliced: the backward of a slice is a tensor of zeros as long as the pack.
    for q, k, v in zip(*(torch.split(heads, lengths, 2) for heads in (query, key, value)), strict=True):
        length = q.shape[2]
        mask = None if window is None or length <= window else _window_mask(length, window, q.device)
        part = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None, :]
    return (distance >= 0) & (distance < window)


AttentionInterface.register(PACKED, packed_attention)
