"""Teacher targets of the loss (log-probs or logits), for each chunk of rows (response tokens).

The targets of a chunk are selected from a precomputed top-k, or computed from the teacher's hidden states and LM head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.errors import UserError
from distill.loss import checks, full_vocab
from distill.loss.columns import Columns, VocabParallel, own_logits
from distill.loss.divergences import entropy
from distill.loss.lm_head import Projection, padded_columns
from distill.loss.overlap import Overlap
from distill.loss.topk_reduction import (
    LogitsKernels,
    Rows,
    Scratch,
    choose_kernels,
    combine,
    divide,
)
from distill.types import Targets, TeacherRows, TopK, map_tensors

_MIB = 2**20


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
    check_values: bool = True,
    sampled_ids_N: Tensor | None = None,
    parallel: VocabParallel | None = None,
) -> TopK:
    """Return the teacher's exact top-k of each row, with log-probs, log tail mass and entropy.

    A row is one response token. The log tail mass is the log of the total probability of all other tokens. The result
    has no gradient. With ``parallel`` the function is collective over the group: all ranks must pass the same rows and
    ids, and get the result for the complete vocabulary. The numbers then may be rounded differently on each rank.

    Args:
        hidden_ND: the teacher's hidden states after the final norm, in the head's dtype.
        head_VD: the weight of the teacher's LM head; with ``parallel`` this rank's shard.
        k: number of ids to keep; if k is the vocabulary size, the tail is empty (log mass -inf).
        temperature: the temperature of the loss, by which the logits are divided.
        chunk_rows: number of rows with logits in memory at the same time; None means ``default_chunk_rows``.
        valid_vocab: number of columns of logits, not counting vocabulary padding; None means all columns. Padding
            columns are never kept.
        extra_ids_N: an additional id to keep in each row, such as the sampled token. It adds a column of ids, with -1
            if the id is already among the k ids. No column is added if k is the vocabulary size.
        backend: value of ``loss_fn.backend``.
        check_values: whether to check that the given ids are in the vocabulary; on a GPU the host waits for this.
        sampled_ids_N: the sampled token of each row, for ``TopK.sampled_logprob_N``; None: it is not computed. These
            ids are not added to the kept ids.
        parallel: sharding of the head over a group of ranks; None: the head is not sharded.

    Returns:
        The ids are int32 and unordered. If several logits equal the k-th largest, the lowest of their ids are kept.
        Log-probs over the full vocabulary, log tail mass and entropy are float32 (float64 with a float64 head).

    Raises ``UserError`` if k exceeds the vocabulary or the shapes do not match.
    """
    columns = Columns.of(head_VD, valid_vocab, parallel)
    checks.check_linear("the teacher's", hidden_ND, head_VD, columns.own)
    checks.check_support_size(k, columns.vocab)
    checks.check_temperature(temperature)
    widest = min(columns.vocab, columns.per_rank)  # equal on all ranks, because each chunk runs collectives
    count, step = hidden_ND.shape[0], chunk_rows or default_chunk_rows(hidden_ND, widest)
    given = {"extra_ids_N": extra_ids_N, "sampled_ids_N": sampled_ids_N}
    for name, ids_N in given.items():
        if ids_N is not None:
            checks.check_rows(count, **{name: ids_N})
            if check_values:
                checks.check_ids(columns.vocab, sampled_ids_N=ids_N)
    width = padded_columns(columns.own, len(head_VD))
    scratch = Scratch(min(count, step), columns.own, width, hidden_ND.device)
    scorer = TeacherScorer.of(head_VD, columns, temperature, backend, scratch)
    return topk_in_chunks(scorer, hidden_ND, k, step, extra_ids_N, sampled_ids_N)


def topk_in_chunks(
    scorer: TeacherScorer,
    hidden_ND: Tensor,
    k: int,
    chunk_rows: int,
    extra_ids_N: Tensor | None = None,
    sampled_ids_N: Tensor | None = None,
) -> TopK:
    """Return the k most likely tokens of each row of ``hidden_ND``; collective over the ranks of ``scorer.columns``.

    ``chunk_rows``: number of rows with logits in memory at the same time. ``extra_ids_N`` and ``sampled_ids_N``: as in
    ``teacher_topk``.
    """
    chunks = []
    for start in range(0, max(len(hidden_ND), 1), chunk_rows):
        rows = slice(start, start + chunk_rows)
        chunks.append(scorer.topk(hidden_ND[rows], k, _at_rows(extra_ids_N, rows), _at_rows(sampled_ids_N, rows)))
    fields = {
        name: [vars(chunk)[name] for chunk in chunks] for name, part in vars(chunks[0]).items() if part is not None
    }
    return TopK(**{name: torch.cat(parts) for name, parts in fields.items()})


def _at_rows(column_N: Tensor | None, rows: Rows) -> Tensor | None:
    return None if column_N is None else column_N[rows]


@dataclass(frozen=True)
class TeacherScorer:
    """Computation of the teacher's logits, top-k and log-probs from hidden states.

    Each call processes one chunk of C rows (response tokens). ``loss_fn.logits_dtype`` does not apply to the teacher's
    logits: they are float32 or float64. V is the number of this rank's columns of logits. With tensor parallelism all
    ranks of the group must call the same methods with the same rows.
    """

    head: Projection
    columns: Columns
    temperature: float
    kernels: LogitsKernels
    scratch: Scratch
    buffer: str
    """Name of the buffer in ``scratch`` to which the teacher's logits are written."""

    @classmethod
    def of(
        cls,
        head_VD: Tensor,
        columns: Columns,
        temperature: float,
        backend: str,
        scratch: Scratch,
        buffer: str = "logits",
    ) -> TeacherScorer:
        """Return a scorer with the LM head ``head_VD`` and the kernels that ``backend`` selects.

        The first row of ``head_VD`` is that of the token ``columns.first``. ``backend`` is a value of
        ``loss_fn.backend``.
        """
        head = Projection(head_VD, columns.own)
        return cls(
            head,
            columns,
            temperature,
            choose_kernels(backend, head_VD.device, head.dtype),
            scratch,
            buffer,
        )

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Return the teacher's raw logits [C, V], float32 or float64, not divided by the temperature.

        The next call overwrites the returned buffer.
        """
        return self.head.logits(hidden_CD, self.scratch.get(self.buffer, len(hidden_CD), self.head.dtype))

    def scaled_logits(self, hidden_CD: Tensor) -> Tensor:
        """Return the teacher's logits [C, V], divided by the temperature; the next call overwrites them."""
        z_CV = self.logits(hidden_CD)
        divide(z_CV, self.temperature)
        return z_CV

    def topk(self, hidden_CD: Tensor, k: int, extra_ids_C: Tensor | None, sampled_ids_C: Tensor | None = None) -> TopK:
        """Return the teacher's k most likely tokens of each row, with log-probs, log tail mass and entropy.

        The log tail mass is the log of the total probability of all other tokens. ``extra_ids_C`` adds one token id per
        row, such as the sampled token; None adds no ids. ``sampled_ids_C``: as in ``teacher_topk``.
        """
        z_CV = self.logits(hidden_CD)
        if extra_ids_C is None and self.columns.group is None:
            found = self.kernels.topk_with_tail(z_CV, k, self.temperature)
            if found is not None:
                return found if sampled_ids_C is None else self._with_sampled(found, z_CV, sampled_ids_C)
        ids_CK = self.columns.topk(self.kernels.topk, z_CV, k)
        return self.topk_of_ids(z_CV, with_extra_ids(ids_CK, extra_ids_C, self.columns.vocab), sampled_ids_C)[0]

    def topk_of_ids(self, z_CV: Tensor, ids_CK: Tensor, sampled_ids_C: Tensor | None = None) -> tuple[TopK, Tensor]:
        """Return a ``TopK`` with the teacher's log-probs at ``ids_CK``, log tail mass and entropy.

        The log tail mass is the log of the total probability of all other tokens. ``sampled_ids_C``: as in
        ``teacher_topk``. The second result is a bool mask [C, K] that is True at the ids with the row's largest logit
        in the vocabulary. ``z_CV`` has the teacher's raw logits and is overwritten.
        """
        own_ids_CK = self.columns.own_ids(ids_CK)
        sampled_CE = z_CV[:, :0]
        if sampled_ids_C is not None:  # before ``reduce`` overwrites the logits
            sampled_CE = (own_logits(z_CV, sampled_ids_C, self.columns) / self.temperature).unsqueeze(1)
        reduced = self.kernels.reduce(z_CV, own_ids_CK, self.temperature, self.scratch, self.head.head_PD.dtype)
        summary, sampled_CE = combine(reduced.local, ids_CK, own_ids_CK, sampled_CE, self.columns.group)
        log_masses_CE = summary.outcomes.log_masses_NE()
        topk = TopK(
            ids_CK.int(),
            log_masses_CE[:, :-1],
            log_masses_CE[:, -1],
            entropy(summary.outcomes),
            None if sampled_ids_C is None else sampled_CE[:, 0] - summary.shift_C - summary.lse(),
        )
        return topk, summary.outcomes.logits_NK >= 0

    def _with_sampled(self, topk: TopK, z_CV: Tensor, sampled_ids_C: Tensor) -> TopK:
        """Return ``topk`` with the log-probs of the sampled tokens, from the logits ``z_CV`` of all tokens.

        A log-prob is (z - m) / temperature + log p(m), where m is the largest logit.
        """
        top_logprob_C1, top_CK = topk.logprobs_NK.max(dim=1, keepdim=True)
        ids_C2 = torch.cat([sampled_ids_C.unsqueeze(1), topk.ids_NK.gather(1, top_CK)], dim=1)
        sampled_C, top_C = z_CV.gather(1, ids_C2.long()).unbind(dim=1)
        return replace(topk, sampled_logprob_N=(sampled_C - top_C) / self.temperature + top_logprob_C1[:, 0])


