"""The reference implementations against the definitions of the losses."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.config import LossConfig
from distill.errors import UserError
from distill.loss import loss_temperature, topk_kl
from distill.types import TopK
from scripts.live_bytes import LiveBytes
from tests.loss_oracle import CLIPPED, LOSSES, definition, exact_topk, make_case, reference_kl

BUCKETS = [config for config in LOSSES if config.outside == "bucket"]


def name(config: LossConfig) -> str:
    return f"{config.kl_type}-{config.outside}" + ("-clipped" if config.entry_clip else "")


def with_gradient(loss_of, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """kl_N and the gradient of a weighted sum of it."""
    leaf = logits_NV.detach().clone().requires_grad_()
    kl_N = loss_of(leaf)
    weight_N = torch.linspace(0.5, 2.0, len(kl_N), dtype=kl_N.dtype)
    return kl_N.detach(), torch.autograd.grad((kl_N * weight_N).sum(), leaf)[0]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("config", [*LOSSES, *CLIPPED], ids=name)
def test_every_loss_has_the_value_and_gradient_of_its_definition(config: LossConfig, temperature: float) -> None:
    case = make_case(rows=5, vocab=40, k=7, temperature=temperature)
    value, gradient = with_gradient(
        lambda x: topk_kl(x, case.topk, config, sampling_temperature=temperature), case.student_NV
    )
    expected, expected_gradient = with_gradient(
        lambda x: definition(x, case.teacher_NV, case.topk.ids_NK, config, temperature), case.student_NV
    )
    assert_close(value, expected, 1e-10)
    assert_close(gradient, expected_gradient, 1e-10)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    vocab=st.integers(2, 30),
    data=st.data(),
    config=st.sampled_from(LOSSES),
    scale=st.floats(0.1, 6.0),
)
def test_every_loss_agrees_with_its_definition_at_random_shapes(rows, vocab, data, config, scale) -> None:
    k = data.draw(st.integers(1, vocab if config.outside != "floor" else vocab - 1))
    case = make_case(rows, vocab, k, seed=data.draw(st.integers(0, 999)), scale=scale)
    value, gradient = with_gradient(lambda x: topk_kl(x, case.topk, config), case.student_NV)
    expected, expected_gradient = with_gradient(
        lambda x: definition(x, case.teacher_NV, case.topk.ids_NK, config, 1.0), case.student_NV
    )
    assert_close(value, expected, 1e-9)
    assert_close(gradient, expected_gradient, 1e-9)
    assert_close(
        gradient.sum(dim=1), torch.zeros(rows, dtype=torch.float64), 1e-10
    )  # a shift of all logits changes nothing


def test_hand_worked_numbers() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2), K = 1: the coin (1/2, 1/2) against (1/4, 3/4)."""
    logits_NV = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
    topk = exact_topk(torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log(), 1)
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    reverse = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    assert_close(
        topk_kl(logits_NV, topk, LossConfig(kl_type="forward")), torch.tensor([forward], dtype=torch.float64), 1e-12
    )
    assert_close(
        topk_kl(logits_NV, topk, LossConfig(kl_type="reverse")), torch.tensor([reverse], dtype=torch.float64), 1e-12
    )
    mixed = LossConfig(kl_type="mixed", mixed_kl_weight=0.25)
    expected = torch.tensor([0.25 * forward + 0.75 * reverse], dtype=torch.float64)
    assert_close(topk_kl(logits_NV, topk, mixed), expected, 1e-12)


