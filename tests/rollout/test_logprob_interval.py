"""Log-probs for some responses only: which responses have them, and that rows without them count nowhere."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.batching.context_parallel import split
from distill.batching.plan import pack
from distill.config import LossConfig
from distill.loss import Sampled, fused_linear_kl
from distill.loss.divergences import importance_ratio
from distill.loss.metrics import StatsSum
from distill.metrics.step import Metrics
from distill.metrics.token_metrics import add_stats
from distill.rollout.factory import sampling_of, validation_sampling_of
from distill.rollout.requests import response_seed, wants_logprobs
from distill.types import Layout, TeacherRows
from tests.harness import config_for, fixed_rollouts
from tests.helpers import save_tiny_model
from tests.loss.test_fused import rows_and_head


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
    metrics = Metrics()
    add_stats(metrics, none.stats(), sampler=True)
    assert all(math.isnan(value) for value in metrics.reduce().values())
    add_stats(metrics, sums.stats(), sampler=True)
    add_stats(metrics, none.stats(), sampler=True)
    assert metrics.reduce() == {
        "sampler_logprob_diff": 0.375,
        "sampler_logprob_diff_max": 0.5,
        "student_logprob": -2.5,
    }


def test_a_missing_log_prob_makes_a_sampled_loss_nan(tmp_path: Path) -> None:
    """The run then fails with an error, because its loss is not finite."""
    folder = save_tiny_model(tmp_path / "m")
    loss = config_for(folder, folder, "distillation.allow_degenerate=true", "loss_fn.kl_type=sampled").loss_fn
    ratios = importance_ratio(torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, math.nan]), loss)
    assert ratios.isnan().tolist() == [False, True]


def test_tokens_of_older_weights_are_marked_and_do_not_count_in_the_comparison() -> None:
    """The log-probs of these tokens stay in the micro-batch: a loss of sampled tokens needs them."""
    one, other = fixed_rollouts(2)
    packed = pack([(0, one), (1, replace(other, older_tokens=3))])
    expected = [False] * len(one.response_ids) + [i < 3 for i in range(len(other.response_ids))]
    assert packed.older_N is not None and packed.older_N.tolist() == expected and packed.older_N.dtype == torch.bool
    assert not packed.sampled_logprobs_N.isnan().any()
    assert pack([(0, one), (1, other)]).older_N is None
    shards = [split([packed], Layout(0, 1, rank, 2, teacher_size=2)) for rank in range(2)]
    marked = [n for shard in shards if shard.older_N is not None for n in shard.sampled_N[shard.older_N].tolist()]
    assert sorted(marked) == sorted(other.response_ids[:3])


@pytest.mark.parametrize("kept_M", [None, torch.tensor([0, 1, 3, 4, 5])])
@pytest.mark.parametrize("kl_type", ["forward", "sampled"])
def test_older_tokens_change_only_the_comparison_of_log_probs(kl_type, kept_M) -> None:
    hidden, head, t_hidden, t_head = rows_and_head(6, 30, 8)
    weight_N = torch.tensor([1.0, 1, 0, 1, 1, 1], dtype=torch.float64)
    older_N = torch.tensor([True, False, True, True, False, False])
    found = {}
    for name, mask_N in (("without", None), ("with", older_N), ("all", torch.ones(6, dtype=torch.bool))):
        sampled = Sampled(torch.arange(6), torch.linspace(-3, -2, 6, dtype=torch.float64), 1.0, mask_N)
        values: dict[str, torch.Tensor] = {}
        loss = LossConfig(kl_type, outside_topk=None)
        targets = TeacherRows(t_hidden, t_head)
        output = fused_linear_kl(
            hidden,
            head,
            targets,
            loss,
            weight_N,
            sampled,
            chunk_rows=2,
            topk_logits_k=6,
            row_values=values,
            kept_M=kept_M,
        )
        found[name] = output, values
    plain, masked, nothing = (found[name][0] for name in ("without", "with", "all"))
    assert torch.equal(plain.kl_sum, masked.kl_sum) and torch.equal(plain.kl_sum, nothing.kl_sum)
    of_rows = found["without"][1]["sampler_logprob_diff"][[1, 3, 4]]  # rows 1, 4 and 5 of those with a weight
    assert float(masked.stats["sampler_logprob_diff"][0]) == pytest.approx(float(of_rows.sum()), rel=1e-12)
    assert float(masked.stats["sampler_logprob_diff"][1]) == 3
    assert float(masked.stats["sampler_logprob_diff_max"][0]) == pytest.approx(float(of_rows.max()), rel=1e-12)
    assert float(nothing.stats["sampler_logprob_diff"][1]) == 0
    assert torch.equal(found["with"][1]["student_logprob"], found["without"][1]["student_logprob"])
