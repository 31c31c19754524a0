"""Checks of the arguments of the distillation loss, made before any computation.

A row is one response token. The kept ids of a row are the K token ids of its top-k. Each check raises ``UserError``
with the name and the value of the invalid setting or argument.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.config.divergence_rules import check_divergence
from distill.errors import UserError, any_of
from distill.types import TopK


@cache
def _choices() -> dict[str, tuple[Any, ...]]:
    """Return a dict from the name of a ``LossConfig`` field to its allowed values, for each Literal field."""

    def words(hint: Any) -> tuple[Any, ...]:
        return get_args(hint) if get_origin(hint) is Literal else sum(map(words, get_args(hint)), ())

    return {name: found for name, hint in get_type_hints(LossConfig).items() if (found := words(hint))}


def check_loss(loss_config: LossConfig) -> None:
    """Raise ``UserError`` if a setting in ``loss_config`` is invalid, or two settings conflict.

    The configuration loader makes the same checks for configuration files. This function is for a ``LossConfig`` that
    is created in Python.
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
    for name in ("token_kl_cap", "importance_ratio_cap", "entry_clip"):
        cap = getattr(loss_config, name)
        if cap is not None and not cap > 0:
            problem = f"loss_fn.{name}={cap} is not above 0"
            raise UserError(problem, f"set loss_fn.{name} to a number above 0", key=f"loss_fn.{name}", value=cap)
    check_divergence(loss_config)


def check_temperature(temperature: float, key: str = "loss_fn.temperature", remedy: str = ", or to null") -> None:
    """Raise ``UserError`` if the temperature is not a finite number above 0.

    ``key`` is the configuration key that sets the temperature. ``remedy`` is text appended to the fix in the error.
    """
    if not 0 < temperature < math.inf:
        problem = f"{key}={temperature} is not a finite number above 0"
        raise UserError(problem, f"set {key} to a number above 0{remedy}", key=key, value=temperature)


def check_logits(logits_NV: Tensor) -> None:
    """Raise ``UserError`` if the student's logits are not a matrix [N, V]."""
    if logits_NV.ndim != 2:
        shape = tuple(logits_NV.shape)
        problem = f"logits_NV, the student's logits, has shape {shape}, but the loss needs a matrix"
        raise UserError(problem, "pass logits of shape [rows, vocabulary size]", key="logits_NV", value=shape)


def check_vocab(columns: int, valid_vocab: int | None) -> int:
    """Return the number of columns of logits that are tokens of the vocabulary, without padding columns.

    ``columns`` is the number of columns including padding. The result is ``valid_vocab``, or ``columns`` if
    ``valid_vocab`` is None. Raises ``UserError`` if ``valid_vocab`` is not between 1 and ``columns``.
    """
    if valid_vocab is None:
        return columns
    if not 1 <= valid_vocab <= columns:
        problem = f"valid_vocab={valid_vocab} is out of range for an LM head of {columns} tokens"
        raise UserError(problem, f"pass valid_vocab from 1 to {columns}", key="valid_vocab", value=valid_vocab)
    return valid_vocab


def check_linear(owner: str, hidden_ND: Tensor, head_VD: Tensor, vocab: int) -> None:
    """Raise ``UserError`` if a model's hidden states do not match its LM head in shape or dtype.

    Also raises if the head has fewer than ``vocab`` rows, where ``vocab`` is the size of the vocabulary. ``owner``
    names the model in the message: "the student's" or "the teacher's".
    """
    if hidden_ND.ndim != 2 or head_VD.ndim != 2 or hidden_ND.shape[1] != head_VD.shape[1]:
        shapes = tuple(hidden_ND.shape), tuple(head_VD.shape)
        problem = f"{owner} hidden states of shape {shapes[0]} do not match its LM head of shape {shapes[1]}"
        raise UserError(
            problem, "pass hidden states [N, D] and a head [V, D] with the same D", key="head_VD", value=shapes
        )
    if hidden_ND.dtype != head_VD.dtype:
        problem = f"{owner} hidden states have dtype {hidden_ND.dtype}, but its LM head has dtype {head_VD.dtype}"
        raise UserError(
            problem, "convert the hidden states to the dtype of the head", key="head_VD", value=head_VD.dtype
        )
    if head_VD.shape[0] < vocab:
        problem = f"{owner} LM head has {head_VD.shape[0]} rows, but the vocabulary has {vocab} tokens"
        raise UserError(
            problem, f"set valid_vocab to at most {head_VD.shape[0]}", key="head_VD", value=head_VD.shape[0]
        )


