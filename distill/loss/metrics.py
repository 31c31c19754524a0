"""The metrics of the loss, from numbers that its pass has anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.loss.divergences import Outcomes, bucket_kls, entropy
from distill.types import Stats, TopK


def row_stats(student: Outcomes, topk: TopK, stop_ids: Tensor, favourite_CK: Tensor | None = None) -> dict[str, Tensor]:
    """What is worth knowing of each row, [C] each: see ``fused_linear_kl``. The student's highest logit is 0.

    ``favourite_CK`` tells which ids no token outlikes with the teacher; without it that is the likeliest kept one.
    """
    forward_C, reverse_C = bucket_kls(student, topk)
    mass_CK = topk.logprobs_NK.exp()
    if favourite_CK is None:
        favourite_CK = topk.logprobs_NK == topk.logprobs_NK.amax(dim=1, keepdim=True)
    rows = {
        "forward_kl": forward_C,
        "reverse_kl": reverse_C,
        "teacher_topk_mass": mass_CK.sum(dim=1),
        "student_topk_mass": student.log_masses_NE()[:, :-1].exp().sum(dim=1),
        "student_entropy": entropy(student),
        # Compared by value: ties are common in bf16, and then both ids are the student's favourite.
        "top1_agreement": (favourite_CK & (student.logits_NK >= 0)).any(dim=1),
    }
    if topk.entropy_N is not None:
        rows["teacher_entropy"] = topk.entropy_N
    if stop_ids.numel():
        rows["teacher_stop_mass"] = (mass_CK * torch.isin(topk.ids_NK, stop_ids)).sum(dim=1)
    return rows


def sampler_stats(own_logprob_C: Tensor, sampler_logprob_C: Tensor) -> dict[str, Tensor]:
    """The trainer's log-prob of the sampled tokens, and how far the sampler's is from it."""
    return {"student_logprob": own_logprob_C, "sampler_logprob_diff": (own_logprob_C - sampler_logprob_C).abs()}


class StatsSum:
    """Collects the rows of all chunks and adds them up once, in float64: the chunk size leaves no trace."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Tensor]] = {}

    def add(self, rows: dict[str, Tensor]) -> None:
        """Take the metrics of one chunk."""
        for name, values_C in rows.items():
            self._rows.setdefault(name, []).append(values_C)

    def rows(self, name: str) -> Tensor:
        """One metric of all rows so far."""
        return torch.cat(self._rows[name])

    def stats(self) -> Stats:
        """(sum, count) by name; under a name that ends in ``_max`` the first number is a maximum."""
        stats: Stats = {}
        for name in self._rows:
            values_N = self.rows(name)
            stats[name] = (values_N.sum(dtype=torch.float64), float(values_N.numel()))
        if "sampler_logprob_diff" in stats:
            apart_N = self.rows("sampler_logprob_diff").double()
            highest = apart_N.max() if apart_N.numel() else apart_N.sum()
            stats["sampler_logprob_diff_max"] = (highest, float(apart_N.numel() > 0))
        return stats
