"""Distillation loss over the complete vocabulary, for ``distillation.topk_logits_k=0``.

The reference implementation is ``divergences.topk_kl`` with all V token ids. A row is one response token, and C is the
number of rows in a chunk. The loss of a chunk needs four buffers of [C, V]: the logits of both models and two more.
Each intermediate result overwrites a buffer that is no longer needed. ``FAST_GRADIENTS`` contains functions with
hand-derived gradients. A divergence without such a function is differentiated by autograd, which needs more memory.

With tensor parallelism V is the number of this rank's columns of logits. Sums over the vocabulary are then summed over
the ranks. So a divergence must be a sum over the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.loss.columns import Columns, own_logits
from distill.loss.divergences import (
    DIVERGENCES,
    Pair,
    Tokens,
    cap_factor,
    capped,
    clipped_sum,
    importance_ratio,
)
from distill.loss.metrics import RowMetrics
from distill.loss.topk_reduction import Scratch

BUFFERS = 4
"""Number of [C, V] buffers for the loss of a chunk, if the gradient is computed without autograd.

C is the number of rows in the chunk, V the vocabulary size. The number applies to the divergences in ``FAST_GRADIENTS``
and to ``loss_fn.kl_type=sampled``.
"""
AUTOGRAD_BUFFERS = 19
"""Number of [C, V] buffers for the loss of a chunk, if autograd computes the gradient.

C is the number of rows in the chunk, V the vocabulary size. The number was measured with the Jensen-Shannon divergence.
"""


@dataclass(frozen=True)
class FullRows:
    """Loss over the complete vocabulary of V tokens, with gradient and metrics, for C rows.

    A row is one response token.
    """

    kl_C: Tensor
    """[C]: loss of each row in nats, not multiplied by the weight of the row."""
    gradient_CV: Tensor
    """[C, V]: gradient of the weighted loss with respect to the student's raw logits."""
    metrics: RowMetrics
    shift_C: Tensor
    """[C]: largest logit of the student in each row, divided by the temperature."""
    lse_C: Tensor
    """[C]: logsumexp(z / T) - ``shift_C``, where z are the student's logits and T is the temperature."""


@dataclass(frozen=True)
class _Models:
    """Distributions of teacher (p) and student (q) over the V tokens for C rows, with their KLs.

    ``forward_C`` is KL(p || q) and ``reverse_C`` is KL(q || p), in nats. ``spare_CV`` is a buffer for intermediate
    results. The functions that compute gradients may overwrite all [C, V] tensors. ``columns`` are the columns of
    logits that this rank computes.
    """

    log_ratio_CV: Tensor
    """[C, V]: log p - log q of each token, with teacher p and student q.

    The KLs are computed from it: sum(p (log p - log q)) is more precise than sum(p log p) - sum(p log q).
    """
    q_CV: Tensor
    p_CV: Tensor
    spare_CV: Tensor
    forward_C: Tensor
    reverse_C: Tensor
    columns: Columns


