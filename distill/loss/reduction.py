"""The pass over a chunk of logits: down to K + 1 outcomes, and back up to the gradient.

The twin is ``divergences.student_outcomes`` under autograd, which holds several [N, V]; here two buffers of [C, V] do.
A pass sees the columns of one rank. ``combine`` puts the ranks of a vocabulary-parallel head together, with one
maximum and one sum between them; without a group it is the pass's own result. The same pass in Triton is in
``backend``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distill.loss.divergences import Outcomes

_NEG_INF = float("-inf")


class Scratch:
    """[C, V] buffers by name, each made once for a whole pass: on CPU, fresh memory costs more than the arithmetic."""

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        self._shape = (rows, vocab)
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        """The first ``rows`` rows of the buffer ``name`` of that dtype."""
        held = self._buffers.get((name, dtype))
        if held is None:
            count, vocab = self._shape
            # The kernels read 16 bytes at a time where every row begins at a multiple of them.
            stride = -(-vocab // 16) * 16 if self._device.type == "cuda" else vocab
            held = torch.empty(count, stride, dtype=dtype, device=self._device)[:, :vocab]
            self._buffers[name, dtype] = held
        return held[:rows]


@dataclass(frozen=True)
class Partial:
    """What the pass over this rank's columns found; logits are over the temperature, nothing is shifted."""

    logits_CK: Tensor
    """Logits at the kept ids; -inf where an id is -1 (padding, or a column of another rank)."""
    tail_top_C: Tensor
    """Largest logit of the tail; -inf where the tail is empty."""
    tail_sum_C: Tensor
    """Sum of exp(logit - tail_top) over the tail; 0 where it is empty."""
    tail_product_C: Tensor
    """Sum of (logit - tail_top) exp(logit - tail_top) over the tail; 0 where it is empty."""


class Reduced(Protocol):
    """A chunk of logits after its pass, with what the way back needs."""

    @property
    def partial(self) -> Partial:
        """The numbers found."""

    def gradient(self, d_logits_CK: Tensor, factor_C: Tensor, slope_C: Tensor | None) -> Tensor:
        """[C, V], overwriting the chunk's buffers: ``d_logits_CK`` at the kept ids, and elsewhere
        exp(z - tail_top) (factor + slope (z - tail_top)), without a slope where it is None."""


@dataclass(frozen=True)
class TorchReduced:
    """The pass in PyTorch."""

    partial: Partial
    columns_CK: Tensor
    """int64; what is not kept here points to column 0."""
    kept_CK: Tensor
    """bool: which ids are columns of this rank."""
    tail_CV: Tensor
    """exp(z - tail_top), 0 at the kept ids."""
    product_CV: Tensor
    """The same times (z - tail_top)."""

    def gradient(self, d_logits_CK: Tensor, factor_C: Tensor, slope_C: Tensor | None) -> Tensor:
        """See ``Reduced``."""
        gradient_CV = self.tail_CV.mul_(factor_C.unsqueeze(1))
        if slope_C is not None:
            gradient_CV.addcmul_(self.product_CV, slope_C.unsqueeze(1))
        return gradient_CV.scatter_add_(1, self.columns_CK, d_logits_CK.masked_fill(~self.kept_CK, 0.0))


def reduce_in_place(z_CV: Tensor, ids_CK: Tensor, spare_CV: Tensor) -> TorchReduced:
    """The pass over logits that are already over the temperature; destroys ``z_CV`` and ``spare_CV``.

    The logits outside the kept ids must be finite, as those of a matmul are.
    """
    # The lowest finite number stands for -inf at the kept ids: 0 * -inf in the product would be NaN.
    low, high = torch.finfo(z_CV.dtype).min, torch.finfo(z_CV.dtype).max
    kept_CK = ids_CK >= 0
    columns_CK = ids_CK.long().clamp(min=0)
    logits_CK = z_CV.gather(1, columns_CK).masked_fill_(~kept_CK, _NEG_INF)
    # The minimum with the highest number leaves column 0 alone where padding points to it.
    z_CV.scatter_reduce_(1, columns_CK, torch.full_like(logits_CK, high).masked_fill_(kept_CK, low), "amin")
    top_C = z_CV.amax(dim=1)
    empty_C = top_C == low
    tail_CV = torch.exp(z_CV.sub_(top_C.unsqueeze(1)), out=spare_CV)
    product_CV = z_CV.mul_(tail_CV)
    partial = Partial(
        logits_CK,
        top_C.masked_fill(empty_C, _NEG_INF),
        tail_CV.sum(dim=1).masked_fill_(empty_C, 0.0),
        product_CV.sum(dim=1).masked_fill_(empty_C, 0.0),
    )
    return TorchReduced(partial, columns_CK, kept_CK, tail_CV, product_CV)


