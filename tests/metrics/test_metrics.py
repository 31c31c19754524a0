"""Metrics over ranks, phases, sinks and the summary."""

from __future__ import annotations

import importlib.machinery
import json
import logging
import math
import re
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.config import LoggerConfig
from distill.distributed.host_memory import resident_bytes
from distill.errors import UserError, writing_run
from distill.metrics import phases as phases_module
from distill.metrics.phases import Phases
from distill.metrics.sinks import ConsoleSink, JsonlSink, Samples, open_recorder, read_metrics, tokens_of
from distill.metrics.step import Metrics, add_rollouts, finish_step, rates
from distill.metrics.summary import Row, console_line, ending, summary
from distill.types import Problem, Prompt, Rollout
from tests.helpers import run_ranks

PLAIN = LoggerConfig(wandb_enabled=False, tensorboard_enabled=False)


def two_ranks() -> tuple[dict[str, float], str]:
    """Return the reduced metrics of one rank: 3 rows of mean 1 on rank 0; 1 row of 5 and another name on rank 1."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    metrics = Metrics()
    metrics.add({"kl": (torch.tensor([3.0, 5.0][rank]), torch.tensor([3, 1][rank]))})
    metrics.add_totals({"tokens": [10.0, 32.0][rank]})
    metrics.add_max({"longest": [7.0, 4.0][rank]})
    metrics.add_same({"lr": 0.25})
    if rank == 1:
        metrics.add({"rare": (6.0, 4.0)})
    reduced = metrics.reduce(dist.group.WORLD)
    different = Metrics()
    different.add_same({"grad_norm": float(rank)})
    try:
        different.reduce(dist.group.WORLD)
        error = ""
    except RuntimeError as problem:
        error = str(problem)
    dist.destroy_process_group()
    return reduced, error


@pytest.mark.slow
def test_reduce_returns_the_mean_over_all_rows_not_the_mean_of_rank_means() -> None:
    first, second = run_ranks(2, two_ranks)
    # (3 + 5) / (3 + 1); the mean of the means would be 3. "rare" exists on one rank only.
    assert first[0] == {"kl": 2.0, "tokens": 42.0, "longest": 7.0, "lr": 0.25, "rare": 1.5}
    assert second[0] == first[0] and list(second[0]) == list(first[0])
    assert "grad_norm" in first[1] and "0.0" in first[1] and "1.0" in first[1] and second[1] == first[1]


def test_micro_batches_are_weighted_by_their_rows() -> None:
    metrics = Metrics()
    metrics.add({"kl": (2.0, 1)})
    metrics.add({"kl": (torch.tensor(1.0, requires_grad=True), 9)})
    assert metrics.reduce() == {"kl": 0.3}


def test_sums_of_tensors_are_float64() -> None:
    metrics = Metrics()
    for _ in range(1000):
        metrics.add({"kl": (torch.tensor(0.1, dtype=torch.float32), torch.tensor(1))})
    metrics.add({"kl": (torch.tensor(2.0**24), torch.tensor(1))})
    exact = (1000 * float(torch.tensor(0.1)) + 2.0**24) / 1001
    assert metrics.reduce()["kl"] == pytest.approx(exact, rel=1e-14)


def test_a_metric_name_has_one_kind() -> None:
    metrics = Metrics()
    metrics.add({"tokens": (1.0, 1.0)})
    with pytest.raises(AssertionError, match="mean"):
        metrics.add_totals({"tokens": 1.0})


def test_a_mean_with_count_zero_is_nan_and_a_maximum_with_nan_is_nan() -> None:
    metrics = Metrics()
    metrics.add({"kl": (0.0, 0.0)})
    metrics.add_max({"longest": math.nan})
    reduced = metrics.reduce()
    assert math.isnan(reduced["kl"]) and math.isnan(reduced["longest"])


def rollout(prompt_length: int, response_length: int, finish: Any) -> Rollout:
    prompt = Prompt(0, tuple(range(prompt_length)), Problem("?"))
    return Rollout(prompt, 0, (1,) * response_length, (-0.5,) * response_length, finish, 0)


def test_lengths_and_finish_reasons_of_rollouts_match_a_hand_count() -> None:
    metrics = Metrics()
    add_rollouts(metrics, [rollout(10, 4, "stop"), rollout(6, 8, "length")])
    add_rollouts(metrics, [rollout(5, 6, "stop")])
    add_rollouts(metrics, [])
    assert metrics.reduce() == {
        "mean_prompt_length": 7.0,
        "mean_gen_tokens_per_sample": 6.0,
        "mean_total_tokens_per_sample": 13.0,
        "truncation_rate": 1 / 3,
        "natural_termination_rate": 2 / 3,
        "repeated_token_share": 0.0,
        "repetition_rate": 0.0,
        "total_num_tokens": 39.0,
        "generated_tokens": 18.0,
        "max_gen_tokens_per_sample": 8.0,
    }


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(phases_module, "time", fake)
    return fake


def test_step_time_includes_time_between_phases(clock: Clock) -> None:
    phases = Phases()
    for seconds in (2.0, 3.0):
        with phases("generation"):
            clock.now += seconds
    clock.now += 1.0
    with phases("training"):
        clock.now += 4.0
    assert phases.stats() == {
        "timing/train/generation": (5.0, 1.0),
        "timing/train/policy_training": (4.0, 1.0),
        "timing/train/total_step_time": (10.0, 1.0),
    }


def test_a_phase_records_resident_memory_at_its_end() -> None:
    if resident_bytes() is None:
        pytest.skip("no /proc on this system")
    phases = Phases()
    untouched = torch.empty(64 * 2**18)  # 64 MiB of address space without memory
    with phases("before"):
        pass
    with phases("holding"):
        held = torch.ones(64 * 2**18)
    least, most = (phases.memory[name] for name in ("before", "holding"))
    assert 56 * 2**20 < most - least < 80 * 2**20
    with phases("before"):
        untouched.fill_(1)
    assert phases.memory["before"] > least + 100 * 2**20  # the larger of both measurements
    del untouched, held
    with phases("holding"):
        pass
    assert phases.memory["holding"] == most


class FakeAllocator:
    """Stand-in for torch's CUDA allocator: a number of allocated bytes and its peak since the last reset."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = self.peak = 0
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self, device: torch.device) -> None:
        self.peak = self.allocated

    def use(self, gib: int) -> None:
        """Allocate and free ``gib`` GiB."""
        self.peak = max(self.peak, self.allocated + gib * 2**30)


