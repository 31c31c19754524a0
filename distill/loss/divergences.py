"""Divergences between student and teacher, in plain PyTorch: the readable twins of the fused code.

Every loss here is a function of a few numbers per row: the student's logits at the K kept ids and, of the tail (all
other tokens), the logsumexp and the mean logit. ``student_outcomes`` computes them under autograd, ``topk_reduction``
computes the same numbers in place; ``divergence`` turns them into the loss for both.

A new divergence is one function in ``DIVERGENCES`` and one word in ``LossConfig.kl_type``. KL(teacher || student) is
the forward KL, KL(student || teacher) the reverse KL. Values are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.loss import checks
from distill.types import TopK

LOG_FLOOR = -100.0
"""Teacher's log-prob outside the top-k under ``outside_topk: floor``; NeMo-RL's value."""

_NEG_INF = float("-inf")


class Tokens(NamedTuple):
    """The sampled tokens of N rows and the sampler's log-probs of them, at the loss's temperature."""

    ids_N: Tensor
    logprobs_N: Tensor


class Outcomes(NamedTuple):
    """A model's logits at K kept tokens, and the tail's sums; each row may be shifted by a constant."""

    logits_NK: Tensor
    """Logits over temperature at the kept ids; -inf if an id is padding."""
    tail_N: Tensor
    """Logsumexp of the tail; -inf if the tail is empty (K is the vocabulary)."""
    tail_mean_N: Tensor
    """Mean logit of the tail under the tail's own softmax; 0 if the tail is empty, NaN if it was not computed."""

    def events_NE(self) -> Tensor:
        """Return unnormalised log-probs of the K + 1 outcomes, [N, K + 1]: the kept tokens, then the tail."""
        return torch.cat([self.logits_NK, self.tail_N.unsqueeze(1)], dim=1)

    def log_masses_NE(self) -> Tensor:
        """Return log-probs of the K + 1 outcomes, [N, K + 1]."""
        return torch.log_softmax(self.events_NE(), dim=1)


@dataclass(frozen=True)
class Pair:
    """Log-probs of teacher and student over the same E events; the last axis is the events."""

    log_p_NE: Tensor
    """Teacher's log-probs."""
    log_q_NE: Tensor
    """Student's log-probs, differentiable."""
    floor: Outcomes | None = None
    """Student's outcomes under ``outside_topk: floor``, which adds the tail to the reverse KL."""

    def forward_kl(self) -> Tensor:
        """Return KL(teacher || student), [N]."""
        return _kl(self.log_p_NE, self.log_q_NE)

    def reverse_kl(self) -> Tensor:
        """Return KL(student || teacher), [N]."""
        reverse_N = _kl(self.log_q_NE, self.log_p_NE)
        return reverse_N if self.floor is None else reverse_N + _tail_on_floor(self.floor)


Divergence = Callable[[Pair, LossConfig], Tensor]
"""A divergence: the loss of each row, [N], differentiable in the student's log-probs."""


def _forward(pair: Pair, loss_config: LossConfig) -> Tensor:
    return pair.forward_kl()


def _reverse(pair: Pair, loss_config: LossConfig) -> Tensor:
    return pair.reverse_kl()


def _mixed(pair: Pair, loss_config: LossConfig) -> Tensor:
    """w KL(teacher || student) + (1 - w) KL(student || teacher); a KL of weight 0 is skipped, as it may be infinite."""
    weight = loss_config.mixed_kl_weight
    if weight == 1:
        return pair.forward_kl()
    if weight == 0:
        return pair.reverse_kl()
    return weight * pair.forward_kl() + (1 - weight) * pair.reverse_kl()


def _jsd(pair: Pair, loss_config: LossConfig) -> Tensor:
    """b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q; always finite."""
    log_p, log_q, beta = pair.log_p_NE, pair.log_q_NE, loss_config.jsd_beta
    impossible = (log_p == _NEG_INF) & (log_q == _NEG_INF)  # m is 0 too, and its log has no gradient
    log_p, log_q = (
        log_p.masked_fill(impossible, 0.0),
        log_q.masked_fill(impossible, 0.0),
    )
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta)).masked_fill(impossible, 0.0)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


DIVERGENCES: Mapping[str, Divergence] = {
    "forward": _forward,
    "reverse": _reverse,
    "mixed": _mixed,
    "jsd": _jsd,
}
"""Divergences by ``loss_fn.kl_type``. ``sampled`` is none: it is an estimator of the reverse KL from one token."""


def loss_temperature(loss_config: LossConfig, sampling_temperature: float = 1.0) -> float:
    """Return the temperature of both models' logits in the loss; ``loss_fn.temperature: null`` is the sampler's.

    Raises ``UserError`` if it is not above 0.
    """
    temperature = sampling_temperature if loss_config.temperature is None else loss_config.temperature
    checks.check_temperature(temperature)
    return float(temperature)


