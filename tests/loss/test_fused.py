"""``fused_linear_kl`` against ``topk_kl``, which test_loss.py compares with the definitions."""

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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.config import LossConfig
from distill.loss import Sampled, fused_linear_kl, teacher_topk, topk_kl
from distill.loss.lm_head import Projection
from distill.types import LossOutput, Stats, TeacherRows, TopK
from scripts.live_bytes import LiveBytes
from tests.loss_oracle import CLIPPED, LOSSES, definition, exact_topk, make_case

NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BUCKETS = [config for config in LOSSES if config.outside == "bucket"]


def name(config: LossConfig) -> str:
    return f"{config.kl_type}-{config.outside}" + ("-clipped" if config.entry_clip else "")


def rows_and_head(rows: int, vocab: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return hidden_ND and head_VD of student and teacher; the teacher is near, logits have a deviation of about 2."""
    generator = torch.Generator().manual_seed(seed)
    hidden, head, noise, head_noise = (
        torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (rows, vocab, rows, vocab)
    )
    head, head_noise = head * 2 / math.sqrt(width), head_noise / math.sqrt(width)
    return [tensor.to(dtype) for tensor in (hidden, head, hidden + noise / 2, head + head_noise)]


def counts_nothing(stats: Stats) -> bool:
    """Return whether each sum and count is 0, and each maximum -inf."""
    unknown = {name: (-math.inf if name.endswith("_max") else 0.0, 0.0) for name in stats}
    return {name: (float(total), float(count)) for name, (total, count) in stats.items()} == unknown


def gradients(output_of: Any, *leaves: Tensor) -> tuple[Any, list[Tensor]]:
    """Return ``output_of(*leaves)`` and the leaves' gradients of a third of its loss."""
    leaves_ = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    output = output_of(*leaves_)
    loss = output.kl_sum if isinstance(output, LossOutput) else output
    (loss / 3).backward()
    return output, [leaf.grad for leaf in leaves_]  # type: ignore[misc]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def mean(output: LossOutput, metric: str) -> float:
    total, count = output.stats[metric]
    return float(total) / float(count)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(2, 40), st.integers(1, 12)),
    data=st.data(),
    config=st.sampled_from([*LOSSES, *CLIPPED]),
    temperature=st.sampled_from([0.6, 1.0, 2.0]),
)
def test_fused_linear_kl_equals_topk_kl(shape, data, config, temperature) -> None:
    rows, vocab, width = shape
    hidden, head, teacher_hidden, teacher_head = rows_and_head(rows, vocab, width, data.draw(st.integers(0, 999)))
    k, chunk_rows = data.draw(st.integers(1, vocab)), data.draw(st.sampled_from([1, 7, rows]))
    weight_N = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=rows, max_size=rows))
    ).double()
    topk = exact_topk(teacher_hidden @ teacher_head.t(), k, temperature)
    sampled = Sampled(torch.zeros(rows, dtype=torch.int64), torch.zeros(rows), temperature)
    fused, fused_gradients = gradients(
        lambda h, w: fused_linear_kl(h, w, topk, config, weight_N, sampled, chunk_rows=chunk_rows), hidden, head
    )
    plain, plain_gradients = gradients(
        lambda h, w: (weight_N * topk_kl(h @ w.t(), topk, config, sampling_temperature=temperature)).sum(), hidden, head
    )
    assert_close(fused.kl_sum, plain, 1e-10)
    for ours, expected in zip(fused_gradients, plain_gradients, strict=True):
        assert_close(ours, expected, 1e-10)


