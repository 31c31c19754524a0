"""Error of ``fused_linear_kl`` in float32: at most that of the definition in float32, plus 2e-6.

The head is the identity: hidden rows are logits, and their gradient is the logits' gradient.
"""

from __future__ import annotations

import dataclasses
import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.config import LossConfig
from distill.loss import Sampled, fused_linear_kl
from distill.types import Targets, TeacherRows, TopK
from tests.loss.test_fused import counts_nothing, gradients, name, rows_and_head
from tests.loss.test_loss_family import draw, with_token
from tests.loss_oracle import LOSSES, definition, exact_topk, make_case

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not find_spec("triton"), reason="needs Triton"))]
FEW = [LossConfig(), LossConfig(kl_type="reverse"), LossConfig("jsd", jsd_beta=0.3)]
SAMPLED = LossConfig(kl_type="sampled")


def sampled_definition(student_NV: Tensor, teacher_NV: Tensor, sampled: Sampled) -> Tensor:
    """Return kl_N, whose gradient is the policy gradient."""
    log_q, log_p = torch.log_softmax(student_NV, 1), torch.log_softmax(teacher_NV, 1)
    own_N, teachers_N = (x.gather(1, sampled.ids_N[:, None]).squeeze(1) for x in (log_q, log_p))
    frozen_N = own_N.detach()
    cost_N = (frozen_N - sampled.logprobs_N.to(own_N.dtype)).exp().clamp(max=2.0) * (frozen_N - teachers_N)
    return cost_N + cost_N * (own_N - frozen_N)


