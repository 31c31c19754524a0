"""The loss over the complete vocabulary (``topk_logits_k: 0``): no top-k and no tail.

The plain twin is ``divergences.topk_kl`` at K = V. The pass holds four buffers of [C, V]: both models' logits and two
more. It writes every product into a buffer that is free at the time. ``FAST_GRADIENTS`` has hand-derived gradients in
place; any other divergence of ``DIVERGENCES`` falls back to autograd, with more memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.loss.divergences import (
    DIVERGENCES,
    Pair,
    Tokens,
    cap_factor,
    importance_ratio,
)
from distill.loss.metrics import RowMetrics
from distill.loss.topk_reduction import Scratch

BUFFERS = 4
"""[C, V] that a pass holds with a hand-derived gradient, or for ``kl_type: sampled``."""
AUTOGRAD_BUFFERS = 19
"""[C, V] that a pass holds if autograd computes the gradient; measured with the Jensen-Shannon divergence."""


@dataclass(frozen=True)
class FullRows:
    """A chunk's loss with its gradient and its metrics."""

    kl_C: Tensor
    """The loss of each row, not weighted."""
    gradient_CV: Tensor
    """Weighted gradient with respect to the student's logits over the temperature."""
    metrics: RowMetrics
    shift_C: Tensor
    """Student's largest logit."""
    lse_C: Tensor
    """Logsumexp of the student's logits, minus ``shift_C``."""


@dataclass(frozen=True)
class _Models:
    """Both models' distributions over the vocabulary; a gradient may overwrite every [C, V] buffer."""

    log_ratio_CV: Tensor
    """log p - log q: a difference of sums would lose digits that this one keeps."""
    q_CV: Tensor
    p_CV: Tensor
    spare_CV: Tensor
    forward_C: Tensor
    reverse_C: Tensor


def full_vocabulary(
    z_CV: Tensor,
    teacher_CV: Tensor,
    loss_config: LossConfig,
    factor_C: Tensor,
    tokens: Tokens | None,
    stop_ids: Tensor,
    scratch: Scratch,
) -> FullRows:
    """Return the loss of a chunk from both models' logits, already divided by the temperature; overwrites both.

    ``factor_C`` multiplies the gradient. Log-probs are finite here, so that the term of a p or q that underflows to 0
    is 0.
    """
    rows, dtype = len(z_CV), z_CV.dtype
    q_CV, p_CV = (
        scratch.get("spare", rows, dtype),
        scratch.get("second spare", rows, dtype),
    )
    top1_C1 = teacher_CV.argmax(dim=1, keepdim=True)
    agrees_C = z_CV.gather(1, top1_C1).squeeze(1) >= z_CV.amax(dim=1)
    _normalise(teacher_CV, p_CV)
    teacher_entropy_C = -_dot(p_CV, teacher_CV, q_CV)
    shift_C, lse_C = _normalise(z_CV, q_CV)
    student_entropy_C = -_dot(q_CV, z_CV, p_CV)
    torch.exp(teacher_CV, out=p_CV)
    own_C = None if tokens is None else _at(z_CV, tokens)
    by_autograd = None
    if loss_config.kl_type != "sampled" and loss_config.kl_type not in FAST_GRADIENTS:
        by_autograd = autograd_gradient(teacher_CV, z_CV, loss_config)
    log_ratio_CV = teacher_CV.sub_(z_CV)
    spare_CV = z_CV
    forward_C, reverse_C = (
        _dot(p_CV, log_ratio_CV, spare_CV),
        -_dot(q_CV, log_ratio_CV, spare_CV),
    )
    metrics = RowMetrics(
        forward_kl=forward_C,
        reverse_kl=reverse_C,
        teacher_topk_mass=p_CV.sum(dim=1),
        student_topk_mass=q_CV.sum(dim=1),
        student_entropy=student_entropy_C,
        top1_agreement=agrees_C,
        teacher_entropy=teacher_entropy_C,
        teacher_stop_mass=p_CV[:, stop_ids].sum(dim=1) if stop_ids.numel() else None,
    )
    models = _Models(log_ratio_CV, q_CV, p_CV, spare_CV, forward_C, reverse_C)
    if by_autograd is not None:
        value_C, gradient_CV = by_autograd
    elif loss_config.kl_type == "sampled":
        assert tokens is not None and own_C is not None, "fused_linear_kl refuses sampled without tokens"
        value_C, gradient_CV = _sampled(models, tokens, importance_ratio(own_C, tokens.logprobs_N, loss_config))
    else:
        value_C, gradient_CV = FAST_GRADIENTS[loss_config.kl_type](models, loss_config)
    kept_C = cap_factor(value_C, loss_config.token_kl_cap)
    return FullRows(
        value_C * kept_C,
        gradient_CV.mul_((factor_C * kept_C).unsqueeze(1)),
        metrics,
        shift_C,
        lse_C,
    )


