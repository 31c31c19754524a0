"""Compare a checkpoint's data and recipe with the current ones: refuse or record the changes."""

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
    " (the chat template writes the date, and the checkpoint was written by a version that did not save the date of"
    " its prompts)"
)
CHANGES_FILE = "changes.json"


def clock_of(found: Found | None) -> RunClock:
    """Return the checkpoint's clock; for a first start or a checkpoint without a clock, the current time."""
    if found is None or _CLOCK not in found.info:
        return RunClock(current_time())
    return RunClock.saved(found.info[_CLOCK])


def log_clock(clock: RunClock, found: Found | None) -> None:
    """Log the time that chat templates read, if a chat template of this process has read it."""
    if not clock.was_read:
        return
    if found is not None and _CLOCK not in found.info:
        log.warning("chat templates use the date %s from now on, because %s contains no date", clock, found.path)
    else:
        log.info("chat templates use the date of the run's first start: %s", clock)


@dataclass(frozen=True)
class RunHistory:
    """The run's clock and the changes at all its resumes; every checkpoint stores it."""

    clock: RunClock
    """Time of the run's first start."""
    changes: Sequence[dict[str, Any]] = ()
    """All changes at resumes so far: step, description and time."""
    validation: ContentHashes | None = None
    """Hashes of the inputs of validation metrics; None: no validation so far."""
    training_changes: Sequence[str] = ()
    """Changes at this resume to data and keys that affect training."""
    validation_changes: Sequence[str] = ()
    """Changes at this resume to the validation data."""

    @property
    def info(self) -> dict[str, Any]:
        """Return the entries of a checkpoint's info as JSON."""
        validation = None if self.validation is None else dict(self.validation)
        return {_CLOCK: str(self.clock), _CHANGES: list(self.changes), _VALIDATION: validation}

    def in_context_metrics(self, found: Found | None) -> dict[str, float] | None:
        """Return the checkpoint's metrics with the teacher's context, or None if the problems changed since."""
        return None if found is None or self.validation_changes else found.info["in_context"]

    def write(self, run_dir: Path) -> None:
        """Write the changes to the run's folder, if there are any."""
        if self.changes:
            (run_dir / CHANGES_FILE).write_text(json.dumps(list(self.changes), indent=2) + "\n")


def compare_with_checkpoint(
    found: Found | None, config: Config, prompts: PromptOrder, clock: RunClock, validation: ContentHashes | None
) -> RunHistory:
    """Compare a checkpoint's data and recipe with the current ones.

    Raises UserError if training data, prompts or their order have changed, unless checkpointing.allow_changes is set.
    Other changes, to keys that affect training and to the validation data, are only recorded.
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
        f"{'; '.join(changes)} since the checkpoint {found.path}{_NO_DATE if undated else ''}",
        f"undo the change, set {_ALLOW_KEY}=true to continue with it from step {found.info['step'] + 1} on, or set"
        " another checkpointing.checkpoint_dir to start a new run (from this checkpoint's weights if policy.model_name"
        " is an export by scripts.export_hf)",
        key=_ALLOW_KEY,
        value=list(changes),
    )


def warn_of_changes(history: RunHistory, found: Found) -> None:
    """Log the differences between the resumed run and the checkpoint; call it after loading the checkpoint."""
    if history.training_changes:
        log.warning(
            "the recipe or its data changed since %s, so the resumed run differs from the original one: %s",
            *(found.path, "; ".join(history.training_changes)),
        )
    if history.validation_changes:
        log.warning(
            "%s than at the checkpoint %s: validation metrics from step %d on are not comparable with earlier ones%s",
            *("; ".join(history.validation_changes), found.path, found.info["step"]),
            ", and the metrics with the teacher's context are omitted" if found.info["in_context"] else "",
        )