@pytest.mark.parametrize("config", LOSSES, ids=name)
def test_row_values_are_those_of_topk_kl_without_rows_of_weight_zero(config) -> None:
    hidden, head, teacher_hidden, teacher_head = rows_and_head(7, 30, 8)
    topk = exact_topk(teacher_hidden @ teacher_head.t(), 6, 1.0)
    weight_N = torch.tensor([1.0, 0, 0.5, 1, 0, 2, 1], dtype=torch.float64)
    sampled = Sampled(topk.ids_NK[:, 0], torch.zeros(7), 1.0)
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        output = fused_linear_kl(hidden, head, topk, config, weight_N, sampled, chunk_rows=2, row_values=found)
    for row_metric, its_config in {
        "loss": config,
        "forward_kl": LossConfig("forward"),
        "reverse_kl": LossConfig("reverse"),
    }.items():
        plain_N = topk_kl(hidden @ head.t(), topk, its_config)
        assert_close(found[row_metric], plain_N[weight_N > 0], 1e-10)
    for metric, values_M in found.items():
        assert values_M.shape == (5,) and not values_M.requires_grad
        if metric != "loss":
            assert float(output.stats[metric][0]) == pytest.approx(float(values_M.sum()))
    assert found.keys() == output.stats.keys() - {"sampler_logprob_diff_max"}


@pytest.mark.parametrize("config", [LossConfig(), LossConfig("sampled")], ids=name)
@pytest.mark.parametrize(("k", "support"), [(5, "teacher"), (5, "student"), (0, "teacher")])
def test_the_teachers_logprob_of_the_sampled_token_does_not_depend_on_the_kept_ids(config, k, support) -> None:
    hidden, head, teacher_hidden, teacher_head = rows_and_head(7, 30, 8)
    ids_N, weight_N = torch.arange(7) * 4, torch.tensor([1.0, 0, 0.5, 1, 0, 2, 1])
    log_p_NV = torch.log_softmax(teacher_hidden @ teacher_head.t() / 0.6, 1)
    expected_N = log_p_NV.gather(1, ids_N[:, None]).squeeze(1)
    config = dataclasses.replace(config, support=support, temperature=0.6)
    variants: list[Any] = [TeacherRows(teacher_hidden, teacher_head)]
    if support == "teacher" and k:
        extra_ids_N = ids_N if config.kl_type == "sampled" else None
        topk = teacher_topk(teacher_hidden, teacher_head, k, 0.6, 3, extra_ids_N=extra_ids_N, sampled_ids_N=ids_N)
        assert topk.ids_NK.shape[1] == k + (extra_ids_N is not None) and topk.sampled_logprob_N is not None
        assert_close(topk.sampled_logprob_N, expected_N, 1e-12)
        variants.append(topk)
    for targets in variants:
        found: dict[str, Tensor] = {}
        sampled = Sampled(ids_N, -torch.ones(7), 0.6)
        fused_linear_kl(
            hidden, head, targets, config, weight_N, sampled, chunk_rows=2, topk_logits_k=k, row_values=found
        )
        assert_close(found["teacher_logprob"], expected_N[weight_N > 0], 1e-12)


@pytest.mark.parametrize("config", BUCKETS, ids=name)
@pytest.mark.parametrize(
    ("dtype", "loss_bound", "gradient_bound"), [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-5, 5e-6)]
)
def test_a_student_equal_to_its_teacher_has_zero_loss_and_gradient(config, dtype, loss_bound, gradient_bound) -> None:
    hidden, head, _, _ = rows_and_head(8, 3000, 32, dtype=dtype)
    topk = teacher_topk(hidden, head, 64, 1.0)
    output, (d_hidden, _) = gradients(lambda h, w: fused_linear_kl(h, w, topk, config, torch.ones(8)), hidden, head)
    assert abs(mean(output, "loss")) < loss_bound
    assert d_hidden.abs().max() < gradient_bound
    assert mean(output, "top1_agreement") == 1.0


def test_the_gradient_of_the_logits_sums_to_zero() -> None:
    case = make_case(5, 40, 6)
    for config in LOSSES:
        _, (gradient, _) = gradients(
            lambda x, w, c=config: fused_linear_kl(x, w, case.topk, c, torch.ones(5)),
            case.student_NV,
            torch.eye(40).double(),
        )
        assert_close(gradient.sum(dim=1), torch.zeros(5).double(), 1e-12)


