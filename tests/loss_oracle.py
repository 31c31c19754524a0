"""Oracle: the distillation losses by definition, on dense distributions; shares no code with ``distill.loss``."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.types import TopK

LOSSES = [
    LossConfig(kl_type=kl_type, mixed_kl_weight=0.3, outside_topk=outside)
    for kl_type in ("forward", "reverse", "mixed")
    for outside in ("bucket", "renormalize", "floor")
] + [LossConfig(kl_type="jsd", jsd_beta=0.3, outside_topk=outside) for outside in ("bucket", "renormalize")]
CLIPPED = [replace(config, entry_clip=0.05) for config in LOSSES]


class Case(NamedTuple):
    """Random logits of two models over V tokens, and the teacher's top-k."""

    student_NV: Tensor
    teacher_NV: Tensor
    topk: TopK


def make_case(rows: int, vocab: int, k: int, seed: int = 0, scale: float = 2.0, temperature: float = 1.0) -> Case:
    """Return float64 logits; the student is the teacher plus noise of the same scale."""
    generator = torch.Generator().manual_seed(seed)
    teacher_NV = scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    student_NV = teacher_NV + scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return Case(student_NV, teacher_NV, exact_topk(teacher_NV, k, temperature))


def exact_topk(teacher_NV: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """Return the k most likely tokens; the tail mass is a sum over the other tokens."""
    log_p_NV = torch.log_softmax(teacher_NV.double() / temperature, dim=1)
    order_NV = log_p_NV.argsort(dim=1, descending=True)
    sorted_NV = log_p_NV.gather(1, order_NV)
    entropy_N = -(log_p_NV.exp() * log_p_NV).sum(dim=1)
    tail_N = sorted_NV[:, k:].exp().sum(dim=1).log()
    return TopK(order_NV[:, :k].int(), sorted_NV[:, :k], tail_N, entropy_N)


def definition(
    student_NV: Tensor, teacher_NV: Tensor, ids_NK: Tensor, config: LossConfig, temperature: float
) -> Tensor:
    """Return kl_N of every loss, from the two dense distributions; ``config.entry_clip`` clips the K first terms."""
    terms_NE, k = _terms(student_NV, teacher_NV, ids_NK, config, temperature), ids_NK.shape[1]
    if config.entry_clip is None:
        return terms_NE.sum(dim=1)
    return terms_NE[:, :k].clamp(max=config.entry_clip).sum(dim=1) + terms_NE[:, k:].sum(dim=1)


def _terms(student_NV: Tensor, teacher_NV: Tensor, ids_NK: Tensor, config: LossConfig, temperature: float) -> Tensor:
    p_NV, q_NV = torch.softmax(teacher_NV / temperature, 1), torch.softmax(student_NV / temperature, 1)
    p_NK, q_NK = p_NV.gather(1, ids_NK.long()), q_NV.gather(1, ids_NK.long())
    if config.outside == "floor":
        forward_NE, reverse_NE = _on_floor(p_NK, q_NV, q_NK, ids_NK)
    else:
        p_NE, q_NE = (_events(full, kept, ids_NK, config.outside) for full, kept in ((p_NV, p_NK), (q_NV, q_NK)))
        if config.kl_type == "jsd":
            middle_NE = config.jsd_beta * p_NE + (1 - config.jsd_beta) * q_NE
            return config.jsd_beta * _kl(p_NE, middle_NE) + (1 - config.jsd_beta) * _kl(q_NE, middle_NE)
        forward_NE, reverse_NE = _kl(p_NE, q_NE), _kl(q_NE, p_NE)
    share = {"forward": 1.0, "reverse": 0.0, "mixed": config.mixed_kl_weight}[config.kl_type]
    return share * forward_NE + (1 - share) * reverse_NE


def reference_kl(
    student: Tensor, teacher: Tensor, ids: Tensor, kl_type: str, weight: float, zero_outside_topk: bool
) -> Tensor:
    """Return NeMo-RL's loss of each position; the vocabulary is the last axis, ``ids`` are the teacher's top-k.

    The teacher is renormalised over the ids; ``zero_outside_topk`` adds H_rest + 100 P_rest to the reverse KL.
    """
    log_t = torch.log_softmax(teacher.gather(-1, ids), dim=-1)
    log_all = torch.log_softmax(student, dim=-1)
    log_s = log_all.gather(-1, ids) if zero_outside_topk else torch.log_softmax(student.gather(-1, ids), dim=-1)
    p_s = log_s.exp()
    correction = torch.zeros_like(p_s[..., 0])
    if zero_outside_topk:
        h_rest = (log_all.exp() * log_all).sum(-1) - (p_s * log_s).sum(-1)
        correction = h_rest + 100 * (1 - p_s.sum(-1))
    forward = (log_t.exp() * (log_t - log_s)).sum(-1)
    reverse = (p_s * (log_s - log_t)).sum(-1)
    if kl_type == "forward":
        return forward
    if kl_type == "reverse":
        return reverse + correction
    return weight * forward + (1 - weight) * reverse + (1 - weight) * correction


def _events(full_NV: Tensor, kept_NK: Tensor, ids_NK: Tensor, outside: str) -> Tensor:
    if outside == "renormalize":
        return kept_NK / kept_NK.sum(dim=1, keepdim=True)
    tail_N1 = full_NV.scatter(1, ids_NK.long(), 0.0).sum(dim=1, keepdim=True)
    return torch.cat([kept_NK, tail_N1], dim=1) if ids_NK.shape[1] < full_NV.shape[1] else kept_NK


def _on_floor(p_NK: Tensor, q_NV: Tensor, q_NK: Tensor, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
    hat_NK = p_NK / p_NK.sum(dim=1, keepdim=True)
    log_p_NV = torch.full_like(q_NV, -100.0).scatter(1, ids_NK.long(), hat_NK.log())
    reverse_NV, ids_NK = q_NV * (q_NV.log() - log_p_NV), ids_NK.long()
    tail_N1 = reverse_NV.scatter(1, ids_NK, 0.0).sum(dim=1, keepdim=True)
    forward_NE = torch.cat([_kl(hat_NK, q_NK), torch.zeros_like(tail_N1)], dim=1)
    return forward_NE, torch.cat([reverse_NV.gather(1, ids_NK), tail_N1], dim=1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return p * (p.log() - q.log())
