"""Alarms: conditions on metrics, evaluated on one rank without side effects.

``Alarms.update`` receives the metrics of each step and each validation. Its results depend only on these values and
their order. So the state after a resume is obtained by an update with each row of the metrics before the resume.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from distill.config import AlarmConfig, DistillationConfig
from distill.config.alarm_rules import alarm_name
from distill.config.metric_names import is_of_validation

BASELINE_STEPS = 5
"""Number of steps whose mean is the baseline of a default alarm."""
DEFAULT_STEPS = 3
"""Number of consecutive steps for which the condition of a default alarm must hold."""
MEDIAN_STEPS = 100
"""Maximum number of earlier steps whose median is compared with the gradient norm."""
LEAST_MEDIAN = 1e-3
"""Smallest median gradient norm that is a baseline: below it, rounding dominates, as in a control experiment."""
ACCURACY_VALIDATIONS = 2
"""Number of consecutive validations for which the condition of the default alarm ``accuracy`` must hold."""
_ROUNDING = 1e-9
"""Standard errors below it are 0, except for rounding."""
LEAST_PROBLEMS = 10
"""Smallest number of problems with which the standard error of a change of the accuracy is used."""
PREFIX = "alarm/"
"""Prefix of the metrics of alarms: 1 while an alarm is active, otherwise 0."""
COLLAPSE, REPETITION, TRUNCATION, GRAD_NORM = "collapse", "repetition", "truncation", "grad_norm"
Action = Literal["warn", "save", "stop"]
Op = Literal[">", ">=", "<", "<="]
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_DIRECTION = {">": "above", ">=": "at or above", "<": "below", "<=": "at or below"}
Values = Mapping[str, float | None]


@dataclass(frozen=True)
class Limit:
    """Threshold of a metric at one step."""

    value: float
    text: str
    """How the threshold is derived; empty if the user set it."""
    baseline: float | None = None


class Bound(Protocol):
    """Source of the threshold of a rule."""

    def limit(self, series: Series, step: int, values: Values) -> Limit | None:
        """Return the threshold at ``step``, from earlier values of the metric and other metrics of this step.

        None if the threshold is not known.
        """


@dataclass
class Series:
    """Earlier values of a rule's metric that thresholds are derived from."""

    baselines: dict[int, list[float]] = field(default_factory=dict)
    """Maps the first step of a baseline to the metric's values in the ``BASELINE_STEPS`` steps from there."""
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=MEDIAN_STEPS))
    start: int = 1
    """First step of the current baseline."""

    def add(self, step: int, value: float) -> None:
        """Add the value of ``step``."""
        self.recent.append(value)
        if step < self.start + BASELINE_STEPS:
            self.baselines.setdefault(self.start, []).append(value)


@dataclass(frozen=True)
class Fixed:
    """A threshold that the user set."""

    value: float

    def limit(self, series: Series, step: int, values: Values) -> Limit:
        """Return the threshold."""
        return Limit(self.value, "")


@dataclass(frozen=True)
class FromBaseline:
    """Threshold relative to the baseline: the mean of the first steps, times ``factor``, plus ``offset``."""

    factor: float = 1.0
    offset: float = 0.0
    restarts: bool = False
    """Whether a new baseline begins where the maximum length of responses changes, because the metric depends on it."""

    def limit(self, series: Series, step: int, values: Values) -> Limit | None:
        """Return the threshold; None in the steps of the baseline, and if none of them has a value."""
        first = series.baselines.get(series.start)
        if not first or step < series.start + BASELINE_STEPS:
            return None
        mean = math.fsum(first) / len(first)
        change = f"times {self.factor:g}" if self.factor != 1 else f"{self.offset:+g}"
        steps = f"steps {series.start} to {series.start + BASELINE_STEPS - 1}"
        return Limit(mean * self.factor + self.offset, f"the mean {mean:.4g} of {steps}, {change}", mean)


@dataclass(frozen=True)
class FromMedian:
    """Threshold relative to the median of up to ``MEDIAN_STEPS`` earlier steps, at least ``BASELINE_STEPS``."""

    factor: float

    def limit(self, series: Series, step: int, values: Values) -> Limit | None:
        """Return the threshold; None with too few earlier steps, and if the median is below ``LEAST_MEDIAN``."""
        if len(series.recent) < BASELINE_STEPS or (median := statistics.median(series.recent)) < LEAST_MEDIAN:
            return None
        text = f"{self.factor:g} times {median:.4g}, the median of the {len(series.recent)} steps before"
        return Limit(self.factor * median, text, median)


@dataclass(frozen=True)
class FromError:
    """Threshold relative to the standard error of the metric: ``factor`` times the metric ``NAME_stderr``.

    The metric ``NAME_num_problems`` is the number of problems from which the standard error is computed.
    """

    metric: str
    factor: float

    def limit(self, series: Series, step: int, values: Values) -> Limit | None:
        """Return the threshold; None if the standard error is not reliable.

        It is 0 if all problems changed equally, which does not show how much other problems vary.
        """
        error, problems = (values.get(f"{self.metric}_{name}") for name in ("stderr", "num_problems"))
        if error is None or not math.isfinite(error) or error < _ROUNDING or (problems or 0) < LEAST_PROBLEMS:
            return None
        return Limit(self.factor * error, f"{self.factor:g} times its standard error {error:.4g}", 0.0)


