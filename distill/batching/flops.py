"""FLOPs of a causal language model: for balancing the ranks, and for the model FLOPs utilization (MFU)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from distill.types import Rollout


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a causal language model whose layers all have the same shape."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int


def sizes_of(text: Any) -> dict[str, int]:
    """Return the fields of ModelSizes by name; ``text``: the Hugging Face configuration of the text model."""
    return {
        "hidden": text.hidden_size,
        "layers": text.num_hidden_layers,
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "intermediate": text.intermediate_size,
        "vocab": text.vocab_size,
    }


@dataclass(frozen=True)
class ModelFlops(ModelSizes):
    """Sizes of a model, from which its FLOPs are computed; one multiply-add counts as two FLOPs.

    - FLOPs per token in each layer: 2 * 2 * hidden * heads * head_dim for the query and output projections,
      2 * 2 * hidden * kv_heads * head_dim for keys and values, and 3 * 2 * hidden * intermediate for the gated MLP.
    - FLOPs per response token in the LM head: 2 * hidden * vocab.
    - FLOPs per pair of query and key in each layer: 2 * 2 * heads * head_dim for the score and the weighted value. A
      sequence of n tokens has n^2 / 2 pairs, and at most n * window pairs in a layer with sliding-window attention.
    """

    windowed: int = 0
    """Number of layers with sliding-window attention."""
    window: int = 0
    """Number of tokens in the window of these layers."""
    adapters: int = 0
    """FLOPs per token of low-rank adapters, which are trained in place of the weights; 0: the weights are trained."""

    @property
    def pair_flops(self) -> int:
        """Return the FLOPs per pair of query and key in one layer."""
        return 4 * self.heads * self.head_dim

    @property
    def token_flops(self) -> int:
        """Return the FLOPs per token in all layers, without the pairs of queries and keys."""
        attention = 4 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 6 * self.hidden * self.intermediate)

    @property
    def head_flops(self) -> int:
        """Return the FLOPs per token in the LM head."""
        return 2 * self.hidden * self.vocab

    @property
    def quadratic(self) -> float:
        """Return the factor q in the cost n + q n^2 of training on a sequence of n tokens.

        The cost is in units of the cost of one token. A sequence needs a * n + b * n^2 FLOPs, and q = b / a. Every
        token counts as a response token. A sliding-window layer counts n * window pairs. The backward has twice the
        FLOPs of the forward in both terms, without the gradients of frozen weights. Recomputation does not count.
        """
        full = self.layers - self.windowed
        linear = self.token_flops + self.head_flops + self.adapters - self._frozen_gradients(1, 1) / 3
        return full * self.pair_flops / 2 / (linear + self.windowed * self.pair_flops * self.window)

    def _frozen_gradients(self, tokens: float, scored: float) -> float:
        """Return the FLOPs of the gradients of frozen weights, which a backward omits; 0 if the weights are trained."""
        return self.token_flops * tokens + self.head_flops * scored if self.adapters else 0

    def forward(self, start: int, tokens: int, scored: int) -> float:
        """Return the FLOPs of the forward pass over ``tokens`` tokens that follow ``start`` tokens of a sequence.

        ``scored``: number of these tokens for which the LM head computes logits.
        """
        pairs = tokens * (start + tokens / 2)
        in_window = min(pairs, tokens * self.window)
        attention = self.pair_flops * ((self.layers - self.windowed) * pairs + self.windowed * in_window)
        return self.token_flops * tokens + self.head_flops * scored + attention

    def training(
        self,
        rollouts: Sequence[Rollout],
        share_prefixes: bool,
        read: Callable[[Rollout], int] | None = None,
        trained: float | None = None,
        scored: float = 0.0,
    ) -> float:
        """Return the FLOPs of forward and backward over the student's prompts and responses.

        The backward has twice the FLOPs of the forward, without the gradients of frozen weights.
        ``share_prefixes``: count a prompt once for all its responses. A prompt whose responses are in several
        micro-batches is computed more often, so the result is a lower bound. Recomputed activations do not count.
        ``read``: function that returns the number of tokens of a response that the student reads; None: all tokens.
        ``trained``: number of tokens with a weight in the loss; None: all tokens that are read. ``scored``: number of
        tokens that the LM head reads a second time, without a backward.
        """
        total, seen, tokens, head = 0.0, set(), 0, 0
        for rollout in rollouts:
            prompt = len(rollout.prompt.student_ids)
            response = len(rollout.response_ids) if read is None else read(rollout)
            if response and (not share_prefixes or rollout.prompt.student_ids not in seen):
                seen.add(rollout.prompt.student_ids)
                total += self.forward(0, prompt, 0)
                tokens += prompt
            total += self.forward(prompt, response, 0)
            tokens += response
            head += response
        rows = head if trained is None else trained
        forward = total + self.head_flops * rows + self.adapters * tokens
        return 3 * forward - self._frozen_gradients(tokens, rows) + self.head_flops * scored
