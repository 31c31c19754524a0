"""Checks of the loss's arguments before it computes anything; each raises ``UserError`` with the offending value."""

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

FLOOR_KL_TYPES = ("forward", "reverse", "mixed", "sampled")
"""Values of ``kl_type`` that work with ``outside_topk: floor``."""


@cache
def _choices() -> dict[str, tuple[Any, ...]]:
    """Allowed words of each ``LossConfig`` field that is a Literal."""

    def words(hint: Any) -> tuple[Any, ...]:
        return get_args(hint) if get_origin(hint) is Literal else sum(map(words, get_args(hint)), ())

    return {name: found for name, hint in get_type_hints(LossConfig).items() if (found := words(hint))}


def check_loss(loss_config: LossConfig) -> None:
    """Raise ``UserError`` for unknown words and numbers out of range in the loss configuration.

    A recipe passes the same checks when it is read; this one is for a ``LossConfig`` made in Python.
    """
    for name, words in _choices().items():
        value = getattr(loss_config, name)
        if value is not None and value not in words:
            problem = f"loss_fn.{name}={value} is unknown"
            raise UserError(
                problem,
                f"set one of {', '.join(words)}",
                key=f"loss_fn.{name}",
                value=value,
            )
    weight = loss_config.mixed_kl_weight
    if not 0 <= weight <= 1:
        problem = f"loss_fn.mixed_kl_weight={weight} is not between 0 and 1"
        raise UserError(problem, "set it from 0 to 1", key="loss_fn.mixed_kl_weight", value=weight)
    for name in ("token_kl_cap", "importance_ratio_cap"):
        cap = getattr(loss_config, name)
        if cap is not None and not cap > 0:
            problem = f"loss_fn.{name}={cap} would reverse or remove gradients"
            raise UserError(problem, "set it above 0", key=f"loss_fn.{name}", value=cap)
    if loss_config.outside == "floor" and loss_config.kl_type not in FLOOR_KL_TYPES:
        raise UserError(
            f"loss_fn.outside_topk=floor (or zero_outside_topk=true) does not work with kl_type={loss_config.kl_type}",
            "set loss_fn.outside_topk=bucket",
            key="loss_fn.outside_topk",
            value="floor",
        )
    check_jsd(loss_config)


def check_temperature(temperature: float, key: str = "loss_fn.temperature", remedy: str = ", or to null") -> None:
    """Raise ``UserError`` if the temperature is not a finite number above 0."""
    if not 0 < temperature < math.inf:
        problem = f"{key}={temperature} is not a positive number"
        raise UserError(problem, f"set it above 0{remedy}", key=key, value=temperature)


def check_logits(logits_NV: Tensor) -> None:
    """Raise ``UserError`` if the logits are not a matrix."""
    if logits_NV.ndim != 2:
        shape = tuple(logits_NV.shape)
        raise UserError(
            f"the student's logits have shape {shape}",
            "pass [N, V]",
            key="logits_NV",
            value=shape,
        )


def check_vocab(columns: int, valid_vocab: int | None) -> int:
    """Return the number of real columns; raise ``UserError`` if ``valid_vocab`` is not from 1 to ``columns``."""
    if valid_vocab is None:
        return columns
    if not 1 <= valid_vocab <= columns:
        problem = f"valid_vocab={valid_vocab} is not between 1 and the {columns} columns of the head"
        raise UserError(problem, f"pass at most {columns}", key="valid_vocab", value=valid_vocab)
    return valid_vocab


def check_linear(whose: str, hidden_ND: Tensor, head_VD: Tensor, vocab: int) -> None:
    """Raise ``UserError`` if hidden rows and head differ in width or dtype, or the head has too few rows."""
    if hidden_ND.ndim != 2 or head_VD.ndim != 2 or hidden_ND.shape[1] != head_VD.shape[1]:
        shapes = tuple(hidden_ND.shape), tuple(head_VD.shape)
        problem = f"{whose} hidden rows and head have shapes {shapes[0]} and {shapes[1]}"
        raise UserError(problem, "pass [N, D] and [V, D]", key="head_VD", value=shapes)
    if hidden_ND.dtype != head_VD.dtype:
        problem = f"{whose} hidden rows are {hidden_ND.dtype} but the head is {head_VD.dtype}"
        raise UserError(problem, "cast one of them", key="head_VD", value=head_VD.dtype)
    if head_VD.shape[0] < vocab:
        problem = f"{whose} head has {head_VD.shape[0]} rows for a vocabulary of {vocab}"
        raise UserError(problem, "pass valid_vocab", key="head_VD", value=head_VD.shape[0])


def check_rows(rows: int, **columns: Tensor) -> None:
    """Raise ``UserError`` if one of the named tensors does not have one entry per row."""
    for name, column in columns.items():
        if column.shape[:1] != (rows,) or (column.ndim != 1 and not name.endswith("_ND")):
            shape = tuple(column.shape)
            problem = f"{name} has shape {shape} but the student has {rows} rows"
            raise UserError(problem, "pass one entry per row", key=name, value=shape)


def check_ids(vocab: int, topk_ids_NK: Tensor | None = None, sampled_ids_N: Tensor | None = None) -> None:
    """Raise ``UserError`` if an id is not an integer from 0 (from -1, padding, in a top-k) to below ``vocab``.

    Waits for the device once, however many ids there are.
    """
    named = [
        (name, what, lowest, ids)
        for name, what, lowest, ids in (
            ("topk.ids_NK", "the teacher's ids (-1 is padding)", -1, topk_ids_NK),
            ("sampled_ids_N", "the sampled ids", 0, sampled_ids_N),
        )
        if ids is not None and ids.numel()
    ]
    for name, what, _, ids in named:
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise UserError(
                f"{what} are {ids.dtype}",
                "pass int32 or int64",
                key=name,
                value=ids.dtype,
            )
    if not named:
        return
    bounds = torch.stack([bound.long() for *_, ids in named for bound in ids.aminmax()]).tolist()
    for (name, what, lowest, _), least, most in zip(named, bounds[::2], bounds[1::2], strict=True):
        if least < lowest or most >= vocab:
            problem = f"{what} range from {least} to {most}"
            raise UserError(
                problem,
                f"keep them between {lowest} and {vocab - 1}",
                key=name,
                value=(least, most),
            )


