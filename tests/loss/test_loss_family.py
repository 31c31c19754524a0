"""Settings beyond the teacher's top-k: sampled, the student's support, caps, the complete vocabulary."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.config import LossConfig
from distill.errors import UserError
from distill.loss import Sampled, Tokens, checks, divergences, full_vocab, fused_linear_kl, teacher_topk, topk_kl
from distill.loss.divergences import DIVERGENCES, Pair
from distill.loss.full_vocab import FAST_GRADIENTS, TERMS_AND_SLOPES
from distill.loss.targets import chunk_buffers, default_chunk_rows
from distill.types import Targets, TeacherRows, TopK, map_tensors
from scripts.live_bytes import LiveBytes
from tests.loss.test_fused import assert_close, gradients, mean, name, rows_and_head
from tests.loss_oracle import CLIPPED, LOSSES, definition, exact_topk, make_case

SAMPLED = LossConfig(kl_type="sampled")


def draw(logits_NV: Tensor, seed: int = 0) -> Tensor:
    """Draw a token of each row from its distribution."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(torch.softmax(logits_NV, 1), 1, generator=generator).squeeze(1)


def policy_gradient(student_NV: Tensor, teacher_NV: Tensor, ids_N: Tensor, sampler_N: Tensor, cap: float) -> Tensor:
    """Return ratio (log q - log p) d log q / d z at the sampled token, [N, V]."""
    log_q_NV, log_p_NV = torch.log_softmax(student_NV, 1), torch.log_softmax(teacher_NV, 1)
    own_N, teachers_N = (x.gather(1, ids_N[:, None]).squeeze(1) for x in (log_q_NV, log_p_NV))
    cost_N = (own_N - sampler_N).exp().clamp(max=cap) * (own_N - teachers_N)
    one_hot_NV = torch.nn.functional.one_hot(ids_N, student_NV.shape[1])
    return cost_N[:, None] * (one_hot_NV - log_q_NV.exp())


def value(student_NV: Tensor, teacher_NV: Tensor, ids_N: Tensor) -> Tensor:
    log_q_NV, log_p_NV = torch.log_softmax(student_NV, 1), torch.log_softmax(teacher_NV, 1)
    return (log_q_NV - log_p_NV).gather(1, ids_N[:, None]).squeeze(1)


def with_token(topk: TopK, teacher_NV: Tensor, ids_N: Tensor) -> TopK:
    """Add the sampled token to the targets' ids and recompute the tail without it."""
    inside = (topk.ids_NK == ids_N[:, None]).any(1)
    log_p_NV = torch.log_softmax(teacher_NV.double(), 1)
    extra_N = log_p_NV.gather(1, ids_N[:, None]).squeeze(1).masked_fill(inside, -math.inf)
    ids_NK = torch.cat([topk.ids_NK, ids_N.int().masked_fill(inside, -1)[:, None]], 1)
    rest_NV = log_p_NV.scatter(1, ids_NK.long().clamp(min=0), -math.inf)
    rest_NV = torch.where(inside[:, None], log_p_NV.scatter(1, topk.ids_NK.long(), -math.inf), rest_NV)
    return TopK(ids_NK, torch.cat([topk.logprobs_NK, extra_N[:, None]], 1), rest_NV.logsumexp(1))


@pytest.mark.parametrize("cap", [0.7, 2.0])
def test_sampled_is_a_policy_gradient_with_a_truncated_ratio(cap: float) -> None:
    case = make_case(12, 30, 4)
    ids_N = draw(case.student_NV)
    sampler_N = torch.log_softmax(case.student_NV, 1).gather(1, ids_N[:, None]).squeeze(1) + torch.linspace(-2, 2, 12)
    topk = with_token(case.topk, case.teacher_NV, ids_N)
    config = dataclasses.replace(SAMPLED, importance_ratio_cap=cap)
    student = case.student_NV.clone().requires_grad_()
    kl_N = topk_kl(student, topk, config, tokens=Tokens(ids_N, sampler_N))
    kl_N.sum().backward()
    assert student.grad is not None
    expected = policy_gradient(case.student_NV, case.teacher_NV, ids_N, sampler_N, cap)
    assert_close(student.grad, expected, 1e-10)
    ratio_N = (torch.log_softmax(case.student_NV, 1).gather(1, ids_N[:, None]).squeeze(1) - sampler_N).exp()
    assert (ratio_N > cap).any() and (ratio_N < cap).any()
    assert_close(kl_N.detach(), ratio_N.clamp(max=cap) * value(case.student_NV, case.teacher_NV, ids_N), 1e-10)


