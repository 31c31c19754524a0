"""Reduce a chunk of logits [C, V] to the K kept logits and the tail's sums, and expand their gradient to [C, V] again.

The plain twin is ``divergences.student_outcomes`` under autograd, which holds several [N, V]; the passes here need two
buffers of [C, V]. ``TorchKernels`` runs them in PyTorch, ``TritonKernels`` in Triton. A pass sees the columns of one
rank; ``combine`` adds up the ranks of a vocabulary-parallel head with one maximum and one sum.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distill.config import LossConfig
from distill.errors import UserError
from distill.loss.divergences import Outcomes
from distill.types import TopK

_NEG_INF = float("-inf")

Rows = slice | Tensor
"""Rows of a chunk: a slice, or the row numbers if some rows are left out."""


class Scratch:
    """[C, V] buffers by name, each allocated once per pass: on a CPU, fresh memory costs more than the arithmetic."""

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        self._shape = (rows, vocab)
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        """Return the first ``rows`` rows of the buffer ``name`` of dtype ``dtype``; allocate it on the first call."""
        held = self._buffers.get((name, dtype))
        if held is None:
            count, vocab = self._shape
            # The kernels read 16 bytes at a time if every row begins at a multiple of 16 bytes.
            stride = -(-vocab // 16) * 16 if self._device.type == "cuda" else vocab
            held = torch.empty(count, stride, dtype=dtype, device=self._device)[:, :vocab]
            self._buffers[name, dtype] = held
        return held[:rows]


@dataclass(frozen=True)
class LocalTail:
    """Kept logits and tail sums over this rank's columns; logits are divided by the temperature and not shifted."""

    logits_CK: Tensor
    """Logits at the kept ids; -inf if an id is -1 (padding, or a column of another rank)."""
    tail_top_C: Tensor
    """Largest logit of the tail; -inf if the tail is empty."""
    tail_sum_C: Tensor
    """Sum of exp(logit - tail_top) over the tail; 0 if it is empty."""
    tail_product_C: Tensor
    """Sum of (logit - tail_top) exp(logit - tail_top) over the tail; 0 if it is empty."""


class ReducedLogits(Protocol):
    """A reduced chunk of logits, with the buffers that its gradient needs."""

    @property
    def local(self) -> LocalTail:
        """Return the kept logits and the sums of the tail."""

    def gradient(self, d_logits_CK: Tensor, factor_C: Tensor, slope_C: Tensor | None) -> Tensor:
        """Return the gradient of the logits, [C, V]; overwrite the chunk's buffers.

        It is ``d_logits_CK`` at the kept ids and exp(z - tail_top) (factor + slope (z - tail_top)) in the tail; a slope
        of None means 0.
        """


@dataclass(frozen=True)
class TorchReduced:
    """A chunk of logits reduced by PyTorch."""

    local: LocalTail
    columns_CK: Tensor
    """int64: columns of the kept ids; 0 if an id is not kept here."""
    kept_CK: Tensor
    """bool: ids that are columns of this rank."""
    tail_CV: Tensor
    """exp(z - tail_top), 0 at the kept ids."""
    product_CV: Tensor
    """(z - tail_top) exp(z - tail_top), 0 at the kept ids."""

    def gradient(self, d_logits_CK: Tensor, factor_C: Tensor, slope_C: Tensor | None) -> Tensor:
        """Return the gradient of the logits: see ``ReducedLogits``."""
        gradient_CV = self.tail_CV.mul_(factor_C.unsqueeze(1))
        if slope_C is not None:
            gradient_CV.addcmul_(self.product_CV, slope_C.unsqueeze(1))
        return gradient_CV.scatter_add_(1, self.columns_CK, d_logits_CK.masked_fill(~self.kept_CK, 0.0))


def reduce_in_place(z_CV: Tensor, ids_CK: Tensor, spare_CV: Tensor) -> TorchReduced:
    """Reduce logits that are already divided by the temperature; overwrites ``z_CV`` and ``spare_CV``.

    The plain twin of ``kernels.loss_student.reduce_rows``. Logits outside the kept ids must be finite, as a matmul's
    are.
    """
    # The lowest finite number replaces -inf at the kept ids: 0 * -inf in the product would be NaN.
    low, high = torch.finfo(z_CV.dtype).min, torch.finfo(z_CV.dtype).max
    kept_CK = ids_CK >= 0
    columns_CK = ids_CK.long().clamp(min=0)
    logits_CK = z_CV.gather(1, columns_CK).masked_fill_(~kept_CK, _NEG_INF)
    # Padding points to column 0; the minimum with the highest number leaves that column unchanged.
    z_CV.scatter_reduce_(
        1,
        columns_CK,
        torch.full_like(logits_CK, high).masked_fill_(kept_CK, low),
        "amin",
    )
    top_C = z_CV.amax(dim=1)
    empty_C = top_C == low
    tail_CV = torch.exp(z_CV.sub_(top_C.unsqueeze(1)), out=spare_CV)
    product_CV = z_CV.mul_(tail_CV)
    local = LocalTail(
        logits_CK,
        top_C.masked_fill(empty_C, _NEG_INF),
        tail_CV.sum(dim=1).masked_fill_(empty_C, 0.0),
        product_CV.sum(dim=1).masked_fill_(empty_C, 0.0),
    )
    return TorchReduced(local, columns_CK, kept_CK, tail_CV, product_CV)


