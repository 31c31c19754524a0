"""Teachers with the student's weights: the current ones, a moving average, or a copy that is refreshed periodically."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from distill.config import Config
from distill.distributed.world import World
from distill.model.dtensor import local_shard
from distill.model.hf_files import ModelFiles
from distill.model.hf_load import local_slices
from distill.model.student import Student
from distill.model.teacher import ShardedTeacher
from distill.model.weights import GatheredWeights


class LiveTeacher(ShardedTeacher):
    """A teacher with the student's current weights.

    Its forward uses a copy of these weights in ``teacher.precision``, sharded over all ranks of a replica.
    """

    def __init__(self, config: Config, files: ModelFiles, world: World, valid_vocab: int, student: Student) -> None:
        super().__init__(config, files, world, valid_vocab, student.head_rows)
        self._bucket_bytes = config.runtime.sync_bucket_mib * 2**20

    def after_step(self, student: Student, step: int) -> None:
        """Reload the teacher's weights from the student; collective over the ranks of a replica."""
        self._reload(student.model.named_hf_parameters())

    def resume(self, student: Student) -> None:
        """Reload the teacher's weights after a resume has loaded the student; collective."""
        self._reload(student.model.named_hf_parameters())

    @torch.no_grad()
    def _reload(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the weights ``named``, sharded as the student's, into the teacher's shards.

        Collective. Only a few complete weights are gathered at a time, to save memory.
        """
        tp = self.world.layout.tp_size
        weights = GatheredWeights(named, self.dtype, self._bucket_bytes, self.world.replica_mesh, tp)
        self.onload()
        self.model.reshard_all()  # otherwise the next forward would use gathered copies of the old weights
        own = dict(self.model.named_hf_parameters())
        for name, complete in weights:
            local_shard(own[name]).copy_(complete[local_slices(own[name])])
        if self._host is not None:
            self._host.update_copy()
        self.offload()


class StoredTeacher(LiveTeacher):
    """A teacher that stores its own float32 weights, which checkpoints contain; subclasses update them after a step.

    These weights have the same shards as the student, so an update needs no communication before the reload.
    """

    def __init__(self, config: Config, files: ModelFiles, world: World, valid_vocab: int, student: Student) -> None:
        super().__init__(config, files, world, valid_vocab, student)
        self._stored = {name: parameter.detach().clone() for name, parameter in student.model.named_hf_parameters()}

    def state(self) -> dict[str, Tensor]:
        """Return this rank's float32 shards of the stored weights; a key is "teacher." and the parameter name."""
        return {f"teacher.{name}": stored for name, stored in self._stored.items()}

    def resume(self, student: Student) -> None:
        """Reload the teacher's weights after a resume has loaded the stored weights; collective."""
        self._reload(self._stored.items())

    @torch.no_grad()
    def _move(self, student: Student, weight: float) -> None:
        """Set stored = (1 - ``weight``) * stored + ``weight`` * student, and reload the teacher's weights; collective.

        ``weight`` 1 copies the student's weights exactly.
        """
        for name, parameter in student.model.named_hf_parameters():
            local_shard(self._stored[name]).lerp_(local_shard(parameter), weight)
        self._reload(self._stored.items())


class EmaTeacher(StoredTeacher):
    """A teacher with the exponential moving average (EMA) of the student's weights.

    After each step, average = decay * average + (1 - decay) * weights, with decay = ``ema_decay``. The average is
    float32, because in bfloat16 most of the small updates would round to zero.
    """

    def __init__(self, config: Config, files: ModelFiles, world: World, valid_vocab: int, student: Student) -> None:
        super().__init__(config, files, world, valid_vocab, student)
        self._decay = config.distillation.context_distillation.ema_decay

    def after_step(self, student: Student, step: int) -> None:
        """Update the average, and reload the teacher's weights from it; collective over the ranks of a replica."""
        self._move(student, 1 - self._decay)


class PeriodicTeacher(StoredTeacher):
    """A teacher with a copy of the student's weights, refreshed after every ``refresh_period``-th training step."""

    def __init__(self, config: Config, files: ModelFiles, world: World, valid_vocab: int, student: Student) -> None:
        super().__init__(config, files, world, valid_vocab, student)
        self._period = config.distillation.context_distillation.refresh_period

    def after_step(self, student: Student, step: int) -> None:
        """Copy the student's weights if ``step`` is a multiple of the period; collective over a replica's ranks."""
        if step % self._period == 0:
            self._move(student, 1.0)


_TEACHERS: dict[str, type[LiveTeacher]] = {
    "self_live": LiveTeacher,
    "self_ema": EmaTeacher,
    "self_periodic": PeriodicTeacher,
}
"""Maps each mode in which the teacher follows the student to its class."""


def build_teacher(
    config: Config, files: ModelFiles, world: World, valid_vocab: int, student: Student
) -> ShardedTeacher:
    """Build the teacher that ``distillation.context_distillation`` selects; collective.

    The teacher's weights are frozen, or follow the student's weights (see the classes of this module).
    """
    context = config.distillation.context_distillation
    following = _TEACHERS.get(context.mode) if context.enabled else None
    if following is None:
        return ShardedTeacher(config, files, world, valid_vocab, student.head_rows)
    return following(config, files, world, valid_vocab, student)
