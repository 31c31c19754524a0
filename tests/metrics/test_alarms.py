"""The state machine of alarms: thresholds, consecutive steps, start and end, replay of the history."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace

import pytest

from distill.config import AlarmConfig, DistillationConfig, PartialRolloutsConfig
from distill.metrics.alarms import Alarms, Event, Update

SHARE, CUT, LENGTH = "train/repeated_token_share", "train/truncation_rate", "train/mean_gen_tokens_per_sample"


def default() -> Alarms:
    return Alarms.of(DistillationConfig())


def run(alarms: Alarms, metric: str, values: Iterable[float], first: int = 1) -> list[Update]:
    return [alarms.update(step, {metric: value}) for step, value in enumerate(values, first)]


def events(updates: Iterable[Update]) -> list[tuple[str, str, int]]:
    return [(event.alarm, event.event, event.step) for update in updates for event in update.events]


BASE = [0.1, 0.2, 0.3, 0.4, 0.5]
"""Values of steps 1 to 5; their mean, the baseline, is 0.3."""


@pytest.mark.parametrize(
    ("metric", "name", "threshold", "rises"),
    [
        (SHARE, "repetition", 0.4, True),
        (CUT, "truncation", 0.5, True),
        (LENGTH, "length", 0.6, True),
        ("train/student_entropy", "entropy", 0.15, False),
        ("train/topk_overlap", "topk_overlap", 0.2, False),
    ],
)
def test_a_default_alarm_starts_at_the_third_step_beyond_its_threshold(metric, name, threshold, rises) -> None:
    beyond, within = (threshold + 0.01, threshold - 0.01) if rises else (threshold - 0.01, threshold + 0.01)
    found = run(default(), metric, [*BASE, beyond, beyond, within, beyond, beyond, beyond, beyond, within])
    assert events(found) == [(name, "start", 11), (name, "end", 13)]
    (start,), (end,) = found[10].events, found[12].events
    assert (start.action, start.since, end.since) == ("warn", 9, 9)
    assert start.limit == pytest.approx(threshold) and start.baseline == pytest.approx(0.3)
    assert all(text in start.message for text in (metric, f"{beyond:.4g}", "0.3", "steps 1 to 5"))
    states = [update.metrics.get(f"alarm/{name}") for update in found]
    assert states == [None] * 10 + [1.0, 1.0, 0.0], "an alarm has a metric from its first start on"


@pytest.mark.parametrize("metric", [LENGTH, SHARE, CUT, "train/grad_norm"])
def test_falling_values_are_no_alarm(metric) -> None:
    assert not events(run(default(), metric, [*BASE, *[0.001] * 20]))


def test_rising_entropy_and_overlap_are_no_alarm() -> None:
    for metric in ("train/student_entropy", "train/topk_overlap"):
        assert not events(run(default(), metric, [*BASE, *[9.0] * 20]))


def test_the_gradient_norm_is_compared_with_ten_times_the_median_of_earlier_steps() -> None:
    """Median of 1, 2, 3, 4, 5: 3. Then 30 is not above 30; the median of 6 values is 3.5, of 7 values 4, of 8: 4.5."""
    found = run(default(), "train/grad_norm", [1, 2, 3, 4, 5, 30, 36, 41, 46])
    assert events(found) == [("grad_norm", "start", 9)]
    assert found[8].events[0].limit == pytest.approx(45.0)
    for median in (0.0, 0.0009):
        assert not events(run(default(), "train/grad_norm", [median] * 6 + [1.0] * 5)), "rounding is no baseline"
    assert events(run(default(), "train/grad_norm", [0.0011] * 6 + [1.0] * 5)) == [("grad_norm", "start", 9)]
    control = Alarms.of(DistillationConfig(control=True))
    assert "train/grad_norm" not in control.metrics and "train/grad_norm" in default().metrics


@pytest.mark.parametrize(("change", "starts"), [(-0.07, True), (-0.05, False), (0.5, False)])
def test_the_accuracy_is_compared_with_two_standard_errors_of_its_change(change, starts) -> None:
    values = {"validation/accuracy": 0.4, "validation/accuracy_change": change}
    measured = {**values, "validation/accuracy_change_stderr": 0.03, "validation/accuracy_change_num_problems": 10.0}
    alarms = default()
    assert not alarms.update(20, measured).events, "one of about 40 validations is below by chance"
    update = alarms.update(40, measured)
    assert [(event.alarm, event.action) for event in update.events] == [("accuracy", "save")] * starts


@pytest.mark.parametrize(
    ("stderr", "problems"), [(None, 10.0), (0.0, 10.0), (1e-17, 10.0), (math.nan, 10.0), (0.01, 9.0), (0.01, None)]
)
def test_the_accuracy_alarm_needs_ten_problems_and_a_standard_error(stderr, problems) -> None:
    values = {"accuracy_change": -0.5, "accuracy_change_stderr": stderr, "accuracy_change_num_problems": problems}
    alarms = default()
    for step in (20, 40, 60):
        assert not alarms.update(step, {f"validation/{name}": value for name, value in values.items()}).events


def test_repetition_and_truncation_together_are_one_warning() -> None:
    def both(alarms: Alarms, shares: list[float], cuts: list[float]) -> list[Update]:
        pairs = enumerate(zip(shares, cuts, strict=True), 1)
        return [alarms.update(step, {SHARE: share, CUT: cut}) for step, (share, cut) in pairs]

    def logged(updates: Iterable[Update]) -> list[tuple[str, str, int]]:
        return [(e.alarm, e.event, e.step) for update in updates for e in update.events if e.is_logged]

    at_once = both(default(), [*[0.0] * 5, *[0.5] * 3, 0.0], [*[0.0] * 5, *[0.5] * 4])
    assert logged(at_once) == [("collapse", "start", 8), ("repetition", "end", 9), ("collapse", "end", 9)]
    assert events(at_once)[:3] == [("repetition", "start", 8), ("truncation", "start", 8), ("collapse", "start", 8)]
    collapse = at_once[7].events[-1]
    assert collapse.since == 6 and SHARE in collapse.message and CUT in collapse.message
    assert at_once[7].metrics["alarm/collapse"] == 1.0 and at_once[8].metrics["alarm/collapse"] == 0.0
    later = both(default(), [*[0.0] * 5, *[0.5] * 4, 0.6], [*[0.0] * 7, *[0.7] * 3])
    assert f"{SHARE} is 0.6" in later[9].events[-1].message and f"{CUT} is 0.7" in later[9].events[-1].message
    assert logged(later) == [("repetition", "start", 8), ("collapse", "start", 10)]


def alarm(metric: str, op: str, value: float, steps: int = 1, action: str = "warn") -> AlarmConfig:
    return AlarmConfig(metric, op, value, steps, action)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("op", "starts"), [(">", [False, False, True]), (">=", [False, True, True]), ("<", [True, False, False]),
                       ("<=", [True, True, False])]
)  # fmt: skip
def test_an_alarm_compares_the_metric_with_its_value(op, starts) -> None:
    for value, start in zip((1.0, 2.0, 3.0), starts, strict=True):
        alarms = Alarms.of(DistillationConfig(alarms=(alarm("train/loss", op, 2.0, action="stop"),)))
        found = alarms.update(1, {"train/loss": value}).events
        assert [(event.alarm, event.action) for event in found] == [(f"train/loss{op}2.0,stop", "stop")] * start


def test_values_that_are_missing_or_not_finite_change_no_state() -> None:
    alarms = Alarms.of(DistillationConfig(alarms=(alarm("train/loss", ">", 2.0, steps=2),)))
    found = [alarms.update(step, {"train/loss": value}) for step, value in enumerate([3.0, math.nan, math.inf, 3.0], 1)]
    name = "train/loss>2.0,steps=2,warn"
    assert events(found) == [(name, "start", 4)]
    assert not alarms.update(5, {}).events and not alarms.update(6, {"train/loss": None}).events
    assert events([alarms.update(7, {"train/loss": 1.0})]) == [(name, "end", 7)]


def test_a_repeated_validation_counts_once() -> None:
    alarms = Alarms.of(DistillationConfig(alarms=(alarm("validation/accuracy", "<", 0.5, steps=2),)))
    steps = [5, 5, 10]
    assert events(alarms.update(s, {"validation/accuracy": 0.1}) for s in steps) == [
        ("validation/accuracy<0.5,steps=2,warn", "start", 10)
    ]


def test_an_alarm_can_depend_on_a_default_alarm() -> None:
    alarms = Alarms.of(DistillationConfig(alarms=(alarm("alarm/collapse", ">", 0.5, action="stop"),)))
    found = [alarms.update(step, {SHARE: v, CUT: v}) for step, v in enumerate([*[0.0] * 5, *[0.9] * 3], 1)]
    assert events(found)[-1] == ("alarm/collapse>0.5,stop", "start", 8)


def test_without_default_alarms_and_alarms_nothing_is_evaluated() -> None:
    alarms = Alarms.of(DistillationConfig(default_alarms=False))
    assert alarms.metrics == [] and alarms.update(1, {SHARE: 1.0}) == Update()


def test_the_baseline_restarts_where_the_maximum_length_of_responses_changes() -> None:
    schedule = DistillationConfig(max_new_tokens_schedule=((10, 64),))
    lengths = [*[10.0] * 9, *[30.0] * 5, *[50.0] * 3, *[70.0] * 3]
    found = run(Alarms.of(schedule), LENGTH, lengths)
    assert events(found) == [("length", "start", 20)]
    assert found[19].events[0].baseline == 30.0 and "steps 10 to 14" in found[19].events[0].message
    assert events(run(default(), LENGTH, lengths)) == [("length", "start", 12)]


def test_the_baseline_restarts_when_the_lengths_with_partial_rollouts_are_representative() -> None:
    """The first three steps train on short responses, and a new limit applies after three more steps."""
    partial = DistillationConfig(partial_rollouts=PartialRolloutsConfig(True, max_age=2))
    lengths = [*[10.0] * 3, *[30.0] * 5, *[50.0] * 3, *[70.0] * 3]
    found = run(Alarms.of(partial), LENGTH, lengths)
    assert events(found) == [("length", "start", 14)] and found[13].events[0].baseline == 30.0
    assert events(run(default(), LENGTH, lengths)) == [("length", "start", 11)], "twice the mean 18 of steps 1 to 5"
    schedule = replace(partial, max_new_tokens_schedule=((12, 64),))
    assert not events(run(Alarms.of(schedule), LENGTH, [*lengths[:11], *[30.0] * 3, *[70.0] * 9]))


@pytest.mark.parametrize("metric", [SHARE, "train/student_entropy", "train/topk_overlap"])
def test_the_first_baseline_is_kept_where_the_metric_does_not_depend_on_the_maximum_length(metric) -> None:
    schedule = DistillationConfig(max_new_tokens_schedule=((10, 64), (20, 128)))
    first, later = (0.1, 0.9) if metric == SHARE else (0.9, 0.1)
    found = run(Alarms.of(schedule), metric, [*[first] * 11, *[later] * 3])
    assert [(event, step) for _, event, step in events(found)] == [("start", 14)]
    assert found[13].events[0].baseline == pytest.approx(first)


def test_a_history_without_the_first_steps_is_reported_once() -> None:
    found = [default_at.update(step, {SHARE: 0.9, CUT: 0.9}) for default_at in [default()] for step in range(7, 14)]
    assert not events(found)
    assert [len(update.notices) for update in found] == [1] + [0] * 6
    assert all(name in found[0].notices[0] for name in ("repetition", "truncation", "steps 1 to 5"))
    assert not any(update.notices for update in run(default(), SHARE, [0.1] * 20))


def test_a_replay_of_the_rows_of_metrics_jsonl_gives_the_same_state() -> None:
    config = DistillationConfig(alarms=(alarm("train/loss", ">", 0.6, steps=2),))
    rows = [
        {"step": i, SHARE: 0.01 * i * (i > 5), CUT: 0.1 + (i > 20), "train/loss": (i * 7919 % 13) / 13, LENGTH: 5.0 + i}
        for i in range(1, 40)
    ]
    rows[24][SHARE] = math.nan
    complete = Alarms.of(config)
    expected = [(complete.update(int(row["step"]), row)) for row in rows]
    for cut in (3, 7, 12, 22, 26):
        resumed = Alarms.of(config)
        for row, update in zip(rows[:cut], expected, strict=False):
            stored = {n: v if math.isfinite(v) else None for n, v in {**row, **update.metrics}.items()}
            resumed.update(int(row["step"]), json.loads(json.dumps(stored)))
        assert [resumed.update(int(row["step"]), row) for row in rows[cut:]] == expected[cut:], cut
    assert len([event for update in expected for event in update.events]) > 5
    assert all(isinstance(event, Event) for update in expected for event in update.events)