@pytest.mark.parametrize("config", LOSSES, ids=name)
def test_the_chunk_size_does_not_change_the_loss(config: LossConfig) -> None:
    hidden, head, teacher_hidden, teacher_head = rows_and_head(20, 50, 8)
    topk = exact_topk(teacher_hidden @ teacher_head.t(), 7)
    sampled = Sampled(torch.arange(20), -torch.ones(20), 1.0)
    runs = [
        gradients(
            lambda h, w, c=chunk: fused_linear_kl(h, w, topk, config, torch.ones(20), sampled, chunk_rows=c),
            hidden,
            head,
        )
        for chunk in (1, 7, 20, None)
    ]
    for output, grads in runs[1:]:
        assert_close(output.kl_sum, runs[0][0].kl_sum, 1e-12)
        assert_close(grads[0], runs[0][1][0], 1e-12)
        assert_close(grads[1], runs[0][1][1], 1e-12)
        assert output.stats.keys() == runs[0][0].stats.keys()
        for metric in output.stats:
            assert mean(output, metric) == pytest.approx(mean(runs[0][0], metric), rel=1e-12)


def test_rows_of_weight_zero_have_no_effect_even_if_nan() -> None:
    hidden, head, teacher_hidden, teacher_head = rows_and_head(6, 30, 8)
    topk = exact_topk(teacher_hidden @ teacher_head.t(), 5)
    sampled = Sampled(torch.arange(6), -torch.ones(6).double(), 1.0)
    kept = torch.tensor([1, 2, 4])
    weight_N = torch.zeros(6).index_fill(0, kept, 1.0)
    dirty = [tensor.clone() for tensor in (hidden, topk.logprobs_NK, topk.log_tail_N)]
    for tensor in dirty:
        tensor[weight_N == 0] = math.nan
    dirty_topk = TopK(topk.ids_NK, *dirty[1:])
    clean_topk = TopK(topk.ids_NK[kept], topk.logprobs_NK[kept], topk.log_tail_N[kept])
    clean_sampled = Sampled(sampled.ids_N[kept], sampled.logprobs_N[kept], 1.0)
    for config, kept_M in itertools.product(LOSSES, (None, kept)):
        output, (d_hidden, d_head) = gradients(
            lambda h, w, c=config, rows=kept_M: fused_linear_kl(
                h, w, dirty_topk, c, weight_N, sampled, chunk_rows=2, kept_M=rows
            ),
            dirty[0],
            head,
        )
        expected, (e_hidden, e_head) = gradients(
            lambda h, w, c=config: fused_linear_kl(h, w, clean_topk, c, torch.ones(3), clean_sampled),
            hidden[kept],
            head,
        )
        assert_close(output.kl_sum, expected.kl_sum, 1e-12)
        assert_close(d_hidden[kept], e_hidden, 1e-12)
        assert (d_hidden[weight_N == 0] == 0).all()
        assert_close(d_head, e_head, 1e-12)
        for metric in expected.stats:
            assert mean(output, metric) == pytest.approx(mean(expected, metric), rel=1e-12), metric


@pytest.mark.parametrize("rows", [0, 3])
def test_zero_rows_give_zero_gradients_and_every_metric(rows: int) -> None:
    """N = 0, and rows of weight 0: the graph stays connected, so that a sharded model's hooks run."""
    hidden, head, teacher_hidden, teacher_head = rows_and_head(rows, 30, 8)
    topk = teacher_topk(teacher_hidden, teacher_head, 5, 1.0)
    assert topk.ids_NK.shape == (rows, 5)
    sampled = Sampled(torch.zeros(rows, dtype=torch.int64), torch.zeros(rows), 1.0)
    empty, (d_hidden, d_head) = gradients(
        lambda h, w: fused_linear_kl(h, w, topk, LossConfig(), torch.zeros(rows), sampled, stop_token_ids=[3]),
        hidden,
        head,
    )
    assert empty.kl_sum.item() == 0.0
    assert d_hidden.shape == (rows, 8)
    assert (d_hidden == 0).all()
    assert d_head.shape == (30, 8)
    assert (d_head == 0).all()
    assert counts_nothing(empty.stats)
    full_topk = teacher_topk(teacher_head[:2], teacher_head, 5, 1.0)
    full_sampled = Sampled(torch.zeros(2, dtype=torch.int64), torch.zeros(2), 1.0)
    full_hidden = rows_and_head(2, 30, 8)[0]
    full = fused_linear_kl(full_hidden, head, full_topk, LossConfig(), torch.ones(2), full_sampled, stop_token_ids=[3])
    assert full.stats.keys() == empty.stats.keys()


