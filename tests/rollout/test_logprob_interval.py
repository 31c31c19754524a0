"""Log-probs for some responses only: which responses have them, and that rows without them count nowhere."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.batching.plan import pack
from distill.loss.divergences import importance_ratio
from distill.loss.metrics import StatsSum
from distill.rollout.engine import response_seed, wants_logprobs
from distill.rollout.factory import sampling_of, validation_sampling_of
from tests.harness import config_for, fixed_rollouts
from tests.helpers import save_tiny_model


@pytest.mark.parametrize(
    ("prompts", "responses", "kl_type", "interval"),
    [
        (512, 2, "mixed", 16),
        (4096, 4, "mixed", 16),
        (128, 4, "mixed", 8),
        (64, 1, "mixed", 1),
        (8, 2, "mixed", 1),
        (512, 2, "sampled", 1),
    ],
)
def test_the_loss_and_the_number_of_responses_select_the_interval(
    tmp_path: Path, prompts: int, responses: int, kl_type: str, interval: int
) -> None:
    folder = save_tiny_model(tmp_path / "m")
    config = config_for(
        folder,
        folder,
        "distillation.allow_degenerate=true",
        f"distillation.num_prompts_per_step={prompts}",
        f"distillation.num_generations_per_prompt={responses}",
        f"policy.train_global_batch_size={prompts * responses}",
        f"loss_fn.kl_type={kl_type}",
    )
    assert sampling_of(config, ()).logprob_interval == interval
    assert validation_sampling_of(config, ()).logprob_interval == interval


def test_a_fraction_of_the_responses_has_log_probs(sampling) -> None:
    chosen = [wants_logprobs(sampling, response_seed(1, step, 7, g)) for step in range(20) for g in range(100)]
    assert sum(chosen) == pytest.approx(2000 / 16, rel=0.3)
    assert all(wants_logprobs(replace(sampling, logprob_interval=1), seed) for seed in range(10))


@pytest.fixture
def sampling(tmp_path: Path):
    folder = save_tiny_model(tmp_path / "m")
    config = config_for(folder, folder, "distillation.allow_degenerate=true")
    return replace(sampling_of(config, ()), logprob_interval=16)


def test_rows_without_log_probs_are_nan_in_a_micro_batch() -> None:
    one, other = fixed_rollouts(2)
    packed = pack([(0, one), (1, replace(other, logprobs=()))]).sampled_logprobs_N
    known = len(one.response_ids)
    assert packed[:known].tolist() == pytest.approx(one.logprobs)
    assert len(packed) == known + len(other.response_ids) and packed[known:].isnan().all()
    with pytest.raises(AssertionError):
        replace(other, logprobs=other.logprobs[:1])


def test_the_sampler_metrics_count_only_rows_with_log_probs() -> None:
    sums = StatsSum()
    sums.add({"sampler_logprob_diff": torch.tensor([0.5, math.nan]), "student_logprob": torch.tensor([-1.0, -2.0])})
    sums.add({"sampler_logprob_diff": torch.tensor([math.nan, 0.25]), "student_logprob": torch.tensor([-3.0, -4.0])})
    found = {name: (float(first), float(second)) for name, (first, second) in sums.stats().items()}
    assert found == {
        "sampler_logprob_diff": (0.75, 2.0),
        "sampler_logprob_diff_max": (0.5, 1.0),
        "student_logprob": (-10.0, 4.0),
    }
    none = StatsSum()
    none.add({"sampler_logprob_diff": torch.full((3,), math.nan)})
    assert all(float(second) == 0 for _, second in none.stats().values())


def test_a_missing_log_prob_makes_a_sampled_loss_nan(tmp_path: Path) -> None:
    """The run then fails with an error, because its loss is not finite."""
    folder = save_tiny_model(tmp_path / "m")
    loss = config_for(folder, folder, "distillation.allow_degenerate=true", "loss_fn.kl_type=sampled").loss_fn
    ratios = importance_ratio(torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, math.nan]), loss)
    assert ratios.isnan().tolist() == [False, True]
