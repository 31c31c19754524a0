"""Weights from positions: hand-worked values, and packing that ends after the last token with a weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.batching.plan import PackingConfig, pack, pack_teacher, plan
from distill.batching.position_weights import loss_divisor, position_weights, row_weights, tokens_read
from distill.config import PositionSigmoidConfig, SelectConfig, TokenWeightsConfig
from distill.inputs import packing_of
from distill.types import Layout, Problem, Prompt, Rollout
from tests.harness import config_for
from tests.helpers import tiny_config

PW_OPSD = PositionSigmoidConfig(w_min=0.25, tau=0.3, s=0.1)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (TokenWeightsConfig(), [1, 1, 1, 1]),
        (TokenWeightsConfig(skip_first=1, first=3), [0, 1, 1, 0]),
        (TokenWeightsConfig(skip_first=9), [0, 0, 0, 0]),
        (TokenWeightsConfig(position_slope=0.5), [0.625, 0.875, 1.125, 1.375]),  # f is 1/8, 3/8, 5/8, 7/8
        (TokenWeightsConfig(position_slope=-1), [1.75, 1.25, 0.75, 0.25]),
        (TokenWeightsConfig(position_sigmoid=PW_OPSD), [0.361035, 0.759384, 0.972005, 0.997620]),
        (TokenWeightsConfig(position_slope=1, first=2), [0.25, 0.75, 0, 0]),  # f counts all tokens of the response
        (TokenWeightsConfig(position_slope=1, position_sigmoid=PW_OPSD), [0.090259, 0.569538, 1.215006, 1.745835]),
    ],
)
def test_position_weights_of_four_tokens(weights: TokenWeightsConfig, expected: list[float]) -> None:
    assert position_weights(weights, 4) == pytest.approx(expected, abs=2e-6)


def test_a_steep_sigmoid_is_a_step() -> None:
    weights = TokenWeightsConfig(position_sigmoid=PositionSigmoidConfig(w_min=0.0, tau=0.5, s=1e-9))
    assert position_weights(weights, 4).tolist() == [0, 0, 1, 1]


def test_rows_end_after_the_last_token_with_a_weight() -> None:
    assert row_weights(TokenWeightsConfig(skip_first=1, first=3), 8).tolist() == [0, 1, 1]
    assert row_weights(None, 3).tolist() == row_weights(TokenWeightsConfig(), 3).tolist() == [1, 1, 1]
    assert tokens_read(TokenWeightsConfig(skip_first=3), 3) == 0


@pytest.mark.parametrize(
    ("normalize", "divisor"), [("tokens", 10 + 4 + 2), ("weights", 3 + 2 + 0), ("sequences", 1 + 1 + 0)]
)
def test_the_divisor_counts_tokens_weights_or_responses(normalize, divisor) -> None:
    """Of 10, 4 and 2 tokens, tokens 3 to 5 have a weight."""
    weights = TokenWeightsConfig(skip_first=2, first=5, normalize=normalize)
    assert loss_divisor(weights, [10, 4, 2]) == divisor
    assert loss_divisor(weights, [2, 1]) == 0, "no token has a weight"


def test_sequences_divide_the_weights_of_a_response_by_their_sum() -> None:
    weights = TokenWeightsConfig(position_slope=1, normalize="sequences")
    assert row_weights(weights, 2).tolist() == [0.25, 0.75]
    selecting = TokenWeightsConfig(position_slope=1, normalize="sequences", select=SelectConfig())
    assert row_weights(selecting, 2).tolist() == [0.5, 1.5], "the sum is not known before the forward"


def _rollouts(lengths: list[int]) -> list[Rollout]:
    prompts = [Prompt(i % 2, (1 + i % 2,) * 3, Problem("p")) for i in range(len(lengths))]
    return [
        Rollout(prompt, i, tuple(range(10, 10 + n)), (-1.0,) * n, "stop", 0, (4 + i % 2,) * 5, off_policy=i == 1)
        for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True))
    ]


def test_both_views_end_at_the_last_row_with_a_weight() -> None:
    made = _rollouts([6, 2])
    packed = pack(list(enumerate(made)), weights=TokenWeightsConfig(skip_first=1, first=4))
    assert packed.student.bounds == (0, 3 + 3, 3 + 3 + 3 + 1) and packed.teacher.bounds == (0, 5 + 3, 5 + 3 + 5 + 1)
    assert packed.sampled_N.tolist() == [10, 11, 12, 13, 10, 11]
    assert packed.weight_N.tolist() == [0, 1, 1, 1, 0, 1]
    assert packed.token_N.tolist() == [0, 1, 2, 3, 0, 1] and packed.length_N.tolist() == [6] * 4 + [2] * 2
    assert packed.off_policy_N is not None and packed.off_policy_N.tolist() == [False] * 4 + [True] * 2
    assert packed.grid is None and pack([(0, made[0])]).off_policy_N is None
    theirs = pack_teacher(list(enumerate(made)), weights=TokenWeightsConfig(skip_first=1, first=4))
    assert torch.equal(theirs.teacher.tokens_T, packed.teacher.tokens_T)
    assert torch.equal(theirs.rollout_N, packed.rollout_N)


WEIGHTS = st.builds(
    TokenWeightsConfig,
    skip_first=st.integers(0, 6),
    first=st.one_of(st.none(), st.integers(7, 20)),
    position_slope=st.sampled_from([0.0, 0.5]),
    select=st.sampled_from([None, SelectConfig()]),
    normalize=st.sampled_from(["tokens", "weights", "sequences"]),
)
LAYOUTS = ((2, 1, 1, 1), (1, 2, 1, 2), (2, 2, 1, 4), (1, 2, 2, 4))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=10), WEIGHTS, st.sampled_from(LAYOUTS))
def test_every_layout_packs_each_token_with_a_weight_once(lengths, weights, sizes) -> None:
    made, (dp, cp, tp, teacher) = _rollouts(lengths), sizes
    config = PackingConfig(4, None, tokens=40, weights=weights)
    layouts = [
        Layout(d, dp, c, cp, t, tp, max(teacher, cp * tp)) for d in range(dp) for c in range(cp) for t in range(tp)
    ]
    by_rank = [plan(made, layout, config, seed=0, step=0) for layout in layouts]
    found: dict[tuple[int, int], float] = {}
    for layout, batches in zip(layouts, by_rank, strict=True):
        assert len(batches) == len(by_rank[0])
        for batch, of_first_rank in zip(batches, by_rank[0], strict=True):
            assert (batch.divisor, len(batch)) == (of_first_rank.divisor, len(of_first_rank))
            assert bool(batch.micro_batches) == bool(batch.divisor)
            for micro_batch in batch.micro_batches if layout.tp_rank == 0 else ():
                rows = zip(micro_batch.rollout_N, micro_batch.token_N, micro_batch.weight_N, strict=True)
                own = {(int(i), int(t)): float(w) for i, t, w in rows if i >= 0}
                assert not own.keys() & found.keys()
                found |= own
    expected = {
        (i, t): float(w)
        for i, n in enumerate(lengths)
        for t, w in enumerate(row_weights(weights, n).astype(np.float64))
    }
    assert found == expected
    total = sum(batch.divisor for batch in by_rank[0])
    if weights.normalize == "tokens":
        left_out = sum(batch.response_tokens for batch in by_rank[0] if not batch.divisor)
        assert total == sum(lengths) - left_out
    elif weights.normalize == "weights" or weights.select is None:
        assert total == pytest.approx(sum(expected.values()))


def test_the_token_budget_counts_only_tokens_that_are_read() -> None:
    made = _rollouts([35] * 4)
    for first, micro_batches in ((None, 4), (5, 1)):
        config = PackingConfig(4, None, tokens=40, weights=TokenWeightsConfig(first=first))
        (batch,) = plan(made, Layout(0, 1), config, seed=0, step=0)
        assert (len(batch), batch.response_tokens, batch.divisor) == (micro_batches, 140, 140)


def test_default_weights_of_a_recipe_leave_packing_unchanged(tmp_path) -> None:
    shape = tiny_config("llama", tied=True)
    assert packing_of(config_for(tmp_path / "a", tmp_path / "b"), shape).weights is None
    weighted = config_for(tmp_path / "a", tmp_path / "b", "loss_fn.token_weights.first=5")
    assert packing_of(weighted, shape).weights == TokenWeightsConfig(first=5)