@pytest.mark.parametrize("config", LOSSES, ids=name)
def test_padded_vocabulary_rows_have_a_gradient_of_exactly_zero(config: LossConfig) -> None:
    hidden, head, teacher_hidden, teacher_head = rows_and_head(5, 30, 8)
    wide, teacher_wide = (torch.cat([weight, torch.full((6, 8), 9.0).double()]) for weight in (head, teacher_head))
    topk = teacher_topk(teacher_hidden, teacher_wide, 5, 1.0, valid_vocab=30)
    expected_topk = teacher_topk(teacher_hidden, teacher_head, 5, 1.0)
    assert_close(topk.logprobs_NK, expected_topk.logprobs_NK, 1e-12)
    weight_N = torch.ones(5)
    output, (d_hidden, d_head) = gradients(
        lambda h, w: fused_linear_kl(h, w, topk, config, weight_N, valid_vocab=30), hidden, wide
    )
    expected, (e_hidden, e_head) = gradients(lambda h, w: fused_linear_kl(h, w, topk, config, weight_N), hidden, head)
    assert_close(output.kl_sum, expected.kl_sum, 1e-12)
    assert_close(d_hidden, e_hidden, 1e-12)
    assert_close(d_head[:30], e_head, 1e-12)
    assert (d_head[30:] == 0).all()


@pytest.mark.parametrize(("vocab", "rows", "columns"), [(70, 200, 128), (70, 100, 100), (128, 200, 128), (70, 70, 70)])
def test_the_matmuls_have_a_multiple_of_64_columns_if_the_head_has_them(vocab: int, rows: int, columns: int) -> None:
    hidden, head, teacher_hidden, teacher_head = rows_and_head(5, rows, 8)
    sampled = Sampled(torch.arange(5), -torch.ones(5).double(), 1.0)
    cases = [
        (LossConfig(), 5),
        (LossConfig("jsd"), 0),
        (LossConfig("reverse", support="student"), 5),
        (LossConfig(), None),
    ]
    for config, k in cases:
        runs = []
        for end in (rows, vocab):
            targets: Any = TeacherRows(teacher_hidden, teacher_head[:end])
            with Matmuls() as matmuls:
                if k is None:
                    targets = teacher_topk(teacher_hidden, teacher_head[:end], 5, 1.0, valid_vocab=vocab)
                runs.append(
                    gradients(
                        lambda h, w, t=targets, c=config, k=k: fused_linear_kl(
                            h, w, t, c, torch.ones(5), sampled, chunk_rows=4, valid_vocab=vocab, topk_logits_k=k
                        ),
                        hidden,
                        head[:end],
                    )
                )
            assert matmuls.columns == {columns if end == rows else vocab}
        (padded, (d_hidden, d_head)), (exact, (e_hidden, e_head)) = runs
        assert_close(padded.kl_sum, exact.kl_sum, 1e-12)
        assert_close(d_hidden, e_hidden, 1e-12)
        assert_close(d_head[:vocab], e_head, 1e-12)
        assert (d_head[vocab:] == 0).all()
        for metric in exact.stats:
            assert mean(padded, metric) == pytest.approx(mean(exact, metric), rel=1e-12)


