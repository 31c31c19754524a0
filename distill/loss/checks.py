"""What the loss refuses before it computes: one sentence each, with the values."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.config.rules import check_jsd
from distill.errors import UserError
from distill.types import TopK


@cache
def _choices() -> dict[str, tuple[Any, ...]]:
    """The fields of ``LossConfig`` that name one of a few words, with these words."""

    def words(hint: Any) -> tuple[Any, ...]:
        return get_args(hint) if get_origin(hint) is Literal else sum(map(words, get_args(hint)), ())

    return {name: found for name, hint in get_type_hints(LossConfig).items() if (found := words(hint))}


def check_loss(loss_config: LossConfig) -> None:
    """Refuse what no loss is made of, once a pass. Errors: ``UserError`` for words not known and numbers out of range.

    A configuration that was read from a recipe has passed this already; one that was made in Python has not.
    """
    for name, words in _choices().items():
        value = getattr(loss_config, name)
        if value is not None and value not in words:
            raise UserError(f"loss_fn.{name}={value} is not known: set one of {', '.join(words)}")
    if not 0 <= loss_config.mixed_kl_weight <= 1:
        raise UserError(f"loss_fn.mixed_kl_weight={loss_config.mixed_kl_weight} is not a share: set it from 0 to 1")
    for name in ("token_kl_cap", "importance_ratio_cap"):
        cap = getattr(loss_config, name)
        if cap is not None and not cap > 0:
            raise UserError(f"loss_fn.{name}={cap} would turn gradients around or off: set it above 0")
    check_jsd(loss_config)


def check_temperature(temperature: float, key: str = "loss_fn.temperature", remedy: str = ", or to null") -> None:
    """Errors: ``UserError`` where it is not a finite number above 0."""
    if not 0 < temperature < math.inf:
        raise UserError(f"{key}={temperature} is not a positive number: set it above 0{remedy}")


def check_logits(logits_NV: Tensor) -> None:
    """Errors: ``UserError`` where the logits are not a matrix."""
    if logits_NV.ndim != 2:
        raise UserError(f"the student's logits have shape {tuple(logits_NV.shape)}: pass [N, V]")


def check_vocab(columns: int, valid_vocab: int | None) -> int:
    """The number of real columns. Errors: ``UserError`` where ``valid_vocab`` is not between 1 and ``columns``."""
    if valid_vocab is None:
        return columns
    if not 1 <= valid_vocab <= columns:
        raise UserError(f"valid_vocab={valid_vocab} is not between 1 and the {columns} columns: pass a smaller one")
    return valid_vocab


def check_linear(whose: str, hidden_ND: Tensor, head_VD: Tensor, vocab: int) -> None:
    """Errors: ``UserError`` where hidden rows and head don't fit in shape or dtype, or the head lacks rows."""
    if hidden_ND.ndim != 2 or head_VD.ndim != 2 or hidden_ND.shape[1] != head_VD.shape[1]:
        shapes = f"{tuple(hidden_ND.shape)} and {tuple(head_VD.shape)}"
        raise UserError(f"{whose} hidden rows and head have shapes {shapes}: pass [N, D] and [V, D]")
    if hidden_ND.dtype != head_VD.dtype:
        raise UserError(f"{whose} hidden rows are {hidden_ND.dtype} but the head is {head_VD.dtype}: cast one of them")
    if head_VD.shape[0] < vocab:
        raise UserError(f"{whose} head has {head_VD.shape[0]} rows for a vocabulary of {vocab}: pass valid_vocab")


def check_rows(rows: int, **columns: Tensor) -> None:
    """Errors: ``UserError`` where one of the named tensors does not have one entry per row."""
    for name, column in columns.items():
        if column.shape[:1] != (rows,) or (column.ndim != 1 and not name.endswith("_ND")):
            raise UserError(f"{name} has shape {tuple(column.shape)} but the student has {rows} rows: pass one per row")


def check_ids(vocab: int, topk_ids_NK: Tensor | None = None, sampled_ids_N: Tensor | None = None) -> None:
    """Errors: ``UserError`` where an id is not a whole number from 0 (-1 in a top-k, as padding) to below ``vocab``.

    One wait for the device, however many ids there are.
    """
    named = [
        (what, lowest, ids)
        for what, lowest, ids in (
            ("the teacher's ids (-1 is padding)", -1, topk_ids_NK),
            ("the sampled ids", 0, sampled_ids_N),
        )
        if ids is not None and ids.numel()
    ]
    for what, _, ids in named:
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise UserError(f"{what} are {ids.dtype}: pass int32 or int64")
    if not named:
        return
    bounds = torch.stack([bound.long() for _, _, ids in named for bound in ids.aminmax()]).tolist()
    for (what, lowest, _), least, most in zip(named, bounds[::2], bounds[1::2], strict=True):
        if least < lowest or most >= vocab:
            raise UserError(f"{what} range from {least} to {most}: keep them between {lowest} and {vocab - 1}")


