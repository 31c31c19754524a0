"""The loss over the whole vocabulary (``topk_logits_k: 0``): no top-k, no tail, and so no sort.

The twin is ``divergences.topk_kl`` at K = V. Both models' logits are here, [C, V] each, with two more buffers, and
nothing else of that size: a product that is summed up goes where a buffer is free at the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.loss.divergences import Tokens, cap_factor, forward_share, importance_ratio
from distill.loss.reduction import Scratch


@dataclass(frozen=True)
class FullRows:
    """A chunk's loss with its gradient and its metrics."""

    kl_C: Tensor
    gradient_CV: Tensor
    """Of kl with respect to the student's logits over the temperature; already weighted."""
    stats: dict[str, Tensor]
    shift_C: Tensor
    """The student's largest logit."""
    lse_C: Tensor
    """Its logsumexp, less ``shift_C``."""


def full_vocabulary(
    z_CV: Tensor,
    teacher_CV: Tensor,
    loss_config: LossConfig,
    factor_C: Tensor,
    tokens: Tokens | None,
    stop_ids: Tensor,
    scratch: Scratch,
) -> FullRows:
    """The loss of a chunk from both models' logits, already over the temperature; overwrites both.

    ``factor_C`` multiplies the gradient. Where p or q underflows to 0 its term is 0, for log-probs are finite here.
    """
    rows, dtype = len(z_CV), z_CV.dtype
    q_CV, p_CV = scratch.get("spare", rows, dtype), scratch.get("second spare", rows, dtype)
    favourite_C1 = teacher_CV.argmax(dim=1, keepdim=True)
    agrees_C = z_CV.gather(1, favourite_C1).squeeze(1) >= z_CV.amax(dim=1)
    _normalise(teacher_CV, p_CV)
    teacher_entropy_C = -_dot(p_CV, teacher_CV, q_CV)
    shift_C, lse_C = _normalise(z_CV, q_CV)
    student_entropy_C = -_dot(q_CV, z_CV, p_CV)
    torch.exp(teacher_CV, out=p_CV)
    own_C = None if tokens is None else _at(z_CV, tokens)
    apart_CV = teacher_CV.sub_(z_CV)  # log p - log q: a difference of sums would lose what this one keeps
    spare_CV = z_CV
    forward_C, reverse_C = _dot(p_CV, apart_CV, spare_CV), -_dot(q_CV, apart_CV, spare_CV)
    stats = {
        "forward_kl": forward_C,
        "reverse_kl": reverse_C,
        "teacher_topk_mass": p_CV.sum(dim=1),
        "student_topk_mass": q_CV.sum(dim=1),
        "student_entropy": student_entropy_C,
        "top1_agreement": agrees_C,
        "teacher_entropy": teacher_entropy_C,
    }
    if stop_ids.numel():
        stats["teacher_stop_mass"] = p_CV[:, stop_ids].sum(dim=1)
    match loss_config.kl_type:
        case "jsd":
            value_C, gradient_CV = _jsd(apart_CV, q_CV, p_CV, spare_CV, loss_config.jsd_beta)
        case "sampled":
            assert tokens is not None and own_C is not None  # the door refuses it
            value_C = -importance_ratio(own_C, tokens.logprobs_N, loss_config) * _at(apart_CV, tokens)
            gradient_CV = q_CV.mul_(-value_C.unsqueeze(1))
            gradient_CV.scatter_add_(1, tokens.ids_N.long().unsqueeze(1), value_C.unsqueeze(1))
        case _:
            value_C, gradient_CV = _kls(apart_CV, q_CV, p_CV, forward_C, reverse_C, forward_share(loss_config))
    kept_C = cap_factor(value_C, loss_config.token_kl_cap)
    return FullRows(value_C * kept_C, gradient_CV.mul_((factor_C * kept_C).unsqueeze(1)), stats, shift_C, lse_C)


def _normalise(logits_CV: Tensor, mass_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Logits to log-probs in place, their exponentials to ``mass_CV``; returns what was taken off, in two parts."""
    shift_C1 = logits_CV.amax(dim=1, keepdim=True)
    logits_CV.sub_(shift_C1)
    lse_C1 = torch.exp(logits_CV, out=mass_CV).sum(dim=1, keepdim=True).log_()
    torch.exp(logits_CV.sub_(lse_C1), out=mass_CV)
    return shift_C1.squeeze(1), lse_C1.squeeze(1)


def _dot(a_CV: Tensor, b_CV: Tensor, spare_CV: Tensor) -> Tensor:
    """[C]: the rows' inner products; ``spare_CV``, which may be one of the two, takes the products."""
    return torch.mul(a_CV, b_CV, out=spare_CV).sum(dim=1)


def _at(log_CV: Tensor, tokens: Tokens) -> Tensor:
    """[C]: what stands at the sampled tokens."""
    return log_CV.gather(1, tokens.ids_N.long().unsqueeze(1)).squeeze(1)


def _kls(
    apart_CV: Tensor, q_CV: Tensor, p_CV: Tensor, forward_C: Tensor, reverse_C: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """Value and gradient with respect to the logits: q - p of the forward KL, q (log q - log p - R) of the reverse."""
    value_C, gradient_CV = share * forward_C + (1 - share) * reverse_C, p_CV
    if share > 0:
        gradient_CV.neg_().add_(q_CV).mul_(share)
    else:
        gradient_CV.zero_()
    if share < 1:
        gradient_CV.addcmul_(q_CV, apart_CV.add_(reverse_C.unsqueeze(1)), value=share - 1)
    return value_C, gradient_CV


def _jsd(apart_CV: Tensor, q_CV: Tensor, p_CV: Tensor, spare_CV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """With m = b p + (1 - b) q and u = (1 - b) (log q - log m), the gradient is q (u - sum q u)."""
    above_CV = torch.add(apart_CV, math.log(beta / (1 - beta)), out=spare_CV)
    torch.logaddexp(above_CV, above_CV.new_zeros(()), out=above_CV).add_(math.log1p(-beta))  # log m - log q
    teachers_C = _dot(p_CV, apart_CV.sub_(above_CV), p_CV)
    own_C = _dot(q_CV, above_CV, p_CV)
    value_C = beta * teachers_C - (1 - beta) * own_C
    return value_C, above_CV.sub_(own_C.unsqueeze(1)).mul_(q_CV).mul_(beta - 1)
