"""The top-k kernels against a stable sort and float64; interpreted without a GPU, else compiled."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.loss_oracle import exact_topk

pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")

from distill.kernels import topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parents[2]
NEG_INF = float("-inf")

# Divisions by zero that the interpreter's numpy mentions: an empty tail's log is -inf here and on a GPU, by IEEE rules.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def normal(rows: int, vocab: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    """Return normally distributed logits."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, vocab, generator=generator)).to(DEVICE)


def sorted_ids(z_CV: Tensor, k: int) -> Tensor:
    """Return the ids of the k largest, the lowest of equal ones, sorted by id."""
    return z_CV.float().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


def assert_same_ids(ids_CK: Tensor, z_CV: Tensor) -> None:
    assert ids_CK.dtype == torch.int32
    expected_CK = sorted_ids(z_CV, ids_CK.shape[1])
    got_CK = ids_CK.long().sort(dim=1).values
    values = [z_CV.float().gather(1, ids).sort(dim=1).values for ids in (got_CK, expected_CK)]
    assert torch.equal(*values), "another value would have been larger"
    assert torch.equal(got_CK, expected_CK), "the values are right, but a tie went to a higher id"


def assert_exact(z_CV: Tensor, k: int, temperature: float = 1.0, tolerance: float = 4e-6) -> Tensor:
    """Compare ``topk_with_tail`` with the oracles and return the expected log tail."""
    ids_CK, logprobs_CK, log_tail_C, entropy_C = topk.topk_with_tail(z_CV, k, 1 / temperature)
    assert_same_ids(ids_CK, z_CV)
    log_p_CV = torch.log_softmax(z_CV.double() / temperature, dim=1)
    rest_CV = log_p_CV.scatter(1, ids_CK.long(), NEG_INF)
    expected_C = rest_CV.logsumexp(dim=1)
    entropy_expected_C = -torch.xlogy(log_p_CV.exp(), log_p_CV.exp()).sum(dim=1)
    for got, expected in (
        (logprobs_CK, log_p_CV.gather(1, ids_CK.long())),
        (log_tail_C, expected_C),
        (entropy_C, entropy_expected_C),
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=3e-7, atol=tolerance)
    return expected_C


@pytest.mark.parametrize(
    ("rows", "vocab", "k", "dtype"),
    [
        pytest.param(2, 3000, 64, torch.float32, id="k64"),
        pytest.param(2, 5000, 300, torch.bfloat16, id="k300"),
        pytest.param(2, 5000, 1, torch.float32, id="k1"),
        pytest.param(2, 999, 17, torch.bfloat16, id="odd-vocabulary"),
        pytest.param(1, 17001, 64, torch.bfloat16, id="several-groups"),
        pytest.param(1, 40000, 2048, torch.float32, id="k2048"),
        pytest.param(2, 600, 200, torch.float32, id="k-a-third-of-the-row"),
        pytest.param(2, 5003, 2049, torch.bfloat16, id="k2049-odd-vocabulary"),
        pytest.param(1, 12_001, 4096, torch.float32, id="k4096-several-blocks"),
        pytest.param(2, 70, 69, torch.bfloat16, id="all-but-one"),
        pytest.param(2, 1, 1, torch.float32, id="one-column"),
    ],
)
def test_the_kept_ids_and_their_masses_are_exact(rows: int, vocab: int, k: int, dtype: torch.dtype) -> None:
    z_CV = normal(rows, vocab).to(dtype)
    assert_exact(z_CV, k)
    assert_same_ids(topk.topk_ids(z_CV, k), z_CV)


def test_tile_widths_of_real_vocabularies_are_covered() -> None:
    wide, middle, narrow, full_row = (topk.tiling(151_936, k) for k in (64, 512, 2048, 2049))
    assert (wide and wide.width, middle and middle.width, narrow and narrow.width, full_row) == (64, 32, 16, None)
    for vocab, k, width in ((17_001, 4, 64), (17_001, 64, 32), (17_001, 200, 16), (3000, 64, 8)):
        cut = topk.tiling(vocab, k)
        assert cut is not None and cut.width == width
        assert_exact(normal(1, vocab, seed=width), k)


def test_topk_with_tail_equals_the_loss_oracle() -> None:
    z_CV = normal(2, 3000)
    expected = exact_topk(z_CV, 64, 0.7)
    ids_CK, logprobs_CK, log_tail_C, entropy_C = topk.topk_with_tail(z_CV, 64, 1 / 0.7)
    order_CK = logprobs_CK.argsort(dim=1, descending=True)
    assert torch.equal(ids_CK.gather(1, order_CK), expected.ids_NK)
    torch.testing.assert_close(logprobs_CK.gather(1, order_CK).double(), expected.logprobs_NK, rtol=0, atol=2e-6)
    torch.testing.assert_close(log_tail_C.double(), expected.log_tail_N, rtol=0, atol=2e-6)
    assert expected.entropy_N is not None
    torch.testing.assert_close(entropy_C.double(), expected.entropy_N, rtol=0, atol=2e-6)