def test_the_bucket_gradient_has_its_closed_form() -> None:
    """dL/dx: forward q_k - p_k and (s - r) t_j; reverse q_k (a_k - R) and s (b - R) t_j."""
    case = make_case(rows=3, vocab=20, k=4)
    q_NV = torch.softmax(case.student_NV, 1)
    ids_NK = case.topk.ids_NK.long()
    q_NK, p_NK = q_NV.gather(1, ids_NK), case.topk.logprobs_NK.exp()
    s_N1, r_N1 = 1 - q_NK.sum(1, keepdim=True), case.topk.log_tail_N.exp().unsqueeze(1)
    a_NK, b_N1 = (q_NK / p_NK).log(), (s_N1 / r_N1).log()
    reverse_N1 = (q_NK * a_NK).sum(1, keepdim=True) + s_N1 * b_N1
    closed = {
        LossConfig(kl_type="forward"): ((s_N1 - r_N1) * q_NV / s_N1).scatter(1, ids_NK, q_NK - p_NK),
        LossConfig(kl_type="reverse"): (q_NV * (b_N1 - reverse_N1)).scatter(1, ids_NK, q_NK * (a_NK - reverse_N1)),
    }
    weight_N1 = torch.linspace(0.5, 2.0, 3, dtype=torch.float64).unsqueeze(1)
    for config, gradient_NV in closed.items():
        gradient = with_gradient(lambda x, c=config: topk_kl(x, case.topk, c), case.student_NV)[1]
        assert_close(gradient, weight_N1 * gradient_NV, 1e-10)


def test_hand_worked_jensen_shannon_divergence() -> None:
    """Teacher (1/2, 1/2), student (1/4, 3/4), empty tail: m = (7/20, 13/20) at beta 0.4."""
    topk = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]).double().log(), torch.tensor([-math.inf]).double())
    logits_NV = torch.tensor([[0.25, 0.75]]).double().log()
    teachers = 0.5 * math.log(0.5 / 0.35) + 0.5 * math.log(0.5 / 0.65)
    students = 0.25 * math.log(0.25 / 0.35) + 0.75 * math.log(0.75 / 0.65)
    expected = torch.tensor([0.4 * teachers + 0.6 * students], dtype=torch.float64)
    assert_close(topk_kl(logits_NV, topk, LossConfig(kl_type="jsd", jsd_beta=0.4)), expected, 1e-12)


def test_jensen_shannon_is_finite_if_the_student_excludes_a_teachers_token() -> None:
    case = make_case(3, 20, 4)
    config = LossConfig(kl_type="jsd")
    excluding_NV = case.student_NV.scatter(1, case.topk.ids_NK.long(), -math.inf)
    value, gradient = with_gradient(lambda x: topk_kl(x, case.topk, config), excluding_NV)
    assert (value > 0.1).all() and (value <= math.log(2)).all() and gradient.isfinite().all()


@pytest.mark.parametrize("zero_outside_topk", [False, True])
@pytest.mark.parametrize("kl_type", ["forward", "reverse", "mixed"])
def test_zero_outside_topk_is_nemo_rls_loss(kl_type: Any, zero_outside_topk: bool) -> None:
    case = make_case(rows=6, vocab=50, k=8)
    config = LossConfig(kl_type=kl_type, mixed_kl_weight=0.3, zero_outside_topk=zero_outside_topk)
    value, gradient = with_gradient(lambda x: topk_kl(x, case.topk, config), case.student_NV)
    ids_NK = case.topk.ids_NK.long()
    expected, expected_gradient = with_gradient(
        lambda x: reference_kl(x, case.teacher_NV, ids_NK, kl_type, 0.3, zero_outside_topk), case.student_NV
    )
    assert_close(value, expected, 1e-10)
    assert_close(gradient, expected_gradient, 1e-10)


@settings(max_examples=40, deadline=None)
@given(vocab=st.integers(2, 25), seed=st.integers(0, 999), config=st.sampled_from(BUCKETS))
def test_the_bucket_is_a_lower_bound_that_grows_to_the_full_kl(vocab: int, seed: int, config: LossConfig) -> None:
    case = make_case(3, vocab, vocab, seed)
    values = [topk_kl(case.student_NV, exact_topk(case.teacher_NV, k), config) for k in range(1, vocab + 1)]
    full = definition(case.student_NV, case.teacher_NV, case.topk.ids_NK, config, 1.0)
    assert (values[0] >= 0).all()
    assert all((larger - smaller >= -1e-12).all() for smaller, larger in pairwise(values))
    assert_close(values[-1], full, 1e-10)


