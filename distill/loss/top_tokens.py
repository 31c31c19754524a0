"""Most likely tokens of student and teacher at a few response tokens, over the complete vocabulary.

A row is one response token. The loss itself does not need these tokens: they are shown to people.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.loss.columns import Columns, VocabParallel
from distill.loss.divergences import loss_temperature
from distill.loss.lm_head import padded_columns
from distill.loss.targets import TeacherScorer, chunk_buffers, default_chunk_rows, teacher_head, topk_in_chunks
from distill.loss.topk_reduction import Scratch
from distill.types import Targets, TeacherRows, TopK

TOP_TOKENS = 5
"""Number of tokens per row and model."""


@dataclass(frozen=True)
class LikelyTokens:
    """The most likely tokens of both models at M rows, most probable first, and of equal ones the lowest id first.

    K is ``TOP_TOKENS``. Index 0 of the second axis is the student, index 1 the teacher.
    """

    ids_M2K: Tensor
    """int64 [M, 2, K]: token ids; -1 is padding, if the vocabulary or the teacher's top-k has fewer than K ids."""
    probs_M2K: Tensor
    """float32 [M, 2, K]: probabilities over the full vocabulary at the loss's temperature; 0 for padding."""


@torch.no_grad()
def likely_tokens(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets: Targets,
    rows_M: Tensor,
    loss_config: LossConfig,
    *,
    topk_logits_k: int,
    chunk_rows: int | None = None,
    valid_vocab: int | None = None,
    parallel: VocabParallel | None = None,
) -> LikelyTokens:
    """Return the most likely tokens of student and teacher at the rows ``rows_M`` (int64, on the models' device).

    Collective over the group of ``parallel``: its ranks must pass the same rows. The logits are float32, also with
    ``loss_fn.logits_dtype=bfloat16``. The other arguments are those of ``fused_linear_kl``. At most two buffers of
    [C, V] exist at a time, with C rows in a chunk as in the loss. The loss of a chunk needs at least two of them too,
    so this function needs no more device memory than the loss.
    """
    columns, rows = Columns.of(head_VD, valid_vocab, parallel), len(rows_M)
    count, temperature = min(TOP_TOKENS, columns.vocab), loss_temperature(loss_config)
    step = chunk_rows or default_chunk_rows(hidden_ND, columns.per_rank, chunk_buffers(loss_config, topk_logits_k))

    def of(hidden_ND: Tensor, head_VD: Tensor) -> TopK:
        width = padded_columns(columns.own, len(head_VD))
        scratch = Scratch(min(rows, step), columns.own, width, hidden_ND.device)
        scorer = TeacherScorer.of(head_VD, columns, temperature, loss_config.backend, scratch)
        return topk_in_chunks(scorer, hidden_ND[rows_M], count, step)

    student = _first(of(hidden_ND, head_VD))
    if isinstance(targets, TeacherRows):
        teacher = _first(of(targets.hidden_ND, teacher_head(targets, columns)))
    else:  # a further column is the sampled token, which may be unlikely
        ids_MK, logprobs_MK = (part[rows_M, :topk_logits_k] for part in (targets.ids_NK, targets.logprobs_NK))
        teacher = _first(TopK(ids_MK, logprobs_MK, targets.log_tail_N[rows_M]))
    return LikelyTokens(*(torch.stack(pair, dim=1) for pair in zip(student, teacher, strict=True)))


def _first(topk: TopK) -> tuple[Tensor, Tensor]:
    """Return the ids and the probabilities of the ``TOP_TOKENS`` most likely tokens of ``topk``, in order."""
    ids_MK, order_MK = topk.ids_NK.long().sort(dim=1)
    logprobs_MK, likely_MK = topk.logprobs_NK.gather(1, order_MK).sort(dim=1, descending=True, stable=True)
    ids_MK, probs_MK = ids_MK.gather(1, likely_MK)[:, :TOP_TOKENS], logprobs_MK.exp().float()[:, :TOP_TOKENS]
    missing = (0, TOP_TOKENS - ids_MK.shape[1])
    return torch.nn.functional.pad(ids_MK, missing, value=-1), torch.nn.functional.pad(probs_MK, missing)