def test_the_gradient_of_sampled_is_the_slope_of_cost_times_logprob() -> None:
    """Unlike a KL's, the gradient is not the slope of the value, but of cost * log q(y) at a constant cost."""
    case = make_case(3, 9, 4)
    ids_N = draw(case.student_NV)
    topk = with_token(case.topk, case.teacher_NV, ids_N)
    tokens = Tokens(ids_N, torch.log_softmax(case.student_NV, 1).gather(1, ids_N[:, None]).squeeze(1) - 0.3)
    leaf = case.student_NV.clone().requires_grad_()
    kl_N = topk_kl(leaf, topk, SAMPLED, tokens=tokens)
    kl_N.sum().backward()
    assert leaf.grad is not None
    for row in range(3):
        for column in range(9):
            ends = []
            for step in (1e-6, -1e-6):
                moved_V = case.student_NV[row].clone()
                moved_V[column] += step
                ends.append(kl_N[row].detach() * torch.log_softmax(moved_V, 0)[ids_N[row]])
            assert float((ends[0] - ends[1]) / 2e-6) == pytest.approx(float(leaf.grad[row, column]), abs=1e-8)


def test_the_expectation_of_sampled_is_the_reverse_kl_and_its_gradient() -> None:
    """The expectation is an exact sum over the vocabulary."""
    vocab = 17
    case = make_case(1, vocab, 3)
    q_V = torch.softmax(case.student_NV[0], 0)
    student_NV, teacher_NV = case.student_NV.expand(vocab, -1), case.teacher_NV.expand(vocab, -1)
    ids_N = torch.arange(vocab)
    topk = with_token(exact_topk(teacher_NV, 3), teacher_NV, ids_N)
    leaf = student_NV.clone().requires_grad_()
    kl_N = topk_kl(leaf, topk, SAMPLED, tokens=Tokens(ids_N, q_V.log()))
    (q_V * kl_N).sum().backward()
    one = case.student_NV.clone().requires_grad_()
    reverse = definition(one, case.teacher_NV, torch.arange(vocab)[None], LossConfig(kl_type="reverse"), 1.0)
    reverse.sum().backward()
    assert leaf.grad is not None and one.grad is not None
    assert_close((q_V * kl_N.detach()).sum(), reverse.detach().sum(), 1e-10)
    assert_close(leaf.grad.sum(0), one.grad[0], 1e-10)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(2, 40), st.integers(1, 12)),
    data=st.data(),
    temperature=st.sampled_from([0.6, 1.0, 2.0]),
)
def test_sampled_has_its_definition_for_every_kind_of_targets(shape, data, temperature) -> None:
    rows, vocab, width = shape
    hidden, head, t_hidden, t_head = rows_and_head(rows, vocab, width, data.draw(st.integers(0, 999)))
    student_NV, teacher_NV = hidden @ head.t() / temperature, t_hidden @ t_head.t() / temperature
    ids_N = draw(student_NV, data.draw(st.integers(0, 999)))
    sampler_N = torch.log_softmax(student_NV, 1).gather(1, ids_N[:, None]).squeeze(1) - 0.3
    sampled, k = Sampled(ids_N, sampler_N, temperature), data.draw(st.integers(1, vocab))
    kept = teacher_topk(t_hidden, t_head, k, temperature, extra_ids_N=ids_N, chunk_rows=3)
    assert kept.ids_NK.shape == (rows, min(k + 1, vocab))
    expected = policy_gradient(student_NV, teacher_NV, ids_N, sampler_N, 2.0) @ head / temperature
    variants: list[tuple[Targets, int | None, Any]] = [
        (kept, None, "teacher"),
        (TeacherRows(t_hidden, t_head), k, "teacher"),
        (TeacherRows(t_hidden, t_head), k, "student"),
        (TeacherRows(t_hidden, t_head), 0, "teacher"),
    ]
    for targets, kept_k, support in variants:
        config = LossConfig(kl_type="sampled", support=support)
        output, (d_hidden, _) = gradients(
            lambda h, w, t=targets, k=kept_k, c=config: fused_linear_kl(
                h, w, t, c, torch.ones(rows), sampled, chunk_rows=4, topk_logits_k=k
            ),
            hidden,
            head,
        )
        assert_close(d_hidden * 3, expected, 1e-10)
        assert_close(output.kl_sum, (value(student_NV, teacher_NV, ids_N) * math.exp(0.3)).sum(), 1e-10)