def topk_kl(
    logits_NV: Tensor,
    topk: TopK,
    loss_config: LossConfig,
    *,
    sampling_temperature: float = 1.0,
    valid_vocab: int | None = None,
    tokens: Tokens | None = None,
) -> Tensor:
    """Return the distillation loss of each row from the student's logits: the plain twin of ``fused_linear_kl``.

    Args:
        logits_NV: the student's logits, not divided by the temperature.
        topk: the teacher's targets, at the loss's temperature.
        loss_config: the divergence and its settings.
        sampling_temperature: the meaning of ``loss_config.temperature: null``.
        valid_vocab: number of real columns; columns from here on are padding, count as -inf and get gradient 0.
        tokens: the sampled tokens, which must be among the kept ids; ``kl_type: sampled`` needs them.

    Returns:
        kl_N in nats, float32 (float64 for float64 logits). It is +inf if one model excludes a token that the other
        needs, such as the forward KL with a student logit of -inf at a teacher's token; the gradient stays finite.

    Raises ``UserError`` for an invalid configuration, mismatched shapes, ids out of range or repeated, K above the
    vocabulary, and for ``sampled`` without tokens or with a token that is not among the kept ids.
    """
    checks.check_loss(loss_config)
    checks.check_logits(logits_NV)
    rows = logits_NV.shape[0]
    vocab = checks.check_vocab(logits_NV.shape[1], valid_vocab)
    checks.check_topk(topk, rows, vocab)
    if tokens is not None:
        checks.check_rows(rows, sampled_ids_N=tokens.ids_N, sampled_logprobs_N=tokens.logprobs_N)
    checks.check_ids(vocab, topk.ids_NK, None if tokens is None else tokens.ids_N)
    checks.check_no_duplicates(topk.ids_NK)
    checks.check_tokens(loss_config, tokens is not None)
    checks.check_kept(topk, loss_config, None if tokens is None else tokens.ids_N, weight_N=None)
    temperature = loss_temperature(loss_config, sampling_temperature)
    z_NV = logits_NV[:, :vocab].to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature
    outcomes = student_outcomes(z_NV, topk.ids_NK, with_mean=loss_config.outside == "floor")
    return divergence(outcomes, topk, loss_config, tokens)


def student_outcomes(z_NV: Tensor, ids_NK: Tensor, with_mean: bool) -> Outcomes:
    """Return the K + 1 outcomes of logits that are already divided by the temperature; differentiable.

    The kept ids become -inf before the tail's logsumexp: 1 - (mass of the kept ids) would lose a small tail's digits.
    ``with_mean`` computes the tail's mean logit too; it takes two more [N, V], and only ``outside_topk: floor`` needs
    it.
    """
    z_NV = z_NV - z_NV.detach().amax(dim=1, keepdim=True)
    inside_NV = _mark(ids_NK, z_NV.shape[1])
    tail_NV = z_NV.masked_fill(inside_NV, _NEG_INF)
    empty_N1 = (tail_NV == _NEG_INF).all(dim=1, keepdim=True)
    # Logsumexp and softmax have NaN gradients at -inf: fill an empty tail with 0 first, and mask the result.
    tail_NV = tail_NV.masked_fill(empty_N1, 0.0)
    kept_NK = z_NV.gather(1, ids_NK.long().clamp(min=0)).masked_fill(ids_NK < 0, _NEG_INF)
    empty_N = empty_N1.squeeze(1)
    tail_N = tail_NV.logsumexp(1).masked_fill(empty_N, _NEG_INF)
    if not with_mean:
        return Outcomes(kept_NK, tail_N, torch.full_like(tail_N, math.nan))
    finite_NV = tail_NV.masked_fill(tail_NV == _NEG_INF, 0.0)
    mean_N = (torch.softmax(tail_NV, dim=1) * finite_NV).sum(dim=1)
    return Outcomes(kept_NK, tail_N, mean_N.masked_fill(empty_N, 0.0))


def divergence(student: Outcomes, topk: TopK, loss_config: LossConfig, tokens: Tokens | None = None) -> Tensor:
    """Return the loss of each row, [N], from the student's outcomes and the teacher's; differentiable in ``student``.

    ``bucket`` compares the K + 1 outcomes: the result is never negative and never above the full KL. ``renormalize``
    compares both models conditional on the K ids. ``floor`` renormalises the teacher only and uses a log-prob of -100
    for its other tokens; NeMo-RL's ``zero_outside_topk: true``. ``kl_type: sampled`` compares the models at the sampled
    token and ignores ``outside_topk``. The arguments are already checked (``checks.py``).
    """
    if loss_config.kl_type == "sampled":
        kl_N = _sampled_estimate(student, topk, loss_config, tokens)
    else:
        kl_N = DIVERGENCES[loss_config.kl_type](_compared(student, topk, loss_config), loss_config)
    if loss_config.token_kl_cap is None:
        return kl_N
    kept_N = cap_factor(kl_N.detach(), loss_config.token_kl_cap)
    cap_N = loss_config.token_kl_cap * kl_N.detach().sign()
    return torch.where(kl_N.isinf(), cap_N, kl_N * kept_N)  # inf * 0 is NaN


