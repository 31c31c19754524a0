"""Verify and time the kernels on given logits, without the matmuls."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from distill.types import TopK
from scripts.bench_loss.contenders import lean_kl
from scripts.bench_loss.measure import Machine, timed
from scripts.bench_loss.problem import DISTINCT, Size
from scripts.bench_loss.report import Check, Report

KERNEL_MS = {torch.float32: 7.3, torch.bfloat16: 4.3}
"""Goals for the student's loss kernels on an H200 at N = 16,384 and V = 151,936, by dtype of the logits.

They correspond to 80% of the roofline.
"""
TOPK_MS = {64: 3.0, 512: 6.0}
"""Goals for the teacher's top-k kernel on an H200, by k."""


def kernel(module: str, name: str) -> Any:
    """Return the kernel ``name`` of a module of ``distill.kernels``, or None if it cannot be imported."""
    try:
        return getattr(importlib.import_module(f"distill.kernels.{module}"), name, None)
    except ImportError:
        return None


def worst_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the error, relative to the norm of ``expected``."""
    return float((actual.double() - expected).norm() / expected.norm())


def eager_given_logits(z_NV: Tensor, topk: TopK, repeats: int) -> tuple[float, int]:
    """Return the seconds of ``lean_kl`` with its backward pass, and the number of rows that were timed.

    If memory is too small for all rows, the number of rows is halved until they fit. The time is scaled to all rows.
    """
    rows = len(z_NV)
    while rows:
        part = TopK(topk.ids_NK[:rows], topk.logprobs_NK[:rows], topk.log_tail_N[:rows])
        leaf_NV = z_NV[:rows].detach().requires_grad_()

        def run(leaf_NV: Tensor = leaf_NV, part: TopK = part) -> object:
            return torch.autograd.grad(lean_kl(leaf_NV, part, overwrite=False).sum(), leaf_NV)

        try:
            return timed(run, z_NV.device, repeats) * len(z_NV) / rows, rows
        except torch.OutOfMemoryError:
            rows //= 2
        torch.cuda.empty_cache()
    return math.nan, 0


def bench_student_kernels(
    report: Report, machine: Machine, z_NV: Tensor, topk: TopK, repeats: int, verdict: bool, goals: bool
) -> None:
    """Verify and time the student's loss kernels with a bfloat16 gradient, and compare them with eager."""
    reduce_rows, gradient_rows = kernel("loss_student", "reduce_rows"), kernel("loss_student", "gradient_rows")
    name = f"loss kernel, {str(z_NV.dtype)[6:]} logits"
    if reduce_rows is None or gradient_rows is None:
        report.progress(f"{name}: skipped, because distill.kernels.loss_student lacks the kernels")
        return
    report.progress(f"{name}: eager")
    eager, rows = eager_given_logits(z_NV, topk, repeats)
    report.progress(f"{name}: fused")
    z_RV, ids_RK = z_NV[:DISTINCT].double(), topk.ids_NK[:DISTINCT].long()
    out_NV = torch.empty_like(z_NV, dtype=torch.bfloat16)
    generator = torch.Generator(z_NV.device).manual_seed(1)
    factor_N = torch.rand(len(z_NV), generator=generator, device=z_NV.device) - 0.5
    d_logits_NK = torch.rand(topk.ids_NK.shape, generator=generator, device=z_NV.device) - 0.5

    def both() -> tuple[Tensor, ...]:
        logits_NK, top_N, sum_N, product_N = reduce_rows(z_NV, topk.ids_NK, 1.0)
        gradient_rows(z_NV, topk.ids_NK, top_N, factor_N, None, d_logits_NK, 1.0, out_NV)
        return logits_NK, top_N, sum_N, product_N

    found = [
        numbers[:DISTINCT] for numbers in both()
    ]  # read the first run only: it writes -inf at the kept ids of z_NV
    tail_RV = z_RV.scatter(1, ids_RK, -math.inf)
    top_R1 = tail_RV.amax(dim=1, keepdim=True)
    mass_RV = (tail_RV - top_R1).exp()
    product_R = (mass_RV * (tail_RV - top_R1).clamp(min=-1e30)).sum(dim=1)
    gradient_RV = (mass_RV * factor_N[:DISTINCT, None]).scatter(1, ids_RK, d_logits_NK[:DISTINCT].double())
    right = (z_RV.gather(1, ids_RK), top_R1.squeeze(1), mass_RV.sum(dim=1), product_R)
    wrong = max(worst_error(a, b) for a, b in zip(found, right, strict=True))
    report.checks.append(Check(f"{name}: error of the sums", wrong, "<=", 1e-5))
    wrong = worst_error(out_NV[:DISTINCT], gradient_RV)
    report.checks.append(Check(f"{name}: error of the gradient", wrong, "<=", 1e-2))
    seconds = timed(both, z_NV.device, repeats)
    share = machine.floor(0.0, z_NV.numel() * (2 * z_NV.element_size() + 2)) / seconds
    report.checks.append(Check(f"{name}: ms", seconds * 1e3, "<=" if goals else "", KERNEL_MS[z_NV.dtype]))
    report.checks.append(Check(f"{name}: share of the roofline", share, ">=" if verdict else "", 0.8))
    note = f"eager {eager * 1e3:.1f} ms" + (
        f", measured with {rows} rows: more rows do not fit in memory" if rows < len(z_NV) else ""
    )
    report.checks.append(Check(f"{name}: eager / ours", eager / seconds, ">=" if verdict else "", 5.0, note))


