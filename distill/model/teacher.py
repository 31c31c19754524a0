"""The model that judges: frozen, sharded, and asked for response rows only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from distill.batching.context_parallel import shard_view
from distill.batching.plan import view_of
from distill.config import Config
from distill.distributed.world import World
from distill.errors import UserError
from distill.loss import teacher_topk
from distill.model.hf_config import model_config
from distill.model.hf_files import ModelFiles
from distill.model.host_offload import FrozenOffload
from distill.model.sharded import Sharding, load_sharded
from distill.model.student import DTYPES, Student, loss_at_temperature
from distill.model.teacher_check import plain_logits
from distill.supervise.progress import heartbeat
from distill.types import MicroBatch, Targets, TeacherRows, TopK, View

PROOF_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Mean |difference| of log-probs in nats that the packed path may show: rounding makes 1e-5 and 0.1, a fault over 1."""
_PROOF_TOKENS = 32


class Teacher:
    """A frozen model sharded over the ranks in the compute dtype: another one, or the student as it was at the start.

    Every rank makes it and calls its methods at the same points. Away from its phase its shards lie in pinned host
    memory where there is a GPU.
    """

    def __init__(self, config: Config, files: ModelFiles, world: World, valid_vocab: int) -> None:
        self.dtype = DTYPES[config.teacher.precision]
        self.device = world.device
        self._files = files
        self._world = world
        self._valid_vocab = valid_vocab
        loss = loss_at_temperature(config)
        self._top_k = config.distillation.topk_logits_k
        self._temperature = loss.temperature
        self._backend = loss.backend
        self._keeps_sampled = loss.kl_type == "sampled"
        self._gives_rows = loss.support == "student" or self._top_k == 0
        self._head_VD: Tensor | None = None
        self._chunk_rows = config.teacher.logprob_chunk_size or config.runtime.logits_chunk_rows
        self._tp_group = world.tp_mesh.get_group()
        # Large packs are bound by arithmetic, so layers are gathered whole: the group shares positions, not matrices.
        again = config.teacher.dtensor_cfg.reshard_after_forward
        sharding = Sharding(world.replica_mesh, world.teacher_group, reshard_after_forward=again)
        self.model = load_sharded(
            files,
            "teacher.model_name",
            world,
            sharding,
            dtype=self.dtype,
            compute_dtype=self.dtype,
            trainable=False,
        )
        self._host = FrozenOffload(self.model.parameters()) if world.device.type == "cuda" else None

    @torch.no_grad()
    def targets(self, micro_batch: MicroBatch) -> Targets:
        """What the teacher says of every response row of the micro-batch, on its reading of it; collective over the
        shard mesh.

        The top-k of each row; or its hidden row, where the loss asks for the student's tokens or for all of them: the
        head is then kept beside it, whole, until ``after_step``.
        """
        heartbeat()
        view = micro_batch.teacher.to(self.device)
        if self._gives_rows:
            return self._rows(view)
        extra_ids_N = None
        if self._keeps_sampled:
            extra_ids_N = micro_batch.sampled_N.to(self.device)
            if micro_batch.rows_per_tp_rank:
                extra_ids_N = torch.split(extra_ids_N, list(micro_batch.rows_per_tp_rank))[
                    dist.get_rank(self._tp_group)
                ]
        return self._of_group(self._topk(view, self._top_k, extra_ids_N), micro_batch.rows_per_tp_rank)

    def _of_group(self, topk: TopK, shares: tuple[int, ...]) -> TopK:
        """The targets of all rows of a tensor-parallel group, each of whose ranks made its share of them."""
        if not shares:
            return topk
        most = max(shares)

        def gathered(part: Tensor) -> Tensor:
            padded = part.new_zeros(most, *part.shape[1:])
            padded[: len(part)] = part
            parts = [torch.empty_like(padded) for _ in shares]
            dist.all_gather(parts, padded, group=self._tp_group)
            return torch.cat([rows[:count] for rows, count in zip(parts, shares, strict=True)])

        return TopK(
            gathered(topk.ids_NK),
            gathered(topk.logprobs_NK),
            gathered(topk.log_tail_N),
            None if topk.entropy_N is None else gathered(topk.entropy_N),
        )

    def _topk(self, view: View, k: int, extra_ids_N: Tensor | None = None) -> TopK:
        def use(hidden_ND: Tensor, head_VD: Tensor) -> dict[str, Tensor | None]:
            topk = teacher_topk(
                hidden_ND,
                head_VD,
                k,
                self._temperature,
                self._chunk_rows,
                self._valid_vocab,
                extra_ids_N=extra_ids_N,
                backend=self._backend,
            )
            return vars(topk)

        return TopK(**self.model(view, use))

    def _rows(self, view: View) -> TeacherRows:
        def use(hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
            if self._head_VD is None:
                self._head_VD = head_VD.detach().clone()  # the gathered one goes when its module lets it go
            return hidden_ND

        hidden_ND = self.model(view, use)
        assert self._head_VD is not None
        return TeacherRows(hidden_ND, self._head_VD)

    def after_step(self, student: Student) -> None:
        """Let go of what the step's targets needed; a frozen teacher stays as it is."""
        self._head_VD = None

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of the teacher: nothing of a frozen one."""
        return {}

    def resume(self, student: Student) -> None:
        """Go on from what a checkpoint brought: nothing for a frozen one."""

    def onload(self) -> None:
        """Bring the shards back to the device; no collective."""
        if self._host is not None:
            self._host.restore()

    def offload(self) -> None:
        """Let the shards go; their copy in host memory stays."""
        if self._host is not None:
            self.model.reshard_all()
            self._host.release()

    @torch.no_grad()
    def prove(self, sequences: Sequence[Sequence[int]]) -> float:
        """Compare the sharded, packed path with the plain model on 64 tokens of two sequences; the mean |difference|.

        All ranks call it with the same sequences; the main rank streams the plain model. The difference is of the
        log-probs of the teacher's eight likeliest tokens. Raises RuntimeError where it is beyond rounding.
        """
        sequences = [(tuple(s) * (_PROOF_TOKENS + 1))[: _PROOF_TOKENS + 1] for s in sequences[:2]]
        view = view_of([(s[:1], s[1:]) for s in sequences])
        layout = self._world.layout
        if layout.teacher_size > 1:
            rows = torch.arange(len(view.rows_N)).tensor_split(layout.teacher_size)
            view = shard_view(view, rows, layout.rank % layout.teacher_size)
        found = self._topk(view.to(self.device), min(8, self._valid_vocab))
        of_group = self._world.gather((found.ids_NK.long().cpu(), found.logprobs_NK.cpu()))[: layout.teacher_size]
        ids_NK, logprobs_NK = (torch.cat(parts).to(self.device) for parts in zip(*of_group, strict=True))
        difference = torch.zeros(())
        if self._world.is_main:
            config = model_config(self._files, "teacher.model_name")
            plain = plain_logits(self._files, config, [s[:-1] for s in sequences], self.dtype, self.device)
            logits_NV = plain.flatten(0, 1)[:, : self._valid_vocab] / self._temperature
            said = logits_NV.log_softmax(-1).gather(1, ids_NK)
            difference = (said - logprobs_NK).abs().mean()
        mean = self._world.broadcast(float(difference))
        if not mean <= PROOF_LIMIT[self.dtype]:
            raise RuntimeError(
                f"the teacher {self._files.name} answers otherwise when sharded and packed than plainly: log-probs"
                f" differ by {mean:.3g} nats on average, more than {PROOF_LIMIT[self.dtype]:g}"
            )
        return mean


def check_top_k(config: Config, vocabulary: int) -> None:
    """Refuse a top-k beyond the vocabulary, before any weight is loaded."""
    k = config.distillation.topk_logits_k
    if k > vocabulary:
        raise UserError(
            f"distillation.topk_logits_k={k} exceeds the vocabulary ({vocabulary}) of {config.teacher.model_name}:"
            f" set it to at most {vocabulary}"
        )
