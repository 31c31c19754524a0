"""The metric ``topk_overlap``: fraction of the K most likely tokens that both models have in common."""

from __future__ import annotations

import dataclasses
import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.config import LossConfig
from distill.errors import UserError
from distill.loss import Sampled, fused_linear_kl, teacher_topk
from distill.types import LossOutput, TeacherRows
from tests.loss.test_fused import mean, rows_and_head

EYE = torch.eye(6)
STUDENT = torch.tensor([[9.0, 8, 7, 3, 2, 1], [1, 2, 3, 7, 8, 9], [9, 1, 8, 2, 7, 3], [5, 5, 5, 5, 1, 1]])
TEACHER = torch.tensor([[9.0, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [1, 9, 8, 7, 1, 1]])
SHARED = [1.0, 0.0, 2 / 3, 2 / 3]
"""Of the teacher's ids 012, 012, 012 and 123, the student's 012, 543, 024 and 012 (of equal logits the lowest ids)."""


def overlap(targets: Any, k: int, mask: list[bool], config: LossConfig, **options: Any) -> tuple[LossOutput, Any]:
    values: dict[str, Tensor] = {}
    output = fused_linear_kl(
        STUDENT,
        EYE,
        targets,
        config,
        options.pop("weight_N", torch.ones(4)),
        Sampled(torch.tensor([5, 5, 5, 5]), torch.zeros(4), 1.0),
        topk_logits_k=k,
        overlap_N=torch.tensor(mask),
        row_values=values,
        **options,
    )
    return output, values.get("topk_overlap")


@pytest.mark.parametrize(
    ("kl_type", "chunk_rows", "backend"),
    [
        ("mixed", 1, "torch"),
        ("mixed", 3, "torch"),
        ("sampled", 3, "torch"),
        pytest.param("mixed", 3, "triton", marks=pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")),
    ],
)
@pytest.mark.parametrize("kind", ["top-k", "rows", "student's support"])
def test_the_overlap_is_the_fraction_of_common_tokens(kind: str, kl_type: Any, chunk_rows: int, backend: Any) -> None:
    """An additional id, the sampled token 5, is not one of the K ids."""
    config = LossConfig(kl_type, support="student" if "student" in kind else "teacher", backend=backend)
    targets: Any = TeacherRows(TEACHER, EYE)
    if kind == "top-k":
        extra_ids_N = torch.tensor([5, 5, 5, 5]) if kl_type == "sampled" else None
        targets = teacher_topk(TEACHER, EYE, 3, 1.0, extra_ids_N=extra_ids_N)
    output, values = overlap(targets, 3, [True] * 4, config, chunk_rows=chunk_rows)
    assert values.tolist() == pytest.approx(SHARED)
    assert mean(output, "topk_overlap") == pytest.approx(sum(SHARED) / 4)


def test_only_selected_rows_of_nonzero_weight_count() -> None:
    weight_N = torch.tensor([1.0, 1, 0, 0.5])
    output, values = overlap(TeacherRows(TEACHER, EYE), 3, [False, True, True, True], LossConfig(), weight_N=weight_N)
    assert math.isnan(values[0]) and values[1:].tolist() == pytest.approx([SHARED[1], SHARED[3]])
    total, count = output.stats["topk_overlap"]
    assert float(total) == pytest.approx(SHARED[1] + SHARED[3]) and int(count) == 2
    output, _ = overlap(TeacherRows(TEACHER, EYE), 3, [False] * 4, LossConfig())
    assert [float(number) for number in output.stats["topk_overlap"]] == [0, 0]


def test_the_overlap_does_not_change_the_loss_and_needs_a_mask_and_a_top_k() -> None:
    rows = TeacherRows(TEACHER, EYE)
    output, _ = overlap(rows, 3, [True] * 4, LossConfig())
    plain = fused_linear_kl(STUDENT, EYE, rows, LossConfig(), torch.ones(4), topk_logits_k=3)
    assert torch.equal(output.kl_sum, plain.kl_sum) and "topk_overlap" not in plain.stats
    assert "topk_overlap" not in overlap(rows, 0, [True] * 4, LossConfig())[0].stats
    assert overlap(rows, 6, [True] * 4, LossConfig())[1].tolist() == [1.0] * 4
    for mask in ([1, 0, 1, 0], [True] * 3):
        with pytest.raises(UserError) as error:
            overlap(rows, 3, mask, LossConfig())  # type: ignore[arg-type]
        assert error.value.key == "overlap_N"


@pytest.mark.parametrize("support", ["teacher", "student"])
def test_the_overlap_of_random_models_is_that_of_their_top_ks(support: Any) -> None:
    hidden, head, t_hidden, t_head = rows_and_head(40, 200, 8)
    config = dataclasses.replace(LossConfig(), support=support)
    mask_N = torch.arange(40) % 2 == 0
    values: dict[str, Tensor] = {}
    targets = TeacherRows(t_hidden, t_head)
    options: dict[str, Any] = dict(topk_logits_k=20, overlap_N=mask_N, row_values=values)
    fused_linear_kl(hidden, head, targets, config, torch.ones(40), **options)
    ours, theirs = ((h @ w.t()).topk(20).indices for h, w in ((hidden, head), (t_hidden, t_head)))
    expected = [len(set(a) & set(b)) / 20 for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
    assert values["topk_overlap"][mask_N].tolist() == pytest.approx(expected[::2])
    assert values["topk_overlap"][~mask_N].isnan().all()
