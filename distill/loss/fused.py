"""Fused LM head and loss: compute loss and gradients from hidden states, without a tensor of [N, V].

N is the number of rows (response tokens), V the vocabulary size. The forward processes the rows in chunks of C =
``chunk_rows``. It also computes the gradients of each chunk, so the backward only scales the stored gradients. The
logits are not recomputed, so the loss needs three matmuls with the head instead of four. It allocates only a few
buffers of [C, V]. The reference implementation is ``divergences.topk_kl`` with the logits ``hidden @ head.T``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.errors import UserError
from distill.loss import checks
from distill.loss.columns import Columns, VocabParallel
from distill.loss.divergences import Outcomes, divergence, loss_temperature
from distill.loss.full_vocab import full_vocabulary
from distill.loss.lm_head import ROUNDED, Projection, padded_columns
from distill.loss.metrics import Sampled, SampledLogprobs, StatsSum, topk_metrics
from distill.loss.overlap import Overlap
from distill.loss.row_groups import OffPolicyRows, RowGroup, RowGroups, weights_by_config
from distill.loss.targets import (
    ChunkTargets,
    LossPass,
    chunk_buffers,
    default_chunk_rows,
    targets_by_chunk,
    teacher_head,
)
from distill.loss.topk_reduction import Rows, Scratch, choose_kernels, combine, divide
from distill.types import LossOutput, Stats, Targets, TeacherRows, TopK


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
    row_values: dict[str, Tensor] | None = None,
    kept_M: Tensor | None = None,
    off_policy: OffPolicyRows | None = None,
    overlap_N: Tensor | None = None,
    check_values: bool = True,
    debug: bool = False,
) -> LossOutput:
    """Return the weighted sum of the distillation loss over N rows (response tokens), and metrics.

    The sum is differentiable in ``hidden_ND`` and ``head_VD``. Call the function inside the forward of the root FSDP
    module, because FSDP gathers the head only there. N may be 0. Rows of weight 0 are skipped. In ``torch.no_grad``
    only the values are computed. With ``parallel`` the function is collective over the group, and all ranks of the
    group must pass the same rows.

    Args:
        hidden_ND: the student's hidden states after the final norm, with the head's dtype and device.
        head_VD: the head's weight, bf16, float32 or float64; with ``parallel`` this rank's shard.
        targets: the teacher's top-k at the loss's temperature (``TopK``), or the teacher's hidden states and LM head
            (``TeacherRows``), from which the teacher's logits are computed in chunks.
        loss_config: the section ``loss_fn`` of the configuration.
        weight_N: weight of each row, without gradient; 0 excludes the row.
        sampled: the sampled response tokens. ``loss_fn.kl_type=sampled`` requires them, and a ``TopK`` must then
            contain their ids.
        chunk_rows: number of rows with logits in memory at the same time; None means ``default_chunk_rows``.
        valid_vocab: number of columns of logits, not counting vocabulary padding; None means all columns. Padding
            columns count as -inf and get gradient 0.
        stop_token_ids: token ids for the metric ``teacher_stop_mass``.
        topk_logits_k: number of token ids per row that the loss compares; 0 means the complete vocabulary. Required
            with ``TeacherRows``, not used with a ``TopK``.
        parallel: sharding of the head over a group of ranks; None: the head is not sharded. The hidden states of a
            ``TeacherRows`` must then be those of all N rows, and its head must contain the tokens of this rank.
        row_values: a dict to which the function adds the values of each metric for all rows of nonzero weight, in the
            order of the rows: a 1-D tensor without gradient per metric. ``loss`` is the loss of a row in nats, not
            multiplied by its weight; the other metrics are those of ``RowMetrics`` and ``SampledLogprobs.metrics``.
            Off-policy rows are included, under the same names.
        kept_M: int64 [M], the indices of the rows of nonzero weight, ascending; None: they are read from ``weight_N``,
            for which the host waits for the GPU.
        off_policy: rows of responses from the dataset, and their configuration of the loss. Their metrics are returned
            with the prefix ``off_policy_`` only.
        overlap_N: bool [N], the rows for which the metric ``topk_overlap`` is computed; None: no rows.
        check_values: whether to check the values of all ids; on a GPU the host waits for these checks.
        debug: also check that no row of a ``TopK`` repeats a token id.

    Returns:
        ``kl_sum`` is float32 (float64 with a float64 head) and supports one backward. ``stats`` has (sum, count) over
        the rows of nonzero weight for each field of ``RowMetrics``, and (sum of weight * loss, sum of weight) for
        ``loss``. With ``sampled`` it also has ``student_logprob``, ``sampler_logprob_diff`` and
        ``sampler_logprob_diff_max``; the last has a maximum instead of a sum. With ``overlap_N``, and if K is not 0, it
        has ``topk_overlap``, the mean over these rows.

    Raises ``UserError`` for an invalid configuration, mismatched shapes or dtypes, and ids out of range.
    """
    columns = _checked_columns(hidden_ND, head_VD, loss_config, weight_N, sampled, valid_vocab, parallel)
    _check_masks(loss_config, weight_N, kept_M, off_policy, overlap_N, check_values)
    temperature = _temperature(loss_config, sampled)
    train = torch.is_grad_enabled()
    with torch.no_grad():
        if chunk_rows is None:  # must be equal on all ranks: each chunk runs collectives
            chunk_rows = _default_chunk_rows(hidden_ND, columns, loss_config, off_policy, topk_logits_k)
        rows = RowGroups.of(weight_N, kept_M, chunk_rows, loss_config, off_policy)
        student = Projection(head_VD, columns.own, loss_config.logits_dtype)
        kernels = choose_kernels(loss_config.backend, hidden_ND.device, student.dtype)
        scratch = Scratch(rows.largest, columns.own, _width(student, targets, columns), hidden_ND.device)
        k = targets.ids_NK.shape[1] if isinstance(targets, TopK) and not topk_logits_k else topk_logits_k
        overlap = Overlap(overlap_N, k, columns, kernels) if overlap_N is not None and k else None
        loss_pass = LossPass(loss_config, temperature, columns, kernels, scratch, overlap)
        d_head_VD = _head_gradient(head_VD, student) if train and head_VD.requires_grad else None
        loop = _Loop(
            loss_pass=loss_pass,
            hidden_ND=hidden_ND.detach(),
            student=student,
            targets=targets_by_chunk(
                targets,
                loss_pass,
                len(hidden_ND),
                topk_logits_k,
                None if sampled is None else sampled.ids_N,
                weights_by_config(loss_config, weight_N, off_policy),
                debug,
                check_values,
            ),
            weight_N=weight_N.detach().to(student.dtype),
            sampled=SampledLogprobs(sampled, temperature, columns),
            stop_ids=_stop_ids(tuple(stop_token_ids), hidden_ND.device),
            d_hidden_ND=torch.zeros_like(hidden_ND) if train and hidden_ND.requires_grad else None,
            d_head_PD=None if d_head_VD is None else d_head_VD[: student.columns],
        )
        kl_sum, stats = loop.run_groups(rows, row_values)
    kl_sum = _WithGradients.apply(hidden_ND, head_VD, kl_sum, loop.d_hidden_ND, d_head_VD)  # type: ignore[no-untyped-call]
    return LossOutput(kl_sum, stats)


def _checked_columns(
    hidden_ND: Tensor,
    head_VD: Tensor,
    loss_config: LossConfig,
    weight_N: Tensor,
    sampled: Sampled | None,
    valid_vocab: int | None,
    parallel: VocabParallel | None,
) -> Columns:
    """Return the columns of logits of this rank; raise ``UserError`` for wrong settings, shapes or dtypes."""
    checks.check_loss(loss_config)
    columns = Columns.of(head_VD, valid_vocab, parallel)
    checks.check_linear("the student's", hidden_ND, head_VD, columns.own)
    checks.check_rows(len(hidden_ND), weight_N=weight_N)
    if sampled is not None:
        checks.check_rows(len(hidden_ND), sampled_ids_N=sampled.ids_N, sampled_logprobs_N=sampled.logprobs_N)
    return columns


def _check_masks(
    loss_config: LossConfig,
    weight_N: Tensor,
    kept_M: Tensor | None,
    off_policy: OffPolicyRows | None,
    overlap_N: Tensor | None,
    check_values: bool,
) -> None:
    if off_policy is not None:
        off_policy.check(loss_config, weight_N, kept_M, check_values)
    if overlap_N is not None:
        checks.check_mask(len(weight_N), "overlap_N", overlap_N)


def _default_chunk_rows(
    hidden_ND: Tensor,
    columns: Columns,
    loss_config: LossConfig,
    off_policy: OffPolicyRows | None,
    topk_logits_k: int | None,
) -> int:
    """Return ``default_chunk_rows`` for the configuration that needs the most buffers."""
    configs = [loss_config] if off_policy is None else [loss_config, off_policy.loss_config]
    buffers = max(chunk_buffers(config, topk_logits_k) for config in configs)
    return default_chunk_rows(hidden_ND, columns.per_rank, buffers)


def _width(student: Projection, targets: Targets, columns: Columns) -> int:
    """Return the number of columns of a buffer that holds the logits of either model, including padding."""
    if not isinstance(targets, TeacherRows):
        return student.columns
    return max(student.columns, padded_columns(columns.own, len(teacher_head(targets, columns))))


@cache
def _stop_ids(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the ids of the stop tokens as an int64 tensor on ``device``.

    The tensor is cached, because copying the ids to a GPU in every call would block the host.
    """
    return torch.tensor(ids, dtype=torch.int64, device=device)


