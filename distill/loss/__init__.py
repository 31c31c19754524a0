"""The distillation losses: one door. Plain twins in ``divergences``, the chunked head in ``head``."""

from __future__ import annotations

from distill.loss.divergences import loss_temperature, topk_kl
from distill.loss.head import Sampled, fused_linear_kl, teacher_topk

__all__ = ["Sampled", "fused_linear_kl", "loss_temperature", "teacher_topk", "topk_kl"]