def with_extra_ids(ids_CK: Tensor, extra_ids_C: Tensor | None, vocab: int) -> Tensor:
    """Append one extra token id to each row of ``ids_CK``, or -1 if the row already contains the id.

    Returns ``ids_CK`` unchanged if ``extra_ids_C`` is None, or if the rows contain the complete vocabulary (``vocab``
    ids).
    """
    if extra_ids_C is None or ids_CK.shape[1] == vocab:
        return ids_CK
    extra_C1 = extra_ids_C.to(ids_CK.dtype).unsqueeze(1)
    return torch.cat(
        [
            ids_CK,
            extra_C1.masked_fill((ids_CK == extra_C1).any(dim=1, keepdim=True), -1),
        ],
        dim=1,
    )


@dataclass(frozen=True)
class LossPass:
    """Settings and buffers that all chunks of one call of ``fused_linear_kl`` use."""

    loss_config: LossConfig
    temperature: float
    columns: Columns
    """The columns of logits that this rank computes."""
    kernels: LogitsKernels
    scratch: Scratch
    overlap: Overlap | None = None
    """Computation of the metric ``topk_overlap``; None: it is not computed."""


@dataclass(frozen=True)
class ChunkTargets:
    """Functions that return the teacher's targets for a chunk of rows; exactly one field is not None."""

    topk: Callable[[Rows], TopK] | None = None
    """Function for ``loss_fn.support=teacher``: returns the teacher's top-k of a chunk of rows."""
    student_topk: Callable[[Rows, Tensor], tuple[TopK, Tensor, Tensor | None]] | None = None
    """Function for ``loss_fn.support=student``: returns the teacher's log-probs at the student's top-k.

    The arguments are the C rows of a chunk and the student's logits of these rows. The second result is a bool mask
    [C, K], which is True at the ids with the teacher's largest logit in the vocabulary. The third result is the metric
    ``topk_overlap`` [C], or None.
    """
    scaled_logits: Callable[[Rows], Tensor] | None = None
    """Function for ``distillation.topk_logits_k=0``: returns the teacher's logits of a chunk, [C, V].

    C is the number of rows in the chunk. The logits are divided by the temperature of the loss.
    """


