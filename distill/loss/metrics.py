"""Metrics of each row of the loss, and the trainer's log-probs of the sampled tokens.

A row is one response token. The metrics are computed from results of the loss, without another pass over the logits.
The only exception is the log-prob of the sampled token: it needs another pass if the temperature of the loss differs
from the sampling temperature.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.loss.columns import Columns
from distill.loss.divergences import Outcomes, Tokens, bucket_kls, entropy
from distill.loss.topk_reduction import Rows, Scratch
from distill.types import Stats, TopK


@dataclass(frozen=True)
class RowMetrics:
    """Metrics of C rows (response tokens), [C] each; a metric that is not available is None.

    The top-k of a row is the set of K token ids that the loss compares. With ``distillation.topk_logits_k=0`` it is the
    complete vocabulary.
    """

    forward_kl: Tensor
    """[C]: KL(teacher || student) of each row in nats.

    The compared outcomes are the K top-k tokens, and all other tokens as one outcome.
    """
    reverse_kl: Tensor
    """[C]: KL(student || teacher) of each row in nats.

    The compared outcomes are the K top-k tokens, and all other tokens as one outcome.
    """
    teacher_topk_mass: Tensor
    """[C]: the teacher's total probability of the top-k tokens of each row."""
    student_topk_mass: Tensor
    """[C]: the student's total probability of the top-k tokens of each row.

    The tokens are the same as for ``teacher_topk_mass``.
    """
    student_entropy: Tensor
    """[C]: entropy in nats of the student's distribution over the complete vocabulary."""
    top1_agreement: Tensor
    """bool [C]: whether a most likely token of the teacher is also a most likely token of the student.

    A model has several most likely tokens if their logits are equal. With ``distillation.topk_logits_k=0``, only one
    of the teacher's most likely tokens is compared.
    """
    teacher_entropy: Tensor | None
    """[C]: entropy in nats of the teacher's distribution over the complete vocabulary.

    None if the ``TopK`` from the teacher has no entropy.
    """
    teacher_stop_mass: Tensor | None
    """[C]: the teacher's total probability of the stop tokens in the top-k; None without stop tokens."""
    teacher_logprob: Tensor | None
    """[C]: the teacher's log-prob of the sampled token in nats, at the loss's temperature; None if not computed."""
    topk_overlap: Tensor | None = None
    """[C]: fraction of the K most likely tokens that both models have in common; nan in rows without this metric.

    None if it is not computed, or if K is 0.
    """

    def by_name(self) -> dict[str, Tensor]:
        """Return a dict from the name of each metric to its values [C], without the metrics that are None."""
        return {name: values_C for name, values_C in vars(self).items() if values_C is not None}


def topk_metrics(
    student: Outcomes,
    topk: TopK,
    stop_ids: Tensor,
    is_top1_CK: Tensor | None = None,
    overlap_C: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the metrics of C rows for a loss over the token ids of ``topk``.

    The result is a dict from metric name to values [C]; the metrics are the fields of ``RowMetrics``. The logits in
    ``student`` must be shifted so that the largest logit of each row is 0. ``is_top1_CK`` is a bool mask of the ids
    with the teacher's largest logit in the vocabulary, ties included. If it is None, the ids with the largest log-prob
    in ``topk`` are used. ``stop_ids`` has the token ids for the metric ``teacher_stop_mass``.
    ``overlap_C`` is the metric ``topk_overlap``.
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
        teacher_logprob=topk.sampled_logprob_N,
        topk_overlap=overlap_C,
    ).by_name()


_WITH_GAPS = {"sampler_logprob_diff", "topk_overlap"}
"""Metrics that may be nan in rows in which they are not available."""


class StatsSum:
    """Collects the metrics of all rows (response tokens); ``stats`` returns their sums over the rows.

    The sums are in float64. They do not depend on the division of the rows into chunks.
    """

    def __init__(self) -> None:
        self._rows: dict[str, list[Tensor]] = {}

    def add(self, rows: dict[str, Tensor]) -> None:
        """Append the metrics of one chunk of C rows; ``rows`` maps the name of a metric to its values [C]."""
        for name, values_C in rows.items():
            self._rows.setdefault(name, []).append(values_C)

    def rows(self, name: str) -> Tensor:
        """Return the values of the metric ``name`` for all rows added so far, [N]."""
        return torch.cat(self._rows[name])

    def all_rows(self) -> dict[str, Tensor]:
        """Return a dict from the name of each metric to its values for all rows added so far, [N]."""
        return {name: self.rows(name) for name in self._rows}

    def stats(self) -> Stats:
        """Return a dict from metric name to (sum over rows, number of rows).

        Rows in which a metric of ``_WITH_GAPS`` is nan do not count in this metric. For ``sampler_logprob_diff_max``
        the pair is (maximum of ``sampler_logprob_diff``, 1), or (-inf, 0) without rows.
        """
        stats: Stats = {}
        for name in self._rows:
            values_N = self.rows(name)
            stats[name] = (values_N.sum(dtype=torch.float64), float(values_N.numel()))
        for name in _WITH_GAPS & stats.keys():
            values_N = self.rows(name).double()
            missing_N = values_N.isnan()
            count = (~missing_N).sum()  # a tensor, so that the host does not wait for the device
            stats[name] = (values_N.masked_fill(missing_N, 0.0).sum(), count)
            if name == "sampler_logprob_diff":
                known_N = values_N.masked_fill(missing_N, -torch.inf)
                stats[f"{name}_max"] = (torch.nn.functional.pad(known_N, (0, 1), value=-torch.inf).max(), count > 0)
        return stats


