"""Divergences between student and teacher: the reference implementation of ``loss.fused``.

A row is one response token. The kept ids of a row are the K token ids of its top-k (``TopK``); the tail of a row
consists of all other tokens. Each loss is a function of a few numbers per row: the student's logits at the kept ids,
and the logsumexp and the mean logit of the tail. ``student_outcomes`` computes these numbers under autograd, and
``topk_reduction`` computes the same numbers in place. In both cases ``divergence`` computes the loss from them.

To add a divergence, add a function to ``DIVERGENCES`` and its name to ``LossConfig.kl_type``. KL(teacher || student) is
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
"""Teacher's log-prob of each token outside the top-k if ``loss_fn.outside_topk=floor``, as in NeMo-RL."""

_NEG_INF = float("-inf")


class Tokens(NamedTuple):
    """The N sampled response tokens, one per row of the loss, with the sampler's log-probs."""

    ids_N: Tensor
    """int64 [N]: ids of the sampled tokens."""
    logprobs_N: Tensor
    """float32 [N]: log-probs in nats that the sampler reported for the sampled tokens."""


class Outcomes(NamedTuple):
    """Logits of one model at the K top-k ids of each row, and statistics of the tail (all other tokens).

    The fields define a distribution over K + 1 outcomes: the K top-k tokens, and the tail as one outcome. The
    distribution does not change if a constant is added to all values of a row.
    """

    logits_NK: Tensor
    """[N, K]: logits at the K top-k ids, divided by the loss's temperature; -inf if an id is padding (-1)."""
    tail_N: Tensor
    """[N]: logsumexp of all logits outside the top-k; -inf if K is the vocabulary size."""
    tail_mean_N: Tensor
    """[N]: mean of all logits outside the top-k, weighted by the softmax over these logits.

    It is 0 if K is the vocabulary size, and NaN if the mean was not computed.
    """

    def unnormalised_NE(self) -> Tensor:
        """Return [N, K + 1]: the logits at the K top-k ids, then the logsumexp of all other logits."""
        return torch.cat([self.logits_NK, self.tail_N.unsqueeze(1)], dim=1)

    def log_masses_NE(self) -> Tensor:
        """Return [N, K + 1]: the log-prob of each top-k token, then that of all other tokens together."""
        return torch.log_softmax(self.unnormalised_NE(), dim=1)


@dataclass(frozen=True)
class Pair:
    """Log-probs of teacher and student for the E outcomes that the loss compares in each of N rows.

    An outcome is a single token, or all tokens outside the top-k together. A divergence is the sum of one term per
    outcome.
    """

    log_p_NE: Tensor
    """[N, E]: the teacher's log-probs of the outcomes."""
    log_q_NE: Tensor
    """[N, E]: the student's log-probs of the outcomes, differentiable."""
    floor: Outcomes | None = None
    """Student's logits at the top-k ids, and statistics of all other tokens.

    ``reverse_terms`` uses them to add the term of the tokens outside the top-k. They are only set for
    ``loss_fn.outside_topk=floor``.
    """

    def forward_terms(self) -> Tensor:
        """Return the terms of KL(teacher || student), [N, E] in nats.

        If ``floor`` is set, the result is [N, E + 1]: the last term, that of the tokens outside the top-k, is 0.
        """
        terms_NE = _kl_terms(self.log_p_NE, self.log_q_NE)
        return terms_NE if self.floor is None else torch.nn.functional.pad(terms_NE, (0, 1))

    def reverse_terms(self) -> Tensor:
        """Return the terms of KL(student || teacher), [N, E] in nats.

        If ``floor`` is set, the result is [N, E + 1]: the last term is that of the tokens outside the top-k. A term is
        +inf, without gradient, if only the teacher's probability is 0.
        """
        infinite_NE = (self.log_p_NE == _NEG_INF) & (self.log_q_NE > _NEG_INF)
        # The gradient of an infinite term is infinite: it would become NaN even if the term is clipped.
        log_p_NE = self.log_p_NE.masked_fill(infinite_NE, 0.0)
        terms_NE = _kl_terms(self.log_q_NE, log_p_NE).masked_fill(infinite_NE, math.inf)
        return terms_NE if self.floor is None else torch.cat([terms_NE, _tail_on_floor(self.floor).unsqueeze(1)], dim=1)