def targets_by_chunk(
    targets: Targets,
    loss_pass: LossPass,
    rows: int,
    k: int | None,
    sampled_ids_N: Tensor | None,
    weights: Sequence[tuple[LossConfig, Tensor]],
    debug: bool,
    check_values: bool,
) -> ChunkTargets:
    """Check the teacher's targets, and return the functions that select or compute the targets of a chunk.

    ``rows`` is the number of rows (response tokens) of the student. ``k`` is the number of token ids per row that the
    loss compares, or 0 for the complete vocabulary. It is ignored if ``targets`` is a ``TopK``. ``sampled_ids_N``, the
    ids of the sampled tokens, are checked too. A top-k that is computed from ``TeacherRows`` has their log-probs, and
    with ``loss_fn.kl_type=sampled`` it includes their ids. ``weights`` has each configuration of the loss with the
    weights [N] of its rows; a row of weight 0 may lack ids that this configuration requires. ``debug`` enables a check
    for repeated ids in a ``TopK``. ``check_values`` enables the checks of the values of ids. The checks run once for
    all chunks, because those of values make the host wait for the GPU.
    """
    loss_config, vocab = loss_pass.loss_config, loss_pass.columns.vocab
    if isinstance(targets, TeacherRows):
        if check_values:
            checks.check_ids(vocab, sampled_ids_N=sampled_ids_N)
        return _targets_from_rows(targets, loss_pass, rows, k, sampled_ids_N)
    if loss_config.support == "student":
        raise UserError(
            "loss_fn.support=student does not work with targets of type TopK, which contain only the teacher's top-k",
            "pass targets of type TeacherRows, which contain the teacher's hidden states and LM head",
            key="loss_fn.support",
            value="student",
        )
    checks.check_topk(targets, rows, vocab)
    if check_values:
        checks.check_ids(vocab, targets.ids_NK, sampled_ids_N)
        for config, weight_N in weights:
            checks.check_kept(targets, config, sampled_ids_N, weight_N)
    if debug:
        checks.check_no_duplicates(targets.ids_NK)
    return ChunkTargets(topk=lambda chunk: map_tensors(targets, lambda column_N: column_N[chunk]))


