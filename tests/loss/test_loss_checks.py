"""Bad input of ``topk_kl`` and ``fused_linear_kl`` is refused in one sentence; checks wait for the device once."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.config import LossConfig
from distill.errors import UserError
from distill.loss import Sampled, Tokens, fused_linear_kl, teacher_topk, topk_kl, topk_reduction
from distill.types import Targets, TeacherRows, TopK
from tests.loss.test_fused import rows_and_head

EYE = torch.eye(30)
"""A head whose logits are the hidden rows."""
TOPK = TopK(torch.tensor([[5, 22], [6, 21], [7, 20]]), torch.full((3, 2), -1.0), torch.full((3,), -1.0))
PADDED = TopK(torch.tensor([[5, -1], [-1, -1], [7, 20]]), torch.tensor([[-1.0, -math.inf]] * 3), torch.full((3,), -1.0))


def compute(config: LossConfig, path: str) -> None:
    """Compute the loss on one of its paths; everything except ``config`` is valid."""
    if path == "plain":
        topk_kl(torch.zeros(3, 30), TOPK, config, tokens=Tokens(torch.tensor([5, 6, 7]), torch.zeros(3)))
        return
    targets: Targets = TOPK if path == "top-k" else TeacherRows(torch.zeros(3, 30), EYE)
    k = 0 if path == "complete vocabulary" else 2
    sampled = Sampled(torch.tensor([5, 6, 7]), torch.zeros(3), 1.0)
    fused_linear_kl(torch.zeros(3, 30), EYE, targets, config, torch.ones(3), sampled, topk_logits_k=k)


@pytest.mark.parametrize("path", ["plain", "top-k", "rows", "complete vocabulary"])
@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"kl_type": "backward"}, "kl_type"),
        ({"outside_topk": "ceiling"}, "outside_topk"),
        ({"logits_dtype": "bf16"}, "logits_dtype"),
        ({"kl_type": "jsd", "outside_topk": "floor"}, "kl_type"),
        ({"mixed_kl_weight": 3.0}, "mixed_kl_weight"),
        ({"token_kl_cap": -1.0}, "token_kl_cap"),
        ({"importance_ratio_cap": 0.0}, "importance_ratio_cap"),
        ({"entry_clip": 0.0}, "entry_clip"),
        ({"entry_clip": math.nan}, "entry_clip"),
        ({"kl_type": "sampled", "entry_clip": 0.05}, "entry_clip"),
        ({"temperature": -0.6}, "temperature"),
    ],
)
def test_an_invalid_loss_configuration_is_refused_on_every_path(settings: Any, key: str, path: str) -> None:
    compute(LossConfig(), path)
    with pytest.raises(UserError) as error:
        compute(LossConfig(**settings), path)
    assert error.value.key == f"loss_fn.{key}" and error.value.value is settings[key]
    assert f"{key}={settings[key]}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("beta", [-0.5, 0.0, 1.0, 2.0])
def test_a_jsd_beta_outside_0_to_1_is_refused(beta: float) -> None:
    with pytest.raises(UserError, match=f"jsd_beta={beta}"):
        compute(LossConfig("jsd", jsd_beta=beta), "plain")


SAMPLED = LossConfig(kl_type="sampled")


ROWS = TeacherRows(torch.zeros(3, 8), torch.zeros(30, 8))


def sampled_of(ids: list[int], temperature: float = 1.0) -> Sampled:
    return Sampled(torch.tensor(ids), torch.zeros(len(ids)), temperature)


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ({"head_VD": torch.zeros(30, 9)}, "head_VD", ((3, 30), (30, 9))),
        ({"head_VD": EYE.bfloat16()}, "head_VD", torch.bfloat16),
        ({"weight_N": torch.ones(4)}, "weight_N", (4,)),
        ({"sampled": sampled_of([0, 1, 30])}, "sampled_ids_N", (0, 30)),
        ({"sampled": sampled_of([0, 1])}, "sampled_ids_N", (2,)),
        ({"sampled": sampled_of([0, 1, 2], -1.0)}, "policy.generation.temperature", -1.0),
        ({"valid_vocab": 31}, "valid_vocab", 31),
        ({"valid_vocab": 10}, "topk.ids_NK", (5, 22)),
        ({"targets": ROWS}, "topk_logits_k", None),
        ({"targets": ROWS, "topk_logits_k": 31}, "distillation.topk_logits_k", 31),
        (
            {"targets": TeacherRows(torch.zeros(2, 8), torch.zeros(30, 8)), "topk_logits_k": 4},
            "teacher_hidden_ND",
            (2, 8),
        ),
        ({"targets": TeacherRows(torch.zeros(3, 8), torch.zeros(29, 8)), "topk_logits_k": 4}, "head_VD", 29),
        ({"targets": ROWS, "topk_logits_k": 4, "sampled": sampled_of([0, -1, 2])}, "sampled_ids_N", (-1, 2)),
        ({"targets": TopK(TOPK.ids_NK.float(), TOPK.logprobs_NK, TOPK.log_tail_N)}, "topk.ids_NK", torch.float32),
        (
            {"targets": TopK(TOPK.ids_NK, TOPK.logprobs_NK, TOPK.log_tail_N, torch.zeros(2))},
            "topk.entropy_N",
            (2,),
        ),
        (
            {"targets": TopK(TOPK.ids_NK, TOPK.logprobs_NK, TOPK.log_tail_N, None, torch.zeros(3, 1))},
            "topk.sampled_logprob_N",
            (3, 1),
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change: dict[str, Any], key: str, value: Any) -> None:
    good: dict[str, Any] = {
        "hidden_ND": torch.zeros(3, 30),
        "head_VD": EYE,
        "targets": TOPK,
        "weight_N": torch.ones(3),
    }
    with pytest.raises(UserError) as error:
        fused_linear_kl(**(good | {"loss_config": LossConfig()} | change))
    assert (error.value.key, error.value.value) == (key, value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("logits_NV", "tokens", "key", "value"),
    [
        (torch.zeros(30), None, "logits_NV", (30,)),
        (torch.zeros(3, 30), Tokens(torch.tensor([5]), torch.zeros(1)), "sampled_ids_N", (1,)),
        (torch.zeros(3, 30), Tokens(torch.tensor([5, 6, 7]), torch.zeros(2)), "sampled_logprobs_N", (2,)),
        (torch.zeros(3, 30), Tokens(torch.tensor([5, -1, 7]), torch.zeros(3)), "sampled_ids_N", (-1, 7)),
    ],
)
def test_topk_kl_refuses_bad_logits_and_tokens(
    logits_NV: torch.Tensor, tokens: Tokens | None, key: str, value: Any
) -> None:
    with pytest.raises(UserError) as error:
        topk_kl(logits_NV, PADDED, SAMPLED, tokens=tokens)
    assert (error.value.key, error.value.value) == (key, value)


def test_a_missing_sampled_token_is_reported_by_its_row_whatever_the_chunk_size() -> None:
    """A row of weight 0 may lack the token."""
    sampled = sampled_of([5, 6, 8])
    for chunk_rows in (1, 2, None):
        with pytest.raises(UserError) as error:
            fused_linear_kl(torch.zeros(3, 30), EYE, TOPK, SAMPLED, torch.ones(3), sampled, chunk_rows=chunk_rows)
        assert (error.value.key, error.value.value) == ("topk.ids_NK", (2, 8))
    with pytest.raises(UserError) as error:
        topk_kl(torch.zeros(3, 30), TOPK, SAMPLED, tokens=Tokens(sampled.ids_N, sampled.logprobs_N))
    assert error.value.value == (2, 8)
    fused_linear_kl(torch.zeros(3, 30), EYE, TOPK, SAMPLED, torch.tensor([1.0, 1, 0]), sampled)


@pytest.mark.parametrize("outside", ["renormalize", "floor"])
def test_a_row_with_only_padding_is_refused_unless_the_tail_is_compared(outside: Any) -> None:
    config = LossConfig(outside_topk=outside)
    with pytest.raises(UserError) as error:
        fused_linear_kl(torch.zeros(3, 30), EYE, PADDED, config, torch.ones(3))
    assert (error.value.key, error.value.value) == ("topk.ids_NK", 1)
    with pytest.raises(UserError):
        topk_kl(torch.zeros(3, 30), PADDED, config)
    fused_linear_kl(torch.zeros(3, 30), EYE, PADDED, config, torch.tensor([1.0, 0, 1]))
    alone = TopK(PADDED.ids_NK[1:2], torch.full((1, 2), -math.inf), torch.zeros(1))
    assert topk_kl(torch.randn(1, 30), alone, LossConfig()).tolist() == [0.0], "one outcome has all the mass"


def test_repeated_ids_are_refused_in_debug() -> None:
    topk = TopK(torch.tensor([[5, 5]]), torch.full((1, 2), -1.0), torch.full((1,), -1.0))
    with pytest.raises(UserError) as error:
        fused_linear_kl(torch.zeros(1, 8), torch.zeros(30, 8), topk, LossConfig(), torch.ones(1), debug=True)
    assert error.value.value == (0, 5)


def test_more_kept_ids_than_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="at most 30") as error:
        teacher_topk(torch.zeros(3, 8), torch.zeros(30, 8), 31, 1.0)
    assert (error.value.key, error.value.value) == ("distillation.topk_logits_k", 31)


class Waits(TorchDispatchMode):
    """Counts operators that wait for a GPU's result; ``tolist`` of a CPU tensor is not one of them."""

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
def test_the_number_of_device_waits_does_not_depend_on_the_number_of_chunks(
    kl_type: Any, outside: Any, support: Any, k: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wait finds the rows of weight 0; a second one checks that given targets have the ids the loss needs.

    There is no wait if the caller passes these rows and has checked the ids.
    """
    # The top-k in PyTorch waits to look for ties; the kernels in Triton do this on the device.
    monkeypatch.setattr(topk_reduction, "_lowest_of_ties", lambda z, values, columns, tied: columns)
    hidden, head, t_hidden, t_head = rows_and_head(6, 30, 8)
    config = LossConfig(kl_type, outside_topk=outside, support=support)
    ids_N = torch.arange(6)
    finished = teacher_topk(t_hidden, t_head, 5, 1.0, extra_ids_N=ids_N)
    targets: Targets = finished if k is None else TeacherRows(t_hidden, t_head)
    sampled = Sampled(ids_N, torch.zeros(6) - 2, 1.0)
    weight_N = torch.tensor([1.0, 0, 1, 1, 0, 1])
    for chunk_rows, known in ((2, False), (6, False), (2, True)):
        options: Any = {"kept_M": torch.tensor([0, 2, 3, 5]), "check_values": False} if known else {}
        with Waits() as waits:
            leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
            fused_linear_kl(
                *leaves,
                targets,
                config,
                weight_N,
                sampled,
                chunk_rows=chunk_rows,
                topk_logits_k=k,
                stop_token_ids=[1, 2],
                **options,
            ).kl_sum.backward()
        assert waits.found == ({} if known else {"nonzero": expected})