def test_a_phase_includes_the_memory_peaks_of_nested_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, device = FakeAllocator(monkeypatch), torch.device("cuda")
    outer, inner = Phases(device), Phases(device)
    with outer("checkpointing"):
        fake.use(3)
        with inner("judging"):
            fake.use(7)
        with inner("writing"):
            fake.use(1)
    with outer("training"):
        fake.use(2)
    assert {name: size / 2**30 for name, size in outer.memory.items()} == {"checkpointing": 7, "training": 2}
    assert {name: size / 2**30 for name, size in inner.memory.items()} == {"judging": 7, "writing": 1}
    with outer("training"):
        fake.use(5)
        with inner("judging"):
            fake.use(1)
    assert outer.memory["training"] / 2**30 == 5


def test_the_memory_pool_is_subtracted_only_while_the_engine_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, phases = FakeAllocator(monkeypatch), Phases(torch.device("cuda"))
    with phases("validation"):
        fake.use(60)
    with phases("validation", engine_asleep=True):
        fake.use(90)
    with phases("training"):
        fake.use(80)
    pool = 50 * 2**30
    expected = {"memory/validation_gib": 60.0, "memory/training_gib": 30.0, "memory/peak_gib": 60.0}
    assert phases.memory_gib(pool) == expected
    with phases("validation", engine_asleep=True):
        fake.use(120)
    assert phases.memory_gib(pool) == {**expected, "memory/validation_gib": 70.0, "memory/peak_gib": 70.0}
    assert phases.memory_gib(pool, omitted=("validation",)) == {"memory/training_gib": 30.0, "memory/peak_gib": 30.0}


