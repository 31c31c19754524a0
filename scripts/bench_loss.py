"""Time and peak memory of the loss head beside eager PyTorch, torch.compile and Liger, each proven right in one run.

    python -m scripts.bench_loss [--device cpu|cuda] [--quick] [--repeats n] [--json FILE]

The work is hidden rows -> logits -> top-k KL -> gradients of hidden rows and head. Eager and compiled do it by
``hidden @ head.T`` and ``lean_kl``, the leanest exact form in plain PyTorch that we know (``topk_kl``, the plain twin
of the head, made for reading and for every edge, takes a third more memory; log1p(-sum q) for the tail takes less, and
loses a small tail's digits). Liger has no top-k form: its fused linear JSD runs the teacher's head too, over the whole
vocabulary, and is held to its own definition. The N rows repeat 16 distinct ones under weights of their own, so a
float64 reference of 16 rows judges the loss and the whole of both gradients at every size. Who is wrong is named, and
the exit code is 1; so it is where a bound is missed. Contenders take turns: a busy machine slows all of them.

Peak memory is what lives beyond the inputs. On CPU a dispatch mode counts storages (not what a single operator uses
inside), and one gradient of hidden rows and of the head each is left out; eager's is counted on fake tensors, which
allocate nothing, and the count proven on real ones. On CUDA it is the allocator's, gradients included.

The roofline is the time of the matmuls at the measured peak plus that of two reads and one write of the logits at the
measured bandwidth of a copy, for those are passes of their own. Goals in ms are an H200's.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import math
import platform
import statistics
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from distill.config import LossConfig
from distill.loss import fused_linear_kl, teacher_topk
from distill.types import TopK

CONFIG = LossConfig(kl_type="mixed", mixed_kl_weight=0.5, outside_topk="bucket", temperature=1.0)
DISTINCT = 16
"""Rows that differ; the others repeat them."""
MEMORY_BOUNDS = {49_152: 1 / 6, 151_936: 1 / 8}
"""Peak of the fused head over eager's, by vocabulary."""
DEFAULT_MEMORY_BOUND = 1 / 6
KERNEL_MS = {torch.float32: 7.3, torch.bfloat16: 4.3}
"""Goals on an H200 at N = 16,384 and V = 151,936: 80% of the roofline, by the dtype of the logits."""
HEAD_MS = {4096: 95.0}
TOPK_MS = {64: 3.0, 512: 6.0}


# ---- what is found ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What one contender did at one size."""

    case: str
    contender: str
    seconds: float | None = None
    peak_bytes: int | None = None
    flops: int | None = None
    share: float | None = None
    """Of the roofline."""
    errors: dict[str, float] = field(default_factory=dict)
    """Relative to the float64 reference: of the loss, and of the gradients by norm."""
    wrong: str = ""
    """Which errors exceed their tolerance, or what it died of."""
    note: str = ""


@dataclass(frozen=True)
class Check:
    """A number and what it must be; without a relation it is only reported, beside the goal where there is a limit."""

    name: str
    value: float
    relation: str = ""
    limit: float = math.nan
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """None without a bound; nan never passes."""
        if not self.relation:
            return None
        return {"<=": self.value <= self.limit, ">=": self.value >= self.limit, "==": self.value == self.limit}[
            self.relation
        ]


