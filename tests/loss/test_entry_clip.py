"""``loss_fn.entry_clip``: values worked out by hand, the paper's form for the complete vocabulary, and limits."""

from __future__ import annotations

import dataclasses
import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.config import LossConfig
from distill.loss import fused_linear_kl, topk_kl
from distill.types import TeacherRows, TopK
from tests.loss.test_fused import assert_close, gradients, name, rows_and_head
from tests.loss.test_loss_triton import assert_as_good, on_both
from tests.loss_oracle import CLIPPED, definition, make_case

P, Q = torch.tensor([[[0.7, 0.2, 0.1]], [[0.2, 0.5, 0.3]]], dtype=torch.float64)
FORWARD = [0.7 * math.log(3.5), 0.2 * math.log(0.4), 0.1 * math.log(1 / 3)]
"""Terms of the forward KL: 0.88, -0.18 and -0.11."""
REVERSE = [0.2 * math.log(2 / 7), 0.5 * math.log(2.5), 0.3 * math.log(3)]
"""Terms of the reverse KL: -0.25, 0.46 and 0.33."""
MIDDLE = [0.45, 0.35, 0.2]
JSD = [
    (p * math.log(p / m) + q * math.log(q / m)) / 2 for p, q, m in zip(*P.tolist(), *Q.tolist(), MIDDLE, strict=True)
]
"""Terms of the Jensen-Shannon divergence: 0.074, 0.033 and 0.026."""


def by_hand(config: LossConfig, kept: list[int]) -> tuple[float, Tensor]:
    """Return loss and gradient of the logits log q, with the teacher p and the ids ``kept``."""
    rest = [v for v in range(3) if v not in kept]
    topk = TopK(torch.tensor([kept]), P[:, kept].log(), P[:, rest].sum(1).log())
    leaf = Q.log().requires_grad_()
    kl_N = topk_kl(leaf, topk, config)
    (gradient,) = torch.autograd.grad(kl_N.sum(), leaf)
    fused, (fused_gradient, _) = gradients(
        lambda x, w: fused_linear_kl(x, w, topk, config, torch.ones(1)), Q.log(), torch.eye(3).double()
    )
    assert_close(fused.kl_sum, kl_N.sum(), 1e-12)
    assert_close(fused_gradient * 3, gradient, 1e-12)
    if not rest:
        rows = TeacherRows(P.log(), torch.eye(3).double())
        complete, (complete_gradient, _) = gradients(
            lambda x, w: fused_linear_kl(x, w, rows, config, torch.ones(1), topk_logits_k=0),
            Q.log(),
            torch.eye(3).double(),
        )
        assert_close(complete.kl_sum, kl_N.sum(), 1e-12)
        assert_close(complete_gradient * 3, gradient, 1e-12)
    return float(kl_N), gradient[0]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LossConfig("forward", entry_clip=0.05), 0.05 + FORWARD[1] + FORWARD[2]),
        (LossConfig("forward", entry_clip=1.0), sum(FORWARD)),
        (LossConfig("reverse", entry_clip=0.4), REVERSE[0] + 0.4 + REVERSE[2]),
        (
            LossConfig("mixed", mixed_kl_weight=0.25, entry_clip=0.05),
            0.25 * FORWARD[0] + 0.75 * REVERSE[0] + 0.05 + 0.05,  # 0.03, then 0.30 and 0.22
        ),
        (LossConfig("jsd", entry_clip=0.03), 0.03 + 0.03 + JSD[2]),
    ],
    ids=["forward", "forward, high clip", "reverse", "mixed", "jsd"],
)
def test_each_term_of_the_complete_vocabulary_is_clipped_before_the_sum(config: LossConfig, expected: float) -> None:
    assert by_hand(config, [0, 1, 2])[0] == pytest.approx(expected, rel=1e-12)


def test_clipped_entries_have_no_gradient() -> None:
    """The slopes of the forward KL with respect to log q are -p, or 0 if clipped: s = (0, -0.2, -0.1)."""
    _, gradient = by_hand(LossConfig("forward", entry_clip=0.05), [0, 1, 2])
    assert_close(gradient, torch.tensor([0.06, -0.05, -0.01], dtype=torch.float64), 1e-12)
    _, gradient = by_hand(LossConfig("jsd", entry_clip=0.02), [0, 1, 2])
    assert (gradient == 0).all()


@pytest.mark.parametrize(
    ("outside", "expected"),
    [
        ("bucket", REVERSE[0] + 0.8 * math.log(0.8 / 0.3)),
        ("renormalize", 0.0),
        ("floor", 0.2 * math.log(0.2) + 0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 100 * 0.8),
    ],
)
def test_the_tail_is_not_clipped(outside: Any, expected: float) -> None:
    """The only kept id has a negative term; the tail's term, 0.8 log(8 / 3), is far above the clip."""
    config = LossConfig("reverse", entry_clip=0.05, outside_topk=outside)
    assert by_hand(config, [0])[0] == pytest.approx(expected, abs=1e-12)


def test_token_kl_cap_limits_the_sum_of_the_clipped_terms() -> None:
    config = LossConfig("reverse", entry_clip=0.4, token_kl_cap=0.1)
    free, gradient = by_hand(dataclasses.replace(config, token_kl_cap=None), [0, 1, 2])
    capped, capped_gradient = by_hand(config, [0, 1, 2])
    assert free > 0.4 and capped == pytest.approx(0.1, rel=1e-12)
    assert_close(capped_gradient, gradient * (0.1 / free), 1e-12)


