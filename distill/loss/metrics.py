"""Metrics of each row of the loss, and log-probs of the sampled tokens.

They are computed from numbers that the loss needs anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distill.loss.divergences import Outcomes, Tokens, bucket_kls, entropy
from distill.loss.topk_reduction import Rows, Scratch
from distill.types import Stats, TopK


@dataclass(frozen=True)
class RowMetrics:
    """Metrics of C rows, [C] each; a metric that is not available is None.

    KLs and entropies are in nats.
    """

    forward_kl: Tensor
    """KL(teacher || student), with the tail as one outcome."""
    reverse_kl: Tensor
    """KL(student || teacher), with the tail as one outcome."""
    teacher_topk_mass: Tensor
    """Total probability of the kept ids in the teacher's distribution."""
    student_topk_mass: Tensor
    """Total probability of the kept ids in the student's distribution."""
    student_entropy: Tensor
    """Entropy of the student's full distribution."""
    top1_agreement: Tensor
    """bool: whether a token has the largest logit in both models, ties included."""
    teacher_entropy: Tensor | None
    """Entropy of the teacher's full distribution; None if the targets do not include it."""
    teacher_stop_mass: Tensor | None
    """Total teacher probability of the stop tokens among the kept ids; None without stop tokens."""

    def by_name(self) -> dict[str, Tensor]:
        """Return the available metrics by name."""
        return {name: values_C for name, values_C in vars(self).items() if values_C is not None}


