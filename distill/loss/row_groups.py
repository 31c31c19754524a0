"""Groups of the rows of the loss, one for each configuration of the loss, and their chunks.

A row is one response token. Rows of weight 0 are in no group. Usually there is one group. Responses from the dataset
(off-policy rows) form a second group with its own ``LossConfig``. A chunk is a set of rows that the loss computes
together; all rows of a chunk are in one group, so a second group needs no additional buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.errors import UserError
from distill.loss import checks
from distill.loss.topk_reduction import Rows

OFF_POLICY = "off_policy_"
"""Prefix of the names of metrics of off-policy rows."""
_SHARED_FIELDS = ("support", "temperature", "logits_dtype", "backend")


@dataclass(frozen=True)
class OffPolicyRows:
    """The rows of responses from the dataset, for which the loss has another configuration."""

    rows: Tensor
    """bool [N]: whether a row is off-policy. Or int64: the indices of the off-policy rows of nonzero weight.

    With a mask on a GPU the host waits for the GPU, to count the rows.
    """
    loss_config: LossConfig
    """Settings of the loss of these rows: another divergence, cap or clip.

    ``kl_type=sampled`` is not possible, because the responses have no log-probs of a sampler. The fields ``support``,
    ``temperature``, ``logits_dtype`` and ``backend`` are those of the other rows.
    """

    def check(self, loss_config: LossConfig, weight_N: Tensor, kept_M: Tensor | None, check_values: bool) -> None:
        """Raise ``UserError`` if the settings conflict with those of the other rows, or ``rows`` is invalid.

        ``loss_config``: the settings of the other rows. ``weight_N``, ``kept_M``: as in ``fused_linear_kl``.
        ``check_values``: whether to check the indices in ``rows``, for which the host waits for a GPU.
        """
        checks.check_loss(self.loss_config)
        if self.loss_config.kl_type == "sampled":
            raise UserError(
                "distillation.off_policy.kl_type=sampled needs log-probs of a sampler, which responses from the "
                "dataset do not have",
                "set distillation.off_policy.kl_type to another value",
                key="distillation.off_policy.kl_type",
                value="sampled",
            )
        for name in _SHARED_FIELDS:
            ours, theirs = getattr(self.loss_config, name), getattr(loss_config, name)
            if ours != theirs:
                problem = f"{name}={ours} of the off-policy rows differs from {name}={theirs} of the other rows"
                raise UserError(problem, f"set {name}={theirs} for both", key=f"off_policy.{name}", value=ours)
        if self.rows.dtype == torch.bool:
            checks.check_rows(len(weight_N), off_policy_N=self.rows)
        elif self.rows.dtype != torch.int64:
            problem = f"the indices of the off-policy rows have dtype {self.rows.dtype}"
            fix = "pass int64 indices, or a bool mask"
            raise UserError(problem, fix, key="off_policy.rows", value=self.rows.dtype)
        elif check_values and len(self.rows):
            kept_N = weight_N != 0
            self._check_indices(kept_N if kept_M is None else kept_N.fill_(False).index_fill_(0, kept_M, True))

    def _check_indices(self, kept_N: Tensor) -> None:
        """Raise ``UserError`` if an index in ``rows`` is out of range, repeated, or that of a row of weight 0."""
        count, (least, most) = len(self.rows), (int(bound) for bound in self.rows.aminmax())
        if least < 0 or most >= len(kept_N):
            problem = (
                f"the indices of the off-policy rows range from {least} to {most}, but there are {len(kept_N)} rows"
            )
            raise UserError(problem, "pass indices of rows", key="off_policy.rows", value=(least, most))
        if int((self.mask_N(len(kept_N)) & kept_N).sum()) != count:
            problem = "the indices of the off-policy rows contain a row of weight 0, or a row twice"
            fix = "pass the index of each off-policy row of nonzero weight once"
            raise UserError(problem, fix, key="off_policy.rows", value=count)

    def mask_N(self, rows: int) -> Tensor:
        """Return a bool mask of the off-policy rows, [N] for N = ``rows``."""
        if self.rows.dtype == torch.bool:
            return self.rows
        return torch.zeros(rows, dtype=torch.bool, device=self.rows.device).index_fill_(0, self.rows, True)


def weights_by_config(
    loss_config: LossConfig, weight_N: Tensor, off_policy: OffPolicyRows | None
) -> list[tuple[LossConfig, Tensor]]:
    """Return each configuration of the loss with the weights [N] of its rows; other rows have weight 0."""
    if off_policy is None:
        return [(loss_config, weight_N)]
    mask_N = off_policy.mask_N(len(weight_N))
    masked = weight_N.masked_fill(mask_N, 0.0), weight_N.masked_fill(~mask_N, 0.0)
    return [(loss_config, masked[0]), (off_policy.loss_config, masked[1])]


@dataclass(frozen=True)
class RowGroup:
    """Rows of nonzero weight that have the same configuration of the loss, split into chunks."""

    chunks: Sequence[Rows]
    """Rows of each chunk; at least one chunk, which has no rows if the group has none."""
    loss_config: LossConfig
    prefix: str = ""
    """Text before the names of the group's metrics."""

    @property
    def largest(self) -> int:
        """Return the number of rows in the largest chunk."""
        return max(map(_length, self.chunks))


