"""The rounding of merged weights to bfloat16: a fixed, unbiased dither of each element."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.model.lora_merge import Adapter, dithered, merge_into

NAME = "model.layers.3.mlp.up_proj.weight"


def _offsets(name: str, first_row: int, rows: int, first_column: int, columns: int) -> np.ndarray:
    """The 16-bit hash of each element by its definition, in 64-bit arithmetic modulo 2**32."""

    def mix(numbers: np.ndarray) -> np.ndarray:
        numbers = numbers * 0x7FEB352D % 2**32
        numbers ^= numbers >> 15
        return numbers * 0x846CA68B % 2**32

    def vector(seed: int, first: int, count: int) -> np.ndarray:
        mixed = mix((np.arange(first, first + count, dtype=np.uint64) + seed) % 2**32)
        return mixed ^ mixed >> 16

    digest = hashlib.sha256(name.encode()).digest()
    row_seed, column_seed = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4))
    pairs = vector(row_seed, first_row, rows)[:, None] ^ vector(column_seed, first_column, columns)[None]
    return mix(pairs) >> 16


def _rounded(values: Tensor, offsets: np.ndarray) -> Tensor:
    """Round away from zero the elements whose position between both bfloat16 neighbors plus offset / 65536 reaches 1.

    All arithmetic is exact in float64, and a bfloat16 number has 8 significant bits.
    """
    magnitude = values.double().abs().numpy()
    distance = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(magnitude, 1e-300))) - 7, -133)
    lower = np.floor(magnitude / distance) * distance
    up = (magnitude - lower) / distance + offsets / 65536 >= 1
    return torch.copysign(torch.from_numpy(lower + up * distance), values).bfloat16()


def _values(*shape: int) -> Tensor:
    """Random values of many magnitudes and both signs, also zeros, subnormal numbers and powers of two."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-130, 30, shape, generator=generator)
    flat = values.view(-1)
    flat[::7], flat[3], flat[5], flat[6] = torch.randn(len(flat[::7]), generator=generator) * 0.05, 0.0, -2.0, 1.99999
    return values


@pytest.mark.parametrize("name", [NAME, "lm_head.weight"])
def test_the_dither_follows_its_definition(name: str) -> None:
    values = _values(37, 53)
    assert torch.equal(dithered(values, name, 11, 1000), _rounded(values, _offsets(name, 11, 37, 1000, 53)))


def test_bfloat16_numbers_are_exact() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(torch.bfloat16)[None]
    numbers = numbers[numbers.isfinite()][None]  # also subnormal numbers and both zeros
    assert torch.equal(dithered(numbers.float(), NAME).view(torch.int16), numbers.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("trained", [torch.bfloat16, torch.float32])
def test_merging_an_adapter_without_effect_keeps_the_bits_of_the_base(dtype: torch.dtype, trained: torch.dtype) -> None:
    base = _values(37, 53).bfloat16().to(trained)
    base[3:6, :9], base[1], base[2] = -0.0, 0.5, 0.0
    lora_a, lora_b = torch.randn(4, 53), torch.zeros(37, 4)
    lora_a[0], lora_b[1, 0], lora_b[2, 0] = 1.0, -0.25, 1e-30  # base and update of row 1 add up to zero
    sent = torch.empty_like(base, dtype=dtype)
    assert merge_into(sent, NAME, base, Adapter(lora_a, lora_b, 2.0))
    bits = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[dtype]
    equal = sent.view(bits) == base.to(dtype).view(bits)
    assert equal[0].all() and equal[3:].all()
    assert not sent[1].any() and (sent[2] > 0).all()


def test_the_dither_of_a_part_is_that_of_the_complete_tensor() -> None:
    values = _values(64, 96)
    complete = dithered(values, NAME)
    assert torch.equal(dithered(values[5:40], NAME, 5), complete[5:40])
    assert torch.equal(dithered(values[:, 16:90], NAME, 0, 16), complete[:, 16:90])
    assert not torch.equal(dithered(values, "another.weight"), complete)


@pytest.mark.parametrize("value", [1.001, -0.0123, 1.9999, 3e-40, 2.0**-7 + 2.0**-30])
def test_the_mean_over_all_positions_is_the_value(value: float) -> None:
    values = torch.full((512, 1024), value)
    rounded = dithered(values, NAME).double()
    neighbors = rounded.unique()
    distance = float(neighbors.max() - neighbors.min())
    assert len(neighbors) <= 2
    position = (values[0, 0].double() - neighbors.min()) / distance if distance else torch.zeros(())
    error = 5 * distance * float((position * (1 - position) / values.numel()).sqrt()) + distance / 2**17
    assert abs(float(rounded.mean() - values[0, 0].double())) <= error


def test_offsets_are_uniform_and_uncorrelated_between_rows_columns_and_tensors() -> None:
    """For independent offsets, the largest of n^2 correlations of m numbers is about sqrt(2 log(n^2) / m)."""
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    first, second = (_of_dither(name, 512, 768) for name in names)
    counts = torch.histc(first, 256, 0, 1)
    assert float(((counts - 1536) ** 2 / 1536).sum()) < 255 + 5 * (2 * 255) ** 0.5  # chi square
    for offsets in (first, first.T, torch.cat([first, second]), torch.cat([first, second], 1).T):
        correlations = torch.corrcoef(offsets).fill_diagonal_(0).abs()
        bound = (2 * np.log(len(offsets) ** 2) / offsets.shape[1]) ** 0.5
        assert float(correlations.max()) < 1.3 * bound


def _of_dither(name: str, rows: int, columns: int) -> Tensor:
    """The offsets in [0, 1) that ``dithered`` uses, by bisection with values between 1 and its next neighbor."""
    offsets = torch.zeros(rows, columns)
    for i in range(1, 9):
        larger = offsets + 2.0**-i
        rounded_up = dithered(1 + (1 - larger) * 2.0**-7, name) > 1  # if the offset is at least ``larger``
        offsets = torch.where(rounded_up, larger, offsets)
    return offsets


def test_an_update_below_half_the_distance_of_two_numbers_arrives() -> None:
    """Rounding to nearest keeps a fifth of an update of rank 2 along its direction; the dither keeps all of it."""
    generator = torch.Generator().manual_seed(1)
    base = (torch.randn(512, 768, generator=generator) * 0.05).bfloat16().float()
    update = 1e-5 * torch.randn(512, 2, generator=generator) @ torch.randn(2, 768, generator=generator)
    update = (base + update) - base  # the part that float32 holds
    shares = [
        float(((sent - base) * update).sum() / update.square().sum())
        for sent in (dithered(base + update, NAME).float(), (base + update).bfloat16().float())
    ]
    assert abs(shares[0] - 1) < 0.02 and shares[1] < 0.25
