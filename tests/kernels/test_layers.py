"""Kernels of layers against the modules of transformers in eager mode, and against float64.

Compiled with a CUDA device, else interpreted, which tests the arithmetic but not the speed. Two tests compile the
kernels for two GPUs without either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from distill.kernels import layer_gate, layer_norm, layer_rotary
from distill.kernels.layer_gate import gated
from distill.kernels.layer_norm import rms_norm
from distill.kernels.layer_rotary import rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A result of the twin is rounded up to four times. The interpreter cuts float32 to bf16 where a GPU rounds.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-6 if DEVICE == "cuda" else 2**-5}
DTYPES = [torch.float32, torch.bfloat16]
NORMS = [Qwen3RMSNorm, Gemma3RMSNorm]


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return made.to(DEVICE, dtype)


def _norm(kind: type, width: int, dtype: torch.dtype) -> tuple[Any, bool]:
    """Return the module of transformers with a random weight, and whether it multiplies by 1 + weight."""
    norm = kind(width).to(DEVICE, dtype)
    norm.weight.data.add_(_random(width, dtype=dtype) * 0.3)
    return norm, kind is Gemma3RMSNorm


def _angles(length: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, channels, 2) / channels)
    angles = torch.cat([angles, angles], dim=1).to(DEVICE)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _assert_equal_gradients(
    ours: Callable[[], Tensor], twin: Callable[[], Tensor], inputs: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Compare results and gradients; the error is relative to the largest value of each tensor."""
    upstream, found = None, []
    for run in (ours, twin):
        out = run()
        upstream = _random(*out.shape, dtype=dtype, seed=1) if upstream is None else upstream
        found.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for our, other in zip(*found, strict=True):
        assert our.dtype == other.dtype == dtype and our.shape == other.shape
        assert (our - other).abs().max() <= TOLERANCE[dtype] * other.abs().max()


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(("width", "dtype"), [(576, DTYPES[0]), (576, DTYPES[1]), (4096, DTYPES[1]), (5120, DTYPES[0])])
def test_rms_norm_equals_transformers(width: int, kind: type, dtype: torch.dtype) -> None:
    norm, one_plus = _norm(kind, width, dtype)
    x = _random(1, layer_norm.ROWS_PER_PROGRAM + 3, width, dtype=dtype).requires_grad_()
    ours = lambda: rms_norm(x, norm.weight, 1e-6, one_plus)  # noqa: E731
    _assert_equal_gradients(ours, lambda: norm(x), [x, norm.weight], dtype)


@pytest.mark.parametrize(
    ("channels", "heads", "kind", "dtype"),
    [
        *((64, 8, kind, DTYPES[1]) for kind in (*NORMS, None)),
        *((96, 3, kind, DTYPES[0]) for kind in (*NORMS, None)),
        *((128, 5, Qwen3RMSNorm, dtype) for dtype in DTYPES),
        (256, 2, Gemma3RMSNorm, DTYPES[1]),
    ],
)
def test_rotary_equals_transformers(channels: int, heads: int, kind: type | None, dtype: torch.dtype) -> None:
    length = 16 * 1056 // channels * 2 // heads  # two Triton programs in the backward
    norm, one_plus = (nn.Identity(), False) if kind is None else _norm(kind, channels, dtype)
    weight: Any = None if kind is None else norm.weight
    cos, sin = _angles(length, channels, dtype)
    x = _random(length, heads, channels, dtype=dtype).requires_grad_()

    def twin() -> Tensor:
        heads_HTC = norm(x).transpose(0, 1)[None]
        rotated: Tensor = apply_rotary_pos_emb(heads_HTC, heads_HTC, cos[None], sin[None])[0][0]
        return rotated.transpose(0, 1)

    inputs: list[Tensor] = [x] if weight is None else [x, weight]
    assert layer_rotary._parts(x, x).shape[0] >= 2
    _assert_equal_gradients(lambda: rotary(x, weight, cos, sin, 1e-6, one_plus), twin, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [False, True])
