"""Gated activation of an MLP, activation(gate) * up, in one Triton kernel for each direction.

The activation is SiLU (Llama, Qwen) or GELU with the tanh approximation (Gemma). Both are gate * sigmoid(v), with v =
gate for SiLU and v = 2 sqrt(2 / pi) (gate + 0.044715 gate^3) for GELU, because (1 + tanh(v / 2)) / 2 = sigmoid(v). The
computation is float32; the activation is rounded to the dtype of the input before it is multiplied, as in transformers.
Only ``gate`` and ``up`` are saved for the backward. The reference implementation is the MLP of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.kernels.layer_norm import check_tensors, on_device_of

_BLOCK, _WARPS = 1024, 4


@torch.library.custom_op("distill::gated", mutates_args=(), schema="(Tensor gate, Tensor up, bool gelu) -> Tensor")
def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """Return activation(``gate``) * ``up``, with SiLU or with GELU (tanh approximation); has a gradient.

    ``gate`` and ``up`` have the same shape and dtype, float32 or bf16, else ``ValueError`` is raised.
    """
    check_tensors(gate, up=up)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _launch(_forward, [gate, up, out], gelu)
    return out


@torch.library.custom_op(
    "distill::gated_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor gate, Tensor up, bool gelu) -> (Tensor, Tensor)",
)
def gated_backward(d_out: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``gate`` and ``up``; ``d_out`` is the gradient of the result of ``gated``."""
    check_tensors(gate, up=up, d_out=d_out)
    d_out, gate, up = d_out.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    _launch(_backward, [d_out, gate, up, d_gate, d_up], gelu)
    return d_gate, d_up


def _launch(kernel: Any, tensors: list[Tensor], gelu: bool) -> None:
    count = tensors[0].numel()
    if any(tensor.shape != tensors[0].shape for tensor in tensors):
        raise ValueError(f"gate, up and their gradients must have one shape: {[list(t.shape) for t in tensors]}")
    if count:
        with on_device_of(tensors[0]):
            kernel[(triton.cdiv(count, _BLOCK),)](*tensors, count, GELU=gelu, BLOCK=_BLOCK, num_warps=_WARPS)


@gated.register_fake
def _(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@gated_backward.register_fake
def _(d_out: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    return d_gate, d_up


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.gelu = inputs
    ctx.save_for_backward(gate, up)


def _gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
    return *torch.ops.distill.gated_backward(d_out, *ctx.saved_tensors, ctx.gelu), None


gated.register_autograd(_gradients, setup_context=_setup)


@triton.jit  # type: ignore[untyped-decorator]
def _load(ptr: tl.tensor, at: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Return elements as float32; ``inside=None`` means no mask."""
    if inside is None:
        loaded = tl.load(ptr + at)
    else:
        loaded = tl.load(ptr + at, mask=inside, other=0.0)
    return loaded.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _gate_tile(
    gate_ptr: tl.tensor, up_ptr: tl.tensor, out_ptr: tl.tensor, at: tl.tensor, inside: tl.tensor, GELU: tl.constexpr
) -> None:
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    gate = _load(gate_ptr, at, inside)
    up = _load(up_ptr, at, inside)
    active = gate * _sigmoid_of(gate, GELU)
    tl.store(out_ptr + at, (active.to(dtype).to(tl.float32) * up).to(dtype), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _sigmoid_of(gate: tl.tensor, GELU: tl.constexpr) -> tl.tensor:
    v = gate
    if GELU:
        v = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return tl.sigmoid(v)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_tile(
    d_out_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    d_gate_ptr: tl.tensor,
    d_up_ptr: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    GELU: tl.constexpr,
) -> None:
    dtype: tl.constexpr = d_gate_ptr.dtype.element_ty
    d_out = _load(d_out_ptr, at, inside)
    gate = _load(gate_ptr, at, inside)
    up = _load(up_ptr, at, inside)
    share = _sigmoid_of(gate, GELU)
    slope = gate  # gate times the derivative of v
    if GELU:
        slope = 1.5957691216057308 * (gate + 3 * 0.044715 * gate * gate * gate)
    active = (gate * share).to(dtype).to(tl.float32)
    d_gate = d_out * up * (share + share * (1.0 - share) * slope)
    tl.store(d_gate_ptr + at, d_gate.to(dtype), mask=inside)
    tl.store(d_up_ptr + at, (d_out * active).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _forward(
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    count: tl.tensor,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * BLOCK  # can exceed 32 bits
    at = start + tl.arange(0, BLOCK)
    # Only the last block uses a mask: a mask prevents 16-byte loads.
    if start + BLOCK <= count:
        _gate_tile(gate_ptr, up_ptr, out_ptr, at, None, GELU)
    else:
        _gate_tile(gate_ptr, up_ptr, out_ptr, at, at < count, GELU)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _backward(
    d_out_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    d_gate_ptr: tl.tensor,
    d_up_ptr: tl.tensor,
    count: tl.tensor,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:
        _gradient_tile(d_out_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, at, None, GELU)
    else:
        _gradient_tile(d_out_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, at, at < count, GELU)