@pytest.mark.parametrize("mass", [1e-3, 1e-6, 1e-9, 1e-12])
def test_a_small_tail_keeps_its_digits(mass: float) -> None:
    """1 - (mass of the kept ids) would be 0 below 1e-8."""
    z_CV = normal(2, 4000, scale=1.0)
    kept = torch.randperm(4000, generator=torch.Generator().manual_seed(1))[:16].to(DEVICE)
    z_CV[:, kept] += -math.log(mass) + math.log(4000 / 16)
    log_tail_C = assert_exact(z_CV, 16, tolerance=5e-6)
    assert (log_tail_C - math.log(mass)).abs().max() < 1


def test_a_tail_below_the_range_of_float32_has_a_finite_log() -> None:
    z_CV = normal(2, 3000, scale=1.0)
    z_CV[:, 5:12] += 300
    log_tail_C = assert_exact(z_CV, 7, tolerance=4e-5)  # float32 holds 300 to 3e-5
    assert log_tail_C.max() < -250


@pytest.mark.parametrize("temperature", [0.25, 2.0])
def test_the_temperature_divides_the_logits(temperature: float) -> None:
    assert_exact(normal(2, 3000), 32, temperature, tolerance=1e-5)


@pytest.mark.parametrize("value", [0.0, -7.5, NEG_INF])
def test_of_equal_logits_the_lowest_ids_are_kept(value: float) -> None:
    z_CV = torch.full((1, 3000), value, device=DEVICE)
    ids_CK = topk.topk_ids(z_CV, 64)
    assert ids_CK.sort(dim=1).values.tolist() == [list(range(64))]
    if value > NEG_INF:
        assert_exact(z_CV, 64)


def test_ties_at_the_edge_go_to_the_lowest_ids_even_if_the_buffer_overflows() -> None:
    """40 ties for 10 slots fit the buffer; 900 overflow it, without an effect on the next row."""
    z_CV = normal(3, 3000, scale=0.1)
    generator = torch.Generator().manual_seed(2)
    for row, ties in ((0, 40), (1, 900)):
        columns = torch.randperm(3000, generator=generator)[: ties + 54].to(DEVICE)
        z_CV[row, columns] = 5.0
        z_CV[row, columns[:54]] = 6.0
    assert_exact(z_CV, 64)


@pytest.mark.parametrize(("vocab", "k"), [(3000, 64), (9000, 4500)], ids=["k64", "several-blocks-of-the-full-row"])
def test_rounded_logits_with_many_ties_are_exact(vocab: int, k: int) -> None:
    assert_exact(normal(2, vocab).round(), k)


