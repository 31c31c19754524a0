"""The top-k kernels against a stable sort and float64; interpreted without a GPU, else compiled."""

from __future__ import annotations

import math
import os
import subprocess
import sys
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
    ("rows", "vocab", "k"),
    [
        pytest.param(2, 3000, 64, id="k64"),
        pytest.param(2, 5000, 300, id="k300"),
        pytest.param(2, 5000, 1, id="k1"),
        pytest.param(2, 999, 17, id="odd-vocabulary"),
        pytest.param(1, 17001, 64, id="several-groups"),
        pytest.param(1, 40000, 2048, id="k2048"),
        pytest.param(2, 600, 200, id="k-a-third-of-the-row"),
        pytest.param(2, 70, 69, id="all-but-one"),
        pytest.param(2, 1, 1, id="one-column"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
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


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from distill.kernels import topk

# Every other parameter is a pointer to float32.
TYPES = {"z_ptr": "*bf16", "found_ptr": "*i32", "full_row_ptr": "*i32", "ids_ptr": "*i32"}
TYPES |= {"vocab": "i32", "z_stride": "i32", "groups": "i32", "inverse_temperature": "fp32"}
cut = topk.tiling(32_000, 64)
MADE_FOR = {"K": 64, "W": cut.width, "S": cut.per_group, "VEC": 8, "STATS": True, "TILES": 2048, "GROUPS": 4}
MADE_FOR |= {"ROOM": cut.room, "BLOCK": 1024}
for name, kernel in vars(topk).items():
    if not isinstance(kernel, triton.JITFunction) or kernel.arg_names[0] != "z_ptr":
        continue
    # An argument of 1 is a constant to Triton: the groups of a small vocabulary.
    for capability, known in ((80, MADE_FOR), (90, MADE_FOR | {"groups": 1})):
        signature = {p: "constexpr" if p in known else TYPES.get(p, "*fp32") for p in kernel.arg_names}
        constants = {(at,): known[p] for at, p in enumerate(kernel.arg_names) if p in known}
        aligned = [p.startswith(("vocab", "z_stride")) or p.endswith("_ptr") for p in kernel.arg_names]
        attributes = {(at,): [["tt.divisibility", 16]] for at, is_aligned in enumerate(aligned) if is_aligned}
        source = ASTSource(kernel, signature, constants, attributes)
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        assert len(binary.asm["cubin"]) > 1000
        ptx = binary.asm["ptx"]
        print(name, capability, ptx.count("ld.global"), ptx.count("ld.global.v4"), ptx.count("shfl"))
"""


@pytest.mark.slow
def test_every_kernel_compiles_and_reads_16_bytes_at_a_time(tmp_path: Path) -> None:
    """In a separate process, because kernels decorated for the interpreter cannot be compiled."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    assert "TRITON_INTERPRET" not in environment, "child processes would interpret their kernels"
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = {}
    for line in done.stdout.splitlines():
        name, capability, *numbers = line.split()
        counts[name, capability] = [int(number) for number in numbers]
    assert set(counts) == {(name, c) for name in ("scan_tiles", "select", "full_row") for c in ("80", "90")}
    for capability in ("80", "90"):
        loads, wide_loads, shuffles = counts["scan_tiles", capability]
        assert loads == wide_loads > 0, "a load of less than 16 bytes"
        assert shuffles < 64, "threads exchange a tile's values"
