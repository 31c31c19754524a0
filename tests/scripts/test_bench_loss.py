"""The benchmark of the loss head counts memory and FLOPs exactly, names wrong contenders and checks its bounds."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts.bench_loss import __main__ as program
from scripts.bench_loss import contenders, kernels, measure, race
from scripts.bench_loss.contenders import Contender, run_eager, run_fused
from scripts.bench_loss.measure import Machine, counted
from scripts.bench_loss.problem import Outcome, Problem, Size, make_problem
from scripts.bench_loss.report import Check, Report, Result
from scripts.live_bytes import LiveBytes

CPU = torch.device("cpu")
MACHINE = Machine(bytes_per_s=1e9, flops_per_s=1e9)
TINY = Size(32, 640, 24, 8, chunk_rows=16)


def report() -> Report:
    return Report({"device": "a test"})


def rows_of(printed: str, word: str) -> list[str]:
    """Return the lines of the tables that contain ``word``."""
    return [line for line in printed.partition("\ndevice ")[2].splitlines() if word in line]


def test_live_bytes_counts_each_storage_once_until_it_is_freed() -> None:
    before = torch.zeros(1000)
    with LiveBytes() as memory:
        first = before + 1
        view = first[500:].view(2, 250)
        first.mul_(2)
        torch.add(before, 1, out=first)
        assert memory.live == memory.peak == 4000, "views, in-place operators and out= allocate nothing"
        del first
        assert memory.live == 4000, "the view keeps the storage"
        del view
        torch.ones(100)
        assert memory.live == 0 and memory.peak == 4000
        leaf = torch.ones(1000, requires_grad=True)
        loss = leaf.exp().exp().sum()
        assert memory.live == 12004, "the leaf, two results kept for the backward, and the loss"
        loss.backward()
        assert memory.live == 8004, "the leaf, its gradient and the loss"


def test_live_bytes_leaves_out_the_smallest_storage_of_each_gradient_size() -> None:
    with LiveBytes([100, 30]) as memory:
        first, other = torch.zeros(10, 10), torch.zeros(30)
        assert memory.live == 520 and memory.peak == 0
        wide = torch.zeros(100, dtype=torch.float64)
        assert memory.peak == 800
    del first, other, wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [TINY, Size(48, 333, 20, 5)], ids=str)
def test_eager_on_fake_tensors_has_the_peak_and_flops_of_real_tensors(size: Size, dtype: torch.dtype) -> None:
    problem = make_problem(size, CPU, dtype)
    _, peak, flops = counted(lambda: run_eager(problem), problem.gradient_numels)
    assert race.fake_eager(size, dtype) == (peak, flops)
    assert flops == 6 * size.rows * size.vocab * size.width
    assert peak >= 4 * size.rows * size.vocab * 4


def test_the_flops_of_the_fused_head_are_three_matmuls() -> None:
    problem = make_problem(TINY, CPU, torch.float32)
    _, _, flops = counted(lambda: run_fused(problem), problem.gradient_numels)
    assert flops == 6 * TINY.rows * TINY.vocab * TINY.width


def test_the_quick_run_passes_and_writes_its_results(tmp_path: Path, capsys) -> None:
    path = tmp_path / "loss.json"
    assert program.main(["--quick", "--device", "cpu", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "passed" and "FAILED" not in printed
    assert rows_of(printed, "fused  ")[0].split()[-1] == "correct"
    (bound,) = rows_of(printed, "peak, fused / eager")
    assert bound.split()[-3:] == ["<=", "0.1667", "ok"] and 0 < float(bound.split()[-4]) < 1 / 6
    (same,) = rows_of(printed, "fake / real")
    assert same.split()[-4:] == ["1", "==", "1", "ok"]
    found = json.loads(path.read_text())
    assert found["passed"] is True and found["about"]["versions"]["torch"] == torch.__version__
    raced = {result["contender"]: result for result in found["results"][:4]}
    assert list(raced)[:3] == ["fused", "eager", "torch.compile"]
    assert raced["fused"]["seconds"] > 0 and 0 < raced["fused"]["errors"]["d_head tail"] < 1e-4


def spoil_loss(found: Outcome) -> Outcome:
    return dataclasses.replace(found, kl_sum=found.kl_sum * 1.0001)


def spoil_row(found: Outcome) -> Outcome:
    found.d_hidden_ND[-1] *= 1.01
    return found


def spoil_column(found: Outcome) -> Outcome:
    """Change the gradient of a token that no row keeps, which is small."""
    norm_V = found.d_head_VD.norm(dim=1)
    found.d_head_VD[norm_V.argsort()[len(norm_V) // 2]] = 0
    return found


@pytest.mark.parametrize(
    ("spoil", "what"), [(spoil_loss, "kl_sum"), (spoil_row, "d_hidden"), (spoil_column, "d_head tail")]
)
def test_a_wrong_contender_is_named(spoil: Callable[[Outcome], Outcome], what: str) -> None:
    wrong = Contender("wrong", lambda problem: spoil(run_eager(problem)))
    found = report()
    race.race(
        found, make_problem(program.SMALL, CPU, torch.float32), [Contender("right", run_eager), wrong], MACHINE, 1
    )
    assert [bool(result.wrong) for result in found.results] == [False, True]
    assert found.results[1].wrong.startswith(what) and "WRONG" in found.tables() and not found.passed


def test_a_missed_bound_or_a_failed_section_fails_the_run(monkeypatch, capsys) -> None:
    monkeypatch.setattr(race, "DEFAULT_MEMORY_BOUND", 1e-3)
    monkeypatch.setattr(race, "race", lambda *args: 1 / 0)
    assert program.main(["--quick", "--device", "cpu", "--repeats", "1"]) == 1
    printed = capsys.readouterr().out
    assert "ZeroDivisionError" in rows_of(printed, ": ran")[0]
    assert rows_of(printed, "peak, fused / eager")[0].endswith("FAILED"), "the next section still runs"


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
    ],
)
def test_a_check_passes_if_its_bound_holds(check: Check, passed: bool | None) -> None:
    assert check.passed is passed
    found = report()
    found.checks.append(check)
    assert found.passed is (passed is not False)
    json.dumps(found.as_json(), allow_nan=False)


def failing(error: Exception) -> Callable[[Problem], Outcome]:
    def run(problem: Problem) -> Outcome:
        raise error

    return run


@pytest.mark.parametrize(
    ("contender", "wrong", "note"),
    [
        (Contender("fused", failing(torch.OutOfMemoryError("much"))), "memory", ""),
        (Contender("eager", failing(torch.OutOfMemoryError("much"))), "", "memory"),
        (Contender("eager", failing(ValueError("no\nmore"))), "ValueError: no", ""),
        (Contender("peer", failing(ValueError("no")), peer=True), "", "ValueError: no"),
    ],
)
def test_a_failed_contender_is_an_error_or_a_note_and_the_next_one_runs(contender, wrong: str, note: str) -> None:
    found = report()
    problem = make_problem(TINY, CPU, torch.float32)
    race.race(found, problem, [contender, Contender("next", run_eager)], MACHINE, 1)
    failed, following = found.results
    assert failed.wrong.endswith(wrong) and failed.note.endswith(note) and failed.seconds is None
    assert following.seconds is not None and found.passed is not bool(wrong)


def test_ligers_loss_is_compared_with_its_definition(monkeypatch) -> None:
    """With a replacement of Liger's signature: a mean over rows, beta 0.5, no hard loss."""
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
    monkeypatch.setattr(contenders, "installed", lambda package: "0.0")
    liger = contenders.contenders(quick=True)[-1]
    problem = make_problem(TINY, CPU, torch.float32)
    found = race.first_run(problem, liger, "case")
    assert not liger.skip and not found.wrong and found.errors, found
    assert found.flops == 8 * TINY.rows * TINY.vocab * TINY.width
    scale = 1.001
    assert race.first_run(problem, liger, "case").wrong