class LogitsKernels(Protocol):
    """The passes over [C, V] of one backend."""

    def logits_dtype(self, wide: torch.dtype, rounded: bool) -> torch.dtype:
        """Return the dtype of the logits' buffer: ``wide``, or bf16 if the backend stores ``rounded`` logits narrow."""

    def reduce(
        self,
        z_CV: Tensor,
        ids_CK: Tensor,
        temperature: float,
        scratch: Scratch,
        gradient_dtype: torch.dtype,
    ) -> ReducedLogits:
        """Divide the logits by the temperature and reduce them to K + 1 outcomes; overwrites ``z_CV``."""

    def topk(self, z_CV: Tensor, k: int) -> Tensor:
        """Return the ids of the k largest logits, int [C, k], in any order; leaves ``z_CV`` unchanged."""

    def topk_with_tail(self, z_CV: Tensor, k: int, temperature: float) -> TopK | None:
        """Return the rows' targets from one pass, or None if the backend has none; leaves ``z_CV`` unchanged."""


class TorchKernels:
    """The passes in PyTorch: any device, and float64 too."""

    def logits_dtype(self, wide: torch.dtype, rounded: bool) -> torch.dtype:
        """Return ``wide``."""
        return wide

    def reduce(
        self,
        z_CV: Tensor,
        ids_CK: Tensor,
        temperature: float,
        scratch: Scratch,
        gradient_dtype: torch.dtype,
    ) -> ReducedLogits:
        """Reduce the logits to K + 1 outcomes: see ``LogitsKernels``."""
        divide(z_CV, temperature)
        return reduce_in_place(z_CV, ids_CK, scratch.get("spare", len(z_CV), z_CV.dtype))

    def topk(self, z_CV: Tensor, k: int) -> Tensor:
        """Return the ids of the k largest logits."""
        return z_CV.topk(k, dim=1).indices

    def topk_with_tail(self, z_CV: Tensor, k: int, temperature: float) -> TopK | None:
        """Return None: PyTorch has no single pass for it."""
        return None


@dataclass(frozen=True)
class _TritonReduced:
    local: LocalTail
    z_CV: Tensor
    ids_CK: Tensor
    inverse_temperature: float
    scratch: Scratch
    gradient_dtype: torch.dtype

    def gradient(self, d_logits_CK: Tensor, factor_C: Tensor, slope_C: Tensor | None) -> Tensor:
        """Return the gradient of the logits: see ``ReducedLogits``."""
        from distill.kernels.loss_student import gradient_rows

        out_CV = self.z_CV
        if out_CV.dtype != self.gradient_dtype:
            out_CV = self.scratch.get("gradient", len(out_CV), self.gradient_dtype)
        top_C = self.local.tail_top_C
        return gradient_rows(
            self.z_CV,
            self.ids_CK,
            top_C,
            factor_C,
            slope_C,
            d_logits_CK,
            self.inverse_temperature,
            out_CV,
        )


class TritonKernels:
    """The passes in Triton: two reads and one write of the logits; the gradient has the dtype of the head's matmul."""

    def logits_dtype(self, wide: torch.dtype, rounded: bool) -> torch.dtype:
        """Return bf16 for rounded logits, else ``wide``."""
        return torch.bfloat16 if rounded else wide

    def reduce(
        self,
        z_CV: Tensor,
        ids_CK: Tensor,
        temperature: float,
        scratch: Scratch,
        gradient_dtype: torch.dtype,
    ) -> ReducedLogits:
        """Reduce the logits to K + 1 outcomes: see ``LogitsKernels``."""
        from distill.kernels.loss_student import reduce_rows

        local = LocalTail(*reduce_rows(z_CV, ids_CK, 1 / temperature))
        return _TritonReduced(local, z_CV, ids_CK, 1 / temperature, scratch, gradient_dtype)

    def topk(self, z_CV: Tensor, k: int) -> Tensor:
        """Return the ids of the k largest logits."""
        from distill.kernels.topk import topk_ids

        return topk_ids(z_CV, k)

    def topk_with_tail(self, z_CV: Tensor, k: int, temperature: float) -> TopK | None:
        """Return the targets of all rows from one pass."""
        from distill.kernels.topk import topk_with_tail

        return TopK(*topk_with_tail(z_CV, k, 1 / temperature))


