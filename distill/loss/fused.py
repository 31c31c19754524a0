"""The chunked head: from hidden rows to the summed loss, its gradients and its metrics, without ever holding [N, V].

The gradients are made in the forward, chunk by chunk, because the weights of the rows are known by then: three matmuls
instead of four, and only [C, V] of logits at a time (C = ``chunk_rows``). The backward scales what the forward left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.config import LossConfig
from distill.errors import UserError
from distill.loss import checks
from distill.loss.backend import Pass, choose_pass, divide
from distill.loss.divergences import Outcomes, Tokens, divergence, loss_temperature
from distill.loss.full_vocab import full_vocabulary
from distill.loss.lm_head import ROUNDED, Projection
from distill.loss.metrics import StatsSum, row_stats, sampler_stats
from distill.loss.reduction import Scratch, combine
from distill.loss.sampled import Sampled, SampledReader
from distill.loss.targets import ChunkTargets, Rows, chunk_buffers, default_chunk_rows, targets_by_chunk
from distill.types import LossOutput, Targets, TeacherRows


@dataclass(frozen=True)
class VocabParallel:
    """A head whose rows are spread over the ranks of a group: this rank has ``head_VD``, a run of columns of logits.

    The parts are those that ``torch.chunk`` makes of the columns, in order of rank.
    """

    group: dist.ProcessGroup
    first: int
    """The vocabulary's id of this rank's first column."""
    vocab: int
    """Columns of all ranks together."""


def fused_linear_kl(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets: Targets,
    loss_config: LossConfig,
    weight_N: Tensor,
    sampled: Sampled | None = None,
    *,
    chunk_rows: int | None = None,
    valid_vocab: int | None = None,
    stop_token_ids: Sequence[int] = (),
    topk_logits_k: int | None = None,
    parallel: VocabParallel | None = None,
    row_kls: dict[str, Tensor] | None = None,
    debug: bool = False,
) -> LossOutput:
    """The weighted sum of the distillation loss over N rows, with the gradients of ``hidden_ND`` and ``head_VD``.

    Call it inside the root module's forward, where a sharded head is gathered. N may be 0; rows of weight 0 are left
    out whatever they hold. Without grad mode, or where nothing needs a gradient, only the values are made. With
    ``parallel`` all ranks of its group call it, with the same rows.

    Args:
        hidden_ND: the student's hidden rows, after its last norm; of the head's dtype and device.
        head_VD: the head's weight: bf16, float32 or float64; with ``parallel`` this rank's part of it.
        targets: ``TopK`` made at the loss's temperature, or ``TeacherRows``, whose logits are then made chunk by chunk:
            for ``support: student``, for the whole vocabulary, or to have its top-k made here.
        loss_config: which divergence, its temperature, and the dtype of the logits.
        weight_N: a factor per row, no gradient: 1, or 0 for a row that does not count.
        sampled: the response tokens; their temperature is what ``loss_config.temperature: null`` means (without: 1).
            ``kl_type: sampled`` needs them, and among the ids of a ``TopK``.
        chunk_rows: rows of logits held at once; None: ``default_chunk_rows``.
        valid_vocab: columns from here on are padding: -inf in both models, gradient exactly 0.
        stop_token_ids: the ids of ``teacher_stop_mass``.
        topk_logits_k: with ``TeacherRows``, how many ids to keep; 0 keeps the whole vocabulary.
        parallel: for a head spread over ranks; every rank returns the whole sum, the whole gradient of ``hidden_ND``
            and the gradient of its own part of the head. Targets are then ``TopK``.
        row_kls: a dictionary that gets ``forward_kl`` and ``reverse_kl`` of each row of weight other than 0, in order.
        debug: refuse repeated ids too.

    Returns:
        ``kl_sum`` (float32; float64 with a float64 head), good for one backward, and as (sum, count) over the rows of
        weight other than 0: ``loss`` (sum of weight * kl, sum of weight), ``forward_kl`` and ``reverse_kl`` (always
        with the tail bucket), ``teacher_topk_mass``, ``student_topk_mass``, ``teacher_entropy`` (where the targets
        have it), ``student_entropy``, ``top1_agreement``, ``teacher_stop_mass`` (with ``stop_token_ids``; what of it
        is in the top-k) and, with ``sampled``, ``student_logprob`` (the trainer's own, at the sampling temperature),
        ``sampler_logprob_diff`` (mean absolute) and ``sampler_logprob_diff_max``, whose first number is a maximum:
        combine it by maximum, not by addition.

    Errors: ``UserError`` for a configuration that is no loss, shapes or dtypes that disagree, ids out of range, K above
    the vocabulary, and for what ``kl_type: sampled``, ``support: student`` and ``parallel`` don't allow.
    """
    checks.check_loss(loss_config)
    rows, columns = hidden_ND.shape[0], head_VD.shape[0]
    ranks, first, group = 1, 0, None
    if parallel is not None:
        ranks, first, group = dist.get_world_size(parallel.group), parallel.first, parallel.group
    all_columns = columns if parallel is None else parallel.vocab
    vocab = checks.check_vocab(all_columns, valid_vocab)
    if parallel is not None:
        checks.check_part(all_columns, ranks, vocab, isinstance(targets, TeacherRows))
    own = min(columns, vocab - first)
    checks.check_linear("the student's", hidden_ND, head_VD, own)
    checks.check_rows(rows, weight_N=weight_N)
    temperature = _temperature(loss_config, sampled)
    if sampled is not None:
        checks.check_rows(rows, sampled_ids_N=sampled.ids_N, sampled_logprobs_N=sampled.logprobs_N)
    train = torch.is_grad_enabled()
    with torch.no_grad():
        if chunk_rows is None:  # the same on all ranks: they meet in every chunk
            buffers = chunk_buffers(loss_config, topk_logits_k)
            chunk_rows = default_chunk_rows(hidden_ND, -(-all_columns // ranks), buffers)
        chunks = _chunks(weight_N, chunk_rows)
        student = Projection(head_VD[:own], loss_config.logits_dtype)
        way = choose_pass(loss_config.backend, hidden_ND.device, student.dtype)
        scratch = Scratch(max(_length(chunk) for chunk in chunks), own, hidden_ND.device)
        d_head_VD = None
        if train and head_VD.requires_grad:
            d_head_VD = torch.empty_like(head_VD, dtype=student.dtype)  # the first chunk fills it
            d_head_VD[own:] = 0
        sampled_ids_N = None if sampled is None else sampled.ids_N
        loop = _Loop(
            hidden_ND=hidden_ND.detach(),
            student=student,
            targets=targets_by_chunk(
                targets,
                loss_config,
                temperature,
                rows,
                vocab,
                topk_logits_k,
                sampled_ids_N,
                weight_N,
                way,
                scratch,
                debug,
            ),
            loss_config=loss_config,
            temperature=temperature,
            weight_N=weight_N.detach().to(student.dtype),
            reader=SampledReader(sampled, temperature, first, group),
            stop_ids=_stop_ids(tuple(stop_token_ids), hidden_ND.device),
            way=way,
            scratch=scratch,
            d_hidden_ND=torch.zeros_like(hidden_ND) if train and hidden_ND.requires_grad else None,
            d_head_VD=None if d_head_VD is None else d_head_VD[:own],
        )
        sums = StatsSum()
        for c, chunk in enumerate(chunks):
            sums.add(loop.run(chunk, first=c == 0))
        kl_sum = sums.rows("loss").sum()
        if row_kls is not None:
            row_kls.update({name: sums.rows(name) for name in ("forward_kl", "reverse_kl")})
    stats = sums.stats() | {"loss": (kl_sum.double(), loop.weight_N.sum(dtype=torch.float64))}
    kl_sum = _WithGradients.apply(hidden_ND, head_VD, kl_sum, loop.d_hidden_ND, d_head_VD)  # type: ignore[no-untyped-call]
    return LossOutput(kl_sum, stats)


@cache
def _stop_ids(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """The same tensor for every pass: to bring it to a GPU is to wait for the GPU."""
    return torch.tensor(ids, dtype=torch.int64, device=device)


def _temperature(loss_config: LossConfig, sampled: Sampled | None) -> float:
    """The loss's temperature. Errors: ``UserError`` where it is none, or not one that a loss of tokens can have."""
    checks.check_tokens(loss_config, sampled is not None)
    if sampled is None:
        return loss_temperature(loss_config)
    checks.check_temperature(sampled.temperature, "policy.generation.temperature", "")
    temperature = loss_temperature(loss_config, sampled.temperature)
    if loss_config.kl_type == "sampled" and sampled.temperature != temperature:
        raise UserError(
            f"loss_fn.temperature={temperature} differs from the sampling temperature {sampled.temperature} under "
            "loss_fn.kl_type=sampled: leave loss_fn.temperature out"
        )
    return temperature


@dataclass(frozen=True)
class _Loop:
    """What stays the same over the chunks of one pass; ``run`` does one."""

    hidden_ND: Tensor
    student: Projection
    targets: ChunkTargets
    loss_config: LossConfig
    temperature: float
    weight_N: Tensor
    reader: SampledReader
    stop_ids: Tensor
    way: Pass
    scratch: Scratch
    d_hidden_ND: Tensor | None
    d_head_VD: Tensor | None

    def run(self, rows: Rows, first: bool) -> dict[str, Tensor]:
        """Write the chunk's gradients to their places and return the metrics of its rows."""
        topk = self.targets.ready(rows) if self.targets.ready else None
        hidden_CD = self.hidden_ND[rows]
        z_CV = self._logits(hidden_CD)
        read_CE = self.reader.read(z_CV, rows, self.scratch, self.student.dtype)
        if self.targets.whole:
            return self._whole(rows, hidden_CD, z_CV, self.targets.whole(rows), read_CE, first)
        favourite_CK = None
        if topk is None:
            assert self.targets.of_students is not None
            topk, favourite_CK = self.targets.of_students(rows, z_CV)
        own_ids_CK = self._own(topk.ids_NK, z_CV.shape[1])
        reduced = self.way.reduce(z_CV, own_ids_CK, self.temperature, self.scratch, self.student.head_VD.dtype)
        combined, read_CE = combine(reduced.partial, topk.ids_NK, own_ids_CK, read_CE, self.reader.group)
        outcomes, tokens = combined.outcomes, self._tokens(rows)
        if self.d_hidden_ND is None and self.d_head_VD is None:
            kl_C = divergence(outcomes, topk, self.loss_config, tokens)
        else:
            # Autograd sees K + 1 numbers per row; the way from there to [C, V] is one pass in place.
            leaves = Outcomes(*(numbers.detach().requires_grad_() for numbers in outcomes))
            with torch.enable_grad():
                kl_C = divergence(leaves, topk, self.loss_config, tokens)
            factor_C = self.weight_N[rows] / self.temperature
            d_logits_CK, d_tail_C, d_mean_C = torch.autograd.grad(kl_C, leaves, factor_C, allow_unused=True)
            kl_C = kl_C.detach()
            gradient_CV = reduced.gradient(d_logits_CK, *combined.coefficients(d_tail_C, d_mean_C))
            self._add_gradients(rows, hidden_CD, gradient_CV, first)
        metrics = {"loss": kl_C * self.weight_N[rows]} | row_stats(outcomes, topk, self.stop_ids, favourite_CK)
        return metrics | self._sampler_stats(rows, read_CE, combined.shift_C, combined.lse())

    def _whole(
        self, rows: Rows, hidden_CD: Tensor, z_CV: Tensor, teacher_CV: Tensor, read_CE: Tensor, first: bool
    ) -> dict[str, Tensor]:
        """The same over the whole vocabulary."""
        if z_CV.dtype != self.student.dtype:
            z_CV = self.scratch.get("wide logits", len(z_CV), self.student.dtype).copy_(z_CV)
        divide(z_CV, self.temperature)
        factor_C = self.weight_N[rows] / self.temperature
        found = full_vocabulary(
            z_CV, teacher_CV, self.loss_config, factor_C, self._tokens(rows), self.stop_ids, self.scratch
        )
        if not (self.d_hidden_ND is None and self.d_head_VD is None):
            self._add_gradients(rows, hidden_CD, found.gradient_CV, first)
        metrics = {"loss": found.kl_C * self.weight_N[rows]} | found.stats
        return metrics | self._sampler_stats(rows, read_CE, found.shift_C, found.lse_C)

    def _logits(self, hidden_CD: Tensor) -> Tensor:
        rounded = self.loss_config.logits_dtype == ROUNDED
        dtype = self.way.logits_dtype(self.student.dtype, rounded)
        return self.student.logits(hidden_CD, self.scratch.get("logits", len(hidden_CD), dtype))

    def _own(self, ids_CK: Tensor, columns: int) -> Tensor:
        """The ids as numbers of this rank's columns, -1 where they are another's."""
        if self.reader.group is None:
            return ids_CK
        own_CK = ids_CK - self.reader.first
        return own_CK.masked_fill((own_CK < 0) | (own_CK >= columns), -1)

    def _tokens(self, rows: Rows) -> Tokens | None:
        sampled = self.reader.sampled
        return None if sampled is None else Tokens(sampled.ids_N[rows], sampled.logprobs_N[rows])

    def _sampler_stats(self, rows: Rows, read_CE: Tensor, shift_C: Tensor, lse_C: Tensor) -> dict[str, Tensor]:
        sampled = self.reader.sampled
        if sampled is None:
            return {}
        return sampler_stats(self.reader.logprobs(read_CE, shift_C, lse_C), sampled.logprobs_N[rows])

    def _add_gradients(self, rows: Rows, hidden_CD: Tensor, gradient_CV: Tensor, first: bool) -> None:
        gradient_CV = self.student.cast(gradient_CV)
        if self.d_hidden_ND is not None:
            spread = self.reader.group is not None  # the ranks' parts are rounded once, after their sum
            d_hidden_CD = self.student.hidden_gradient(gradient_CV, wide=spread)
            if spread:
                dist.all_reduce(d_hidden_CD, group=self.reader.group)
            self.d_hidden_ND[rows] = d_hidden_CD.to(self.d_hidden_ND.dtype)
        if self.d_head_VD is not None:
            self.student.add_head_gradient(gradient_CV, hidden_CD, self.d_head_VD, first)


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are known already: the backward scales them by what arrives and hands them out, once.

    In place where the dtype allows it: the head's gradient is as large as the head.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        value: Tensor,
        d_hidden_ND: Tensor | None,
        d_head_VD: Tensor | None,
    ) -> Tensor:
        ctx.gradients = [d_hidden_ND, d_head_VD]
        ctx.dtypes = (hidden_ND.dtype, head_VD.dtype)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if not ctx.gradients:
            raise RuntimeError("the loss hands out its gradients once: call fused_linear_kl again for another backward")
        d_head_VD, d_hidden_ND = ctx.gradients.pop(), ctx.gradients.pop()
        d_hidden_ND = _scaled(d_hidden_ND, outputs[0], ctx.dtypes[0])
        return d_hidden_ND, _scaled(d_head_VD, outputs[0], ctx.dtypes[1]), None, None, None


def _scaled(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """gradient * scale, rounded once to ``dtype``, in blocks of rows: no second float32 copy of the head's gradient."""
    if gradient is None:
        return None
    scaled = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    for block, target in zip(torch.split(gradient, 8192), torch.split(scaled, 8192), strict=True):
        # Widened first: a bf16 tensor on CUDA times a 0-dim float32 would round the scale itself to bf16.
        torch.mul(block.to(scale.dtype), scale, out=target)
    return scaled


def _chunks(weight_N: Tensor, chunk_rows: int) -> list[Rows]:
    """The rows of weight other than 0, in chunks; where there are none an empty one, which names the metrics."""
    kept_N = weight_N.detach().nonzero().squeeze(1)
    if kept_N.numel() < weight_N.numel():
        return list(torch.split(kept_N, chunk_rows))
    return [slice(start, min(start + chunk_rows, len(kept_N))) for start in range(0, max(len(kept_N), 1), chunk_rows)]


def _length(chunk: Rows) -> int:
    return int(chunk.stop - chunk.start) if isinstance(chunk, slice) else len(chunk)
