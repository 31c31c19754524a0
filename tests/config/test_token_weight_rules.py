"""loss_fn.token_weights: values that cannot be meant are refused with their key."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from distill.config import Config, GenerationConfig, LossConfig, PositionSigmoidConfig, SelectConfig, TokenWeightsConfig
from distill.config.token_weight_rules import check_token_weights
from distill.errors import UserError

W = "loss_fn.token_weights"
BASE = Config()


def _check(weights: TokenWeightsConfig, *, schedule: Any = (), loss: Any = None, **generation: Any) -> None:
    settings = {"temperature": 1.0, "max_new_tokens": 64} | generation
    policy = replace(BASE.policy, generation=replace(GenerationConfig(), **settings))
    loop = replace(BASE.distillation, max_new_tokens_schedule=schedule)
    check_token_weights(
        replace(BASE, loss_fn=replace(loss or LossConfig(), token_weights=weights), policy=policy, distillation=loop)
    )


def _rise(**values: float) -> TokenWeightsConfig:
    return TokenWeightsConfig(position_sigmoid=replace(PositionSigmoidConfig(), **values))


@pytest.mark.parametrize(
    ("weights", "key"),
    [
        (TokenWeightsConfig(skip_first=-1), "skip_first"),
        (TokenWeightsConfig(first=0), "first"),
        (TokenWeightsConfig(first=-3), "first"),
        (TokenWeightsConfig(skip_first=4, first=4), "first"),
        (TokenWeightsConfig(skip_first=64), "skip_first"),
        (TokenWeightsConfig(position_slope=1.01), "position_slope"),
        (TokenWeightsConfig(position_slope=math.nan), "position_slope"),
        (_rise(w_min=-0.1), "position_sigmoid.w_min"),
        (_rise(w_min=math.nan), "position_sigmoid.w_min"),
        (_rise(tau=1.5), "position_sigmoid.tau"),
        (_rise(s=0.0), "position_sigmoid.s"),
        (_rise(s=math.inf), "position_sigmoid.s"),
        (TokenWeightsConfig(select=SelectConfig(share=0.0)), "select.share"),
        (TokenWeightsConfig(select=SelectConfig(share=1.5)), "select.share"),
        (TokenWeightsConfig(select=SelectConfig(share=math.nan)), "select.share"),
        (TokenWeightsConfig(prefix_importance=-0.5), "prefix_importance"),
        (TokenWeightsConfig(prefix_importance=math.inf), "prefix_importance"),
        (TokenWeightsConfig(prefix_importance=math.nan), "prefix_importance"),
        (TokenWeightsConfig(min_teacher_prob=-0.1), "min_teacher_prob"),
        (TokenWeightsConfig(min_teacher_prob=1.0), "min_teacher_prob"),
    ],
)
def test_a_token_weight_out_of_range_is_refused(weights: TokenWeightsConfig, key: str) -> None:
    with pytest.raises(UserError) as refused:
        _check(weights)
    assert refused.value.key == f"{W}.{key}"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"loss": LossConfig(temperature=0.5)}, "loss_fn.temperature"),
        ({"top_p": 0.9}, "policy.generation.top_p"),
        ({"top_k": 20}, "policy.generation.top_k"),
    ],
)
def test_prefix_importance_needs_the_samplers_log_probs_at_the_temperature_of_the_loss(settings: Any, key: str) -> None:
    with pytest.raises(UserError) as refused:
        _check(TokenWeightsConfig(prefix_importance=0.5), **settings)
    assert refused.value.key == key
    _check(TokenWeightsConfig(min_teacher_prob=0.5), **settings)


@pytest.mark.parametrize("score", ["divergence", "soft_or"])
def test_select_by_divergence_is_refused_for_the_loss_of_a_sampled_token(score: Any) -> None:
    weights = TokenWeightsConfig(select=SelectConfig(score))
    with pytest.raises(UserError) as refused:
        _check(weights, loss=LossConfig(kl_type="sampled"))
    assert refused.value.key == f"{W}.select.score"
    _check(weights, loss=LossConfig(kl_type="jsd"))


@pytest.mark.parametrize(
    "weights",
    [
        TokenWeightsConfig(skip_first=63, first=64, position_slope=-1, prefix_importance=0.5, min_teacher_prob=0.999),
        TokenWeightsConfig(position_slope=1, select=SelectConfig(share=1)),
        _rise(w_min=0, tau=0, s=1e-9),
        _rise(w_min=1, tau=1, s=5),
    ],
)
def test_bounds_of_token_weights_are_allowed(weights: TokenWeightsConfig) -> None:
    _check(weights, loss=LossConfig(temperature=1.0))


def test_skip_first_is_compared_with_the_longest_responses_of_the_run() -> None:
    _check(TokenWeightsConfig(skip_first=100), schedule=((1, 16), (50, 128)))
