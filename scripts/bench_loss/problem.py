"""Create the inputs of the benchmark and their float64 reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from distill.loss import teacher_topk
from distill.types import TopK

DISTINCT = 16
"""Number of distinct rows; the other rows repeat them."""


@dataclass(frozen=True)
class Size:
    """Size of a problem: N rows, V vocabulary entries, hidden width D and K kept ids.

    ``chunk_rows``: rows per chunk of the fused head; None uses the head's default. ``valid``: number of vocabulary
    entries that are tokens, and not padding; None: all.
    """

    rows: int
    vocab: int
    width: int
    k: int
    chunk_rows: int | None = None
    valid: int | None = None

    def __str__(self) -> str:
        tokens = "" if self.valid is None else f" ({self.valid} tokens)"
        return f"N={self.rows} V={self.vocab}{tokens} D={self.width} K={self.k}"


@dataclass(frozen=True)
class Outcome:
    """Loss and gradients that a contender computes."""

    kl_sum: Tensor
    d_hidden_ND: Tensor
    d_head_VD: Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """Inputs with similar logits of student and teacher; row n equals row n % R of R distinct rows."""

    size: Size
    hidden_ND: Tensor
    head_VD: Tensor
    teacher_hidden_ND: Tensor
    teacher_head_VD: Tensor
    topk: TopK
    weight_N: Tensor

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Return the student's hidden rows and head as leaf tensors that require gradients."""
        return self.hidden_ND.detach().requires_grad_(), self.head_VD.detach().requires_grad_()

    @property
    def gradient_numels(self) -> tuple[int, int]:
        """Return the numbers of elements of the gradients of the hidden rows and of the head."""
        return self.hidden_ND.numel(), self.head_VD.numel()


def make_problem(size: Size, device: torch.device, dtype: torch.dtype) -> Problem:
    """Return a random problem; logits have a standard deviation of about 2, weights are in [0.5, 1.5]."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden_RD, head_VD = normal(DISTINCT, size.width), normal(size.vocab, size.width) * (2 / math.sqrt(size.width))
    teacher_hidden_RD = (hidden_RD + normal(DISTINCT, size.width) / 2).to(dtype)
    teacher_head_VD = (head_VD + normal(size.vocab, size.width) / math.sqrt(size.width)).to(dtype)
    rows_N = torch.arange(size.rows, device=device) % DISTINCT
    topk = teacher_topk(teacher_hidden_RD, teacher_head_VD, size.k, 1.0, valid_vocab=size.valid)
    return Problem(
        size,
        hidden_RD.to(dtype)[rows_N],
        head_VD.to(dtype),
        teacher_hidden_RD[rows_N],
        teacher_head_VD,
        TopK(topk.ids_NK[rows_N], topk.logprobs_NK[rows_N], topk.log_tail_N[rows_N]),
        torch.rand(size.rows, generator=generator, device=device) + 0.5,
    )


def topk_definition(log_q_RV: Tensor, log_p_RV: Tensor, ids_RK: Tensor) -> Tensor:
    """Return the mean of forward and reverse KL of each row over K + 1 outcomes: the top K ids and the tail.

    Inputs are the log-probabilities of the complete vocabulary. The function shares no code with ``distill.loss``.
    """

    def outcomes(log_RV: Tensor) -> Tensor:
        tail_R1 = log_RV.scatter(1, ids_RK, -math.inf).logsumexp(dim=1, keepdim=True)
        return torch.cat([log_RV.gather(1, ids_RK), tail_R1], dim=1)

    log_q_RE, log_p_RE = outcomes(log_q_RV), outcomes(log_p_RV)
    return ((log_p_RE.exp() - log_q_RE.exp()) * (log_p_RE - log_q_RE)).sum(dim=1) / 2


def jsd_definition(log_q_RV: Tensor, log_p_RV: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of each row (beta 0.5) over the complete vocabulary."""
    log_m_RV = torch.logaddexp(log_q_RV, log_p_RV) - math.log(2)
    return sum((log.exp() * (log - log_m_RV)).sum(dim=1) / 2 for log in (log_q_RV, log_p_RV))  # type: ignore[return-value]


@cache
def reference(problem: Problem, jsd: bool) -> tuple[Outcome, Tensor]:
    """Return loss and gradients in float64, and the weights of the rows.

    The gradient of the hidden rows is that of the R distinct rows at weight 1.
    """
    count = problem.size.rows
    weight_N = torch.ones(count, device=problem.weight_N.device).double() if jsd else problem.weight_N.double()
    rows_N = torch.arange(count, device=weight_N.device) % DISTINCT
    weight_R = weight_N.new_zeros(DISTINCT).index_add_(0, rows_N, weight_N)
    hidden_RD = problem.hidden_ND[:DISTINCT].double().requires_grad_()
    head_VD = problem.head_VD.double().requires_grad_()
    tokens = slice(problem.size.valid)
    teacher_RV = problem.teacher_hidden_ND[:DISTINCT].double() @ problem.teacher_head_VD[tokens].double().t()
    log_p_RV, log_q_RV = teacher_RV.log_softmax(dim=1), (hidden_RD @ head_VD[tokens].t()).log_softmax(dim=1)
    if jsd:
        kl_R = jsd_definition(log_q_RV, log_p_RV)
    else:
        kl_R = topk_definition(log_q_RV, log_p_RV, problem.topk.ids_NK[:DISTINCT].long())
    kl_sum = (kl_R * weight_R).sum()
    kl_sum.backward()
    assert hidden_RD.grad is not None and head_VD.grad is not None
    return Outcome(kl_sum.detach(), hidden_RD.grad / weight_R.unsqueeze(1), head_VD.grad), weight_N


def errors_of(problem: Problem, outcome: Outcome, jsd: bool) -> dict[str, float]:
    """Return the relative errors of the loss and, by norm, of both gradients, by name.

    The error of the head's gradient is reported separately for kept ids and for all other ids (tail).
    """
    right, weight_N = reference(problem, jsd)
    rows_N = torch.arange(problem.size.rows, device=weight_N.device) % DISTINCT
    d_hidden_ND = right.d_hidden_ND[rows_N] * weight_N.unsqueeze(1)
    found = {
        "kl_sum": float((outcome.kl_sum.double() - right.kl_sum).abs() / right.kl_sum.abs()),
        "d_hidden": float((outcome.d_hidden_ND.double() - d_hidden_ND).norm() / d_hidden_ND.norm()),
    }
    off_V, norm_V = (torch.empty(problem.size.vocab, dtype=torch.float64, device=weight_N.device) for _ in range(2))
    for start in range(
        0, problem.size.vocab, 8192
    ):  # blocks, because a second float64 gradient of the head would need 5 GB
        block = slice(start, start + 8192)
        norm_V[block] = right.d_head_VD[block].norm(dim=1)
        off_V[block] = (outcome.d_head_VD[block].double() - right.d_head_VD[block]).norm(dim=1)
    kept_V = torch.zeros_like(off_V, dtype=torch.bool)
    kept_V[problem.topk.ids_NK[:DISTINCT].long()] = True
    found["d_head kept"] = float(off_V[kept_V].norm() / norm_V[kept_V].norm())
    found["d_head tail"] = float(off_V[~kept_V].norm() / norm_V[~kept_V].norm())
    return found
