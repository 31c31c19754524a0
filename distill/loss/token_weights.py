"""Weights of response tokens that depend on outputs of the models: select, prefix_importance, min_teacher_prob.

The function works on a matrix with one row per response and one column per token, so the weights of a response depend
on this response alone and are the same for every layout. Weights that follow from positions alone are in
``distill.batching.position_weights``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.config import LossConfig, SelectConfig, TokenWeightsConfig

_TIE = 1e-9
"""Subtracted from share * n before it is rounded up, because the product of 0.07 and 100 is 7.000000000000001."""
_SCORES = {
    "student_entropy": ("student_entropy",),
    "teacher_entropy": ("teacher_entropy",),
    "divergence": ("loss",),
    "soft_or": ("student_entropy", "loss"),
}
"""Maps each value of ``select.score`` to the row values of ``fused_linear_kl`` that it needs."""


@dataclass(frozen=True)
class ResponseRows:
    """B responses of at most R tokens, as matrices [B, R]; cells after the end of a response are False or 0."""

    read_BR: Tensor
    """bool: whether the cell is a token that the models read."""
    weight_BR: Tensor
    """float64: weight of the token from its position."""
    off_policy_BR: Tensor
    """bool: whether the response comes from the dataset."""
    sampler_logprob_BR: Tensor
    """float64: the sampler's log-prob of the token, at the sampling temperature; any value in off-policy responses."""
    values: Mapping[str, Tensor]
    """float64 [B, R] each: the row values of ``needed_values``, by name."""


def needed_values(weights: TokenWeightsConfig) -> tuple[str, ...]:
    """Return the names of the row values of ``fused_linear_kl`` on which the weights depend, without repetitions."""
    selected = () if weights.select is None else _SCORES[weights.select.score]
    return (*selected, *(("teacher_logprob",) if weights.reads_sampled_token else ()))


def needs_score_pass(loss: LossConfig, topk_logits_k: int) -> bool:
    """Return whether the weights need a pass of the student's LM head before the loss.

    If the teacher computes its top-k, its entropy and its log-probs of the sampled tokens are known without this pass.
    """
    names = set(needed_values(loss.token_weights))
    has_topk = loss.support == "teacher" and topk_logits_k > 0
    return bool(names - {"teacher_entropy", "teacher_logprob"} if has_topk else names)


def token_weights(weights: TokenWeightsConfig, rows: ResponseRows) -> Tensor:
    """Return the final weight of each token of complete responses, float64 [B, R], without gradient.

    It is the position weight, multiplied by the factors of ``select``, ``prefix_importance`` and ``min_teacher_prob``.
    With ``normalize: sequences`` the weights of a response are divided by their sum. The weight of a token is nan if a
    value on which it depends is nan. Then the loss is nan, and the run ends with an error; a comparison with nan is
    false, so the token would otherwise be omitted silently.
    """
    weight_BR = rows.weight_BR
    nan_BR = torch.zeros_like(weight_BR, dtype=torch.bool)
    for name in needed_values(weights):
        nan_BR |= rows.values[name].isnan() & (weight_BR != 0)
    if weights.select is not None:
        weight_BR = weight_BR * selected(weights.select, rows)
    if weights.prefix_importance:
        weight_BR = weight_BR * prefix_importance(weights.prefix_importance, rows)
    if weights.min_teacher_prob:
        weight_BR = weight_BR * (rows.values["teacher_logprob"].exp() >= weights.min_teacher_prob)
    weight_BR = weight_BR.masked_fill(nan_BR, torch.nan)
    if weights.normalize == "sequences":
        sum_B1 = weight_BR.sum(dim=1, keepdim=True)
        weight_BR = torch.where(sum_B1 == 0, 0.0, weight_BR / sum_B1)
    return weight_BR


def selected(select: SelectConfig, rows: ResponseRows) -> Tensor:
    """Return whether each token is among the highest scores of its response, bool [B, R].

    Of n tokens with a position weight, ceil(share * n) are selected; of equal scores the earlier ones.
    """
    eligible_BR = rows.weight_BR != 0
    score_BR = _scores(select.score, rows, eligible_BR).masked_fill(~eligible_BR, -torch.inf)
    order_BR = score_BR.argsort(dim=1, descending=True, stable=True)
    rank_BR = order_BR.argsort(dim=1)
    count_B1 = (eligible_BR.sum(dim=1, keepdim=True).double() * select.share - _TIE).ceil()
    return eligible_BR & (rank_BR < count_B1)


def _scores(score: str, rows: ResponseRows, eligible_BR: Tensor) -> Tensor:
    names = _SCORES[score]
    if score != "soft_or":
        return rows.values[names[0]]
    h_BR, d_BR = (_scaled(rows.values[name], eligible_BR) for name in names)
    return 1 - (1 - h_BR) * (1 - d_BR)  # h + d - h d; exactly 1 if one of them is 1, so equal scores stay equal


def _scaled(score_BR: Tensor, eligible_BR: Tensor) -> Tensor:
    """Scale the scores of the eligible tokens of each response to 0..1; to 0 if all are equal."""
    low_B1 = score_BR.masked_fill(~eligible_BR, torch.inf).amin(dim=1, keepdim=True)
    high_B1 = score_BR.masked_fill(~eligible_BR, -torch.inf).amax(dim=1, keepdim=True)
    return torch.where(high_B1 > low_B1, (score_BR - low_B1) / (high_B1 - low_B1), 0.0)


def prefix_importance(gamma: float, rows: ResponseRows) -> Tensor:
    """Return 1 + gamma (1 - sum over k < t of |A_k| / sum over all k of |A_k|) for each token t, float64 [B, R].

    A_k is the teacher's log-prob of token k minus the sampler's; the sums are over the tokens that the models read. The
    ratio is 0 if all A_k are 0. The factor is 1 in off-policy responses.
    """
    known_BR = rows.read_BR & ~rows.off_policy_BR
    size_BR = (rows.values["teacher_logprob"] - rows.sampler_logprob_BR).abs().masked_fill(~known_BR, 0.0)
    before_BR = size_BR.cumsum(dim=1) - size_BR
    total_B1 = size_BR.sum(dim=1, keepdim=True)
    ratio_BR = torch.where(total_B1 == 0, 0.0, before_BR / total_B1)
    return torch.where(known_BR, 1 + gamma * (1 - ratio_BR), 1.0)