@dataclass(frozen=True)
class Rule:
    """Condition of an alarm: ``metric`` compared with a threshold, for ``steps`` consecutive values of the metric."""

    name: str
    metric: str
    op: Op
    bound: Bound
    steps: int
    action: Action
    advice: str = ""
    """What the user should do, for the warning."""


def default_rules() -> list[Rule]:
    """Return the default alarms. Shorter responses are never an alarm."""

    def step_rule(name: str, metric: str, op: Op, bound: Bound) -> Rule:
        advice = "read the responses in train_samples of the run directory"
        return Rule(name, f"train/{metric}", op, bound, DEFAULT_STEPS, "warn", advice)

    return [
        step_rule(REPETITION, "repeated_token_share", ">", FromBaseline(offset=0.10)),
        step_rule(TRUNCATION, "truncation_rate", ">", FromBaseline(offset=0.20, restarts=True)),
        step_rule("length", "mean_gen_tokens_per_sample", ">", FromBaseline(factor=2.0, restarts=True)),
        step_rule("entropy", "student_entropy", "<", FromBaseline(factor=0.5)),
        step_rule("topk_overlap", "topk_overlap", "<", FromBaseline(offset=-0.10)),
        step_rule(GRAD_NORM, "grad_norm", ">", FromMedian(10.0)),
        Rule(
            "accuracy",
            "validation/accuracy_change",
            "<",
            FromError("validation/accuracy_change", -2.0),
            steps=ACCURACY_VALIDATIONS,
            action="save",
            advice="compare the responses in the folder validation of the run directory",
        ),
    ]


def user_rules(alarms: Sequence[AlarmConfig]) -> list[Rule]:
    """Return the alarms that the recipe sets."""
    return [Rule(alarm_name(a), a.metric, a.op, Fixed(a.value), a.steps, a.action) for a in alarms]


@dataclass(frozen=True)
class Event:
    """Start or end of an alarm."""

    step: int
    alarm: str
    event: Literal["start", "end"]
    action: Action
    metric: str
    value: float
    limit: float
    baseline: float | None
    since: int
    """First step of the consecutive steps for which the condition holds."""
    message: str
    is_logged: bool = True
    """Whether to log the message; false if the message of another alarm contains it."""


@dataclass
class Update:
    """Result of one update: the metrics of alarms, the alarms that start or end, and texts to log once."""

    metrics: dict[str, float] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def started(self) -> list[Event]:
        """Return the alarms that start."""
        return [event for event in self.events if event.event == "start"]


@dataclass
class _State:
    """State of one rule."""

    series: Series = field(default_factory=Series)
    last_step: int = -1
    count: int = 0
    """Number of consecutive values up to now for which the condition holds."""
    since: int = 0
    is_active: bool = False
    was_active: bool = False
    has_no_baseline: bool = False


def _limits_change(config: DistillationConfig) -> list[int]:
    """Return the steps from which the lengths of responses may be other ones without a fault of the student.

    With partial rollouts, the first steps train on short responses, and a new maximum length applies to responses that
    are started later: the lengths are representative after max_age more steps.
    """
    changes, partial = [step for step, _ in config.max_new_tokens_schedule], config.partial_rollouts
    later = [step + partial.max_age + 1 for step in (1, *changes)] if partial.enabled else []
    return sorted({*changes, *later})