@pytest.mark.parametrize("config", LOSSES, ids=name)
def test_padding_ids_change_nothing(config: LossConfig) -> None:
    hidden, head, teacher_hidden, teacher_head = rows_and_head(5, 30, 8)
    topk = exact_topk(teacher_hidden @ teacher_head.t(), 5)
    order = [7, 0, 5, 1, 2, 6, 3, 4]
    padded = TopK(
        torch.cat([topk.ids_NK, torch.full((5, 3), -1)], dim=1)[:, order],
        torch.cat([topk.logprobs_NK, torch.full((5, 3), -math.inf).double()], dim=1)[:, order],
        topk.log_tail_N,
    )
    runs = [
        gradients(lambda h, w, t=t: fused_linear_kl(h, w, t, config, torch.ones(5)), hidden, head)
        for t in (topk, padded)
    ]
    assert_close(runs[1][0].kl_sum, runs[0][0].kl_sum, 1e-12)
    assert_close(runs[1][1][0], runs[0][1][0], 1e-12)
    assert_close(runs[1][1][1], runs[0][1][1], 1e-12)
    for metric in ("forward_kl", "reverse_kl", "student_topk_mass", "student_entropy", "top1_agreement"):
        assert mean(runs[1][0], metric) == pytest.approx(mean(runs[0][0], metric), rel=1e-12)


def test_every_metric_has_its_definition() -> None:
    hidden, head, teacher_hidden, teacher_head = rows_and_head(9, 40, 8)
    student, teacher = hidden @ head.t() / 0.6, teacher_hidden @ teacher_head.t() / 0.6
    log_q, log_p = torch.log_softmax(student, 1), torch.log_softmax(teacher, 1)
    topk = teacher_topk(teacher_hidden, teacher_head, 6, 0.6)
    ids, sampled_ids = topk.ids_NK.long(), torch.arange(9) * 4
    sampler = torch.linspace(-4, -1, 9).double()
    weight_N = torch.tensor([1.0, 1, 1, 0, 2, 1, 1, 0, 1]).double()
    kept = weight_N > 0
    output = fused_linear_kl(
        hidden, head, topk, LossConfig(), weight_N, Sampled(sampled_ids, sampler, 0.6), stop_token_ids=[3, 17]
    )
    kl_N, forward_N, reverse_N = (
        definition(student, teacher, ids, LossConfig(kl_type=kind), 1.0) for kind in ("mixed", "forward", "reverse")
    )
    inside = torch.zeros(9, 40, dtype=torch.bool).scatter(1, ids, True)
    stop = torch.zeros(40, dtype=torch.bool).index_fill(0, torch.tensor([3, 17]), True)
    own = log_q.gather(1, sampled_ids[:, None]).squeeze(1)
    expected = {
        "loss": None,
        "forward_kl": forward_N,
        "reverse_kl": reverse_N,
        "teacher_topk_mass": (log_p.exp() * inside).sum(1),
        "student_topk_mass": (log_q.exp() * inside).sum(1),
        "teacher_entropy": -(log_p.exp() * log_p).sum(1),
        "student_entropy": -(log_q.exp() * log_q).sum(1),
        "top1_agreement": (student.argmax(1) == teacher.argmax(1)).double(),
        "teacher_stop_mass": (log_p.exp() * (inside & stop)).sum(1),
        "student_logprob": own,
        "sampler_logprob_diff": (own - sampler).abs(),
        "sampler_logprob_diff_max": None,
    }
    assert output.stats.keys() == expected.keys()
    for metric, values in expected.items():
        if values is not None:
            assert float(output.stats[metric][1]) == 7
            assert mean(output, metric) == pytest.approx(float(values[kept].mean()), rel=1e-10), metric
    assert mean(output, "loss") == pytest.approx(float((weight_N * kl_N).sum() / weight_N.sum()), rel=1e-10)
    assert float(output.kl_sum) == pytest.approx(float((weight_N * kl_N).sum()), rel=1e-10)
    assert mean(output, "sampler_logprob_diff_max") == pytest.approx(
        float((own - sampler).abs()[kept].max()), rel=1e-10
    )
    assert 0 < mean(output, "top1_agreement") < 1
    assert mean(output, "teacher_stop_mass") > 0


