"""Maximum number of tokens of a training response at each step: max_new_tokens and its schedule."""

from __future__ import annotations

from distill.config.schema import Config


def max_new_tokens_at(config: Config, step: int) -> int:
    """Return the maximum number of tokens of a response in training step ``step``; the first step is 1."""
    given = config.policy.generation.max_new_tokens
    reached = [tokens for first, tokens in config.distillation.max_new_tokens_schedule if first <= step]
    return reached[-1] if reached else given


def largest_max_new_tokens(config: Config) -> int:
    """Return the largest ``max_new_tokens_at`` of all steps up to distillation.max_num_steps."""
    loop = config.distillation
    starts = [1, *(first for first, _ in loop.max_new_tokens_schedule if first <= loop.max_num_steps)]
    return max(max_new_tokens_at(config, step) for step in starts)
