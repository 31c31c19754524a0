"""``fused_linear_kl`` on response rows against NeMo-RL's formulas on complete sequences, on fixed inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distill.config import LossConfig
from distill.loss import Sampled, fused_linear_kl, teacher_topk
from tests.loss.test_fused import gradients, rows_and_head
from tests.loss_oracle import reference_kl

SEQUENCES, POSITIONS, VOCAB, WIDTH, K, TEMPERATURE = 3, 7, 50, 8, 6, 0.6


@pytest.mark.parametrize("zero_outside_topk", [False, True])
@pytest.mark.parametrize("kl_type", ["forward", "reverse", "mixed"])
def test_every_mode_has_nemo_rls_loss_and_gradients(kl_type: Any, zero_outside_topk: bool) -> None:
    """Logits at position t predict token t + 1; a token counts if its mask and its sequence's are 1; the sum is divided
    by the number of counted tokens. In float64, to 1e-6."""
    hidden, head, t_hidden, t_head = rows_and_head(SEQUENCES * POSITIONS, VOCAB, WIDTH)
    generator = torch.Generator().manual_seed(3)
    responses_BT = torch.randint(0, VOCAB, (SEQUENCES, POSITIONS), generator=generator)
    mask_BT = torch.zeros(SEQUENCES, POSITIONS)
    mask_BT[0, 3:], mask_BT[1, 2:5], mask_BT[2, 6:] = 1, 1, 1
    mask_BT *= torch.tensor([1.0, 1.0, 0.0]).unsqueeze(1)
    tokens = mask_BT[:, 1:].sum()

    def reference(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        student_BTV = (h @ w.t() / TEMPERATURE).view(SEQUENCES, POSITIONS, VOCAB)
        teacher_BTV = (t_hidden @ t_head.t() / TEMPERATURE).view(SEQUENCES, POSITIONS, VOCAB)
        ids_BTK = teacher_BTV.topk(K, dim=-1).indices
        kl_BT = reference_kl(student_BTV, teacher_BTV, ids_BTK, kl_type, 0.3, zero_outside_topk)
        return (kl_BT[:, :-1] * mask_BT[:, 1:]).sum() / tokens

    def ours(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        # One row per response token; the masked sequence stays, with rows of weight 0.
        rows_N = torch.tensor([b * POSITIONS + t - 1 for b, t in ((0, 3), (0, 4), (0, 5), (0, 6), (2, 6))])
        rows_N = torch.cat([rows_N, POSITIONS + torch.arange(1, 4)])
        weight_N = torch.tensor([1.0, 1, 1, 1, 0, 1, 1, 1])
        config = LossConfig(kl_type, mixed_kl_weight=0.3, zero_outside_topk=zero_outside_topk)
        topk = teacher_topk(t_hidden[rows_N], t_head, K, TEMPERATURE)
        sampled = Sampled(responses_BT.flatten()[rows_N + 1], torch.zeros(len(rows_N)), TEMPERATURE)
        assert weight_N.sum() == tokens
        return fused_linear_kl(h[rows_N], w, topk, config, weight_N, sampled, chunk_rows=3).kl_sum / tokens

    (loss, found), (expected, right) = gradients(ours, hidden, head), gradients(reference, hidden, head)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for gradient, right_gradient in zip(found, right, strict=True):
        assert (gradient - right_gradient).norm() <= 1e-6 * right_gradient.norm()
