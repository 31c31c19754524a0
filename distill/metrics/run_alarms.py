"""Alarms of a run: log and record them, and carry out their actions on all ranks together."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from distill.config import DistillationConfig
from distill.config.metric_names import is_of_validation
from distill.distributed.world import World
from distill.errors import writing_run
from distill.metrics.alarms import COLLAPSE, Alarms, Event, Rule, Update, Values
from distill.metrics.summary import Row
from distill.run_files import ALARMS_FILE
from distill.supervise.stop import StopRequested

log = logging.getLogger(__name__)

_PROBE = "validation/probe/"
"""Beginning of the names of metrics of a probe, which are recorded without other metrics, every probe_period steps."""
_LATE = ("validation/accuracy_change", "validation/accuracy_change_stderr", "train/probe_change", "memory/validation")
"""Beginnings of the names of metrics that the first step or validation may not have."""


def is_alarm(stop_reason: str) -> bool:
    """Return whether an alarm is the reason of a stop. The reason is then the message of the alarm's start."""
    return stop_reason.startswith("alarm ")  # scripts/train.sbatch does the same


class _Outcome(NamedTuple):
    """Result of one check, the same on all ranks."""

    metrics: dict[str, float]
    save: bool = False
    stop: str | None = None
    """Reason to stop the run; None: continue."""


