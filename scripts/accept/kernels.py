"""Triton kernels against float64 and PyTorch; compiled on a GPU, else in Triton's interpreter at tiny sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from scripts.accept.results import Check, at_most
from scripts.accept.settings import Context

_SUMS = 1e-5
"""Largest relative error of float32 sums over a row."""
_EPS = 1e-6
_GRADIENT = 1e-2
"""Largest relative error of a bfloat16 gradient. Triton's interpreter cuts float32 to bfloat16 instead of rounding."""
_LAYER = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest relative error of the layers' kernels by dtype; bfloat16 results are rounded up to three times."""


def loss_and_topk(context: Context) -> Iterator[Check]:
    """Compare the student's loss kernels and the teacher's top-k kernels with float64 formulas."""
    device = torch.device(context.settings.device)
    cases = ((64, 151_936, 64), (16, 151_936, 512)) if context.settings.on_gpu else ((2, 1300, 16), (2, 5000, 64))
    for rows, vocab, k in cases:
        for dtype in (torch.float32, torch.bfloat16):
            generator = torch.Generator(device).manual_seed(vocab + k)
            z_CV = (3 * torch.randn(rows, vocab, generator=generator, device=device)).to(dtype)
            case = f"{rows} x {vocab}, k {k}, {str(dtype)[6:]}"
            yield Check(f"top-k, {case}", topk_error(z_CV, k), "nats", at_most(1e-4))
            sums, gradient = student_errors(z_CV, k, generator)
            yield Check(f"loss sums, {case}", sums, "", at_most(_SUMS))
            yield Check(f"loss gradient, {case}", gradient, "", at_most(_GRADIENT))


def topk_error(z_CV: Tensor, k: int) -> float:
    """Return the largest error of ``topk_with_tail`` in nats: log-probs of its ids, returned log-probs, and tail."""
    from distill.kernels.topk import topk_with_tail

    log_p_CV = z_CV.double().log_softmax(dim=1)
    best_CV = log_p_CV.sort(dim=1, descending=True).values
    ids_CK, logprobs_CK, log_tail_C, entropy_C = topk_with_tail(z_CV.clone(), k, 1.0)
    # Values and not ids are compared, because equal logits may be in any order.
    at_CK, returned_CK = (
        found.double().sort(dim=1, descending=True).values for found in (log_p_CV.gather(1, ids_CK.long()), logprobs_CK)
    )
    return max(
        float((at_CK - best_CV[:, :k]).abs().max()),
        float((returned_CK - best_CV[:, :k]).abs().max()),
        float((log_tail_C.double() - best_CV[:, k:].logsumexp(dim=1)).abs().max()),
        float((entropy_C.double() + torch.xlogy(log_p_CV.exp(), log_p_CV.exp()).sum(dim=1)).abs().max()),
    )


