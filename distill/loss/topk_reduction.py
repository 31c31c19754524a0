"""Reduce a chunk of logits to a few numbers per row, and compute the gradient of the logits.

A row is one response token. The kept ids of a row are the K token ids of its top-k; the tail consists of all other
tokens. The reduction returns the logits at the kept ids (kept logits) and sums over the tail (tail sums). Logits and
gradient have shape [C, V], with C rows in a chunk. The reference implementation is ``divergences.student_outcomes``
under autograd, which needs several tensors of [N, V], with N rows in total. This module needs two buffers of [C, V].
``TorchKernels`` uses PyTorch, ``TritonKernels`` uses Triton. If the LM head is sharded over ranks, each rank reduces
its own columns of logits, and ``combine`` combines the results of all ranks.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distill.config import LossConfig
from distill.errors import MissingError, UserError
from distill.loss.divergences import Outcomes
from distill.types import TopK

_NEG_INF = float("-inf")

Rows = slice | Tensor
"""Rows of a chunk: a slice, or a tensor of row numbers if rows of weight 0 are skipped."""


class Scratch:
    """Named [C, V] buffers that all chunks of rows of one call of the loss reuse.

    On a CPU, allocating new memory for every chunk would take longer than the computation. The buffers have
    ``columns`` columns, at least ``vocab``; ``lm_head.with_padding`` returns a view of all of them.
    """

    def __init__(self, rows: int, vocab: int, columns: int, device: torch.device) -> None:
        self._shape = (rows, vocab, columns)
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        """Return [``rows``, V] of the buffer with this name and dtype; the first call allocates it."""
        held = self._buffers.get((name, dtype))
        if held is None:
            count, vocab, columns = self._shape
            # Kernels use 16-byte loads if every row starts at a multiple of 16 bytes.
            stride = -(-columns // 16) * 16 if self._device.type == "cuda" else columns
            held = torch.empty(count, stride, dtype=dtype, device=self._device)[:, :vocab]
            self._buffers[name, dtype] = held
        return held[:rows]


@dataclass(frozen=True)
class LocalTail:
    """Logits at the top-k ids (kept logits) and sums over all other logits (tail sums) of C rows.

    Only this rank's columns of logits are included. All logits are divided by the temperature.
    """

    logits_CK: Tensor
    """[C, K]: logits at the K top-k ids; -inf if an id is padding or a token of another rank."""
    tail_top_C: Tensor
    """[C]: largest of this rank's logits outside the top-k; -inf without such logits."""
    tail_sum_C: Tensor
    """[C]: sum of exp(z - tail_top) over this rank's logits z outside the top-k; 0 without such logits."""
    tail_product_C: Tensor
    """[C]: sum of (z - tail_top) exp(z - tail_top) over this rank's logits z outside the top-k."""


class ReducedLogits(Protocol):
    """A chunk's logits at the top-k ids, sums over its other logits, and buffers for the gradient."""

    @property
    def local(self) -> LocalTail:
        """Return this rank's logits at the top-k ids, and the sums over this rank's other logits."""

    def gradient(self, d_logits_CK: Tensor, factor_C: Tensor, slope_C: Tensor | None) -> Tensor:
        """Return the gradient of the loss with respect to the logits, [C, V].

        At the top-k ids the gradient is ``d_logits_CK``. At all other tokens it is exp(z - t) * (f + s * (z - t)). Here
        z is the token's logit divided by the temperature, t is the row's ``local.tail_top_C``, f its ``factor_C``, and
        s its ``slope_C``; s is 0 if ``slope_C`` is None. The method overwrites the logits or the buffers of the chunk.
        """


@dataclass(frozen=True)
class TorchReduced:
    """Logits of a chunk at the top-k ids (kept ids) and sums over all other logits, computed in PyTorch."""

    local: LocalTail
    columns_CK: Tensor
    """int64 [C, K]: column of each top-k id in this rank's logits; 0 where ``kept_CK`` is False."""
    kept_CK: Tensor
    """bool [C, K]: whether a top-k id is a column of this rank's logits; False for padding (-1)."""
    tail_CV: Tensor
    """[C, V]: exp(z - t) of each logit z, with t = ``local.tail_top_C``; 0 at the top-k ids."""
    product_CV: Tensor
    """[C, V]: (z - t) exp(z - t) of each logit z, with t = ``local.tail_top_C``; 0 at the top-k ids."""

    def gradient(self, d_logits_CK: Tensor, factor_C: Tensor, slope_C: Tensor | None) -> Tensor:
        """Return the gradient of the loss with respect to the logits, [C, V]: see ``ReducedLogits.gradient``."""
        gradient_CV = self.tail_CV.mul_(factor_C.unsqueeze(1))
        if slope_C is not None:
            gradient_CV.addcmul_(self.product_CV, slope_C.unsqueeze(1))
        return gradient_CV.scatter_add_(1, self.columns_CK, d_logits_CK.masked_fill(~self.kept_CK, 0.0))


