"""The training loop, with stand-ins for the parts that it calls."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from distill import train
from distill.errors import CollectiveUserError, RunFailed, UserError
from distill.model.nonfinite import NonFiniteError, NonFiniteReport
from distill.rollout import gather
from distill.supervise.signals import Deadline
from distill.supervise.status import read_status
from distill.supervise.stop import StopCheck, StopRequest, StopRequested
from distill.types import TeacherRows
from scripts.launch import ROOT


def stand_in(record: Callable[[str], Any], teacher: Any = None) -> SimpleNamespace:
    """Every attribute that ``train`` reads from a run and its parts; the loop of two steps calls ``record``."""

    def part(**methods: str) -> SimpleNamespace:
        return SimpleNamespace(
            **{name: (lambda *_, event=event, **__: record(event)) for name, event in methods.items()}
        )

    @contextlib.contextmanager
    def on_device() -> Iterator[None]:
        record("teacher onload")
        yield
        record("teacher offload")

    return SimpleNamespace(
        first_step=0,
        last_step=2,
        begin_step=lambda step: record(f"step {step}"),
        phase=lambda name, batches=(), engine_asleep=None: contextlib.nullcontext(),
        student=SimpleNamespace(
            to_device=lambda batches: record("to device") or batches,
            **vars(part(train="train", end_step="student end")),
        ),
        teacher=teacher
        or SimpleNamespace(
            on_device=on_device,
            targets_of=lambda micro_batches: (record("targets") for _ in micro_batches),
            after_step=lambda student, step: record(f"follow {step}"),
        ),
        generation=SimpleNamespace(
            generate=lambda step, metrics: (
                record("generate") or SimpleNamespace(own="own", batch="batch", prompts="prompts")
            )
        ),
        engine=part(sleep="sleep"),
        sync=part(push_weights="sync"),
        validation=part(generate="generate held-out"),
        report_validation=lambda held_out: record("report"),
        checkpoints=part(finalize_pending="finalize"),
        responses=part(select="select"),
        end_step=lambda step, metrics, rollouts: record("end step"),
        validate_last=lambda: record("validate last"),
        **dict.fromkeys(("world", "layout", "packing", "seed")),
    )


def run_loop(run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ``train`` on two optimizer batches of two and one micro-batches per step."""
    monkeypatch.setattr(train, "plan", lambda *_: [("a", "b"), ("c",)])
    monkeypatch.setattr(gather, "gather_rollouts", lambda *_: [])
    train.train(run)  # type: ignore[arg-type]


def attributes(part: Any) -> int:
    """Number of attributes of a stand-in, counted recursively."""
    assert not isinstance(part, MagicMock) and not hasattr(type(part), "__getattr__")
    return sum(1 + attributes(value) for value in vars(part).values()) if isinstance(part, SimpleNamespace) else 0


def test_the_loop_needs_few_attributes_of_a_run() -> None:
    run = stand_in(lambda event: None)
    assert len(vars(run)) <= 20 and attributes(run) <= 35


def test_a_step_calls_its_parts_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    run_loop(stand_in(events.append), monkeypatch)
    step = ["sync", "generate held-out", "generate", "sleep", "report"]
    step += ["finalize", "select", "to device", "teacher onload", *["targets"] * 3, "teacher offload"]
    step += ["train", "train", "student end"]
    first, second = (["follow 1", "end step"], ["follow 2", "end step"])
    assert events == ["step 0", *step, *first, "step 1", *step, *second, "validate last"]


def test_targets_are_freed_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row and no head of the teacher is in memory during a checkpoint or the next generation."""
    created: list[weakref.ref[Any]] = []
    seen: list[tuple[str, int]] = []

    def record(event: str) -> list[Any]:
        seen.append((event, sum(tensor() is not None for tensor in created)))
        return []

    def new_tensor(*shape: int) -> torch.Tensor:
        tensor = torch.zeros(*shape)
        created.append(weakref.ref(tensor))
        return tensor

    class Teacher:
        head: torch.Tensor | None = None

        @contextlib.contextmanager
        def on_device(self) -> Iterator[None]:
            record("teacher onload")
            yield
            record("teacher offload")

        def targets_of(self, micro_batches: list[object]) -> Iterator[TeacherRows]:
            for _ in micro_batches:
                if self.head is None:
                    self.head = new_tensor(4, 2)
                yield TeacherRows(new_tensor(3, 2), self.head)

        def after_step(self, student: object, step: int) -> None:
            self.head = None

    run_loop(stand_in(record, Teacher()), monkeypatch)
    # Three rows and one head: the first batch has two rows, the second one; the head is freed after the step.
    alive = {event: [0] for event in ("generate", "finalize", "teacher onload", "end step", "validate last")}
    alive |= {"teacher offload": [4], "train": [4, 2], "student end": [1]}
    for event, counts in alive.items():
        found = [count for name, count in seen if name == event]
        assert found == counts * (1 if event == "validate last" else 2), event


def test_rollouts_are_freed_before_the_next_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rollouts(list[Any]):
        pass

    created: list[weakref.ref[Any]] = []
    alive: dict[str, list[int]] = {"sync": [], "train": []}

    def record(event: str) -> list[Any]:
        alive.get(event, []).append(sum(rollouts() is not None for rollouts in created))
        return []

    def gathered(*_: Any) -> Rollouts:
        rollouts = Rollouts()
        created.append(weakref.ref(rollouts))
        return rollouts

    monkeypatch.setattr(train, "plan", lambda *_: [("a",)])
    monkeypatch.setattr(gather, "gather_rollouts", gathered)
    train.train(stand_in(record))  # type: ignore[arg-type]
    assert alive == {"sync": [0, 0], "train": [1, 1]}


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
def test_a_dry_run_trains_nothing_in_both_spellings(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "start_process", lambda: None)
    monkeypatch.setattr(train, "run_program", MagicMock(side_effect=AssertionError))
    monkeypatch.setattr("distill.dry_run.dry_run", lambda arguments, words: print("# forecast"))
    assert train.main(["--config", "recipes/distillation_math.yaml", flag]) == 0
    printed = capsys.readouterr().out
    assert "max_num_steps" in printed and "# forecast" in printed


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run", "--help", "-h"])
def test_a_refused_dry_run_or_help_only_prints_the_error(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "run_program", MagicMock(side_effect=AssertionError))
    monkeypatch.setenv("DISTILL_STATUS_FILE", str(tmp_path / "status.json"))
    monkeypatch.setenv("RANK", "0")
    assert train.main(["=5", flag]) == 2
    assert capsys.readouterr().err.startswith("error: =5 ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "state", "exit_code"),
    [(UserError("a=1", "set 2"), "refused", 2), (KeyError("bug"), "failed", 1)],
    ids=["refused", "failed"],
)
def test_a_recipe_that_cannot_be_read_leaves_a_status(
    error: Exception, state: str, exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILL_STATUS_FILE", str(tmp_path / "status.json"))
    monkeypatch.setattr(train, "parse_args", MagicMock(side_effect=error))
    with pytest.raises(KeyError) if state == "failed" else contextlib.nullcontext():
        assert train.main([]) == exit_code
    status = read_status(tmp_path / "status.json")
    assert (status["state"], status["exit_code"]) == (state, exit_code)


SIGNAL_WHILE_READING = """
import os, signal, time
from distill import train

