"""Methods of ``Run`` with stand-ins for its components."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill import run as run_module
from distill.metrics.phases import Phases
from distill.metrics.step import Metrics
from distill.run import Run
from distill.run_files import METRICS_FILE, REPORT_FILE


def test_the_validation_after_the_last_step_has_the_phases_of_the_loop() -> None:
    events: list[str] = []

    @contextlib.contextmanager
    def phase(name: str, engine_asleep: bool | None = None) -> Iterator[None]:
        events.append(f"{name} begins" + (" with the engine asleep" if engine_asleep else ""))
        yield
        events.append(f"{name} ends")

    def record(event: str) -> Any:
        return lambda *_: events.append(event)

    run: Any = SimpleNamespace(
        first_step=0,
        last_step=2,
        phase=phase,
        sync=SimpleNamespace(push_weights=record("push")),
        engine=SimpleNamespace(sleep=record("sleep")),
        validation=SimpleNamespace(due=lambda step: True, generate=record("generate"), report=record("report")),
        alarms=SimpleNamespace(take_save=lambda: False),
    )
    run.report_validation = partial(Run.report_validation, run)
    Run.validate_last(run)
    assert events == [
        *("sync begins", "push", "sync ends"),
        *("validation begins", "generate", "sleep", "validation ends"),
        *("validation begins with the engine asleep", "report", "validation ends"),
    ]


def test_a_page_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = SimpleNamespace(report=True)
    run: Any = SimpleNamespace(run_dir=tmp_path, config=SimpleNamespace(logger=logger))
    assert Run._write_page(run, "finished") is None, "the folder is not a run directory"
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "logger.report" in caplog.text
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "train/loss": 0.5}\n')
    assert Run._write_page(run, "finished") == tmp_path / REPORT_FILE
    logger.report = False
    assert Run._write_page(run, "finished") is None and len(caplog.records) == 1
    logger.report = True

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(run_module, "write_run_page", fail)
    assert Run._write_page(run, "finished") is None and len(caplog.records) == 2


@pytest.mark.parametrize("validates", [True, False])
def test_a_step_without_validation_has_no_memory_metric_of_a_validation(
    validates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases, recorded = Phases(), dict[str, float]()
    for name in ("validation", "training", "checkpointing"):
        with phases(name):
            pass
    monkeypatch.setattr(run_module, "step_numbers", lambda metrics, *_: metrics.reduce())
    run: Any = SimpleNamespace(
        _phases=phases,
        checkpoints=SimpleNamespace(slowest_s=None),
        stop=SimpleNamespace(record_duration=lambda *_: None),
        validation=SimpleNamespace(due=lambda step: validates and step == 2),
        engine=SimpleNamespace(residual_bytes=0, pool_bytes=0),
        world=SimpleNamespace(control=None, is_main=False, all_or_none=lambda _: contextlib.nullcontext()),
        packing=SimpleNamespace(reads=lambda rollout: 0),
        utilization=SimpleNamespace(metrics=lambda *_: {}),
        forecast=SimpleNamespace(metrics=dict),
        prompts=SimpleNamespace(steps_per_epoch=4),
        recorder=SimpleNamespace(record=lambda step, values: recorded.update(values)),
        alarms=SimpleNamespace(check=lambda step, values: {}),
        first_step=0,
    )
    Run._record(run, 3, Metrics(), [], [])
    assert ("memory/validation_gib" in recorded) is validates and "memory/training_gib" in recorded


def test_training_samples_are_compared_only_when_due_and_without_the_moments_of_adamw() -> None:
    events: list[str] = []

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        events.append(name)
        yield

    run: Any = SimpleNamespace(
        phase=phase,
        student=SimpleNamespace(offload=lambda: events.append("offload")),
        train_samples=SimpleNamespace(due=lambda step: step == 2, compared=lambda step, rollouts: [step, *rollouts]),
    )
    own, of_dataset = SimpleNamespace(off_policy=False), SimpleNamespace(off_policy=True)
    rollouts: Any = [of_dataset, own]
    assert Run._samples(run, 1, rollouts) == Run._samples(run, 2, []) == Run._samples(run, 2, rollouts[:1]) == []
    assert not events
    assert Run._samples(run, 2, rollouts) == [2, own] and events == ["offload", "samples"]
