"""Attention over packed sequences: each sees itself and its own past, none its neighbours, and nothing is padded."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

PACKED = "distill_packed"
"""The name under which transformers knows it (``attn_implementation``); the model's forward takes ``packed_bounds``."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_bounds: tuple[int, ...],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence of a pack, one call of PyTorch's own kernel a sequence.

    ``query`` [1, H, T, Dh], ``key`` and ``value`` [1, H_kv, T, Dh]; ``packed_bounds`` are B + 1 cumulative lengths;
    returns [1, T, H, Dh]. Dropout is left out on purpose: teacher and student read the same text, and noise in one of
    them is no signal. No [T, T] mask is made; a sliding window makes one of a single sequence's length.
    """
    assert attention_mask is None, "a pack has bounds, not a mask"
    assert query.shape[0] == 1 and query.shape[2] == packed_bounds[-1], (query.shape, packed_bounds)
    assert not unused.get("softcap"), "soft-capped attention is refused when the model is loaded"
    grouped = query.shape[1] != key.shape[1]
    parts = []
    for start, stop in pairwise(packed_bounds):
        mask = None
        if sliding_window is not None and stop - start > sliding_window:
            mask = _window_mask(stop - start, sliding_window, query.device)
        parts.append(
            F.scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, start:stop],
                value[:, :, start:stop],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None, :]
    return (distance >= 0) & (distance < window)


AttentionInterface.register(PACKED, packed_attention)
