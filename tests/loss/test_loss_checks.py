"""What the two doors of the loss refuse, in one sentence each, and what it costs to ask."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.config import LossConfig
from distill.errors import UserError
from distill.loss import Sampled, Tokens, fused_linear_kl, teacher_topk, topk_kl
from distill.types import Targets, TeacherRows, TopK
from tests.loss.test_fused import rows_and_head

EYE = torch.eye(30)
"""A head under which hidden rows are logits."""
TOPK = TopK(torch.tensor([[5, 22], [6, 21], [7, 20]]), torch.full((3, 2), -1.0), torch.full((3,), -1.0))
PADDED = TopK(torch.tensor([[5, -1], [-1, -1], [7, 20]]), torch.tensor([[-1.0, -math.inf]] * 3), torch.full((3,), -1.0))


def door(config: LossConfig, way: str) -> None:
    """Go through one of the doors with nothing else wrong."""
    if way == "twin":
        topk_kl(torch.zeros(3, 30), TOPK, config, tokens=Tokens(torch.tensor([5, 6, 7]), torch.zeros(3)))
        return
    targets: Targets = TOPK if way == "top-k" else TeacherRows(torch.zeros(3, 30), EYE)
    k = 0 if way == "whole vocabulary" else 2
    sampled = Sampled(torch.tensor([5, 6, 7]), torch.zeros(3), 1.0)
    fused_linear_kl(torch.zeros(3, 30), EYE, targets, config, torch.ones(3), sampled, topk_logits_k=k)


@pytest.mark.parametrize("way", ["twin", "top-k", "rows", "whole vocabulary"])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kl_type": "backward"}, "kl_type=backward is not known: set one of mixed, forward, reverse, jsd, sampled"),
        ({"outside_topk": "ceiling"}, "outside_topk=ceiling is not known: set one of bucket, renormalize, floor"),
        ({"logits_dtype": "bf16"}, "logits_dtype=bf16 is not known: set one of float32, bfloat16"),
        ({"kl_type": "jsd", "jsd_beta": 0.0}, "jsd_beta=0.0 .*kl_type=reverse"),
        ({"kl_type": "jsd", "jsd_beta": 1.0}, "jsd_beta=1.0 .*kl_type=forward"),
        ({"kl_type": "jsd", "jsd_beta": -0.5}, "jsd_beta=-0.5"),
        ({"kl_type": "jsd", "jsd_beta": 2.0}, "jsd_beta=2.0"),
        ({"kl_type": "jsd", "outside_topk": "floor"}, "kl_type=jsd .*outside_topk=floor"),
        ({"mixed_kl_weight": 3.0}, "mixed_kl_weight=3.0 is not a share: set it from 0 to 1"),
        ({"token_kl_cap": -1.0}, "token_kl_cap=-1.0 .* above 0"),
        ({"importance_ratio_cap": 0.0}, "importance_ratio_cap=0.0 .* above 0"),
        ({"temperature": -0.6}, "loss_fn.temperature=-0.6 is not a positive number"),
    ],
)
def test_a_configuration_that_is_no_loss_is_refused_at_every_door(settings: Any, words: str, way: str) -> None:
    door(LossConfig(), way)
    with pytest.raises(UserError, match=words) as error:
        door(LossConfig(**settings), way)
    assert "\n" not in str(error.value)


SAMPLED = LossConfig(kl_type="sampled")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_VD": torch.zeros(30, 9)}, r"\(3, 30\) and \(30, 9\)"),
        ({"head_VD": EYE.bfloat16()}, "torch.float32 but the head is torch.bfloat16"),
        ({"weight_N": torch.ones(4)}, r"weight_N has shape \(4,\) but the student has 3 rows"),
        ({"sampled": Sampled(torch.tensor([0, 1, 30]), torch.zeros(3), 1.0)}, "sampled ids range from 0 to 30"),
        ({"sampled": Sampled(torch.tensor([0, 1]), torch.zeros(2), 1.0)}, r"sampled_ids_N has shape \(2,\)"),
        (
            {"sampled": Sampled(torch.tensor([0, 1, 2]), torch.zeros(3), -1.0)},
            "policy.generation.temperature=-1.0 is not a positive number: set it above 0$",
        ),
        ({"valid_vocab": 31}, "valid_vocab=31 .* 30 columns"),
        ({"valid_vocab": 10}, "range from 5 to 22"),
        ({"targets": TeacherRows(torch.zeros(3, 8), torch.zeros(30, 8))}, "topk_logits_k is missing"),
        (
            {"targets": TeacherRows(torch.zeros(3, 8), torch.zeros(30, 8)), "topk_logits_k": 31},
            "topk_logits_k=31 exceeds",
        ),
        ({"targets": TeacherRows(torch.zeros(2, 8), torch.zeros(30, 8)), "topk_logits_k": 4}, "teacher_hidden_ND"),
        (
            {"targets": TeacherRows(torch.zeros(3, 8), torch.zeros(29, 8)), "topk_logits_k": 4},
            "29 rows for a vocabulary of 30",
        ),
        (
            {
                "targets": TeacherRows(torch.zeros(3, 8), torch.zeros(30, 8)),
                "topk_logits_k": 4,
                "sampled": Sampled(torch.tensor([0, -1, 2]), torch.zeros(3), 1.0),
            },
            "sampled ids range from -1 to 2",
        ),
        (
            {"targets": TopK(TOPK.ids_NK.float(), TOPK.logprobs_NK, TOPK.log_tail_N)},
            r"teacher's ids \(-1 is padding\) are torch.float32: pass int32 or int64",
        ),
        (
            {"targets": TopK(TOPK.ids_NK, TOPK.logprobs_NK, TOPK.log_tail_N, torch.zeros(2))},
            r"entropy has shape \(2,\): pass \(3,\), or None",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change: dict[str, Any], words: str) -> None:
    good: dict[str, Any] = {
        "hidden_ND": torch.zeros(3, 30),
        "head_VD": EYE,
        "targets": TOPK,
        "weight_N": torch.ones(3),
    }
    with pytest.raises(UserError, match=words) as error:
        fused_linear_kl(**(good | {"loss_config": LossConfig()} | change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("logits_NV", "tokens", "words"),
    [
        (torch.zeros(30), None, r"logits have shape \(30,\): pass \[N, V\]"),
        (torch.zeros(3, 30), Tokens(torch.tensor([5]), torch.zeros(1)), r"sampled_ids_N has shape \(1,\)"),
        (torch.zeros(3, 30), Tokens(torch.tensor([5, 6, 7]), torch.zeros(2)), r"sampled_logprobs_N has shape \(2,\)"),
        (torch.zeros(3, 30), Tokens(torch.tensor([5, -1, 7]), torch.zeros(3)), "sampled ids range from -1 to 7"),
    ],
)
def test_the_twin_refuses_bad_logits_and_tokens(logits_NV: torch.Tensor, tokens: Tokens | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        topk_kl(logits_NV, PADDED, SAMPLED, tokens=tokens)


def test_a_sampled_token_that_the_targets_lack_is_named_by_its_row_in_the_whole() -> None:
    """Whatever the chunks; and a row that does not count may lack it."""
    sampled = Sampled(torch.tensor([5, 6, 8]), torch.zeros(3), 1.0)
    words = "row 2 sampled the token 8, which is not among the teacher's ids"
    for chunk_rows in (1, 2, None):
        with pytest.raises(UserError, match=words):
            fused_linear_kl(torch.zeros(3, 30), EYE, TOPK, SAMPLED, torch.ones(3), sampled, chunk_rows=chunk_rows)
    with pytest.raises(UserError, match=words):
        topk_kl(torch.zeros(3, 30), TOPK, SAMPLED, tokens=Tokens(sampled.ids_N, sampled.logprobs_N))
    fused_linear_kl(torch.zeros(3, 30), EYE, TOPK, SAMPLED, torch.tensor([1.0, 1, 0]), sampled)


@pytest.mark.parametrize("outside", ["renormalize", "floor"])
def test_a_row_of_padding_alone_is_refused_where_nothing_stands_for_the_rest(outside: Any) -> None:
    config = LossConfig(outside_topk=outside)
    words = f"row 1 of the teacher's ids holds padding alone, and loss_fn.outside_topk={outside}"
    with pytest.raises(UserError, match=words):
        fused_linear_kl(torch.zeros(3, 30), EYE, PADDED, config, torch.ones(3))
    with pytest.raises(UserError, match=words):
        topk_kl(torch.zeros(3, 30), PADDED, config)
    fused_linear_kl(torch.zeros(3, 30), EYE, PADDED, config, torch.tensor([1.0, 0, 1]))
    alone = TopK(PADDED.ids_NK[1:2], torch.full((1, 2), -math.inf), torch.zeros(1))
    assert topk_kl(torch.randn(1, 30), alone, LossConfig()).tolist() == [0.0], "all is one outcome"


def test_repeated_ids_are_refused_in_debug() -> None:
    topk = TopK(torch.tensor([[5, 5]]), torch.full((1, 2), -1.0), torch.full((1,), -1.0))
    with pytest.raises(UserError, match=r"row 0 .* 5 twice"):
        fused_linear_kl(torch.zeros(1, 8), torch.zeros(30, 8), topk, LossConfig(), torch.ones(1), debug=True)


def test_more_kept_ids_than_tokens_are_refused() -> None:
    with pytest.raises(UserError, match=r"topk_logits_k=31 exceeds the vocabulary \(30\): set it to at most 30"):
        teacher_topk(torch.zeros(3, 8), torch.zeros(30, 8), 31, 1.0)


class Waits(TorchDispatchMode):
    """Counts the operators whose result a GPU would be waited for; a ``tolist`` of a CPU's tensor is none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in ("_local_scalar_dense", "nonzero") or by_mask:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kl_type", "outside", "support", "k", "expected"),
    [
        ("mixed", "bucket", "teacher", None, 1),
        ("mixed", "floor", "teacher", None, 2),
        ("sampled", None, "teacher", None, 2),
        ("sampled", None, "student", 5, 1),
        ("sampled", None, "teacher", 0, 1),
    ],
)
def test_a_pass_waits_for_the_device_no_oftener_with_more_chunks(
    kl_type: Any, outside: Any, support: Any, k: int | None, expected: int
) -> None:
    """Once to leave out rows of weight 0, once more for what the loss must find among finished targets."""
    hidden, head, t_hidden, t_head = rows_and_head(6, 30, 8)
    config = LossConfig(kl_type, outside_topk=outside, support=support)
    ids_N = torch.arange(6)
    finished = teacher_topk(t_hidden, t_head, 5, 1.0, extra_ids_N=ids_N)
    targets: Targets = finished if k is None else TeacherRows(t_hidden, t_head)
    sampled = Sampled(ids_N, torch.zeros(6) - 2, 1.0)
    for chunk_rows in (2, 6):
        with Waits() as waits:
            leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
            fused_linear_kl(
                *leaves,
                targets,
                config,
                torch.ones(6),
                sampled,
                chunk_rows=chunk_rows,
                topk_logits_k=k,
                stop_token_ids=[1, 2],
            ).kl_sum.backward()
        assert waits.found == {"nonzero": expected}
