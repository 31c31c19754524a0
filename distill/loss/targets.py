"""What the teacher says of a chunk of rows: handed over, or made beside the student's logits from its hidden rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.errors import UserError
from distill.loss import checks
from distill.loss.backend import Pass, choose_pass, divide
from distill.loss.divergences import entropy
from distill.loss.lm_head import Projection
from distill.loss.reduction import Scratch, combine
from distill.types import Targets, TeacherRows, TopK

_MIB = 2**20

Rows = slice | Tensor
"""Which rows a chunk holds: a slice, or their numbers where some rows are left out."""


@torch.no_grad()
def teacher_topk(
    hidden_ND: Tensor,
    head_VD: Tensor,
    k: int,
    temperature: float,
    chunk_rows: int | None = None,
    valid_vocab: int | None = None,
    extra_ids_N: Tensor | None = None,
    backend: str = "auto",
) -> TopK:
    """The teacher's k most likely tokens of each row, exactly, with log tail mass and entropy; no gradient.

    Args:
        hidden_ND: the teacher's hidden rows, after its last norm; of the head's dtype.
        head_VD: its head.
        k: kept ids; the whole vocabulary leaves an empty tail (log mass -inf).
        temperature: the loss's temperature; the student's logits are divided by the same.
        chunk_rows: rows of logits held at once; None: ``default_chunk_rows``.
        valid_vocab: columns from here on are padding and never kept.
        extra_ids_N: one more id that each row keeps, the sampled token: one more column, -1 where it is among the k
            (no more column where k is the complete vocabulary).
        backend: as ``loss_fn.backend``.

    Returns:
        ids int32 in no order, ties at the edge decided by the backend; log-probs (over the full vocabulary), log tail
        and entropy in float32 (float64 with a float64 head).

    Errors: ``UserError`` where k exceeds the vocabulary or the shapes disagree.
    """
    vocab = checks.check_vocab(head_VD.shape[0], valid_vocab)
    checks.check_linear("the teacher's", hidden_ND, head_VD, vocab)
    checks.check_support_size(k, vocab)
    checks.check_temperature(temperature)
    count, step = hidden_ND.shape[0], chunk_rows or default_chunk_rows(hidden_ND, vocab)
    if extra_ids_N is not None:
        checks.check_rows(count, extra_ids_N=extra_ids_N)
        checks.check_ids(vocab, sampled_ids_N=extra_ids_N)
    scratch = Scratch(min(count, step), vocab, hidden_ND.device)
    scorer = Scorer.of(head_VD[:vocab], temperature, backend, scratch)
    chunks = []
    for start in range(0, max(count, 1), step):
        rows = slice(start, start + step)
        chunks.append(scorer.topk(hidden_ND[rows], k, None if extra_ids_N is None else extra_ids_N[rows]))
    return TopK(
        torch.cat([chunk.ids_NK for chunk in chunks]),
        torch.cat([chunk.logprobs_NK for chunk in chunks]),
        torch.cat([chunk.log_tail_N for chunk in chunks]),
        torch.cat([chunk.entropy_N for chunk in chunks if chunk.entropy_N is not None]),
    )


@dataclass(frozen=True)
class Scorer:
    """The teacher's head at work, chunk by chunk. Its logits are never rounded, whatever ``loss_fn.logits_dtype``."""

    head: Projection
    temperature: float
    way: Pass
    scratch: Scratch
    buffer: str
    """The name of the scratch's buffer that takes the teacher's logits."""

    @classmethod
    def of(cls, head_VD: Tensor, temperature: float, backend: str, scratch: Scratch, buffer: str = "logits") -> Scorer:
        """A scorer whose logits go to the scratch's ``buffer``."""
        head = Projection(head_VD)
        return cls(head, temperature, choose_pass(backend, head_VD.device, head.dtype), scratch, buffer)

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """[C, V], float32 or float64, not divided by the temperature."""
        return self.head.logits(hidden_CD, self.scratch.get(self.buffer, len(hidden_CD), self.head.dtype))

    def topk(self, hidden_CD: Tensor, k: int, also_C: Tensor | None) -> TopK:
        """The chunk's likeliest tokens, and the one of each row that ``also_C`` names."""
        z_CV = self.logits(hidden_CD)
        if also_C is None and (found := self.way.topk_with_tail(z_CV, k, self.temperature)) is not None:
            return found
        return self.of_ids(z_CV, with_also(self.way.topk(z_CV, k), also_C, z_CV.shape[1]))[0]

    def of_ids(self, z_CV: Tensor, ids_CK: Tensor) -> tuple[TopK, Tensor]:
        """What the logits say of these ids, and bool [C, K]: which of them no token outlikes. Overwrites the logits."""
        reduced = self.way.reduce(z_CV, ids_CK, self.temperature, self.scratch, self.head.head_VD.dtype)
        combined, _ = combine(reduced.partial, ids_CK, ids_CK, reduced.partial.logits_CK[:, :0], None)
        log_masses_CE = combined.outcomes.log_masses_NE()
        topk = TopK(ids_CK.int(), log_masses_CE[:, :-1], log_masses_CE[:, -1], entropy(combined.outcomes))
        return topk, combined.outcomes.logits_NK >= 0

    def whole(self, hidden_CD: Tensor) -> Tensor:
        """[C, V] over the temperature."""
        z_CV = self.logits(hidden_CD)
        divide(z_CV, self.temperature)
        return z_CV


