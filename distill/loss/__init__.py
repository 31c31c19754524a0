"""Distillation losses between the next-token distributions of student and teacher.

``fused_linear_kl`` computes the loss from hidden states, including the LM head, in chunks of response tokens.
``topk_kl`` computes the same loss from logits in plain PyTorch.
"""

from __future__ import annotations

from distill.loss.columns import VocabParallel
from distill.loss.divergences import Tokens, loss_temperature, topk_kl
from distill.loss.fused import fused_linear_kl
from distill.loss.metrics import Sampled
from distill.loss.row_groups import OffPolicyRows
from distill.loss.targets import teacher_topk
from distill.loss.top_tokens import LikelyTokens, likely_tokens
from distill.loss.topk_reduction import check_loss_backend

__all__ = [
    "LikelyTokens",
    "OffPolicyRows",
    "Sampled",
    "Tokens",
    "VocabParallel",
    "check_loss_backend",
    "fused_linear_kl",
    "likely_tokens",
    "loss_temperature",
    "teacher_topk",
    "topk_kl",
]
