"""Define the implementations of the loss that the benchmark compares."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.loss import fused_linear_kl
from distill.types import TopK
from scripts.bench_loss.problem import Outcome, Problem

CONFIG = LossConfig(kl_type="mixed", mixed_kl_weight=0.5, outside_topk="bucket", temperature=1.0)


@dataclass(frozen=True)
class Contender:
    """One implementation of the loss."""

    name: str
    run: Callable[[Problem], Outcome]
    jsd: bool = False
    """Whether the loss is Liger's JSD over the complete vocabulary, with the teacher's head."""
    rounds: bool = False
    """Whether the logits are rounded to bfloat16 if the operands are bfloat16."""
    visible: bool = True
    """Whether a dispatch mode intercepts the operators, so that memory and FLOPs can be counted."""
    peer: bool = False
    """Whether a failed run is reported as a note and not as an error."""
    skip: str = ""
    """Reason to skip the contender; empty if it runs."""

    def tolerance(self, dtype: torch.dtype, of: str) -> float:
        """Return the maximum relative error of the loss (``of="kl_sum"``) or of a gradient (other ``of``)."""
        if dtype == torch.float32:
            return 1e-5 if of == "kl_sum" else 1e-4
        if self.rounds:  # rounding changes a log-probability by up to 0.02 nats
            return 1e-2 if of == "kl_sum" else 5e-2
        return 1e-4 if of == "kl_sum" else 1e-2

    def flops_and_bytes(self, problem: Problem) -> tuple[float, float]:
        """Return the FLOPs and the moved bytes of the roofline.

        These are three matmuls (four with the teacher's head), and two reads and one write of the logits.
        """
        size, narrow = problem.size, problem.head_VD.element_size()
        wide = narrow if self.rounds else 4
        models = 2 if self.jsd else 1
        logits = float(size.rows * size.vocab)
        return (4 + 2 * models) * logits * size.width, (2 * models * wide + narrow) * logits


def run_fused(problem: Problem) -> Outcome:
    """Run the forward and backward pass of ``fused_linear_kl``."""
    hidden_ND, head_VD = problem.leaves()
    output = fused_linear_kl(
        hidden_ND,
        head_VD,
        problem.topk,
        CONFIG,
        problem.weight_N,
        chunk_rows=problem.size.chunk_rows,
        valid_vocab=problem.size.valid,
    )
    return _backward(output.kl_sum, hidden_ND, head_VD)


def lean_kl(logits_NV: Tensor, topk: TopK, overwrite: bool) -> Tensor:
    """Return the KL of each row, with the settings of ``CONFIG``, in plain PyTorch with little memory.

    Inputs are not checked, and special cases are not handled. ``overwrite``: write into ``logits_NV`` to save a tensor
    of shape [N, V]. The backward pass of ``gather`` would need the original logits, but the backward pass of indexing
    does not.
    """
    z_NV, ids_NK = logits_NV.float(), topk.ids_NK.long()
    kept_NK = z_NV[torch.arange(len(z_NV), device=z_NV.device).unsqueeze(1), ids_NK]
    tail_NV = (Tensor.scatter_ if overwrite else torch.scatter)(z_NV, 1, ids_NK, -math.inf)
    log_q_NE = torch.cat([kept_NK, tail_NV.logsumexp(dim=1, keepdim=True)], dim=1).log_softmax(dim=1)
    log_p_NE = torch.cat([topk.logprobs_NK, topk.log_tail_N.unsqueeze(1)], dim=1)
    return ((log_p_NE.exp() - log_q_NE.exp()) * (log_p_NE - log_q_NE)).sum(dim=1) / 2


def eager_loss(hidden_ND: Tensor, head_VD: Tensor, topk: TopK, weight_N: Tensor) -> Tensor:
    """Return the weighted sum of the rows' losses, computed from the hidden rows in plain PyTorch."""
    return (lean_kl(hidden_ND @ head_VD.t(), topk, overwrite=True) * weight_N).sum()


def run_eager(problem: Problem, loss: Callable[..., Tensor] = eager_loss) -> Outcome:
    """Run the forward and backward pass in plain PyTorch, or of a compiled ``loss``."""
    hidden_ND, head_VD = problem.leaves()
    return _backward(loss(hidden_ND, head_VD, problem.topk, problem.weight_N), hidden_ND, head_VD)


def run_liger(problem: Problem) -> Outcome:
    """Run the forward and backward pass of Liger's JSD, with its mean converted to a sum.

    On a CPU it is not compiled, because a dispatch mode measures its memory.
    """
    hidden_ND, head_VD = problem.leaves()
    loss = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=hidden_ND.is_cuda
    )
    labels_N = torch.zeros(len(hidden_ND), dtype=torch.int64, device=hidden_ND.device)
    mean = loss(hidden_ND, head_VD, problem.teacher_hidden_ND, problem.teacher_head_VD, labels_N, None, None)
    return _backward(mean * len(hidden_ND), hidden_ND, head_VD)


def _backward(kl_sum: Tensor, hidden_ND: Tensor, head_VD: Tensor) -> Outcome:
    kl_sum.backward()
    assert hidden_ND.grad is not None and head_VD.grad is not None
    return Outcome(kl_sum.detach(), hidden_ND.grad, head_VD.grad)


def installed(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def contenders(quick: bool) -> list[Contender]:
    """Return all contenders, ``fused`` first."""
    compiled = eager_loss if quick else torch.compile(eager_loss, dynamic=False)
    return [
        Contender("fused", run_fused),
        Contender("eager", run_eager, rounds=True),
        Contender(
            "torch.compile",
            lambda problem: run_eager(problem, compiled),
            rounds=True,
            visible=False,
            peer=True,
            skip="omitted by --quick" if quick else "",
        ),
        Contender(
            "liger jsd",
            run_liger,
            jsd=True,
            rounds=True,
            peer=True,
            skip="" if installed("liger-kernel") else "liger-kernel is not installed",
        ),
    ]
