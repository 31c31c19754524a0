"""Exact sums of bit patterns: whether the weights that arrived are those that were sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

WORD_BYTES = 8


class BitSums(NamedTuple):
    """Two sums of a tensor's bit patterns, modulo 2**64 (as int64).

    A row is read as 64-bit words, its end padded with zeros. Both sums add over any split of the rows, and over a
    split of the columns at a whole word. ``weighted`` tells rows that changed places, which ``plain`` can't. Whole
    words that change places inside one row are seen by neither.
    """

    plain: int
    """All words."""
    weighted: int
    """All words, each times its row's number, counted from 1."""


def bit_sums(tensor: Tensor, first_row: int = 0) -> Tensor:
    """The two sums as int64 [2] on the tensor's device, without waiting for it; ``first_row``: that of a piece.

    A vector is a column: its elements are rows. Words are summed as they lie in memory: reading an element at a time
    takes fifty times as long.
    """
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]
    short = -rows.shape[1] % (WORD_BYTES // tensor.element_size())
    if short:
        rows = torch.nn.functional.pad(rows, (0, short))
    sums = rows.contiguous().view(torch.int64).sum(-1)
    numbers = torch.arange(first_row + 1, first_row + 1 + len(sums), device=tensor.device)
    return torch.stack([sums.sum(), (sums * numbers).sum()])


def whole_bit_sums(weights: Iterable[tuple[str, Tensor]]) -> dict[str, BitSums]:
    """The sums of whole tensors by name."""
    return {name: BitSums(*bit_sums(tensor).tolist()) for name, tensor in weights}


def wrapped(total: int) -> int:
    """A Python sum of int64 numbers as int64 arithmetic would have it."""
    return (total + 2**63) % 2**64 - 2**63


def changed(before: Mapping[str, BitSums], after: Mapping[str, BitSums]) -> list[str]:
    """The tensors that are not what they were."""
    return [name for name, sums in after.items() if before.get(name) != sums]