Divergence = Callable[[Pair, LossConfig], Tensor]
"""Function of a ``Pair`` and a ``LossConfig`` that returns the terms of a divergence, [N, E] in nats.

The sum of a row's terms is the divergence of the row. The terms are differentiable with respect to the student's
log-probs.
"""


def _forward(pair: Pair, loss_config: LossConfig) -> Tensor:
    return pair.forward_terms()


def _reverse(pair: Pair, loss_config: LossConfig) -> Tensor:
    return pair.reverse_terms()


def _mixed(pair: Pair, loss_config: LossConfig) -> Tensor:
    """Return the terms of w KL(teacher || student) + (1 - w) KL(student || teacher), [N, E] in nats.

    w is ``loss_fn.mixed_kl_weight``. A KL with weight 0 is not computed, because it may be infinite.
    """
    weight = loss_config.mixed_kl_weight
    if weight == 1:
        return pair.forward_terms()
    if weight == 0:
        return pair.reverse_terms()
    return weight * pair.forward_terms() + (1 - weight) * pair.reverse_terms()


def _jsd(pair: Pair, loss_config: LossConfig) -> Tensor:
    """Return the terms of the Jensen-Shannon divergence b KL(p || m) + (1 - b) KL(q || m), which is always finite.

    p is the teacher's distribution, q the student's, m = b p + (1 - b) q, and b = ``loss_fn.jsd_beta``.
    """
    log_p, log_q, beta = pair.log_p_NE, pair.log_q_NE, loss_config.jsd_beta
    impossible = (log_p == _NEG_INF) & (log_q == _NEG_INF)  # here m is 0 too, and log m has no gradient
    log_p, log_q = (
        log_p.masked_fill(impossible, 0.0),
        log_q.masked_fill(impossible, 0.0),
    )
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta)).masked_fill(impossible, 0.0)
    return beta * _kl_terms(log_p, log_m) + (1 - beta) * _kl_terms(log_q, log_m)


DIVERGENCES: Mapping[str, Divergence] = {
    "forward": _forward,
    "reverse": _reverse,
    "mixed": _mixed,
    "jsd": _jsd,
}
"""Maps each value of ``loss_fn.kl_type`` except ``sampled`` to the function for this divergence.

``sampled`` is not a divergence of two distributions: it estimates the reverse KL from the sampled token alone.
"""


