"""The pass over a chunk of logits, in place: down to K + 1 outcomes, and back up to the gradient.

The twin is ``divergences.student_outcomes`` under autograd, which holds several [N, V]; here two buffers of [C, V] do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.loss.divergences import Outcomes


class Scratch:
    """Two [C, V] buffers for a whole pass: on CPU, fresh memory for every chunk costs more than the arithmetic."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self._buffers = [torch.empty(rows, vocab, dtype=dtype, device=device) for _ in range(2)]

    def of(self, dtype: torch.dtype) -> Scratch:
        """Another scratch of the same shape."""
        rows, vocab = self._buffers[0].shape
        return Scratch(rows, vocab, dtype, self._buffers[0].device)

    def logits(self, rows: int) -> Tensor:
        """The first ``rows`` rows of the buffer that takes the logits."""
        return self._buffers[0][:rows]

    def spare(self, rows: int) -> Tensor:
        """The first ``rows`` rows of the other one."""
        return self._buffers[1][:rows]


@dataclass(frozen=True)
class Reduced:
    """A chunk of logits after ``reduce_in_place``."""

    outcomes: Outcomes
    """Shifted by ``shift_C``, so that each row's largest logit is 0."""
    shift_C: Tensor
    """Each row's largest logit."""
    columns_CK: Tensor
    """int64; padding points to column 0."""
    tail_CV: Tensor
    """exp(logit - largest of the tail), 0 at the kept ids. Overwritten by ``gradient_in_place``."""
    product_CV: Tensor
    """The same times (logit - largest of the tail)."""
    tail_sum_C: Tensor
    """Row sums of ``tail_CV``."""
    tail_shift_C: Tensor
    """Largest logit of the tail, less ``shift_C``."""

    def lse(self) -> Tensor:
        """Logsumexp of all logits, less ``shift_C``."""
        return self.outcomes.events_NE().logsumexp(dim=1)


def reduce_in_place(z_CV: Tensor, ids_CK: Tensor, spare_CV: Tensor) -> Reduced:
    """The K + 1 outcomes of a chunk of logits (already over the temperature); destroys ``z_CV`` and ``spare_CV``.

    The logits outside the kept ids must be finite, as those of a matmul are.
    """
    # The lowest finite number stands for -inf at the kept ids: 0 * -inf in the mean would be NaN.
    low, high = torch.finfo(z_CV.dtype).min, torch.finfo(z_CV.dtype).max
    kept_CK = ids_CK >= 0
    columns_CK = ids_CK.long().clamp(min=0)
    logits_CK = z_CV.gather(1, columns_CK).masked_fill_(~kept_CK, float("-inf"))
    # The minimum with the highest number leaves column 0 alone where padding points to it.
    z_CV.scatter_reduce_(1, columns_CK, torch.full_like(logits_CK, high).masked_fill_(kept_CK, low), "amin")
    tail_top_C = z_CV.amax(dim=1)
    empty_C = tail_top_C == low
    tail_CV = torch.exp(z_CV.sub_(tail_top_C.unsqueeze(1)), out=spare_CV)
    product_CV = z_CV.mul_(tail_CV)
    tail_sum_C = tail_CV.sum(dim=1)
    shift_C = torch.maximum(tail_top_C, logits_CK.amax(dim=1))
    tail_shift_C = tail_top_C - shift_C
    outcomes = Outcomes(
        logits_NK=logits_CK.sub_(shift_C.unsqueeze(1)),
        tail_N=(tail_shift_C + tail_sum_C.log()).masked_fill_(empty_C, float("-inf")),
        tail_mean_N=(tail_shift_C + product_CV.sum(dim=1) / tail_sum_C).masked_fill_(empty_C, 0.0),
    )
    return Reduced(outcomes, shift_C, columns_CK, tail_CV, product_CV, tail_sum_C, tail_shift_C)


def gradient_in_place(
    reduced: Reduced, d_logits_CK: Tensor, d_tail_C: Tensor | None, d_mean_C: Tensor | None
) -> Tensor:
    """The gradient with respect to the chunk's logits, [C, V], from that of its outcomes (None: no dependence).

    With t_j = tail_j / sum: d tail / d z_j = t_j and d mean / d z_j = t_j (1 + z_j - mean), for j in the tail. What
    has no mass, padding or an empty tail, comes with a gradient of exactly 0 and needs no mask here.
    """
    if d_tail_C is None:
        d_tail_C = torch.zeros_like(reduced.tail_sum_C)
    if d_mean_C is None:
        factor_C = d_tail_C / reduced.tail_sum_C
    else:
        distance_C = reduced.tail_shift_C - reduced.outcomes.tail_mean_N
        factor_C = (d_tail_C + d_mean_C * (1 + distance_C)) / reduced.tail_sum_C
    gradient_CV = reduced.tail_CV.mul_(factor_C.unsqueeze(1))
    if d_mean_C is not None:
        gradient_CV.addcmul_(reduced.product_CV, (d_mean_C / reduced.tail_sum_C).unsqueeze(1))
    return gradient_CV.scatter_add_(1, reduced.columns_CK, d_logits_CK)