def reduce_in_place(z_CV: Tensor, ids_CK: Tensor, spare_CV: Tensor) -> TorchReduced:
    """Return the logits at the top-k ids ``ids_CK``, and sums over all other logits of each row.

    ``z_CV`` has logits divided by the temperature; an id of -1 is padding. Overwrites ``z_CV`` and ``spare_CV``. Logits
    outside the top-k must be finite. This is the reference implementation of
    ``kernels.loss_student.reduce_rows``.
    """
    # The lowest finite number replaces -inf at the kept ids: 0 * -inf in the product would be NaN.
    low, high = torch.finfo(z_CV.dtype).min, torch.finfo(z_CV.dtype).max
    kept_CK = ids_CK >= 0
    columns_CK = ids_CK.long().clamp(min=0)
    logits_CK = z_CV.gather(1, columns_CK).masked_fill_(~kept_CK, _NEG_INF)
    # Padding maps to column 0: the minimum with the highest number leaves this column unchanged.
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
    """Operations on a chunk of logits; implemented in PyTorch and in Triton (``loss_fn.backend``)."""

    def logits_dtype(self, wide: torch.dtype, rounded: bool) -> torch.dtype:
        """Return the dtype of the buffer for the student's logits.

        ``rounded``: whether the logits are rounded to bf16. The result is bf16 if ``rounded`` is True and the backend
        supports bf16 buffers, otherwise ``wide`` (float32 or float64).
        """

    def reduce(
        self,
        z_CV: Tensor,
        ids_CK: Tensor,
        temperature: float,
        scratch: Scratch,
        gradient_dtype: torch.dtype,
    ) -> ReducedLogits:
        """Divide logits by the temperature; return those at the top-k ids, and sums over all other logits.

        Overwrites ``z_CV``. ``ids_CK`` has the ids of the top-k; -1 is padding. ``gradient_dtype`` is the dtype that
        the caller needs for the gradient; a backend may ignore it.
        """

    def topk(self, z_CV: Tensor, k: int) -> Tensor:
        """Return the columns of the k largest logits of each row, int32 or int64 [C, k], unordered.

        Of several logits that equal the k-th largest, those in the lowest columns are kept. Does not modify ``z_CV``.
        """

    def topk_with_tail(self, z_CV: Tensor, k: int, temperature: float) -> TopK | None:
        """Return a ``TopK`` for the k largest logits of each row: ids, log-probs, log tail mass and entropy.

        The log tail mass is the log of the total probability of all other tokens. Returns None if the backend has no
        kernel that computes all these results together. Does not modify ``z_CV``, the raw logits.
        """


_MORE = 16
"""Number of additional values of a top-k, among which the values that equal the k-th largest are expected."""


