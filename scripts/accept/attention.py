"""Attention of packed sequences in one call against one call per sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from scripts.accept.results import Check, at_most
from scripts.accept.settings import Context

_BOUNDS = (0, 350, 351, 800)
"""Cumulative lengths of three sequences, one of them of a single token."""


def packed(context: Context) -> Iterator[Check]:
    """Compare the errors of both forms in bfloat16 against float64, with full and sliding-window attention."""
    for channels in (64, 128):
        for window in (None, 100):
            name = f"error, one call / call per sequence, {channels} channels" + (
                f", window {window}" if window else ""
            )
            ratio = attention_error_ratio(torch.device(context.settings.device), channels, window)
            yield Check(name, ratio, "", at_most(1.2))


def attention_error_ratio(device: torch.device, channels: int, window: int | None) -> float:
    """Return the largest ratio of the errors of values and gradients; 8 query and 2 key-value heads."""
    from distill.model.attention import attend_packed, attend_per_sequence

    length = _BOUNDS[-1]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    made = [normal(1, heads, length, channels).bfloat16() for heads in (8, 2, 2)]
    upstream = normal(1, length, 8, channels)

    def found(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        query, key, value = heads = [tensor.to(dtype).requires_grad_() for tensor in made]
        out = attend(query, key, value, _BOUNDS, None, window)
        return [tensor.detach().double() for tensor in (out, *torch.autograd.grad(out, heads, upstream.to(dtype)))]

    exact = found(attend_per_sequence, torch.float64)
    ours, twins = (found(attend, torch.bfloat16) for attend in (attend_packed, attend_per_sequence))
    return max(
        float((our - right).norm() / (twin - right).norm()) for our, twin, right in zip(ours, twins, exact, strict=True)
    )
