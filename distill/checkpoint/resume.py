"""Compare the data and recipe of a checkpoint with the current ones; refuse or record differences."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.checkpoint import Found, changed_keys
from distill.checkpoint.base_model import BASE, names_of_base, raise_if_other_adapters
from distill.checkpoint.recipe_diff import affects_learning
from distill.checkpoint.search import JOB, SOURCE, source_of
from distill.config import Config
from distill.config.lora_rules import KEY
from distill.data.clock import RunClock, current_time
from distill.data.content import ContentHashes, changed_parts
from distill.data.prompts import PromptOrder
from distill.distributed import slurm
from distill.errors import UserError

log = logging.getLogger(__name__)

_CLOCK, _CHANGES, _VALIDATION = "clock", "changes", "validation_inputs"
_ALLOW_KEY = "checkpointing.allow_changes"
_MAX_LISTED = 6
"""Maximum number of changes in an error message."""
_NO_DATE = (
    " (a possible cause is a different date: the chat template inserts the date, and the version of this program that"
    " wrote the checkpoint did not save the date)"
)
CHANGES_FILE = "changes.json"


def clock_of(found: Found | None) -> RunClock:
    """Return the run's clock, from which chat templates get the date.

    The clock always returns the time of the run's first start, which is stored in the checkpoint ``found``. Without a
    checkpoint, or if the checkpoint contains no clock, return a clock with the current time.
    """
    if found is None or _CLOCK not in found.info:
        return RunClock(current_time())
    return RunClock.saved(found.info[_CLOCK])


def log_clock(clock: RunClock, found: Found | None) -> None:
    """Log the date that chat templates insert into prompts; log nothing if no template uses the date.

    ``found``: the checkpoint that the run resumes from, or None.
    """
    if not clock.was_read:
        return
    if found is not None and _CLOCK not in found.info:
        log.warning(
            "chat templates use the date %s from now on, because the checkpoint %s contains no date", clock, found.path
        )
    else:
        log.info("chat templates use the date of the run's first start: %s", clock)


@dataclass(frozen=True)
class RunHistory:
    """Start time of a run, and differences in data and recipe (configuration) detected at each resume.

    The property ``info`` is stored in every checkpoint.
    """

    clock: RunClock
    """Clock that always returns the time of the run's first start."""
    changes: Sequence[dict[str, Any]] = ()
    """Differences in recipe and data detected at each resume so far.

    Each dict has the keys ``step`` (of the checkpoint), ``what`` (a text) and ``when`` (time of the resume).
    """
    validation: ContentHashes | None = None
    """Hashes of the validation data and of the settings of its sampling, to detect changes at a resume.

    If validation is disabled now, these are the hashes in the checkpoint. Empty or None if it was never enabled.
    """
    training_changes: Sequence[str] = ()
    """Descriptions of changes in the training data and in keys that affect training, since the checkpoint."""
    validation_changes: Sequence[str] = ()
    """Descriptions of changes in the validation data and the settings of its sampling since the checkpoint."""
    same_run: bool = True
    """Whether training data and all keys that affect learning are unchanged since the checkpoint.

    False is possible only with checkpointing.allow_changes=true.
    """
    source: str | None = None
    """Absolute path in checkpointing.resume_from with which the run started; None without a path."""

    @property
    def info(self) -> dict[str, Any]:
        """Return the clock, the differences and the validation hashes, to be stored in training_info.json."""
        validation, job = None if self.validation is None else dict(self.validation), slurm.start_of_job()
        return {
            _CLOCK: str(self.clock),
            _CHANGES: list(self.changes),
            _VALIDATION: validation,
            SOURCE: self.source,
            JOB: None if job is None else job[0],
        }

    def in_context_metrics(self, found: Found | None) -> dict[str, float] | None:
        """Return the validation metrics of the student that were measured with the teacher's prompts.

        They are stored in the checkpoint ``found``. Returns None without a checkpoint, if the checkpoint has no such
        metrics, or if the validation data changed after the checkpoint was saved.
        """
        return None if found is None or self.validation_changes else found.info["in_context"]

    def first_validation(self, found: Found | None) -> dict[str, Any] | None:
        """Return the grades of the run's first validation, which are stored in the checkpoint ``found``.

        Returns None without a checkpoint, if the checkpoint has no grades, or if the validation data changed after the
        checkpoint was saved.
        """
        return None if found is None or self.validation_changes else found.info.get("first_validation")

    def write(self, run_dir: Path) -> None:
        """Write ``self.changes`` to ``changes.json`` in the run directory, if there are any changes."""
        if self.changes:
            (run_dir / CHANGES_FILE).write_text(json.dumps(list(self.changes), indent=2) + "\n")