def assert_no_worse(
    student_NV: Tensor,
    teacher_NV: Tensor,
    config: LossConfig,
    temperature: float,
    path: str,
    k: int = 16,
    bound: float = 2e-6,
) -> Tensor:
    """Compare errors with the definition's and return the gradient.

    ``path``: ``given`` targets, the ``student``'s support, or the ``complete`` vocabulary.
    """
    rows, vocab = student_NV.shape
    scaled_NV = teacher_NV.double() / temperature
    topk, ids_N = exact_topk(teacher_NV, k, temperature), draw(student_NV.double() / temperature)
    ids_NK = {"student": student_NV.topk(k, 1).indices, "complete": torch.arange(vocab).expand(rows, -1)}.get(
        path, topk.ids_NK.long()
    )
    sampler_N = torch.log_softmax(student_NV.double() / temperature, 1).gather(1, ids_N[:, None]).squeeze(1) - 0.3
    sampled = Sampled(ids_N, sampler_N.float(), temperature)
    topk = with_token(topk, scaled_NV, ids_N) if config.kl_type == "sampled" else topk

    def defined(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        teacher = teacher_NV.to(dtype)

        def loss(x: Tensor) -> Tensor:
            if config.kl_type == "sampled":
                return sampled_definition(x / temperature, teacher / temperature, sampled).sum()
            return definition(x, teacher, ids_NK, config, temperature).sum()

        return gradients(loss, student_NV.to(dtype))

    (exact, (right,)), (plain, (plain_gradient,)) = defined(torch.float64), defined(torch.float32)
    targets: Targets = TopK(topk.ids_NK, topk.logprobs_NK.float(), topk.log_tail_N.float())
    if path in ("student", "complete"):
        targets, config = TeacherRows(teacher_NV, torch.eye(vocab)), dataclasses.replace(config)
        config = dataclasses.replace(config, support="student" if path == "student" else "teacher")
    fused, (gradient, _) = gradients(
        lambda x, w: fused_linear_kl(
            x, w, targets, config, torch.ones(rows), sampled, topk_logits_k=0 if path == "complete" else k
        ),
        student_NV,
        torch.eye(vocab),
    )
    slack = bound * max(1.0, abs(exact.item()))
    # If the definition overflows in float32, its infinite error allows none here.
    theirs, their_gradients = (
        (x if x.isfinite() else x.new_zeros(())) for x in (plain - exact, (plain_gradient - right).abs().max())
    )
    assert (fused.kl_sum.detach() - exact.detach()).abs() <= theirs.detach().abs() + slack
    assert (gradient - right).abs().max() <= their_gradients + slack
    return gradient


@pytest.mark.parametrize("temperature", [0.6, 2.0])
@pytest.mark.parametrize("path", ["given", "student", "complete"])
@pytest.mark.parametrize("config", [*LOSSES, SAMPLED], ids=name)
def test_float32_error_is_at_most_that_of_the_definition(config: LossConfig, path: str, temperature: float) -> None:
    case = make_case(4, 600, 1, scale=3.0)
    assert_no_worse(case.student_NV.float(), case.teacher_NV.float(), config, temperature, path)


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
@pytest.mark.parametrize(
    ("config", "path"),
    [(config, "given") for config in [*LOSSES, SAMPLED]] + [(FEW[0], "student"), (SAMPLED, "student")],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_float32_error_on_triton_is_at_most_that_of_the_definition(config: LossConfig, path: str) -> None:
    case = make_case(3, 600, 1, scale=3.0)
    config = dataclasses.replace(config, backend="triton")
    assert_no_worse(case.student_NV.float(), case.teacher_NV.float(), config, 0.6, path)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("peaked", ["teacher", "both, same token", "both, different tokens"])
@pytest.mark.parametrize("config", FEW, ids=name)
def test_near_one_hot_models_have_exact_losses(config: LossConfig, peaked: str, backend: Any) -> None:
    """One logit is 25 above the rest: the other 599 tokens have a mass of about 1e-9 together."""
    case = make_case(3, 600, 1, scale=1.0)
    student, teacher = case.student_NV.float(), case.teacher_NV.float()
    teacher[:, 7] = 25.0
    if peaked != "teacher":
        student[:, 7 if peaked == "both, same token" else 9] = 25.0
    config = dataclasses.replace(config, backend=backend)
    assert_no_worse(student, teacher, config, 1.0, "given")
    assert_no_worse(student, teacher, config, 1.0, "complete")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", FEW, ids=name)
def test_a_tail_mass_of_1e_9_has_a_gradient_to_four_digits(config: LossConfig, backend: Any) -> None:
    """1 - (mass of the kept ids) would be 0, and so would the gradient of every other token."""
    case = make_case(3, 600, 1, scale=1.0)
    lift_V = torch.where(torch.arange(600) < 8, 26.0, 0.0)
    student, teacher = (case.student_NV + lift_V).float(), (case.teacher_NV + lift_V).float()
    topk = exact_topk(teacher, 8)
    assert (topk.log_tail_N < math.log(3e-9)).all()
    config = dataclasses.replace(config, backend=backend)
    gradient = assert_no_worse(student, teacher, config, 1.0, "given", k=8)
    _, (right,) = gradients(lambda x: definition(x, teacher.double(), topk.ids_NK, config, 1.0).sum(), student.double())
    tail = torch.ones(3, 600, dtype=torch.bool).scatter(1, topk.ids_NK.long(), False)
    torch.testing.assert_close(gradient[tail].double(), right[tail], rtol=2e-4, atol=0)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize(("k", "support"), [(5, "teacher"), (5, "student"), (0, "teacher")])
@pytest.mark.parametrize("config", [LossConfig(), SAMPLED], ids=name)
def test_zero_teacher_rows_give_zero_gradients_and_every_metric(
    config: LossConfig, k: int, support: Any, rows: int
) -> None:
    """N = 0, and rows of weight 0."""
    config = dataclasses.replace(config, support=support)

    def run(count: int, weight: float) -> Any:
        hidden, head, t_hidden, t_head = rows_and_head(count, 30, 8)
        sampled = Sampled(torch.zeros(count, dtype=torch.int64), torch.zeros(count), 1.0)
        targets, weight_N = TeacherRows(t_hidden, t_head), torch.full((count,), weight)
        return gradients(
            lambda h, w: fused_linear_kl(h, w, targets, config, weight_N, sampled, topk_logits_k=k, stop_token_ids=[3]),
            hidden,
            head,
        )

    (empty, (d_hidden, d_head)), (full, _) = run(rows, 0.0), run(2, 1.0)
    assert empty.kl_sum.item() == 0.0
    assert d_hidden.shape == (rows, 8) and (d_hidden == 0).all()
    assert d_head.shape == (30, 8) and (d_head == 0).all()
    assert empty.stats.keys() == full.stats.keys()
    assert counts_nothing(empty.stats)