def check_support_size(k: int, vocab: int) -> None:
    """Errors: ``UserError`` where K is not between 1 and the vocabulary."""
    if k < 1:
        raise UserError(f"distillation.topk_logits_k={k} keeps no token: set it to at least 1")
    if k > vocab:
        raise UserError(f"distillation.topk_logits_k={k} exceeds the vocabulary ({vocab}): set it to at most {vocab}")


def check_topk(topk: TopK, rows: int, vocab: int) -> None:
    """Errors: ``UserError`` for shapes that disagree with each other or with ``rows``, and for ids out of range."""
    shapes = [tuple(tensor.shape) for tensor in (topk.ids_NK, topk.logprobs_NK, topk.log_tail_N)]
    if topk.ids_NK.ndim != 2 or shapes != [shapes[0], shapes[0], shapes[0][:1]]:
        raise UserError(f"the teacher's ids, log-probs and log tail have shapes {shapes}: pass [N, K], [N, K] and [N]")
    if topk.entropy_N is not None and tuple(topk.entropy_N.shape) != shapes[2]:
        raise UserError(f"the teacher's entropy has shape {tuple(topk.entropy_N.shape)}: pass {shapes[2]}, or None")
    if shapes[0][0] != rows:
        raise UserError(f"the teacher's targets have {shapes[0][0]} rows but the student has {rows}: pass one per row")
    check_support_size(shapes[0][1], vocab)


def check_kept(topk: TopK, loss_config: LossConfig, sampled_ids_N: Tensor | None, weight_N: Tensor | None) -> None:
    """What the loss needs to find among a row's ids; rows of weight 0 may lack it.

    Errors: ``UserError`` for a sampled token that is not there under ``kl_type: sampled``, and for a row of padding
    alone where nothing stands for the other tokens.
    """
    if loss_config.kl_type == "sampled":
        assert sampled_ids_N is not None
        lacking_N = ~(topk.ids_NK == sampled_ids_N.unsqueeze(1)).any(dim=1)
    elif loss_config.outside != "bucket":
        lacking_N = (topk.ids_NK < 0).all(dim=1)
    else:
        return
    if weight_N is not None:
        lacking_N &= weight_N != 0
    rows = lacking_N.nonzero()
    if not len(rows):
        return
    row = int(rows[0])
    if loss_config.kl_type == "sampled":
        assert sampled_ids_N is not None
        token = int(sampled_ids_N[row])
        raise UserError(f"row {row} sampled the token {token}, which is not among the teacher's ids: add it there")
    raise UserError(
        f"row {row} of the teacher's ids holds padding alone, and loss_fn.outside_topk={loss_config.outside} compares "
        "nothing else: keep an id, or set loss_fn.outside_topk=bucket"
    )


def check_tokens(loss_config: LossConfig, given: bool) -> None:
    """Errors: ``UserError`` where the loss is about the sampled tokens and nobody passed them."""
    if loss_config.kl_type == "sampled" and not given:
        raise UserError("loss_fn.kl_type=sampled needs the sampled tokens: pass them, or set another kl_type")


def check_no_duplicates(ids_NK: Tensor) -> None:
    """Errors: ``UserError`` where a row keeps one id twice (-1 may repeat)."""
    sorted_NK = ids_NK.sort(dim=1).values
    twice = (sorted_NK[:, 1:] == sorted_NK[:, :-1]) & (sorted_NK[:, 1:] >= 0)
    if bool(twice.any()):
        row, place = (int(i) for i in twice.nonzero()[0])
        raise UserError(f"row {row} of the teacher's ids holds {int(sorted_NK[row, place])} twice: keep each id once")


def check_part(columns: int, ranks: int, vocab: int, teacher_rows: bool) -> None:
    """What a vocabulary-parallel head allows: decided from what all ranks know, so that all of them leave together.

    Errors: ``UserError`` for a rank without columns below ``vocab``, or ``TeacherRows``.
    """
    last = (ranks - 1) * -(-columns // ranks)
    if last >= vocab:
        raise UserError(
            f"the last of {ranks} parts of the head begins at column {last} of a vocabulary of {vocab}, so it has only "
            "padding: set a smaller policy.dtensor_cfg.tensor_parallel_size"
        )
    if teacher_rows:
        raise UserError(
            "loss_fn.support=student and distillation.topk_logits_k=0 are not made with a vocabulary-parallel head: "
            "set policy.dtensor_cfg.tensor_parallel_size=1, or the teacher's support"
        )