def choose_kernels(backend: str, device: torch.device, dtype: torch.dtype) -> LogitsKernels:
    """Return the passes of ``backend`` for logits of ``dtype`` on ``device``.

    ``auto`` is Triton on CUDA and PyTorch elsewhere. float64, the dtype of tests, always runs in PyTorch. ``triton`` on
    a CPU needs Triton's interpreter, which must be enabled before Triton is first imported. Raises ``UserError`` if
    Triton is missing or cannot run on the device.
    """
    use_triton = backend == "triton" or (backend == "auto" and device.type == "cuda")
    if not use_triton or dtype == torch.float64:
        return TorchKernels()
    if importlib.util.find_spec("triton") is None:
        raise UserError(
            f"loss_fn.backend={backend} needs Triton on {device.type}, and Triton is not installed",
            "install triton, or set loss_fn.backend=torch, which is slower",
            key="loss_fn.backend",
            value=backend,
        )
    if device.type != "cuda":
        from distill.kernels import interpreted

        if not interpreted():
            problem = f"loss_fn.backend=triton cannot run on {device.type}"
            raise UserError(
                problem,
                "set loss_fn.backend=auto",
                key="loss_fn.backend",
                value=backend,
            )
    return TritonKernels()


def check_loss_backend(loss_config: LossConfig, device: torch.device) -> None:
    """Raise ``UserError`` if this machine cannot run ``loss_fn.backend``; call it before loading any weight."""
    choose_kernels(loss_config.backend, device, torch.float32)


def divide(z_CV: Tensor, temperature: float) -> None:
    """Divide the logits by the temperature in place; skip the pass over memory if it is 1."""
    if temperature != 1.0:
        z_CV.div_(temperature)


@dataclass(frozen=True)
class TopKSummary:
    """The K + 1 outcomes over all columns, and the position of this rank's tail in them."""

    outcomes: Outcomes
    """Shifted by ``shift_C``, so that each row's largest logit is 0."""
    shift_C: Tensor
    """Each row's largest logit."""
    tail_sum_C: Tensor
    """Sum of exp(logit - largest tail logit) over the complete tail."""
    tail_shift_C: Tensor
    """This rank's largest tail logit, minus ``shift_C``."""
    tail_scale_C: Tensor
    """exp(this rank's largest tail logit - the largest tail logit of all ranks)."""

    def lse(self) -> Tensor:
        """Return the logsumexp of all logits, minus ``shift_C``."""
        return self.outcomes.events_NE().logsumexp(dim=1)

    def coefficients(self, d_tail_C: Tensor | None, d_mean_C: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return ``factor_C`` and ``slope_C`` of ``ReducedLogits.gradient`` from the outcomes' gradient.

        None means that the loss does not depend on the outcome. With t_j the softmax within the tail,
        d tail / d z_j = t_j and d mean / d z_j = t_j (1 + z_j - mean). Both results are exactly 0 if this rank has no
        tail.
        """
        share_C = (self.tail_scale_C / self.tail_sum_C).masked_fill(self.tail_shift_C == _NEG_INF, 0.0)
        if d_tail_C is None:
            d_tail_C = torch.zeros_like(share_C)
        if d_mean_C is None:
            return d_tail_C * share_C, None
        distance_C = 1 + self.tail_shift_C.masked_fill(share_C == 0, 0.0) - self.outcomes.tail_mean_N
        return (d_tail_C + d_mean_C * distance_C) * share_C, d_mean_C * share_C


def combine(
    local: LocalTail,
    ids_CK: Tensor,
    own_ids_CK: Tensor,
    extra_CE: Tensor,
    group: dist.ProcessGroup | None,
) -> tuple[TopKSummary, Tensor]:
    """Add up the ranks' local tails; collective over ``group``, local if it is None.

    The collectives are one maximum of [C] and one sum of [C, K + 2 + E].

    Args:
        local: this rank's kept logits and tail sums.
        ids_CK: the kept ids in the complete vocabulary; -1 is padding.
        own_ids_CK: the same ids as this rank's columns; -1 for columns of other ranks.
        extra_CE: E more numbers per row that are summed over the ranks in the same collective.
        group: the ranks that hold the columns.

    Returns:
        The outcomes over all columns, and the sum of ``extra_CE``.
    """
    top_C, sum_C, product_C = local.tail_top_C, local.tail_sum_C, local.tail_product_C
    logits_CK, scale_C = local.logits_CK, torch.ones_like(sum_C)
    if group is not None:
        top_C = top_C.clone()
        dist.all_reduce(top_C, op=dist.ReduceOp.MAX, group=group)
        empty_here_C = local.tail_top_C == _NEG_INF
        distance_C = (local.tail_top_C - top_C).masked_fill(empty_here_C, 0.0)  # -inf - -inf is NaN
        scale_C = distance_C.exp().masked_fill(empty_here_C, 0.0)
        product_C = scale_C * (product_C + distance_C * sum_C)
        # Each kept id is a column of exactly one rank: the other ranks add 0. Padding becomes -inf again afterwards.
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
    return TopKSummary(outcomes, shift_C, sum_C, local.tail_top_C - shift_C, scale_C), extra_CE