def _sampled_estimate(student: Outcomes, topk: TopK, loss_config: LossConfig, tokens: Tokens | None) -> Tensor:
    """Policy gradient: cost = ratio (log q(y) - log p(y)) at the sampled token y, gradient = cost * d log q(y).

    Averaged over tokens sampled from the student it is KL(student || teacher), in value and in gradient.
    """
    assert tokens is not None
    here_NK = topk.ids_NK == tokens.ids_N.unsqueeze(1)
    own_N = student.log_masses_NE()[:, :-1].masked_fill(~here_NK, 0.0).sum(dim=1)
    teachers_N = topk.logprobs_NK.to(own_N.dtype).masked_fill(~here_NK, 0.0).sum(dim=1)
    cost_N = importance_ratio(own_N.detach(), tokens.logprobs_N, loss_config) * (own_N.detach() - teachers_N)
    return cost_N + cost_N * (own_N - own_N.detach())


def importance_ratio(own_N: Tensor, sampler_N: Tensor, loss_config: LossConfig) -> Tensor:
    """Return trainer's over sampler's probability of the sampled tokens, truncated at the cap; no gradient."""
    return (own_N - sampler_N.to(own_N.dtype)).exp().clamp(max=loss_config.importance_ratio_cap)


def cap_factor(kl_N: Tensor, cap: float | None) -> Tensor:
    """Return the weight that brings a row's loss down to ``cap`` nats: a factor, as a clamp would have no gradient."""
    if cap is None:
        return torch.ones_like(kl_N)
    return (cap / kl_N.abs()).clamp(max=1.0)


def bucket_kls(student: Outcomes, topk: TopK) -> tuple[Tensor, Tensor]:
    """Return forward and reverse KL of the K + 1 outcomes, [N] each: metrics of every loss."""
    pair = Pair(_teacher_log_masses(topk, student.tail_N.dtype), student.log_masses_NE())
    return pair.forward_kl(), pair.reverse_kl()


def entropy(outcomes: Outcomes) -> Tensor:
    """Return the entropy of the full distribution in nats, [N]: lse - E[logit], with the tail's mass and mean logit."""
    lse_N1 = outcomes.events_NE().logsumexp(dim=1, keepdim=True)
    means_NE = torch.cat([outcomes.logits_NK, outcomes.tail_mean_N.unsqueeze(1)], dim=1)
    distances_NE = (lse_N1 - means_NE).masked_fill(outcomes.events_NE() == _NEG_INF, 0.0)
    return (outcomes.log_masses_NE().exp() * distances_NE).sum(dim=1)


def _compared(student: Outcomes, topk: TopK, loss_config: LossConfig) -> Pair:
    """Both models over the events of ``outside_topk``: K + 1 under ``bucket``, else K."""
    dtype = student.tail_N.dtype
    if loss_config.outside == "bucket":
        return Pair(_teacher_log_masses(topk, dtype), student.log_masses_NE())
    log_p_NK = torch.log_softmax(topk.logprobs_NK.to(dtype), dim=1)
    if loss_config.outside == "renormalize":
        return Pair(log_p_NK, torch.log_softmax(student.logits_NK, dim=1))
    return Pair(log_p_NK, student.log_masses_NE()[:, :-1], floor=student)


def _teacher_log_masses(topk: TopK, dtype: torch.dtype) -> Tensor:
    return torch.cat([topk.logprobs_NK, topk.log_tail_N.unsqueeze(1)], dim=1).to(dtype)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of p (log p - log q) over the last axis; an event with p = 0 contributes 0 to value and gradient."""
    impossible = log_p == _NEG_INF  # equality lets a NaN through to the loss, where it is visible
    log_p, log_q = (
        log_p.masked_fill(impossible, 0.0),
        log_q.masked_fill(impossible, 0.0),
    )
    return (log_p.exp() * (log_p - log_q)).masked_fill(impossible, 0.0).sum(dim=-1)


def _tail_on_floor(student: Outcomes) -> Tensor:
    """The tail's part of KL(student || teacher) with log p = -100: sum of q log q there, plus 100 times its mass."""
    lse_N = student.events_NE().logsumexp(dim=1)
    return (student.tail_N - lse_N).exp() * (student.tail_mean_N - lse_N - LOG_FLOOR)


def _mark(ids_NK: Tensor, vocab: int) -> Tensor:
    """[N, V] bool: columns of the kept ids. Padding marks an extra column V, which is cut off."""
    marks = torch.zeros(ids_NK.shape[0], vocab + 1, dtype=torch.bool, device=ids_NK.device)
    columns_NK = ids_NK.long()
    return marks.scatter_(1, columns_NK.masked_fill(columns_NK < 0, vocab), True)[:, :vocab]
