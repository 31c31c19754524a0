"""The benchmark of the loss head counts memory rightly, finds who is wrong, and keeps its bounds."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.loss import topk_kl
from distill.types import TopK
from scripts import bench_loss
from scripts.bench_loss import SMALL, Check, Contender, LiveBytes, Machine, Outcome, Problem, Report, Result, Size

CPU = torch.device("cpu")
MACHINE = Machine(bytes_per_s=1e9, flops_per_s=1e9)
TINY = Size(32, 640, 24, 8, chunk_rows=16)


def report() -> Report:
    return Report({"device": "a test"})


def rows_of(printed: str, word: str) -> list[str]:
    """Lines of the tables, not of the progress, that hold ``word``."""
    return [line for line in printed.partition("\ndevice ")[2].splitlines() if word in line]


def test_storages_are_counted_once_and_until_they_die() -> None:
    before = torch.zeros(1000)
    with LiveBytes() as memory:
        assert memory.live == 0
        first = before + 1
        assert memory.live == memory.peak == 4000
        view = first[500:].view(2, 250)
        before.add_(1)
        first.mul_(2)
        torch.add(before, 1, out=first)
        assert memory.live == memory.peak == 4000, "a view, an operator in place and out= take nothing"
        half = torch.ones(500)
        assert memory.live == 6000
        del first
        assert memory.live == 6000, "the view keeps the storage"
        del view
        assert memory.live == 2000
        torch.ones(100)
        assert memory.live == 2000 and memory.peak == 6000
        del half
    assert memory.live == 0 and memory.peak == 6000


def test_of_the_gradients_one_each_is_left_out() -> None:
    with LiveBytes([100, 30]) as memory:
        first = torch.zeros(10, 10)
        assert memory.live == 400 and memory.peak == 0
        other = torch.zeros(30)
        assert memory.peak == 0
        wide = torch.zeros(100, dtype=torch.float64)
        assert memory.peak == 800, "the smaller one is left out"
        del first
        plain = torch.zeros(7)
        assert memory.peak == 800 and memory.live == 800 + 120 + 28
    del other, wide, plain


def test_autograd_is_counted_and_what_it_saves() -> None:
    leaf = torch.ones(1000, requires_grad=True)
    with LiveBytes() as memory:
        loss = leaf.exp().exp().sum()
        assert memory.live == 8004, "exp keeps its result for the backward"
        loss.backward()
        assert memory.live == 8000 - 8000 + 4000 + 4, "the gradient and the loss"
    assert memory.peak >= 12000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [TINY, Size(48, 333, 20, 5)], ids=str)
def test_on_fake_tensors_eager_counts_as_on_real_ones(size: Size, dtype: torch.dtype) -> None:
    problem = bench_loss.make_problem(size, CPU, dtype)
    _, peak, flops = bench_loss.counted(lambda: bench_loss.run_eager(problem), problem.gradient_numels)
    assert bench_loss.fake_eager(size, dtype) == (peak, flops)
    assert flops == 6 * size.rows * size.vocab * size.width
    assert peak >= 4 * size.rows * size.vocab * 4


def test_eager_is_leaner_than_the_plain_twin() -> None:
    """The comparison would flatter us with one that is made for reading."""
    problem = bench_loss.make_problem(TINY, CPU, torch.float32)

    def twin(hidden_ND: Tensor, head_VD: Tensor, topk: TopK, weight_N: Tensor) -> Tensor:
        return (topk_kl(hidden_ND @ head_VD.t(), topk, bench_loss.CONFIG) * weight_N).sum()

    def peak(loss: Callable[..., Tensor]) -> int:
        return bench_loss.counted(lambda: bench_loss.run_eager(problem, loss), problem.gradient_numels)[1]

    assert peak(bench_loss.eager_loss) < 0.9 * peak(twin)


def test_fake_tensors_take_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak, _ = bench_loss.fake_eager(Size(4096, 151_936, 576, 64))
    assert peak >= 4 * 4096 * 151_936 * 4
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 0.5e9


def test_the_fused_heads_matmuls_are_all_counted() -> None:
    problem = bench_loss.make_problem(TINY, CPU, torch.float32)
    _, _, flops = bench_loss.counted(lambda: bench_loss.run_fused(problem), problem.gradient_numels)
    assert flops == 6 * TINY.rows * TINY.vocab * TINY.width


def test_the_quick_run_passes_prints_its_tables_and_leaves_a_file(tmp_path: Path, capsys) -> None:
    path = tmp_path / "loss.json"
    assert bench_loss.main(["--quick", "--device", "cpu", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "passed" and "FAILED" not in printed
    assert "turn 2 of 2" in printed.partition("\ndevice ")[0], "it says what it is at"
    fused, counted = rows_of(printed, "fused  ")[:2]
    assert fused.split()[-1] == counted.split()[-1] == "right"
    assert "skipped: left out by --quick" in rows_of(printed, "torch.compile")[0]
    (bound,) = rows_of(printed, "peak, fused / eager")
    assert bound.split()[-3:] == ["<=", "0.1667", "ok"] and 0 < float(bound.split()[-4]) < 1 / 6
    (same,) = rows_of(printed, "fake / real")
    assert same.split()[-4:] == ["1", "==", "1", "ok"]

    found = json.loads(path.read_text())
    assert found["passed"] is True and found["about"]["versions"]["torch"] == torch.__version__
    assert found["about"]["device"] and len(found["about"]["date"]) == 10 and found["about"]["GB_per_s"] > 0
    raced = {result["contender"]: result for result in found["results"][:4]}
    assert list(raced)[:3] == ["fused", "eager", "torch.compile"]
    assert raced["fused"]["seconds"] > 0 and 0 < raced["fused"]["errors"]["d_head tail"] < 1e-4
    assert raced["fused"]["share"] > 0 and raced["torch.compile"]["seconds"] is None
    assert {check["name"].partition(": ")[2] for check in found["checks"]} >= {"peak, fused / eager"}


def spoil_loss(found: Outcome) -> Outcome:
    return dataclasses.replace(found, kl_sum=found.kl_sum * 1.0001)


def spoil_row(found: Outcome) -> Outcome:
    found.d_hidden_ND[-1] *= 1.01
    return found


def spoil_column(found: Outcome) -> Outcome:
    """Of a token that no row keeps: small beside the others."""
    norm_V = found.d_head_VD.norm(dim=1)
    found.d_head_VD[norm_V.argsort()[len(norm_V) // 2]] = 0
    return found


@pytest.mark.parametrize(
    ("spoil", "what"), [(spoil_loss, "kl_sum"), (spoil_row, "d_hidden"), (spoil_column, "d_head tail")]
)
def test_who_is_wrong_is_named(spoil: Callable[[Outcome], Outcome], what: str, monkeypatch, capsys) -> None:
    rivals = bench_loss.contenders(quick=True)[:2]
    rivals.append(Contender("impostor", lambda problem: spoil(bench_loss.run_eager(problem))))
    monkeypatch.setattr(bench_loss, "contenders", lambda quick: rivals)
    assert bench_loss.main(["--quick", "--device", "cpu", "--repeats", "1"]) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "FAILED"
    (line,) = rows_of(printed, "WRONG")
    assert "impostor" in line and line.partition("WRONG")[2].split()[: len(what.split())] == what.split()


def test_a_missed_bound_fails(monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench_loss, "DEFAULT_MEMORY_BOUND", 1e-3)
    assert bench_loss.main(["--quick", "--device", "cpu", "--repeats", "1"]) == 1
    first, last = rows_of(capsys.readouterr().out, "FAILED")
    assert "peak, fused / eager" in first and last == "FAILED"


@pytest.mark.parametrize(
    ("check", "passed"),
    [
        (Check("x", 1.0), None),
        (Check("x", 1.0, "<=", 1.0), True),
        (Check("x", 1.1, "<=", 1.0), False),
        (Check("x", 0.8, ">=", 0.8), True),
        (Check("x", 0.7, ">=", 0.8), False),
        (Check("x", 1.1, "==", 1.0), False),
        (Check("x", math.nan, "<=", 1.0), False),
        (Check("x", math.nan, ">=", 1.0), False),
    ],
)
def test_bounds(check: Check, passed: bool | None) -> None:
    assert check.passed is passed
    found = report()
    found.checks.append(check)
    assert found.passed is (passed is not False)
    json.dumps(found.as_json(), allow_nan=False)


def dies(error: Exception) -> Callable[[Problem], Outcome]:
    def run(problem: Problem) -> Outcome:
        raise error

    return run


@pytest.mark.parametrize(
    ("rival", "wrong", "note"),
    [
        (Contender("fused", dies(torch.OutOfMemoryError("much"))), "out of memory", ""),
        (Contender("eager", dies(torch.OutOfMemoryError("much"))), "", "can't run: out of memory"),
        (Contender("eager", dies(ValueError("no\nmore"))), "ValueError: no", ""),
        (Contender("peer", dies(ValueError("no")), peer=True), "", "can't run: ValueError: no"),
    ],
)
def test_what_becomes_of_who_cannot_run(rival: Contender, wrong: str, note: str) -> None:
    found = report()
    others = [Contender("other", bench_loss.run_eager)]
    bench_loss.race(found, bench_loss.make_problem(TINY, CPU, torch.float32), [rival, *others], MACHINE, 1)
    dead, other = found.results
    assert (dead.contender, dead.wrong, dead.note, dead.seconds) == (rival.name, wrong, note, None)
    assert other.seconds is not None and not other.wrong, "the others race on"
    assert found.passed is not bool(wrong)


def test_a_section_that_breaks_is_a_failed_check_and_the_next_one_runs(monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench_loss, "race", lambda *args: 1 / 0)
    assert bench_loss.main(["--quick", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "ZeroDivisionError" in rows_of(printed, ": ran")[0]
    assert rows_of(printed, "peak, fused / eager")[0].endswith("ok")


def test_contenders_take_turns() -> None:
    seen: list[str] = []

    def rival(name: str) -> Contender:
        def run(problem: Problem) -> Outcome:
            seen.append(name)
            return bench_loss.run_eager(problem)

        return Contender(name, run)

    problem = bench_loss.make_problem(TINY, CPU, torch.float32)
    bench_loss.race(report(), problem, [rival("a"), rival("b")], MACHINE, 2)
    assert seen == ["a", "b"] * 3, "one run to be judged by, two against the clock"


def test_ligers_loss_is_held_to_its_own_definition(monkeypatch) -> None:
    """By a stand-in with Liger's signature: a mean over rows, beta 0.5, no hard loss."""

    scale = 1.0

    class Loss:
        def __init__(self, weight_hard_loss: float, weight_soft_loss: float, beta: float, compiled: bool) -> None:
            assert (weight_hard_loss, weight_soft_loss, beta, compiled) == (0.0, 1.0, 0.5, False)

        def __call__(self, hidden: Tensor, head: Tensor, t_hidden: Tensor, t_head: Tensor, *rest: Any) -> Tensor:
            q, p = (hidden @ head.t()).softmax(1), (t_hidden @ t_head.t()).softmax(1)
            m = (p + q) / 2
            return ((p * (p / m).log() + q * (q / m).log()) / 2).sum() / len(hidden) * scale

    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", SimpleNamespace(LigerFusedLinearJSDLoss=Loss))
    monkeypatch.setattr(bench_loss, "installed", lambda package: "0.0")
    liger = bench_loss.contenders(quick=True)[-1]
    assert not liger.skip
    problem = bench_loss.make_problem(TINY, CPU, torch.float32)
    found = bench_loss.first_run(problem, liger, "case")
    assert not found.wrong and found.errors, found
    assert found.peak_bytes and found.flops == 8 * TINY.rows * TINY.vocab * TINY.width
    scale = 1.001
    assert bench_loss.first_run(problem, liger, "case").wrong