def parse_args(argv):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

train.parse_args = parse_args
train.exit_process(train.main([]))
"""


@pytest.mark.slow
def test_a_signal_while_the_recipe_is_read_stops_the_run_with_code_0(tmp_path: Path) -> None:
    environment = {**os.environ, "DISTILL_STATUS_FILE": str(tmp_path / "status.json")}
    command = [sys.executable, "-c", SIGNAL_WHILE_READING]
    stopped = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert stopped.returncode == 0, stopped.stderr
    status = read_status(tmp_path / "status.json")
    assert status["state"] == "stopped" and str(status["reason"]).startswith("SIGTERM ")


def train_with(error: Exception, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train a run whose loop raises ``error``."""
    monkeypatch.setattr(train, "parse_args", MagicMock())
    monkeypatch.setattr("distill.build.build_run", lambda arguments, world: run)
    monkeypatch.setattr(train, "train", MagicMock(side_effect=error))
    train.train_from([], MagicMock())


@pytest.mark.parametrize("error", [CollectiveUserError("full disk", "free space"), RunFailed("nan")])
def test_a_checkpoint_in_flight_is_finalized_before_all_ranks_exit(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run = MagicMock()
    with pytest.raises(type(error)):
        train_with(error, run, monkeypatch)
    run.checkpoints.finalize_pending.assert_called_once_with(block=True)
    run.finish.assert_not_called()


def test_a_stop_request_saves_and_finishes_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run, stop = MagicMock(), StopRequested(3, "SIGTERM")
    train_with(stop, run, monkeypatch)
    run.save_and_stop.assert_called_once_with(stop)
    run.finish.assert_called_once_with()


def test_a_nan_is_reported_and_fails_the_run_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    run, error = MagicMock(), NonFiniteError(NonFiniteReport(float("nan"), [], [], []))
    run.report_non_finite.side_effect = RunFailed("nan")
    with pytest.raises(RunFailed):
        train_with(error, run, monkeypatch)
    run.report_non_finite.assert_called_once_with(error)
    run.checkpoints.finalize_pending.assert_called_once_with(block=True)


@pytest.mark.parametrize(
    ("own", "other", "reason"),
    [
        (0, StopRequest(), None),
        (15, StopRequest(), "SIGTERM"),
        (0, StopRequest(signal=10), "SIGUSR1"),
        (15, StopRequest(signal=10), "SIGTERM"),
        (0, StopRequest(out_of_time=True), "limit=1"),
        (10, StopRequest(out_of_time=True), "SIGUSR1"),
    ],
)
def test_all_ranks_stop_for_the_same_reason(own: int, other: StopRequest, reason: str | None) -> None:
    stop = StopCheck(lambda: own, lambda request: [request, other], Deadline(None, 0.0), "limit=1")
    assert stop.has_signal() is bool(own)
    with pytest.raises(StopRequested) if reason else contextlib.nullcontext() as caught:
        stop.raise_if_requested(4)
    assert caught is None or (caught.value.step, caught.value.reason) == (4, reason)


def test_the_time_limit_counts_only_if_it_is_checked() -> None:
    stop = StopCheck(lambda: 0, lambda request: [request], Deadline(10.0, 0.0, clock=lambda: 8.0), "limit=1")
    stop.raise_if_requested(1)
    stop.record_duration(step_s=2.0, save_s=1.0)
    stop.raise_if_requested(2, check_time=False)
    with pytest.raises(StopRequested, match="limit=1"):
        stop.raise_if_requested(2)
