"""Argument checks of the loss, made before any computation.

Each function raises ``UserError`` with the offending key and value.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.config.rules import check_jsd
from distill.errors import UserError, any_of
from distill.types import TopK

FLOOR_KL_TYPES = ("forward", "reverse", "mixed", "sampled")
"""Values of ``loss_fn.kl_type`` that can be combined with ``outside_topk: floor``."""


@cache
def _choices() -> dict[str, tuple[Any, ...]]:
    """Return the allowed values of each ``LossConfig`` field with a Literal type, by field name."""

    def words(hint: Any) -> tuple[Any, ...]:
        return get_args(hint) if get_origin(hint) is Literal else sum(map(words, get_args(hint)), ())

    return {name: found for name, hint in get_type_hints(LossConfig).items() if (found := words(hint))}


def check_loss(loss_config: LossConfig) -> None:
    """Raise ``UserError`` if a setting of the loss is unknown or out of range.

    The configuration loader makes the same checks for recipes. This function is for a ``LossConfig`` built in Python.
    """
    for name, words in _choices().items():
        value = getattr(loss_config, name)
        if value is not None and value not in words:
            problem = f"loss_fn.{name}={value} is not a possible value"
            raise UserError(problem, f"set it to {any_of(words)}", key=f"loss_fn.{name}", value=value)
    weight = loss_config.mixed_kl_weight
    if not 0 <= weight <= 1:
        problem = f"loss_fn.mixed_kl_weight={weight} is out of range"
        raise UserError(problem, "set it to a number from 0 to 1", key="loss_fn.mixed_kl_weight", value=weight)
    for name in ("token_kl_cap", "importance_ratio_cap"):
        cap = getattr(loss_config, name)
        if cap is not None and not cap > 0:
            problem = f"loss_fn.{name}={cap} is not a positive number"
            raise UserError(problem, "set it above 0", key=f"loss_fn.{name}", value=cap)
    if loss_config.outside == "floor" and loss_config.kl_type not in FLOOR_KL_TYPES:
        raise UserError(
            "loss_fn.outside_topk=floor (or loss_fn.zero_outside_topk=true) does not work with "
            f"loss_fn.kl_type={loss_config.kl_type}",
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
        problem = f"the student's logits have shape {shape}"
        raise UserError(problem, "pass a matrix of shape [N, V]", key="logits_NV", value=shape)


def check_vocab(columns: int, valid_vocab: int | None) -> int:
    """Return the number of vocabulary columns without padding.

    It is ``valid_vocab``, or ``columns`` if ``valid_vocab`` is None. Raises ``UserError`` if ``valid_vocab`` is not
    between 1 and ``columns``.
    """
    if valid_vocab is None:
        return columns
    if not 1 <= valid_vocab <= columns:
        problem = f"valid_vocab={valid_vocab} is out of range for an LM head of {columns} tokens"
        raise UserError(problem, f"pass a number from 1 to {columns}", key="valid_vocab", value=valid_vocab)
    return valid_vocab


def check_linear(owner: str, hidden_ND: Tensor, head_VD: Tensor, vocab: int) -> None:
    """Raise ``UserError`` if shapes or dtypes of hidden states and LM head do not match.

    The head needs at least ``vocab`` rows. ``owner`` names the model in the message, such as "the student's".
    """
    if hidden_ND.ndim != 2 or head_VD.ndim != 2 or hidden_ND.shape[1] != head_VD.shape[1]:
        shapes = tuple(hidden_ND.shape), tuple(head_VD.shape)
        problem = f"{owner} hidden states and LM head have shapes {shapes[0]} and {shapes[1]}"
        raise UserError(problem, "pass shapes [N, D] and [V, D]", key="head_VD", value=shapes)
    if hidden_ND.dtype != head_VD.dtype:
        problem = f"{owner} hidden states are {hidden_ND.dtype} but the LM head is {head_VD.dtype}"
        raise UserError(problem, "convert both to the same dtype", key="head_VD", value=head_VD.dtype)
    if head_VD.shape[0] < vocab:
        problem = f"{owner} LM head has {head_VD.shape[0]} rows for a vocabulary of {vocab} tokens"
        raise UserError(problem, "pass the smaller number as valid_vocab", key="head_VD", value=head_VD.shape[0])


def check_rows(rows: int, **columns: Tensor) -> None:
    """Raise ``UserError`` if one of the named tensors does not have ``rows`` entries."""
    for name, column in columns.items():
        if column.shape[:1] != (rows,) or (column.ndim != 1 and not name.endswith("_ND")):
            shape = tuple(column.shape)
            problem = f"{name} has shape {shape} but the student has {rows} rows"
            raise UserError(problem, f"pass {rows} entries, one per row", key=name, value=shape)


def check_ids(vocab: int, topk_ids_NK: Tensor | None = None, sampled_ids_N: Tensor | None = None) -> None:
    """Raise ``UserError`` if an id is not an integer between 0 and ``vocab`` - 1.

    ``topk_ids_NK`` may also contain -1 (padding). The function waits for the device at most once.
    """
    named = [
        (name, what, lowest, ids)
        for name, what, lowest, ids in (
            ("topk.ids_NK", "the teacher's ids", -1, topk_ids_NK),
            ("sampled_ids_N", "the sampled ids", 0, sampled_ids_N),
        )
        if ids is not None and ids.numel()
    ]
    for name, what, _, ids in named:
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise UserError(f"{what} are {ids.dtype}", "convert them to int32 or int64", key=name, value=ids.dtype)
    if not named:
        return
    bounds = torch.stack([bound.long() for *_, ids in named for bound in ids.aminmax()]).tolist()
    for (name, what, lowest, _), least, most in zip(named, bounds[::2], bounds[1::2], strict=True):
        if least < lowest or most >= vocab:
            problem = f"{what} range from {least} to {most}, outside the vocabulary of {vocab} tokens"
            fix = f"pass ids from {'-1 (padding)' if lowest < 0 else lowest} to {vocab - 1}"
            raise UserError(problem, fix, key=name, value=(least, most))


def check_support_size(k: int, vocab: int) -> None:
    """Raise ``UserError`` if ``k``, the number of kept ids, is not between 1 and ``vocab``."""
    key = "distillation.topk_logits_k"
    if k < 1:
        raise UserError(f"{key}={k} is out of range", "set it to at least 1", key=key, value=k)
    if k > vocab:
        problem = f"{key}={k} exceeds the vocabulary of {vocab} tokens"
        raise UserError(problem, f"set it to at most {vocab}", key=key, value=k)


def check_topk(topk: TopK, rows: int, vocab: int) -> None:
    """Raise ``UserError`` if the shapes of the targets do not match, or K exceeds the vocabulary.

    ``rows`` is the student's number of rows.
    """
    shapes = [tuple(tensor.shape) for tensor in (topk.ids_NK, topk.logprobs_NK, topk.log_tail_N)]
    if topk.ids_NK.ndim != 2 or shapes != [shapes[0], shapes[0], shapes[0][:1]]:
        problem = f"the teacher's ids, log-probs and log tail have shapes {shapes}"
        raise UserError(problem, "pass shapes [N, K], [N, K] and [N]", key="topk", value=shapes)
    if topk.entropy_N is not None and tuple(topk.entropy_N.shape) != shapes[2]:
        shape = tuple(topk.entropy_N.shape)
        problem = f"the teacher's entropy has shape {shape}"
        raise UserError(problem, f"pass shape {shapes[2]}, or None", key="topk.entropy_N", value=shape)
    if shapes[0][0] != rows:
        problem = f"the teacher's targets have {shapes[0][0]} rows but the student has {rows}"
        raise UserError(problem, f"pass targets for {rows} rows", key="topk", value=shapes[0][0])
    check_support_size(shapes[0][1], vocab)


def check_kept(
    topk: TopK,
    loss_config: LossConfig,
    sampled_ids_N: Tensor | None,
    weight_N: Tensor | None,
) -> None:
    """Raise ``UserError`` if the kept ids of a row do not include an id that the loss needs.

    ``kl_type: sampled`` needs the sampled token. The other losses need at least one id that is not padding, except with
    ``outside_topk: bucket``. Rows of weight 0 are not checked; ``weight_N: None``
    means that no row has weight 0.
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
        raise UserError(problem, "add the sampled token to the ids", key="topk.ids_NK", value=(row, token))
    raise UserError(
        f"row {row} of the teacher's ids contains only padding, but loss_fn.outside_topk={loss_config.outside} "
        "needs at least one id per row",
        "add an id, or set loss_fn.outside_topk=bucket",
        key="topk.ids_NK",
        value=row,
    )


