"""Metrics of the loss per row, from numbers that its passes compute anyway; and the sampled tokens' log-probs."""

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
    """Metrics of C rows, [C] each; absent metrics are None. KLs and entropies in nats."""

    forward_kl: Tensor
    """KL(teacher || student), the tail as one outcome."""
    reverse_kl: Tensor
    """KL(student || teacher), the tail as one outcome."""
    teacher_topk_mass: Tensor
    """Teacher's probability of the kept ids together."""
    student_topk_mass: Tensor
    """Student's probability of the kept ids together."""
    student_entropy: Tensor
    """Entropy of the student's full distribution."""
    top1_agreement: Tensor
    """bool: one token has the largest logit of both models."""
    teacher_entropy: Tensor | None
    """Entropy of the teacher's full distribution."""
    teacher_stop_mass: Tensor | None
    """Teacher's probability of the stop tokens among the kept ids."""

    def by_name(self) -> dict[str, Tensor]:
        """Return the metrics that are present, by name."""
        return {name: values_C for name, values_C in vars(self).items() if values_C is not None}


def topk_metrics(
    student: Outcomes, topk: TopK, stop_ids: Tensor, is_top1_CK: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the row metrics of a top-k loss; the student's largest logit must be 0.

    ``is_top1_CK``: which kept ids are the teacher's argmax, ties included; None: the most likely of the kept ids.
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
        # Compared by value: ties are common in bf16, and then several ids are the student's argmax.
        top1_agreement=(is_top1_CK & (student.logits_NK >= 0)).any(dim=1),
        teacher_entropy=topk.entropy_N,
        teacher_stop_mass=(mass_CK * torch.isin(topk.ids_NK, stop_ids)).sum(dim=1) if stop_ids.numel() else None,
    ).by_name()


class StatsSum:
    """Rows of all chunks, summed once in float64: the result does not depend on the chunk size."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Tensor]] = {}

    def add(self, rows: dict[str, Tensor]) -> None:
        """Append the metrics of one chunk."""
        for name, values_C in rows.items():
            self._rows.setdefault(name, []).append(values_C)

    def rows(self, name: str) -> Tensor:
        """Return one metric of all rows so far, [N]."""
        return torch.cat(self._rows[name])

    def stats(self) -> Stats:
        """Return (sum, count) by name; the first number of a name that ends in ``_max`` is a maximum."""
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
    """The response tokens of N rows with the sampler's log-probs."""

    ids_N: Tensor
    """int64 [N]: token ids."""
    logprobs_N: Tensor
    """float32 [N]: the sampler's log-probs in nats, at the sampling temperature."""
    temperature: float
    """Sampling temperature; ``loss_fn.temperature: null`` means this one."""


@dataclass(frozen=True)
class SampledLogprobs:
    """The trainer's log-probs of the sampled tokens, in two steps: before and after a pass overwrites the logits."""

    sampled: Sampled | None
    """None: no metric is reported."""
    temperature: float
    """The loss's temperature."""
    first: int
    """Vocabulary id of this rank's first column."""
    group: dist.ProcessGroup | None
    """Ranks that hold the columns of the head; None: all columns are here."""

    def tokens(self, rows: Rows) -> Tokens | None:
        """Return the sampled tokens of a chunk."""
        sampled = self.sampled
        return None if sampled is None else Tokens(sampled.ids_N[rows], sampled.logprobs_N[rows])

    def read(self, z_CV: Tensor, rows: Rows, scratch: Scratch, dtype: torch.dtype) -> Tensor:
        """Return [C, E] of ``dtype``, to be summed over the group, from logits not yet divided by a temperature.

        The columns are the token's logit and, if sampling and loss temperature differ, the sum of exponentials at the
        sampling temperature. Leaves ``z_CV`` unchanged. Collective over the group if the temperatures differ.
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
        """Return the trainer's log-probs of the tokens and their absolute difference from the sampler's, [C] each.

        ``read_CE``: the result of ``read``, summed over the group. ``shift_C`` + ``lse_C``: logsumexp of the loss's
        logits, used if the sampling temperature is the loss's.
        """
        if self.sampled is None:
            return {}
        if read_CE.shape[1] == 1:
            logprob_C = read_CE[:, 0] - shift_C - lse_C
        else:
            logprob_C = read_CE[:, 0] - read_CE[:, 1].log()
        diff_C = (logprob_C - self.sampled.logprobs_N[rows]).abs()
        return {"student_logprob": logprob_C, "sampler_logprob_diff": diff_C}
