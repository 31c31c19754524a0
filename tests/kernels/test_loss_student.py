"""The student's Triton kernels against float64 and the PyTorch reference in ``topk_reduction.py``.

Compiled with a CUDA device, else interpreted, which tests the arithmetic but not the barriers or the speed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.kernels import loss_student as student
from distill.kernels.loss_student import gradient_rows, reduce_rows
from distill.loss.topk_reduction import reduce_in_place

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts float32 to bf16 where the compiled kernel rounds.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
NEG_INF = float("-inf")


class Tail(NamedTuple):
    """Results of ``reduce_rows`` and the remaining logits over the temperature, in float64."""

    logits_CK: Tensor
    max_C: Tensor
    sum_C: Tensor
    product_C: Tensor
    z_CV: Tensor


class Upstream(NamedTuple):
    """Arguments of ``gradient_rows`` except the logits."""

    factor_C: Tensor
    slope_C: Tensor | None
    d_logits_CK: Tensor


def make_rows(rows: int, vocab: int, k: int, seed: int = 0, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """Return float32 logits and distinct int32 ids."""
    generator = torch.Generator().manual_seed(seed)
    z_CV = scale * torch.randn(rows, vocab, generator=generator)
    ids_CK = torch.rand(rows, vocab, generator=generator).argsort(dim=1)[:, :k].int()
    return z_CV.to(DEVICE), ids_CK.contiguous().to(DEVICE)


def make_upstream(rows: int, k: int, slope: bool = True, seed: int = 0) -> Upstream:
    generator = torch.Generator().manual_seed(seed + 1)
    numbers = torch.randn(rows, k + 2, generator=generator).to(DEVICE)
    return Upstream(numbers[:, 0], numbers[:, 1] if slope else None, numbers[:, 2:])


def exact_tail(z_CV: Tensor, ids_CK: Tensor, temperature: float) -> Tail:
    """Compute the definition row by row in float64."""
    z_CV = z_CV.double() / temperature
    logits_CK = torch.full(ids_CK.shape, NEG_INF, dtype=torch.float64, device=z_CV.device)
    for z_V, ids_K, logits_K in zip(z_CV, ids_CK.long(), logits_CK, strict=True):
        kept_K = ids_K >= 0
        logits_K[kept_K] = z_V[ids_K[kept_K]]
        z_V[ids_K[kept_K]] = NEG_INF
    max_C = z_CV.amax(dim=1)
    distance_CV = (z_CV - max_C[:, None]).masked_fill(z_CV == NEG_INF, -1e6)
    mass_CV = distance_CV.exp()
    return Tail(logits_CK, max_C, mass_CV.sum(dim=1), (distance_CV * mass_CV).sum(dim=1), z_CV)


def exact_gradient(tail: Tail, ids_CK: Tensor, upstream: Upstream) -> Tensor:
    distance_CV = (tail.z_CV - tail.max_C[:, None]).masked_fill(tail.z_CV == NEG_INF, -1e6)
    slope_C = torch.zeros_like(upstream.factor_C) if upstream.slope_C is None else upstream.slope_C
    gradient_CV = distance_CV.exp() * (upstream.factor_C[:, None] + slope_C[:, None] * distance_CV)
    for gradient_V, ids_K, d_logits_K in zip(gradient_CV, ids_CK.long(), upstream.d_logits_CK, strict=True):
        gradient_V[ids_K[ids_K >= 0]] = d_logits_K[ids_K >= 0].double()
    return gradient_CV


def assert_close(actual: Tensor, expected: Tensor, rtol: float, atol: float = 1e-30) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def assert_exact(
    z_CV: Tensor, ids_CK: Tensor, temperature: float = 1.0, out: torch.dtype | None = None, slope: bool = True
) -> None:
    """Both kernels against float64; ``out``: dtype of a separate gradient buffer (None: in place)."""
    tail = exact_tail(z_CV, ids_CK, temperature)
    upstream = make_upstream(ids_CK.shape[0], ids_CK.shape[1], slope)
    logits_CK, max_C, sum_C, product_C = reduce_rows(z_CV, ids_CK, 1 / temperature)
    assert {tensor.dtype for tensor in (logits_CK, max_C, sum_C, product_C)} == {torch.float32}
    assert_close(logits_CK, tail.logits_CK, 3e-7)
    assert_close(max_C, tail.max_C, 3e-7)
    assert_close(sum_C, tail.sum_C, 2e-6)
    largest = float(max_C.abs().masked_fill(max_C == NEG_INF, 0.0).max())
    # e^(z - m) from two float32 numbers is as good as these are; in the sum the largest logit's is exactly 1.
    assert_close(product_C, tail.product_C, 4e-6 + 2**-23 * largest)
    assert torch.equal(z_CV == NEG_INF, tail.z_CV == NEG_INF)

    out_CV = z_CV if out is None else torch.full_like(z_CV, float("nan"), dtype=out)
    assert gradient_rows(z_CV, ids_CK, max_C, *upstream, 1 / temperature, out_CV) is out_CV
    rounding = ROUNDING[out_CV.dtype] + 2**-23 * largest
    assert_close(out_CV, exact_gradient(tail, ids_CK, upstream), rounding, 2 * rounding)


# One warp's tile is 512 float32 or 1024 bf16 logits; from V = 2048 on 2048 or 4096.
@pytest.mark.parametrize(
    ("vocab", "k", "temperature"),
    [
        *((vocab, k, 0.6) for vocab, k in ((2, 1), (7, 3), (512, 5), (513, 64), (1024, 1), (5000, 1500), (4500, 2048))),
        *((1300, 64, temperature) for temperature in (0.6, 1.0, 2.0)),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "out"), [(torch.float32, torch.bfloat16), (torch.float32, None), (torch.bfloat16, None)]
)
def test_rows_of_any_length(
    vocab: int, k: int, dtype: torch.dtype, out: torch.dtype | None, temperature: float
) -> None:
    z_CV, ids_CK = make_rows(2, vocab, k)
    assert_exact(z_CV.to(dtype), ids_CK, temperature, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_of_151936(dtype: torch.dtype) -> None:
    z_CV, ids_CK = make_rows(1, 151_936, 64)
    assert_exact(z_CV.to(dtype), ids_CK, 0.6, torch.bfloat16)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("slope", [True, False])
def test_the_pytorch_twin_agrees(slope: bool, temperature: float) -> None:
    z_CV, ids_CK = make_rows(3, 700, 20)
    ids_CK[:, ::3] = -1
    factor_C, slope_C, d_logits_CK = make_upstream(3, 20, slope)
    reduced = reduce_in_place(z_CV / temperature, ids_CK, torch.empty_like(z_CV))
    twin = reduced.local
    logits_CK, max_C, sum_C, product_C = reduce_rows(z_CV, ids_CK, 1 / temperature)
    assert_close(logits_CK, twin.logits_CK, 3e-7)
    assert_close(max_C, twin.tail_top_C, 3e-7)
    assert_close(sum_C, twin.tail_sum_C, 1e-5)
    assert_close(product_C, twin.tail_product_C, 1e-5)
    gradient_CV = gradient_rows(z_CV, ids_CK, max_C, factor_C, slope_C, d_logits_CK, 1 / temperature, z_CV)
    assert_close(gradient_CV, reduced.gradient(d_logits_CK, factor_C, slope_C), 1e-5, 1e-6)


@pytest.mark.parametrize("infinite", [False, True])
@pytest.mark.parametrize(("vocab", "k"), [(97, 97), (2048, 2048)])
def test_an_empty_tail(vocab: int, k: int, infinite: bool) -> None:
    """All ids are kept, or all other logits are -inf: the tail's gradient is 0 even with a NaN factor."""
    z_CV, ids_CK = make_rows(2, vocab, k)
    if infinite:
        ids_CK = ids_CK[:, : k // 2]
        z_CV = torch.full_like(z_CV, NEG_INF).scatter_(1, ids_CK.long(), z_CV)
    expected_CK = z_CV.gather(1, ids_CK.long())
    logits_CK, max_C, sum_C, product_C = reduce_rows(z_CV, ids_CK, 1.0)
    assert torch.equal(logits_CK, expected_CK)
    assert (max_C == NEG_INF).all() and (sum_C == 0).all() and (product_C == 0).all()
    nan_C, d_logits_CK = torch.full_like(max_C, float("nan")), torch.rand_like(logits_CK)
    for slope_C in (None, nan_C):
        out_CV = torch.full_like(z_CV, float("nan"))
        gradient_rows(z_CV, ids_CK, max_C, nan_C, slope_C, d_logits_CK, 1.0, out_CV)
        assert torch.equal(out_CV, torch.zeros_like(z_CV).scatter_(1, ids_CK.long(), d_logits_CK))


def test_padding_ids_are_ignored() -> None:
    z_CV, ids_CK = make_rows(3, 600, 9)
    ids_CK[0, :4], ids_CK[1, 1::2], ids_CK[2] = -1, -1, -1
    assert_exact(z_CV, ids_CK.long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_a_stride_above_v(dtype: torch.dtype) -> None:
    """Columns beyond V, as in a padded vocabulary, are neither read nor written."""
    z_CV, ids_CK = make_rows(3, 560, 8)
    buffer_CV = torch.cat([z_CV, torch.full((3, 17), 77.0, device=DEVICE)], dim=1).to(dtype)
    assert_exact(buffer_CV[:, :560], ids_CK)
    assert (buffer_CV[:, 560:] == 77).all()
    buffer_CV[:, :560] = z_CV
    out_CV = torch.full((3, 600), 77.0, device=DEVICE)
    _, max_C, *_ = reduce_rows(buffer_CV[:, :560], ids_CK, 1.0)
    gradient_rows(buffer_CV[:, :560], ids_CK, max_C, *make_upstream(3, 8), 1.0, out_CV[:, :560])
    assert (out_CV[:, 560:] == 77).all() and not (out_CV[:, :560] == 77).any()


def test_offsets_above_32_bits_are_correct() -> None:
    """On a CPU, memory that is never written is not allocated."""
    z_CV, ids_CK = make_rows(3, 40, 4)
    strided_CV = torch.empty(2**31 + 40, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 40), (2**30, 1))
    assert_exact(strided_CV.copy_(z_CV), ids_CK)


def test_a_small_tail_keeps_its_digits() -> None:
    """1 - (mass of the kept ids) would be 0."""
    z_CV, ids_CK = make_rows(2, 600, 8, scale=1.0)
    z_CV.scatter_(1, ids_CK.long(), 30.0)
    tail = exact_tail(z_CV, ids_CK, 1.0)
    share_C = (tail.max_C + tail.sum_C.log() - tail.logits_CK.logsumexp(dim=1)).exp()
    assert (share_C < 1e-9).all() and (share_C > 1e-13).all()
    assert_exact(z_CV, ids_CK)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_peaked_rows_are_exact(temperature: float) -> None:
    """Logits of 10,000: no overflow, and the tail's sums are exact for any largest logit."""
    z_CV, ids_CK = make_rows(4, 1100, 8, scale=3000.0)
    z_CV.clamp_(-1e4, 1e4)
    z_CV[1] = z_CV[1].abs() / 1000 + 1e4  # many near the top
    z_CV[2, 600], z_CV[3] = 1e4, -1e4  # row 2: the second tile dominates the first; row 3: equal logits
    assert_exact(z_CV, ids_CK, temperature)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy's, under the interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinite_logits(dtype: torch.dtype) -> None:
    """-inf or the lowest finite number at the ids and elsewhere, in complete lanes and tiles."""
    z_CV, ids_CK = make_rows(5, 2500, 8)
    z_CV[0, ids_CK[0, :3].long()] = NEG_INF
    z_CV[1, ::3] = NEG_INF
    z_CV[2, :2100] = NEG_INF
    z_CV[3, 10:] = NEG_INF
    z_CV[4, :2450] = torch.finfo(dtype).min
    assert_exact(z_CV.to(dtype), ids_CK, out=torch.float32)


@pytest.mark.parametrize("column", [3, 590])
def test_a_nan_is_visible(column: int) -> None:
    z_CV, ids_CK = make_rows(1, 600, 2)
    ids_CK[0] = torch.tensor([0, 1])
    z_CV[0, column] = float("nan")
    _, _, sum_C, product_C = reduce_rows(z_CV, ids_CK, 1.0)
    assert sum_C.isnan().all() and product_C.isnan().all()
    zero_C = torch.zeros_like(sum_C)
    gradient_rows(z_CV, ids_CK, zero_C, zero_C, zero_C, torch.zeros(1, 2, device=DEVICE), 1.0, z_CV)
    assert z_CV.isnan().sum() == 1


def test_zero_rows_launch_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "_reduce", None)
    monkeypatch.setattr(student, "_gradient", None)
    z_CV, ids_CK = make_rows(0, 50, 4)
    logits_CK, max_C, sum_C, product_C = reduce_rows(z_CV, ids_CK, 1.0)
    assert logits_CK.shape == (0, 4) and max_C.shape == sum_C.shape == product_C.shape == (0,)
    assert gradient_rows(z_CV, ids_CK, max_C, sum_C, product_C, logits_CK, 1.0, z_CV) is z_CV


