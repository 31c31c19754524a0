"""Statistics of responses: quantiles of their lengths, and the fraction that ends in a loop."""

from __future__ import annotations

from collections.abc import Sequence

from distill.types import Rollout

LOOP_TOKENS = 64
"""Number of tokens at the end of a response that are checked for a loop."""
_QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


def response_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return metrics of ``rollouts`` by name; empty without rollouts.

    - ``pN_gen_tokens_per_sample`` (N: 10, 50, 90): the length in tokens that N% of the responses do not exceed,
      interpolated linearly between the two nearest lengths.
    - ``repetition_rate``: fraction of responses that end in a loop, see ``ends_in_a_loop``.
    """
    if not rollouts:
        return {}
    lengths = sorted(len(rollout.response_ids) for rollout in rollouts)
    quantiles = {f"{name}_gen_tokens_per_sample": _quantile(lengths, q) for name, q in _QUANTILES.items()}
    return quantiles | {"repetition_rate": sum(map(ends_in_a_loop, rollouts)) / len(rollouts)}


def ends_in_a_loop(rollout: Rollout) -> bool:
    """Return whether the last ``LOOP_TOKENS`` tokens repeat a sequence of at most half as many tokens.

    The stop token is not counted. Shorter responses do not end in a loop. A loop of 32 tokens or less is thus repeated
    at least twice, a single token 64 times.
    """
    ids = rollout.response_ids[:-1] if rollout.finish == "stop" else rollout.response_ids
    end = ids[-LOOP_TOKENS:]
    return len(end) == LOOP_TOKENS and any(end[period:] == end[:-period] for period in range(1, LOOP_TOKENS // 2 + 1))


def _quantile(ordered: Sequence[int], q: float) -> float:
    index = q * (len(ordered) - 1)
    low = int(index)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (index - low) * (ordered[high] - ordered[low])