def _targets_from_rows(
    targets: TeacherRows,
    loss_pass: LossPass,
    rows: int,
    k: int | None,
    sampled_ids_N: Tensor | None,
) -> ChunkTargets:
    loss_config, columns, hidden_ND = loss_pass.loss_config, loss_pass.columns, targets.hidden_ND
    vocab = columns.vocab
    if k is None:
        raise UserError(
            "the argument topk_logits_k is missing, but targets of type TeacherRows require it",
            "pass the number of token ids per row, or 0 for the complete vocabulary",
            key="topk_logits_k",
        )
    head_VD = teacher_head(targets, columns)
    checks.check_linear("the teacher's", hidden_ND, head_VD, columns.own)
    checks.check_rows(rows, teacher_hidden_ND=hidden_ND)
    if k != 0:
        checks.check_support_size(k, vocab)
    # If both models' logits are needed at the same time, each model has a buffer; otherwise they share one.
    buffer = "teacher's logits" if k == 0 or loss_config.support == "student" else "logits"
    scorer = TeacherScorer.of(
        head_VD,
        columns,
        loss_pass.temperature,
        loss_config.backend,
        loss_pass.scratch,
        buffer,
    )

    extra_ids_N = sampled_ids_N if loss_config.kl_type == "sampled" else None

    def topk(chunk: Rows) -> TopK:
        return scorer.topk(hidden_ND[chunk], k, _at_rows(extra_ids_N, chunk), _at_rows(sampled_ids_N, chunk))

    def student_topk(chunk: Rows, student_CV: Tensor) -> tuple[TopK, Tensor, Tensor | None]:
        extra_ids_C, sampled_ids_C = _at_rows(extra_ids_N, chunk), _at_rows(sampled_ids_N, chunk)
        ids_CK = with_extra_ids(columns.topk(loss_pass.kernels.topk, student_CV, k), extra_ids_C, vocab)
        z_CV, overlap = scorer.logits(hidden_ND[chunk]), loss_pass.overlap
        overlap_C = None if overlap is None else overlap.of(z_CV, ids_CK, chunk)
        return *scorer.topk_of_ids(z_CV, ids_CK, sampled_ids_C), overlap_C

    if k == 0:
        return ChunkTargets(scaled_logits=lambda chunk: scorer.scaled_logits(hidden_ND[chunk]))
    if loss_config.support == "student":
        return ChunkTargets(student_topk=student_topk)
    return ChunkTargets(topk=topk)