def test_throughput_excludes_validation_and_checkpoints(clock: Clock) -> None:
    metrics, phases = Metrics(), Phases()
    metrics.add({"loss": (1.0, 2.0)})
    metrics.add_totals({"total_num_tokens": 800.0, "global_valid_toks": 400.0, "generated_tokens": 500.0})
    for name, seconds in (("generation", 5.0), ("training", 3.0), ("validation", 20.0), ("checkpointing", 7.0)):
        with phases(name):
            clock.now += seconds
    values = finish_step(metrics, phases, None)
    assert values["train/loss"] == 0.5
    assert values["timing/train/total_step_time"] == 35.0
    assert values["train/tokens_per_sec_per_gpu"] == 100.0  # 800 tokens in the 8 s of generation and training
    assert values["timing/train/valid_tokens_per_sec_per_gpu"] == 50.0
    assert values["timing/train/generation_tokens_per_sec"] == 100.0
    assert values["timing/train/policy_training_tokens_per_sec"] == pytest.approx(800 / 3)
    assert rates(values, world_size=4)["train/tokens_per_sec_per_gpu"] == 25.0


def test_metrics_jsonl_of_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in (1, 2, 3):
        sink.write(step, {"train/loss": step / 10})
    sink.close()
    with path.open("a") as file:
        file.write('{"step": 4, "train/lo')  # the run was killed while writing this line
    sink = JsonlSink(path, resumed_step=2)
    sink.write(3, {"train/loss": 9.0})
    assert [(row["step"], row["train/loss"]) for row in read_metrics(path)] == [(1, 0.1), (2, 0.2), (3, 9.0)]
    sink.close()


def test_a_new_run_in_an_old_directory_starts_an_empty_metrics_jsonl(tmp_path: Path) -> None:
    for _ in range(2):
        sink = JsonlSink(tmp_path / "metrics.jsonl")
        sink.write(1, {"train/loss": 1.0})
        sink.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_values_that_are_not_finite_are_null_in_json(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(1, {"a": math.nan, "b": -math.inf, "c": 1e-300})
    # Read before the file is closed: a killed run must lose nothing. The file must be strict JSON.
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row.pop("timestamp") > 1.6e9 and row == {"step": 1, "a": None, "b": None, "c": 1e-300}
    sink.close()


def test_a_broken_line_in_the_middle_is_an_error_with_its_line_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RuntimeError, match=r"metrics\.jsonl:2 "):
        read_metrics(path)


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_shows_a_resumed_run_as_one_curve(tmp_path: Path) -> None:
    config = replace(PLAIN, tensorboard_enabled=True)
    recorder = open_recorder(config, tmp_path, main=True, total_steps=3)
    for step in (1, 2, 3):
        recorder.record(step, {"train/loss": float(step), "train/bad": math.nan})
    recorder.close()
    recorder = open_recorder(config, tmp_path, main=True, total_steps=3, resumed_step=2)
    recorder.record(3, {"train/loss": 0.5})
    recorder.close()
    assert curve(tmp_path / "tensorboard", "learning/loss") == [(1, 1.0), (2, 2.0), (3, 0.5)]


def test_a_run_resumed_in_a_new_directory_has_the_complete_curve(tmp_path: Path) -> None:
    config = replace(PLAIN, tensorboard_enabled=True)
    history: list[Row] = [{"step": 1, "train/loss": 1.0, "train/bad": None}, {"step": 2, "train/loss": 2.0}]
    for folder in (tmp_path, tmp_path):  # in the second pass the directory contains the curve
        recorder = open_recorder(config, folder, main=True, total_steps=3, resumed_step=2, history=history)
        recorder.record(3, {"train/loss": 0.5})
        recorder.close()
        assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
        assert curve(tmp_path / "tensorboard", "learning/loss") == [(1, 1.0), (2, 2.0), (3, 0.5)]


def test_only_the_main_rank_writes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = replace(PLAIN, tensorboard_enabled=True)
    with caplog.at_level(logging.INFO):
        recorder = open_recorder(config, tmp_path, main=False, total_steps=1)
        recorder.record(1, {"train/loss": 1.0})
        recorder.close()
    assert list(tmp_path.iterdir()) == [] and caplog.messages == []


