"""Attention of a complete pack in one call against one call per sequence.

Flash attention needs a GPU; on a CPU a plain implementation of its documented interface replaces it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.batching.plan import view_of
from distill.model import attention
from distill.model.attention import attend_packed, attend_per_sequence, packed_attention, supports_packed_kernel
from tests.test_gpu import DEVICES

BOUNDS = (0, 4, 5, 17)
WINDOWS = [None, 1, 3, 40]
SEQUENCES = [
    (tuple(range(n, n + 50)), tuple(range(7, 7 + 30 * n))) for n in (1, 1, 3, 5)
]  # the first two have a common prefix


def _heads(length: int, channels: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Return queries [1, 4, T, Dh], keys and values [1, 2, T, Dh] with gradients."""
    generator = torch.Generator().manual_seed(length)
    made = [torch.randn(1, length, heads, channels, generator=generator) for heads in (4, 2, 2)]
    return [heads.to(device, dtype).transpose(1, 2).requires_grad_() for heads in made]


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
) -> Tensor:
    """Compute ``varlen_attn`` on [T, H, D]: token i attends to i - left .. i + right; -1: no limit."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    bounds, (left, right) = cu_seq_q.tolist(), window_size
    assert bounds == cu_seq_k.tolist() and max_q == max_k == max(b - a for a, b in pairwise(bounds))
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = []
    for start, stop in pairwise(bounds):
        scores = torch.einsum("qhd,khd->hqk", query[start:stop], key[start:stop]) * scale
        position = torch.arange(stop - start)
        after = position[None, :] - position[:, None]
        seen = ((after >= -left) | (left < 0)) & ((after <= right) | (right < 0))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, value[start:stop]))
    return torch.cat(out)


def _flash_with_enable_gqa(*args: Any, enable_gqa: bool = False, **kwargs: Any) -> Tensor:
    assert enable_gqa == (args[0].shape[1] != args[1].shape[1])
    return _flash(*args, **kwargs)


@pytest.mark.parametrize(
    ("dtype", "channels", "capability", "supported"),
    [
        (torch.bfloat16, 128, (8, 0), True),
        (torch.float16, 64, (9, 0), True),
        (torch.bfloat16, 256, (10, 0), True),
        (torch.float32, 128, (9, 0), False),
        (torch.float64, 128, (9, 0), False),
        (torch.bfloat16, 264, (9, 0), False),
        (torch.bfloat16, 36, (9, 0), False),
        (torch.float16, 64, (7, 5), False),
        (torch.bfloat16, 128, (0, 0), False),
    ],
)
def test_packed_kernel_needs_half_precision_and_a_gpu_with_flash_attention(
    dtype, channels, capability, supported
) -> None:
    assert supports_packed_kernel(dtype, channels, capability) == supported


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("flash", [_flash, _flash_with_enable_gqa])
def test_attend_packed_equals_attend_per_sequence(
    monkeypatch: pytest.MonkeyPatch, window: int | None, flash: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    heads = _heads(BOUNDS[-1], 8, torch.float64)
    upstream = torch.randn(1, BOUNDS[-1], 4, 8, dtype=torch.float64)
    for scaling in (None, 0.3):
        found = []
        for attend in (attend_packed, attend_per_sequence):
            out = attend(heads[0], heads[1], heads[2], BOUNDS, scaling, window)
            found.append([out, *torch.autograd.grad(out, heads, upstream)])
        for our, other in zip(*found, strict=True):
            assert our.shape == other.shape and (our - other).abs().max() < 1e-12


@pytest.mark.parametrize("supported", [True, False])
def test_packed_attention_uses_the_packed_kernel_if_supported(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return _flash(*args, **kwargs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", counted)
    monkeypatch.setattr(attention, "supports_packed_kernel", lambda dtype, channels, capability: supported)
    query, key, value = _heads(BOUNDS[-1], 8, torch.float32)
    packed_attention(torch.nn.Module(), query, key, value, None, BOUNDS)
    assert len(calls) == supported


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("channels", [64, 128, 256])
def test_bf16_attention_with_shared_prefixes_is_as_exact_as_per_sequence(device, window, channels) -> None:
    """Compare outputs and gradients with float64; on a GPU this tests the rounding of the packed kernel."""
    view = view_of(SEQUENCES, share=True)
    assert view.shared is not None
    heads = _heads(len(view.tokens_T), channels, torch.bfloat16, device)
    upstream = torch.randn(1, len(view.tokens_T), 4, channels, generator=torch.Generator().manual_seed(1)).to(heads[0])
    shared = view.to(torch.device(device)).shared

    def run(tensors: list[Tensor], per_sequence: bool) -> list[Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            if per_sequence:
                patch.setattr(attention, "supports_packed_kernel", lambda *args: False)
            q, k, v = tensors
            out = packed_attention(torch.nn.Module(), q, k, v, None, view.bounds, shared, sliding_window=window)[0]
        return [out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]

    exact = run([h.detach().double().requires_grad_() for h in heads], per_sequence=True)
    for our, other, exactly in zip(run(heads, False), run(heads, True), exact, strict=True):
        assert our.dtype == torch.bfloat16
        assert (our - exactly).norm() <= 1.2 * (other - exactly).norm() + 1e-3 * exactly.norm()


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 1000])
def test_a_long_pack_needs_no_quadratic_memory_on_a_gpu(window: int | None) -> None:
    longest, length = 19_000, 20_000
    query, key, value = _heads(length, 64, torch.bfloat16, "cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    bounds = (0, longest, length)
    out = packed_attention(torch.nn.Module(), query, key, value, None, bounds, sliding_window=window)[0]
    out.backward(torch.randn_like(out))
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < longest**2, "memory is quadratic in the length"


@pytest.mark.parametrize(("on_gpu", "repeated"), [(True, True), (False, False)])
def test_float32_attention_on_a_gpu_repeats_grouped_heads(
    monkeypatch: pytest.MonkeyPatch, on_gpu: bool, repeated: bool
) -> None:
    query, key, value = _heads(BOUNDS[-1], 8, torch.float32)
    expected = attend_per_sequence(query, key, value, BOUNDS, None, None)
    calls: list[bool] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[1].shape[1] == args[0].shape[1] and not kwargs["enable_gqa"])
        return plain(*args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", recorded)
    query = query.as_subclass(_OnGpu) if on_gpu else query
    found = attend_per_sequence(query, key, value, BOUNDS, None, None)
    assert calls == [repeated] * (len(BOUNDS) - 1)
    assert (torch.as_tensor(found) - expected).abs().max() < 1e-6


class _OnGpu(Tensor):
    """A CPU tensor that reports to be on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True