def compare_with_checkpoint(
    found: Found | None,
    config: Config,
    prompts: PromptOrder | None,
    clock: RunClock,
    validation: ContentHashes | None,
    model_changes: Sequence[str] = (),
) -> RunHistory:
    """Compare the checkpoint's data and recipe with the current ones; return the run's history.

    ``found``: the checkpoint that the run resumes from; None for a first start. ``validation``: hashes of the current
    validation data. ``prompts`` is None only in a dry run without the training data, which are then not compared.
    ``model_changes``: texts about changes in the student's config.json and stop ids, which affect what the run learns.
    Raises UserError if the recipe trains other tensors than the checkpoint contains: adapters instead of all weights,
    or adapters of other modules or ranks. With checkpointing.allow_changes=false, also raises UserError if the training
    data, the prompts, their order, the model's settings, or keys that affect what the run learns have changed.
    Differences in the validation data and in keys that change only the rounding are recorded without an error. The base
    model of adapters may have another name: its weights are compared when they are loaded.
    """
    source: str | None = source_of(config.checkpointing) or (None if found is None else found.info.get(SOURCE))
    if found is None:
        return RunHistory(clock, validation=validation, source=source)
    raise_if_other_adapters(found, config)
    data_changes = prompts.changes(found.info["data"]) if prompts else []
    recipe_changes = changed_keys(found.info["recipe"], asdict(config))
    for key in names_of_base(found, config):
        recipe_changes.pop(key, None)
    learning = [*data_changes, *(change for key, change in recipe_changes.items() if affects_learning(key))]
    learning = list(dict.fromkeys([*learning, *model_changes]))
    if learning and not config.checkpointing.allow_changes:
        raise _refused(learning, found, undated=bool(data_changes) and clock.was_read and _CLOCK not in found.info)
    training = list(dict.fromkeys([*data_changes, *recipe_changes.values(), *model_changes]))
    before = found.info.get(_VALIDATION)
    parts = changed_parts(before, validation) if before and validation else []
    changed = [f"data.validation has different {' and '.join(parts)}"] if parts else []
    now = current_time().isoformat(timespec="seconds")
    new = [{"step": found.info["step"], "what": what, "when": now} for what in [*training, *changed]]
    changes = [*found.info.get(_CHANGES, []), *new]
    return RunHistory(clock, changes, validation or before, training, changed, same_run=not learning, source=source)


def _refused(changes: Sequence[str], found: Found, undated: bool) -> UserError:
    start = "policy.model_name" if found.info.get(BASE) is None else f"{KEY}.init_from"
    return UserError(
        f"the run cannot resume from checkpoint {found.path}, because {_listed(changes)}{_NO_DATE if undated else ''}",
        "undo the change, set another checkpointing.checkpoint_dir to start a new run, or set"
        f" {_ALLOW_KEY}=true to continue with the change from step {found.info['step'] + 1} on (to start a new run from"
        f" these weights, export this checkpoint with scripts.export_hf and set {start} to the export)",
        key=_ALLOW_KEY,
        value=False,
    )


def _listed(changes: Sequence[str]) -> str:
    more = f"; and {len(changes) - _MAX_LISTED} more changes" if len(changes) > _MAX_LISTED else ""
    return "; ".join(changes[:_MAX_LISTED]) + more


def warn_of_changes(history: RunHistory, found: Found) -> None:
    """Log warnings about differences between checkpoint ``found`` and the current data and recipe."""
    if history.training_changes:
        log.warning(
            "the recipe or the data changed since checkpoint %s (%s), so training differs from a run without changes:"
            " undo the changes to continue the same run",
            *(found.path, "; ".join(history.training_changes)),
        )
    if history.validation_changes:
        log.warning(
            "%s than at checkpoint %s: validation metrics from step %d on are not comparable with earlier metrics%s",
            *("; ".join(history.validation_changes), found.path, found.info["step"]),
            ", and the metrics validation/in_context_* are no longer reported" if found.info["in_context"] else "",
        )
