"""Bounds, verdicts and report of the GPU check, its arithmetic, and a complete run without a GPU."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import subprocess
import sys
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

MIB = 2**20


@pytest.mark.parametrize(
    ("bound", "inside", "outside"),
    [
        (at_most(0.05), (0.05, -math.inf), (0.0501, math.nan)),
        (at_least(0.9), (0.9,), (0.8999, math.nan)),
        (exactly(12), (12.0,), (11.0, 13.0, math.nan)),
    ],
)
def test_a_bound_includes_its_limit_and_excludes_nan(bound: Bound, inside, outside) -> None:
    assert all(Check("x", value, bound=bound).verdict == "ok" for value in inside)
    assert all(Check("x", value, bound=bound).verdict == "FAILED" for value in outside)


def test_a_check_without_bound_or_value_has_no_verdict_unless_it_raised_an_error() -> None:
    checks = [Check("speed", 3.0), Check("memory", None, bound=at_most(4)), Check("sync", 1.0, crashed=True)]
    assert [(check.passed, check.verdict) for check in checks] == [(None, ""), (None, "n/a"), (False, "FAILED")]


def _written(folder: Path) -> dict:
    return json.loads((folder / "gpu_check.json").read_text())


def test_all_sections_run_and_an_error_fails_the_report(tmp_path) -> None:
    def crash() -> Iterator[Check]:
        yield Check("before", 1.0, bound=exactly(1))
        raise RuntimeError("out of\nmemory")

    report = Report(tmp_path, {"model": "m"})
    report.run("first", crash)
    report.run("second", lambda: iter([Check("after", math.inf, "s")]))
    report.write(finished=True)
    found = _written(tmp_path)
    assert (found["model"], found["finished"], found["passed"]) == ("m", True, False)
    assert list(found["seconds"]) == ["first", "second"]
    rows = [(row["name"], row["value"], row["bound"], row["passed"], row["note"]) for row in found["checks"]]
    error = ("first", None, None, False, "RuntimeError: out of memory")
    assert rows == [("before", 1.0, "== 1", True, ""), error, ("after", "inf", None, None, "")]


@pytest.mark.parametrize(("passes", "fails", "passed"), [(1, 0, True), (1, 1, False), (0, 0, False)])
def test_a_report_passes_if_a_check_passed_and_none_failed(tmp_path, passes, fails, passed) -> None:
    report = Report(tmp_path, {})
    good, bad = Check("a", 1.0, bound=exactly(1)), Check("b", 2.0, bound=at_most(1))
    without = [Check("c", 2.0), Check("d", None, bound=at_most(1))]
    report.run("all", lambda: iter([good] * passes + [bad] * fails + without))
    assert report.passed is passed and _written(tmp_path)["passed"] is passed


def test_the_time_limit_writes_an_unfinished_report_and_exits_with_1(tmp_path, monkeypatch, capsys) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(faulthandler, "dump_traceback", lambda all_threads: None)
    report = Report(tmp_path, {})
    report.run("first", lambda: iter([Check("good", 1.0, bound=exactly(1))]))
    end = time.monotonic() + 60
    with gpu_check.time_limit(0.05, report):
        while not codes and time.monotonic() < end:
            time.sleep(0.05)
    assert codes == [1] and (_written(tmp_path)["passed"], _written(tmp_path)["finished"]) == (False, False)
    assert "good" in capsys.readouterr().out


def test_growth_is_measured_from_the_second_cycle() -> None:
    check = gpu_check.growth("memory", [0, 100 * MIB, 900 * MIB, 400 * MIB], 4, at_most(256))
    assert (check.value, check.passed) == (300.0, False) and "800" in check.note
    assert gpu_check.growth("memory", [0, 100 * MIB, 356 * MIB], 3, at_most(256)).passed is True
    assert gpu_check.growth("memory", [], 3, at_most(256)).passed is None


def test_each_storage_and_each_kind_of_tensor_is_counted_once() -> None:
    base = torch.zeros(10, dtype=torch.int64)
    assert gpu_check.storage_bytes([base[:3], [base[5:], base], torch.zeros(4, dtype=torch.int16)]) == 88
    first = ["embed.weight", "l.0.q_proj.weight", "l.0.q_proj.bias", "l.1.norm.weight"]
    assert gpu_check.one_of_each_kind([*first, "l.1.q_proj.weight"]) == first


@pytest.mark.parametrize("weights", [torch.tensor([1.0, 1.0, 2.0, 3.0]), torch.arange(6.0).view(3, 2)])
def test_exchanged_rows_keep_the_plain_sum_of_bits_and_scaled_weights_do_not(weights) -> None:
    exchanged, scaled = weights.clone(), weights.clone()
    gpu_check.exchange_rows(exchanged)
    gpu_check.grow(scaled)
    named = {"before": weights, "exchanged": exchanged, "scaled": scaled}
    sums = bit_sums_by_name([(name, tensor.bfloat16()) for name, tensor in named.items()])
    assert sums["exchanged"].plain == sums["before"].plain != sums["scaled"].plain
    assert sums["exchanged"].weighted != sums["before"].weighted


def _response(*ids: int) -> Rollout:
    return Rollout(Prompt(0, (1,), Problem("")), 0, ids, (-1.0,) * len(ids), "length", 0)


def test_no_two_timed_passes_share_a_prefix() -> None:
    prompts = [ids for seed in range(5) for ids in gpu_check.random_prompts(gpu_check.QUICK, 1000, seed)]
    assert len({tuple(ids[:4]) for ids in prompts}) == len(prompts) == 5 * gpu_check.QUICK.prompts


def _speed(seconds: list[float], monkeypatch, peer: dict | None, bounded: bool = True) -> list[Check]:
    """Return the checks of speed if passes of generation, of 10 tokens each, take these seconds."""
    sizes = gpu_check.Sizes(1, 1, 1, prompts=2, prompt_tokens=3, new_tokens=5, passes=len(seconds) - 1)
    clock = [0.0]

    def generate(prompts, sampling, seed) -> list[Rollout]:
        clock[0] += seconds.pop(0)
        return [_response(*range(sampling.max_new_tokens)) for _ in prompts]

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(use_v2_model_runner=True)))
    engine = SimpleNamespace(generate=generate, _llm=llm)
    stage: object = SimpleNamespace(ready=lambda: None, sizes=sizes, valid_vocab=100, engine=engine)
    return list(gpu_check.speed_checks(stage, peer, bounded))  # type: ignore[arg-type]


def test_speed_is_the_median_without_the_first_pass_relative_to_vllm_alone(monkeypatch) -> None:
    peer = {"plain": [9.0, 4.0, 5.0], "like_ours": [2.5], "runner": "V1"}
    ours, _, ratio, equal = _speed([100.0, 1.0, 2.5, 10.0], monkeypatch, peer)
    assert (ours.value, ratio.value, ratio.passed, equal.value) == (4.0, 0.8, False, 1.6) and "V2" in ours.note
    assert _speed([1.0, 2.0], monkeypatch, peer)[2].passed is True
    assert _speed([1.0, 100.0], monkeypatch, peer, bounded=False)[2].passed is None
    assert _speed([1.0, 2.0], monkeypatch, None)[-1].passed is False


def test_a_missing_model_is_an_error_in_one_line(tmp_path, capsys) -> None:
    assert gpu_check.main(["--model", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("scale", "fails"), [(None, False), (0.1, True)])
def test_a_wrong_scale_raises_the_attention_error_above_its_bound(monkeypatch, scale, fails) -> None:
    def flash(q, k, v, *args, **options) -> torch.Tensor:
        return _flash(*(tensor.float() for tensor in (q, k, v)), *args, **{**options, "scale": scale}).bfloat16()

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    assert (gpu_check.attention_error_ratio(torch.device("cpu"), 100) > 1.2) == fails


RUN = """
import sys
from distill.distributed.program import exit_process
from scripts import gpu_check
gpu_check.run_alone = lambda *_: {"plain": [1.0], "like_ours": [1.0], "runner": "none"}
exit_process(gpu_check.main(sys.argv[1:]))
"""
"""The program without its process of vLLM alone, which takes most of the time."""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs vLLM for CPU")
def test_a_tiny_model_passes_without_a_gpu(tmp_path) -> None:
    tiny_tokenizer().save_pretrained(save_tiny_model(tmp_path / "m", "qwen3", True))
    options = ["--quick", "--model", str(tmp_path / "m"), "--out", str(tmp_path / "o")]
    done = subprocess.run([sys.executable, "-c", RUN, *options], cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = _written(tmp_path / "o")
    assert (found["finished"], found["passed"], found["device"]) == (True, True, "cpu")
    verdicts = [check["passed"] for check in found["checks"] if check["bound"]]
    needs_gpu = [check for check in found["checks"] if check["note"] == gpu_check.ONLY_GPU]
    assert verdicts.count(True) == 10 and verdicts.count(None) == 5 and len(needs_gpu) == 6
    assert all(check["value"] is not None for check in found["checks"] if check not in needs_gpu)
