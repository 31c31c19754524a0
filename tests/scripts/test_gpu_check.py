"""The check of the vLLM path: what passes and what fails, what the table says, and one whole run without a GPU."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill.model.checksum import bit_sums_by_name
from distill.types import Problem, Prompt, Rollout
from scripts import gpu_check
from scripts.gpu_check import Bound, Check, Report, at_least, at_most, exactly
from scripts.launch import ROOT
from tests.helpers import save_tiny_model
from tests.model.test_attention import _flash
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.mark.parametrize(
    ("bound", "value", "holds"),
    [
        (at_most(0.05), 0.05, True),
        (at_most(0.05), 0.0501, False),
        (at_least(0.9), 0.9, True),
        (at_least(0.9), 0.8999, False),
        (exactly(12), 12.0, True),
        (exactly(12), 11.0, False),
        (exactly(12), 13.0, False),
        (at_most(1), math.nan, False),
        (at_least(1), math.nan, False),
        (at_most(1), -math.inf, True),
    ],
)
def test_a_bound_includes_its_limit_and_refuses_nan(bound: Bound, value: float, holds: bool) -> None:
    check = Check("x", value, bound=bound)
    assert check.passed is holds and check.verdict == ("ok" if holds else "FAILED")


def test_a_number_without_bound_and_a_bound_without_number_are_no_verdicts() -> None:
    assert Check("speed", 3.0).passed is None and Check("speed", 3.0).verdict == ""
    assert Check("memory", None, bound=at_most(4)).passed is None
    assert Check("memory", None, bound=at_most(4)).verdict == "n/a"
    assert Check("sync", None, broke=True).passed is False and Check("sync", 1.0, broke=True).verdict == "FAILED"


def test_the_table_has_a_line_a_check_in_columns() -> None:
    lines = gpu_check.table(
        [
            Check("log-probs", 0.01234567, "nats", at_most(0.05), "64 tokens"),
            Check("growth over cycles", 300.0, "MiB", at_most(256)),
            Check("speed", 12345.6, "tokens/s"),
            Check("sleep", None, "GiB", at_most(4), "no GPU"),
        ]
    ).splitlines()
    assert [line.split() for line in lines] == [
        ["check", "value", "bound"],
        ["log-probs", "0.01235", "nats", "<=", "0.05", "ok", "64", "tokens"],
        ["growth", "over", "cycles", "300", "MiB", "<=", "256", "FAILED"],
        ["speed", "1.235e+04", "tokens/s"],
        ["sleep", "-", "<=", "4", "n/a", "no", "GPU"],
    ]
    assert len({line.index("<=") for line in lines if "<=" in line}) == 1


def _report(folder: Path) -> Report:
    return Report(folder, {"model": "m"})


def _written(folder: Path) -> dict:
    return json.loads((folder / "gpu_check.json").read_text())


def test_every_section_runs_and_one_that_breaks_fails_the_report(tmp_path) -> None:
    def breaks() -> Iterator[Check]:
        yield Check("before", 1.0, bound=exactly(1))
        raise RuntimeError("out of\nmemory")

    report = _report(tmp_path)
    report.run("first", breaks)
    report.run("second", lambda: iter([Check("after", math.inf, "s")]))
    report.write(finished=True)
    found = _written(tmp_path)
    assert (found["model"], found["finished"], found["passed"], report.passed) == ("m", True, False, False)
    assert list(found["seconds"]) == ["first", "second"]
    assert found["checks"] == [
        {"name": "before", "value": 1.0, "unit": "", "bound": "== 1", "passed": True, "note": ""},
        {
            "name": "first",
            "value": None,
            "unit": "",
            "bound": None,
            "passed": False,
            "note": "RuntimeError: out of memory",
        },
        {"name": "after", "value": "inf", "unit": "s", "bound": None, "passed": None, "note": ""},
    ]


@pytest.mark.parametrize(
    ("checks", "passed"),
    [
        ([Check("a", 1.0, bound=exactly(1)), Check("b", 2.0), Check("c", None, bound=at_most(1))], True),
        ([Check("a", 1.0, bound=exactly(1)), Check("b", 2.0, bound=at_most(1))], False),
        ([Check("b", 2.0), Check("c", None, bound=at_most(1))], False),
        ([], False),
    ],
    ids=["nothing failed", "one failed", "nothing was checked", "nothing at all"],
)
def test_a_report_passes_if_nothing_failed_and_something_could(tmp_path, checks, passed) -> None:
    report = _report(tmp_path)
    report.run("all", lambda: iter(checks))
    assert report.passed is passed and _written(tmp_path)["passed"] is passed


def test_a_run_that_was_cut_off_says_so_and_leaves_what_it_saw(tmp_path, monkeypatch, capsys) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(faulthandler, "dump_traceback", lambda all_threads: None)
    report = _report(tmp_path)
    report.run("first", lambda: iter([Check("good", 1.0, bound=exactly(1))]))
    assert _written(tmp_path)["finished"] is False and _written(tmp_path)["passed"] is True
    with gpu_check.time_limit(0.05, report):
        for _ in range(1200):
            if codes:
                break
            time.sleep(0.05)
    assert codes == [1] and _written(tmp_path)["passed"] is False and _written(tmp_path)["finished"] is False
    assert "good" in capsys.readouterr().out
    before = set(threading.enumerate())
    with gpu_check.time_limit(600, report):
        (clock,) = set(threading.enumerate()) - before
    clock.join(60)
    assert not clock.is_alive() and codes == [1], "the clock went on"


def test_growth_is_counted_from_the_second_cycle(tmp_path) -> None:
    mib = 2**20
    check = gpu_check.growth("memory", [0, 100 * mib, 500 * mib, 900 * mib, 400 * mib], 5, at_most(256))
    assert (check.value, check.passed) == (300.0, False) and "at most 800 in between" in check.note
    assert gpu_check.growth("memory", [0, 100 * mib, 356 * mib], 3, at_most(256)).passed is True
    missing = gpu_check.growth("memory", [], 3, at_most(256))
    assert missing.passed is None and missing.note == gpu_check.ONLY_GPU


def test_storages_are_counted_once() -> None:
    base = torch.zeros(10, dtype=torch.int64)
    assert gpu_check.storage_bytes([base[:3], [base[5:], base], torch.zeros(4, dtype=torch.int16)]) == 88


def test_the_proof_is_tried_on_one_tensor_of_each_kind() -> None:
    names = ["embed.weight", "l.0.q_proj.weight", "l.0.q_proj.bias", "l.1.q_proj.weight", "l.1.norm.weight"]
    assert gpu_check.one_of_each_kind(names) == [
        "embed.weight",
        "l.0.q_proj.weight",
        "l.0.q_proj.bias",
        "l.1.norm.weight",
    ]


@pytest.mark.parametrize("weights", [torch.tensor([1.0, 1.0, 2.0, 3.0]), torch.arange(6.0).view(3, 2)])
def test_exchanged_rows_leave_the_sum_of_bits_and_growing_ones_do_not(weights) -> None:
    exchanged, grown = weights.clone(), weights.clone()
    gpu_check.exchange_rows(exchanged)
    gpu_check.grow(grown)
    sums = bit_sums_by_name(
        [("w", weights.bfloat16()), ("exchanged", exchanged.bfloat16()), ("grown", grown.bfloat16())]
    )
    assert sums["exchanged"].plain == sums["w"].plain and sums["exchanged"].weighted != sums["w"].weighted
    assert sums["grown"].plain != sums["w"].plain


def _answer(*ids: int) -> Rollout:
    return Rollout(Prompt(0, (1,), Problem("")), 0, ids, (-1.0,) * len(ids), "length", 0)


def test_greedy_answers_agree_up_to_their_first_difference() -> None:
    ours = [_answer(1, 2, 3, 4), _answer(5, 6), _answer(7, 8), _answer(9, 10)]
    theirs = [_answer(1, 2, 0, 4), _answer(5, 6), _answer(0, 8), _answer(9, 0)]
    assert gpu_check.agreement(ours, theirs) == ((2 + 2 + 0 + 1) / 10, 3 / 4)


def test_no_two_timed_passes_share_a_prefix() -> None:
    passes = [gpu_check.random_prompts(gpu_check.QUICK, 1000, seed) for seed in range(5)]
    assert all(len(ids) == gpu_check.QUICK.prompt_tokens and max(ids) < 1000 for one in passes for ids in one)
    assert len({tuple(ids[:4]) for one in passes for ids in one}) == 5 * gpu_check.QUICK.prompts
    assert passes[0] == gpu_check.random_prompts(gpu_check.QUICK, 1000, 0)


def _stage_of(seconds: list[float], monkeypatch) -> SimpleNamespace:
    """A stage whose passes of generation take these seconds each."""
    sizes = gpu_check.Sizes(1, 1, 1, prompts=2, prompt_tokens=3, new_tokens=5, passes=len(seconds) - 1)
    clock = [0.0]
    left = list(seconds)

    def generate(prompts, sampling, seed) -> list[Rollout]:
        clock[0] += left.pop(0)
        return [_answer(*range(sampling.max_new_tokens)) for _ in prompts]

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(use_v2_model_runner=True)))
    engine = SimpleNamespace(generate=generate, _llm=llm)
    return SimpleNamespace(ready=lambda: None, sizes=sizes, valid_vocab=100, engine=engine)


def _speed(stage, peer, bounded: bool = True) -> dict[str, Check]:
    return {check.name: check for check in gpu_check.speed_checks(stage, peer, bounded)}


def test_speed_is_the_median_after_the_first_pass_over_the_peers(monkeypatch) -> None:
    peer = {"plain": [9.0, 4.0, 5.0], "like_ours": [2.5], "runner": "model runner V1"}
    found = _speed(_stage_of([100.0, 1.0, 2.5, 10.0], monkeypatch), peer)  # 10 tokens each
    assert found["generation, ours"].value == 4.0 and "model runner V2" in found["generation, ours"].note
    ratio = found["generation, ours / vLLM alone"]
    assert (ratio.value, ratio.passed) == (0.8, False)
    assert found["generation, ours / vLLM alone with our requests"].value == 1.6
    assert _speed(_stage_of([1.0, 2.0], monkeypatch), peer)["generation, ours / vLLM alone"].passed is True
    tiny = _speed(_stage_of([1.0, 100.0], monkeypatch), peer, bounded=False)["generation, ours / vLLM alone"]
    assert tiny.passed is None and tiny.bound is None


def test_without_its_peer_the_speed_is_no_pass(monkeypatch) -> None:
    found = _speed(_stage_of([1.0, 2.0], monkeypatch), None)
    assert found["generation, ours"].value == 5.0 and found["generation, ours / vLLM alone"].passed is False


def test_a_model_that_does_not_exist_is_one_sentence(tmp_path, capsys) -> None:
    assert gpu_check.main(["--model", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --model=") and said.count("\n") == 1


@pytest.mark.parametrize(("scale", "fails"), [(None, False), (0.1, True)])  # a scale of its own: another attention
def test_attentions_error_is_told_over_its_twins(monkeypatch, scale, fails) -> None:
    def flash(q, k, v, *args, **options) -> torch.Tensor:
        return _flash(*(tensor.float() for tensor in (q, k, v)), *args, **{**options, "scale": scale}).bfloat16()

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    assert (gpu_check.one_calls_error(torch.device("cpu"), 100) > 1.2) == fails


ONLY_ON_A_GPU = {
    "attention in one call, error / that of a call a sequence",
    "attention in one call, error / that of a call a sequence, window 100",
    "share of weights and cache that sleep frees",
    "left in use by the sleeping engine",
    "memory outside torch, growth over 3 sleep cycles",
    "memory in all, growth over 3 sleep cycles",
}
PROVEN = {
    "tensors changed between two syncs of the same",
    "tensors changed, by the report",
    "log-probs of the probe moved by",
    "sound weights refused",
    "stale tensors found in vLLM's memory",
    "stale tensors found, two rows exchanged",
    "damaged tensors found in vLLM's memory",
    "mended weights refused",
    "stale tensors found on their way",
    "|trainer - sampler|, mean",
}
MEASURED = {
    "|trainer - sampler|, largest",
    "greedy tokens as transformers', before they part",
    *("wake weights, median", "sync, median", "wake kv, median", "sleep, median", "sync, speed"),
    *("generation, ours", "generation, vLLM alone", "generation, ours / vLLM alone"),
}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the installed vLLM is not the one for CPU")
def test_a_tiny_model_passes_without_a_gpu(tmp_path) -> None:
    tiny_tokenizer().save_pretrained(save_tiny_model(tmp_path / "m", "qwen3", True))
    command = [sys.executable, "-m", "scripts.gpu_check", "--model", str(tmp_path / "m"), "--out", str(tmp_path / "o")]
    done = subprocess.run([*command, "--quick"], cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = _written(tmp_path / "o")
    assert found["finished"] and found["passed"] and found["device"] == "cpu", found
    assert "trainer - sampler" in done.stdout and "passed: " in done.stdout
    checks = {check["name"]: check for check in found["checks"]}
    assert checks.keys() >= PROVEN | MEASURED | ONLY_ON_A_GPU
    assert {name for name in ONLY_ON_A_GPU if checks[name]["value"] is None and "no GPU" in checks[name]["note"]} == (
        ONLY_ON_A_GPU
    )
    assert {name for name in PROVEN if checks[name]["passed"]} == PROVEN
    assert all(checks[name]["value"] > 0 for name in MEASURED)