def check_rows(rows: int, **columns: Tensor) -> None:
    """Raise ``UserError`` if a tensor in ``columns`` does not have one entry per row.

    ``columns`` maps the name of each tensor to the tensor. ``rows`` is the number of rows of the student's hidden
    states or logits. A tensor whose name ends in ``_ND`` may have several dimensions; all other tensors must be 1-D.
    The error message contains the name of the tensor.
    """
    for name, column in columns.items():
        if column.shape[:1] != (rows,) or (column.ndim != 1 and not name.endswith("_ND")):
            shape = tuple(column.shape)
            problem = f"{name} has shape {shape}, but the student has {rows} rows (response tokens)"
            raise UserError(problem, f"pass {name} with {rows} entries, one per row", key=name, value=shape)


def check_mask(rows: int, name: str, mask_N: Tensor) -> None:
    """Raise ``UserError`` if ``mask_N``, the argument ``name``, is not a bool tensor with one entry per row."""
    check_rows(rows, **{name: mask_N})
    if mask_N.dtype != torch.bool:
        problem = f"{name}, a mask of rows, has dtype {mask_N.dtype}"
        raise UserError(problem, f"pass {name} as a bool tensor", key=name, value=mask_N.dtype)


def check_ids(vocab: int, topk_ids_NK: Tensor | None = None, sampled_ids_N: Tensor | None = None) -> None:
    """Raise ``UserError`` if a token id is not an integer between 0 and ``vocab`` - 1.

    ``topk_ids_NK`` may also contain -1 (padding). If the ids are on a GPU, the host waits for it: only the lowest and
    highest ids are copied to the host, in a single transfer.
    """
    named = [
        (name, what, lowest, ids)
        for name, what, lowest, ids in (
            ("topk.ids_NK", "the token ids of the teacher's top-k", -1, topk_ids_NK),
            ("sampled_ids_N", "the ids of the sampled tokens", 0, sampled_ids_N),
        )
        if ids is not None and ids.numel()
    ]
    for name, what, _, ids in named:
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise UserError(
                f"{what} have dtype {ids.dtype}", "convert them to int32 or int64", key=name, value=ids.dtype
            )
    if not named:
        return
    bounds = torch.stack([bound.long() for *_, ids in named for bound in ids.aminmax()]).tolist()
    for (name, what, lowest, _), least, most in zip(named, bounds[::2], bounds[1::2], strict=True):
        if least < lowest or most >= vocab:
            problem = f"{what} range from {least} to {most}, outside the vocabulary of {vocab} tokens"
            fix = f"pass ids from {'-1 (padding)' if lowest < 0 else lowest} to {vocab - 1}"
            raise UserError(problem, fix, key=name, value=(least, most))


def check_support_size(k: int, vocab: int) -> None:
    """Raise ``UserError`` if ``k``, the number of token ids in a top-k, is not between 1 and ``vocab``."""
    key = "distillation.topk_logits_k"
    if k < 1:
        raise UserError(f"{key}={k} is below 1", f"set {key} to at least 1", key=key, value=k)
    if k > vocab:
        problem = f"{key}={k} exceeds the vocabulary of {vocab} tokens"
        raise UserError(problem, f"set {key} to at most {vocab}", key=key, value=k)