def test_the_full_row_finds_any_kth_logit() -> None:
    """Adjacent numbers, one far from the rest, equal ones, both signs, -inf, and the end of an interval."""
    k = 2049
    assert topk.tiling(4200, k) is None
    one_bits = torch.tensor(1.0).view(torch.int32)
    z_CV = torch.empty(7, 4200)
    z_CV[0] = (one_bits + torch.arange(4200).flip(0)).int().view(torch.float32)
    z_CV[1] = (one_bits + torch.arange(4200) // 64 * 64).int().view(torch.float32)
    z_CV[2] = torch.where(torch.arange(4200) < k, 3e38, -3e38)
    z_CV[3] = -7.5
    z_CV[4] = torch.where(torch.arange(4200) < 100, 2.0, NEG_INF)
    z_CV[5] = normal(1, 4200)[0].cpu()
    z_CV[5, 17] = 1e30
    # The k-th logit is the last number of an interval of 64, 128 and more, with ties, and larger logits exist.
    steps = torch.tensor([0] * 1100 + [5001 * 128 - 1] * 2100)
    z_CV[6] = (one_bits + torch.cat([steps, 1_500_000 + torch.arange(1000)])).int().view(torch.float32)
    z_CV = z_CV.to(DEVICE)
    assert_same_ids(topk.topk_ids(z_CV, k), z_CV)
    assert_exact(z_CV[[0, 1, 3, 5]], k, tolerance=1e-5)


def test_zero_and_minus_zero_are_equal() -> None:
    z_CV = torch.full((1, 2000), -1.0, device=DEVICE)
    z_CV[0, 100:130] = 0.0
    z_CV[0, 100:130:3] = -0.0
    assert topk.topk_ids(z_CV, 20).sort(dim=1).values.tolist() == [list(range(100, 120))]


def test_negative_logits_are_in_order() -> None:
    assert_exact(normal(2, 3000) - 50, 64, tolerance=8e-6)


def test_sorted_rows_are_exact() -> None:
    z_CV = normal(2, 3000).sort(dim=1).values
    z_CV[1] = z_CV[1].flip(0)
    assert_exact(z_CV, 64)


def test_columns_of_minus_infinity_have_no_mass_and_are_kept_last() -> None:
    z_CV = normal(3, 3000)
    z_CV[0, 64:] = NEG_INF
    z_CV[1, 10:2990] = NEG_INF  # 20 finite logits for 64 slots
    z_CV[2, ::2] = NEG_INF
    log_tail_C = assert_exact(z_CV, 64)
    assert log_tail_C[:2].tolist() == [NEG_INF, NEG_INF] and log_tail_C[2] > NEG_INF


def test_the_complete_vocabulary_leaves_no_tail() -> None:
    z_CV = normal(2, 150)
    ids_CK, logprobs_CK, log_tail_C, _ = topk.topk_with_tail(z_CV, 150, 1.0)
    assert ids_CK.tolist() == [list(range(150))] * 2
    assert log_tail_C.tolist() == [NEG_INF] * 2
    torch.testing.assert_close(logprobs_CK.exp().sum(dim=1), torch.ones(2, device=DEVICE))


@pytest.mark.parametrize("k", [32, 1500], ids=["by-tiles", "full-row"])
@pytest.mark.parametrize("width", [3001, 3008])
def test_padding_between_the_rows_of_a_slice_is_not_read(width: int, k: int) -> None:
    padded_CV = normal(3, width)
    padded_CV[:, 2987:] = 1e4
    assert_exact(padded_CV[1:, :2987], k)


@pytest.mark.parametrize("k", [32, 1500], ids=["by-tiles", "full-row"])
def test_a_nan_affects_only_its_row_and_is_visible(k: int) -> None:
    z_CV = normal(4, 3000)
    z_CV[0, 7], z_CV[1], z_CV[3, 9] = float("nan"), float("nan"), -float("nan")
    ids_CK, logprobs_CK, _, entropy_C = topk.topk_with_tail(z_CV, k, 1.0)
    for row in range(4):
        ids = set(ids_CK[row].tolist())
        assert len(ids) == k and min(ids) >= 0 and max(ids) < 3000
    assert logprobs_CK.isnan().all(dim=1).tolist() == [True, True, False, True]
    assert entropy_C.isnan().tolist() == [True, True, False, True]
    assert_same_ids(ids_CK[2:3], z_CV[2:3])


def test_an_infinite_logit_is_found() -> None:
    z_CV = normal(1, 3000)
    z_CV[0, 1234] = float("inf")
    assert_same_ids(topk.topk_ids(z_CV, 8), z_CV)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_row_of_few_values_is_exact(data: st.DataObject) -> None:
    """Small rows with many ties, in both kernels."""
    vocab = data.draw(st.integers(1, 200), label="vocab")
    k = data.draw(st.integers(1, max(1, vocab // data.draw(st.sampled_from([1, 12]), label="part"))), label="k")
    few = [[0.0, 1.0], [-1.0, -0.0, 0.0, 2.5], [float(value) for value in range(40)]]
    values = data.draw(st.sampled_from(few), label="values")
    z = data.draw(st.lists(st.sampled_from(values), min_size=vocab, max_size=vocab), label="z")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), label="dtype")
    assert_exact(torch.tensor([z], dtype=dtype, device=DEVICE), k)


@pytest.mark.parametrize("k", [1, 35], ids=["by-tiles", "full-row"])
def test_offsets_above_32_bits_are_correct(k: int) -> None:
    """On a CPU, memory that is never written is not allocated."""
    assert (topk.tiling(40, k) is None) == (k == 35)
    z_CV = normal(3, 40)
    strided_CV = torch.empty(2**31 + 40, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 40), (2**30, 1))
    assert_exact(strided_CV.copy_(z_CV), k)


def test_no_rows_give_no_rows() -> None:
    outputs = topk.topk_with_tail(normal(0, 100), 5, 1.0)
    assert [tuple(output.shape) for output in outputs] == [(0, 5), (0, 5), (0,), (0,)]


@pytest.mark.parametrize(
    ("z_CV", "k", "named"),
    [
        (torch.zeros(2, 8, dtype=torch.float64), 2, "float64"),
        (torch.zeros(8), 2, r"\[8\]"),
        (torch.zeros(2, 8), 0, "is 0"),
        (torch.zeros(2, 8), 9, "is 9"),
        (torch.zeros(8, 2).t(), 2, "stride 2"),
    ],
    ids=["dtype", "shape", "no-k", "k-above-v", "stride"],
)
def test_bad_arguments_are_refused_with_their_values(z_CV: Tensor, k: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        topk.topk_ids(z_CV, k)


def test_an_inverse_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="inverse_temperature"):
        topk.topk_with_tail(torch.zeros(2, 8), 2, 0.0)