class Report:
    """Everything found, in order; says what it is at while it works."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.about = about
        self.results: list[Result] = []
        self.checks: list[Check] = []
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"{time.monotonic() - self._start:6.1f} s  {text}", flush=True)

    @property
    def passed(self) -> bool:
        """Whether nobody is wrong and every bound holds."""
        return not any(r.wrong for r in self.results) and all(check.passed is not False for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """The whole for a file."""
        return {
            "about": self.about,
            "results": [_finite(dataclasses.asdict(result)) for result in self.results],
            "checks": [_finite({**dataclasses.asdict(check), "passed": check.passed}) for check in self.checks],
            "passed": self.passed,
        }

    def tables(self) -> str:
        """The contenders side by side, then the bounds."""
        sides = [("case", "contender", "ms", "peak MB", "GFLOP", "roofline", "worst error", "", "")]
        for r in self.results:
            verdict = "WRONG" if r.wrong else "right" if r.errors else "-"
            sides.append(
                (
                    r.case,
                    r.contender,
                    _cell(r.seconds, "{:.1f}", 1e3),
                    _cell(r.peak_bytes, "{:.1f}", 1e-6),
                    _cell(r.flops, "{:.2f}", 1e-9),
                    _cell(r.share, "{:.0%}"),
                    _cell(max(r.errors.values(), default=None), "{:.1e}"),
                    verdict,
                    r.wrong or r.note,
                )
            )
        bounds = [("check", "value", "bound", "", "")]
        for c in self.checks:
            verdict = {None: "", True: "ok", False: "FAILED"}[c.passed]
            limit = "" if math.isnan(c.limit) else f"{c.relation or 'goal'} {c.limit:.4g}"
            bounds.append((c.name, f"{c.value:.4g}", limit, verdict, c.note))
        return f"{_aligned(sides, left=(0, 1, 7, 8))}\n\n{_aligned(bounds, left=(0, 2, 3, 4))}"


def _finite(value: Any) -> Any:
    """The same with None for nan and infinity, which JSON knows no numbers for."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else form.format(value * unit)


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    sides = [str.ljust if i in left else str.rjust for i in range(len(widths))]
    cells = [[side(text, width) for side, text, width in zip(sides, row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


# ---- counting --------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes in storages that were made while it was on and were alive at once.

    Views share a storage, and what was there before is not counted. ``gradient_numels``: of all living storages with
    that many elements one (the smallest) is left out, for a gradient has to be somewhere.
    """

    def __init__(self, gradient_numels: Sequence[int] = ()) -> None:
        super().__init__()
        self.peak = self.live = 0
        self._gradients: dict[int, Counter[int]] = {numel: Counter() for numel in gradient_numels}
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._know(leaf, ours=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._know(leaf, ours=True)
        left_out = sum(min(+sizes, default=0) for sizes in self._gradients.values())
        self.peak = max(self.peak, self.live - left_out)
        return result

    def _know(self, tensor: Tensor, ours: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        sizes = self._gradients.get(size // tensor.element_size()) if ours else None

        def dies(_: Any) -> None:
            del self._known[key]
            self._add(-size if ours else 0, sizes, size, -1)

        self._known[key] = weakref.ref(storage, dies)
        self._add(size if ours else 0, sizes, size, 1)

    def _add(self, live: int, sizes: Counter[int] | None, size: int, count: int) -> None:
        self.live += live
        if sizes is not None:
            sizes[size] += count


def counted(run: Callable[[], Outcome], gradient_numels: Sequence[int]) -> tuple[Outcome, int, int]:
    """What ``run`` gives, its peak bytes and its FLOPs."""
    memory = LiveBytes(gradient_numels)
    # PyTorch's counter knows addmm, but not its form in place.
    flops = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})
    with flops, memory:
        outcome = run()
    return outcome, memory.peak, flops.get_total_flops()


def _addmm_flops(into_shape: Any, a_shape: Any, b_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(a_shape) * b_shape[1]


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Of one run, by the GPU's own events where there is one."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def typical(times: Sequence[float], device: torch.device) -> float:
    """The median on a GPU; the best on a CPU, which others disturb."""
    return statistics.median(times) if device.type == "cuda" else min(times)


def timed(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Typical seconds of ``repeats`` runs after two to warm up."""
    return typical([seconds_of(run, device) for _ in range(repeats + 2)][2:], device)


@dataclass(frozen=True)
class Machine:
    """What the device can do, measured in this run."""

    bytes_per_s: float
    """Read and written by a copy."""
    flops_per_s: float

    def floor(self, flops: float, moved: float) -> float:
        """The roofline in seconds: matmuls, then passes over the logits."""
        return flops / self.flops_per_s + moved / self.bytes_per_s


def measure_machine(device: torch.device, dtype: torch.dtype, copied: int, side: int) -> Machine:
    """Bandwidth by copying ``copied`` bytes, matmul peak by a square one."""
    source, target = (torch.zeros(copied, dtype=torch.uint8, device=device) for _ in range(2))
    bandwidth = 2 * copied / timed(lambda: target.copy_(source), device, 5)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return Machine(bandwidth, 2 * side**3 / timed(lambda: a @ b, device, 5))


# ---- the problem and its float64 reference ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """N rows, V columns, D wide, K kept; ``chunk_rows`` None leaves it to the head."""

    rows: int
    vocab: int
    width: int
    k: int
    chunk_rows: int | None = None

    def __str__(self) -> str:
        return f"N={self.rows} V={self.vocab} D={self.width} K={self.k}"


@dataclass(frozen=True)
class Outcome:
    """What a contender gives."""

    kl_sum: Tensor
    d_hidden_ND: Tensor
    d_head_VD: Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """A student and a teacher near it; row n is row n % R of the R distinct ones."""

    size: Size
    hidden_ND: Tensor
    head_VD: Tensor
    teacher_hidden_ND: Tensor
    teacher_head_VD: Tensor
    topk: TopK
    weight_N: Tensor

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Hidden rows and head, each wanting a gradient."""
        return self.hidden_ND.detach().requires_grad_(), self.head_VD.detach().requires_grad_()

    @property
    def gradient_numels(self) -> tuple[int, int]:
        """Elements of the two gradients."""
        return self.hidden_ND.numel(), self.head_VD.numel()


def make_problem(size: Size, device: torch.device, dtype: torch.dtype) -> Problem:
    """Logits of spread about 2, targets from the teacher's own head, weights between 0.5 and 1.5."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden_RD, head_VD = normal(DISTINCT, size.width), normal(size.vocab, size.width) * (2 / math.sqrt(size.width))
    teacher_hidden_RD = (hidden_RD + normal(DISTINCT, size.width) / 2).to(dtype)
    teacher_head_VD = (head_VD + normal(size.vocab, size.width) / math.sqrt(size.width)).to(dtype)
    rows_N = torch.arange(size.rows, device=device) % DISTINCT
    topk = teacher_topk(teacher_hidden_RD, teacher_head_VD, size.k, 1.0)
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
    """Half of each KL over K + 1 outcomes, from two dense distributions: shares no code with what it judges."""

    def outcomes(log_RV: Tensor) -> Tensor:
        tail_R1 = log_RV.scatter(1, ids_RK, -math.inf).logsumexp(dim=1, keepdim=True)
        return torch.cat([log_RV.gather(1, ids_RK), tail_R1], dim=1)

    log_q_RE, log_p_RE = outcomes(log_q_RV), outcomes(log_p_RV)
    return ((log_p_RE.exp() - log_q_RE.exp()) * (log_p_RE - log_q_RE)).sum(dim=1) / 2


def jsd_definition(log_q_RV: Tensor, log_p_RV: Tensor) -> Tensor:
    """The Jensen-Shannon divergence at beta 0.5 over the whole vocabulary."""
    log_m_RV = torch.logaddexp(log_q_RV, log_p_RV) - math.log(2)
    return sum((log.exp() * (log - log_m_RV)).sum(dim=1) / 2 for log in (log_q_RV, log_p_RV))  # type: ignore[return-value]


@cache
def reference(problem: Problem, jsd: bool) -> tuple[Outcome, Tensor]:
    """In float64: the loss, one row's gradient per distinct row at weight 1, the head's gradient; and the weights."""
    count = problem.size.rows
    weight_N = torch.ones(count, device=problem.weight_N.device).double() if jsd else problem.weight_N.double()
    rows_N = torch.arange(count, device=weight_N.device) % DISTINCT
    weight_R = weight_N.new_zeros(DISTINCT).index_add_(0, rows_N, weight_N)
    hidden_RD = problem.hidden_ND[:DISTINCT].double().requires_grad_()
    head_VD = problem.head_VD.double().requires_grad_()
    teacher_RV = problem.teacher_hidden_ND[:DISTINCT].double() @ problem.teacher_head_VD.double().t()
    log_p_RV, log_q_RV = teacher_RV.log_softmax(dim=1), (hidden_RD @ head_VD.t()).log_softmax(dim=1)
    if jsd:
        kl_R = jsd_definition(log_q_RV, log_p_RV)
    else:
        kl_R = topk_definition(log_q_RV, log_p_RV, problem.topk.ids_NK[:DISTINCT].long())
    kl_sum = (kl_R * weight_R).sum()
    kl_sum.backward()
    assert hidden_RD.grad is not None and head_VD.grad is not None
    return Outcome(kl_sum.detach(), hidden_RD.grad / weight_R.unsqueeze(1), head_VD.grad), weight_N


def errors_of(problem: Problem, outcome: Outcome, jsd: bool) -> dict[str, float]:
    """Relative errors of the loss and, by norm, of both gradients; the head's apart where no row keeps the token."""
    right, weight_N = reference(problem, jsd)
    rows_N = torch.arange(problem.size.rows, device=weight_N.device) % DISTINCT
    d_hidden_ND = right.d_hidden_ND[rows_N] * weight_N.unsqueeze(1)
    found = {
        "kl_sum": float((outcome.kl_sum.double() - right.kl_sum).abs() / right.kl_sum.abs()),
        "d_hidden": float((outcome.d_hidden_ND.double() - d_hidden_ND).norm() / d_hidden_ND.norm()),
    }
    off_V, norm_V = (torch.empty(problem.size.vocab, dtype=torch.float64, device=weight_N.device) for _ in range(2))
    for start in range(0, problem.size.vocab, 8192):  # a second float64 gradient of the head would be 5 GB
        block = slice(start, start + 8192)
        norm_V[block] = right.d_head_VD[block].norm(dim=1)
        off_V[block] = (outcome.d_head_VD[block].double() - right.d_head_VD[block]).norm(dim=1)
    kept_V = torch.zeros_like(off_V, dtype=torch.bool)
    kept_V[problem.topk.ids_NK[:DISTINCT].long()] = True
    found["d_head kept"] = float(off_V[kept_V].norm() / norm_V[kept_V].norm())
    found["d_head tail"] = float(off_V[~kept_V].norm() / norm_V[~kept_V].norm())
    return found


# ---- contenders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One way to do the work."""

    name: str
    run: Callable[[Problem], Outcome]
    jsd: bool = False
    """Liger's loss, over the whole vocabulary, with the teacher's head in it."""
    rounds: bool = False
    """Whether bfloat16 operands give it bfloat16 logits."""
    visible: bool = True
    """Whether a dispatch mode sees what it does."""
    peer: bool = False
    """Whether that it can't run is only noted."""
    skip: str = ""
    """Why it isn't tried."""

    def tolerance(self, dtype: torch.dtype, of: str) -> float:
        """The largest relative error of the loss (``of`` kl_sum) or of a gradient."""
        if dtype == torch.float32:
            return 1e-5 if of == "kl_sum" else 1e-4
        if self.rounds:  # 0.02 nats a log-prob
            return 1e-2 if of == "kl_sum" else 5e-2
        return 1e-4 if of == "kl_sum" else 1e-2

    def flops_and_bytes(self, problem: Problem) -> tuple[float, float]:
        """By formula: three matmuls (four with the teacher's), two reads of logits and one write of their gradient."""
        size, narrow = problem.size, problem.head_VD.element_size()
        wide = narrow if self.rounds else 4
        models = 2 if self.jsd else 1
        logits = float(size.rows * size.vocab)
        return (4 + 2 * models) * logits * size.width, (2 * models * wide + narrow) * logits


def run_fused(problem: Problem) -> Outcome:
    """Ours."""
    hidden_ND, head_VD = problem.leaves()
    output = fused_linear_kl(
        hidden_ND, head_VD, problem.topk, CONFIG, problem.weight_N, chunk_rows=problem.size.chunk_rows
    )
    return _backward(output.kl_sum, hidden_ND, head_VD)


def lean_kl(logits_NV: Tensor, topk: TopK, overwrite: bool) -> Tensor:
    """kl_N of ``CONFIG`` in plain PyTorch: the tail's logsumexp of its own terms, no check, no edge.

    To ``overwrite`` the logits saves an [N, V]; the backward of gather would need them, that of an index does not.
    """
    z_NV, ids_NK = logits_NV.float(), topk.ids_NK.long()
    kept_NK = z_NV[torch.arange(len(z_NV), device=z_NV.device).unsqueeze(1), ids_NK]
    tail_NV = (Tensor.scatter_ if overwrite else torch.scatter)(z_NV, 1, ids_NK, -math.inf)
    log_q_NE = torch.cat([kept_NK, tail_NV.logsumexp(dim=1, keepdim=True)], dim=1).log_softmax(dim=1)
    log_p_NE = torch.cat([topk.logprobs_NK, topk.log_tail_N.unsqueeze(1)], dim=1)
    return ((log_p_NE.exp() - log_q_NE.exp()) * (log_p_NE - log_q_NE)).sum(dim=1) / 2


def eager_loss(hidden_ND: Tensor, head_VD: Tensor, topk: TopK, weight_N: Tensor) -> Tensor:
    """The whole in plain PyTorch."""
    return (lean_kl(hidden_ND @ head_VD.t(), topk, overwrite=True) * weight_N).sum()


def run_eager(problem: Problem, loss: Callable[..., Tensor] = eager_loss) -> Outcome:
    """The loss and its backward in plain PyTorch, or a compiled one."""
    hidden_ND, head_VD = problem.leaves()
    return _backward(loss(hidden_ND, head_VD, problem.topk, problem.weight_N), hidden_ND, head_VD)


def run_liger(problem: Problem) -> Outcome:
    """Liger's mean over the rows, as a sum. On a CPU it is left uncompiled, so that its memory is seen."""
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
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def contenders(quick: bool) -> list[Contender]:
    """Who takes part, ours first."""
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
            skip="left out by --quick" if quick else "",
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


def first_run(problem: Problem, rival: Contender, case: str) -> Result:
    """One run: its errors, its peak, its FLOPs. It also warms up."""
    device, dtype = problem.head_VD.device, problem.head_VD.dtype
    peak = flops = None
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            outcome = rival.run(problem)
            peak = torch.cuda.max_memory_allocated() - before
        elif rival.visible:
            outcome, peak, flops = counted(lambda: rival.run(problem), problem.gradient_numels)
        else:
            outcome = rival.run(problem)
    except Exception as error:  # one contender's end is not the others'
        what = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]:.100}"
        if isinstance(error, torch.OutOfMemoryError):
            what = "out of memory"
        fatal = not (rival.peer or (what == "out of memory" and rival.name != "fused"))
        return Result(case, rival.name, wrong=what if fatal else "", note="" if fatal else f"can't run: {what}")
    errors = errors_of(problem, outcome, rival.jsd)
    wrong = [
        f"{of} {error:.1e} > {rival.tolerance(dtype, of):.0e}"
        for of, error in errors.items()
        if not error <= rival.tolerance(dtype, of)
    ]
    note = "full vocabulary, with the teacher's head: another loss" if rival.jsd else ""
    return Result(case, rival.name, None, peak, flops, None, errors, ", ".join(wrong), note)


def race(report: Report, problem: Problem, rivals: Sequence[Contender], machine: Machine, repeats: int) -> None:
    """All contenders at one size: one run each to judge it, then by turns against the clock."""
    device, case = problem.head_VD.device, str(problem.size)
    found: dict[str, Result] = {}
    for rival in rivals:
        report.say(f"{case}: {rival.name}{': ' + rival.skip if rival.skip else ''}")
        found[rival.name] = (
            Result(case, rival.name, note=f"skipped: {rival.skip}") if rival.skip else first_run(problem, rival, case)
        )
    reference.cache_clear()
    running = [rival for rival in rivals if found[rival.name].errors]
    times: dict[str, list[float]] = {rival.name: [] for rival in running}
    for turn in range(repeats):
        report.say(f"{case}: turn {turn + 1} of {repeats}")
        for rival in running:
            times[rival.name].append(seconds_of(lambda run=rival.run: run(problem), device))  # type: ignore[misc]
    for rival in running:
        seconds = typical(times[rival.name], device)
        share = machine.floor(*rival.flops_and_bytes(problem)) / seconds
        found[rival.name] = dataclasses.replace(found[rival.name], seconds=seconds, share=share)
    report.results += found.values()


# ---- memory on a CPU -------------------------------------------------------------------------------------------------


def fake_eager(size: Size, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Eager's peak bytes and FLOPs at any size, without its memory or its time."""
    with FakeTensorMode():
        hidden_ND, head_VD = (torch.empty(n, size.width, dtype=dtype) for n in (size.rows, size.vocab))
        ids_NK = torch.empty(size.rows, size.k, dtype=torch.int32)
        topk = TopK(ids_NK, torch.empty(size.rows, size.k), torch.empty(size.rows))
        problem = Problem(size, hidden_ND, head_VD, hidden_ND, head_VD, topk, torch.empty(size.rows))
        _, peak, flops = counted(lambda: run_eager(problem), problem.gradient_numels)
    return peak, flops


def compare_memory(report: Report, size: Size, device: torch.device, ours: Contender) -> None:
    """Ours on a real run, which is judged too, over eager on fake tensors."""
    report.say(f"{size}: memory and FLOPs")
    problem = make_problem(size, device, torch.float32)
    result = first_run(problem, ours, str(size))
    reference.cache_clear()
    peak, flops = fake_eager(size)
    report.results += [result, Result(str(size), "eager", None, peak, flops, note="counted on fake tensors")]
    bound = MEMORY_BOUNDS.get(size.vocab, DEFAULT_MEMORY_BOUND)
    ratio = math.nan if result.peak_bytes is None else result.peak_bytes / peak
    report.checks.append(Check(f"{size}: peak, fused / eager", ratio, "<=", bound))
    report.checks.append(Check(f"{size}: FLOPs, fused / eager", (result.flops or math.nan) / flops))


# ---- kernels alone, on a GPU -----------------------------------------------------------------------------------------


def kernel(module: str, name: str) -> Any:
    """A kernel of ours, or None where there is none."""
    try:
        return getattr(importlib.import_module(f"distill.kernels.{module}"), name, None)
    except ImportError:
        return None


def worst_error(actual: Tensor, expected: Tensor) -> float:
    """Relative, by norm."""
    return float((actual.double() - expected).norm() / expected.norm())


def eager_given_logits(z_NV: Tensor, topk: TopK, repeats: int) -> tuple[float, int]:
    """Seconds of ``lean_kl`` and its backward for all rows, and from how many they were found: what fits, halved."""
    rows = len(z_NV)
    while rows:
        part = TopK(topk.ids_NK[:rows], topk.logprobs_NK[:rows], topk.log_tail_N[:rows])
        leaf_NV = z_NV[:rows].detach().requires_grad_()

        def run(leaf_NV: Tensor = leaf_NV, part: TopK = part) -> object:
            return torch.autograd.grad(lean_kl(leaf_NV, part, overwrite=False).sum(), leaf_NV)

        try:
            return timed(run, z_NV.device, repeats) * len(z_NV) / rows, rows
        except torch.OutOfMemoryError:
            rows //= 2
        torch.cuda.empty_cache()
    return math.nan, 0


def bench_student_kernels(
    report: Report, machine: Machine, z_NV: Tensor, topk: TopK, repeats: int, judged: bool, goals: bool
) -> None:
    """``reduce_rows`` and ``gradient_rows`` of given logits into a bfloat16 gradient, beside eager's two passes."""
    reduce_rows, gradient_rows = kernel("loss_student", "reduce_rows"), kernel("loss_student", "gradient_rows")
    name = f"loss kernel, {str(z_NV.dtype)[6:]} logits"
    if reduce_rows is None or gradient_rows is None:
        report.say(f"{name}: skipped: distill.kernels.loss_student has no such kernels")
        return
    report.say(f"{name}: eager")
    eager, rows = eager_given_logits(z_NV, topk, repeats)
    report.say(f"{name}: ours")
    z_RV, ids_RK = z_NV[:DISTINCT].double(), topk.ids_NK[:DISTINCT].long()
    out_NV = torch.empty_like(z_NV, dtype=torch.bfloat16)
    generator = torch.Generator(z_NV.device).manual_seed(1)
    factor_N = torch.rand(len(z_NV), generator=generator, device=z_NV.device) - 0.5
    d_logits_NK = torch.rand(topk.ids_NK.shape, generator=generator, device=z_NV.device) - 0.5

    def both() -> tuple[Tensor, ...]:
        logits_NK, top_N, sum_N, product_N = reduce_rows(z_NV, topk.ids_NK, 1.0)
        gradient_rows(z_NV, topk.ids_NK, top_N, factor_N, None, d_logits_NK, 1.0, out_NV)
        return logits_NK, top_N, sum_N, product_N

    found = [numbers[:DISTINCT] for numbers in both()]  # the first run: it leaves -inf at the kept ids
    tail_RV = z_RV.scatter(1, ids_RK, -math.inf)
    top_R1 = tail_RV.amax(dim=1, keepdim=True)
    mass_RV = (tail_RV - top_R1).exp()
    product_R = (mass_RV * (tail_RV - top_R1).clamp(min=-1e30)).sum(dim=1)
    gradient_RV = (mass_RV * factor_N[:DISTINCT, None]).scatter(1, ids_RK, d_logits_NK[:DISTINCT].double())
    right = (z_RV.gather(1, ids_RK), top_R1.squeeze(1), mass_RV.sum(dim=1), product_R)
    wrong = max(worst_error(a, b) for a, b in zip(found, right, strict=True))
    report.checks.append(Check(f"{name}: error of the sums", wrong, "<=", 1e-5))
    wrong = worst_error(out_NV[:DISTINCT], gradient_RV)
    report.checks.append(Check(f"{name}: error of the gradient", wrong, "<=", 1e-2))
    seconds = timed(both, z_NV.device, repeats)
    share = machine.floor(0.0, z_NV.numel() * (2 * z_NV.element_size() + 2)) / seconds
    report.checks.append(Check(f"{name}: ms", seconds * 1e3, "<=" if goals else "", KERNEL_MS[z_NV.dtype]))
    report.checks.append(Check(f"{name}: share of the roofline", share, ">=" if judged else "", 0.8))
    note = f"eager {eager * 1e3:.1f} ms" + (f", from {rows} rows: more are out of memory" if rows < len(z_NV) else "")
    report.checks.append(Check(f"{name}: eager / ours", eager / seconds, ">=" if judged else "", 5.0, note))


def bench_teacher_kernel(report: Report, z_NV: Tensor, k: int, repeats: int, goals: bool) -> None:
    """``topk_with_tail`` of given logits."""
    topk_with_tail = kernel("topk", "topk_with_tail")
    name = f"teacher's top-{k}, {str(z_NV.dtype)[6:]} logits"
    if topk_with_tail is None:
        report.say(f"{name}: skipped: distill.kernels.topk has no such kernel")
        return
    report.say(name)
    log_p_RV = z_NV[:DISTINCT].double().log_softmax(dim=1)
    ids_NK, logprobs_NK, log_tail_N = tuple(topk_with_tail(z_NV, k, 1.0))[:3]
    # By value, for equal logits may stand in either order.
    best_RV = log_p_RV.sort(dim=1, descending=True).values
    at_RK = log_p_RV.gather(1, ids_NK[:DISTINCT].long()).sort(dim=1, descending=True).values
    said_RK = logprobs_NK[:DISTINCT].double().sort(dim=1, descending=True).values
    tail_R = best_RV[:, k:].logsumexp(dim=1)
    wrong = max(
        float((at_RK - best_RV[:, :k]).abs().max()),
        float((said_RK - best_RV[:, :k]).abs().max()),
        float((log_tail_N[:DISTINCT].double() - tail_R).abs().max()),
    )
    report.checks.append(Check(f"{name}: largest error, nats", wrong, "<=", 1e-4))
    seconds = timed(lambda: topk_with_tail(z_NV, k, 1.0), z_NV.device, repeats)
    report.checks.append(Check(f"{name}: ms", seconds * 1e3, "<=" if goals else "", TOPK_MS.get(k, math.nan)))


def bench_kernels(
    report: Report, size: Size, device: torch.device, machine: Machine, repeats: int, judged: bool, goals: bool
) -> None:
    """The loss kernels and the teacher's top-k, given logits."""
    generator = torch.Generator(device).manual_seed(0)
    z_RV, teacher_RV = (2 * torch.randn(DISTINCT, size.vocab, generator=generator, device=device) for _ in range(2))
    log_p_RK, ids_RK = teacher_RV.log_softmax(dim=1).topk(size.k, dim=1)
    log_tail_R = teacher_RV.log_softmax(dim=1).scatter(1, ids_RK, -math.inf).logsumexp(dim=1)
    rows_N = torch.arange(size.rows, device=device) % DISTINCT
    topk = TopK(ids_RK.int()[rows_N], log_p_RK[rows_N], log_tail_R[rows_N])
    for dtype in (torch.float32, torch.bfloat16):
        for k in TOPK_MS:
            bench_teacher_kernel(report, z_RV.to(dtype)[rows_N], k, repeats, goals)
        bench_student_kernels(report, machine, z_RV.to(dtype)[rows_N], topk, repeats, judged, goals)


# ---- the program -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is measured, at which sizes."""

    dtype: torch.dtype
    raced: tuple[Size, ...]
    memory: tuple[Size, ...]
    kernels: Size | None
    repeats: int
    copied: int
    """Bytes of the copy that measures the bandwidth."""
    side: int
    """Of the square matmul that measures the peak."""


CPU = Plan(
    torch.float32,
    raced=(Size(512, 49_152, 576, 64),),
    memory=tuple(Size(n, v, 576, 64) for v in MEMORY_BOUNDS for n in (1024, 4096)),
    kernels=None,
    repeats=3,
    copied=2**28,
    side=2048,
)
GPU = Plan(
    torch.bfloat16,
    raced=tuple(Size(16_384, 151_936, d, 64) for d in (2560, 4096)),
    memory=(),
    kernels=Size(16_384, 151_936, 0, 64),
    repeats=20,
    copied=2**32,
    side=8192,
)
SMALL = Size(192, 2048, 48, 16, chunk_rows=16)


def quick(plan: Plan) -> Plan:
    """The same in small; only a CPU compares memory by count."""
    kernels = None if plan.kernels is None else Size(64, 2048, 0, 16)
    memory = (SMALL,) if plan.memory else ()
    return dataclasses.replace(plan, raced=(SMALL,), memory=memory, kernels=kernels, repeats=2, copied=2**24, side=512)


def run_program(report: Report, name: str, section: Callable[[], None]) -> None:
    """Nobody watches: what breaks in one section is a failed check, and the others go on."""
    try:
        section()
    except Exception as error:
        traceback.print_exc()
        note = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]:.100}"
        report.checks.append(Check(f"{name}: ran", 0, "==", 1, note))