def full_vocabulary(
    z_CV: Tensor,
    teacher_CV: Tensor,
    loss_config: LossConfig,
    factor_C: Tensor,
    tokens: Tokens | None,
    stop_ids: Tensor,
    columns: Columns,
    scratch: Scratch,
) -> FullRows:
    """Return the loss over the complete vocabulary, its gradient, and metrics for a chunk of C rows.

    Collective over the ranks of ``columns``, the columns of logits that this rank computes.

    ``z_CV`` and ``teacher_CV`` are the logits of student and teacher, already divided by the temperature; both are
    overwritten. ``factor_C`` is the weight of each row divided by the temperature. The gradient is multiplied by
    ``factor_C``, so it is the gradient of the weighted loss with respect to the raw logits. ``tokens`` are the sampled
    tokens, and ``stop_ids`` the token ids for the metric ``teacher_stop_mass``. All log-probs must be finite, so that
    p log p is 0 if p underflows to 0.
    """
    rows, dtype = len(z_CV), z_CV.dtype
    q_CV, p_CV = (
        scratch.get("spare", rows, dtype),
        scratch.get("second spare", rows, dtype),
    )
    shifts_C2 = columns.max(torch.stack([teacher_CV.amax(dim=1), z_CV.amax(dim=1)], dim=1))
    teacher_shift_C, shift_C = shifts_C2.unbind(dim=1)
    agrees_C = (
        own_logits(z_CV, _first_column(teacher_CV, teacher_shift_C, columns), columns, absent=-math.inf) >= shift_C
    )
    _normalise(teacher_CV, p_CV, teacher_shift_C, columns)
    teacher_entropy_C = -_dot(p_CV, teacher_CV, q_CV)
    lse_C = _normalise(z_CV, q_CV, shift_C, columns)
    student_entropy_C = -_dot(q_CV, z_CV, p_CV)
    torch.exp(teacher_CV, out=p_CV)
    own_C = torch.zeros_like(lse_C) if tokens is None else own_logits(z_CV, tokens.ids_N, columns)
    teachers_C = torch.zeros_like(lse_C) if tokens is None else own_logits(teacher_CV, tokens.ids_N, columns)
    by_autograd = None
    if not _is_fast(loss_config):
        by_autograd = autograd_gradient(teacher_CV, z_CV, loss_config, columns)
    log_ratio_CV = teacher_CV.sub_(z_CV)
    spare_CV = z_CV
    stop_columns = columns.own_ids(stop_ids)
    on_this_rank = {
        "forward_kl": _dot(p_CV, log_ratio_CV, spare_CV),
        "reverse_kl": -_dot(q_CV, log_ratio_CV, spare_CV),
        "teacher_topk_mass": p_CV.sum(dim=1),
        "student_topk_mass": q_CV.sum(dim=1),
        "student_entropy": student_entropy_C,
        "top1_agreement": agrees_C.to(dtype),
        "teacher_entropy": teacher_entropy_C,
        "teacher_stop_mass": (p_CV[:, stop_columns.clamp(min=0)] * (stop_columns >= 0)).sum(dim=1),
        "teacher_logprob": teachers_C,
        "own": own_C,
    }
    sums_CE = columns.sum(torch.stack([*on_this_rank.values()], dim=1))  # one all-reduce
    sums: dict[str, Any] = dict(zip(on_this_rank, sums_CE.unbind(dim=1), strict=True))
    own_C = sums.pop("own")
    if not stop_ids.numel():
        sums["teacher_stop_mass"] = None
    if tokens is None:
        sums["teacher_logprob"] = None
    metrics = RowMetrics(**sums)
    models = _Models(log_ratio_CV, q_CV, p_CV, spare_CV, metrics.forward_kl, metrics.reverse_kl, columns)
    if by_autograd is not None:
        value_C, slope_CV = by_autograd
        gradient_CV = q_CV.copy_(slope_CV)
    elif loss_config.kl_type == "sampled":
        assert tokens is not None, "fused_linear_kl requires tokens for kl_type=sampled"
        value_C, gradient_CV = _sampled(models, tokens, importance_ratio(own_C, tokens.logprobs_N, loss_config))
    elif loss_config.entry_clip is not None:
        value_C, gradient_CV = _clipped(models, loss_config, loss_config.entry_clip)
    else:
        value_C, gradient_CV = FAST_GRADIENTS[loss_config.kl_type](models, loss_config)
    kept_C = cap_factor(value_C, loss_config.token_kl_cap)
    return FullRows(
        capped(value_C, loss_config.token_kl_cap),
        gradient_CV.mul_((factor_C * kept_C).unsqueeze(1)),
        metrics,
        shift_C,
        lse_C,
    )


def autograd_gradient(
    log_p_CV: Tensor, log_q_CV: Tensor, loss_config: LossConfig, columns: Columns
) -> tuple[Tensor, Tensor]:
    """Return the divergence of each row [C] in nats and its gradient [C, V], computed by autograd.

    ``log_p_CV`` and ``log_q_CV`` are the log-probs of teacher and student; they are not modified. The gradient is with
    respect to the student's logits divided by the temperature. This is the reference implementation of
    ``FAST_GRADIENTS``.
    """
    leaf_CV = log_q_CV.clone().requires_grad_()
    with torch.enable_grad():
        terms_CV = DIVERGENCES[loss_config.kl_type](Pair(log_p_CV, leaf_CV), loss_config)
        value_C = clipped_sum(terms_CV, loss_config.entry_clip, terms_CV.shape[1])
        (slope_CV,) = torch.autograd.grad(value_C.sum(), leaf_CV)
    value_C, total_C = columns.sum(torch.stack([value_C.detach(), slope_CV.sum(dim=1)], dim=1)).unbind(dim=1)
    # The derivative of log q_j with respect to logit i is (i == j) - q_i; autograd would need the sum of one rank only.
    return value_C, slope_CV.addcmul_(log_q_CV.exp(), total_C.unsqueeze(1), value=-1)


def buffers_of(loss_config: LossConfig) -> int:
    """Return the number of [C, V] buffers that the loss of a chunk of C rows needs.

    The loss is that over the complete vocabulary of V tokens, for ``distillation.topk_logits_k=0``.
    """
    return BUFFERS if _is_fast(loss_config) else AUTOGRAD_BUFFERS