def test_an_infinite_entry_is_clipped_and_a_nan_is_not() -> None:
    case = make_case(2, 30, 4)
    config = LossConfig("forward", entry_clip=0.05)
    student = case.student_NV.clone()
    student[0, int(case.topk.ids_NK[0, 0])] = -math.inf
    student[1, int(case.topk.ids_NK[1, 0])] = math.nan
    student.requires_grad_()
    kl_N = topk_kl(student, case.topk, config)
    assert kl_N[0].isfinite() and kl_N[1].isnan()
    kl_N[0].backward()
    assert student.grad is not None and student.grad[0].isfinite().all()


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
@pytest.mark.parametrize("rows", [False, True])
def test_entry_clip_on_triton_is_as_exact_as_on_pytorch(rows: bool) -> None:
    config = LossConfig("jsd", entry_clip=0.02, support="student" if rows else "teacher")
    assert_as_good(on_both(config, torch.float32, 9, rows), 2e-6, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CLIPPED[:1] + CLIPPED[-2:-1], ids=name)
def test_entry_clip_over_the_complete_vocabulary_in_float32_and_bf16(config: LossConfig, dtype: torch.dtype) -> None:
    config = dataclasses.replace(config, entry_clip=0.01)
    hidden, head, t_hidden, t_head = (each.to(dtype).double() for each in rows_and_head(16, 3000, 32))
    teacher_NV = t_hidden @ t_head.t()
    exact, exact_gradients = gradients(
        lambda h, w: definition(h @ w.t(), teacher_NV, torch.arange(3000).expand(16, -1), config, 1.0).sum(),
        hidden,
        head,
    )
    rows = TeacherRows(t_hidden.to(dtype), t_head.to(dtype))
    found, found_gradients = gradients(
        lambda h, w: fused_linear_kl(h, w, rows, config, torch.ones(16), topk_logits_k=0),
        hidden.to(dtype),
        head.to(dtype),
    )
    assert float(found.kl_sum.detach()) == pytest.approx(float(exact.detach()), rel=1e-4)
    bound = 2e-5 if dtype == torch.float32 else 6e-3
    for ours, expected in zip(found_gradients, exact_gradients, strict=True):
        assert (ours.double() - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("weight", [0.0, 0.25])
@pytest.mark.parametrize("outside", ["bucket", "renormalize"])
def test_an_entry_that_is_impossible_for_the_teacher_has_the_clip_as_its_loss_and_no_gradient(
    weight: float, outside: Any
) -> None:
    """Teacher (0.7, 0.3, 0) and student (0.2, 0.5, 0.3): the terms are negative, 0.26 (weight 0) and infinite."""
    p, q, clip = [0.7, 0.3, 0.0], [0.2, 0.5, 0.3], 0.4
    config = LossConfig("mixed", mixed_kl_weight=weight, entry_clip=clip, outside_topk=outside)
    topk = TopK(torch.tensor([[0, 1, 2]]), torch.tensor([p], dtype=torch.float64).log(), torch.tensor([-math.inf]))
    ratios = [math.log(p[v] / q[v]) for v in (0, 1)]
    terms = [r * (weight * p[v] - (1 - weight) * q[v]) for v, r in enumerate(ratios)]
    slopes = [(1 - weight) * q[v] * (1 - r) - weight * p[v] for v, r in enumerate(ratios)] + [0.0]
    expected = torch.tensor([[s - q_v * sum(slopes) for s, q_v in zip(slopes, q, strict=True)]], dtype=torch.float64)
    leaf = torch.tensor([q], dtype=torch.float64).log().requires_grad_()
    kl_N = topk_kl(leaf, topk, config)
    assert float(kl_N.detach()) == pytest.approx(sum(terms) + clip, rel=1e-12)
    (gradient,) = torch.autograd.grad(kl_N.sum(), leaf)
    assert_close(gradient, expected, 1e-12)
    fused, (fused_gradient, _) = gradients(
        lambda x, w: fused_linear_kl(x, w, topk, config, torch.ones(1)), leaf.detach(), torch.eye(3).double()
    )
    assert_close(fused.kl_sum, kl_N.sum(), 1e-12)
    assert_close(fused_gradient * 3, expected, 1e-12)


@pytest.mark.parametrize("cap", [None, 1.0])
def test_an_infinite_reverse_kl_has_a_finite_gradient(cap: float | None) -> None:
    """With token_kl_cap the loss is the cap; a row with a finite loss keeps its gradient."""
    logprobs = torch.tensor([[0.7, 0.3, 0.0], [0.7, 0.2, 0.1]], dtype=torch.float64).log()
    topk = TopK(torch.tensor([[0, 1, 2]] * 2), logprobs, torch.full((2,), -math.inf))
    leaf = Q.log().expand(2, 3).clone().requires_grad_()
    kl_N = topk_kl(leaf, topk, LossConfig("reverse", outside_topk="bucket", token_kl_cap=cap))
    kl_N.sum().backward()
    assert float(kl_N[0]) == (math.inf if cap is None else cap)
    assert leaf.grad is not None and leaf.grad.isfinite().all() and (leaf.grad[1] != 0).all()