def check_support_size(k: int, vocab: int) -> None:
    """Raise ``UserError`` if K is not between 1 and the vocabulary size."""
    key = "distillation.topk_logits_k"
    if k < 1:
        raise UserError(f"{key}={k} keeps no token", "set it to at least 1", key=key, value=k)
    if k > vocab:
        raise UserError(
            f"{key}={k} exceeds the vocabulary of {vocab} tokens",
            f"set it to at most {vocab}",
            key,
            k,
        )


def check_topk(topk: TopK, rows: int, vocab: int) -> None:
    """Raise ``UserError`` if the targets' shapes do not match each other or ``rows``, or K exceeds the vocabulary."""
    shapes = [tuple(tensor.shape) for tensor in (topk.ids_NK, topk.logprobs_NK, topk.log_tail_N)]
    if topk.ids_NK.ndim != 2 or shapes != [shapes[0], shapes[0], shapes[0][:1]]:
        problem = f"the teacher's ids, log-probs and log tail have shapes {shapes}"
        raise UserError(problem, "pass [N, K], [N, K] and [N]", key="topk", value=shapes)
    if topk.entropy_N is not None and tuple(topk.entropy_N.shape) != shapes[2]:
        shape = tuple(topk.entropy_N.shape)
        problem = f"the teacher's entropy has shape {shape}"
        raise UserError(problem, f"pass {shapes[2]}, or None", key="topk.entropy_N", value=shape)
    if shapes[0][0] != rows:
        problem = f"the teacher's targets have {shapes[0][0]} rows but the student has {rows}"
        raise UserError(problem, "pass one entry per row", key="topk", value=shapes[0][0])
    check_support_size(shapes[0][1], vocab)


def check_kept(
    topk: TopK,
    loss_config: LossConfig,
    sampled_ids_N: Tensor | None,
    weight_N: Tensor | None,
) -> None:
    """Raise ``UserError`` if a row of weight other than 0 lacks an id that the loss needs.

    ``kl_type: sampled`` needs the sampled token. Without a bucket for the other tokens a row needs at least one id.
    """
    if loss_config.kl_type == "sampled":
        assert sampled_ids_N is not None
        missing_N = ~(topk.ids_NK == sampled_ids_N.unsqueeze(1)).any(dim=1)
    elif loss_config.outside != "bucket":
        missing_N = (topk.ids_NK < 0).all(dim=1)
    else:
        return
    if weight_N is not None:
        missing_N &= weight_N != 0
    rows = missing_N.nonzero()
    if not len(rows):
        return
    row = int(rows[0])
    if loss_config.kl_type == "sampled":
        assert sampled_ids_N is not None
        token = int(sampled_ids_N[row])
        problem = f"row {row}: the sampled token {token} is not among the teacher's ids"
        raise UserError(problem, "keep the sampled token too", key="topk.ids_NK", value=(row, token))
    raise UserError(
        f"row {row} of the teacher's ids has only padding, and loss_fn.outside_topk={loss_config.outside} compares "
        "nothing outside the ids",
        "keep at least one id, or set loss_fn.outside_topk=bucket",
        key="topk.ids_NK",
        value=row,
    )


def check_tokens(loss_config: LossConfig, given: bool) -> None:
    """Raise ``UserError`` if the loss compares the sampled tokens and they are not ``given``."""
    if loss_config.kl_type == "sampled" and not given:
        problem = "loss_fn.kl_type=sampled needs the sampled tokens, which are missing"
        raise UserError(
            problem,
            "pass them, or set another kl_type",
            key="loss_fn.kl_type",
            value="sampled",
        )


def check_no_duplicates(ids_NK: Tensor) -> None:
    """Raise ``UserError`` if a row keeps one id twice; -1 may repeat."""
    sorted_NK = ids_NK.sort(dim=1).values
    twice = (sorted_NK[:, 1:] == sorted_NK[:, :-1]) & (sorted_NK[:, 1:] >= 0)
    if bool(twice.any()):
        row, column = (int(i) for i in twice.nonzero()[0])
        token = int(sorted_NK[row, column])
        problem = f"row {row} of the teacher's ids has {token} twice"
        raise UserError(problem, "keep each id once", key="topk.ids_NK", value=(row, token))


def check_part(columns: int, ranks: int, vocab: int, teacher_rows: bool) -> None:
    """Raise ``UserError`` if a vocabulary-parallel head cannot compute the loss.

    Depends only on values that all ranks share, so that all of them raise together. Refused are ``TeacherRows``, and a
    rank without columns below ``vocab``.
    """
    key = "policy.dtensor_cfg.tensor_parallel_size"
    last = (ranks - 1) * -(-columns // ranks)
    if last >= vocab:
        raise UserError(
            f"{key}={ranks} leaves the last rank only padding: its columns begin at {last} of {vocab} tokens",
            "set a smaller size",
            key=key,
            value=ranks,
        )
    if teacher_rows:
        raise UserError(
            f"{key}={ranks} does not support loss_fn.support=student or distillation.topk_logits_k=0",
            "set the size to 1, or use the teacher's top-k",
            key=key,
            value=ranks,
        )
