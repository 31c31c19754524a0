"""Attention over packed sequences: each sees itself and its own past, none its neighbours, and nothing is padded."""

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
"""The name under which transformers knows it (``attn_implementation``); the model's forward takes ``packed_bounds``."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_bounds: tuple[int, ...],
    packed_shared: SharedPrefixes | None = None,
    packed_exchange: UlyssesAllToAll | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence of a pack, by PyTorch's own kernels.

    ``query`` [1, H, T, Dh], ``key`` and ``value`` [1, H_kv, T, Dh]; ``packed_bounds`` are B + 1 cumulative lengths;
    returns [1, T, H, Dh]. Dropout is left out on purpose: teacher and student read the same text, and noise in one of
    them is no signal. No [T, T] mask is made.

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
        query, key, value = (_spread(heads, packed_shared.expand_S) for heads in (query, key, value))
    if dtype == torch.bfloat16 and not query.is_cuda:
        # PyTorch's kernel for the CPU takes twice as long in bf16, and rounds inside.
        query, key, value = query.float(), key.float(), value.float()
    attended = _attend(query, key, value, packed_bounds, scaling, sliding_window).to(dtype)
    if packed_shared is not None:
        attended = attended.index_select(1, packed_shared.source_T)
    if packed_exchange is not None:
        attended = packed_exchange.positions(attended)
    return attended, None


def _spread(heads: Tensor, expand_S: Tensor) -> Tensor:
    """[1, H, T, Dh] to [1, H, S, Dh]; transposed, because heads come as columns of [T, H * Dh]."""
    return heads.transpose(1, 2).index_select(1, expand_S).transpose(1, 2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], scaling: float | None, window: int | None
) -> Tensor:
    """[1, S, H, Dh] from queries [1, H, S, Dh], keys and values [1, H_kv, S, Dh]."""
    assert query.shape[0] == 1 and query.shape[2] == bounds[-1], (query.shape, bounds)
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (0, 0)
    if takes_whole_packs(query.dtype, query.shape[-1], capability):
        return attend_at_once(query, key, value, bounds, scaling, window)
    return attend_one_by_one(query, key, value, bounds, scaling, window)


def takes_whole_packs(dtype: torch.dtype, channels: int, capability: tuple[int, int]) -> bool:
    """Whether PyTorch's flash attention reads heads of ``channels`` channels on a GPU of that compute capability.

    (0, 0) is no GPU. Everything else, float32 on a GPU for one, goes a sequence at a time.
    """
    return dtype in (torch.bfloat16, torch.float16) and channels % 8 == 0 and channels <= 256 and capability >= (8, 0)


def attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], scaling: float | None, window: int | None
) -> Tensor:
    """``_attend`` in one call for the whole pack: no mask at all, windows are the kernel's own."""
    from torch.nn.attention.varlen import varlen_attn  # a second to import, and only GPUs need it

    cumulative = _cumulative(bounds, query.device)
    longest = max(stop - start for start, stop in pairwise(bounds))
    before = -1 if window is None or longest <= window else window - 1  # tokens seen before one's own; -1: all
    options: dict[str, Any] = {"scale": scaling, "window_size": (before, 0)}
    if "enable_gqa" in signature(varlen_attn).parameters:  # before the word was, fewer key heads were let in unasked
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    q_SHD, k_SHD, v_SHD = (heads[0].transpose(0, 1) for heads in (query, key, value))
    attended = varlen_attn(q_SHD, k_SHD, v_SHD, cumulative, cumulative, longest, longest, **options)
    assert isinstance(attended, Tensor)  # a tuple where more was asked for
    return attended[None]


@lru_cache(maxsize=4)
def _cumulative(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """The bounds as the kernel reads them; every layer asks for the same ones."""
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def attend_one_by_one(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], scaling: float | None, window: int | None
) -> Tensor:
    """``_attend`` in one call a sequence: the plain twin. A window makes a mask of its sequence's length squared."""
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
