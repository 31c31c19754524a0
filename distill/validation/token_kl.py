"""Measure the KL divergences between student and teacher at each token of given responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distill.batching.plan import PackingConfig, plan
from distill.distributed.world import World
from distill.model.student import Student
from distill.model.teacher import Teacher
from distill.types import MicroBatch, Rollout


def token_kls(
    world: World,
    student: Student,
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    packing: PackingConfig,
    seed: int,
    step: int,
) -> list[tuple[Tensor, Tensor]]:
    """Return KL(teacher || student) and KL(student || teacher) of each rollout at its R response tokens.

    Both are float32 [R] in nats, in host memory. Collective: every rank passes the same rollouts. The KL divergences
    are computed as in the loss, with each rollout's ``teacher_prefix_ids`` as the teacher's context. To save memory,
    the teacher runs on one of its packs after the other. ``packing``, ``seed`` and ``step`` are arguments of ``plan``,
    which packs the rollouts into micro-batches.
    """
    if not rollouts:
        return []
    (batch,) = plan(rollouts, world.layout, replace(packing, optimizer_batch=len(rollouts), expected=None), seed, step)
    index = _TokenIndex(rollouts)
    found: list[tuple[Tensor, Tensor]] = []
    teacher.onload()
    (on_device,) = student.to_device([batch])
    targets = teacher.targets_of(on_device.micro_batches)
    for micro_batch, moved, its_targets in zip(batch, on_device, targets, strict=True):
        kls = student.row_kls(moved, its_targets)
        found.append((index.indices(micro_batch), torch.stack([kls["forward_kl"], kls["reverse_kl"]]).float().cpu()))
    teacher.offload()
    counts = world.layout.tp_rank == 0  # all ranks of a tensor-parallel group have the same rows
    return index.by_rollout([pair for part in world.gather(found if counts else []) for pair in part])


class _TokenIndex:
    """Maps each row (response token) of a micro-batch to its index among all rollouts' M response tokens."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self._lengths = [len(r.response_ids) for r in rollouts]
        self._prompts_B = torch.tensor([len(r.prompt.student_ids) for r in rollouts])
        self._starts_B = torch.tensor([0, *self._lengths[:-1]]).cumsum(0)

    def indices(self, micro_batch: MicroBatch) -> Tensor:
        """Return int64 [N]: for each row with loss weight > 0, its index among all rollouts' response tokens."""
        counted_N = micro_batch.weight_N != 0
        rollout_N = micro_batch.rollout_N[counted_N]
        position_N = micro_batch.student.positions_T[micro_batch.student.rows_N][counted_N]
        return self._starts_B[rollout_N] + position_N - (self._prompts_B[rollout_N] - 1)

    def by_rollout(self, found: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Return the pair (forward KL [R], reverse KL [R]) of each rollout with R response tokens.

        The pairs are in the order of the rollouts. ``found``: for each micro-batch, the result [N] of ``indices``, and
        a tensor [2, N] with the forward and the reverse KL of these tokens.
        """
        both_2M = torch.full((2, sum(self._lengths)), torch.nan)
        for index_N, both_2N in found:
            both_2M[:, index_N] = both_2N
        assert not both_2M.isnan().any(), f"{int(both_2M[0].isnan().sum())} response tokens have no KL"
        forward, reverse = (row_M.split(self._lengths) for row_M in both_2M)
        return list(zip(forward, reverse, strict=True))