def _is_fast(loss_config: LossConfig) -> bool:
    """Return whether the gradient is computed without autograd."""
    by_hand = FAST_GRADIENTS if loss_config.entry_clip is None else TERMS_AND_SLOPES
    return loss_config.kl_type == "sampled" or loss_config.kl_type in by_hand


def _normalise(logits_CV: Tensor, mass_CV: Tensor, shift_C: Tensor, columns: Columns) -> Tensor:
    """Replace logits by log-probs in place, and write the probabilities to ``mass_CV``.

    ``shift_C`` is the largest logit of each row over all ranks. Returns the logsumexp of the row minus ``shift_C``,
    [C].
    """
    logits_CV.sub_(shift_C.unsqueeze(1))
    lse_C = columns.sum(torch.exp(logits_CV, out=mass_CV).sum(dim=1)).log_()
    torch.exp(logits_CV.sub_(lse_C.unsqueeze(1)), out=mass_CV)
    return lse_C


def _first_column(logits_CV: Tensor, shift_C: Tensor, columns: Columns) -> Tensor:
    """Return the token id of the largest logit of each row over all ranks, int64 [C].

    ``shift_C`` is this logit. If several ranks have it, the id of the first rank is returned.
    """
    top_C, column_C = logits_CV.max(dim=1)
    return columns.min((columns.first + column_C).masked_fill(top_C < shift_C, columns.vocab))


def _dot(a_CV: Tensor, b_CV: Tensor, spare_CV: Tensor) -> Tensor:
    """Return the inner product of each row of ``a_CV`` with the same row of ``b_CV``, [C].

    Overwrites ``spare_CV``, which may be ``a_CV`` or ``b_CV``.
    """
    return torch.mul(a_CV, b_CV, out=spare_CV).sum(dim=1)