def test_missing_sampled_tokens_are_refused() -> None:
    case = make_case(3, 30, 4)
    ids_N = torch.tensor([int(case.topk.ids_NK[0, 0]), int(exact_topk(case.teacher_NV, 30).ids_NK[1, -1]), 0])
    with pytest.raises(UserError) as error:
        topk_kl(case.student_NV, case.topk, SAMPLED, tokens=Tokens(ids_N, torch.zeros(3)))
    assert (error.value.key, error.value.value) == ("topk.ids_NK", (1, int(ids_N[1])))
    with pytest.raises(UserError) as error:
        topk_kl(case.student_NV, case.topk, SAMPLED)
    assert error.value.key == "loss_fn.kl_type"
    eye = torch.eye(30).double()
    with pytest.raises(UserError) as error:
        fused_linear_kl(case.student_NV, eye, case.topk, SAMPLED, torch.ones(3))
    assert error.value.key == "loss_fn.kl_type"
    config = dataclasses.replace(SAMPLED, temperature=2.0)
    with pytest.raises(UserError, match=r"2\.0.*1\.0") as error:
        fused_linear_kl(case.student_NV, eye, case.topk, config, torch.ones(3), Sampled(ids_N, torch.zeros(3), 1.0))
    assert (error.value.key, error.value.value) == ("loss_fn.temperature", 2.0)


@pytest.mark.parametrize("k", [1, 6, 40])
@pytest.mark.parametrize("config", LOSSES, ids=name)
def test_support_student_compares_the_models_at_the_students_tokens(config: LossConfig, k: int) -> None:
    hidden, head, t_hidden, t_head = rows_and_head(9, 40, 8)
    student_NV, teacher_NV = hidden @ head.t(), t_hidden @ t_head.t()
    ids_NK = student_NV.topk(k, dim=1).indices
    leaf = student_NV.clone().requires_grad_()
    weight_N = torch.tensor([1.0, 1, 0, 1, 0.5, 1, 1, 1, 1]).double()
    expected = (weight_N * definition(leaf, teacher_NV, ids_NK, config, 0.6)).sum()
    expected.backward()
    assert leaf.grad is not None
    config = dataclasses.replace(config, support="student", temperature=0.6)
    output, (d_hidden, d_head) = gradients(
        lambda h, w: fused_linear_kl(
            h, w, TeacherRows(t_hidden, t_head), config, weight_N, chunk_rows=4, topk_logits_k=k
        ),
        hidden,
        head,
    )
    assert_close(output.kl_sum, expected.detach(), 1e-10)
    assert_close(d_hidden * 3, leaf.grad @ head, 1e-10)
    assert_close(d_head * 3, leaf.grad.t() @ hidden, 1e-10)
    agrees = (student_NV.argmax(1) == teacher_NV.argmax(1))[weight_N > 0].double().mean()
    assert mean(output, "top1_agreement") == pytest.approx(float(agrees)) and 0 < agrees < 1
    p_NV = torch.softmax(teacher_NV / 0.6, 1)
    mass = p_NV.gather(1, ids_NK).sum(1)[weight_N > 0].mean()
    assert mean(output, "teacher_topk_mass") == pytest.approx(float(mass))
    entropy = -(p_NV * p_NV.log()).sum(1)[weight_N > 0].mean()
    assert mean(output, "teacher_entropy") == pytest.approx(float(entropy))


def test_support_student_needs_teacher_rows() -> None:
    case = make_case(3, 30, 4)
    with pytest.raises(UserError, match="TeacherRows") as error:
        fused_linear_kl(
            case.student_NV, torch.eye(30).double(), case.topk, LossConfig(support="student"), torch.ones(3)
        )
    assert error.value.key == "loss_fn.support"


