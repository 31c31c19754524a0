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


def expected_length(config: Config) -> tuple[float, float]:
    """Return the expected median and 90th percentile of the lengths of training responses, in tokens.

    Default of the median: a quarter of ``largest_max_new_tokens``, which includes distillation.max_new_tokens_schedule,
    and at most the given 90th percentile. Default of the 90th percentile: three times the median.
    """
    given = config.policy.generation.expected_length
    median, p90 = given.median, given.p90
    if median is None:
        default = max(1, largest_max_new_tokens(config) // 4)
        median = default if p90 is None else min(default, p90)
    return median, 3 * median if p90 is None else p90