def check_topk(topk: TopK, rows: int, vocab: int) -> None:
    """Raise ``UserError`` if the tensors of the teacher's top-k have wrong or inconsistent shapes.

    ``rows`` is the number of rows of the student's logits; the top-k must have the same number. K, the number of ids
    per row, must be from 1 to ``vocab``, the size of the vocabulary.
    """
    shapes = [tuple(tensor.shape) for tensor in (topk.ids_NK, topk.logprobs_NK, topk.log_tail_N)]
    if topk.ids_NK.ndim != 2 or shapes != [shapes[0], shapes[0], shapes[0][:1]]:
        problem = f"ids_NK, logprobs_NK and log_tail_N of the teacher's top-k have inconsistent shapes {shapes}"
        raise UserError(problem, "pass tensors of shapes [N, K], [N, K] and [N]", key="topk", value=shapes)
    for name in ("entropy_N", "sampled_logprob_N"):
        column_N = getattr(topk, name)
        if column_N is not None and tuple(column_N.shape) != shapes[2]:
            shape = tuple(column_N.shape)
            problem = f"{name} of the teacher's top-k has shape {shape}, but the top-k has {shapes[0][0]} rows"
            raise UserError(problem, f"pass a tensor of shape {shapes[2]}, or None", key=f"topk.{name}", value=shape)
    if shapes[0][0] != rows:
        problem = f"the teacher's top-k has {shapes[0][0]} rows, but the student has {rows} rows (response tokens)"
        raise UserError(problem, f"pass a top-k of {rows} rows", key="topk", value=shapes[0][0])
    check_support_size(shapes[0][1], vocab)


def check_kept(
    topk: TopK,
    loss_config: LossConfig,
    sampled_ids_N: Tensor | None,
    weight_N: Tensor | None,
) -> None:
    """Raise ``UserError`` if the teacher's top-k of a row lacks token ids that the loss requires.

    - ``loss_fn.kl_type=sampled``: the ids must include the sampled token of the row.
    - Other divergences with ``loss_fn.outside_topk=bucket``: no ids are required.
    - Other divergences with another ``loss_fn.outside_topk``: at least one id must be a token, not padding (-1).

    Rows of weight 0 are not checked; ``weight_N=None`` means that no row has weight 0.
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
        problem = f"the teacher's top-k does not contain the sampled token {token} of row {row}"
        raise UserError(
            problem, "pass a top-k that contains the sampled token of each row", key="topk.ids_NK", value=(row, token)
        )
    raise UserError(
        f"row {row} of the teacher's top-k contains only padding (-1), but loss_fn.outside_topk={loss_config.outside} "
        "needs at least one token id per row",
        "pass at least one token id for the row, or set loss_fn.outside_topk=bucket",
        key="topk.ids_NK",
        value=row,
    )


def check_tokens(loss_config: LossConfig, given: bool) -> None:
    """Raise ``UserError`` if ``loss_fn.kl_type=sampled`` is set, but ``given`` is False.

    ``given``: whether the caller of the loss passed the sampled tokens.
    """
    if loss_config.kl_type == "sampled" and not given:
        problem = "loss_fn.kl_type=sampled needs the sampled tokens, but the caller passed none"
        fix = "pass the sampled tokens, or set loss_fn.kl_type to another value"
        raise UserError(problem, fix, key="loss_fn.kl_type", value="sampled")


def check_no_duplicates(ids_NK: Tensor) -> None:
    """Raise ``UserError`` if a row of the teacher's top-k repeats a token id; -1 (padding) may repeat."""
    sorted_NK = ids_NK.sort(dim=1).values
    twice = (sorted_NK[:, 1:] == sorted_NK[:, :-1]) & (sorted_NK[:, 1:] >= 0)
    if bool(twice.any()):
        row, column = (int(i) for i in twice.nonzero()[0])
        token = int(sorted_NK[row, column])
        problem = f"row {row} of the teacher's top-k contains token id {token} more than once"
        raise UserError(problem, "pass distinct token ids in each row", key="topk.ids_NK", value=(row, token))


def check_vocab_parallel(columns: int, ranks: int, vocab: int) -> None:
    """Raise ``UserError`` if the loss cannot use an LM head sharded over ``ranks`` tensor-parallel ranks.

    ``columns`` is the number of columns of logits over all ranks, and ``vocab`` the number of these columns without
    padding. Every rank needs at least one column that is not padding. All arguments are equal on all ranks, so all
    ranks raise together.
    """
    key = "policy.dtensor_cfg.tensor_parallel_size"
    last = (ranks - 1) * -(-columns // ranks)
    if last >= vocab:
        problem = f"{key}={ranks} leaves no token for the last rank, because the vocabulary has only {vocab} tokens"
        raise UserError(problem, f"set {key} to a smaller number", key=key, value=ranks)
