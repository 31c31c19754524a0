"""The top-k in PyTorch keeps the lowest columns of equal logits, as the Triton kernels do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.loss.topk_reduction import _MORE, TorchKernels


def lowest_first(z_CV: Tensor, k: int) -> list[list[int]]:
    """Return the k columns of each row by decreasing logit and increasing column, sorted by column."""
    rows = z_CV.tolist()
    return [sorted(sorted(range(len(row)), key=lambda v: (-row[v], v))[:k]) for row in rows]


@pytest.mark.parametrize("levels", [1, 3, 20, 500], ids=lambda levels: f"{levels} different logits")
@pytest.mark.parametrize("k", [1, 7, 64, 100 - _MORE, 99, 100])
def test_of_equal_logits_the_lowest_columns_are_kept(k: int, levels: int) -> None:
    """With few levels, more logits are equal than the ``_MORE`` additional values can show."""
    z_CV = torch.randint(levels, (20, 100), generator=torch.Generator().manual_seed(levels)).float() - 2
    z_CV[::3][z_CV[::3] == 0] = -0.0
    z_CV[1::4, ::2] = -torch.inf
    found = TorchKernels().topk(z_CV, k)
    assert found.sort(dim=1).values.tolist() == lowest_first(z_CV, k)