def test_sampler_logprobs_are_compared_at_the_sampling_temperature() -> None:
    hidden, head, _, _ = rows_and_head(9, 40, 8)
    ids = torch.arange(9)
    own = torch.log_softmax(hidden @ head.t() / 0.6, 1).gather(1, ids[:, None]).squeeze(1)
    for temperature in (None, 1.0, 2.0):
        config = LossConfig(temperature=temperature)
        topk = teacher_topk(hidden, head, 6, temperature or 0.6)
        output = fused_linear_kl(hidden, head, topk, config, torch.ones(9), Sampled(ids, own, 0.6), chunk_rows=4)
        assert mean(output, "sampler_logprob_diff") < 1e-12
        assert mean(output, "loss") < 1e-12


@pytest.mark.parametrize("k", [1, 5, 40, 0])
@pytest.mark.parametrize("config", LOSSES, ids=name)
def test_teacher_rows_give_the_loss_of_their_topk(config: LossConfig, k: int) -> None:
    hidden, head, teacher_hidden, teacher_head = rows_and_head(9, 40, 8)
    rows = TeacherRows(teacher_hidden[:, :6], teacher_head[:, :6].contiguous())  # a different width than the student's
    topk = exact_topk(rows.hidden_ND @ teacher_head[:, :6].t(), k or 40, 0.6)
    config = LossConfig(config.kl_type, 0.3, 0.3, outside_topk=config.outside, temperature=0.6)
    weight_N = torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 1, 1])
    runs = [
        gradients(
            lambda h, w, t=t: fused_linear_kl(h, w, t, config, weight_N, chunk_rows=4, topk_logits_k=k), hidden, head
        )
        for t in (topk, rows)
    ]
    assert_close(runs[1][0].kl_sum, runs[0][0].kl_sum, 1e-10)
    assert_close(runs[1][1][0], runs[0][1][0], 1e-10)
    assert_close(runs[1][1][1], runs[0][1][1], 1e-10)
    for metric in runs[0][0].stats:
        assert mean(runs[1][0], metric) == pytest.approx(mean(runs[0][0], metric), rel=1e-10)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("k", [1, 7, 40])
def test_the_teachers_topk_is_exact(k: int, temperature: float) -> None:
    _, _, hidden, head = rows_and_head(11, 40, 8)
    expected = exact_topk(hidden @ head.t(), k, temperature)
    for chunk_rows in (1, 4, 11, None):
        topk = teacher_topk(hidden, head, k, temperature, chunk_rows)
        assert topk.ids_NK.dtype == torch.int32
        assert torch.equal(topk.ids_NK, expected.ids_NK)
        assert_close(topk.logprobs_NK, expected.logprobs_NK, 1e-12)
        assert_close(topk.log_tail_N, expected.log_tail_N, 1e-12)
        torch.testing.assert_close(topk.entropy_N, expected.entropy_N, rtol=1e-12, atol=1e-12)
    if k == 40:
        assert (expected.log_tail_N == -math.inf).all()