def replacements(wrong: str = "") -> Callable[[str, str], Any]:
    """Return the kernels in plain PyTorch, with one error if ``wrong``."""

    def reduce_rows(z_CV: Tensor, ids_CK: Tensor, inverse_temperature: float) -> tuple[Tensor, ...]:
        logits_CK = z_CV.gather(1, ids_CK.long()).float()
        z_CV.scatter_(1, ids_CK.long(), -math.inf)
        far_CV = z_CV.float() - z_CV.float().amax(1, keepdim=True)
        tail_sum_C = far_CV.exp().sum(1) * (1.001 if wrong == "error of the sums" else 1)
        return logits_CK, z_CV.float().amax(1), tail_sum_C, (far_CV.exp() * far_CV.clamp(min=-1e30)).sum(1)

    def gradient_rows(z_CV, ids_CK, tail_max_C, factor_C, slope_C, d_logits_CK, inverse_temperature, out_CV) -> Tensor:
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

    found = {"reduce_rows": reduce_rows, "gradient_rows": gradient_rows, "topk_with_tail": topk_with_tail}
    return lambda module, name: None if wrong == "missing" else found[name]


def kernels_report(monkeypatch, wrong: str = "", machine: Machine = MACHINE, verdict: bool = False) -> Report:
    monkeypatch.setattr(kernels, "kernel", replacements(wrong))
    found = report()
    kernels.bench_kernels(found, Size(32, 1024, 0, 16), CPU, machine, 1, verdict, goals=False)
    return found