@pytest.mark.parametrize("config", [*LOSSES, SAMPLED], ids=name)
def test_token_kl_cap_shrinks_a_rows_gradient_without_stopping_it(config: LossConfig) -> None:
    case = make_case(12, 30, 4)
    ids_N = draw(case.student_NV)
    topk = with_token(case.topk, case.teacher_NV, ids_N) if config.kl_type == "sampled" else case.topk
    sampler_N = torch.log_softmax(case.student_NV, 1).gather(1, ids_N[:, None]).squeeze(1)

    def run(cap: float | None) -> tuple[Tensor, Tensor, Any]:
        capped = dataclasses.replace(config, token_kl_cap=cap)
        leaf = case.student_NV.clone().requires_grad_()
        kl_N = topk_kl(leaf, topk, capped, tokens=Tokens(ids_N, sampler_N))
        kl_N.sum().backward()
        assert leaf.grad is not None
        fused = gradients(
            lambda x, w: fused_linear_kl(x, w, topk, capped, torch.ones(12), Sampled(ids_N, sampler_N, 1.0)),
            case.student_NV,
            torch.eye(30).double(),
        )
        assert_close(fused[0].kl_sum, kl_N.sum(), 1e-10)
        assert_close(fused[1][0] * 3, leaf.grad, 1e-10)
        return kl_N.detach(), leaf.grad, fused

    free_N, free, _ = run(None)
    cap = float(free_N.abs().median())
    capped_N, capped, _ = run(cap)
    factor_N = (cap / free_N.abs()).clamp(max=1)
    assert (factor_N < 1).sum() >= 4 and (factor_N == 1).sum() >= 4
    assert_close(capped_N, free_N * factor_N, 1e-12)
    assert_close(capped, free * factor_N[:, None], 1e-12)
    assert (capped.abs().sum(1) > 0).all()


def test_token_kl_cap_makes_an_infinite_row_finite() -> None:
    case = make_case(2, 30, 4)
    student = case.student_NV.clone()
    student[0, int(case.topk.ids_NK[0, 0])] = -math.inf
    config = LossConfig(kl_type="forward")
    assert topk_kl(student, case.topk, config).tolist()[0] == math.inf
    leaf = student.requires_grad_()
    kl_N = topk_kl(leaf, case.topk, dataclasses.replace(config, token_kl_cap=5.0))
    assert kl_N.tolist()[0] == 5.0 and kl_N.tolist()[1] > 0
    kl_N.sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert (leaf.grad[0] == 0).all() and leaf.grad[1].abs().sum() > 0


@pytest.mark.parametrize("k", [0, 8])
def test_all_rows_above_token_kl_cap_have_exactly_the_same_loss(k: int) -> None:
    """Otherwise ``token_weights.select`` would order them by rounding, which depends on the layout."""
    hidden, head, t_hidden, t_head = rows_and_head(64, 100, 8, dtype=torch.float32)
    targets = exact_topk(t_hidden @ t_head.t(), k) if k else TeacherRows(t_hidden, t_head)
    values: dict[str, Tensor] = {}
    config = LossConfig("forward", token_kl_cap=0.01)
    fused_linear_kl(hidden, head, targets, config, torch.ones(64), topk_logits_k=k, row_values=values)
    assert set(values["loss"].tolist()) == {float(torch.tensor(0.01))}