@dataclass(frozen=True)
class Sampled:
    """The N sampled response tokens, one per row of the loss, with the sampler's log-probs."""

    ids_N: Tensor
    """int64 [N]: ids of the sampled tokens."""
    logprobs_N: Tensor
    """float32 [N]: the sampler's log-probs of the sampled tokens, in nats, at the sampling temperature.

    nan in rows whose log-prob the sampler did not compute; not allowed with ``loss_fn.kl_type=sampled``.
    """
    temperature: float
    """Temperature of the sampler; also the temperature of the loss if ``loss_fn.temperature`` is null."""
    older_N: Tensor | None = None
    """bool [N]: tokens that older weights generated; they do not count in ``sampler_logprob_diff``. None: no token."""


@dataclass(frozen=True)
class SampledLogprobs:
    """Computation of the trainer's log-probs of the sampled tokens, in two steps per chunk of tokens.

    The loss calls ``read`` before it overwrites the student's logits of a chunk, and ``metrics`` after it has computed
    the logsumexp of these logits.
    """

    sampled: Sampled | None
    """The sampled tokens; None disables the metrics of sampled tokens."""
    temperature: float
    """Temperature that divides the logits in the loss; may differ from the sampling temperature."""
    columns: Columns
    """The columns of logits that this rank computes."""

    def tokens(self, rows: Rows) -> Tokens | None:
        """Return the sampled tokens of a chunk of rows, or None if ``sampled`` is None."""
        sampled = self.sampled
        return None if sampled is None else Tokens(sampled.ids_N[rows], sampled.logprobs_N[rows])

    def read(self, z_CV: Tensor, rows: Rows, scratch: Scratch, dtype: torch.dtype) -> Tensor:
        """Return this rank's contribution to the log-probs of the sampled tokens: E numbers per row, [C, E].

        The caller sums the result over the ranks of ``columns.group`` and passes the sum to ``metrics``. ``z_CV`` has
        the student's raw logits, not divided by a temperature, and is not modified. Below, z is a logit divided by the
        sampling temperature, y the sampled token, and m the largest z of the row over all ranks.

        - Without sampled tokens, E is 0.
        - If the loss uses the sampling temperature, E is 1: z_y, or 0 if y is a column of another rank.
        - Otherwise E is 2. The first number is z_y - m, or 0 if y is a column of another rank. The second number is the
          sum of exp(z - m) over this rank's columns. Only in this case the method is collective over ``columns.group``.
        """
        if self.sampled is None:
            return torch.zeros(len(z_CV), 0, dtype=dtype, device=z_CV.device)
        columns_C = self.columns.own_ids(self.sampled.ids_N[rows].long())
        here_C = columns_C >= 0
        chosen_C = z_CV.gather(1, columns_C.clamp(min=0).unsqueeze(1)).squeeze(1).to(dtype) / self.sampled.temperature
        if self.sampled.temperature == self.temperature:
            return chosen_C.masked_fill(~here_C, 0.0).unsqueeze(1)
        spare_CV = scratch.get("spare", len(z_CV), dtype).copy_(z_CV).div_(self.sampled.temperature)
        top_C = self.columns.max(spare_CV.amax(dim=1))
        chosen_C = (chosen_C - top_C).masked_fill(~here_C, 0.0)
        return torch.stack([chosen_C, spare_CV.sub_(top_C.unsqueeze(1)).exp_().sum(dim=1)], dim=1)

    def metrics(self, rows: Rows, read_CE: Tensor, shift_C: Tensor, lse_C: Tensor) -> dict[str, Tensor]:
        """Return a dict with ``student_logprob`` and ``sampler_logprob_diff`` of a chunk, [C] each in nats.

        The first is the trainer's log-prob of the sampled token. The second is the absolute difference between this
        log-prob and the sampler's log-prob; it is nan in the rows ``Sampled.older_N``. Without sampled tokens the dict
        is empty. ``read_CE`` is the result of ``read``, summed over the ranks. ``shift_C + lse_C`` is logsumexp(z / T),
        with the student's logits z and the loss's temperature T. These two arguments are used only if T is the sampling
        temperature.
        """
        if self.sampled is None:
            return {}
        if read_CE.shape[1] == 1:
            logprob_C = read_CE[:, 0] - shift_C - lse_C
        else:
            logprob_C = read_CE[:, 0] - read_CE[:, 1].log()
        diff_C = (logprob_C - self.sampled.logprobs_N[rows]).abs()
        if self.sampled.older_N is not None:
            diff_C = diff_C.masked_fill(self.sampled.older_N[rows], torch.nan)
        return {"student_logprob": logprob_C, "sampler_logprob_diff": diff_C}
