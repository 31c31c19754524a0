"""Teachers: the interface, the computation of targets by a sharded model, and a frozen teacher."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distill.batching.teacher_packs import (
    TeacherPack,
    by_pack,
    join_for_teacher,
    pack_sizes,
    positions_read,
    split_targets,
)
from distill.config import Config
from distill.distributed.world import World
from distill.errors import UserError
from distill.loss import VocabParallel, teacher_topk
from distill.model.fused_layers import uses_fused_layers
from distill.model.hf_files import ModelFiles
from distill.model.host_offload import FrozenOffload
from distill.model.micro_batch_loss import loss_at_temperature
from distill.model.sharded import ShardedLM, Sharding, load_sharded
from distill.model.student import DTYPES, Student
from distill.supervise.progress import heartbeat
from distill.types import MicroBatch, Targets, TeacherRows, TopK, View

log = logging.getLogger(__name__)
T = TypeVar("T")


class Teacher:
    """Interface of all teachers: models that compute the training targets of the student.

    All ranks must construct a teacher and call its collective methods in the same order. Subclasses must override
    ``targets``. The other methods do nothing by default, which suits a teacher with constant weights.
    """

    def targets(self, micro_batch: MicroBatch | TeacherPack) -> Targets:
        """Return the teacher's targets for a micro-batch, one row per response token; collective."""
        raise NotImplementedError

    def targets_of(self, micro_batches: Sequence[MicroBatch]) -> Iterator[Targets]:
        """Yield the targets of each micro-batch in order; collective, for the same number of micro-batches per rank."""
        yield from map(self.targets, micro_batches)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Keep the teacher's weights on the device inside a ``with`` block; not collective."""
        self.onload()
        yield
        # Not in a ``finally``: it waits for the device, so after an error it could hang or raise a second error.
        self.offload()

    def onload(self) -> None:
        """Move the teacher's weights to the device; not collective."""

    def offload(self) -> None:
        """Move the teacher's weights to host memory; not collective."""

    def after_step(self, student: Student, step: int) -> None:
        """Update the teacher after a training step of the student; ``step``: number of finished steps."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to save in a checkpoint, as a dictionary from name to tensor.

        A resume loads the saved values into the same tensors.
        """
        return {}

    def resume(self, student: Student) -> None:
        """Update the teacher after a resume has loaded the student's weights and the teacher's ``state()``."""


class ScoringTeacher(Teacher):
    """A teacher whose targets are computed by forwards of ``model``; a subclass loads this model or shares it.

    ``files``: the model files with the weights of the teacher before training. ``valid_vocab``: number of token ids in
    the tokenizer. Larger ids are padding of the model's vocabulary and get probability 0. ``parallel``: the split of
    the model's LM head over the tensor-parallel group; None: the head is not split.
    """

    def __init__(
        self,
        config: Config,
        files: ModelFiles,
        world: World,
        valid_vocab: int,
        model: ShardedLM,
        parallel: VocabParallel | None = None,
    ) -> None:
        self.dtype = DTYPES[config.teacher.precision]
        self.device = world.device
        self.files = files
        self.world = world
        self.valid_vocab = valid_vocab
        self.model = model
        loss = loss_at_temperature(config)
        self.temperature = loss.temperature
        self._parallel = parallel
        self._top_k = config.distillation.topk_logits_k
        self._backend = loss.backend
        self._keeps_sampled = loss.kl_type == "sampled"
        self._scores_sampled = loss.token_weights.reads_sampled_token
        self._returns_rows = loss.support == "student" or self._top_k == 0
        self._chunk_rows = config.teacher.logprob_chunk_size or config.runtime.logits_chunk_rows
        self._tp_group = world.tp_mesh.get_group()
        budget, ranks = config.teacher.pack_tokens, world.layout.cp_size * world.layout.teacher_tp_size
        self._pack_positions = None if budget is None else -(-budget // ranks)

    def targets_of(self, micro_batches: Sequence[MicroBatch]) -> Iterator[Targets]:
        """Yield the targets of each micro-batch in order; collective, for the same number of micro-batches per rank.

        The teacher reads as many consecutive micro-batches at once as ``teacher.*.logprob_mb_tokens`` allows. The
        targets are those of ``targets``, except for rounding.
        """
        if self._pack_positions is None:
            yield from super().targets_of(micro_batches)
            return
        positions = self.world.gather([positions_read(micro_batch) for micro_batch in micro_batches])
        for pack in by_pack(micro_batches, pack_sizes(positions, self._pack_positions)):
            found = split_targets(self.targets(join_for_teacher(pack)), pack)
            while found:
                yield found.pop(0)  # a suspended generator must not keep targets in memory

    @torch.no_grad()
    def targets(self, micro_batch: MicroBatch | TeacherPack) -> Targets:
        """Return the teacher's targets for the response tokens of a micro-batch; collective.

        Usually the targets are the teacher's top-k per response token. If the loss uses the student's top-k or the full
        vocabulary, the targets are the teacher's hidden states, and the LM head if it is not the student's.
        """
        heartbeat()
        view = micro_batch.teacher.to(self.device)
        if self._returns_rows:
            rows = self._hidden_rows(view)
            return replace(rows, hidden_ND=self._gather_rows(rows.hidden_ND, micro_batch.rows_per_tp_rank))
        sampled_N = micro_batch.sampled_N.to(self.device)
        if micro_batch.rows_per_tp_rank:
            sampled_N = torch.split(sampled_N, list(micro_batch.rows_per_tp_rank))[dist.get_rank(self._tp_group)]
        topk = self.topk(
            view,
            self._top_k,
            extra_ids_N=sampled_N if self._keeps_sampled else None,
            sampled_ids_N=sampled_N if self._scores_sampled else None,
        )
        gathered: dict[str, Any] = {
            name: None if part is None else self._gather_rows(part, micro_batch.rows_per_tp_rank)
            for name, part in vars(topk).items()
        }
        return TopK(**gathered)

    @torch.no_grad()
    def topk(self, view: View, k: int, extra_ids_N: Tensor | None = None, sampled_ids_N: Tensor | None = None) -> TopK:
        """Return the teacher's ``k`` most likely tokens for each response token, with their log-probs.

        Collective. ``view``: packed sequences with N response tokens. ``extra_ids_N`` adds one token id per response
        token to the k ids. ``sampled_ids_N`` adds no ids: the log-probs of these tokens are
        ``TopK.sampled_logprob_N``. None: no such ids.
        """

        def use(hidden_ND: Tensor, head_VD: Tensor) -> dict[str, Any]:
            topk = teacher_topk(
                hidden_ND,
                head_VD,
                k,
                self.temperature,
                self._chunk_rows,
                self.valid_vocab,
                extra_ids_N=extra_ids_N,
                backend=self._backend,
                check_values=self.device.type == "cpu",
                sampled_ids_N=sampled_ids_N,
                parallel=self._parallel,
            )
            return vars(topk)

        return TopK(**self._forward(view, use))

    def with_weights_of_files(self) -> AbstractContextManager[None]:
        """Return a context in which the teacher has the weights of ``files``, so that they can be verified."""
        return nullcontext()

    def _forward(self, view: View, use: Callable[[Tensor, Tensor], T]) -> T:
        """Return ``use(hidden, head)`` of a forward with the teacher's weights; see ``ShardedLM``; collective."""
        found: T = self.model(view, use)
        return found

    def _hidden_rows(self, view: View) -> TeacherRows:
        """Return the hidden states of the rows of ``view``, in which this rank has a part; collective."""
        raise NotImplementedError

    def _gather_rows(self, part: Tensor, rows_per_tp_rank: tuple[int, ...]) -> Tensor:
        """Return one row per response token of all tensor-parallel ranks, gathered over their group.

        ``part``: the rows that this rank has computed. ``rows_per_tp_rank``: number of rows that each tensor-parallel
        rank has computed; if empty, ``part`` is already complete and is returned unchanged.
        """
        if not rows_per_tp_rank:
            return part
        padded = part.new_zeros(max(rows_per_tp_rank), *part.shape[1:])  # all_gather needs the same size on every rank
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in rows_per_tp_rank]
        dist.all_gather(parts, padded, group=self._tp_group)
        return torch.cat([rows[:count] for rows, count in zip(parts, rows_per_tp_rank, strict=True)])