def test_the_teachers_tail_keeps_its_digits_in_float32() -> None:
    """One large logit: the tail's mass is about 1e-9, and 1 - p would be 0."""
    hidden, head, _, _ = rows_and_head(4, 500, 8)
    logits = (hidden @ head.t()).float()
    logits[:, 3] = 27.5
    topk, expected = teacher_topk(logits, torch.eye(500), 1, 1.0), exact_topk(logits, 1)
    assert (expected.log_tail_N.exp() < 1e-8).all()
    torch.testing.assert_close(topk.log_tail_N.double(), expected.log_tail_N, rtol=0, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of any operator's result."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


class Matmuls(TorchDispatchMode):
    """Collects the number of columns of logits in all matmuls; the hidden states have 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.columns: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in str(func):
            self.columns |= {size for matrix in args[-2:] for size in matrix.shape if size > 8}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", LOSSES, ids=name)
def test_no_tensor_is_larger_than_a_chunk_of_logits(config: LossConfig, dtype: torch.dtype) -> None:
    rows, vocab, width, chunk_rows = 64, 200, 8, 16
    hidden, head, teacher_hidden, teacher_head = rows_and_head(rows, vocab, width, dtype=dtype)
    hidden.requires_grad_()
    head.requires_grad_()
    with LargestTensor() as largest:
        topk = teacher_topk(teacher_hidden, teacher_head, 7, 1.0, chunk_rows)
        sampled = Sampled(torch.zeros(rows, dtype=torch.int64), torch.zeros(rows), 0.6)
        fused_linear_kl(hidden, head, topk, config, torch.ones(rows), sampled, chunk_rows=chunk_rows).kl_sum.backward()
    assert max(vocab * width, chunk_rows * vocab) == largest.elements < rows * vocab


def test_bf16_operands_give_float32_logits() -> None:
    """The loss is computed from float32 logits of the bf16 weights; ``logits_dtype: bfloat16`` rounds the logits."""
    hidden, head, teacher_hidden, teacher_head = rows_and_head(16, 2000, 32, dtype=torch.bfloat16)
    topk = teacher_topk(teacher_hidden, teacher_head, 32, 1.0)
    assert topk.logprobs_NK.dtype == torch.float32
    wide = exact_topk(teacher_hidden.double() @ teacher_head.double().t(), 32)
    assert_close(topk.logprobs_NK.double(), wide.logprobs_NK, 1e-5)
    exact, (e_hidden, e_head) = gradients(
        lambda h, w: fused_linear_kl(h, w, wide, LossConfig(), torch.ones(16)), hidden.double(), head.double()
    )
    output, (d_hidden, d_head) = gradients(
        lambda h, w: fused_linear_kl(h, w, topk, LossConfig(), torch.ones(16)), hidden, head
    )
    assert output.kl_sum.dtype == torch.float32
    assert d_hidden.dtype == d_head.dtype == torch.bfloat16
    assert float(output.kl_sum.detach()) == pytest.approx(float(exact.kl_sum.detach()), rel=1e-5)
    for ours, expected in ((d_hidden, e_hidden), (d_head, e_head)):
        assert (ours.double() - expected).norm() < 4e-3 * expected.norm()
    rounded = fused_linear_kl(hidden, head, topk, LossConfig(logits_dtype="bfloat16"), torch.ones(16))
    assert 1e-5 < abs(float(rounded.kl_sum) / float(exact.kl_sum) - 1) < 1e-2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_the_scale_of_the_backward_is_not_rounded_to_bf16(device: str) -> None:
    hidden, head, teacher_hidden, teacher_head = (
        tensor.to(device) for tensor in rows_and_head(32, 500, 64, dtype=torch.bfloat16)
    )
    topk = teacher_topk(teacher_hidden, teacher_head, 16, 1.0)
    scale = 1 / 3  # 0.33398 in bf16
    for leaf in (hidden, head):
        leaf.requires_grad_()

    def scaled(by: float) -> tuple[Tensor, ...]:
        output = fused_linear_kl(hidden, head, topk, LossConfig(), torch.ones(32, device=device))
        return torch.autograd.grad(output.kl_sum * by, (hidden, head))

    for one, other in zip(scaled(1.0), scaled(scale), strict=True):
        assert float(other.double().norm() / one.double().norm()) == pytest.approx(scale, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_is_refused(dtype: torch.dtype) -> None:
    """The backward scales the gradients in place: a second one would scale them again."""
    hidden, head, teacher_hidden, teacher_head = rows_and_head(5, 30, 8, dtype=dtype)
    topk = teacher_topk(teacher_hidden, teacher_head, 5, 1.0)
    output = fused_linear_kl(hidden.requires_grad_(), head.requires_grad_(), topk, LossConfig(), torch.ones(5))
    output.kl_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        output.kl_sum.backward()


def test_the_backward_allocates_no_second_head_gradient() -> None:
    hidden, head, teacher_hidden, teacher_head = rows_and_head(8, 100, 300, dtype=torch.float32)
    topk = teacher_topk(teacher_hidden, teacher_head, 5, 1.0)
    hidden.requires_grad_()
    head.requires_grad_()
    with LiveBytes((hidden.numel(), head.numel())) as memory:
        (fused_linear_kl(hidden, head, topk, LossConfig(), torch.ones(8)).kl_sum / 3).backward()
    assert memory.peak < head.nbytes / 4


def test_logits_dtype_bfloat16_rounds_the_logits_of_a_float32_head() -> None:
    case = make_case(4, 100, 8)
    topk, config = case.topk, LossConfig(logits_dtype="bfloat16")
    output = fused_linear_kl(case.student_NV.float(), torch.eye(100), topk, config, torch.ones(4))
    assert_close(output.kl_sum, topk_kl(case.student_NV.float().bfloat16(), topk, config).sum(), 1e-6)


def test_without_grad_mode_only_the_values_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, teacher_hidden, teacher_head = rows_and_head(5, 30, 8)
    topk = teacher_topk(teacher_hidden, teacher_head, 5, 1.0)
    assert not topk.logprobs_NK.requires_grad
    expected, _ = gradients(lambda h, w: fused_linear_kl(h, w, topk, LossConfig(), torch.ones(5)), hidden, head)
    monkeypatch.setattr(Projection, "hidden_gradient", None)
    monkeypatch.setattr(Projection, "add_head_gradient", None)
    with torch.no_grad():
        output = fused_linear_kl(hidden.requires_grad_(), head.requires_grad_(), topk, LossConfig(), torch.ones(5))
    assert not output.kl_sum.requires_grad
    assert_close(output.kl_sum, expected.kl_sum, 1e-14)
    assert {metric: mean(output, metric) for metric in output.stats} == {m: mean(expected, m) for m in expected.stats}


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, teacher_hidden, teacher_head = rows_and_head(5, 30, 8)
    topk = teacher_topk(teacher_hidden, teacher_head, 5, 1.0)
    _, (expected, _) = gradients(lambda h, w: fused_linear_kl(h, w, topk, LossConfig(), torch.ones(5)), hidden, head)
    _, (d_hidden,) = gradients(lambda h: fused_linear_kl(h, head, topk, LossConfig(), torch.ones(5)), hidden)
    assert_close(d_hidden, expected, 1e-14)


@pytest.mark.parametrize("config", [pytest.param(config, marks=NEEDS_CUDA, id=name(config)) for config in LOSSES])
def test_cuda_gives_the_numbers_of_the_cpu(config: LossConfig) -> None:
    tensors = rows_and_head(300, 5000, 64, dtype=torch.bfloat16)
    results = []
    for device in ("cpu", "cuda"):
        hidden, head, teacher_hidden, teacher_head = (tensor.to(device) for tensor in tensors)
        topk = teacher_topk(teacher_hidden, teacher_head, 64, 0.6)
        sampled = Sampled(torch.arange(300, device=device), torch.zeros(300, device=device), 0.6)
        weight_N = torch.ones(300, device=device)
        output, grads = gradients(
            lambda h, w, t=topk, s=sampled, n=weight_N: fused_linear_kl(h, w, t, config, n, s, chunk_rows=128),
            hidden,
            head,
        )
        results.append((output, [grad.cpu().double() for grad in grads]))
    (cpu, cpu_grads), (cuda, cuda_grads) = results
    assert float(cuda.kl_sum) == pytest.approx(float(cpu.kl_sum), rel=1e-4)
    for ours, expected in zip(cuda_grads, cpu_grads, strict=True):
        assert (ours - expected).norm() < 1e-2 * expected.norm()
