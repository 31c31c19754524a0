"""Exact sums of bit patterns, to verify that the received weights are the sent ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

WORD_BYTES = 8


class BitSums(NamedTuple):
    """Two sums of a tensor's bit patterns, modulo 2**64 (as int64).

    A row is read as 64-bit words, its end padded with zeros. Both sums add over any split of the rows, and over a split
    of the columns at a word boundary. ``weighted`` detects exchanged rows, ``plain`` does not. Neither detects words
    that are exchanged inside one row.
    """

    plain: int
    """Sum of all words."""
    weighted: int
    """Sum of all words, each times its row number, counted from 1."""


def bit_sums(tensor: Tensor, first_row: int = 0) -> Tensor:
    """Return the two sums as int64 [2] on the tensor's device, without synchronising.

    ``first_row``: index of the first row in the complete tensor if ``tensor`` is a slice of rows. A vector is read as a
    column: its elements are rows. Words are read in place; reading single elements takes fifty times as long.
    """
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]
    short = -rows.shape[1] % (WORD_BYTES // tensor.element_size())
    if short:
        rows = torch.nn.functional.pad(rows, (0, short))
    sums = rows.contiguous().view(torch.int64).sum(-1)
    numbers = torch.arange(first_row + 1, first_row + 1 + len(sums), device=tensor.device)
    return torch.stack([sums.sum(), (sums * numbers).sum()])


def bit_sums_by_name(weights: Iterable[tuple[str, Tensor]]) -> dict[str, BitSums]:
    """Return the sums of complete tensors by name."""
    return {name: BitSums(*bit_sums(tensor).tolist()) for name, tensor in weights}


def wrap_int64(total: int) -> int:
    """Return a Python integer modulo 2**64, as int64 arithmetic wraps it."""
    return (total + 2**63) % 2**64 - 2**63


def changed_names(before: Mapping[str, BitSums], after: Mapping[str, BitSums]) -> list[str]:
    """Return the names of ``after`` whose sums are new or differ from ``before``."""
    return [name for name, sums in after.items() if before.get(name) != sums]
