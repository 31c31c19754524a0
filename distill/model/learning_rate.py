"""Learning-rate schedule of the student, from policy.scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def build_scheduler(optimizer: torch.optim.Optimizer, pieces: Sequence[Any]) -> torch.optim.lr_scheduler.LRScheduler:
    """Build the learning-rate schedule from the entries of ``policy.scheduler``.

    An entry with a ``name`` defines a scheduler of torch and its ``kwargs``; the schedulers run one after another. The
    entry without a ``name`` lists ``milestones``: the training steps at which the second, third, ... scheduler starts.
    Without schedulers the learning rate is constant.
    """
    named = [piece for piece in pieces if piece.name]
    if not named:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    milestones = [m for piece in pieces if not piece.name for m in piece.milestones]
    built = [
        getattr(torch.optim.lr_scheduler, piece.name.rpartition(".")[2])(optimizer, **piece.kwargs) for piece in named
    ]
    return built[0] if len(built) == 1 else torch.optim.lr_scheduler.SequentialLR(optimizer, built, milestones)