def measure(report: Report, plan: Plan, device: torch.device, rivals: Sequence[Contender]) -> None:
    """All of the plan."""
    report.say("bandwidth and matmul peak")
    machine = measure_machine(device, plan.dtype, plan.copied, plan.side)
    report.about |= {"GB_per_s": machine.bytes_per_s / 1e9, "TFLOP_per_s": machine.flops_per_s / 1e12}
    judged = device.type == "cuda" and plan.raced == GPU.raced
    goals = judged and "H200" in report.about["device"]
    if (kernels := plan.kernels) is not None:
        run_program(
            report,
            "kernels",
            lambda: bench_kernels(report, kernels, device, machine, plan.repeats, judged, goals),
        )
    for size in plan.raced:
        run_program(report, str(size), lambda size=size: race_at(report, plan, size, device, rivals, machine, goals))  # type: ignore[misc]
    for size in plan.memory:
        run_program(report, str(size), lambda size=size: compare_memory(report, size, device, rivals[0]))  # type: ignore[misc]


def race_at(
    report: Report,
    plan: Plan,
    size: Size,
    device: torch.device,
    rivals: Sequence[Contender],
    machine: Machine,
    goals: bool,
) -> None:
    """One race and what is owed there."""
    race(report, make_problem(size, device, plan.dtype), rivals, machine, plan.repeats)
    of = {result.contender: result for result in report.results if result.case == str(size)}
    ours = of.pop("fused").seconds
    if ours is None:
        return
    if size.width in HEAD_MS:
        bound = ("<=" if goals else "", HEAD_MS[size.width])
        report.checks.append(Check(f"{size}: fused head, ms", ours * 1e3, *bound))
    for name, theirs in of.items():
        if theirs.seconds is not None:
            report.checks.append(Check(f"{size}: time, {name} / fused", theirs.seconds / ours))
    if device.type == "cpu" and (counted_peak := of["eager"].peak_bytes) is not None:
        share = fake_eager(size, plan.dtype)[0] / counted_peak
        report.checks.append(Check(f"{size}: eager's peak, fake / real", share, "==", 1.0))


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the file; 0 if all are right and every bound holds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: seconds")
    parser.add_argument("--repeats", type=int, help="runs against the clock: 3 on a CPU, 20 on a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the results for a program")
    args = parser.parse_args(argv)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    plan = GPU if device.type == "cuda" else CPU
    plan = quick(plan) if args.quick else plan
    plan = dataclasses.replace(plan, repeats=args.repeats or plan.repeats)
    report = Report(
        {
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "versions": {name: installed(name) for name in ("torch", "triton", "liger-kernel")},
            "date": datetime.date.today().isoformat(),
            "dtype": str(plan.dtype)[6:],
        }
    )
    measure(report, plan, device, contenders(args.quick))
    if args.json:
        args.json.write_text(json.dumps(report.as_json(), indent=2) + "\n")
    print(f"\n{', '.join(f'{name} {value}' for name, value in report.about.items())}\n{report.tables()}")
    print("passed" if report.passed else "FAILED")
    return 0 if report.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