@pytest.mark.parametrize("wrong", ["", "error of the sums", "error of the gradient", "largest error, nats", "missing"])
def test_a_wrong_kernel_is_named_and_a_missing_one_is_skipped(wrong: str, monkeypatch) -> None:
    checks = kernels_report(monkeypatch, wrong).checks
    failed = [check.name for check in checks if check.passed is False]
    if wrong in ("", "missing"):
        assert not failed and bool(checks) == (wrong == "")
    else:
        assert failed and all(name.endswith(wrong) for name in failed)


def test_a_slow_kernel_fails_only_with_a_verdict(monkeypatch) -> None:
    fast_machine = Machine(1e15, 1e15)
    name = "loss kernel, float32 logits: share of the roofline"
    for verdict in (False, True):
        found = kernels_report(monkeypatch, machine=fast_machine, verdict=verdict)
        assert (name in {check.name for check in found.checks if check.passed is False}) == verdict
    assert "goal 7.3" in kernels_report(monkeypatch).tables()


def test_if_eager_runs_out_of_memory_its_time_comes_from_fewer_rows(monkeypatch) -> None:
    def lean_kl(z_NV: Tensor, topk: Any, overwrite: bool) -> Tensor:
        if len(z_NV) > 8:
            raise torch.OutOfMemoryError
        return z_NV.sum(dim=1)

    monkeypatch.setattr(kernels, "lean_kl", lean_kl)
    monkeypatch.setattr(measure, "seconds_of", lambda run, device: (run(), 2.0)[1])
    topk = make_problem(TINY, CPU, torch.float32).topk
    assert kernels.eager_given_logits(torch.zeros(32, 640), topk, 1) == (8.0, 8)


def test_the_roofline_is_matmuls_and_passes_over_the_logits() -> None:
    assert Machine(bytes_per_s=10.0, flops_per_s=100.0).floor(flops=500.0, moved=20.0) == 7.0
    problem = make_problem(TINY, CPU, torch.bfloat16)
    logits = TINY.rows * TINY.vocab
    fused, eager, _, liger = contenders.contenders(quick=True)
    assert fused.flops_and_bytes(problem) == (6 * logits * TINY.width, 10 * logits)
    assert eager.flops_and_bytes(problem) == (6 * logits * TINY.width, 6 * logits)
    assert liger.flops_and_bytes(problem) == (8 * logits * TINY.width, 10 * logits)


def test_the_tables_show_every_number() -> None:
    found = report()
    found.results.append(Result("c", "fused", 0.0123, 2_500_000, 3_000_000_000, 0.5, {"kl_sum": 1e-6}))
    found.checks.append(Check("time", 2.0, note="in turn"))
    lines = found.tables().splitlines()
    assert lines[1].split() == ["c", "fused", "12.3", "2.5", "3.00", "50%", "1.0e-06", "correct"]
    assert lines[-1].split() == ["time", "2", "in", "turn"]
