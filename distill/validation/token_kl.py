"""Compare student and teacher at each token of given responses: KL divergences and most likely tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from distill.batching.plan import PackingConfig, plan
from distill.distributed.world import World
from distill.model.micro_batch_loss import RowComparison
from distill.model.student import Student
from distill.model.teacher import Teacher
from distill.types import MicroBatch, Rollout
from distill.validation.comparison import Comparison, Likely, TopTokens


def compare_tokens(
    world: World,
    student: Student,
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    step: int,
    *,
    packing: PackingConfig,
    seed: int,
    top_tokens: int,
    overlap: bool = False,
) -> list[Comparison]:
    """Compare student and teacher at the response tokens of each rollout.

    Collective: every rank passes the same rollouts and receives all comparisons, in host memory. The KL divergences are
    computed as in the loss, with each rollout's ``teacher_prefix_ids`` as the teacher's context. ``top_tokens``: number
    of tokens per rollout at which the most likely tokens of both models are listed. They are the tokens with the
    highest KL: the larger of forward and reverse KL; of equal KLs the earlier token. To save memory, the teacher runs
    on one of its packs after the other, and its weights leave the device before the student's last forward. So the
    comparison of one micro-batch per rank needs no more device memory than the training phase. ``packing``, ``seed``
    and ``step`` are arguments of ``plan``, which packs the rollouts into micro-batches. All tokens are compared,
    with any weight in the loss. ``overlap``: whether to compute the overlap of the top-k of both models.
    """
    if not rollouts:
        return []
    packing = replace(packing, optimizer_batch=len(rollouts), expected=None, weights=None)
    (batch,) = plan(rollouts, world.layout, packing, seed, step)
    tokens = _Tokens(rollouts)
    found: list[_Part] = []
    teacher.onload()
    (on_device,) = student.to_device([batch])
    targets = teacher.targets_of(on_device.micro_batches)
    for micro_batch, moved in zip(batch, on_device, strict=True):
        its_targets = next(targets)
        if micro_batch is batch.micro_batches[-1]:
            teacher.offload()
        rows = _Rows.of(micro_batch, tokens)
        select = partial(rows.highest, most=top_tokens)
        found.append(rows.part(student.compare(moved, its_targets, select, overlap)))
    counts = world.layout.tp_rank == 0  # all ranks of a tensor-parallel group have the same rows
    parts = [part for of_rank in world.gather(found if counts else []) for part in of_rank]
    found_by_rollout = tokens.by_rollout(parts, top_tokens)
    return found_by_rollout if overlap else [replace(each, topk_overlap_R=None) for each in found_by_rollout]


@dataclass(frozen=True)
class _Part:
    """Comparison of student and teacher at N tokens; a token is given by its index among all rollouts' tokens."""

    index_N: Tensor
    values_3N: Tensor
    """float32 [3, N]: forward KL, reverse KL and overlap of the top-k, which is nan if it was not computed."""
    index_M: Tensor
    """int64 [M]: the tokens at which the most likely tokens are listed."""
    ids_M2K: Tensor
    probs_M2K: Tensor


def highest(kl_N: Tensor, index_N: Tensor, rollout_N: Tensor, most: int) -> Tensor:
    """Return the numbers of the ``most`` rows with the highest KL of each rollout, int64 [M]; not collective.

    ``index_N``: the order of the rows, which decides between equal KLs. ``rollout_N``: the rollout of each row.
    """
    order_N = index_N.argsort()
    order_N = order_N[kl_N[order_N].argsort(descending=True, stable=True)]
    order_N = order_N[rollout_N[order_N].argsort(stable=True)]
    sorted_N = rollout_N[order_N]
    rank_N = torch.arange(len(order_N)) - torch.searchsorted(sorted_N, sorted_N)
    return order_N[rank_N < most]


