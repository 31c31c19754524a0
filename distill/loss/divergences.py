"""Top-k divergences between a student and a teacher, in plain PyTorch: the readable twins of everything fused.

Every loss here is a function of a few numbers per row: the student's logits at the K kept ids and, of the tail (all the
other tokens), the logsumexp and the mean logit. ``student_outcomes`` finds them by autograd-friendly means, ``head.py``
finds the same ones in place; ``divergence`` turns them into the loss for both.

KL(teacher || student) is the forward KL, KL(student || teacher) the reverse KL. Values in nats.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.loss import checks
from distill.types import TopK

LOG_FLOOR = -100.0
"""The teacher's log-prob outside the top-k under ``outside_topk: floor``, as NeMo-RL has it."""

_NEG_INF = float("-inf")


class Tokens(NamedTuple):
    """The sampled tokens of N rows and the sampler's log-probs of them, at the loss's temperature."""

    ids_N: Tensor
    logprobs_N: Tensor


class Outcomes(NamedTuple):
    """What a model's logits say of K kept tokens and of the tail; each row may be shifted by a constant of its own."""

    logits_NK: Tensor
    """Logits over temperature at the kept ids; -inf where an id is padding."""
    tail_N: Tensor
    """Logsumexp of the tail; -inf where the tail is empty (K is the whole vocabulary)."""
    tail_mean_N: Tensor
    """Mean logit of the tail under the tail's own softmax; 0 where the tail is empty, NaN where nobody asked."""

    def events_NE(self) -> Tensor:
        """Unnormalised log-probs of the K + 1 outcomes, [N, K + 1]: the kept tokens, then "any other token"."""
        return torch.cat([self.logits_NK, self.tail_N.unsqueeze(1)], dim=1)

    def log_masses_NE(self) -> Tensor:
        """Log-probs of the K + 1 outcomes, [N, K + 1]."""
        return torch.log_softmax(self.events_NE(), dim=1)


def loss_temperature(loss_config: LossConfig, sampling_temperature: float = 1.0) -> float:
    """The temperature of both models' logits in the loss: ``loss_fn.temperature``, null meaning the sampler's.

    Errors: ``UserError`` where it is not above 0.
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
    """The distillation loss of each row from the student's logits: the plain twin of ``fused_linear_kl``.

    Args:
        logits_NV: the student's logits, differentiable; bf16 is widened to float32.
        topk: the teacher's targets, made at the loss's temperature.
        loss_config: which divergence, and what stands for the tokens outside the top-k.
        sampling_temperature: what ``loss_config.temperature: null`` means.
        valid_vocab: columns from here on are padding: they count as -inf and get a gradient of exactly 0.
        tokens: the sampled tokens, among the kept ids; ``kl_type: sampled`` needs them.

    Returns:
        kl_N in nats, float32 (float64 for float64 logits). It is +inf where one model excludes what the other needs:
        the forward KL where the student's logit at a teacher's token is -inf; its gradient stays finite.

    Errors: ``UserError`` for a configuration that is no loss, shapes that disagree, ids out of range or repeated, K
    above the vocabulary, and for sampled without tokens or with one that is not among the ids.
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
    outcomes = student_outcomes(z_NV, topk.ids_NK, mean=loss_config.outside == "floor")
    return divergence(outcomes, topk, loss_config, tokens)