def bench_teacher_kernel(report: Report, z_NV: Tensor, k: int, repeats: int, goals: bool) -> None:
    """Verify and time the teacher's kernel ``topk_with_tail``."""
    topk_with_tail = kernel("topk", "topk_with_tail")
    name = f"teacher's top-{k}, {str(z_NV.dtype)[6:]} logits"
    if topk_with_tail is None:
        report.progress(f"{name}: skipped, because distill.kernels.topk lacks the kernel")
        return
    report.progress(name)
    log_p_RV = z_NV[:DISTINCT].double().log_softmax(dim=1)
    ids_NK, logprobs_NK, log_tail_N = tuple(topk_with_tail(z_NV, k, 1.0))[:3]
    # Compare values and not ids, because equal logits may be in any order.
    best_RV = log_p_RV.sort(dim=1, descending=True).values
    at_RK = log_p_RV.gather(1, ids_NK[:DISTINCT].long()).sort(dim=1, descending=True).values
    returned_RK = logprobs_NK[:DISTINCT].double().sort(dim=1, descending=True).values
    tail_R = best_RV[:, k:].logsumexp(dim=1)
    wrong = max(
        float((at_RK - best_RV[:, :k]).abs().max()),
        float((returned_RK - best_RV[:, :k]).abs().max()),
        float((log_tail_N[:DISTINCT].double() - tail_R).abs().max()),
    )
    report.checks.append(Check(f"{name}: largest error, nats", wrong, "<=", 1e-4))
    seconds = timed(lambda: topk_with_tail(z_NV, k, 1.0), z_NV.device, repeats)
    report.checks.append(Check(f"{name}: ms", seconds * 1e3, "<=" if goals else "", TOPK_MS.get(k, math.nan)))


def bench_kernels(
    report: Report, size: Size, device: torch.device, machine: Machine, repeats: int, verdict: bool, goals: bool
) -> None:
    """Verify and time the student's loss kernels and the teacher's top-k kernel."""
    generator = torch.Generator(device).manual_seed(0)
    z_RV, teacher_RV = (2 * torch.randn(DISTINCT, size.vocab, generator=generator, device=device) for _ in range(2))
    log_p_RK, ids_RK = teacher_RV.log_softmax(dim=1).topk(size.k, dim=1)
    log_tail_R = teacher_RV.log_softmax(dim=1).scatter(1, ids_RK, -math.inf).logsumexp(dim=1)
    rows_N = torch.arange(size.rows, device=device) % DISTINCT
    topk = TopK(ids_RK.int()[rows_N], log_p_RK[rows_N], log_tail_R[rows_N])
    for dtype in (torch.float32, torch.bfloat16):
        for k in [k for k in (*TOPK_MS, 4096) if k <= size.vocab]:
            bench_teacher_kernel(report, z_RV.to(dtype)[rows_N], k, repeats, goals)
        bench_student_kernels(report, machine, z_RV.to(dtype)[rows_N], topk, repeats, verdict, goals)