@dataclass(frozen=True)
class Combined:
    """The K + 1 outcomes over all columns, and how this rank's tail stands in them."""

    outcomes: Outcomes
    """Shifted by ``shift_C``, so that each row's largest logit is 0."""
    shift_C: Tensor
    """Each row's largest logit."""
    tail_sum_C: Tensor
    """Sum of exp(logit - largest of the tail) over the whole tail."""
    tail_shift_C: Tensor
    """This rank's largest logit of the tail, less ``shift_C``."""
    tail_scale_C: Tensor
    """exp(this rank's largest logit of the tail - the largest of the whole tail)."""

    def lse(self) -> Tensor:
        """Logsumexp of all logits, less ``shift_C``."""
        return self.outcomes.events_NE().logsumexp(dim=1)

    def coefficients(self, d_tail_C: Tensor | None, d_mean_C: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``factor_C`` and ``slope_C`` of ``Reduced.gradient``, from the outcomes' gradient (None: no dependence).

        With t_j the softmax within the tail: d tail / d z_j = t_j and d mean / d z_j = t_j (1 + z_j - mean). Where this
        rank has no tail both are exactly 0.
        """
        share_C = (self.tail_scale_C / self.tail_sum_C).masked_fill(self.tail_shift_C == _NEG_INF, 0.0)
        if d_tail_C is None:
            d_tail_C = torch.zeros_like(share_C)
        if d_mean_C is None:
            return d_tail_C * share_C, None
        distance_C = 1 + self.tail_shift_C.masked_fill(share_C == 0, 0.0) - self.outcomes.tail_mean_N
        return (d_tail_C + d_mean_C * distance_C) * share_C, d_mean_C * share_C


def combine(
    partial: Partial, ids_CK: Tensor, own_ids_CK: Tensor, extra_CE: Tensor, group: dist.ProcessGroup | None
) -> tuple[Combined, Tensor]:
    """The outcomes over the columns of all ranks of ``group`` (None: this rank has them all).

    Args:
        partial: this rank's part.
        ids_CK: the kept ids of the whole vocabulary; -1 is padding.
        own_ids_CK: the same as this rank's pass had them: its own columns, -1 elsewhere.
        extra_CE: further numbers to be summed over the ranks; they come back beside the outcomes.

    Collective over the group: one maximum of [C], one sum of [C, K + 2 + E].
    """
    top_C, sum_C, product_C = partial.tail_top_C, partial.tail_sum_C, partial.tail_product_C
    logits_CK, scale_C = partial.logits_CK, torch.ones_like(sum_C)
    if group is not None:
        top_C = top_C.clone()
        dist.all_reduce(top_C, op=dist.ReduceOp.MAX, group=group)
        alone_C = partial.tail_top_C == _NEG_INF
        apart_C = (partial.tail_top_C - top_C).masked_fill(alone_C, 0.0)  # -inf - -inf is NaN
        scale_C = apart_C.exp().masked_fill(alone_C, 0.0)
        product_C = scale_C * (product_C + apart_C * sum_C)
        # Each kept id is a column of one rank: the others add 0. A padding id is nobody's, and -inf again afterwards.
        own_CK = logits_CK.masked_fill(own_ids_CK < 0, 0.0)
        packed = torch.cat([own_CK, torch.stack([scale_C * sum_C, product_C], dim=1), extra_CE], dim=1)
        dist.all_reduce(packed, group=group)
        k = logits_CK.shape[1]
        logits_CK = packed[:, :k].masked_fill(ids_CK < 0, _NEG_INF)
        sum_C, product_C, extra_CE = packed[:, k], packed[:, k + 1], packed[:, k + 2 :]
    empty_C = top_C == _NEG_INF
    shift_C = torch.maximum(top_C, logits_CK.amax(dim=1))
    tail_shift_C = top_C - shift_C
    outcomes = Outcomes(
        logits_NK=logits_CK - shift_C.unsqueeze(1),
        tail_N=(tail_shift_C + sum_C.log()).masked_fill(empty_C, _NEG_INF),
        tail_mean_N=(tail_shift_C + product_C / sum_C).masked_fill(empty_C, 0.0),
    )
    return Combined(outcomes, shift_C, sum_C, partial.tail_top_C - shift_C, scale_C), extra_CE
