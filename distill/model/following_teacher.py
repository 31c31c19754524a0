"""Teachers with the student's weights: the current ones, a moving average, or a copy that is refreshed periodically."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from distill.config import Config
from distill.config.lora_rules import teacher_shares_base
from distill.distributed.world import World
from distill.model.dtensor import local_shard
from distill.model.hf_files import ModelFiles
from distill.model.hf_load import local_slices
from distill.model.lora_teacher import build_adapter_teacher
from distill.model.stored_weights import StoredWeights
from distill.model.student import Student
from distill.model.teacher import ScoringTeacher, ShardedTeacher
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
    """A teacher with a moving average or a copy of the student's weights, which it stores in float32.

    These weights have the same shards as the student, so only the reload after their update needs communication.
    """

    def __init__(self, config: Config, files: ModelFiles, world: World, valid_vocab: int, student: Student) -> None:
        super().__init__(config, files, world, valid_vocab, student)
        context = config.distillation.context_distillation
        self._stored = StoredWeights(student.model.named_hf_parameters(), context)

    def after_step(self, student: Student, step: int) -> None:
        """Update the stored weights, and reload the teacher's weights if they changed; collective."""
        if self._stored.update(student.model.named_hf_parameters(), step):
            self._reload(self._stored.named.items())

    def state(self) -> dict[str, Tensor]:
        """Return this rank's float32 shards of the stored weights; a key is "teacher." and the parameter name."""
        return self._stored.state()

    def resume(self, student: Student) -> None:
        """Reload the teacher's weights after a resume has loaded the stored weights; collective."""
        self._reload(self._stored.named.items())


_FOLLOWING: dict[str, type[LiveTeacher]] = {
    "self_live": LiveTeacher,
    "self_ema": StoredTeacher,
    "self_periodic": StoredTeacher,
}
"""Maps each mode in which the teacher follows the student to the class of a teacher with its own model."""


def build_teacher(
    config: Config, files: ModelFiles, world: World, valid_vocab: int, student: Student
) -> ScoringTeacher:
    """Build the teacher that ``distillation.context_distillation`` selects; collective.

    The teacher's weights are frozen, or follow the student's weights (see the classes of this module). If adapters are
    trained and the student is its own teacher, no weights are loaded: see ``lora_teacher``.
    """
    if teacher_shares_base(config):
        return build_adapter_teacher(config, files, world, valid_vocab, student)
    context = config.distillation.context_distillation
    following = _FOLLOWING.get(context.mode) if context.enabled else None
    if following is None:
        return ShardedTeacher(config, files, world, valid_vocab, student.head_rows)
    return following(config, files, world, valid_vocab, student)
