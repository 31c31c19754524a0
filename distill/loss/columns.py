"""Columns of logits (token ids) that a rank computes, and collectives over the ranks that compute the other columns.

Without tensor parallelism a rank computes all columns, and the collectives return their argument unchanged. C is the
number of rows (response tokens) in a chunk, V the number of columns on this rank, K the number of ids per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distill.loss import checks


@dataclass(frozen=True)
class VocabParallel:
    """Sharding of the LM head's rows (the vocabulary) over tensor-parallel ranks.

    Rank r of the group has the rows ``torch.chunk(head, number of ranks)[r]`` and computes the logits of these tokens.
    """

    group: dist.ProcessGroup
    """Tensor-parallel ranks over which the rows of the LM head are sharded."""
    first: int
    """Token id of the first row of the LM head on this rank."""
    vocab: int
    """Number of rows of the complete LM head over all ranks, including padding rows."""

    @property
    def per_rank(self) -> int:
        """Return the number of rows on each rank but the last ranks, which may have fewer."""
        return -(-self.vocab // dist.get_world_size(self.group))


@dataclass(frozen=True)
class Columns:
    """Range of the columns of logits (token ids) that this rank computes.

    All methods except ``own_ids`` are collective over ``group``, and do not communicate if ``group`` is None.
    """

    own: int
    """Number of columns of logits on this rank, without padding columns."""
    vocab: int
    """Number of columns of logits over all ranks, without padding columns."""
    first: int = 0
    """Token id of the first column of logits on this rank."""
    per_rank: int = 0
    """Number of columns on the rank with the most columns, including padding columns."""
    group: dist.ProcessGroup | None = None
    """Ranks over which the columns of logits are sharded; None if this rank has all columns."""

    @classmethod
    def of(cls, head_VD: Tensor, valid_vocab: int | None, parallel: VocabParallel | None) -> Columns:
        """Return the columns of logits that this rank computes with the LM head ``head_VD``.

        ``valid_vocab`` is the number of columns without padding; None means all columns. Raises ``UserError`` on all
        ranks if an argument or the number of ranks is invalid for this head.
        """
        columns = head_VD.shape[0]
        if parallel is None:
            vocab = checks.check_vocab(columns, valid_vocab)
            return cls(vocab, vocab, per_rank=columns)
        ranks = dist.get_world_size(parallel.group)
        vocab = checks.check_vocab(parallel.vocab, valid_vocab)
        checks.check_vocab_parallel(parallel.vocab, ranks, vocab)
        own = min(columns, vocab - parallel.first)
        return cls(own, vocab, parallel.first, parallel.per_rank, parallel.group)

    def own_ids(self, ids: Tensor) -> Tensor:
        """Convert token ids to column numbers on this rank; -1 for padding (-1) and tokens of other ranks."""
        if self.group is None:
            return ids
        columns = ids - self.first
        return columns.masked_fill((columns < 0) | (columns >= self.own), -1)

    def sum(self, numbers: Tensor) -> Tensor:
        """Return ``numbers``, summed over the ranks in place."""
        return self._reduce(numbers, dist.ReduceOp.SUM)

    def max(self, numbers: Tensor) -> Tensor:
        """Return the largest of the ranks' ``numbers``, in place."""
        return self._reduce(numbers, dist.ReduceOp.MAX)

    def min(self, numbers: Tensor) -> Tensor:
        """Return the smallest of the ranks' ``numbers``, in place."""
        return self._reduce(numbers, dist.ReduceOp.MIN)

    def topk(self, topk: Callable[[Tensor, int], Tensor], z_CV: Tensor, k: int) -> Tensor:
        """Return the token ids of the k largest logits of each row over all ranks, [C, k], unordered.

        ``z_CV`` has this rank's logits. ``topk`` returns the columns of the k largest numbers of each row, and the
        lowest of equal ones. So does this method, and the result does not depend on the number of ranks.
        """
        if self.group is None:
            return topk(z_CV, k)
        columns_CK = topk(z_CV, min(k, self.own)).long().sort(dim=1).values
        candidates_CK = self._gather(z_CV.gather(1, columns_CK), k)
        ids_CK = self._gather(columns_CK + self.first, k)
        # The candidates are in the order of their ids, so the lowest of equal columns is the lowest id.
        return ids_CK.gather(1, topk(candidates_CK, k).long())

    def _gather(self, own_CK: Tensor, k: int) -> Tensor:
        """Return the candidates of all ranks for a top-k, joined along the second dimension in the order of ranks.

        ``own_CK`` has min(k, own columns) candidates. All ranks send k columns, because ``all_gather`` needs equal
        sizes; the receiver drops the padding.
        """
        padded_CK = own_CK.new_zeros(len(own_CK), k)
        padded_CK[:, : own_CK.shape[1]] = own_CK
        parts = [torch.empty_like(padded_CK) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, padded_CK, group=self.group)
        counts = [min(k, self.per_rank, self.vocab - rank * self.per_rank) for rank in range(len(parts))]
        return torch.cat([part[:, :count] for part, count in zip(parts, counts, strict=True)], dim=1)

    def _reduce(self, numbers: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group is not None and numbers.numel():
            dist.all_reduce(numbers, op=operation, group=self.group)
        return numbers


def own_logits(z_CV: Tensor, ids_C: Tensor, columns: Columns, absent: float = 0.0) -> Tensor:
    """Return [C]: for each row of ``z_CV``, the value in the column of a token, or ``absent`` on other ranks.

    The sum over the ranks of ``columns.group`` is then the token's value. Not collective.
    """
    own_C1 = columns.own_ids(ids_C.long()).unsqueeze(1)
    return z_CV.gather(1, own_C1.clamp(min=0)).masked_fill_(own_C1 < 0, absent).squeeze(1)
