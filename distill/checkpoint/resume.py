"""Compare the data and recipe of a checkpoint with the current ones; refuse or record differences."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.checkpoint import Found, changed_keys
from distill.config import Config
from distill.data.clock import RunClock, current_time
from distill.data.content import ContentHashes, changed_parts
from distill.data.prompts import PromptOrder
from distill.errors import UserError

log = logging.getLogger(__name__)

_CLOCK, _CHANGES, _VALIDATION = "clock", "changes", "validation_inputs"
_ALLOW_KEY = "checkpointing.allow_changes"
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
    """Hashes of the validation data, to detect changes at a resume.

    If validation is disabled now, the hashes are those in the checkpoint. Empty or None if it was never enabled.
    """
    training_changes: Sequence[str] = ()
    """Texts about changes in training data and in recipe keys that affect training, found at this resume."""
    validation_changes: Sequence[str] = ()
    """Texts about changes of the validation data, found at this resume."""

    @property
    def info(self) -> dict[str, Any]:
        """Return the clock, the differences and the validation hashes, to be stored in training_info.json."""
        validation = None if self.validation is None else dict(self.validation)
        return {_CLOCK: str(self.clock), _CHANGES: list(self.changes), _VALIDATION: validation}

    def in_context_metrics(self, found: Found | None) -> dict[str, float] | None:
        """Return the validation metrics that were measured with the teacher's context in the student's prompt.

        They are stored in the checkpoint ``found``. Returns None without a checkpoint, if the checkpoint has no such
        metrics, or if the validation data changed after the checkpoint was saved.
        """
        return None if found is None or self.validation_changes else found.info["in_context"]

    def write(self, run_dir: Path) -> None:
        """Write ``self.changes`` to ``changes.json`` in the run directory, if there are any changes."""
        if self.changes:
            (run_dir / CHANGES_FILE).write_text(json.dumps(list(self.changes), indent=2) + "\n")


def compare_with_checkpoint(
    found: Found | None, config: Config, prompts: PromptOrder, clock: RunClock, validation: ContentHashes | None
) -> RunHistory:
    """Compare the checkpoint's data and recipe with the current ones; return the run's history.

    ``found``: the checkpoint that the run resumes from; None for a first start. ``validation``: hashes of the current
    validation data. Raises UserError if the training data, the prompts or their order changed and
    checkpointing.allow_changes is false. Differences in the validation data and in recipe keys that affect training are
    only recorded.
    """
    if found is None:
        return RunHistory(clock, validation=validation)
    data_changes = prompts.changes(found.info["data"])
    if data_changes and not config.checkpointing.allow_changes:
        raise _refused(data_changes, found, undated=clock.was_read and _CLOCK not in found.info)
    recipe_changes = changed_keys(found.info["recipe"], asdict(config))
    training = [*data_changes, *(change for change in recipe_changes if change not in data_changes)]
    before = found.info.get(_VALIDATION)
    parts = changed_parts(before, validation) if before and validation else []
    changed = [f"data.validation has different {' and '.join(parts)}"] if parts else []
    now = current_time().isoformat(timespec="seconds")
    new = [{"step": found.info["step"], "what": what, "when": now} for what in [*training, *changed]]
    return RunHistory(clock, [*found.info.get(_CHANGES, []), *new], validation or before, training, changed)


def _refused(changes: Sequence[str], found: Found, undated: bool) -> UserError:
    return UserError(
        f"the run cannot resume from checkpoint {found.path}, because {'; '.join(changes)}"
        f"{_NO_DATE if undated else ''}",
        f"undo the change, set {_ALLOW_KEY}=true to continue with the change from step {found.info['step'] + 1} on,"
        " or set another checkpointing.checkpoint_dir to start a new run (to keep the weights, export this checkpoint"
        " with scripts.export_hf and set policy.model_name to the export)",
        key=_ALLOW_KEY,
        value=False,
    )


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
