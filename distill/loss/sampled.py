"""The sampled tokens: what the trainer's own logits say of them, beside what the sampler said."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distill.loss.reduction import Scratch
from distill.loss.targets import Rows


@dataclass(frozen=True)
class Sampled:
    """The response tokens of N rows and what the sampler thought of them."""

    ids_N: Tensor
    """int64 [N]."""
    logprobs_N: Tensor
    """float32 [N], nats, at the sampling temperature."""
    temperature: float
    """The sampling temperature: what ``loss_fn.temperature: null`` means."""


@dataclass(frozen=True)
class SampledReader:
    """Takes what the sampled tokens need from the logits before a pass overwrites them, and finishes after it."""

    sampled: Sampled | None
    temperature: float
    """The loss's."""
    first: int
    """The vocabulary's id of this rank's first column."""
    group: dist.ProcessGroup | None

    def read(self, z_CV: Tensor, rows: Rows, scratch: Scratch, dtype: torch.dtype) -> Tensor:
        """[C, E] of ``dtype``, to be summed over the ranks of the group; ``z_CV`` is not divided yet and stays."""
        if self.sampled is None:
            return torch.zeros(len(z_CV), 0, dtype=dtype, device=z_CV.device)
        columns_C = self.sampled.ids_N[rows].long() - self.first
        mine_C = (columns_C >= 0) & (columns_C < z_CV.shape[1])
        columns_C1 = columns_C.masked_fill(~mine_C, 0).unsqueeze(1)
        chosen_C = z_CV.gather(1, columns_C1).squeeze(1).to(dtype) / self.sampled.temperature
        if self.sampled.temperature == self.temperature:
            return chosen_C.masked_fill(~mine_C, 0.0).unsqueeze(1)
        spare_CV = scratch.get("spare", len(z_CV), dtype).copy_(z_CV).div_(self.sampled.temperature)
        top_C = spare_CV.amax(dim=1)
        if self.group is not None:
            dist.all_reduce(top_C, op=dist.ReduceOp.MAX, group=self.group)
        chosen_C = (chosen_C - top_C).masked_fill(~mine_C, 0.0)
        return torch.stack([chosen_C, spare_CV.sub_(top_C.unsqueeze(1)).exp_().sum(dim=1)], dim=1)

    def logprobs(self, read_CE: Tensor, shift_C: Tensor, lse_C: Tensor) -> Tensor:
        """The trainer's log-probs of the sampled tokens, at the sampling temperature.

        ``shift_C`` and ``lse_C`` are those of the loss's logits, used where the two temperatures are one.
        """
        if read_CE.shape[1] == 1:
            return read_CE[:, 0] - shift_C - lse_C
        return read_CE[:, 0] - read_CE[:, 1].log()