def autograd_gradient(log_p_CV: Tensor, log_q_CV: Tensor, loss_config: LossConfig) -> tuple[Tensor, Tensor]:
    """Return value [C] and gradient [C, V] of any divergence by autograd: the plain twin of ``FAST_GRADIENTS``.

    The gradient is with respect to the student's logits. Leaves both arguments unchanged.
    """
    leaf_CV = log_q_CV.clone().requires_grad_()
    with torch.enable_grad():
        pair = Pair(log_p_CV, torch.log_softmax(leaf_CV, dim=1))
        value_C = DIVERGENCES[loss_config.kl_type](pair, loss_config)
        (gradient_CV,) = torch.autograd.grad(value_C.sum(), leaf_CV)
    return value_C.detach(), gradient_CV


def buffers_of(loss_config: LossConfig) -> int:
    """Return the number of [C, V] buffers that a pass over the complete vocabulary holds."""
    return BUFFERS if loss_config.kl_type == "sampled" or loss_config.kl_type in FAST_GRADIENTS else AUTOGRAD_BUFFERS


def _normalise(logits_CV: Tensor, mass_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits into log-probs in place, write probabilities to ``mass_CV``; return shift and logsumexp, [C] each."""
    shift_C1 = logits_CV.amax(dim=1, keepdim=True)
    logits_CV.sub_(shift_C1)
    lse_C1 = torch.exp(logits_CV, out=mass_CV).sum(dim=1, keepdim=True).log_()
    torch.exp(logits_CV.sub_(lse_C1), out=mass_CV)
    return shift_C1.squeeze(1), lse_C1.squeeze(1)


def _dot(a_CV: Tensor, b_CV: Tensor, spare_CV: Tensor) -> Tensor:
    """Inner products of the rows, [C]; overwrites ``spare_CV``, which may be one of the two."""
    return torch.mul(a_CV, b_CV, out=spare_CV).sum(dim=1)


def _at(log_CV: Tensor, tokens: Tokens) -> Tensor:
    """Values at the sampled tokens, [C]."""
    return log_CV.gather(1, tokens.ids_N.long().unsqueeze(1)).squeeze(1)


def _sampled(models: _Models, tokens: Tokens, ratio_C: Tensor) -> tuple[Tensor, Tensor]:
    """Policy gradient: cost = ratio (log q(y) - log p(y)), gradient = cost (one-hot(y) - q)."""
    value_C = -ratio_C * _at(models.log_ratio_CV, tokens)
    gradient_CV = models.q_CV.mul_(-value_C.unsqueeze(1))
    gradient_CV.scatter_add_(1, tokens.ids_N.long().unsqueeze(1), value_C.unsqueeze(1))
    return value_C, gradient_CV


def _kls(models: _Models, loss_config: LossConfig) -> tuple[Tensor, Tensor]:
    """Gradients: q - p of the forward KL, q (log q - log p - R) of the reverse KL R."""
    weight = {"forward": 1.0, "reverse": 0.0, "mixed": loss_config.mixed_kl_weight}[loss_config.kl_type]
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
    """Gradient: q (u - sum q u) with m = b p + (1 - b) q and u = (1 - b) (log q - log m)."""
    beta, log_ratio_CV, q_CV, p_CV = (
        loss_config.jsd_beta,
        models.log_ratio_CV,
        models.q_CV,
        models.p_CV,
    )
    above_CV = torch.add(log_ratio_CV, math.log(beta / (1 - beta)), out=models.spare_CV)
    torch.logaddexp(above_CV, above_CV.new_zeros(()), out=above_CV).add_(math.log1p(-beta))  # log m - log q
    teachers_C = _dot(p_CV, log_ratio_CV.sub_(above_CV), p_CV)
    own_C = _dot(q_CV, above_CV, p_CV)
    value_C = beta * teachers_C - (1 - beta) * own_C
    return value_C, above_CV.sub_(own_C.unsqueeze(1)).mul_(q_CV).mul_(beta - 1)


FAST_GRADIENTS: Mapping[str, Callable[[_Models, LossConfig], tuple[Tensor, Tensor]]] = {
    "forward": _kls,
    "reverse": _kls,
    "mixed": _kls,
    "jsd": _jsd,
}
"""Hand-derived value [C] and gradient [C, V] by ``loss_fn.kl_type``; each needs no buffer beyond ``_Models``."""