@pytest.mark.parametrize(
    ("dtype", "value_bound", "gradient_bound"), [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-5, 5e-6)]
)
@pytest.mark.parametrize("config", BUCKETS, ids=name)
def test_a_student_equal_to_its_teacher_has_zero_loss_and_gradient(config, dtype, value_bound, gradient_bound) -> None:
    case = make_case(8, 2000, 64, scale=4.0)
    topk = TopK(case.topk.ids_NK, case.topk.logprobs_NK.to(dtype), case.topk.log_tail_N.to(dtype))
    value, gradient = with_gradient(lambda x: topk_kl(x, topk, config), case.teacher_NV.to(dtype))
    assert value.dtype == dtype
    assert value.abs().max() < value_bound
    assert gradient.abs().max() < gradient_bound


@pytest.mark.parametrize("config", LOSSES, ids=name)
def test_float32_error_is_at_most_that_of_the_definition(config: LossConfig) -> None:
    case = make_case(16, 3000, 64, scale=3.0)
    student = case.student_NV.float()
    topk = TopK(case.topk.ids_NK, case.topk.logprobs_NK.float(), case.topk.log_tail_N.float())
    exact, exact_gradient = with_gradient(
        lambda x: definition(x, case.teacher_NV, topk.ids_NK, config, 1.0), student.double()
    )
    plain, plain_gradient = with_gradient(
        lambda x: definition(x, case.teacher_NV.float(), topk.ids_NK, config, 1.0), student
    )
    value, gradient = with_gradient(lambda x: topk_kl(x, topk, config), student)
    slack_N = 2e-6 * exact.abs().clamp(min=1)
    assert ((value - exact).abs() <= (plain - exact).abs().max() + slack_N).all()
    own_error, plain_error = (gradient - exact_gradient).abs().amax(1), (plain_gradient - exact_gradient).abs().amax(1)
    assert (own_error <= plain_error.max() + slack_N).all()


@pytest.mark.parametrize("config", LOSSES, ids=name)
def test_padding_ids_change_nothing(config: LossConfig) -> None:
    case = make_case(4, 30, 5)
    ids_NK = torch.cat([case.topk.ids_NK, torch.full((4, 3), -1)], dim=1)
    logprobs_NK = torch.cat([case.topk.logprobs_NK, torch.full((4, 3), -math.inf).double()], dim=1)
    padded = TopK(ids_NK[:, [7, 0, 5, 1, 2, 6, 3, 4]], logprobs_NK[:, [7, 0, 5, 1, 2, 6, 3, 4]], case.topk.log_tail_N)
    expected = with_gradient(lambda x: topk_kl(x, case.topk, config), case.student_NV)
    actual = with_gradient(lambda x: topk_kl(x, padded, config), case.student_NV)
    assert_close(actual[0], expected[0], 1e-12)
    assert_close(actual[1], expected[1], 1e-12)


@pytest.mark.parametrize("config", LOSSES, ids=name)
def test_padded_columns_are_minus_infinity_with_gradient_zero(config: LossConfig) -> None:
    case = make_case(4, 30, 5)
    wide_NV = torch.cat([case.student_NV, torch.full((4, 6), 50.0).double()], dim=1)
    expected = with_gradient(lambda x: topk_kl(x, case.topk, config), case.student_NV)
    actual = with_gradient(lambda x: topk_kl(x, case.topk, config, valid_vocab=30), wide_NV)
    assert_close(actual[0], expected[0], 1e-12)
    assert_close(actual[1][:, :30], expected[1], 1e-12)
    assert (actual[1][:, 30:] == 0).all()