def _sampled(models: _Models, tokens: Tokens, ratio_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the policy-gradient loss [C] of the sampled tokens, and its gradient [C, V].

    The loss is cost = r * (log q(y) - log p(y)). Here y is the sampled token, q the student's probability, p the
    teacher's probability, and r the importance ratio from ``ratio_C``. The gradient with respect to the student's
    logits is cost * (one_hot(y) - q).
    """
    columns = models.columns
    value_C = -ratio_C * columns.sum(own_logits(models.log_ratio_CV, tokens.ids_N, columns))
    gradient_CV = models.q_CV.mul_(-value_C.unsqueeze(1))
    own_C1 = columns.own_ids(tokens.ids_N.long()).unsqueeze(1)
    gradient_CV.scatter_add_(1, own_C1.clamp(min=0), value_C.unsqueeze(1).masked_fill(own_C1 < 0, 0.0))
    return value_C, gradient_CV


def _kls(models: _Models, loss_config: LossConfig) -> tuple[Tensor, Tensor]:
    """Return the forward, reverse or mixed KL [C], and its gradient [C, V].

    p is the teacher, q the student. The gradients with respect to the student's logits are:

    - forward KL, KL(p || q): q - p
    - reverse KL, R = KL(q || p): q (log q - log p - R)
    - mixed KL: w times the gradient of the forward KL plus (1 - w) times the gradient of the reverse KL, with w =
      ``loss_fn.mixed_kl_weight``
    """
    weight = _forward_weight(loss_config)
    value_C, gradient_CV = (
        weight * models.forward_C + (1 - weight) * models.reverse_C,
        models.p_CV,
    )
    if weight > 0:
        gradient_CV.neg_().add_(models.q_CV).mul_(weight)
    else:
        gradient_CV.zero_()
    if weight < 1:
        distance_CV = models.log_ratio_CV.add_(models.reverse_C.unsqueeze(1))
        gradient_CV.addcmul_(models.q_CV, distance_CV, value=weight - 1)
    return value_C, gradient_CV


def _jsd(models: _Models, loss_config: LossConfig) -> tuple[Tensor, Tensor]:
    """Return the Jensen-Shannon divergence [C], and its gradient [C, V].

    p is the teacher, q the student, b = ``loss_fn.jsd_beta``, and m = b p + (1 - b) q. The gradient with respect to
    the student's logits is q (u - sum(q u)), with u = (1 - b) (log q - log m) and the sum over the vocabulary.
    """
    beta, log_ratio_CV, q_CV, p_CV = (
        loss_config.jsd_beta,
        models.log_ratio_CV,
        models.q_CV,
        models.p_CV,
    )
    above_CV = _log_middle_ratio(models, beta)
    teachers_C = _dot(p_CV, log_ratio_CV.sub_(above_CV), p_CV)
    own_C = _dot(q_CV, above_CV, p_CV)
    teachers_C, own_C = models.columns.sum(torch.stack([teachers_C, own_C], dim=1)).unbind(dim=1)
    value_C = beta * teachers_C - (1 - beta) * own_C
    return value_C, above_CV.sub_(own_C.unsqueeze(1)).mul_(q_CV).mul_(beta - 1)


def _clipped(models: _Models, loss_config: LossConfig, clip: float) -> tuple[Tensor, Tensor]:
    """Return the divergence [C] with each term at most ``clip`` nats, and its gradient [C, V].

    The divergence is the sum of min(f_v, clip) over the tokens v. Let s_v be the slope of f_v with respect to log q_v,
    or 0 if the term is clipped. The gradient with respect to the student's logits is s - q sum(s).
    """
    terms_CV, slopes_CV, spare_CV = TERMS_AND_SLOPES[loss_config.kl_type](models, loss_config)
    slopes_CV.mul_(torch.le(terms_CV, clip, out=spare_CV))  # 1 or 0
    on_this_rank = torch.stack([terms_CV.clamp_(max=clip).sum(dim=1), slopes_CV.sum(dim=1)], dim=1)
    value_C, slope_C = models.columns.sum(on_this_rank).unbind(dim=1)
    return value_C, slopes_CV.addcmul_(models.q_CV, slope_C.unsqueeze(1), value=-1)


def _kl_terms(models: _Models, loss_config: LossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return the terms of the forward, reverse or mixed KL, their slopes, and a free buffer, [C, V] each.

    With r = log p - log q and the weight w of the forward KL, the term of a token is r (w p - (1 - w) q). Its slope
    with respect to log q is (1 - w) q (1 - r) - w p.
    """
    weight, ratio_CV = _forward_weight(loss_config), models.log_ratio_CV
    terms_CV = torch.mul(models.q_CV, weight - 1, out=models.spare_CV).add_(models.p_CV, alpha=weight).mul_(ratio_CV)
    slopes_CV = ratio_CV.neg_().add_(1).mul_(models.q_CV).mul_(1 - weight).sub_(models.p_CV, alpha=weight)
    return terms_CV, slopes_CV, models.p_CV


def _jsd_terms(models: _Models, loss_config: LossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return the terms of the Jensen-Shannon divergence, their slopes, and a free buffer, [C, V] each.

    With u = log m - log q and r = log p - log q, the term of a token is b p (r - u) - (1 - b) q u. Its slope with
    respect to log q is -(1 - b) q u, because the terms that contain the slope of m cancel.
    """
    beta, u_CV = loss_config.jsd_beta, _log_middle_ratio(models, loss_config.jsd_beta)
    terms_CV = models.log_ratio_CV.sub_(u_CV).mul_(models.p_CV).mul_(beta)
    slopes_CV = torch.mul(models.q_CV, u_CV, out=models.p_CV).mul_(beta - 1)
    return terms_CV.add_(slopes_CV), slopes_CV, u_CV


def _log_middle_ratio(models: _Models, beta: float) -> Tensor:
    """Return log m - log q of each token, [C, V], with m = beta p + (1 - beta) q; overwrites ``models.spare_CV``."""
    above_CV = torch.add(models.log_ratio_CV, math.log(beta / (1 - beta)), out=models.spare_CV)
    return torch.logaddexp(above_CV, above_CV.new_zeros(()), out=above_CV).add_(math.log1p(-beta))


def _forward_weight(loss_config: LossConfig) -> float:
    """Return the weight of KL(p || q) in the loss; that of KL(q || p) is 1 minus this weight."""
    return {"forward": 1.0, "reverse": 0.0, "mixed": loss_config.mixed_kl_weight}[loss_config.kl_type]


FAST_GRADIENTS: Mapping[str, Callable[[_Models, LossConfig], tuple[Tensor, Tensor]]] = {
    "forward": _kls,
    "reverse": _kls,
    "mixed": _kls,
    "jsd": _jsd,
}
"""Maps a value of ``loss_fn.kl_type`` to a function that computes this divergence without autograd.

Each function returns the divergence [C] and its gradient [C, V] with respect to the student's logits divided by the
temperature. It allocates no tensors of [C, V]: the gradient overwrites a tensor of ``_Models``.
"""

TERMS_AND_SLOPES: Mapping[str, Callable[[_Models, LossConfig], tuple[Tensor, Tensor, Tensor]]] = {
    "forward": _kl_terms,
    "reverse": _kl_terms,
    "mixed": _kl_terms,
    "jsd": _jsd_terms,
}
"""Maps a value of ``loss_fn.kl_type`` to a function that computes the terms of its sum, for ``loss_fn.entry_clip``.

Each function returns the terms, their slopes with respect to the student's log-probs, and a free buffer, [C, V] each.
It may overwrite all tensors of ``_Models`` except ``q_CV``.
"""