def _head_gradient(head_VD: Tensor, student: Projection) -> Tensor:
    """Return a buffer for the gradient of the LM head's weight.

    The rows that the matmuls of ``student`` write are uninitialised; the other rows are vocabulary padding and have
    gradient 0.
    """
    d_head_VD = torch.empty_like(head_VD, dtype=student.dtype)
    d_head_VD[student.columns :] = 0
    return d_head_VD


def _temperature(loss_config: LossConfig, sampled: Sampled | None) -> float:
    """Return the temperature that divides the logits in the loss.

    Raises ``UserError`` if ``loss_fn.kl_type=sampled`` is set and the temperature differs from the sampling
    temperature.
    """
    checks.check_tokens(loss_config, sampled is not None)
    if sampled is None:
        return loss_temperature(loss_config)
    checks.check_temperature(sampled.temperature, "policy.generation.temperature", "")
    temperature = loss_temperature(loss_config, sampled.temperature)
    if loss_config.kl_type == "sampled" and sampled.temperature != temperature:
        raise UserError(
            f"loss_fn.temperature={temperature} must equal policy.generation.temperature={sampled.temperature} with "
            "loss_fn.kl_type=sampled",
            "remove loss_fn.temperature",
            key="loss_fn.temperature",
            value=temperature,
        )
    return temperature


