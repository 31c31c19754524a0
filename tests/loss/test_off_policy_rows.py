"""Rows of responses from the dataset have their own divergence and metrics, and share the gradient buffers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.config import LossConfig
from distill.errors import UserError
from distill.loss import OffPolicyRows, Sampled, fused_linear_kl, teacher_topk, topk_kl
from distill.types import LossOutput, Targets, TeacherRows
from scripts.live_bytes import LiveBytes
from tests.loss.test_fused import assert_close, gradients, rows_and_head

ROWS = 9
WEIGHT_N = torch.tensor([1.0, 1, 0, 1, 0.5, 1, 0, 2, 1], dtype=torch.float64)
OFF_N = torch.tensor([False, True, True, False, True, False, False, True, False])
ON, OFF = LossConfig("reverse"), LossConfig("jsd", jsd_beta=0.3, token_kl_cap=0.2, entry_clip=0.1)
KEPT_OFF = torch.tensor([1, 4, 7])
CASES = [("teacher", 6, False), ("teacher", 6, True), ("student", 6, True), ("teacher", 0, True)]
"""``support``, K, and whether the targets are hidden rows."""


def run(support: Any, k: int, rows: bool, weight_N: Tensor, config: LossConfig, **options: Any) -> Any:
    """Return the output, the gradients and the values of the rows."""
    hidden, head, t_hidden, t_head = rows_and_head(ROWS, 30, 8)
    sampler_N = -torch.ones(ROWS, dtype=torch.float64)
    sampled = Sampled(torch.arange(ROWS), sampler_N.masked_fill(OFF_N, torch.nan), 1.0)
    targets: Targets = TeacherRows(t_hidden, t_head) if rows else teacher_topk(t_hidden, t_head, k, 1.0)
    values: dict[str, Tensor] = {}
    output, grads = gradients(
        lambda h, w: fused_linear_kl(
            h,
            w,
            targets,
            dataclasses.replace(config, support=support),
            weight_N,
            sampled,
            chunk_rows=2,
            topk_logits_k=k,
            row_values=values,
            **options,
        ),
        hidden,
        head,
    )
    return output, grads, values


def sums(output: LossOutput) -> dict[str, float]:
    """Return the sums by metric name, and the counts by ``NAME count``."""
    stats = output.stats.items()
    return {name: float(total) for name, (total, _) in stats} | {
        f"{name} count": float(count) for name, (_, count) in stats
    }


@pytest.mark.parametrize("rows_of", [OFF_N, KEPT_OFF], ids=["mask", "indices"])
@pytest.mark.parametrize("kept_M", [None, WEIGHT_N.nonzero().squeeze(1)], ids=["weights", "kept"])
@pytest.mark.parametrize(("support", "k", "rows"), CASES)
def test_off_policy_rows_have_the_loss_gradient_and_metrics_of_their_own_configuration(
    support: Any, k: int, rows: bool, kept_M: Any, rows_of: Tensor
) -> None:
    off = OffPolicyRows(rows_of, dataclasses.replace(OFF, support=support))
    output, grads, values = run(support, k, rows, WEIGHT_N, ON, off_policy=off, kept_M=kept_M)
    parts = [run(support, k, rows, WEIGHT_N * mask_N, config) for mask_N, config in ((~OFF_N, ON), (OFF_N, OFF))]
    assert_close(output.kl_sum, parts[0][0].kl_sum + parts[1][0].kl_sum, 1e-12)
    for both, on, of_off in zip(grads, parts[0][1], parts[1][1], strict=True):
        assert_close(both, on + of_off, 1e-12)
    kept_off_M = OFF_N[WEIGHT_N > 0]
    for name, values_M in values.items():
        assert_close(values_M[~kept_off_M], parts[0][2][name], 1e-12)
        if name != "sampler_logprob_diff":
            assert_close(values_M[kept_off_M], parts[1][2][name], 1e-12)
    expected = sums(parts[0][0]) | {
        f"off_policy_{name}": pair for name, pair in sums(parts[1][0]).items() if not name.startswith("sampler_")
    }
    assert sums(output) == pytest.approx(expected, rel=1e-12)


def test_row_values_of_both_kinds_of_rows_are_in_the_order_of_the_rows() -> None:
    hidden, head, t_hidden, t_head = rows_and_head(ROWS, 30, 8)
    topk = teacher_topk(t_hidden, t_head, 6, 1.0)
    plain = [topk_kl(hidden @ head.t(), topk, config) for config in (ON, OFF)]
    _, _, values = run("teacher", 6, False, WEIGHT_N, ON, off_policy=OffPolicyRows(OFF_N, OFF))
    assert_close(values["loss"], torch.where(OFF_N, plain[1], plain[0])[WEIGHT_N > 0], 1e-12)


@pytest.mark.parametrize("mask_N", [torch.zeros(ROWS).bool(), torch.ones(ROWS).bool()], ids=["no row", "all rows"])
def test_every_metric_name_is_returned_if_one_kind_of_rows_is_missing(mask_N: Tensor) -> None:
    output, grads, _ = run("teacher", 6, True, WEIGHT_N, ON, off_policy=OffPolicyRows(mask_N, OFF))
    both, _, _ = run("teacher", 6, True, WEIGHT_N, ON, off_policy=OffPolicyRows(OFF_N, OFF))
    alone, alone_grads, _ = run("teacher", 6, True, WEIGHT_N, OFF if mask_N.all() else ON)
    assert output.stats.keys() == both.stats.keys()
    assert_close(output.kl_sum, alone.kl_sum, 1e-12)
    for ours, expected in zip(grads, alone_grads, strict=True):
        assert_close(ours, expected, 1e-12)
    missing = "loss" if mask_N.all() else "off_policy_loss"
    assert sums(output)[missing] == sums(output)[f"{missing} count"] == 0


def test_off_policy_rows_need_no_second_buffer_of_logits_or_gradients() -> None:
    rows, vocab, chunk_rows = 48, 4000, 16
    hidden, head, t_hidden, t_head = rows_and_head(rows, vocab, 4, dtype=torch.float32)
    hidden.requires_grad_()
    head.requires_grad_()
    peaks = []
    for off_policy in (None, OffPolicyRows(torch.arange(rows) % 3 == 0, LossConfig("jsd"))):
        with LiveBytes((hidden.numel(), head.numel())) as memory:
            fused_linear_kl(
                *(hidden, head, TeacherRows(t_hidden, t_head), LossConfig(), torch.ones(rows)),
                chunk_rows=chunk_rows,
                topk_logits_k=0,
                off_policy=off_policy,
            ).kl_sum.backward()
        peaks.append(memory.peak)
    assert peaks[1] < peaks[0] + 0.05 * (4 * chunk_rows * vocab)


@pytest.mark.parametrize(
    ("off_policy", "key", "value"),
    [
        (OffPolicyRows(OFF_N, LossConfig("sampled")), "distillation.off_policy.kl_type", "sampled"),
        (OffPolicyRows(OFF_N, LossConfig(temperature=2.0)), "off_policy.temperature", 2.0),
        (OffPolicyRows(OFF_N, LossConfig(entry_clip=-1.0)), "loss_fn.entry_clip", -1.0),
        (OffPolicyRows(OFF_N[:4], OFF), "off_policy_N", (4,)),
        (OffPolicyRows(torch.tensor([1, 2]), OFF), "off_policy.rows", 2),
        (OffPolicyRows(torch.tensor([1, 1]), OFF), "off_policy.rows", 2),
        (OffPolicyRows(OFF_N.float(), OFF), "off_policy.rows", torch.float32),
        (OffPolicyRows(torch.tensor([1, ROWS]), OFF), "off_policy.rows", (1, ROWS)),
    ],
)
def test_invalid_off_policy_rows_are_refused(off_policy: OffPolicyRows, key: str, value: Any) -> None:
    with pytest.raises(UserError) as error:
        run("teacher", 6, True, WEIGHT_N, ON, off_policy=off_policy)
    assert (error.value.key, error.value.value) == (key, value)
