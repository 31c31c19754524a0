"""The loss of one micro-batch from the student's hidden states, with the weights of its response tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.config import Config
from distill.distributed.world import World
from distill.loss import LikelyTokens, OffPolicyRows, Sampled, VocabParallel, fused_linear_kl, likely_tokens
from distill.loss.token_weights import ResponseRows, needed_values, token_weights
from distill.types import LossOutput, MicroBatch, ResponseGrid, Targets, TeacherRows, TopK

OVERLAP_INTERVAL = 8
"""The metric ``topk_overlap`` is computed at tokens 1, 9, 17, ... of each response, because it needs a top-k."""


@dataclass(frozen=True)
class RowComparison:
    """Comparison of student and teacher at N response tokens of a micro-batch."""

    forward_kl_N: Tensor
    """float32 [N]: KL(teacher || student) in nats."""
    reverse_kl_N: Tensor
    """float32 [N]: KL(student || teacher) in nats."""
    rows_M: Tensor
    """int64 [M]: selected response tokens, as row numbers of the micro-batch."""
    likely: LikelyTokens
    """The most likely tokens of both models at the selected response tokens."""
    topk_overlap_N: Tensor | None = None
    """float32 [N]: fraction of the most likely tokens that both models have in common; None if not computed."""


class MicroBatchLoss:
    """Computes the loss of a micro-batch inside the forward of the student's root module.

    ``parallel``: the split of the LM head over the tensor-parallel group; None without tensor parallelism.
    ``valid_vocab``, ``stop_token_ids``: as in ``Student``. The methods are collective over the ranks that train a
    micro-batch together.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        parallel: VocabParallel | None,
        valid_vocab: int,
        stop_token_ids: Sequence[int],
    ) -> None:
        self._temperature = config.policy.generation.temperature
        self._loss_config = loss_at_temperature(config)
        self._weights = self._loss_config.token_weights
        off_policy = config.distillation.off_policy.kl_type or self._loss_config.kl_type
        self._off_policy_config = replace(self._loss_config, kl_type=off_policy)
        self._parallel = parallel
        self._tp_group, self._cp_group = world.tp_mesh.get_group(), world.cp_group
        self._options: dict[str, Any] = dict(
            chunk_rows=config.policy.logprob_chunk_size or config.runtime.logits_chunk_rows,
            valid_vocab=valid_vocab,
            topk_logits_k=config.distillation.topk_logits_k,
        )
        self._loss_options: dict[str, Any] = self._options | dict(
            stop_token_ids=tuple(stop_token_ids),
            check_values=world.device.type == "cpu",  # on a GPU they would block the host in every micro-batch
        )

    def train(self, hidden_ND: Tensor, head_VD: Tensor, micro_batch: MicroBatch, targets: Targets) -> LossOutput:
        """Return the weighted loss of a micro-batch, summed over its rows, with the rows' final weights."""
        targets = self._with_head(targets, head_VD)
        if micro_batch.grid is not None:
            micro_batch = self._with_final_weights(hidden_ND, head_VD, micro_batch, targets, micro_batch.grid)
        values: dict[str, Tensor] = {}
        overlap_N = micro_batch.token_N % OVERLAP_INTERVAL == 0
        output = self._fused(
            hidden_ND,
            head_VD,
            micro_batch,
            targets,
            values,
            overlap_N=overlap_N,
            off_policy=self._off_policy(micro_batch),
        )
        return replace(output, micro_batch=micro_batch, row_values=values)

    def compare(
        self,
        hidden_ND: Tensor,
        head_VD: Tensor,
        micro_batch: MicroBatch,
        targets: Targets,
        select: Callable[[Tensor], Tensor],
        overlap: bool = False,
    ) -> RowComparison:
        """Return the comparison of student and teacher at the rows of nonzero weight; see ``Student.compare``."""
        targets = self._with_head(targets, head_VD)
        values: dict[str, Tensor] = {}
        overlap_N = torch.ones_like(micro_batch.weight_N, dtype=torch.bool) if overlap else None
        self._fused(hidden_ND, head_VD, micro_batch, targets, values, overlap_N=overlap_N)
        forward_N, reverse_N = values["forward_kl"].float(), values["reverse_kl"].float()
        # A sum over ranks may be rounded differently on each rank, but all ranks must select the same rows.
        largest_N = torch.maximum(forward_N, reverse_N)
        if self._parallel is not None:
            dist.all_reduce(largest_N, op=dist.ReduceOp.MAX, group=self._parallel.group)
        rows_M = select(largest_N.cpu()).to(hidden_ND.device)
        likely = likely_tokens(
            hidden_ND, head_VD, targets, rows_M, self._loss_config, parallel=self._parallel, **self._options
        )
        return RowComparison(forward_N, reverse_N, rows_M, likely, values.get("topk_overlap"))

    def _with_head(self, targets: Targets, head_VD: Tensor) -> Targets:
        """Return ``targets`` with the student's LM head if the teacher has no other one."""
        if not isinstance(targets, TeacherRows) or targets.head_VD is not None:
            return targets
        first = 0 if self._parallel is None else self._parallel.first
        return replace(targets, head_VD=head_VD.detach(), first=first)

    def _fused(
        self,
        hidden_ND: Tensor,
        head_VD: Tensor,
        micro_batch: MicroBatch,
        targets: Targets,
        row_values: dict[str, Tensor],
        **options: Any,
    ) -> LossOutput:
        """Return the loss for the student's hidden states; other arguments: as in ``fused_linear_kl``."""
        return fused_linear_kl(
            hidden_ND,
            head_VD,
            targets,
            self._loss_config,
            micro_batch.weight_N,
            Sampled(micro_batch.sampled_N, micro_batch.sampled_logprobs_N, self._temperature, micro_batch.older_N),
            parallel=self._parallel,
            row_values=row_values,
            kept_M=micro_batch.kept_M,
            **self._loss_options,
            **options,
        )

    def _off_policy(self, micro_batch: MicroBatch) -> OffPolicyRows | None:
        """Return the rows of responses from the dataset, with the settings of their loss; None without such rows."""
        if micro_batch.off_policy_N is None:
            return None
        rows = micro_batch.off_policy_N if micro_batch.off_policy_M is None else micro_batch.off_policy_M
        return OffPolicyRows(rows, self._off_policy_config)

    @torch.no_grad()
    def _with_final_weights(
        self, hidden_ND: Tensor, head_VD: Tensor, micro_batch: MicroBatch, targets: Targets, grid: ResponseGrid
    ) -> MicroBatch:
        """Return the micro-batch with the weights that depend on outputs of the models, without gradient.

        On a GPU the host waits for the weights, because rows of weight 0 are omitted from the loss.
        """
        values = self._scores(hidden_ND, head_VD, micro_batch, targets)
        off_policy_N = micro_batch.off_policy_N
        columns = [
            torch.ones_like(micro_batch.weight_N),
            micro_batch.weight_N,
            torch.zeros_like(micro_batch.weight_N) if off_policy_N is None else off_policy_N,
            micro_batch.sampled_logprobs_N,
            *values.values(),
        ]
        matrices = self._gather(torch.stack([column.double() for column in columns], dim=1), grid)
        read_BR, weight_BR, off_policy_BR, logprob_BR, *of_values = matrices.unbind(dim=2)
        rows = ResponseRows(
            read_BR != 0, weight_BR, off_policy_BR != 0, logprob_BR, dict(zip(values, of_values, strict=True))
        )
        final_BR = token_weights(self._weights, rows)
        weight_N = final_BR.flatten()[grid.cell_N].to(micro_batch.weight_N.dtype)
        return replace(micro_batch, weight_N=weight_N, kept_M=weight_N.nonzero().squeeze(1), off_policy_M=None)

    def _scores(
        self, hidden_ND: Tensor, head_VD: Tensor, micro_batch: MicroBatch, targets: Targets
    ) -> dict[str, Tensor]:
        """Return the row values [N] on which the weights depend, by name, at all rows of the micro-batch.

        Values of the teacher are read from its top-k. Other values need a pass of the loss without gradient.
        """
        names = needed_values(self._weights)
        if isinstance(targets, TopK):
            given = {"teacher_entropy": targets.entropy_N, "teacher_logprob": targets.sampled_logprob_N}
            found = {name: given[name] for name in names if given.get(name) is not None}
            if len(found) == len(names):
                return {name: value_N for name, value_N in found.items() if value_N is not None}
        every_N = torch.arange(len(micro_batch.weight_N), device=hidden_ND.device)
        ones_N = torch.ones_like(micro_batch.weight_N)
        unweighted = replace(micro_batch, weight_N=ones_N, kept_M=every_N, off_policy_M=None)
        values: dict[str, Tensor] = {}
        self._fused(hidden_ND, head_VD, unweighted, targets, values, off_policy=self._off_policy(unweighted))
        return {name: values[name] for name in names}

    def _gather(self, columns_NE: Tensor, grid: ResponseGrid) -> Tensor:
        """Return E numbers of each token of the complete responses of the micro-batch, float64 [B, R, E].

        ``columns_NE``: the numbers of this rank's rows. All ranks that train the micro-batch get the same result:
        tensor-parallel ranks have the same rows, but may round sums differently, so the first rank's numbers are used.
        """
        if self._parallel is not None:
            columns_NE = columns_NE.contiguous()
            dist.broadcast(columns_NE, dist.get_global_rank(self._tp_group, 0), group=self._tp_group)
        cells = grid.responses * grid.tokens
        rows = columns_NE.new_zeros(grid.rows_per_rank, 1 + columns_NE.shape[1])
        rows[:, 0] = cells  # of unused rows: a cell after the last one
        rows[: len(columns_NE), 0] = grid.cell_N.to(rows.dtype)
        rows[: len(columns_NE), 1:] = columns_NE
        parts = [rows]
        if self._cp_group is not None:
            parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(self._cp_group))]
            dist.all_gather(parts, rows, group=self._cp_group)
        gathered = torch.cat(parts)
        matrix = columns_NE.new_zeros(cells + 1, columns_NE.shape[1])
        matrix[gathered[:, 0].long()] = gathered[:, 1:]
        return matrix[:cells].view(grid.responses, grid.tokens, -1)


def loss_at_temperature(config: Config) -> Any:
    """Return ``config.loss_fn``, with a null temperature replaced by the sampling temperature."""
    temperature = config.loss_fn.temperature
    if temperature is None:
        temperature = config.policy.generation.temperature
    return replace(config.loss_fn, temperature=temperature)
