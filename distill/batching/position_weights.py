"""Weights of response tokens that follow from their positions: skip_first, first, position_slope, position_sigmoid.

They are known before packing, so a model reads a response only up to its last token with a weight. A later token has no
influence, because the models are causal. All functions are pure. ``weights`` is ``loss_fn.token_weights``; None means
that each token has the weight 1.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from distill.config import TokenWeightsConfig


def position_weights(weights: TokenWeightsConfig, length: int) -> NDArray[np.float64]:
    """Return the product of the factors that depend on the position only, for a response of ``length`` tokens: [R]."""
    f_R = (np.arange(length) + 0.5) / length
    weight_R = 1 + weights.position_slope * (2 * f_R - 1)
    if (rise := weights.position_sigmoid) is not None:
        sigmoid_R = (1 + np.tanh((f_R - rise.tau) / (2 * rise.s))) / 2  # this form cannot overflow
        weight_R *= rise.w_min + (1 - rise.w_min) * sigmoid_R
    weight_R[: weights.skip_first] = 0
    weight_R[length if weights.first is None else weights.first :] = 0
    return weight_R


def row_weights(weights: TokenWeightsConfig | None, length: int) -> NDArray[np.float32]:
    """Return the weights of the tokens that the models read: those up to the last token with a weight, [n].

    ``length``: number of tokens of the response. n is 0 if no token has a weight. With ``normalize: sequences`` the
    weights are divided by their sum, unless further factors depend on the models.
    """
    if weights is None:
        return np.ones(length, np.float32)
    weight_R = position_weights(weights, length).astype(np.float32)
    weight_R = np.trim_zeros(weight_R, "b")
    if weights.normalize == "sequences" and not weights.depends_on_models and len(weight_R):
        weight_R /= weight_R.sum(dtype=np.float64)
    return weight_R


def tokens_read(weights: TokenWeightsConfig | None, length: int) -> int:
    """Return the number of rows of a response of ``length`` tokens: those up to the last token with a weight."""
    return length if weights is None else len(row_weights(weights, length))


def loss_divisor(weights: TokenWeightsConfig | None, lengths: Iterable[int]) -> float:
    """Return the divisor of the summed loss of an optimizer batch that is known before the forward.

    ``lengths``: number of tokens of each response of the optimizer batch. The divisor is 0 if no token has a weight.
    If the weights also depend on the models, it is the divisor for the position weights alone. With ``normalize:
    sequences``, it is the number of responses with a weight.
    """
    lengths = list(lengths)
    if weights is None:
        return float(sum(lengths))
    sums = {length: float(row_weights(weights, length).sum(dtype=np.float64)) for length in set(lengths)}
    if weights.normalize == "weights" or not any(sums.values()):
        return sum(sums[length] for length in lengths)
    if weights.normalize == "tokens":
        return float(sum(lengths))
    return float(sum(sums[length] > 0 for length in lengths))