def with_also(ids_CK: Tensor, also_C: Tensor | None, vocab: int) -> Tensor:
    """The ids with one more column: what ``also_C`` names, -1 where it is there already."""
    if also_C is None or ids_CK.shape[1] == vocab:
        return ids_CK
    also_C1 = also_C.to(ids_CK.dtype).unsqueeze(1)
    return torch.cat([ids_CK, also_C1.masked_fill((ids_CK == also_C1).any(dim=1, keepdim=True), -1)], dim=1)


@dataclass(frozen=True)
class ChunkTargets:
    """Where a chunk of the student finds its targets; exactly one of the three ways is there."""

    ready: Callable[[Rows], TopK] | None = None
    """The teacher's support: the targets don't depend on the student."""
    of_students: Callable[[Rows, Tensor], tuple[TopK, Tensor]] | None = None
    """The student's support: targets, and which ids are the teacher's favourites, from the student's logits."""
    whole: Callable[[Rows], Tensor] | None = None
    """The whole vocabulary: the teacher's logits over the temperature."""


def targets_by_chunk(
    targets: Targets,
    loss_config: LossConfig,
    temperature: float,
    rows: int,
    vocab: int,
    k: int | None,
    sampled_ids_N: Tensor | None,
    weight_N: Tensor,
    way: Pass,
    scratch: Scratch,
    debug: bool,
) -> ChunkTargets:
    """Check the targets and say how a chunk gets its own; whatever has to wait for the device waits here, once a pass.

    ``sampled_ids_N`` are checked too, and kept among the ids that are made here if the loss is about them.
    """
    extra_ids_N = sampled_ids_N if loss_config.kl_type == "sampled" else None
    if isinstance(targets, TeacherRows):
        checks.check_ids(vocab, sampled_ids_N=sampled_ids_N)
    if isinstance(targets, TeacherRows):
        return _teacher_by_chunk(targets, loss_config, temperature, rows, vocab, k, extra_ids_N, way, scratch)
    if loss_config.support == "student":
        raise UserError(
            "loss_fn.support=student has the teacher score the student's tokens, but its targets are a finished top-k: "
            "pass TeacherRows"
        )
    checks.check_topk(targets, rows, vocab)
    checks.check_ids(vocab, targets.ids_NK, sampled_ids_N)
    checks.check_kept(targets, loss_config, sampled_ids_N, weight_N)
    if debug:
        checks.check_no_duplicates(targets.ids_NK)
    entropy_N = targets.entropy_N
    return ChunkTargets(
        ready=lambda chunk: TopK(
            targets.ids_NK[chunk],
            targets.logprobs_NK[chunk],
            targets.log_tail_N[chunk],
            None if entropy_N is None else entropy_N[chunk],
        )
    )


def _teacher_by_chunk(
    targets: TeacherRows,
    loss_config: LossConfig,
    temperature: float,
    rows: int,
    vocab: int,
    k: int | None,
    extra_ids_N: Tensor | None,
    way: Pass,
    scratch: Scratch,
) -> ChunkTargets:
    if k is None:
        raise UserError("topk_logits_k is missing beside the teacher's hidden rows: pass it (0: the whole vocabulary)")
    checks.check_linear("the teacher's", targets.hidden_ND, targets.head_VD, vocab)
    checks.check_rows(rows, teacher_hidden_ND=targets.hidden_ND)
    if k != 0:
        checks.check_support_size(k, vocab)
    hidden_ND = targets.hidden_ND
    # Where the student's logits must wait for the teacher's, each needs a buffer; else the two take turns in one.
    buffer = "teacher's logits" if k == 0 or loss_config.support == "student" else "logits"
    scorer = Scorer.of(targets.head_VD[:vocab], temperature, loss_config.backend, scratch, buffer)

    def also(chunk: Rows) -> Tensor | None:
        return None if extra_ids_N is None else extra_ids_N[chunk]

    def of_students(chunk: Rows, student_CV: Tensor) -> tuple[TopK, Tensor]:
        ids_CK = with_also(way.topk(student_CV, k), also(chunk), vocab)
        return scorer.of_ids(scorer.logits(hidden_ND[chunk]), ids_CK)

    if k == 0:
        return ChunkTargets(whole=lambda chunk: scorer.whole(hidden_ND[chunk]))
    if loss_config.support == "student":
        return ChunkTargets(of_students=of_students)
    return ChunkTargets(ready=lambda chunk: scorer.topk(hidden_ND[chunk], k, also(chunk)))


def chunk_buffers(loss_config: LossConfig, k: int | None) -> int:
    """How many [C, V] a chunk of the student's loop holds, where ``k`` ids are kept (None: a ``TopK``'s)."""
    return 4 if k == 0 else 3 if loss_config.support == "student" else 2


def default_chunk_rows(hidden_ND: Tensor, vocab: int, buffers: int = 2) -> int:
    """Rows of logits held at once where nobody says: see ``rows_within_budget``."""
    return rows_within_budget(hidden_ND.is_cuda, vocab, buffers, max(hidden_ND.element_size(), 4))


def rows_within_budget(cuda: bool, vocab: int, buffers: int = 2, element: int = 4) -> int:
    """C such that ``buffers`` of [C, V] with ``element`` bytes a logit stay within the device's budget.

    On CUDA 2048 rows of 151,936 logits fit, on a CPU 256 rows of 49,152. More would be no faster, far fewer would read
    and write the head and its gradient too often.
    """
    most, budget = (2048, 2560 * _MIB) if cuda else (256, 96 * _MIB)
    return max(16, min(most, budget // (buffers * vocab * element) // 16 * 16))