def check_tokens(loss_config: LossConfig, given: bool) -> None:
    """Raise ``UserError`` if the loss needs the sampled tokens, but they are not ``given``."""
    if loss_config.kl_type == "sampled" and not given:
        problem = "loss_fn.kl_type=sampled needs the sampled tokens, which are missing"
        fix = "pass the sampled tokens, or set another loss_fn.kl_type"
        raise UserError(problem, fix, key="loss_fn.kl_type", value="sampled")


def check_no_duplicates(ids_NK: Tensor) -> None:
    """Raise ``UserError`` if a row contains an id more than once; -1 (padding) may repeat."""
    sorted_NK = ids_NK.sort(dim=1).values
    twice = (sorted_NK[:, 1:] == sorted_NK[:, :-1]) & (sorted_NK[:, 1:] >= 0)
    if bool(twice.any()):
        row, column = (int(i) for i in twice.nonzero()[0])
        token = int(sorted_NK[row, column])
        problem = f"row {row} of the teacher's ids contains token {token} more than once"
        raise UserError(problem, "pass each id once per row", key="topk.ids_NK", value=(row, token))


def check_vocab_parallel(columns: int, ranks: int, vocab: int, teacher_rows: bool) -> None:
    """Raise ``UserError`` if the loss does not support a vocabulary-parallel head of this size.

    Every rank needs at least one vocabulary column that is not padding, and targets of type ``TeacherRows`` are not
    supported. All arguments are equal on all ranks, so all ranks raise together.
    """
    key = "policy.dtensor_cfg.tensor_parallel_size"
    last = (ranks - 1) * -(-columns // ranks)
    if last >= vocab:
        problem = f"{key}={ranks} leaves the last rank without a share of the {vocab} tokens of the vocabulary"
        raise UserError(problem, "set a smaller size", key=key, value=ranks)
    if teacher_rows:
        problem = f"{key}={ranks} does not work with loss_fn.support=student or distillation.topk_logits_k=0"
        fix = "set the size to 1, or set loss_fn.support=teacher and distillation.topk_logits_k above 0"
        raise UserError(problem, fix, key=key, value=ranks)