def loss_temperature(loss_config: LossConfig, sampling_temperature: float = 1.0) -> float:
    """Return the temperature that divides the logits of both models in the loss.

    The result is ``loss_fn.temperature``, or the sampling temperature if ``loss_fn.temperature`` is null. Raises
    ``UserError`` if the result is not a finite number above 0.
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
    """Return the distillation loss of each row (response token), computed from the student's logits.

    This is the reference implementation of ``fused_linear_kl``.

    Args:
        logits_NV: the student's logits, not divided by the temperature.
        topk: the teacher's log-probs at K token ids per row, at the loss's temperature.
        loss_config: the divergence and its settings.
        sampling_temperature: the loss's temperature if ``loss_config.temperature`` is None.
        valid_vocab: number of columns of logits, not counting vocabulary padding; None means all columns. Padding
            columns count as -inf and get gradient 0.
        tokens: the sampled tokens. ``loss_fn.kl_type=sampled`` requires them, and ``topk`` must then contain their ids.

    Returns:
        The loss [N] in nats, float32 (float64 for float64 logits). It is +inf if a divergence is infinite, such as the
        forward KL with a student logit of -inf at one of the teacher's tokens. The gradient stays finite.

    Raises ``UserError`` for an invalid configuration, mismatched shapes, ids out of range or repeated, and K above the
    vocabulary size. With ``loss_fn.kl_type=sampled`` it is also raised for missing tokens and for a sampled token whose
    id is not in ``topk``.
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
    """Return the student's logits at the top-k ids, and statistics of the tail (all other tokens).

    ``z_NV`` has the student's logits divided by the temperature. ``ids_NK`` has the top-k ids; -1 is padding. The
    result is differentiable. The tail's logsumexp is computed from the logits of the tail alone, because
    1 - (probability of the top-k) would lose precision for a small tail. With ``with_mean`` the tail's mean logit is
    computed too, which needs two more tensors of [N, V]. Only ``loss_fn.outside_topk=floor`` uses the mean.
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
    """Return the loss of each row (response token), [N] in nats; differentiable in ``student``.

    The arguments are not checked (see ``checks``). The tail consists of all tokens outside the K ids of ``topk``.
    ``loss_fn.outside_topk`` determines which outcomes are compared:

    - ``bucket``: the K ids, and the tail as one outcome. The result is at least 0, and at most the
      divergence over the complete vocabulary.
    - ``renormalize``: the K ids, with both models renormalised over them.
    - ``floor``: all tokens. The teacher is renormalised over the K ids and has a log-prob of -100 at all other tokens,
      as with NeMo-RL's ``zero_outside_topk: true``.

    ``loss_fn.kl_type=sampled`` ignores ``outside_topk`` and compares the models at the sampled token. If
    ``loss_fn.entry_clip`` is set, the terms of the K ids are clipped, but not that of the tail. Afterwards the absolute
    loss of a row is at most ``loss_fn.token_kl_cap``, if this cap is set.
    """
    if loss_config.kl_type == "sampled":
        kl_N = _sampled_estimate(student, topk, loss_config, tokens)
    else:
        terms_NE = DIVERGENCES[loss_config.kl_type](_compared(student, topk, loss_config), loss_config)
        kl_N = clipped_sum(terms_NE, loss_config.entry_clip, topk.ids_NK.shape[1])
    if loss_config.token_kl_cap is None:
        return kl_N
    value_N = kl_N.detach()
    scaled_N = kl_N.masked_fill(kl_N.isinf(), 0.0) * cap_factor(value_N, loss_config.token_kl_cap)  # inf * 0 is NaN
    return scaled_N + (capped(value_N, loss_config.token_kl_cap) - scaled_N.detach())


def capped(kl_N: Tensor, cap: float | None) -> Tensor:
    """Return the loss of each row, limited to at most ``cap`` nats in absolute value, [N]; without gradient.

    All rows above the cap have exactly the same loss. The product of the loss and ``cap_factor`` would differ in the
    last bit, and ``token_weights.select`` would order the rows by this rounding.
    """
    return kl_N if cap is None else kl_N.clamp(-cap, cap)


def clipped_sum(terms_NE: Tensor, clip: float | None, entries: int) -> Tensor:
    """Return the sum of each row's terms, [N]; the first ``entries`` terms count with at most ``clip`` nats each.

    Clipped terms have no gradient. ``clip`` is ``loss_fn.entry_clip``; None: no term is clipped.
    """
    if clip is not None:
        kept_NK, tail_NE = terms_NE[:, :entries], terms_NE[:, entries:]
        # A NaN is not above the clip and reaches the loss.
        terms_NE = torch.cat([kept_NK.masked_fill(kept_NK.detach() > clip, clip), tail_NE], dim=1)
    return terms_NE.sum(dim=1)


def _sampled_estimate(student: Outcomes, topk: TopK, loss_config: LossConfig, tokens: Tokens | None) -> Tensor:
    """Return the policy-gradient loss of the sampled tokens, [N] in nats.

    The value is cost = r * (log q(y) - log p(y)). Here y is the sampled token, q the student's probability, p the
    teacher's probability, and r the result of ``importance_ratio``. The gradient is cost * grad(log q(y)). If r is 1,
    the expected value is KL(student || teacher), and the expected gradient is the gradient of this KL.
    """
    assert tokens is not None
    here_NK = topk.ids_NK == tokens.ids_N.unsqueeze(1)
    own_N = student.log_masses_NE()[:, :-1].masked_fill(~here_NK, 0.0).sum(dim=1)
    teachers_N = topk.logprobs_NK.to(own_N.dtype).masked_fill(~here_NK, 0.0).sum(dim=1)
    cost_N = importance_ratio(own_N.detach(), tokens.logprobs_N, loss_config) * (own_N.detach() - teachers_N)
    return cost_N + cost_N * (own_N - own_N.detach())


def importance_ratio(own_N: Tensor, sampler_N: Tensor, loss_config: LossConfig) -> Tensor:
    """Return the importance ratios [N] of the sampled tokens, clamped to ``loss_fn.importance_ratio_cap``.

    The importance ratio of a token is its probability in the trainer divided by its probability in the sampler.
    ``own_N`` and ``sampler_N`` are the log-probs of trainer and sampler.
    """
    return (own_N - sampler_N.to(own_N.dtype)).exp().clamp(max=loss_config.importance_ratio_cap)


def cap_factor(kl_N: Tensor, cap: float | None) -> Tensor:
    """Return a factor [N] for the loss ``kl_N`` of each row, so that abs(kl * factor) <= ``cap`` nats.

    A factor is 1 if the loss is within the cap, or if ``cap`` is None. The loss is scaled instead of clamped, because a
    clamped loss would have no gradient.
    """
    if cap is None:
        return torch.ones_like(kl_N)
    return (cap / kl_N.abs()).clamp(max=1.0)


def bucket_kls(student: Outcomes, topk: TopK) -> tuple[Tensor, Tensor]:
    """Return the metrics KL(teacher || student) and KL(student || teacher), [N] each in nats.

    The compared outcomes are the K tokens of ``topk``, and all other tokens as one outcome.
    """
    pair = Pair(_teacher_log_masses(topk, student.tail_N.dtype), student.log_masses_NE())
    return pair.forward_terms().sum(dim=1), pair.reverse_terms().sum(dim=1)


def entropy(outcomes: Outcomes) -> Tensor:
    """Return the entropy of a model's distribution over the complete vocabulary, [N] in nats.

    The entropy is logsumexp(z) - E[z], where z are the logits. In E[z], the tail (all tokens outside the top-k)
    contributes the tail's total probability times the tail's mean logit, ``tail_mean_N``.
    """
    lse_N1 = outcomes.unnormalised_NE().logsumexp(dim=1, keepdim=True)
    means_NE = torch.cat([outcomes.logits_NK, outcomes.tail_mean_N.unsqueeze(1)], dim=1)
    distances_NE = (lse_N1 - means_NE).masked_fill(outcomes.unnormalised_NE() == _NEG_INF, 0.0)
    return (outcomes.log_masses_NE().exp() * distances_NE).sum(dim=1)


def _compared(student: Outcomes, topk: TopK, loss_config: LossConfig) -> Pair:
    """Return the log-probs of both models for the outcomes selected by ``loss_fn.outside_topk``.

    With ``bucket`` the outcomes are the K tokens of ``topk``, and all other tokens as one outcome. With ``renormalize``
    and ``floor`` they are the K tokens. With ``floor``, ``Pair.floor`` has the student's statistics of all tokens.
    """
    dtype = student.tail_N.dtype
    if loss_config.outside == "bucket":
        return Pair(_teacher_log_masses(topk, dtype), student.log_masses_NE())
    log_p_NK = torch.log_softmax(topk.logprobs_NK.to(dtype), dim=1)
    if loss_config.outside == "renormalize":
        return Pair(log_p_NK, torch.log_softmax(student.logits_NK, dim=1))
    return Pair(log_p_NK, student.log_masses_NE()[:, :-1], floor=student)


def _teacher_log_masses(topk: TopK, dtype: torch.dtype) -> Tensor:
    return torch.cat([topk.logprobs_NK, topk.log_tail_N.unsqueeze(1)], dim=1).to(dtype)


def _kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the terms of KL(p || q): p (log p - log q) of each outcome, in the shape of ``log_p``.

    An outcome with p = 0 contributes 0 to the value and to the gradient.
    """
    impossible = log_p == _NEG_INF  # false for NaN, which must reach the loss
    log_p, log_q = (
        log_p.masked_fill(impossible, 0.0),
        log_q.masked_fill(impossible, 0.0),
    )
    return (log_p.exp() * (log_p - log_q)).masked_fill(impossible, 0.0)


def _tail_on_floor(student: Outcomes) -> Tensor:
    """Return the tail's term of KL(student || teacher) for ``loss_fn.outside_topk=floor``, [N] in nats.

    The tail consists of all tokens outside the top-k; q is the student, p the teacher. The term is the sum over the
    tail of q (log q - log p). Since log p = -100 at each of these tokens, it equals the sum of q log q plus 100 times
    the student's probability of the tail.
    """
    lse_N = student.unnormalised_NE().logsumexp(dim=1)
    return (student.tail_N - lse_N).exp() * (student.tail_mean_N - lse_N - LOG_FLOOR)


def _mark(ids_NK: Tensor, vocab: int) -> Tensor:
    """Return a bool mask [N, V] that is True at the ids of ``ids_NK``; -1 (padding) is ignored.

    In the implementation, padding sets an additional column V, which is then removed.
    """
    marks = torch.zeros(ids_NK.shape[0], vocab + 1, dtype=torch.bool, device=ids_NK.device)
    columns_NK = ids_NK.long()
    return marks.scatter_(1, columns_NK.masked_fill(columns_NK < 0, vocab), True)[:, :vocab]