@pytest.mark.parametrize("config", BUCKETS, ids=name)
def test_a_tail_mass_of_1e_9_keeps_its_digits_in_float32(config: LossConfig) -> None:
    """1 - sum(q) would be exactly 0 here."""
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(4, 500, generator=generator, dtype=torch.float64) for _ in range(2)]
    shape_V = torch.cat([torch.zeros(8), torch.full((492,), -25.0)]).double()
    student, teacher = ((shape_V + x).float() for x in noise)
    topk = exact_topk(teacher.double(), 8)
    assert (topk.log_tail_N.exp() < 2e-8).all()
    low = TopK(topk.ids_NK, topk.logprobs_NK.float(), topk.log_tail_N.float())
    _, gradient = with_gradient(lambda x: topk_kl(x, low, config), student)
    _, exact = with_gradient(lambda x: definition(x, teacher.double(), topk.ids_NK, config, 1.0), student.double())
    tail = torch.ones(4, 500, dtype=torch.bool).scatter(1, topk.ids_NK.long(), False)
    torch.testing.assert_close(gradient[tail].double(), exact[tail], rtol=2e-4, atol=0)


@pytest.mark.parametrize("config", LOSSES, ids=name)
def test_an_empty_tail_has_finite_values_and_gradients(config: LossConfig) -> None:
    case = make_case(4, 12, 12)
    value, gradient = with_gradient(lambda x: topk_kl(x, case.topk, config), case.student_NV)
    expected, expected_gradient = with_gradient(
        lambda x: definition(x, case.teacher_NV, case.topk.ids_NK, LossConfig(config.kl_type, 0.3, 0.3), 1.0),
        case.student_NV,
    )
    assert_close(value, expected, 1e-10)
    assert_close(gradient, expected_gradient, 1e-10)


def test_the_gradient_is_finite_if_the_student_excludes_a_teachers_token() -> None:
    case = make_case(3, 20, 4)
    student_NV = case.student_NV.scatter(1, case.topk.ids_NK[:, 1:2].long(), -math.inf)
    student_NV[:, case.topk.ids_NK[0, 3]] = -math.inf
    forward, forward_gradient = with_gradient(
        lambda x: topk_kl(x, case.topk, LossConfig(kl_type="forward")), student_NV
    )
    assert (forward == math.inf).all()
    assert forward_gradient.isfinite().all()
    for outside in ("bucket", "renormalize", "floor"):
        config = LossConfig(kl_type="reverse", outside_topk=outside)
        reverse, reverse_gradient = with_gradient(lambda x, c=config: topk_kl(x, case.topk, c), student_NV)
        assert reverse.isfinite().all()
        assert reverse_gradient.isfinite().all()


@pytest.mark.parametrize("config", LOSSES, ids=name)
def test_a_student_without_a_tail_has_a_finite_gradient(config: LossConfig) -> None:
    case = make_case(3, 20, 4)
    inside = torch.zeros(3, 20, dtype=torch.bool).scatter(1, case.topk.ids_NK.long(), True)
    forward_bucket = config.outside == "bucket" and config.kl_type in ("forward", "mixed")
    value, gradient = with_gradient(
        lambda x: topk_kl(x, case.topk, config), case.student_NV.masked_fill(~inside, -math.inf)
    )
    assert (value == math.inf).all() if forward_bucket else value.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("config", LOSSES, ids=name)
def test_a_near_one_hot_student_has_the_exact_gradient(config: LossConfig) -> None:
    case = make_case(4, 30, 5, scale=1.0)
    student_NV = case.student_NV.scatter(1, case.topk.ids_NK[:, :1].long(), 40.0)
    _, gradient = with_gradient(lambda x: topk_kl(x, case.topk, config), student_NV)
    _, exact = with_gradient(lambda x: definition(x, case.teacher_NV, case.topk.ids_NK, config, 1.0), student_NV)
    torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-12)


def test_nan_logits_give_a_nan_loss() -> None:
    case = make_case(2, 20, 4)
    student_NV = case.student_NV.clone()
    student_NV[0, 3] = math.nan
    for config in LOSSES:
        if config.outside != "renormalize":  # does not depend on the tail
            assert topk_kl(student_NV, case.topk, config).isnan().tolist() == [True, False]


