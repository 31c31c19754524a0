"""Result of the comparison of student and teacher at the tokens of a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distill.types import Rollout

Likely = tuple[tuple[int, float], ...]
"""Pairs (token id, probability), most probable first."""


@dataclass(frozen=True)
class TopTokens:
    """The most likely tokens of both models at one token of a response, at the loss's temperature."""

    at: int
    """Index of the token in the response, from 0."""
    student: Likely
    teacher: Likely
    """Fewer tokens than the student's if the teacher's top-k (``distillation.topk_logits_k``) has fewer."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of student and teacher at the R tokens of one response."""

    forward_kl_R: Tensor
    """float32 [R]: KL(teacher || student) in nats, in host memory."""
    reverse_kl_R: Tensor
    """float32 [R]: KL(student || teacher) in nats, in host memory."""
    top_tokens: tuple[TopTokens, ...]
    """The most likely tokens at the tokens of highest KL, ordered by ``at``."""
    topk_overlap_R: Tensor | None = None
    """float32 [R]: fraction of the most likely tokens that both models have in common; None if not computed."""


class Compare(Protocol):
    """Collective function that compares student and teacher at each token of rollouts."""

    def __call__(self, rollouts: Sequence[Rollout], step: int, /, *, overlap: bool = False) -> list[Comparison]:
        """Return the comparison of each rollout; ``overlap``: also compute the overlap of the top-k."""
        ...
