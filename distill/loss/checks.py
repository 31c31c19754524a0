"""What the loss refuses before it computes: one sentence each, with the values."""

from __future__ import annotations

import math

from torch import Tensor

from distill.types import TopK, UserError


def check_temperature(temperature: float) -> None:
    """Errors: ``UserError`` where it is not a finite number above 0."""
    if not 0 < temperature < math.inf:
        raise UserError(f"loss_fn.temperature={temperature} is not a positive number: set it above 0, or to null")


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


def check_ids(what: str, ids: Tensor, lowest: int, vocab: int) -> None:
    """Errors: ``UserError`` where an id is below ``lowest`` or not below ``vocab``."""
    if ids.numel() == 0:
        return
    least, most = (int(bound) for bound in ids.aminmax())
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
    if shapes[0][0] != rows:
        raise UserError(f"the teacher's targets have {shapes[0][0]} rows but the student has {rows}: pass one per row")
    check_support_size(shapes[0][1], vocab)
    check_ids("the teacher's ids (-1 is padding)", topk.ids_NK, -1, vocab)


def check_no_duplicates(ids_NK: Tensor) -> None:
    """Errors: ``UserError`` where a row keeps one id twice (-1 may repeat)."""
    sorted_NK = ids_NK.sort(dim=1).values
    twice = (sorted_NK[:, 1:] == sorted_NK[:, :-1]) & (sorted_NK[:, 1:] >= 0)
    if bool(twice.any()):
        row, place = (int(i) for i in twice.nonzero()[0])
        raise UserError(f"row {row} of the teacher's ids holds {int(sorted_NK[row, place])} twice: keep each id once")


def check_part(own: int, first: int, vocab: int, teacher_rows: bool) -> None:
    """What a vocabulary-parallel head allows. Errors: ``UserError`` for a rank without columns, or ``TeacherRows``."""
    if own < 1:
        raise UserError(
            f"this rank's part of the head begins at column {first} of a vocabulary of {vocab}, so it has only "
            "padding: set a smaller tensor_parallel_size"
        )
    if teacher_rows:
        raise UserError(
            "loss_fn.support=student and distillation.topk_logits_k=0 are not made with a vocabulary-parallel head: "
            "set policy.dtensor_cfg.tensor_parallel_size=1, or the teacher's support"
        )