def student_errors(z_CV: Tensor, k: int, generator: torch.Generator) -> tuple[float, float]:
    """Return the relative errors of ``reduce_rows`` and of ``gradient_rows``, which writes a bfloat16 gradient."""
    from distill.kernels.loss_student import gradient_rows, reduce_rows

    device = z_CV.device
    z64_CV = z_CV.double()
    ids_CK = torch.rand(z_CV.shape, generator=generator, device=device).topk(k, dim=1).indices.int()
    factor_C = torch.rand(len(z_CV), generator=generator, device=device) - 0.5
    d_logits_CK = torch.rand(ids_CK.shape, generator=generator, device=device) - 0.5
    found = reduce_rows(z_CV, ids_CK, 1.0)  # writes -inf at the kept ids of z_CV
    out_CV = torch.empty_like(z_CV, dtype=torch.bfloat16)
    gradient_rows(z_CV, ids_CK, found[1], factor_C, None, d_logits_CK, 1.0, out_CV)
    kept_CK = ids_CK.long()
    tail_CV = z64_CV.scatter(1, kept_CK, -math.inf)
    top_C1 = tail_CV.amax(dim=1, keepdim=True)
    mass_CV = (tail_CV - top_C1).exp()
    product_C = (mass_CV * (tail_CV - top_C1).clamp(min=-1e30)).sum(dim=1)
    right = (z64_CV.gather(1, kept_CK), top_C1.squeeze(1), mass_CV.sum(dim=1), product_C)
    gradient_CV = (mass_CV * factor_C[:, None].double()).scatter(1, kept_CK, d_logits_CK.double())
    sums = max(relative_error(ours, theirs) for ours, theirs in zip(found, right, strict=True))
    return sums, relative_error(out_CV, gradient_CV)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the error, relative to the norm of ``expected``."""
    return float((actual.detach().double() - expected).norm() / expected.norm())


def layers(context: Context) -> Iterator[Check]:
    """Compare results and gradients of the fused kernels of the layers with PyTorch in float64."""
    from distill.kernels.layer_gate import gated
    from distill.kernels.layer_norm import rms_norm
    from distill.kernels.layer_rotary import rotary

    device, on_gpu = torch.device(context.settings.device), context.settings.on_gpu
    positions, width, heads, channels = (2048, 2560, 8, 128) if on_gpu else (40, 96, 3, 64)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    angles = torch.arange(positions, device=device)[:, None] / 10_000 ** (
        torch.arange(0, channels, 2, device=device) / channels
    )
    turns = [torch.cat([angles, angles], dim=1).cos(), torch.cat([angles, angles], dim=1).sin()]
    head_weight = 1 + 0.3 * normal(channels)
    cases: list[tuple[str, Callable[..., Tensor], Callable[..., Tensor], list[Tensor], list[Tensor]]] = [
        (
            "RMSNorm",
            lambda x, w: rms_norm(x, w, _EPS, False),
            plain_norm,
            [normal(positions, width), 1 + 0.3 * normal(width)],
            [],
        ),
        (
            "rotary with norm",
            lambda x, w, cos, sin: rotary(x, w, cos, sin, _EPS, False),
            lambda x, w, cos, sin: plain_rotary(plain_norm(x, w), cos, sin),
            [normal(positions, heads, channels), head_weight],
            turns,
        ),
        (
            "rotary",
            lambda x, cos, sin: rotary(x, None, cos, sin, _EPS, False),
            plain_rotary,
            [normal(positions, heads, channels)],
            turns,
        ),
        (
            "SwiGLU",
            lambda gate, up: gated(gate, up, False),
            lambda gate, up: torch.nn.functional.silu(gate) * up,
            [normal(positions, width), normal(positions, width)],
            [],
        ),
    ]
    for name, ours, plain, inputs, constants in cases:
        for dtype in (torch.float32, torch.bfloat16):
            value, gradient = layer_errors(ours, plain, inputs, constants, dtype)
            bound = at_most(_LAYER[dtype])
            yield Check(f"{name}, {str(dtype)[6:]}", value, "", bound, "relative error")
            yield Check(f"{name}, gradients, {str(dtype)[6:]}", gradient, "", bound, "largest relative error")


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Return the RMSNorm of the last axis, times the weight."""
    return x * (x.square().mean(-1, keepdim=True) + _EPS).rsqrt() * weight


def plain_rotary(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Return the heads with both halves of the channels rotated together."""
    first, second = x_THC.chunk(2, dim=-1)
    return x_THC * cos_TC[:, None] + torch.cat([-second, first], dim=-1) * sin_TC[:, None]


def layer_errors(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: list[Tensor],
    constants: list[Tensor],
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Return the relative error of the result, and the largest one of the gradients of ``inputs``, in ``dtype``.

    The reference is ``plain`` in float64 for the same rounded inputs.
    """
    leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    rounded = [tensor.to(dtype) for tensor in constants]
    out, right = ours(*leaves, *rounded), plain(*exact, *(tensor.double() for tensor in rounded))
    upstream = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(dtype)
    gradients = torch.autograd.grad(out, leaves, upstream)
    expected = torch.autograd.grad(right, exact, upstream.double())
    errors = [relative_error(one, other) for one, other in zip(gradients, expected, strict=True)]
    return relative_error(out, right.detach()), max(errors)