class ShardedTeacher(ScoringTeacher):
    """A teacher with frozen weights in ``teacher.precision``, sharded over all ranks of a model replica.

    On GPUs the shards stay in pinned host memory and are copied to the device only while the teacher is used.
    ``head_rows``: rows of the LM head (token ids) that this rank needs after the teacher's forward; its copy of these
    rows is shared by all targets until the next ``offload``. Other arguments: as in ``ScoringTeacher``.
    """

    def __init__(
        self,
        config: Config,
        files: ModelFiles,
        world: World,
        valid_vocab: int,
        head_rows: slice = slice(None),
    ) -> None:
        log.info("loading the teacher model %s", config.teacher.model_name)
        # No tensor parallelism: large packs are compute-bound, so the group splits positions and gathers full layers.
        reshard = config.teacher.dtensor_cfg.reshard_after_forward
        fused = uses_fused_layers(config.runtime.fused_layers, world.device)
        sharding = Sharding(world.replica_mesh, world.teacher_group, reshard_after_forward=reshard, fused_layers=fused)
        dtype = DTYPES[config.teacher.precision]
        model = load_sharded(
            files, "teacher.model_name", world, sharding, dtype=dtype, compute_dtype=dtype, trainable=False
        )
        super().__init__(config, files, world, valid_vocab, model)
        self._head_VD: Tensor | None = None
        self._head_rows = head_rows
        self._host = FrozenOffload(self.model.parameters()) if world.device.type == "cuda" else None

    def _hidden_rows(self, view: View) -> TeacherRows:
        def use(hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
            if self._head_VD is None:
                # A copy, because FSDP frees the gathered head after the forward.
                self._head_VD = head_VD.detach()[self._head_rows].clone()
            return hidden_ND

        hidden_ND = self._forward(view, use)
        assert self._head_VD is not None
        return TeacherRows(hidden_ND, self._head_VD, self._head_rows.start or 0)

    def onload(self) -> None:
        """Copy the teacher's shards from host memory to the device; not collective."""
        if self._host is not None:
            self._host.restore()

    def offload(self) -> None:
        """Free the teacher's shards on the device; their host copy stays. Not collective.

        The copy of the LM head is freed with the last targets that refer to it.
        """
        self._head_VD = None
        if self._host is None:  # on a CPU, layers stay gathered if reshard_after_forward is false
            self.model.forget_forwards()
        else:
            self.model.reshard_all()
            self._host.release()


def check_top_k(config: Config, vocabulary: int) -> None:
    """Raise UserError if ``distillation.topk_logits_k`` exceeds ``vocabulary``, the number of token ids."""
    k = config.distillation.topk_logits_k
    if k > vocabulary:
        raise UserError(
            f"distillation.topk_logits_k={k} exceeds the vocabulary size {vocabulary} of the teacher"
            f" {config.teacher.model_name}",
            f"set distillation.topk_logits_k to at most {vocabulary}",
            key="distillation.topk_logits_k",
            value=k,
        )