def test_the_gpus_plan_in_small_on_a_cpu() -> None:
    found = report()
    plan = bench_loss.quick(bench_loss.GPU)
    assert plan.dtype == torch.bfloat16 and plan.kernels is not None and plan.memory == ()
    bench_loss.measure(found, dataclasses.replace(plan, kernels=None), CPU, bench_loss.contenders(quick=True)[:2])
    assert found.passed, found.tables()
    fused, eager = found.results
    assert 1e-5 < max(fused.errors.values()) < 1e-2 and 1e-3 < max(eager.errors.values()) < 5e-2


def stand_ins(wrong: str = "") -> Callable[[str, str], Any]:
    """The kernels in plain PyTorch."""

    def reduce_rows(z_CV: Tensor, ids_CK: Tensor, inverse_temperature: float) -> tuple[Tensor, ...]:
        logits_CK = z_CV.gather(1, ids_CK.long()).float()
        z_CV.scatter_(1, ids_CK.long(), -math.inf)
        far_CV = z_CV.float() - z_CV.float().amax(1, keepdim=True)
        tail_sum_C = far_CV.exp().sum(1) * (1.001 if wrong == "error of the sums" else 1)
        return logits_CK, z_CV.float().amax(1), tail_sum_C, (far_CV.exp() * far_CV.clamp(min=-1e30)).sum(1)

    def gradient_rows(z_CV, ids_CK, tail_max_C, factor_C, slope_C, d_logits_CK, inverse_temperature, out_CV) -> Tensor:
        assert slope_C is None
        out_CV.copy_((z_CV.float() - tail_max_C[:, None]).exp() * factor_C[:, None])
        if wrong != "error of the gradient":
            out_CV.scatter_(1, ids_CK.long(), d_logits_CK.to(out_CV.dtype))
        return out_CV

    def topk_with_tail(z_CV: Tensor, k: int, inverse_temperature: float) -> tuple[Tensor, ...]:
        log_p_CV = z_CV.float().log_softmax(1)
        logprobs_CK, ids_CK = log_p_CV.topk(k, 1)
        if wrong == "largest error, nats":
            ids_CK = (ids_CK + 1) % z_CV.shape[1]
        log_tail_C = log_p_CV.scatter(1, ids_CK, -math.inf).logsumexp(1)
        return ids_CK.flip(1).int(), logprobs_CK.flip(1), log_tail_C, log_tail_C

    kernels = {"reduce_rows": reduce_rows, "gradient_rows": gradient_rows, "topk_with_tail": topk_with_tail}
    return lambda module, name: None if wrong == "absent" else kernels[name]


