"""Teachers in the student's module: its frozen base with the student's adapters, with other adapters, or with none.

The base is loaded once. A teacher's forward switches or replaces the adapters, and its input is split over the ranks as
that of the student (see ``Layout``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from distill.config import Config
from distill.config.lora_rules import stores_adapters
from distill.distributed.world import World
from distill.model.dtensor import local_shard
from distill.model.hf_files import ModelFiles
from distill.model.sharded import ShardedLM
from distill.model.stored_weights import StoredWeights
from distill.model.student import Student
from distill.model.teacher import ScoringTeacher
from distill.types import TeacherRows, View

log = logging.getLogger(__name__)
T = TypeVar("T")


class LiveAdapterTeacher(ScoringTeacher):
    """A teacher with the student's current adapters: the student itself, which reads the teacher's prompts.

    Its targets refer to the student's LM head, which is frozen and has no adapter, instead of a copy.
    """

    adapters = "with its current adapters"
    """Adapters of the teacher, as words in the log."""

    def __init__(self, config: Config, files: ModelFiles, world: World, valid_vocab: int, student: Student) -> None:
        super().__init__(config, files, world, valid_vocab, student.model, student.parallel)

    def with_weights_of_files(self) -> AbstractContextManager[None]:
        """Return a context in which the adapters are off, because the files contain the base only."""
        return self.model.without_adapters()

    def offload(self) -> None:
        """Free the weights that FSDP gathered for the last forward; not collective.

        FSDP would otherwise keep some of them for a backward of this forward.
        """
        self.model.reshard_all()

    def _hidden_rows(self, view: View) -> TeacherRows:
        return TeacherRows(self._forward(view, lambda hidden_ND, head_VD: hidden_ND))


class BaseTeacher(LiveAdapterTeacher):
    """A teacher without adapters: the frozen base."""

    adapters = "without its adapters"

    def _forward(self, view: View, use: Callable[[Tensor, Tensor], T]) -> T:
        with self.model.without_adapters():
            return super()._forward(view, use)


class StoredAdapterTeacher(LiveAdapterTeacher):
    """A teacher with its own adapters: a moving average or a copy of the student's, which it stores in float32.

    Each forward replaces the student's adapters by the stored ones and restores them afterwards, also after an error.
    """

    adapters = "with other adapters, which checkpoints contain"

    def __init__(self, config: Config, files: ModelFiles, world: World, valid_vocab: int, student: Student) -> None:
        super().__init__(config, files, world, valid_vocab, student)
        context = config.distillation.context_distillation
        self._stored = StoredWeights(student.model.named_trained(), context)

    def after_step(self, student: Student, step: int) -> None:
        """Update the stored adapters after a training step of the student; not collective."""
        self._stored.update(student.model.named_trained(), step)

    def state(self) -> dict[str, Tensor]:
        """Return this rank's float32 shards of the stored adapters; a key is "teacher." and the parameter name."""
        return self._stored.state()

    def _forward(self, view: View, use: Callable[[Tensor, Tensor], T]) -> T:
        with _replaced_adapters(self.model, self._stored.named, self.device):
            return super()._forward(view, use)


@contextmanager
def _replaced_adapters(model: ShardedLM, adapters: Mapping[str, Tensor], device: torch.device) -> Iterator[None]:
    """Replace the values of the model's trained parameters inside a ``with`` block; not collective.

    ``adapters``: maps the name of each trained parameter to the other values, with the same shards. The former values
    are restored bit for bit. After an error they are restored too, because a checkpoint could follow, but a forward
    must not: gathered copies may still have the other values. ``device``: the device of the model's forwards.
    """
    model.reshard_all()  # gathered copies have the former values
    parameters = dict(model.named_trained())
    before = {name: local_shard(parameter.detach()).clone() for name, parameter in parameters.items()}
    try:
        _wait_for_copies(parameters, device)
        _copy(adapters, parameters)
        yield
        model.reshard_all()
        _wait_for_copies(parameters, device)  # not after an error: it could wait for ranks that failed
    finally:
        _copy(before, parameters)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Copy shards to the parameters' current shards, which may have moved: see ``ShardedAdamW``."""
    for name, parameter in parameters.items():
        local_shard(parameter.detach()).copy_(local_shard(values[name]))


def _wait_for_copies(parameters: Mapping[str, Tensor], device: torch.device) -> None:
    """With ``policy.dtensor_cfg.cpu_offload``, wait until the GPU has read the shards in host memory."""
    if any(parameter.device.type != device.type for parameter in parameters.values()):
        torch.cuda.synchronize()


def build_adapter_teacher(
    config: Config, files: ModelFiles, world: World, valid_vocab: int, student: Student
) -> ScoringTeacher:
    """Build the teacher in the student's module that ``distillation.context_distillation.mode`` selects.

    Not collective. ``self_frozen`` is the student before training: the base, or the base with the adapters of
    ``lora_cfg.init_from``, which the teacher then stores.
    """
    mode, init_from = config.distillation.context_distillation.mode, config.policy.dtensor_cfg.lora_cfg.init_from
    teacher: type[LiveAdapterTeacher] = BaseTeacher if mode == "self_frozen" else LiveAdapterTeacher
    if stores_adapters(mode, init_from):
        teacher = StoredAdapterTeacher
    adapters = f"with the adapters of {init_from}" if mode == "self_frozen" and init_from else teacher.adapters
    log.info("the teacher is the student's model %s", adapters)
    return teacher(config, files, world, valid_vocab, student)
