"""The chunked head: from hidden rows to the summed loss, its gradients and its metrics, without ever holding [N, V].

The gradients are made in the forward, chunk by chunk, because the weights of the rows are known by then: three matmuls
instead of four, and only [C, V] of logits at a time (C = ``chunk_rows``). The backward scales what the forward left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.loss import checks
from distill.loss.divergences import Outcomes, divergence, entropy, loss_temperature
from distill.loss.projection import Projection
from distill.loss.reduction import Reduced, Scratch, gradient_in_place, reduce_in_place
from distill.loss.stats import StatsSum, row_stats, sampler_stats
from distill.types import LossOutput, Targets, TeacherRows, TopK, UserError

Rows = slice | Tensor
"""Which rows a chunk holds: a slice, or their numbers where some rows are left out."""


@dataclass(frozen=True)
class Sampled:
    """The response tokens of N rows and what the sampler thought of them."""

    ids_N: Tensor
    """int64 [N]."""
    logprobs_N: Tensor
    """float32 [N], nats, at the sampling temperature."""
    temperature: float
    """The sampling temperature: what ``loss_fn.temperature: null`` means."""


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
    debug: bool = False,
) -> LossOutput:
    """The weighted sum of the distillation loss over N rows, with the gradients of ``hidden_ND`` and ``head_VD``.

    Call it inside the root module's forward, where a sharded head is gathered. N may be 0; rows of weight 0 are left
    out whatever they hold. Without grad mode, or where nothing needs a gradient, only the values are made.

    Args:
        hidden_ND: the student's hidden rows, after its last norm; of the head's dtype and device.
        head_VD: the head's weight: bf16, float32 or float64.
        targets: ``TopK`` made at the loss's temperature, or ``TeacherRows``, whose top-k is then made chunk by chunk.
        loss_config: which divergence, its temperature, and the dtype of the logits.
        weight_N: a factor per row, no gradient: 1, or 0 for a row that does not count.
        sampled: the response tokens; their temperature is what ``loss_config.temperature: null`` means (without: 1).
        chunk_rows: rows of logits held at once; None: 256 on CPU, 2048 on CUDA.
        valid_vocab: columns from here on are padding: -inf in both models, gradient exactly 0.
        stop_token_ids: the ids of ``teacher_stop_mass``.
        topk_logits_k: with ``TeacherRows``, how many ids to keep; 0 keeps the whole vocabulary.
        debug: refuse repeated ids too.

    Returns:
        ``kl_sum`` (float32; float64 with a float64 head) and, as (sum, count) over the rows of weight other than 0:
        ``loss`` (sum of weight * kl, sum of weight), ``forward_kl`` and ``reverse_kl`` (always with the tail bucket),
        ``teacher_topk_mass``, ``student_topk_mass``, ``teacher_entropy`` (where the targets have it),
        ``student_entropy``, ``top1_agreement``, ``teacher_stop_mass`` (with ``stop_token_ids``; what of it is in the
        top-k) and, with ``sampled``, ``student_logprob`` (the trainer's own, at the sampling temperature),
        ``sampler_logprob_diff`` (mean absolute) and ``sampler_logprob_diff_max``, whose first number is a maximum:
        combine it by maximum, not by addition.

    Errors: ``UserError`` for shapes or dtypes that disagree, ids out of range, K above the vocabulary.
    """
    rows, vocab = hidden_ND.shape[0], checks.check_vocab(head_VD.shape[0], valid_vocab)
    checks.check_linear("the student's", hidden_ND, head_VD, vocab)
    checks.check_rows(rows, weight_N=weight_N)
    temperature = loss_temperature(loss_config, 1.0 if sampled is None else sampled.temperature)
    if sampled is not None:
        checks.check_rows(rows, sampled_ids_N=sampled.ids_N, sampled_logprobs_N=sampled.logprobs_N)
        checks.check_ids("the sampled ids", sampled.ids_N, 0, vocab)
    train = torch.is_grad_enabled()
    with torch.no_grad():
        chunks = _chunks(weight_N, chunk_rows or _default_chunk_rows(hidden_ND))
        student = Projection(head_VD[:vocab], loss_config.logits_dtype)
        scratch = Scratch(max(_length(chunk) for chunk in chunks), vocab, student.dtype, hidden_ND.device)
        d_head_VD = None
        if train and head_VD.requires_grad:
            d_head_VD = torch.empty_like(head_VD, dtype=student.dtype)  # the first chunk fills it
            d_head_VD[vocab:] = 0
        loop = _Loop(
            hidden_ND=hidden_ND.detach(),
            student=student,
            targets_of=_targets_by_chunk(targets, loss_config, temperature, rows, vocab, topk_logits_k, scratch, debug),
            loss_config=loss_config,
            temperature=temperature,
            weight_N=weight_N.detach().to(student.dtype),
            sampled=sampled,
            stop_ids=torch.tensor(list(stop_token_ids), dtype=torch.int64, device=hidden_ND.device),
            scratch=scratch,
            d_hidden_ND=torch.zeros_like(hidden_ND) if train and hidden_ND.requires_grad else None,
            d_head_VD=None if d_head_VD is None else d_head_VD[:vocab],
        )
        sums = StatsSum()
        for c, chunk in enumerate(chunks):
            sums.add(loop.run(chunk, first=c == 0))
        kl_sum = sums.rows("loss").sum()
    stats = sums.stats() | {"loss": (kl_sum.double(), loop.weight_N.sum(dtype=torch.float64))}
    kl_sum = _WithGradients.apply(hidden_ND, head_VD, kl_sum, loop.d_hidden_ND, d_head_VD)  # type: ignore[no-untyped-call]
    return LossOutput(kl_sum, stats)


@torch.no_grad()
def teacher_topk(
    hidden_ND: Tensor,
    head_VD: Tensor,
    k: int,
    temperature: float,
    chunk_rows: int | None = None,
    valid_vocab: int | None = None,
    logits_dtype: str = "float32",
) -> TopK:
    """The teacher's k most likely tokens of each row, exactly, with log tail mass and entropy; no gradient.

    Args:
        hidden_ND: the teacher's hidden rows, after its last norm; of the head's dtype.
        head_VD: its head.
        k: kept ids; the whole vocabulary leaves an empty tail (log mass -inf).
        temperature: the loss's temperature; the student's logits are divided by the same.
        chunk_rows: rows of logits held at once; None: 256 on CPU, 2048 on CUDA.
        valid_vocab: columns from here on are padding and never kept.
        logits_dtype: as ``loss_fn.logits_dtype``.

    Returns:
        ids int32, sorted by falling log-prob; log-probs (over the full vocabulary), log tail and entropy in float32
        (float64 with a float64 head).

    Errors: ``UserError`` where k exceeds the vocabulary or the shapes disagree.
    """
    vocab = checks.check_vocab(head_VD.shape[0], valid_vocab)
    checks.check_linear("the teacher's", hidden_ND, head_VD, vocab)
    checks.check_support_size(k, vocab)
    checks.check_temperature(temperature)
    count, step = hidden_ND.shape[0], chunk_rows or _default_chunk_rows(hidden_ND)
    teacher = Projection(head_VD[:vocab], logits_dtype)
    scratch = Scratch(min(count, step), vocab, teacher.dtype, hidden_ND.device)
    chunks = [
        _topk_of_chunk(hidden_ND[start : start + step], teacher, k, temperature, scratch)
        for start in range(0, max(count, 1), step)
    ]
    ids, logprobs, log_tail, entropies = zip(*chunks, strict=True)
    return TopK(torch.cat(ids), torch.cat(logprobs), torch.cat(log_tail), torch.cat(entropies))


@dataclass(frozen=True)
class _Loop:
    """What stays the same over the chunks of one pass; ``run`` does one."""

    hidden_ND: Tensor
    student: Projection
    targets_of: Callable[[Rows], TopK]
    loss_config: LossConfig
    temperature: float
    weight_N: Tensor
    sampled: Sampled | None
    stop_ids: Tensor
    scratch: Scratch
    d_hidden_ND: Tensor | None
    d_head_VD: Tensor | None

    def run(self, rows: Rows, first: bool) -> dict[str, Tensor]:
        """Write the chunk's gradients to their places and return the metrics of its rows."""
        topk = self.targets_of(rows)
        hidden_CD = self.hidden_ND[rows]
        z_CV, spare_CV = self.scratch.logits(len(hidden_CD)), self.scratch.spare(len(hidden_CD))
        self.student.logits(hidden_CD, z_CV)
        _divide(z_CV, self.temperature)
        read_sampled = _sampled_reader(z_CV, spare_CV, self.sampled, rows, self.temperature)
        reduced = reduce_in_place(z_CV, topk.ids_NK, spare_CV)
        kl_C = self._loss_and_gradients(rows, hidden_CD, reduced, topk, first)
        metrics = {"loss": kl_C * self.weight_N[rows]} | row_stats(reduced.outcomes, topk, self.stop_ids)
        return metrics | read_sampled(reduced)

    def _loss_and_gradients(self, rows: Rows, hidden_CD: Tensor, reduced: Reduced, topk: TopK, first: bool) -> Tensor:
        """kl of the chunk's rows; writes the gradients that are asked for."""
        if self.d_hidden_ND is None and self.d_head_VD is None:
            return divergence(reduced.outcomes, topk, self.loss_config)
        # Autograd sees K + 1 numbers per row; the way from there to [C, V] is one pass in place.
        leaves = Outcomes(*(numbers.detach().requires_grad_() for numbers in reduced.outcomes))
        with torch.enable_grad():
            kl_C = divergence(leaves, topk, self.loss_config)
        factor_C = self.weight_N[rows] / self.temperature
        gradient_CV = gradient_in_place(reduced, *torch.autograd.grad(kl_C, leaves, factor_C, allow_unused=True))
        gradient_CV = self.student.cast(gradient_CV)
        if self.d_hidden_ND is not None:
            self.d_hidden_ND[rows] = self.student.hidden_gradient(gradient_CV)
        if self.d_head_VD is not None:
            self.student.add_head_gradient(gradient_CV, hidden_CD, self.d_head_VD, first)
        return kl_C.detach()


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are known already: the backward scales them by what arrives."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        value: Tensor,
        d_hidden_ND: Tensor | None,
        d_head_VD: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(d_hidden_ND, d_head_VD)
        ctx.dtypes = (hidden_ND.dtype, head_VD.dtype)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (d_hidden_ND, d_head_VD), (hidden_dtype, head_dtype) = ctx.saved_tensors, ctx.dtypes
        d_hidden_ND = _scaled(d_hidden_ND, outputs[0], hidden_dtype)
        return d_hidden_ND, _scaled(d_head_VD, outputs[0], head_dtype), None, None, None


def _scaled(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """gradient * scale, rounded once to ``dtype``, in blocks of rows: no second float32 copy of the head's gradient."""
    if gradient is None:
        return None
    scaled = torch.empty_like(gradient, dtype=dtype)
    for block, target in zip(torch.split(gradient, 8192), torch.split(scaled, 8192), strict=True):
        # Widened first: a bf16 tensor on CUDA times a 0-dim float32 would round the scale itself to bf16.
        torch.mul(block.to(scale.dtype), scale, out=target)
    return scaled


def _targets_by_chunk(
    targets: Targets,
    loss_config: LossConfig,
    temperature: float,
    rows: int,
    vocab: int,
    k: int | None,
    scratch: Scratch,
    debug: bool,
) -> Callable[[Rows], TopK]:
    """Check the targets and say how a chunk gets its own: from ``TopK`` by rows, or through the teacher's head."""
    if isinstance(targets, TeacherRows):
        return _teacher_by_chunk(targets, loss_config, temperature, rows, vocab, k, scratch)
    checks.check_topk(targets, rows, vocab)
    if debug:
        checks.check_no_duplicates(targets.ids_NK)
    entropy_N = targets.entropy_N
    return lambda chunk: TopK(
        targets.ids_NK[chunk],
        targets.logprobs_NK[chunk],
        targets.log_tail_N[chunk],
        None if entropy_N is None else entropy_N[chunk],
    )


def _teacher_by_chunk(
    targets: TeacherRows,
    loss_config: LossConfig,
    temperature: float,
    rows: int,
    vocab: int,
    k: int | None,
    scratch: Scratch,
) -> Callable[[Rows], TopK]:
    if k is None:
        raise UserError("topk_logits_k is missing beside the teacher's hidden rows: pass it (0: the whole vocabulary)")
    checks.check_linear("the teacher's", targets.hidden_ND, targets.head_VD, vocab)
    checks.check_rows(rows, teacher_hidden_ND=targets.hidden_ND)
    kept = vocab if k == 0 else k
    checks.check_support_size(kept, vocab)
    teacher = Projection(targets.head_VD[:vocab], loss_config.logits_dtype)
    if scratch.dtype != teacher.dtype:
        scratch = scratch.of(teacher.dtype)
    return lambda chunk: TopK(*_topk_of_chunk(targets.hidden_ND[chunk], teacher, kept, temperature, scratch))


def _topk_of_chunk(
    hidden_CD: Tensor, teacher: Projection, k: int, temperature: float, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, log-probs, log tail mass and entropy of a chunk; overwrites the scratch."""
    z_CV = teacher.logits(hidden_CD, scratch.logits(len(hidden_CD)))
    _divide(z_CV, temperature)
    ids_CK = z_CV.topk(k, dim=1).indices
    outcomes = reduce_in_place(z_CV, ids_CK, scratch.spare(len(hidden_CD))).outcomes
    log_masses_CE = outcomes.log_masses_NE()
    return ids_CK.int(), log_masses_CE[:, :-1], log_masses_CE[:, -1], entropy(outcomes)


def _sampled_reader(
    z_CV: Tensor, spare_CV: Tensor, sampled: Sampled | None, rows: Rows, temperature: float
) -> Callable[[Reduced], dict[str, Tensor]]:
    """Take what the sampled tokens need from the logits before the reduction overwrites them; finish after it."""
    if sampled is None:
        return lambda reduced: {}
    columns_C1, sampler_C = sampled.ids_N[rows].long().unsqueeze(1), sampled.logprobs_N[rows]
    if sampled.temperature == temperature:
        chosen_C = z_CV.gather(1, columns_C1).squeeze(1)
        return lambda reduced: sampler_stats(chosen_C - reduced.shift_C - reduced.lse(), sampler_C)
    torch.mul(z_CV, temperature / sampled.temperature, out=spare_CV)
    spare_CV.sub_(spare_CV.amax(dim=1, keepdim=True))
    chosen_C = spare_CV.gather(1, columns_C1).squeeze(1)
    own_C = chosen_C - spare_CV.exp_().sum(dim=1).log()
    return lambda reduced: sampler_stats(own_C, sampler_C)


def _divide(z_CV: Tensor, temperature: float) -> None:
    if temperature != 1.0:
        z_CV.div_(temperature)


def _chunks(weight_N: Tensor, chunk_rows: int) -> list[Rows]:
    """The rows of weight other than 0, in chunks; where there are none an empty one, which names the metrics."""
    kept_N = weight_N.detach().nonzero().squeeze(1)
    if kept_N.numel() < weight_N.numel():
        return list(torch.split(kept_N, chunk_rows))
    return [slice(start, min(start + chunk_rows, len(kept_N))) for start in range(0, max(len(kept_N), 1), chunk_rows)]


def _length(chunk: Rows) -> int:
    return int(chunk.stop - chunk.start) if isinstance(chunk, slice) else len(chunk)


def _default_chunk_rows(hidden_ND: Tensor) -> int:
    return 2048 if hidden_ND.is_cuda else 256