class TorchKernels:
    """Implementation of the loss's operations on logits in PyTorch, for all devices and dtypes."""

    def logits_dtype(self, wide: torch.dtype, rounded: bool) -> torch.dtype:
        """Return ``wide``, because this backend stores logits in that dtype even if they are rounded to bf16."""
        return wide

    def reduce(
        self,
        z_CV: Tensor,
        ids_CK: Tensor,
        temperature: float,
        scratch: Scratch,
        gradient_dtype: torch.dtype,
    ) -> ReducedLogits:
        """Return the logits at the top-k ids, and sums over all other logits: see ``LogitsKernels.reduce``."""
        divide(z_CV, temperature)
        return reduce_in_place(z_CV, ids_CK, scratch.get("spare", len(z_CV), z_CV.dtype))

    def topk(self, z_CV: Tensor, k: int) -> Tensor:
        """Return the columns of the k largest logits of each row, [C, k], and the lowest of equal ones."""
        # PyTorch does not specify which of equal logits it returns. Usually a few more values include all equal ones.
        values_CE, columns_CE = z_CV.topk(min(k + _MORE, z_CV.shape[1]), dim=1)
        columns_CE, order_CE = columns_CE.sort(dim=1)
        order_CE = values_CE.gather(1, order_CE).sort(dim=1, descending=True, stable=True).indices
        columns_CK, values_CK = columns_CE.gather(1, order_CE)[:, :k], values_CE[:, :k]
        if values_CE.shape[1] == z_CV.shape[1]:
            return columns_CK
        kth_C1 = values_CK[:, -1:]
        return _lowest_of_ties(z_CV, values_CK, columns_CK, kth_C1.masked_fill(kth_C1 != values_CE[:, -1:], torch.nan))

    def topk_with_tail(self, z_CV: Tensor, k: int, temperature: float) -> TopK | None:
        """Return None: PyTorch has no single kernel for top-k, log tail mass and entropy."""
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
        """Return the gradient of the loss with respect to the logits, [C, V]: see ``ReducedLogits.gradient``."""
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
    """Implementation of the loss's operations on logits in Triton.

    The kernels read the student's logits twice and write the gradient once. They write it in the dtype of the LM head,
    because the next matmuls require this dtype.
    """

    def logits_dtype(self, wide: torch.dtype, rounded: bool) -> torch.dtype:
        """Return the dtype of the buffer for logits: bf16 if the logits are rounded to bf16, else ``wide``."""
        return torch.bfloat16 if rounded else wide

    def reduce(
        self,
        z_CV: Tensor,
        ids_CK: Tensor,
        temperature: float,
        scratch: Scratch,
        gradient_dtype: torch.dtype,
    ) -> ReducedLogits:
        """Return the logits at the top-k ids, and sums over all other logits: see ``LogitsKernels.reduce``."""
        from distill.kernels.loss_student import reduce_rows

        local = LocalTail(*reduce_rows(z_CV, ids_CK, 1 / temperature))
        return _TritonReduced(local, z_CV, ids_CK, 1 / temperature, scratch, gradient_dtype)

    def topk(self, z_CV: Tensor, k: int) -> Tensor:
        """Return the ids of the k largest logits of each row, [C, k]."""
        from distill.kernels.topk import topk_ids

        return topk_ids(z_CV, k)

    def topk_with_tail(self, z_CV: Tensor, k: int, temperature: float) -> TopK | None:
        """Return a ``TopK`` for the k largest logits of each row: see ``LogitsKernels.topk_with_tail``."""
        from distill.kernels.topk import topk_with_tail

        return TopK(*topk_with_tail(z_CV, k, 1 / temperature))


def _lowest_of_ties(z_CV: Tensor, values_CK: Tensor, columns_CK: Tensor, tied_C1: Tensor) -> Tensor:
    """Return the columns of a top-k, in which logits that equal ``tied_C1`` have the lowest possible columns.

    ``values_CK`` and ``columns_CK`` are a top-k of each row of ``z_CV``. ``tied_C1`` is a logit, or NaN for a row that
    remains unchanged.
    """
    if bool(tied_C1.isnan().all()):
        return columns_CK
    tied_CK = values_CK == tied_C1
    row_T, column_T = (z_CV == tied_C1).nonzero(as_tuple=True)
    rank_T = torch.arange(len(row_T), device=row_T.device) - torch.searchsorted(row_T, row_T)
    return columns_CK.masked_scatter(tied_CK, column_T[rank_T < tied_CK.sum(dim=1)[row_T]])


def choose_kernels(backend: str, device: torch.device, dtype: torch.dtype) -> LogitsKernels:
    """Return the implementation that ``loss_fn.backend`` selects for logits of ``dtype`` on ``device``.

    ``auto`` selects Triton on CUDA and PyTorch on other devices. float64 logits, which only tests use, always select
    PyTorch. ``triton`` on a CPU needs Triton's interpreter, which must be enabled before Triton is first imported.
    Raises ``UserError`` if Triton is missing or cannot run on the device.
    """
    use_triton = backend == "triton" or (backend == "auto" and device.type == "cuda")
    if not use_triton or dtype == torch.float64:
        return TorchKernels()
    if importlib.util.find_spec("triton") is None:
        raise MissingError(
            f"loss_fn.backend={backend} needs the package triton on {device.type}, but triton is not installed",
            "install triton, or set loss_fn.backend=torch, which is slower",
            key="loss_fn.backend",
            value=backend,
        )
    if device.type != "cuda":
        from distill.kernels import interpreted

        if not interpreted():
            problem = f"loss_fn.backend=triton needs a CUDA device, but the device is {device.type}"
            raise UserError(problem, "set loss_fn.backend=auto", key="loss_fn.backend", value=backend)
    return TritonKernels()