@dataclass(frozen=True)
class _Loop:
    """Inputs and gradient buffers of the loss over all chunks of rows; ``run_group`` processes the chunks of a group.

    ``d_hidden_ND`` and ``d_head_PD`` are the gradients of hidden states and LM head; None if a gradient is not needed.
    """

    loss_pass: LossPass
    hidden_ND: Tensor
    student: Projection
    targets: ChunkTargets
    weight_N: Tensor
    sampled: SampledLogprobs
    stop_ids: Tensor
    d_hidden_ND: Tensor | None
    d_head_PD: Tensor | None

    def run_groups(self, rows: RowGroups, row_values: dict[str, Tensor] | None) -> tuple[Tensor, Stats]:
        """Compute loss and gradients of all rows; return the weighted sum of the loss, and the statistics.

        ``row_values``: as in ``fused_linear_kl``.
        """
        by_group = [self.run_group(group, first=g == 0) for g, group in enumerate(rows.groups)]
        kl_sum = torch.stack([kl_sum for kl_sum, _, _ in by_group]).sum()
        if row_values is not None:
            row_values.update(rows.in_order([values for _, _, values in by_group]))
        return kl_sum, {name: pair for _, stats, _ in by_group for name, pair in stats.items()}

    def run_group(self, group: RowGroup, first: bool) -> tuple[Tensor, Stats, dict[str, Tensor]]:
        """Compute loss and gradients of a group of rows, chunk by chunk.

        Returns the weighted sum of the loss, the statistics, and the values of each metric for all rows of the group.
        ``first``: whether this is the first group.
        """
        sums = StatsSum()
        for c, chunk in enumerate(group.chunks):
            sums.add(self.run(chunk, group.loss_config, first=first and c == 0))
        weight_M = torch.cat([self.weight_N[chunk] for chunk in group.chunks])
        kl_sum = (sums.rows("loss") * weight_M).sum()
        stats = sums.stats() | {"loss": (kl_sum.double(), weight_M.sum(dtype=torch.float64))}
        if group.prefix:  # off-policy rows have no log-probs of the sampler
            stats = {group.prefix + name: pair for name, pair in stats.items() if not name.startswith("sampler_")}
        return kl_sum, stats, sums.all_rows()

    def run(self, rows: Rows, loss_config: LossConfig, first: bool) -> dict[str, Tensor]:
        """Compute loss and gradients of a chunk of C rows, and return metrics.

        The result is a dict from metric name to values [C]. The gradient of the hidden states is written to
        ``d_hidden_ND``. The gradient of the head's weight is added to ``d_head_PD``, or overwrites it if ``first``
        (this is the first chunk).
        """
        # Compute the teacher's top-k first: it may use the same buffer as the student's logits.
        topk = self.targets.topk(rows) if self.targets.topk else None
        hidden_CD = self.hidden_ND[rows]
        z_CV = self._logits(hidden_CD)
        read_CE = self.sampled.read(z_CV, rows, self.loss_pass.scratch, self.student.dtype)
        if self.targets.scaled_logits:
            return self._full(rows, hidden_CD, z_CV, self.targets.scaled_logits(rows), read_CE, loss_config, first)
        is_top1_CK = overlap_C = None
        if topk is None:
            assert self.targets.student_topk is not None
            topk, is_top1_CK, overlap_C = self.targets.student_topk(rows, z_CV)
        elif self.loss_pass.overlap is not None:
            overlap_C = self.loss_pass.overlap.of(z_CV, topk.ids_NK, rows)
        columns = self.loss_pass.columns
        own_ids_CK = columns.own_ids(topk.ids_NK)
        reduced = self.loss_pass.kernels.reduce(
            z_CV,
            own_ids_CK,
            self.loss_pass.temperature,
            self.loss_pass.scratch,
            self.student.head_PD.dtype,
        )
        summary, read_CE = combine(reduced.local, topk.ids_NK, own_ids_CK, read_CE, columns.group)
        outcomes, tokens = summary.outcomes, self.sampled.tokens(rows)
        if not self._needs_gradient:
            kl_C = divergence(outcomes, topk, loss_config, tokens)
        else:
            # Autograd handles only the outcomes; the gradient of the logits follows from theirs, in place.
            leaves = Outcomes(*(numbers.detach().requires_grad_() for numbers in outcomes))
            with torch.enable_grad():
                kl_C = divergence(leaves, topk, loss_config, tokens)
            factor_C = self._factor(rows)
            d_logits_CK, d_tail_C, d_mean_C = torch.autograd.grad(kl_C, leaves, factor_C, allow_unused=True)
            kl_C = kl_C.detach()
            gradient_CV = reduced.gradient(d_logits_CK, *summary.coefficients(d_tail_C, d_mean_C))
            self._add_gradients(rows, hidden_CD, gradient_CV, first)
        metrics = {"loss": kl_C} | topk_metrics(outcomes, topk, self.stop_ids, is_top1_CK, overlap_C)
        return metrics | self.sampled.metrics(rows, read_CE, summary.shift_C, summary.lse())

    def _full(
        self,
        rows: Rows,
        hidden_CD: Tensor,
        z_CV: Tensor,
        teacher_CV: Tensor,
        read_CE: Tensor,
        loss_config: LossConfig,
        first: bool,
    ) -> dict[str, Tensor]:
        """Compute the loss over the complete vocabulary, and its gradients, for a chunk of C rows.

        ``run`` calls this method if ``topk_logits_k`` is 0. ``z_CV``: the student's raw logits. ``teacher_CV``: the
        teacher's logits divided by the temperature. ``read_CE``: log-probs of the sampled tokens, from
        ``SampledLogprobs.read``. ``first``: as in ``run``. Returns a dict from metric name to values [C].
        """
        if z_CV.dtype != self.student.dtype:
            z_CV = self.loss_pass.scratch.get("wide logits", len(z_CV), self.student.dtype).copy_(z_CV)
        divide(z_CV, self.loss_pass.temperature)
        found = full_vocabulary(
            z_CV,
            teacher_CV,
            loss_config,
            self._factor(rows),
            self.sampled.tokens(rows),
            self.stop_ids,
            self.loss_pass.columns,
            self.loss_pass.scratch,
        )
        read_CE = self.loss_pass.columns.sum(read_CE)
        if self._needs_gradient:
            self._add_gradients(rows, hidden_CD, found.gradient_CV, first)
        metrics = {"loss": found.kl_C} | found.metrics.by_name()
        return metrics | self.sampled.metrics(rows, read_CE, found.shift_C, found.lse_C)

    @property
    def _needs_gradient(self) -> bool:
        return not (self.d_hidden_ND is None and self.d_head_PD is None)

    def _factor(self, rows: Rows) -> Tensor:
        """Return weight / temperature of each row of the chunk ``rows``, [C].

        The gradient of the loss with respect to logits divided by the temperature, multiplied by this factor, is the
        gradient of the weighted loss with respect to the raw logits.
        """
        return self.weight_N[rows] / self.loss_pass.temperature

    def _logits(self, hidden_CD: Tensor) -> Tensor:
        rounded = self.loss_pass.loss_config.logits_dtype == ROUNDED
        dtype = self.loss_pass.kernels.logits_dtype(self.student.dtype, rounded)
        return self.student.logits(hidden_CD, self.loss_pass.scratch.get("logits", len(hidden_CD), dtype))

    def _add_gradients(self, rows: Rows, hidden_CD: Tensor, gradient_CV: Tensor, first: bool) -> None:
        gradient_CP = self.student.cast(gradient_CV)
        if self.d_hidden_ND is not None:
            columns = self.loss_pass.columns
            wide = columns.group is not None  # round once, after the sum over ranks
            d_hidden_CD = columns.sum(self.student.hidden_gradient(gradient_CP, wide))
            self.d_hidden_ND[rows] = d_hidden_CD.to(self.d_hidden_ND.dtype)
        if self.d_head_PD is not None:
            self.student.add_head_gradient(gradient_CP, hidden_CD, self.d_head_PD, first)