def test_gated_activation_equals_transformers(gelu: bool, dtype: torch.dtype) -> None:
    gate, up = (_random(1, 7, 1543, dtype=dtype, seed=seed).requires_grad_() for seed in (2, 3))
    activation: Any = nn.GELU("tanh") if gelu else nn.SiLU()
    _assert_equal_gradients(lambda: gated(gate, up, gelu), lambda: activation(gate) * up, [gate, up], dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy's, under the interpreter
@pytest.mark.parametrize("gelu", [False, True])
def test_gated_activation_of_large_values_is_finite(gelu: bool) -> None:
    gate = torch.tensor([-1e4, -100.0, -0.0, 100.0, 1e4], device=DEVICE, requires_grad=True)
    out = gated(gate, torch.ones_like(gate), gelu)
    assert torch.equal(out, gate.clamp(min=0))
    (slope,) = torch.autograd.grad(out.sum(), gate)
    assert torch.equal(slope, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0], device=DEVICE))


@pytest.mark.parametrize("kind", NORMS)
def test_a_bf16_result_is_as_exact_as_that_of_transformers(kind: type) -> None:
    """Norm, rotation and their gradients against float64."""
    length, heads, channels = 40, 4, 128
    norm, one_plus = _norm(kind, channels, torch.bfloat16)
    cos, sin = _angles(length, channels, torch.bfloat16)
    x = _random(length, heads, channels, dtype=torch.bfloat16)
    upstream = _random(length, heads, channels, dtype=torch.bfloat16, seed=1)

    def twin(dtype: torch.dtype) -> list[Tensor]:
        input, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (x, norm.weight))
        scale = 1 + weight if one_plus and dtype == torch.float64 else weight
        if dtype == torch.float64:
            unit = input * (input.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale
        else:
            unit = torch.func.functional_call(norm, {"weight": weight}, (input,))
        angles = (tensor.to(dtype)[None] for tensor in (cos, sin))
        out = apply_rotary_pos_emb(unit.transpose(0, 1)[None], unit.transpose(0, 1)[None], *angles)[0][0]
        out = out.transpose(0, 1)
        return [out, *torch.autograd.grad(out, [input, weight], upstream.to(dtype))]

    input, weight = (tensor.detach().requires_grad_() for tensor in (x, norm.weight))
    out = rotary(input, weight, cos, sin, 1e-6, one_plus)
    ours = [out, *torch.autograd.grad(out, [input, weight], upstream)]
    # The interpreter cuts where a GPU rounds, which more than doubles the error.
    factor = 1.1 if DEVICE == "cuda" else 3.0
    for our, eager, exact in zip(ours, twin(torch.bfloat16), twin(torch.float64), strict=True):
        assert (our - exact).norm() <= factor * (eager - exact).norm()


def test_other_dtypes_and_shapes_are_refused() -> None:
    x, weight = torch.ones(2, 3, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    cos, sin = _angles(2, 8, torch.float32)
    with pytest.raises(ValueError):
        rms_norm(x.double(), weight.double(), 1e-6, False)
    with pytest.raises(ValueError):
        rms_norm(x, weight.bfloat16(), 1e-6, False)
    with pytest.raises(ValueError):
        rotary(x, weight, cos[:1], sin[:1], 1e-6, False)
    with pytest.raises(ValueError):
        gated(x, x[:1], False)


def test_no_rows_launch_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layer_norm, layer_rotary, layer_gate):
        monkeypatch.setattr(module, "_forward", None)
        monkeypatch.setattr(module, "_backward", None)
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    x = torch.ones(0, 3, 8, device=DEVICE, requires_grad=True)
    cos, sin = _angles(0, 8, torch.float32)
    for out in (rms_norm(x, weight, 1e-6, True), rotary(x, weight, cos, sin, 1e-6, True), gated(x, x, True)):
        gradients = torch.autograd.grad(out.sum(), [x, weight], allow_unused=True)
        assert out.shape == x.shape and all(g is None or not g.any() for g in gradients)