def student_outcomes(z_NV: Tensor, ids_NK: Tensor, mean: bool) -> Outcomes:
    """The K + 1 outcomes of logits that are already divided by the temperature; differentiable.

    The kept ids become -inf before the tail's logsumexp: 1 - (mass of the kept ids) would lose a small tail's digits.
    ``mean``: whether to find the tail's mean logit too, which takes two more [N, V] and which only a floor needs.
    """
    z_NV = z_NV - z_NV.detach().amax(dim=1, keepdim=True)
    inside_NV = _mark(ids_NK, z_NV.shape[1])
    tail_NV = z_NV.masked_fill(inside_NV, _NEG_INF)
    empty_N1 = (tail_NV == _NEG_INF).all(dim=1, keepdim=True)
    # An empty tail is replaced before logsumexp and softmax, and again after: their gradients at -inf are NaN.
    tail_NV = tail_NV.masked_fill(empty_N1, 0.0)
    kept_NK = z_NV.gather(1, ids_NK.long().clamp(min=0)).masked_fill(ids_NK < 0, _NEG_INF)
    empty_N = empty_N1.squeeze(1)
    tail_N = tail_NV.logsumexp(1).masked_fill(empty_N, _NEG_INF)
    if not mean:
        return Outcomes(kept_NK, tail_N, torch.full_like(tail_N, math.nan))
    finite_NV = tail_NV.masked_fill(tail_NV == _NEG_INF, 0.0)
    mean_N = (torch.softmax(tail_NV, dim=1) * finite_NV).sum(dim=1)
    return Outcomes(kept_NK, tail_N, mean_N.masked_fill(empty_N, 0.0))


def divergence(student: Outcomes, topk: TopK, loss_config: LossConfig, tokens: Tokens | None = None) -> Tensor:
    """The loss of each row, [N], from the student's outcomes and the teacher's; differentiable in ``student``.

    ``bucket`` compares the K + 1 outcomes, so it is never negative and never above the full KL. ``renormalize``
    compares both models conditional on the K ids. ``floor`` renormalises the teacher only and takes its log-prob to be
    -100 on all other tokens. The last two are NeMo-RL's ``zero_outside_topk`` false and true. The Jensen-Shannon
    divergence compares the same outcomes; a floor it has none, for its two sides share one distribution. ``sampled``
    compares the two models at the sampled token alone, and what is outside the top-k does not enter. The doors have
    checked all of it (``checks.py``).
    """
    if loss_config.kl_type == "sampled":
        kl_N = _policy_gradient(student, topk, loss_config, tokens)
    else:
        kl_N = _compare(student, topk, loss_config)
    if loss_config.token_kl_cap is None:
        return kl_N
    kept_N = cap_factor(kl_N.detach(), loss_config.token_kl_cap)
    cap_N = loss_config.token_kl_cap * kl_N.detach().sign()
    return torch.where(kl_N.isinf(), cap_N, kl_N * kept_N)  # inf * 0 is NaN


def _compare(student: Outcomes, topk: TopK, loss_config: LossConfig) -> Tensor:
    log_p, log_q = _compared(student, topk, loss_config)
    if loss_config.kl_type == "jsd":
        return _jsd(log_p, log_q, loss_config.jsd_beta)
    share = forward_share(loss_config)
    kl_N = student.tail_N.new_zeros(student.tail_N.shape)
    if share > 0:
        kl_N = kl_N + share * _kl(log_p, log_q)
    if share < 1:
        reverse_N = _kl(log_q, log_p)
        if loss_config.outside == "floor":
            reverse_N = reverse_N + _reverse_on_floor(student)
        kl_N = kl_N + (1 - share) * reverse_N
    return kl_N


def _policy_gradient(student: Outcomes, topk: TopK, loss_config: LossConfig, tokens: Tokens | None) -> Tensor:
    """ratio (log q(y) - log p(y)) at the sampled token y, whose gradient is that number times the one of log q(y).

    Under the student's own sampling this is, on average, KL(student || teacher) and its gradient.
    """
    assert tokens is not None
    here_NK = topk.ids_NK == tokens.ids_N.unsqueeze(1)
    own_N = student.log_masses_NE()[:, :-1].masked_fill(~here_NK, 0.0).sum(dim=1)
    teachers_N = topk.logprobs_NK.to(own_N.dtype).masked_fill(~here_NK, 0.0).sum(dim=1)
    cost_N = importance_ratio(own_N.detach(), tokens.logprobs_N, loss_config) * (own_N.detach() - teachers_N)
    return cost_N + cost_N * (own_N - own_N.detach())


def importance_ratio(own_N: Tensor, sampler_N: Tensor, loss_config: LossConfig) -> Tensor:
    """How much likelier the trainer finds the sampled tokens than the sampler did, truncated; no gradient."""
    return (own_N - sampler_N.to(own_N.dtype)).exp().clamp(max=loss_config.importance_ratio_cap)


