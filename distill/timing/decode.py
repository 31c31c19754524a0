"""Time that one generation engine needs: for prompts, and for decode steps in which each response gains one token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.batching.flops import ModelFlops
from distill.timing.lengths import Tokens
from distill.timing.rates import Rates

ALL_REDUCE_S = 10e-6
"""Latency of one all-reduce of a few tokens within a node, in seconds; an assumption."""

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class DecodeCost:
    """Seconds of one decode step of an engine, as a function of the running responses and their tokens.

    With b running responses whose contexts (prompt and generated tokens) have C tokens in total, a step takes

        fixed + sequence * b + max(weights + context * C, flops_sequence * b + flops_context * C)

    The first term of the maximum is the time to read the weights and the key-value cache from memory, the second one
    is the time to compute. A prompt of n tokens takes prefill_token * n + prefill_pair * n^2 / 2 seconds.
    """

    fixed: float
    """Overhead of a step: launches, sampling and scheduler; with tensor parallelism also latencies."""
    sequence: float
    """Overhead of a step per running response."""
    weights: float
    """Time to read the weights once."""
    context: float
    """Time to read the keys and values of one token."""
    flops_sequence: float
    """Time to compute one token, without attention."""
    flops_context: float
    """Time to compute attention to one token."""
    prefill_token: float
    """Time to compute one token of a prompt, without attention and LM head."""
    prefill_pair: float
    """Time to compute attention for one pair of tokens of a prompt."""

    def step(self, running: Seconds | Tokens | float, tokens: Seconds | float) -> Seconds:
        """Return the seconds of one decode step; ``running``: b, ``tokens``: C. Arrays are computed elementwise."""
        read = self.weights + self.context * tokens
        computed = self.flops_sequence * running + self.flops_context * tokens
        return np.asarray(self.fixed + self.sequence * running + np.maximum(read, computed))

    def prefill(self, prompts: Tokens, before: Tokens | int = 0) -> float:
        """Return the seconds to compute prompts with these numbers of tokens, behind ``before`` cached tokens each."""
        pairs = prompts * (before + prompts / 2)
        return float(self.prefill_token * prompts.sum() + self.prefill_pair * pairs.sum())

    def decode(self, context: Tokens, new: Tokens) -> tuple[Tokens, Seconds]:
        """Return when each response of one engine ends, if all start together.

        ``context``: tokens of each response at the start; ``new``: tokens that are generated for it. The result is
        ``new`` in ascending order, and the seconds from the start until each of these numbers of steps is done.
        Between two ends the number of running responses is constant and the contexts grow by one token per step, so
        the mean step has the mean context.
        """
        order = np.argsort(new, kind="stable")
        ends, contexts = new[order], context[order]
        starts = np.concatenate(([0], ends[:-1]))
        running = np.arange(len(ends), 0, -1)
        tokens = contexts[::-1].cumsum()[::-1] + running * (starts + ends - 1) / 2
        return ends, np.cumsum((ends - starts) * self.step(running, tokens))

    def seconds(self, context: Tokens, new: Tokens) -> float:
        """Return the seconds until the last response of one engine ends; 0 without responses."""
        return float(self.decode(context, new)[1][-1]) if len(new) else 0.0

    def formula(self) -> str:
        """Return the formula with its numbers, in milliseconds, for tables."""
        ms = {name: 1e3 * value for name, value in vars(self).items()}
        return (
            f"seconds of a decode step with b running responses and C tokens of context = 1e-3 * ({ms['fixed']:.3g} +"
            f" {ms['sequence']:.3g} b + max({ms['weights']:.3g} + {ms['context']:.3g} C, {ms['flops_sequence']:.3g} b"
            f" + {ms['flops_context']:.3g} C)); of a prompt of n tokens = 1e-3 * ({ms['prefill_token']:.3g} n +"
            f" {ms['prefill_pair']:.3g} n^2 / 2)"
        )


def decode_cost(flops: ModelFlops, parameters: int, rates: Rates, itemsize: int, tp: int = 1) -> DecodeCost:
    """Return the cost of an engine of ``tp`` ranks.

    ``parameters``: number of parameters that a decode step reads, those of a separate input embedding excluded;
    ``itemsize``: bytes per parameter and per element of the key-value cache. With more ranks than key-value heads, the
    heads are repeated. Each layer has two all-reduces of the hidden states.
    """
    heads = flops.kv_heads / min(tp, flops.kv_heads)
    pair = flops.layers * flops.pair_flops / tp
    exchanged = 2 * flops.layers * flops.hidden * itemsize * 2 * (tp - 1) / tp / rates.link
    return DecodeCost(
        fixed=rates.step_overhead + (2 * flops.layers * ALL_REDUCE_S if tp > 1 else 0.0),
        sequence=rates.sequence_overhead + exchanged,
        weights=itemsize * parameters / tp / rates.memory,
        context=2 * itemsize * flops.layers * heads * flops.head_dim / rates.memory,
        flops_sequence=(flops.token_flops + flops.head_flops) / tp / rates.matmul,
        flops_context=pair / rates.attention_forward,
        prefill_token=flops.token_flops / tp / rates.matmul + exchanged,
        prefill_pair=pair / rates.attention_forward,
    )
