"""Verify all contenders at one size, then time them alternately; compare peak memory on a CPU."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.types import TopK
from scripts.bench_loss.contenders import Contender, run_eager
from scripts.bench_loss.measure import Machine, counted, seconds_of, typical
from scripts.bench_loss.problem import Problem, Size, errors_of, make_problem, reference
from scripts.bench_loss.report import Check, Report, Result

MEMORY_BOUNDS = {49_152: 1 / 6, 151_936: 1 / 8}
"""Maximum ratio of the fused head's peak memory to eager's peak memory, by vocabulary size."""
DEFAULT_MEMORY_BOUND = 1 / 6


def first_run(problem: Problem, rival: Contender, case: str) -> Result:
    """Run a contender once, also as warm-up; return errors, peak memory and FLOPs."""
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
    except Exception as error:  # the other contenders still run
        what = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]:.100}"
        if isinstance(error, torch.OutOfMemoryError):
            what = "out of memory"
        fatal = not (rival.peer or (what == "out of memory" and rival.name != "fused"))
        return Result(case, rival.name, wrong=what if fatal else "", note="" if fatal else f"cannot run: {what}")
    errors = errors_of(problem, outcome, rival.jsd)
    wrong = [
        f"{of} {error:.1e} > {rival.tolerance(dtype, of):.0e}"
        for of, error in errors.items()
        if not error <= rival.tolerance(dtype, of)
    ]
    note = "a different loss: complete vocabulary, with the teacher's head" if rival.jsd else ""
    return Result(case, rival.name, None, peak, flops, None, errors, ", ".join(wrong), note)


def race(report: Report, problem: Problem, rivals: Sequence[Contender], machine: Machine, repeats: int) -> None:
    """Verify each contender with one run, then time all contenders alternately."""
    device, case = problem.head_VD.device, str(problem.size)
    found: dict[str, Result] = {}
    for rival in rivals:
        report.progress(f"{case}: {rival.name}{': ' + rival.skip if rival.skip else ''}")
        found[rival.name] = (
            Result(case, rival.name, note=f"skipped: {rival.skip}") if rival.skip else first_run(problem, rival, case)
        )
    reference.cache_clear()
    running = [rival for rival in rivals if found[rival.name].errors]
    times: dict[str, list[float]] = {rival.name: [] for rival in running}
    for turn in range(repeats):
        report.progress(f"{case}: timed run {turn + 1} of {repeats}")
        for rival in running:
            times[rival.name].append(seconds_of(lambda run=rival.run: run(problem), device))  # type: ignore[misc]
    for rival in running:
        seconds = typical(times[rival.name], device)
        share = machine.floor(*rival.flops_and_bytes(problem)) / seconds
        found[rival.name] = dataclasses.replace(found[rival.name], seconds=seconds, share=share)
    report.results += found.values()


def fake_eager(size: Size, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Return the peak bytes and FLOPs of eager, measured on fake tensors, which need no memory."""
    with FakeTensorMode():
        hidden_ND, head_VD = (torch.empty(n, size.width, dtype=dtype) for n in (size.rows, size.vocab))
        ids_NK = torch.empty(size.rows, size.k, dtype=torch.int32)
        topk = TopK(ids_NK, torch.empty(size.rows, size.k), torch.empty(size.rows))
        problem = Problem(size, hidden_ND, head_VD, hidden_ND, head_VD, topk, torch.empty(size.rows))
        _, peak, flops = counted(lambda: run_eager(problem), problem.gradient_numels)
    return peak, flops


def compare_memory(report: Report, size: Size, device: torch.device, ours: Contender) -> None:
    """Compare the peak memory of a verified run of ``ours`` with that of eager on fake tensors."""
    report.progress(f"{size}: memory and FLOPs")
    problem = make_problem(size, device, torch.float32)
    result = first_run(problem, ours, str(size))
    reference.cache_clear()
    peak, flops = fake_eager(size)
    report.results += [result, Result(str(size), "eager", None, peak, flops, note="counted on fake tensors")]
    bound = MEMORY_BOUNDS.get(size.vocab, DEFAULT_MEMORY_BOUND)
    ratio = math.nan if result.peak_bytes is None else result.peak_bytes / peak
    report.checks.append(Check(f"{size}: peak, fused / eager", ratio, "<=", bound))
    report.checks.append(Check(f"{size}: FLOPs, fused / eager", (result.flops or math.nan) / flops))