def cap_factor(kl_N: Tensor, cap: float | None) -> Tensor:
    """The weight that brings a row's loss down to ``cap`` nats: a factor, for a clamp would have no gradient."""
    if cap is None:
        return torch.ones_like(kl_N)
    return (cap / kl_N.abs()).clamp(max=1.0)


def bucket_kls(student: Outcomes, topk: TopK) -> tuple[Tensor, Tensor]:
    """Forward and reverse KL of the K + 1 outcomes, [N] each: the two metrics of every run, whatever its loss."""
    log_p, log_q = _teacher_log_masses(topk, student.tail_N.dtype), student.log_masses_NE()
    return _kl(log_p, log_q), _kl(log_q, log_p)


def entropy(outcomes: Outcomes) -> Tensor:
    """Entropy of the full distribution in nats, [N]: lse - E[logit], the tail entering by its mass and mean logit."""
    lse_N1 = outcomes.events_NE().logsumexp(dim=1, keepdim=True)
    means_NE = torch.cat([outcomes.logits_NK, outcomes.tail_mean_N.unsqueeze(1)], dim=1)
    distances_NE = (lse_N1 - means_NE).masked_fill(outcomes.events_NE() == _NEG_INF, 0.0)
    return (outcomes.log_masses_NE().exp() * distances_NE).sum(dim=1)


def _compared(student: Outcomes, topk: TopK, loss_config: LossConfig) -> tuple[Tensor, Tensor]:
    """Log-probs of teacher and student over the same events: K + 1 of them under ``bucket``, else K."""
    dtype = student.tail_N.dtype
    if loss_config.outside == "bucket":
        return _teacher_log_masses(topk, dtype), student.log_masses_NE()
    log_p_NK = torch.log_softmax(topk.logprobs_NK.to(dtype), dim=1)
    if loss_config.outside == "renormalize":
        return log_p_NK, torch.log_softmax(student.logits_NK, dim=1)
    return log_p_NK, student.log_masses_NE()[:, :-1]


def _teacher_log_masses(topk: TopK, dtype: torch.dtype) -> Tensor:
    return torch.cat([topk.logprobs_NK, topk.log_tail_N.unsqueeze(1)], dim=1).to(dtype)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of p (log p - log q) over the last axis; an event with p = 0 gives 0, in value and in gradient."""
    impossible = log_p == _NEG_INF  # not "<= -inf or NaN": a NaN has to show
    log_p, log_q = log_p.masked_fill(impossible, 0.0), log_q.masked_fill(impossible, 0.0)
    return (log_p.exp() * (log_p - log_q)).masked_fill(impossible, 0.0).sum(dim=-1)


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q over the last axis; always finite."""
    nowhere = (log_p == _NEG_INF) & (log_q == _NEG_INF)  # m is 0 too, and its log has no gradient
    log_p, log_q = log_p.masked_fill(nowhere, 0.0), log_q.masked_fill(nowhere, 0.0)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta)).masked_fill(nowhere, 0.0)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _reverse_on_floor(student: Outcomes) -> Tensor:
    """The tail's part of KL(student || teacher) where log p = -100: sum of q log q there, plus 100 times its mass."""
    lse_N = student.events_NE().logsumexp(dim=1)
    return (student.tail_N - lse_N).exp() * (student.tail_mean_N - lse_N - LOG_FLOOR)


def forward_share(loss_config: LossConfig) -> float:
    """The weight of the forward KL in the loss; the reverse KL has the rest."""
    return {"forward": 1.0, "reverse": 0.0, "mixed": loss_config.mixed_kl_weight}[loss_config.kl_type]


def _mark(ids_NK: Tensor, vocab: int) -> Tensor:
    """[N, V] bool: which columns are kept. Padding marks a column V that is cut off again."""
    marks = torch.zeros(ids_NK.shape[0], vocab + 1, dtype=torch.bool, device=ids_NK.device)
    columns_NK = ids_NK.long()
    return marks.scatter_(1, columns_NK.masked_fill(columns_NK < 0, vocab), True)[:, :vocab]
