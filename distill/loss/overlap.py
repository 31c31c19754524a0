"""The metric ``topk_overlap``: fraction of the K most likely tokens that student and teacher have in common.

A row is one response token. One model's K most likely tokens are the ids that the loss compares. Those of the other
model need a top-k of its logits, which the loss does not need. On a CPU this takes a few percent of the time of the
loss. The metric is therefore computed for a sample of the rows, which the caller selects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.loss.columns import Columns
from distill.loss.topk_reduction import LogitsKernels, Rows

_BLOCK = 16
"""Number of rows of which the logits are copied at the same time."""


@dataclass(frozen=True)
class Overlap:
    """Computation of the metric ``topk_overlap`` for chunks of rows; collective over the ranks of ``columns``."""

    mask_N: Tensor
    """bool [N]: the rows for which the metric is computed."""
    k: int
    """Number of ids per row that the loss compares."""
    columns: Columns
    """The columns of logits that this rank computes."""
    kernels: LogitsKernels

    def of(self, z_CV: Tensor, ids_CE: Tensor, rows: Rows) -> Tensor:
        """Return the metric for a chunk, float32 [C] from 0 to 1; nan in the rows for which it is not computed.

        ``z_CV``: raw logits of one model, not modified. ``ids_CE``: the ids of the other model's top-k, in the first K
        columns; -1 is padding. ``rows``: the rows of the chunk.
        """
        mask_C = self.mask_N[rows]
        if z_CV.is_cuda:  # all rows: the host would have to wait for the number of selected rows
            return self._share(z_CV, ids_CE).masked_fill(~mask_C, math.nan)
        overlap_C = torch.full((len(z_CV),), math.nan, device=z_CV.device)
        for rows_B in torch.split(mask_C.nonzero().squeeze(1), _BLOCK):
            overlap_C[rows_B] = self._share(z_CV[rows_B], ids_CE[rows_B])
        return overlap_C

    def _share(self, z_CV: Tensor, ids_CE: Tensor) -> Tensor:
        top_CK = self.columns.topk(self.kernels.topk, z_CV, self.k).long().sort(dim=1).values
        ids_CK = ids_CE[:, : self.k].long().contiguous()
        at_CK = torch.searchsorted(top_CK, ids_CK).clamp_(max=self.k - 1)
        return (top_CK.gather(1, at_CK) == ids_CK).sum(dim=1).float() / self.k