@pytest.mark.parametrize("main", [True, False])
def test_missing_wandb_is_a_user_error_on_every_rank(
    main: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as refused:
        open_recorder(replace(PLAIN, wandb_enabled=True), tmp_path, main=main, total_steps=1)
    assert refused.value.key == "logger.wandb_enabled" and refused.value.value is True


def fake_wandb(monkeypatch: pytest.MonkeyPatch, init: Callable[..., Any]) -> None:
    """Replace the package wandb by a module with the function ``init``."""
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.init = init  # type: ignore[attr-defined]
    wandb.Table = lambda columns, data: (columns, data)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)


@pytest.mark.parametrize("error", [RuntimeError("no API key"), ConnectionRefusedError(111, "Connection refused")])
def test_wandb_that_does_not_start_is_a_user_error_about_wandb(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**settings: Any) -> None:
        raise error

    fake_wandb(monkeypatch, init)
    with pytest.raises(UserError) as refused, writing_run(tmp_path):
        open_recorder(replace(PLAIN, wandb_enabled=True), tmp_path, main=True, total_steps=1)
    assert refused.value.key == "logger.wandb_enabled" and refused.value.value is True


def test_wandb_continues_the_same_run_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, Any]]] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            logged.append((-1, {}))

    def init(**settings: Any) -> Run:
        started.append(settings)
        return Run()

    fake_wandb(monkeypatch, init)
    config = replace(PLAIN, wandb_enabled=True, wandb=replace(PLAIN.wandb, project="p", mode="offline"))
    for step in (1, 2):
        recorder = open_recorder(config, tmp_path, main=True, total_steps=2, resumed_step=step - 1, recipe={"seed": 7})
        recorder.record(step, {"train/loss": 0.5})
        recorder.close()
    assert started[0] == started[1]
    assert started[0]["resume"] == "allow" and len(started[0]["id"]) >= 8
    assert (started[0]["project"], started[0]["mode"], started[0]["config"]) == ("p", "offline", {"seed": 7})
    assert logged == [(1, {"train/loss": 0.5}), (-1, {}), (2, {"train/loss": 0.5}), (-1, {})]
    recorder = open_recorder(config, tmp_path, main=True, total_steps=2)
    recorder.show(2, Samples("train", ["text"], [{"prompt_id": 7, "answer": "a"}, {"prompt_id": 8, "answer": "b"}]))
    assert logged[-1] == (2, {"train/samples": (["prompt_id", "answer"], [[7, "a"], [8, "b"]])})


STEP = {
    "train/loss": 0.41234,
    "train/forward_kl": 0.4,
    "train/reverse_kl": 0.45,
    "train/mean_gen_tokens_per_sample": 47.25,
    "train/truncation_rate": 0.875,
    "train/grad_norm": 1.25,
    "train/lr": 2e-5,
    "train/tokens_per_sec_per_gpu": 104.6,
    "timing/train/generation": 3.01,
    "timing/train/policy_training": 4.5,
    "timing/train/data_processing": 0.001,
    "timing/train/total_step_time": 8.25,
    "train/total_num_tokens": 1200.0,
    "memory/peak_gib": 4.4,
}


def test_console_line_of_a_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        recorder = open_recorder(PLAIN, tmp_path, main=True, total_steps=5)
        recorder.record(3, {**STEP, "train/context_distillation_trace_coverage": 0.0})
        recorder.close()
    (line,) = caplog.messages
    text = "step 3/5  loss 0.4123  grad 1.25  length 47  truncated 88%  145 tok/s  8.2 s  4.4 GiB  ETA 16 s"
    assert line == text, "no trace: the teacher's template has none"