def topk_metrics(
    student: Outcomes, topk: TopK, stop_ids: Tensor, is_top1_CK: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the row metrics of a top-k loss by name.

    ``student`` must be shifted so that the largest logit of each row is 0. ``is_top1_CK`` marks the kept ids with the
    teacher's largest logit, ties included. None marks the most likely of the kept ids.
    """
    forward_C, reverse_C = bucket_kls(student, topk)
    mass_CK = topk.logprobs_NK.exp()
    if is_top1_CK is None:
        is_top1_CK = topk.logprobs_NK == topk.logprobs_NK.amax(dim=1, keepdim=True)
    return RowMetrics(
        forward_kl=forward_C,
        reverse_kl=reverse_C,
        teacher_topk_mass=mass_CK.sum(dim=1),
        student_topk_mass=student.log_masses_NE()[:, :-1].exp().sum(dim=1),
        student_entropy=entropy(student),
        # Compare logits, not argmax ids: ties are common in bf16.
        top1_agreement=(is_top1_CK & (student.logits_NK >= 0)).any(dim=1),
        teacher_entropy=topk.entropy_N,
        teacher_stop_mass=(mass_CK * torch.isin(topk.ids_NK, stop_ids)).sum(dim=1) if stop_ids.numel() else None,
    ).by_name()


class StatsSum:
    """Row metrics of all chunks, summed once at the end.

    The sums are in float64, so that the chunk size does not change the result.
    """

    def __init__(self) -> None:
        self._rows: dict[str, list[Tensor]] = {}

    def add(self, rows: dict[str, Tensor]) -> None:
        """Append the metrics of one chunk, given by name."""
        for name, values_C in rows.items():
            self._rows.setdefault(name, []).append(values_C)

    def rows(self, name: str) -> Tensor:
        """Return one metric of all rows added so far, [N]."""
        return torch.cat(self._rows[name])

    def stats(self) -> Stats:
        """Return (sum, count) by metric name; for a name that ends in ``_max`` the first number is a maximum."""
        stats: Stats = {}
        for name in self._rows:
            values_N = self.rows(name)
            stats[name] = (values_N.sum(dtype=torch.float64), float(values_N.numel()))
        if "sampler_logprob_diff" in stats:
            diff_N = self.rows("sampler_logprob_diff").double()
            highest = diff_N.max() if diff_N.numel() else diff_N.sum()
            stats["sampler_logprob_diff_max"] = (highest, float(diff_N.numel() > 0))
        return stats


@dataclass(frozen=True)
class Sampled:
    """The response tokens of N rows, with their log-probs."""

    ids_N: Tensor
    """int64 [N]: token ids."""
    logprobs_N: Tensor
    """float32 [N]: the sampler's log-probs of the tokens in nats, at the sampling temperature."""
    temperature: float
    """Sampling temperature; also the temperature of the loss if ``loss_fn.temperature`` is null."""


@dataclass(frozen=True)
class SampledLogprobs:
    """Computation of the trainer's log-probs of the sampled tokens, in two steps.

    The loss calls ``read`` before it overwrites the logits, and ``metrics`` after it has computed their logsumexp.
    """

    sampled: Sampled | None
    """The sampled tokens; if None, no metrics are computed."""
    temperature: float
    """Temperature of the loss."""
    first: int
    """Vocabulary id of this rank's first column."""
    group: dist.ProcessGroup | None
    """Ranks over which the columns of logits are sharded; None if this rank has all columns."""

    def tokens(self, rows: Rows) -> Tokens | None:
        """Return the sampled tokens of a chunk, or None if there are no sampled tokens."""
        sampled = self.sampled
        return None if sampled is None else Tokens(sampled.ids_N[rows], sampled.logprobs_N[rows])

    def read(self, z_CV: Tensor, rows: Rows, scratch: Scratch, dtype: torch.dtype) -> Tensor:
        """Return this rank's terms of the log-probs of the sampled tokens, [C, E] of ``dtype``.

        The caller sums the terms over the group and passes the sums to ``metrics``. ``z_CV`` has the raw logits, not
        divided by a temperature, and is not modified. Without sampled tokens E is 0. If the loss uses the sampling
        temperature, the only column is the token's logit divided by this temperature. Otherwise the columns are this
        logit minus the row's largest, and the sum of exponentials of all such differences. In this case the method is
        collective over the group.
        """
        if self.sampled is None:
            return torch.zeros(len(z_CV), 0, dtype=dtype, device=z_CV.device)
        columns_C = self.sampled.ids_N[rows].long() - self.first
        here_C = (columns_C >= 0) & (columns_C < z_CV.shape[1])
        columns_C1 = columns_C.masked_fill(~here_C, 0).unsqueeze(1)
        chosen_C = z_CV.gather(1, columns_C1).squeeze(1).to(dtype) / self.sampled.temperature
        if self.sampled.temperature == self.temperature:
            return chosen_C.masked_fill(~here_C, 0.0).unsqueeze(1)
        spare_CV = scratch.get("spare", len(z_CV), dtype).copy_(z_CV).div_(self.sampled.temperature)
        top_C = spare_CV.amax(dim=1)
        if self.group is not None:
            dist.all_reduce(top_C, op=dist.ReduceOp.MAX, group=self.group)
        chosen_C = (chosen_C - top_C).masked_fill(~here_C, 0.0)
        return torch.stack([chosen_C, spare_CV.sub_(top_C.unsqueeze(1)).exp_().sum(dim=1)], dim=1)

    def metrics(self, rows: Rows, read_CE: Tensor, shift_C: Tensor, lse_C: Tensor) -> dict[str, Tensor]:
        """Return the trainer's log-probs and their absolute differences from the sampler's, by name.

        ``read_CE`` is the result of ``read``, summed over the group. ``shift_C + lse_C`` is the logsumexp of the logits
        at the loss's temperature; it is used if the loss uses the sampling temperature.
        """
        if self.sampled is None:
            return {}
        if read_CE.shape[1] == 1:
            logprob_C = read_CE[:, 0] - shift_C - lse_C
        else:
            logprob_C = read_CE[:, 0] - read_CE[:, 1].log()
        diff_C = (logprob_C - self.sampled.logprobs_N[rows]).abs()
        return {"student_logprob": logprob_C, "sampler_logprob_diff": diff_C}