def kernels_found(monkeypatch, wrong: str = "", machine: Machine = MACHINE, judged: bool = False) -> Report:
    monkeypatch.setattr(bench_loss, "kernel", stand_ins(wrong))
    found = report()
    bench_loss.bench_kernels(found, Size(32, 1024, 0, 16), CPU, machine, 1, judged, goals=False)
    return found


def test_kernels_are_judged_and_timed_beside_eager(monkeypatch) -> None:
    found = kernels_found(monkeypatch)
    assert found.passed, found.tables()
    names = [check.name for check in found.checks]
    for dtype in ("float32", "bfloat16"):
        for k in bench_loss.TOPK_MS:
            assert f"teacher's top-{k}, {dtype} logits: ms" in names
        for what in ("error of the sums", "error of the gradient", "ms", "share of the roofline", "eager / ours"):
            assert f"loss kernel, {dtype} logits: {what}" in names
    assert all(check.passed is None for check in found.checks if check.name.endswith((": ms", "roofline", "ours")))
    assert "goal 7.3" in found.tables() and "goal 3" in found.tables(), "an H200's goals, shown without a verdict"


@pytest.mark.parametrize("wrong", ["error of the sums", "error of the gradient", "largest error, nats"])
def test_a_wrong_kernel_is_named(wrong: str, monkeypatch) -> None:
    failed = [check.name for check in kernels_found(monkeypatch, wrong).checks if check.passed is False]
    assert failed and all(name.endswith(wrong) for name in failed)