@pytest.mark.parametrize("config", [*LOSSES, SAMPLED], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_complete_vocabulary_in_float32_and_bf16(config: LossConfig, dtype: torch.dtype) -> None:
    """Also with the student as its own teacher: there a difference of sums would be all rounding error."""
    hidden, head, t_hidden, t_head = rows_and_head(16, 3000, 32, dtype=dtype)
    ids_N = draw((hidden @ head.t()).double())
    sampled = Sampled(ids_N, torch.zeros(16) - 1, 1.0)

    def run(teacher: TeacherRows, to: torch.dtype) -> Any:
        return gradients(
            lambda h, w: fused_linear_kl(
                h,
                w,
                map_tensors(teacher, lambda tensor: tensor.to(to)),
                config,
                torch.ones(16),
                sampled,
                topk_logits_k=0,
            ),
            hidden.to(to),
            head.to(to),
        )

    (far, far_grads), (exact, exact_grads) = (run(TeacherRows(t_hidden, t_head), to) for to in (dtype, torch.float64))
    assert float(far.kl_sum.detach()) == pytest.approx(float(exact.kl_sum.detach()), rel=1e-5)
    for ours, expected in zip(far_grads, exact_grads, strict=True):
        bound = 1e-5 if dtype == torch.float32 else 6e-3
        assert (ours.double() - expected).norm() < bound * expected.norm()
    if dtype == torch.float32:
        same, (d_hidden, _) = run(TeacherRows(hidden, head), dtype)
        assert abs(mean(same, "loss")) < 1e-5 and d_hidden.abs().max() < 5e-6


@pytest.mark.parametrize("config", [*LOSSES, *CLIPPED, SAMPLED], ids=name)
def test_token_kl_cap_over_the_complete_vocabulary_equals_k_equal_v(config: LossConfig) -> None:
    hidden, head, t_hidden, t_head = rows_and_head(12, 40, 8)
    sampled = Sampled(draw(hidden @ head.t()), -torch.ones(12).double(), 1.0)
    everything = exact_topk(t_hidden @ t_head.t(), 40)

    def run(targets: Targets, cap: float | None) -> Any:
        capped = dataclasses.replace(config, token_kl_cap=cap)
        return gradients(
            lambda h, w: fused_linear_kl(h, w, targets, capped, torch.ones(12), sampled, topk_logits_k=0), hidden, head
        )

    rows = TeacherRows(t_hidden, t_head)
    free, _ = run(rows, None)
    cap = 0.3 * abs(mean(free, "loss"))
    (ours, our_grads), (theirs, their_grads) = run(rows, cap), run(everything, cap)
    assert abs(mean(ours, "loss")) < 0.9 * abs(mean(free, "loss")), "no row was capped"
    assert_close(ours.kl_sum, theirs.kl_sum, 1e-10)
    for gradient, expected in zip(our_grads, their_grads, strict=True):
        assert_close(gradient, expected, 1e-10)


@pytest.mark.parametrize("config", [*LOSSES, *CLIPPED], ids=name)
def test_the_autograd_fallback_equals_the_fast_gradient(config: LossConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In value, gradients and metrics; for every divergence of the table."""
    hidden, head, t_hidden, t_head = rows_and_head(12, 40, 8)
    capped = dataclasses.replace(config, token_kl_cap=0.5)

    def run() -> Any:
        targets = TeacherRows(t_hidden, t_head)
        return gradients(
            lambda h, w: fused_linear_kl(h, w, targets, capped, torch.ones(12), topk_logits_k=0), hidden, head
        )

    fast, fast_gradients = run()
    by_hand = FAST_GRADIENTS if config.entry_clip is None else TERMS_AND_SLOPES
    assert by_hand.keys() == DIVERGENCES.keys(), "a divergence without a fast gradient is not compared here"
    monkeypatch.setattr(full_vocab, "FAST_GRADIENTS", {})
    monkeypatch.setattr(full_vocab, "TERMS_AND_SLOPES", {})
    fallback, fallback_gradients = run()
    assert_close(fallback.kl_sum, fast.kl_sum, 1e-12)
    for ours, expected in zip(fallback_gradients, fast_gradients, strict=True):
        assert_close(ours, expected, 1e-12)
    for metric in fast.stats:
        assert mean(fallback, metric) == pytest.approx(mean(fast, metric), rel=1e-12)


def test_a_new_divergence_is_one_function_and_one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Total variation, on the top-k path and over the complete vocabulary, without a gradient by hand."""

    def total_variation(pair: Pair, loss_config: LossConfig) -> Tensor:
        return (pair.log_p_NE.exp() - pair.log_q_NE.exp()).abs() / 2

    monkeypatch.setattr(divergences, "DIVERGENCES", {**DIVERGENCES, "tv": total_variation})
    monkeypatch.setattr(full_vocab, "DIVERGENCES", {**DIVERGENCES, "tv": total_variation})
    monkeypatch.setattr(checks, "_choices", dict)
    hidden, head, t_hidden, t_head = rows_and_head(9, 30, 8)
    config: Any = LossConfig(kl_type="tv")  # type: ignore[arg-type]
    p_NV = torch.softmax(t_hidden @ t_head.t(), 1)

    def by_definition(h: Tensor, w: Tensor) -> Tensor:
        return (p_NV - torch.softmax(h @ w.t(), 1)).abs().sum() / 2

    expected, expected_gradients = gradients(by_definition, hidden, head)
    for targets in (exact_topk(t_hidden @ t_head.t(), 30), TeacherRows(t_hidden, t_head)):
        found, found_gradients = gradients(
            lambda h, w, t=targets: fused_linear_kl(h, w, t, config, torch.ones(9), chunk_rows=4, topk_logits_k=0),
            hidden,
            head,
        )
        assert_close(found.kl_sum, expected, 1e-12)
        for ours, exact in zip(found_gradients, expected_gradients, strict=True):
            assert_close(ours, exact, 1e-12)


def test_the_autograd_fallback_reports_its_peak_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocab = 16, 4000
    hidden, head, t_hidden, t_head = rows_and_head(rows, vocab, 4, dtype=torch.float32)
    hidden.requires_grad_()
    head.requires_grad_()
    peaks = {}
    monkeypatch.setattr(full_vocab, "FAST_GRADIENTS", {})
    monkeypatch.setattr(full_vocab, "TERMS_AND_SLOPES", {})
    for kl_type, clip in itertools.product(DIVERGENCES, (None, 0.05)):
        config: Any = LossConfig(kl_type=kl_type, entry_clip=clip)  # type: ignore[arg-type]
        with LiveBytes((hidden.numel(), head.numel())) as memory:
            targets = TeacherRows(t_hidden, t_head)
            fused_linear_kl(hidden, head, targets, config, torch.ones(rows), topk_logits_k=0).kl_sum.backward()
        peaks[kl_type, clip] = memory.peak / (4 * rows * vocab)
    assert chunk_buffers(config, 0) - 1 < max(peaks.values()) < chunk_buffers(config, 0) + 0.3, peaks


@pytest.mark.parametrize(("support", "k", "buffers"), [("teacher", 5, 2), ("student", 5, 3), ("teacher", 0, 4)])
@pytest.mark.parametrize(
    "config",
    [LossConfig(), LossConfig("jsd"), SAMPLED, LossConfig(entry_clip=0.05), LossConfig("jsd", entry_clip=0.05)],
    ids=name,
)
def test_chunk_buffers_is_the_peak_memory_of_a_chunk(config: LossConfig, support: Any, k: int, buffers: int) -> None:
    """Peak of live bytes, without the gradients of hidden rows and head; ``default_chunk_rows`` uses this number."""
    rows, vocab, width, chunk_rows = 48, 4000, 4, 16
    hidden, head, t_hidden, t_head = rows_and_head(rows, vocab, width, dtype=torch.float32)
    hidden.requires_grad_()
    head.requires_grad_()
    config = dataclasses.replace(config, support=support)
    targets, ids_N = TeacherRows(t_hidden, t_head), torch.arange(rows)
    with LiveBytes((hidden.numel(), head.numel())) as memory:
        fused_linear_kl(
            hidden,
            head,
            targets,
            config,
            torch.ones(rows),
            Sampled(ids_N, torch.zeros(rows), 1.0),
            chunk_rows=chunk_rows,
            topk_logits_k=k,
        ).kl_sum.backward()
    assert buffers <= memory.peak / (4 * chunk_rows * vocab) < buffers + 0.3
    assert chunk_buffers(config, k) == buffers


def test_the_default_chunk_size_follows_a_memory_budget() -> None:
    hidden = torch.empty(0, 1)
    assert default_chunk_rows(hidden, 49_152) == default_chunk_rows(hidden, 500) == 256
    for vocab, buffers in ((49_152, 4), (151_936, 2), (151_936, 4)):
        rows = default_chunk_rows(hidden, vocab, buffers)
        assert rows >= 16 and 0.7 < rows * buffers * vocab * 4 / (96 * 2**20) <= 1
    assert default_chunk_rows(hidden.double(), 151_936) == default_chunk_rows(hidden, 151_936, 4)
    assert default_chunk_rows(hidden, 10**8) == 16