def test_the_gradient_passes_gradcheck() -> None:
    case = make_case(2, 9, 3)
    for config in LOSSES:
        torch.autograd.gradcheck(lambda x, c=config: topk_kl(x, case.topk, c), case.student_NV.requires_grad_())


def test_the_tails_mean_logit_is_computed_only_for_a_floor() -> None:
    """The mean takes two more [N, V]."""
    case = make_case(8, 5000, 4)

    def peak(config: LossConfig) -> float:
        leaf = case.student_NV.requires_grad_()
        with LiveBytes([leaf.numel()]) as memory:
            topk_kl(leaf, case.topk, config).sum().backward()
        leaf.grad = None
        return memory.peak / case.student_NV.nbytes

    assert peak(LossConfig(kl_type="reverse")) + 1 < peak(LossConfig(kl_type="reverse", outside_topk="floor"))


def test_bf16_logits_are_widened_to_float32() -> None:
    case = make_case(3, 50, 8)
    low = case.student_NV.bfloat16()
    value = topk_kl(low, case.topk, LossConfig())
    assert value.dtype == torch.float32
    assert_close(value, topk_kl(low.float(), case.topk, LossConfig()), 0.0)


def test_zero_rows_give_zero_values() -> None:
    case = make_case(3, 20, 4)
    topk = TopK(case.topk.ids_NK[:0], case.topk.logprobs_NK[:0], case.topk.log_tail_N[:0])
    logits_NV = torch.zeros(0, 20, requires_grad=True)
    kl_N = topk_kl(logits_NV, topk, LossConfig())
    kl_N.sum().backward()
    assert kl_N.shape == (0,)
    assert logits_NV.grad is not None


def test_loss_fn_temperature_overrides_the_sampling_temperature() -> None:
    assert loss_temperature(LossConfig(), 0.6) == 0.6
    assert loss_temperature(LossConfig(temperature=2.0), 0.6) == 2.0


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ({"logprobs_NK": torch.zeros(3, 5)}, "topk", [(3, 4), (3, 5), (3,)]),
        ({"log_tail_N": torch.zeros(2)}, "topk", [(3, 4), (3, 4), (2,)]),
        (
            {"ids_NK": torch.zeros(2, 4), "logprobs_NK": torch.zeros(2, 4), "log_tail_N": torch.zeros(2)},
            "topk",
            2,
        ),
        ({"ids_NK": torch.tensor([[0, 1, 2, 20]] * 3)}, "topk.ids_NK", (0, 20)),
        ({"ids_NK": torch.tensor([[0, 1, 2, -2]] * 3)}, "topk.ids_NK", (-2, 2)),
        ({"ids_NK": torch.tensor([[0, 1, 2, 3], [0, 7, 2, 7], [0, 1, 2, 3]])}, "topk.ids_NK", (1, 7)),
        ({"ids_NK": torch.zeros(3, 21), "logprobs_NK": torch.zeros(3, 21)}, "distillation.topk_logits_k", 21),
    ],
)
def test_bad_targets_are_refused_in_one_sentence(change: dict[str, Tensor], key: str, value: Any) -> None:
    case = make_case(3, 20, 4)
    fields = {"ids_NK": case.topk.ids_NK, "logprobs_NK": case.topk.logprobs_NK, "log_tail_N": case.topk.log_tail_N}
    with pytest.raises(UserError) as error:
        topk_kl(case.student_NV, TopK(**(fields | change)), LossConfig())
    assert (error.value.key, error.value.value) == (key, value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("temperature", [0.0, -0.6, math.inf, math.nan])
def test_a_temperature_that_is_not_above_zero_is_refused(temperature: float) -> None:
    case = make_case(3, 20, 4)
    with pytest.raises(UserError, match=str(temperature)) as error:
        topk_kl(case.student_NV, case.topk, LossConfig(temperature=temperature))
    assert error.value.key == "loss_fn.temperature"