def test_the_remaining_time_follows_from_the_time_between_steps(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    sink = ConsoleSink(10, clock=lambda: now)
    with caplog.at_level(logging.INFO):
        for step, now in ((3, 100.0), (4, 110.0), (5, 140.0), (10, 200.0)):  # noqa: B007
            sink.write(step, {"train/loss": 0.5, "timing/train/total_step_time": 60.0})
    found = [re.search(r"ETA (.*)", message) for message in caplog.messages]
    assert [match and match[1] for match in found] == ["7 min", "60 s", "2 min", None]


def test_a_console_line_has_at_most_120_columns_with_the_time_of_day() -> None:
    large = dict.fromkeys(STEP, 12345.678) | {"train/truncation_rate": 1.0, "memory/peak_gib": 139.9}
    large |= {"train/context_distillation_trace_coverage": 0.25, "train/total_num_tokens": 1e12}
    line = console_line(12345, 20000, large, left_s=1e6, shows_traces=True)
    assert len("12:34:56 ") + len(line) <= 120
    for part in ("step 12345/20000", "loss 12345.6780", "trace 25%", "12345.7 s", "139.9 GiB", "ETA 11 d 13 h"):
        assert part in line
    assert len("12:34:56 ") + len(console_line(900, 1000, STEP, 11520.0, shows_traces=True)) <= 120
    assert "truncated" in console_line(900, 1000, STEP, 11520.0, shows_traces=True)


def test_console_line_omits_metrics_that_were_not_measured() -> None:
    assert console_line(1, 2, {"train/loss": 0.5, "train/grad_norm": math.nan}) == "step 1/2  loss 0.5000"


def test_total_tokens_and_time_stamps_of_a_resumed_run_continue(tmp_path: Path) -> None:
    for first in (0, 2):
        tokens = tokens_of(read_metrics(tmp_path / "metrics.jsonl")[:first]) if first else 0.0
        recorder = open_recorder(PLAIN, tmp_path, main=True, total_steps=4, resumed_step=first, total_tokens=tokens)
        for step in (first + 1, first + 2, first + 3):
            recorder.record(step, {"train/total_num_tokens": 10.0 * step})
        recorder.record(first + 3, {"validation/accuracy": 0.5})
        recorder.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row.get("progress/total_tokens") for row in rows] == [10, 30, 60, 100, 150, None]
    stamps = [row["timestamp"] or 0.0 for row in rows]
    assert stamps == sorted(stamps) and abs(stamps[-1] - time.time()) < 3600


def test_the_ending_of_a_run_names_the_checkpoint_and_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "checkpoints/step_4"
    checkpoint.mkdir(parents=True)
    assert "2 min" in ending(100.0, None, False, enabled=False)
    assert "checkpointing.enabled=true" in ending(1.0, None, False, enabled=False)
    assert "starts at step 0" in ending(1.0, None, stopped=True), "stopped before the first checkpoint"
    assert "scripts.export_hf checkpoints/step_4 " in ending(1.0, checkpoint, stopped=False)
    (checkpoint / "hf").mkdir()
    finished, stopped = (ending(1.0, checkpoint, stopped) for stopped in (False, True))
    assert "('text-generation', 'checkpoints/step_4/hf')" in finished
    assert "same command" in stopped and "pipeline" not in stopped
    (checkpoint / "hf").rename(checkpoint / "peft")
    adapters = ending(1.0, checkpoint, stopped=False)
    assert "checkpoints/step_4/peft" in adapters and adapters.endswith(
        "scripts.export_hf checkpoints/step_4 OUT --merge"
    )
    assert "report" not in finished and "runs/a/report.html" in ending(
        1.0, None, False, page=tmp_path / "runs/a/report.html"
    )


def test_summary_shows_first_and_last_values_and_medians(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {**STEP, "step": step, "train/loss": loss, "timing/train/generation": seconds}
        for step, loss, seconds in ((1, 0.5, 9.0), (2, 0.4, 3.0), (3, 0.25, 2.0))
    ]
    other = [{"step": 1, "train/loss": None, "train/forward_kl": 0.125}]
    table = summary({"normal": (rows, tmp_path / "runs" / "a"), "context": (other, Path("/elsewhere"))})
    lines = {line[:26].strip(): line[26:].split("  ") for line in table.splitlines()}
    cells = {name.split(",")[0]: [cell.strip() for cell in found if cell.strip()] for name, found in lines.items()}
    assert cells[""] == ["normal", "context"]
    assert cells["steps"] == ["3", "1"]
    assert cells["loss"] == ["0.5000 -> 0.2500", "-"]
    assert cells["forward KL"] == ["0.4000 -> 0.4000", "0.1250 -> 0.1250"]
    assert cells["generation"] == ["3.00", "-"]
    assert cells["run directory"] == ["runs/a", "/elsewhere"]
    assert "checkpointing" not in table
