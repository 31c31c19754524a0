"""Check loss_fn.token_weights: ranges of the factors, and settings with which they cannot be combined."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from distill.config.loss import TokenWeightsConfig
from distill.config.response_limits import largest_max_new_tokens
from distill.config.schema import Config
from distill.errors import UserError, show

_KEY = "loss_fn.token_weights"


def check_token_weights(config: Config) -> None:
    """Raise UserError for the first rule that loss_fn.token_weights breaks."""
    weights = config.loss_fn.token_weights
    _check_ranges(weights)
    _check_positions(config, weights)
    _check_select(config, weights)
    _check_prefix_importance(config, weights)


def _refuse(name: str, value: Any, problem: str, fix: str) -> NoReturn:
    raise UserError(f"{_KEY}.{name}={show(value)} {problem}", fix, key=f"{_KEY}.{name}", value=value)


def _check_ranges(weights: TokenWeightsConfig) -> None:
    """Raise UserError if a number is out of range; nan is never in range."""

    def require(name: str, value: float | None, holds: bool, fix: str) -> None:
        if value is not None and not holds:
            _refuse(name, value, "is out of range", fix)

    require("skip_first", weights.skip_first, weights.skip_first >= 0, "set it to at least 0")
    require("first", weights.first, (weights.first or 0) >= 1, "set it to at least 1, or to null for all tokens")
    require("position_slope", weights.position_slope, abs(weights.position_slope) <= 1, "set it between -1 and 1")
    gamma, prob = weights.prefix_importance, weights.min_teacher_prob
    require("prefix_importance", gamma, 0 <= gamma < math.inf, "set it to at least 0")
    require("min_teacher_prob", prob, 0 <= prob < 1, "set it to at least 0 and below 1")
    if (rise := weights.position_sigmoid) is not None:
        for name in ("w_min", "tau"):
            value = getattr(rise, name)
            require(f"position_sigmoid.{name}", value, 0 <= value <= 1, "set it between 0 and 1")
        require("position_sigmoid.s", rise.s, 0 < rise.s < math.inf, "set it above 0")
    if (select := weights.select) is not None:
        require("select.share", select.share, 0 < select.share <= 1, "set it above 0 and to at most 1")


def _check_positions(config: Config, weights: TokenWeightsConfig) -> None:
    """Raise UserError if no token of any response could have a weight."""
    if weights.first is not None and weights.first <= weights.skip_first:
        _refuse(
            "first",
            weights.first,
            f"leaves no token to train on after {_KEY}.skip_first={weights.skip_first}",
            f"set it above {weights.skip_first}",
        )
    longest = largest_max_new_tokens(config)
    if weights.skip_first >= longest:
        _refuse(
            "skip_first",
            weights.skip_first,
            f"leaves no token to train on, because responses have at most {longest} tokens"
            " (policy.generation.max_new_tokens, distillation.max_new_tokens_schedule)",
            f"set it below {longest}",
        )


def _check_select(config: Config, weights: TokenWeightsConfig) -> None:
    select = weights.select
    if select is not None and select.score in ("divergence", "soft_or") and config.loss_fn.kl_type == "sampled":
        _refuse(
            "select.score",
            select.score,
            "cannot be combined with loss_fn.kl_type=sampled, whose loss of a token may be negative",
            f"set {_KEY}.select.score to student_entropy or teacher_entropy, or choose another loss_fn.kl_type",
        )


def _check_prefix_importance(config: Config, weights: TokenWeightsConfig) -> None:
    if not weights.prefix_importance:
        return
    generation, temperature = config.policy.generation, config.loss_fn.temperature
    if temperature not in (None, generation.temperature):
        raise UserError(
            f"loss_fn.temperature={temperature} differs from policy.generation.temperature={generation.temperature},"
            f" but {_KEY}.prefix_importance compares log-probs of teacher and sampler at the same temperature",
            "remove loss_fn.temperature",
            key="loss_fn.temperature",
            value=temperature,
        )
    if generation.top_p < 1 or generation.top_k is not None:
        name, value = ("top_p", generation.top_p) if generation.top_p < 1 else ("top_k", generation.top_k)
        raise UserError(
            f"policy.generation.{name}={value} truncates the sampling distribution, so the sampler's log-probs cannot"
            f" be compared with the teacher's for {_KEY}.prefix_importance",
            f"set top_p=1 and top_k=null, or {_KEY}.prefix_importance=0",
            key=f"policy.generation.{name}",
            value=value,
        )