@dataclass(frozen=True)
class RowGroups:
    """All groups of rows; each row of nonzero weight is in exactly one group."""

    groups: tuple[RowGroup, ...]
    order_M: Tensor | None = None
    """int64 [M]: for each row of nonzero weight, its index in the concatenated chunks; None: the same order."""

    @classmethod
    def of(
        cls,
        weight_N: Tensor,
        kept_M: Tensor | None,
        chunk_rows: int,
        loss_config: LossConfig,
        off_policy: OffPolicyRows | None,
    ) -> RowGroups:
        """Return the groups of the rows of nonzero weight, with chunks of at most ``chunk_rows`` rows.

        ``kept_M``: the indices of these rows, ascending; None: they are read from ``weight_N``, for which the host
        waits for a GPU.
        """
        kept_M = weight_N.detach().nonzero().squeeze(1) if kept_M is None else kept_M
        if off_policy is None:
            return cls((RowGroup(_chunks(kept_M, len(weight_N), chunk_rows), loss_config),))
        is_off_M = off_policy.mask_N(len(weight_N))[kept_M]
        off_count = int(is_off_M.sum()) if off_policy.rows.dtype == torch.bool else len(off_policy.rows)
        count = len(kept_M) - off_count
        # A stable sort needs no sizes on the host, so that with indices the host does not wait for a GPU.
        order_M = is_off_M.to(torch.int8).argsort(stable=True)
        parts = (
            (kept_M[order_M[:count]], loss_config, ""),
            (kept_M[order_M[count:]], off_policy.loss_config, OFF_POLICY),
        )
        groups = [RowGroup(torch.split(rows_M, chunk_rows), config, prefix) for rows_M, config, prefix in parts]
        return cls(tuple(groups), order_M.argsort())

    @property
    def largest(self) -> int:
        """Return the number of rows in the largest chunk."""
        return max(group.largest for group in self.groups)

    def in_order(self, by_group: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the values of each metric in the order of the rows, from the values of each group by metric name."""
        joined = {name: torch.cat([values[name] for values in by_group]) for name in by_group[0]}
        return joined if self.order_M is None else {name: values[self.order_M] for name, values in joined.items()}


def _chunks(kept_M: Tensor, rows: int, chunk_rows: int) -> list[Rows]:
    """Return the rows ``kept_M`` of ``rows`` rows, split into chunks of at most ``chunk_rows`` rows.

    If ``kept_M`` is empty, the result is one empty chunk, so that the loss still returns all metric names.
    """
    if len(kept_M) < rows:
        return list(torch.split(kept_M, chunk_rows))
    return [slice(start, min(start + chunk_rows, len(kept_M))) for start in range(0, max(len(kept_M), 1), chunk_rows)]


def _length(chunk: Rows) -> int:
    return int(chunk.stop - chunk.start) if isinstance(chunk, slice) else len(chunk)