class _WithGradients(torch.autograd.Function):
    """Autograd function that returns a given loss with given gradients of hidden states and LM head.

    It supports one backward. The backward multiplies the stored gradients by the incoming gradient. A gradient that
    already has the dtype of its tensor is multiplied in place, to save memory.
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
            raise RuntimeError(
                "the result of fused_linear_kl supports only one backward: call fused_linear_kl again for each backward"
            )
        d_head_VD, d_hidden_ND = ctx.gradients.pop(), ctx.gradients.pop()
        d_hidden_ND = _scaled(d_hidden_ND, outputs[0], ctx.dtypes[0])
        return (
            d_hidden_ND,
            _scaled(d_head_VD, outputs[0], ctx.dtypes[1]),
            None,
            None,
            None,
        )


def _scaled(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return gradient * scale in ``dtype``, rounded only once; None if the gradient is None.

    The function processes blocks of rows, to avoid a second float32 copy of the gradient.
    """
    if gradient is None:
        return None
    scaled = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    for block, target in zip(torch.split(gradient, 8192), torch.split(scaled, 8192), strict=True):
        # Convert first: a product of a bf16 tensor and a 0-dim float32 tensor on CUDA rounds the scale to bf16.
        torch.mul(block.to(scale.dtype), scale, out=target)
    return scaled
