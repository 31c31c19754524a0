"""How far the student is from the teacher at each token of given answers."""

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
    """KL(teacher || student) and KL(student || teacher) at each token of each answer: float32 [R] in nats, on the host.

    As the loss reports them, without gradient; the teacher reads each answer's ``teacher_prefix_ids``. Collective, with
    the same answers of all ranks on every rank. One micro-batch at a time, its targets made where they are used; every
    rank has as many of them, empty ones included.
    """
    if not rollouts:
        return []
    (batch,) = plan(rollouts, world.layout, replace(packing, optimizer_batch=len(rollouts), expected=None), seed, step)
    places = _Places(rollouts)
    found: list[tuple[Tensor, Tensor]] = []
    teacher.onload()
    for micro_batch in batch:
        rows = student.row_kls(micro_batch, teacher.targets(micro_batch))
        found.append((places.of(micro_batch), torch.stack([rows["forward_kl"], rows["reverse_kl"]]).float().cpu()))
    teacher.offload()
    counts = world.layout.tp_rank == 0  # the ranks of a tensor-parallel group have the same rows
    return places.by_answer([pair for part in world.gather(found if counts else []) for pair in part])


class _Places:
    """The tokens of all answers end to end, and where among them a micro-batch's rows lie, in whatever order."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self._lengths = [len(r.response_ids) for r in rollouts]
        self._prompts_B = torch.tensor([len(r.prompt.student_ids) for r in rollouts])
        self._starts_B = torch.tensor([0, *self._lengths[:-1]]).cumsum(0)

    def of(self, micro_batch: MicroBatch) -> Tensor:
        """int64 [N]: the place of each row of weight other than 0."""
        counted_N = micro_batch.weight_N != 0
        rollout_N = micro_batch.rollout_N[counted_N]
        position_N = micro_batch.student.positions_T[micro_batch.student.rows_N][counted_N]
        return self._starts_B[rollout_N] + position_N - (self._prompts_B[rollout_N] - 1)

    def by_answer(self, found: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Both numbers [R] of each answer, from places [N] and numbers there [2, N]."""
        both_2M = torch.full((2, sum(self._lengths)), torch.nan)
        for place_N, both_2N in found:
            both_2M[:, place_N] = both_2N
        assert not both_2M.isnan().any(), f"{int(both_2M[0].isnan().sum())} tokens were not compared"
        forward, reverse = (row_M.split(self._lengths) for row_M in both_2M)
        return list(zip(forward, reverse, strict=True))