class RunAlarms:
    """Alarms of a run. The main rank evaluates them, and all ranks receive the result.

    ``history``: rows of metrics before this start, needed on the main rank only; the state of the alarms is computed
    from them. ``last_step``: number of finished steps at which the run ends. ``checkpoint_before``: returns the newest
    checkpoint with fewer finished steps than a given number, or None. ``saves``: whether the run saves checkpoints.
    ``kept_until``: step up to which alarms.jsonl keeps its rows, for a run whose recipe changed and that therefore has
    no ``history``; -1: it keeps none.
    """

    def __init__(
        self,
        config: DistillationConfig,
        world: World,
        run_dir: Path,
        last_step: int,
        history: Sequence[Row] = (),
        checkpoint_before: Callable[[int], Path | None] = lambda step: None,
        saves: bool = True,
        kept_until: int = -1,
    ) -> None:
        self._world = world
        self._alarms = Alarms.of(config)
        self._run_dir, self._last_step = run_dir, last_step
        self._checkpoint_before, self._saves = checkpoint_before, saves
        self._save = False
        self._stop: str | None = None
        self._rows = {False: 0, True: 0}
        """Number of rows of steps and of validations (True) that were checked since this start."""
        self._unmeasured = {alarm.metric for alarm in config.alarms}
        if world.is_main:
            self._replay(history, kept_until)

    def _replay(self, history: Sequence[Row], kept_until: int) -> None:
        """Compute the state after ``history``, and write the kept alarms and those of ``history`` to a new file."""
        events = [event for row in history for event in self._alarms.update(int(row["step"] or 0), row).events]
        file = self._run_dir / ALARMS_FILE
        if events or file.exists():
            with writing_run(self._run_dir):
                part = file.with_name(f"{file.name}.part")
                part.write_text("".join([*_lines_until(file, kept_until), *map(_line, events)]), encoding="utf-8")
                part.replace(file)
        for rule in self._alarms.active:
            if rule.action == "stop":
                log.warning(
                    "the alarm %s, which stops a run when it starts, is still active: this run continues, because it"
                    " was started again; to undo the change that caused the alarm, set checkpointing.resume_from to"
                    " an earlier checkpoint and checkpointing.checkpoint_dir to a new directory",
                    rule.name,
                )

    def check(self, step: int, values: Values) -> dict[str, float]:
        """Evaluate the alarms on the metrics of one step or validation; collective.

        Only the main rank's ``values`` count. Returns the metrics ``alarm/NAME`` of all alarms that were active at
        least once, on all ranks: 1 for an active alarm, otherwise 0. ``take_save`` and ``raise_if_stopped`` then carry
        out the actions.
        """
        if not self._alarms.metrics:
            return {}
        with self._world.all_or_none("evaluating the alarms"):
            own = self._evaluate(step, values) if self._world.is_main else _Outcome({})
        outcome = self._world.broadcast(own)
        self._save = self._save or outcome.save
        self._stop = self._stop or outcome.stop
        return outcome.metrics

    def take_save(self) -> bool:
        """Return whether an alarm requested a checkpoint since the last call; the same on all ranks.

        False if an alarm stops the run, which saves a checkpoint in any case.
        """
        requested, self._save = self._save, False
        return requested and self._stop is None

    def raise_if_stopped(self, step: int) -> None:
        """Raise StopRequested on all ranks if an alarm stops the run after ``step`` finished steps, except the last."""
        if self._stop is not None and step < self._last_step:
            raise StopRequested(step, self._stop)

    def _evaluate(self, step: int, values: Values) -> _Outcome:
        update = self._alarms.update(step, values)
        for notice in update.notices:
            log.warning("%s", notice)
        self._warn_of_unmeasured(values)
        rules = {rule.name: rule for rule in self._alarms.active}
        for event in update.events:
            if not event.is_logged:
                continue
            log.log(*self._message(event, rules.get(event.alarm)))
        self._append(update)
        stops = [event for event in update.started if event.action == "stop"]
        saves = any(event.action == "save" for event in update.started)
        return _Outcome(update.metrics, saves, stops[0].message if stops else None)

    def _message(self, event: Event, rule: Rule | None) -> tuple[int, str, str]:
        if event.event == "end":
            return logging.INFO, "%s", event.message
        if event.alarm == COLLAPSE:
            return logging.WARNING, "%s", f"{event.message}: {self._after_collapse(event)}"
        advice = f": {rule.advice}" if rule and rule.advice else ""
        return logging.WARNING, "%s", f"{event.message}{self._action(event)}{advice}"

    def _action(self, event: Event) -> str:
        """Return what the run does when an alarm starts, as the end of a sentence."""
        if event.action == "warn":
            return ""
        if event.step == 0:
            saved = "no checkpoint is saved, because the weights are not trained yet"
        elif self._saves:
            saved = f"the checkpoint of step {event.step} is saved"
        else:
            saved = "no checkpoint is saved, because checkpointing.enabled=false"
        if event.action == "save":
            return f"; {saved}"
        return f"; {saved}, and the run {'stops' if event.step < self._last_step else 'ends after its last step'}"

    def _after_collapse(self, event: Event) -> str:
        """Return the advice in a collapse, with the newest checkpoint from before the first of the alarms."""
        found = self._checkpoint_before(event.since)
        where = "no checkpoint is older than it" if found is None else f"the newest checkpoint before it is {found}"
        return (
            f"stop the run (it began at step {event.since}, and {where}), and change the context, the learning rate or"
            " the maximum length of responses before you train again"
        )

    def _warn_of_unmeasured(self, values: Values) -> None:
        """Warn once about each alarm whose metric is missing in the first row that should contain it."""
        if any(name.startswith(_PROBE) for name in values):
            return
        of_validation = any(map(is_of_validation, values))
        self._rows[of_validation] += 1
        due = {name for name in self._unmeasured if is_of_validation(name) == of_validation}
        due = {name for name in due if self._rows[of_validation] > 1 or not name.startswith((*_LATE, "alarm/"))}
        self._unmeasured -= due
        for name in sorted(due - values.keys()):
            if not name.startswith(("alarm/", _PROBE)):
                log.warning(
                    "the metric %s of an alarm in distillation.alarms was not measured: correct the name, or remove the"
                    " alarm; metrics.jsonl has the names of all metrics",
                    name,
                )

    def _append(self, update: Update) -> None:
        if update.events:
            with writing_run(self._run_dir), (self._run_dir / ALARMS_FILE).open("a", encoding="utf-8") as file:
                file.write("".join(map(_line, update.events)))


def _lines_until(file: Path, step: int) -> list[str]:
    """Return the lines of alarms.jsonl up to ``step``, without an incomplete last line; none if ``step`` is -1."""
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if step >= 0 and file.exists() else []
    return [f"{line}\n" for line in lines if json.loads(line)["step"] <= step]


def _line(event: Event) -> str:
    fields = {name: value for name, value in asdict(event).items() if name != "is_logged"}
    return json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n"
