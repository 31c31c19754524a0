"""A teacher that follows the student: its weights as they are, or their exponential moving average."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distill.config import Config
from distill.distributed.world import World
from distill.model.hf_files import ModelFiles
from distill.model.hf_load import local_slices
from distill.model.student import Student
from distill.model.teacher import Teacher
from distill.model.weights import GatheredWeights


class FollowingTeacher(Teacher):
    """The student itself, reading more: as it is now (``decay`` None) or as it was on average.

    What answers is a copy in the teacher's precision, sharded as any teacher is. The average is kept in float32 on the
    student's own shards, where a step of it needs no communication; bfloat16 would swallow nine tenths of its movement.
    It moves once a step: average <- decay * average + (1 - decay) * weights. Every rank makes it and calls its methods
    at the same points.
    """

    def __init__(
        self, config: Config, files: ModelFiles, world: World, valid_vocab: int, student: Student, decay: float | None
    ) -> None:
        super().__init__(config, files, world, valid_vocab)
        self._decay = decay
        self._bucket_bytes = config.runtime.sync_bucket_mib * 2**20
        named = student.model.named_hf_parameters() if decay is not None else []
        self._average = {name: parameter.detach().clone() for name, parameter in named}

    @torch.no_grad()
    def after_step(self, student: Student) -> None:
        """Follow the student's weights of now; collective over the model's ranks."""
        super().after_step(student)
        named = student.model.named_hf_parameters()
        if self._decay is not None:
            for name, parameter in named:
                _local(self._average[name]).lerp_(_local(parameter), 1 - self._decay)
        self._take(student)

    def state(self) -> dict[str, Tensor]:
        """The average by name, sharded, for a checkpoint; filled in place by a load, which ``resume`` must follow."""
        return {f"teacher.{name}": average for name, average in self._average.items()}

    def resume(self, student: Student) -> None:
        """Answer with what a checkpoint brought to the average, or to the student; collective."""
        self._take(student)

    @torch.no_grad()
    def _take(self, student: Student) -> None:
        """The copy that answers, anew: whole tensors by buckets, of which each rank keeps its own shards."""
        source: Iterable[tuple[str, Tensor]] = self._average.items() if self._average else ()
        tp = self._world.layout.tp_size
        weights = GatheredWeights(
            source or student.model.named_hf_parameters(), self.dtype, self._bucket_bytes, self._world.replica_mesh, tp
        )
        self.onload()
        self.model.reshard_all()  # else what was gathered of the old weights would answer
        own = dict(self.model.named_hf_parameters())
        for name, whole in weights:
            _local(own[name]).copy_(whole[local_slices(own[name])])
        if self._host is not None:
            self._host.push_weights()
        self.offload()


def build_teacher(config: Config, files: ModelFiles, world: World, valid_vocab: int, student: Student) -> Teacher:
    """The teacher that a recipe asks for; every rank calls it."""
    context = config.distillation.context_distillation
    if not context.enabled or context.mode in ("self_frozen", "frozen"):
        return Teacher(config, files, world, valid_vocab)
    decay = context.ema_decay if context.mode == "self_ema" else None
    return FollowingTeacher(config, files, world, valid_vocab, student, decay)


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    local: Tensor = parameter.to_local()
    return local