def teacher_head(targets: TeacherRows, columns: Columns) -> Tensor:
    """Return the teacher's LM head from the row of the token ``columns.first`` on."""
    assert targets.head_VD is not None, "a teacher with the student's LM head: the caller adds this head"
    assert targets.first <= columns.first, (targets.first, columns.first)
    return targets.head_VD[columns.first - targets.first :]


def chunk_buffers(loss_config: LossConfig, k: int | None) -> int:
    """Return the number of [C, V] buffers that the loss of a chunk of C rows needs.

    ``k`` is ``distillation.topk_logits_k``; 0 means the complete vocabulary. None means that the targets are a given
    ``TopK``.
    """
    if k == 0:
        return full_vocab.buffers_of(loss_config)
    return 3 if loss_config.support == "student" else 2


def default_chunk_rows(hidden_ND: Tensor, vocab: int, buffers: int = 2) -> int:
    """Return the default number of rows (response tokens) in a chunk of the loss.

    The number is chosen so that the logits fit into a memory budget: see ``rows_within_budget``. ``vocab`` is the
    number of columns of logits, and ``buffers`` the number of [rows, ``vocab``] buffers that the loss needs.
    """
    return rows_within_budget(hidden_ND.is_cuda, vocab, buffers, max(hidden_ND.element_size(), 4))


def rows_within_budget(cuda: bool, vocab: int, buffers: int = 2, element: int = 4) -> int:
    """Return the number of rows C of a chunk for which the loss's [C, V] buffers fit into a memory budget.

    ``vocab`` is V, ``buffers`` the number of buffers, ``element`` the number of bytes per logit. C is a multiple of 16,
    at least 16, and at most 2048 on a GPU or 256 on a CPU. With two buffers, the budget of a GPU allows 2048 rows of
    151,936 float32 logits, that of a CPU 256 rows of 49,152.

    The bound of 2048 rows is a matter of arithmetic. Each chunk reads and writes the head's float32 gradient, 8 bytes
    per weight; its matmuls take 6 C FLOPs per weight. At the rates of an H100 (2.8 TB/s, 620 TFLOP/s) the former takes
    2.9 ps and the latter 20 ps, which overlap in part. So twice as many rows would save at most 7% of the time of the
    head, about 0.3% of that of a training step, for twice the memory. With 256 rows the former would take longer.
    """
    most, budget = (2048, 2560 * _MIB) if cuda else (256, 96 * _MIB)
    return max(16, min(most, budget // (buffers * vocab * element) // 16 * 16))
