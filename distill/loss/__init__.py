"""The distillation losses: one door. Plain twins in ``divergences``, the chunked head in ``head``."""

from __future__ import annotations

from distill.loss.backend import check_loss_backend
from distill.loss.divergences import Tokens, loss_temperature, topk_kl
from distill.loss.fused import VocabParallel, fused_linear_kl
from distill.loss.sampled import Sampled
from distill.loss.targets import teacher_topk

__all__ = [
    "Sampled",
    "Tokens",
    "VocabParallel",
    "check_loss_backend",
    "fused_linear_kl",
    "loss_temperature",
    "teacher_topk",
    "topk_kl",
]