def test_bad_arguments_are_refused() -> None:
    z_CV, ids_CK = make_rows(2, 50, 4)
    max_C, d_logits_CK = torch.zeros(2, device=DEVICE), torch.zeros(2, 4, device=DEVICE)
    for bad_CV in (z_CV.double(), z_CV[0], z_CV[:, ::2]):
        with pytest.raises(ValueError, match="z_CV must"):
            reduce_rows(bad_CV, ids_CK, 1.0)
    for bad_CK in (ids_CK[:1], ids_CK[:, :0], ids_CK.float()):
        with pytest.raises(ValueError, match="ids_CK must"):
            reduce_rows(z_CV, bad_CK, 1.0)
    good: dict[str, Any] = dict(
        z_CV=z_CV, ids_CK=ids_CK, tail_max_C=max_C, factor_C=max_C, slope_C=max_C, d_logits_CK=d_logits_CK, out_CV=z_CV
    )
    bad = {
        "factor_C": max_C[:1],
        "slope_C": max_C.double(),
        "d_logits_CK": d_logits_CK[:, :2],
        "tail_max_C": max_C.bfloat16(),
        "out_CV": z_CV.half(),
    }
    for name, tensor in bad.items():
        with pytest.raises(ValueError, match=f"{name} must"):
            gradient_rows(**good | {name: tensor}, inverse_temperature=1.0)
    with pytest.raises(ValueError, match="shape of"):
        gradient_rows(**good | {"out_CV": z_CV[:, :40]}, inverse_temperature=1.0)
    with pytest.raises(ValueError, match="share memory"):
        gradient_rows(**good | {"out_CV": z_CV.view(torch.bfloat16)[:, :50]}, inverse_temperature=1.0)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 1300), st.integers(1, 80)),
    temperature=st.floats(0.3, 3.0),
    scale=st.floats(0.01, 30.0),
    padding=st.sampled_from([0.0, 0.5]),
    holes=st.sampled_from([0.0, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    out=st.sampled_from([None, torch.float32, torch.bfloat16]),
    slope=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_rows(
    shape: tuple[int, int, int],
    temperature: float,
    scale: float,
    padding: float,
    holes: float,
    dtype: torch.dtype,
    out: torch.dtype | None,
    slope: bool,
    seed: int,
) -> None:
    rows, vocab, k = shape
    z_CV, ids_CK = make_rows(rows, vocab, min(k, vocab), seed, scale)
    generator = torch.Generator().manual_seed(seed)
    ids_CK[(torch.rand(ids_CK.shape, generator=generator) < padding).to(DEVICE)] = -1
    z_CV[(torch.rand(z_CV.shape, generator=generator) < holes).to(DEVICE)] = NEG_INF
    if not torch.isfinite(exact_tail(z_CV, ids_CK, temperature).max_C).all():
        return  # test_an_empty_tail covers it
    assert_exact(z_CV.to(dtype), ids_CK, temperature, out, slope)