def test_a_slow_kernel_fails_where_it_is_judged(monkeypatch) -> None:
    endless = kernels_found(monkeypatch, machine=Machine(1e15, 1e15), judged=True)
    failed = {check.name for check in endless.checks if check.passed is False}
    assert "loss kernel, float32 logits: share of the roofline" in failed
    slow = kernels_found(monkeypatch, machine=Machine(1.0, 1.0), judged=True)
    assert not any(c.name.endswith("roofline") and c.passed is False for c in slow.checks)


def test_kernels_that_are_not_there_are_left_out(monkeypatch, capsys) -> None:
    assert kernels_found(monkeypatch, "absent").checks == []
    assert capsys.readouterr().out.count("skipped:") == 6


def test_where_eager_does_not_fit_its_time_comes_from_fewer_rows(monkeypatch) -> None:
    def lean_kl(z_NV: Tensor, topk: Any, overwrite: bool) -> Tensor:
        if len(z_NV) > 8:
            raise torch.OutOfMemoryError
        return z_NV.sum(dim=1)

    monkeypatch.setattr(bench_loss, "lean_kl", lean_kl)
    monkeypatch.setattr(bench_loss, "seconds_of", lambda run, device: (run(), 2.0)[1])
    topk = bench_loss.make_problem(TINY, CPU, torch.float32).topk
    assert bench_loss.eager_given_logits(torch.zeros(32, 640), topk, 1) == (8.0, 8)


def test_the_roofline_is_matmuls_and_passes_over_the_logits() -> None:
    assert Machine(bytes_per_s=10.0, flops_per_s=100.0).floor(flops=500.0, moved=20.0) == 7.0
    problem = bench_loss.make_problem(TINY, CPU, torch.bfloat16)
    logits = TINY.rows * TINY.vocab
    ours, eager, _, liger = bench_loss.contenders(quick=True)
    assert ours.flops_and_bytes(problem) == (6 * logits * TINY.width, 10 * logits)
    assert eager.flops_and_bytes(problem) == (6 * logits * TINY.width, 6 * logits)
    assert liger.flops_and_bytes(problem) == (8 * logits * TINY.width, 10 * logits)


def test_tables_hold_every_number() -> None:
    found = report()
    errors = {"kl_sum": 1e-6, "d_hidden": 2e-6}
    found.results.append(Result("c", "fused", 0.0123, 2_500_000, 3_000_000_000, 0.5, errors))
    found.checks.append(Check("time", 2.0, note="by turns"))
    lines = found.tables().splitlines()
    assert lines[1].split() == ["c", "fused", "12.3", "2.5", "3.00", "50%", "2.0e-06", "right"]
    assert lines[-1].split() == ["time", "2", "by", "turns"]
    assert SMALL.chunk_rows and SMALL.rows % SMALL.chunk_rows == 0
