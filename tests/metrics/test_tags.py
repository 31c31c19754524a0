"""TensorBoard tags: in groups, and each number once."""

from __future__ import annotations

import math

from distill.metrics.tags import tensorboard_scalars, tensorboard_tag

GROUPS = {
    "train/loss": "learning/loss",
    "train/position/forward_kl_1": "position/forward_kl_1",
    "train/truncation_rate": "responses/truncation_rate",
    "train/partial/age_mean": "responses/partial/age_mean",
    "train/partial/older_token_share": "responses/partial/older_token_share",
    "train/context_distillation_trace_coverage": "context/trace_coverage",
    "train/tokens_per_sec_per_gpu": "throughput/tokens_per_sec_per_gpu",
    "timing/train/valid_tokens_per_sec_per_gpu": "throughput/valid_tokens_per_sec_per_gpu",
    "throughput/mfu": "throughput/mfu",
    "timing/train/generation": "seconds/generation",
    "timing/validation/judging": "seconds/validation/judging",
    "train/sync_changed_tensors": "sync/sync_changed_tensors",
    "train/engine_residual_gib": "memory/engine_residual_gib",
    "memory/peak_gib": "memory/peak_gib",
    "progress/epoch": "progress/epoch",
    "validation/accuracy": "validation/accuracy",
}


def test_each_metric_has_a_group() -> None:
    assert {name: tensorboard_tag(name) for name in GROUPS} == GROUPS


def test_no_number_is_shown_twice() -> None:
    twice = {
        "train/truncation_rate": 0.25,
        "train/natural_termination_rate": 0.75,
        "train/context_distillation_dropped_invalid_message": 0.0,
        "timing/train/validation": 2.5e-5,
        "timing/train/checkpointing": 3.0,
        "validation/accuracy": 0.5,
        "validation/gsm/accuracy": 0.5,
        "validation/in_context_accuracy": math.nan,
    }
    shown = {"responses/truncation_rate": 0.25, "seconds/checkpointing": 3.0, "validation/accuracy": 0.5}
    assert tensorboard_scalars(twice) == shown
    several = {"validation/accuracy": 0.5, "validation/gsm/accuracy": 0.25, "validation/aime/accuracy": 0.75}
    assert tensorboard_scalars(several) == several