def check_loss_backend(loss_config: LossConfig, device: torch.device) -> None:
    """Raise ``UserError`` if ``loss_fn.backend`` cannot run on ``device``, or needs a missing package.

    Call it before loading weights, so that the error is reported early.
    """
    choose_kernels(loss_config.backend, device, torch.float32)


def divide(z_CV: Tensor, temperature: float) -> None:
    """Divide the logits by the temperature in place; does nothing if the temperature is 1."""
    if temperature != 1.0:
        z_CV.div_(temperature)


@dataclass(frozen=True)
class TopKSummary:
    """Logits at the top-k ids and statistics of all other logits (the tail) of C rows.

    If the LM head is sharded, each rank has the logits of a part of the vocabulary. ``outcomes``, ``shift_C`` and
    ``tail_sum_C`` then describe the logits of all ranks together. ``tail_shift_C`` and ``tail_scale_C`` describe this
    rank's part of the tail; ``coefficients`` uses them for the gradient of this rank's logits.
    """

    outcomes: Outcomes
    """Logits at the top-k ids and statistics of all other logits, after ``shift_C`` was subtracted.

    The largest logit of each row is therefore 0.
    """
    shift_C: Tensor
    """[C]: largest logit of each row over all ranks, divided by the temperature."""
    tail_sum_C: Tensor
    """[C]: sum of exp(z - m) over all ranks' logits z outside the top-k, with m the largest z."""
    tail_shift_C: Tensor
    """[C]: largest of this rank's logits outside the top-k, minus ``shift_C``; -inf without such logits."""
    tail_scale_C: Tensor
    """[C]: exp(m_rank - m_all), or 0 if this rank has no logits outside the top-k.

    m_rank is the largest of this rank's logits outside the top-k, m_all the largest of all ranks' logits outside it.
    """

    def lse(self) -> Tensor:
        """Return [C]: logsumexp(z / T) - ``shift_C``, with z the logits of a row and T the temperature."""
        return self.outcomes.unnormalised_NE().logsumexp(dim=1)

    def coefficients(self, d_tail_C: Tensor | None, d_mean_C: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the arguments ``factor_C`` and ``slope_C`` for ``ReducedLogits.gradient``.

        Let z be the logits of a row outside the top-k, and t the softmax over z. ``d_tail_C`` and ``d_mean_C`` are the
        gradients of the loss with respect to tail = logsumexp(z) and mean = sum(t z). None means that the loss does not
        depend on this quantity. The formulas follow from d tail / d z_j = t_j and d mean / d z_j = t_j (1 + z_j -
        mean). ``slope_C`` is None if ``d_mean_C`` is None. If this rank has no logits of a row outside the top-k, the
        row's factor and slope are 0.
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
    """Combine the kept logits and tail sums of all ranks into those of the complete vocabulary.

    Kept logits are the logits at the K top-k ids (kept ids); tail sums are sums over all other logits. Collective over
    ``group``: an all-reduce of a maximum [C] and of a sum [C, K + 2 + E]. If ``group`` is None, ``local`` already
    covers the complete vocabulary.

    Args:
        local: this rank's kept logits and tail sums.
        ids_CK: the kept ids in the complete vocabulary; -1 is padding.
        own_ids_CK: the same ids as column numbers of this rank's logits; -1 for padding and ids of other ranks.
        extra_CE: E additional numbers per row, which are summed over the ranks in the same all-reduce.
        group: the ranks over which the columns of logits are sharded, or None.

    Returns:
        The kept logits and tail statistics over the complete vocabulary, and ``extra_CE`` summed over the ranks.
    """
    top_C, sum_C, product_C = local.tail_top_C, local.tail_sum_C, local.tail_product_C
    logits_CK, scale_C = local.logits_CK, torch.ones_like(sum_C)
    if group is not None:
        top_C = top_C.clone()
        dist.all_reduce(top_C, op=dist.ReduceOp.MAX, group=group)
        empty_here_C = local.tail_top_C == _NEG_INF
        distance_C = (local.tail_top_C - top_C).masked_fill(empty_here_C, 0.0)  # avoid -inf - -inf = NaN
        scale_C = distance_C.exp().masked_fill(empty_here_C, 0.0)
        product_C = scale_C * (product_C + distance_C * sum_C)
        # Each kept id is a column of exactly one rank; the other ranks add 0. Padding is set to -inf again afterwards.
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