class _Tokens:
    """Index of each response token among the M response tokens of all rollouts."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self._lengths = [len(r.response_ids) for r in rollouts]
        self._prompts_B = torch.tensor([len(r.prompt.student_ids) for r in rollouts])
        self._starts_B = torch.tensor([0, *self._lengths[:-1]]).cumsum(0)

    def indices(self, rollout_N: Tensor, position_N: Tensor) -> Tensor:
        """Return int64 [N]: the index of the token that is predicted at ``position_N`` of the rollout's sequence."""
        return self._starts_B[rollout_N] + position_N - (self._prompts_B[rollout_N] - 1)

    def by_rollout(self, parts: Sequence[_Part], most: int) -> list[Comparison]:
        """Return the comparison of each rollout, in the order of the rollouts.

        ``parts``: the comparisons of all micro-batches. Several ranks may have tokens of the same rollout, and each of
        them lists the most likely tokens at up to ``most`` of its tokens.
        """
        values_3M = torch.empty(3, sum(self._lengths))
        missing_M = torch.ones(sum(self._lengths), dtype=torch.bool)
        for part in parts:
            values_3M[:, part.index_N] = part.values_3N
            missing_M[part.index_N] = False
        assert not missing_M.any(), f"{int(missing_M.sum())} response tokens have no KL"
        top = self._top_tokens(parts, values_3M[:2].amax(dim=0), most)
        rows = zip(*(row_M.split(self._lengths) for row_M in values_3M), strict=True)
        return [Comparison(f_R, r_R, tuple(own), o_R) for (f_R, r_R, o_R), own in zip(rows, top, strict=True)]

    def _top_tokens(self, parts: Sequence[_Part], kl_M: Tensor, most: int) -> list[list[TopTokens]]:
        index_N = torch.cat([part.index_M for part in parts])
        rollout_N = torch.searchsorted(self._starts_B, index_N, right=True) - 1
        kept_M = highest(kl_M[index_N], index_N, rollout_N, most)
        kept_M = kept_M[index_N[kept_M].argsort()]
        ids_M2K = torch.cat([part.ids_M2K for part in parts])[kept_M]
        probs_M2K = torch.cat([part.probs_M2K for part in parts])[kept_M]
        rollout_M, at_M = rollout_N[kept_M], (index_N - self._starts_B[rollout_N])[kept_M]
        found: list[list[TopTokens]] = [[] for _ in self._lengths]
        rows = (each.tolist() for each in (rollout_M, at_M, ids_M2K, probs_M2K))
        for rollout, at, ids, probs in zip(*rows, strict=True):
            found[rollout].append(TopTokens(at, *map(_likely, ids, probs)))
        return found


def _likely(ids: Sequence[int], probs: Sequence[float]) -> Likely:
    """Return the pairs without padding, and without nan, which broken weights cause."""
    return tuple((id_, prob) for id_, prob in zip(ids, probs, strict=True) if id_ >= 0 and math.isfinite(prob))


@dataclass(frozen=True)
class _Rows:
    """The N response tokens (rows with a loss weight) of a micro-batch, in host memory."""

    row_N: Tensor
    """int64 [N]: index among all rows of the micro-batch."""
    rollout_N: Tensor
    index_N: Tensor
    """int64 [N]: index among all rollouts' response tokens."""

    @classmethod
    def of(cls, micro_batch: MicroBatch, tokens: _Tokens) -> _Rows:
        row_N = micro_batch.weight_N.nonzero().squeeze(1)
        rollout_N = micro_batch.rollout_N[row_N]
        position_N = micro_batch.student.positions_T[micro_batch.student.rows_N][row_N]
        return cls(row_N, rollout_N, tokens.indices(rollout_N, position_N))

    def highest(self, kl_N: Tensor, most: int) -> Tensor:
        """Return the rows (int64 [M]) of the ``most`` tokens with the highest KL of each rollout, ascending."""
        return self.row_N[highest(kl_N, self.index_N, self.rollout_N, most)].sort().values

    def part(self, compared: RowComparison) -> _Part:
        """Return the comparison of these rows in host memory."""
        overlap_N = compared.topk_overlap_N
        if overlap_N is None:
            overlap_N = torch.full_like(compared.forward_kl_N, math.nan)
        return _Part(
            self.index_N,
            torch.stack([compared.forward_kl_N, compared.reverse_kl_N, overlap_N.float()]).cpu(),
            self.index_N[torch.searchsorted(self.row_N, compared.rows_M.cpu())],
            compared.likely.ids_M2K.cpu(),
            compared.likely.probs_M2K.cpu(),
        )