class Alarms:
    """State machine of all alarms of a run; needs no other rank.

    ``limits_change``: steps from which the maximum length of responses is another one. Baselines are means of steps 1
    to 5; baselines of metrics that depend on the maximum length restart at these steps.
    """

    def __init__(self, rules: Sequence[Rule], limits_change: Sequence[int] = ()) -> None:
        self._rules = [(rule, _State()) for rule in rules]
        self._starts = sorted({1, *limits_change})
        self._collapse = _State()
        self._noted_missing_baseline = False

    @classmethod
    def of(cls, config: DistillationConfig) -> Alarms:
        """Return the alarms of a recipe, before the first step."""
        defaults = default_rules() if config.default_alarms else []
        if config.control:  # its gradients are rounding errors, whose size may change by any factor
            defaults = [rule for rule in defaults if rule.name != GRAD_NORM]
        return cls([*defaults, *user_rules(config.alarms)], _limits_change(config))

    @property
    def metrics(self) -> list[str]:
        """Return the metrics of all rules."""
        return [rule.metric for rule, _ in self._rules]

    @property
    def active(self) -> list[Rule]:
        """Return the rules whose alarms are active."""
        return [rule for rule, state in self._rules if state.is_active]

    def update(self, step: int, values: Values) -> Update:
        """Evaluate the alarms on the metrics of one step or one validation.

        A metric without a finite value changes no state, nor does a second value of the same step.
        """
        update, known, own = Update(), dict(values), dict[str, float]()
        of_validation = any(map(is_of_validation, values))
        for rule, state in self._rules:
            value = known.get(rule.metric)
            if value is not None and math.isfinite(value) and step > state.last_step:
                self._evaluate(rule, state, step, value, known, update)
            if is_of_validation(rule.metric) == of_validation:
                own[rule.name] = float(state.is_active)
                if rule.name == TRUNCATION:  # the last of the two rules
                    self._update_collapse(step, known, update)
                    own[COLLAPSE] = float(self._collapse.is_active)
                known |= {PREFIX + name: value for name, value in own.items()}
        update.notices = self._note_missing_baseline(step)
        ever_active = {rule.name for rule, state in self._rules if state.was_active}
        ever_active |= {COLLAPSE} if self._collapse.was_active else set()
        update.metrics = {PREFIX + name: value for name, value in own.items() if name in ever_active}
        return update

    def _evaluate(self, rule: Rule, state: _State, step: int, value: float, values: Values, update: Update) -> None:
        state.last_step = step
        state.series.start = self._baseline_start(rule, step)
        limit = rule.bound.limit(state.series, step, values)
        state.series.add(step, value)
        if limit is None:
            is_late = step >= state.series.start + BASELINE_STEPS
            state.has_no_baseline = is_late and isinstance(rule.bound, FromBaseline)
            return
        holds = _COMPARE[rule.op](value, limit.value)
        state.since = step if holds and not state.count else state.since
        state.count = state.count + 1 if holds else 0
        if state.count >= rule.steps and not state.is_active:
            update.events.append(_event(rule, state, step, value, limit, "start"))
            state.is_active = state.was_active = True
        elif not holds and state.is_active:
            update.events.append(_event(rule, state, step, value, limit, "end"))
            state.is_active = False

    def _baseline_start(self, rule: Rule, step: int) -> int:
        """Return the first step of the current baseline of a rule."""
        restarts = isinstance(rule.bound, FromBaseline) and rule.bound.restarts
        return max(start for start in self._starts if start <= max(step, 1)) if restarts else 1

    def _note_missing_baseline(self, step: int) -> list[str]:
        """Return a text, once, about the rules whose baseline is unknown because the history has no values for it."""
        missing = [(rule.name, state.series.start) for rule, state in self._rules if state.has_no_baseline]
        if not missing or self._noted_missing_baseline:
            return []
        self._noted_missing_baseline = True
        names = ", ".join(f"{name} (steps {start} to {start + BASELINE_STEPS - 1})" for name, start in missing)
        return [
            f"the default alarms {names} are off, because the metrics of this run have no values in the steps whose"
            " mean is the baseline"
        ]

    def _update_collapse(self, step: int, values: Values, update: Update) -> None:
        """Join repetition and truncation into one alarm while both are active."""
        both = [state for rule, state in self._rules if rule.name in (REPETITION, TRUNCATION)]
        is_active = len(both) == 2 and all(state.is_active for state in both)
        state = self._collapse
        if is_active == state.is_active:
            return
        state.is_active, state.was_active = is_active, True
        since = min(each.since for each in both)
        own = [event for event in update.events if event.alarm in (REPETITION, TRUNCATION)]
        if is_active:
            metrics = [rule.metric for rule, _ in self._rules if rule.name in (REPETITION, TRUNCATION)]
            found = [f"{name} is {value:.4g}" for name in metrics if (value := values.get(name)) is not None]
            # One warning in place of two.
            update.events = [
                Event(**{**vars(event), "is_logged": False}) if event in own else event for event in update.events
            ]
            message = (
                f"alarm {COLLAPSE} at step {step}: the student's responses repeat themselves and are truncated"
                f" ({', '.join(found)}); this is the known collapse of self-distillation with privileged context"
            )
        else:
            message = f"alarm {COLLAPSE} ended at step {step}"
        event: Literal["start", "end"] = "start" if is_active else "end"
        last = own[-1]
        update.events.append(
            Event(step, COLLAPSE, event, "warn", last.metric, last.value, last.limit, last.baseline, since, message)
        )


def _event(rule: Rule, state: _State, step: int, value: float, limit: Limit, kind: Literal["start", "end"]) -> Event:
    found = f"{rule.metric} is {value:.4g}"
    if kind == "end":
        message = f"alarm {rule.name} ended at step {step}: {found}"
    else:
        bound = f" ({limit.text})" if limit.text else ""
        times = f" for {state.count} consecutive values" if rule.steps > 1 else ""
        message = f"alarm {rule.name} at step {step}: {found}, {_DIRECTION[rule.op]} {limit.value:.4g}{bound}{times}"
    return Event(
        step, rule.name, kind, rule.action, rule.metric, value, limit.value, limit.baseline, state.since, message
    )
