"""Compare a checkpoint's inputs with those of the run that resumes from it: refuse or record the changes."""

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
from distill.data.content import Content, changed_parts
from distill.data.prompts import PromptOrder
from distill.errors import UserError

log = logging.getLogger(__name__)

_CLOCK, _CHANGES, _VALIDATION = "clock", "changes", "validation_inputs"
_ALLOW = "checkpointing.allow_changes=true"
_NO_DATE = (
    " (the chat template writes the date, and the checkpoint is from a version that did not save the date of its"
    " prompts)"
)
CHANGES_FILE = "changes.json"


def clock_of(found: Found | None) -> RunClock:
    """The run's clock: the checkpoint's, or for a first start (or a checkpoint without one) the current time."""
    if found is None or _CLOCK not in found.info:
        return RunClock(current_time())
    return RunClock.saved(found.info[_CLOCK])


def log_clock(clock: RunClock, found: Found | None) -> None:
    """Log the time that chat templates see, where this process has rendered one that reads it."""
    if not clock.was_read:
        return
    if found is not None and _CLOCK not in found.info:
        log.warning("chat templates see the date %s from here on: %s holds no earlier one", clock, found.path)
    else:
        log.info("chat templates see the date of the run's first start: %s", clock)


@dataclass(frozen=True)
class Origin:
    """Where a run's state comes from; every checkpoint of the run records it."""

    clock: RunClock
    changes: Sequence[dict[str, Any]] = ()
    """Of all resumes so far: the step, what has changed, and when."""
    validation: Content | None = None
    """Hashes of what validation metrics depend on; None: never validated."""
    learning: Sequence[str] = ()
    """Changes by this resume to data and keys that shape the training."""
    validation_changed: Sequence[str] = ()
    """Changes by this resume to the validation data."""

    @property
    def info(self) -> dict[str, Any]:
        """The entries of a checkpoint's info, plain JSON."""
        validation = None if self.validation is None else dict(self.validation)
        return {_CLOCK: str(self.clock), _CHANGES: list(self.changes), _VALIDATION: validation}

    def reference(self, found: Found | None) -> dict[str, float] | None:
        """The checkpoint's metrics with the teacher's context in view, as long as they are of the same problems."""
        return None if found is None or self.validation_changed else found.info["in_context"]

    def write(self, run_dir: Path) -> None:
        """Write the changes into the run's folder, where there are any."""
        if self.changes:
            (run_dir / CHANGES_FILE).write_text(json.dumps(list(self.changes), indent=2) + "\n")


def origin_of(
    found: Found | None, config: Config, order: PromptOrder, clock: RunClock, validation: Content | None
) -> Origin:
    """Compare a checkpoint's data and recipe with the current ones.

    Raises UserError where training data, prompts or their order have changed, unless checkpointing.allow_changes is
    set. A changed key that shapes what is learnt, and a changed validation, are recorded only.
    """
    if found is None:
        return Origin(clock, validation=validation)
    inputs = order.changes(found.info["data"])
    if inputs and not config.checkpointing.allow_changes:
        undated = clock.was_read and _CLOCK not in found.info
        raise UserError(
            f"{'; '.join(inputs)}, since the checkpoint {found.path}{_NO_DATE if undated else ''}: restore it, set"
            f" {_ALLOW} to continue with the change from step {found.info['step'] + 1} on, or start anew in another"
            " checkpointing.checkpoint_dir, from the checkpoint's weights if policy.model_name is what"
            " scripts.export_hf makes of it"
        )
    keys = changed_keys(found.info["recipe"], asdict(config))
    learning = [*inputs, *(key for key in keys if key not in inputs)]
    then = found.info.get(_VALIDATION)
    parts = changed_parts(then, validation) if then and validation else []
    changed = [f"validation has other {' and '.join(parts)}"] if parts else []
    now = current_time().isoformat(timespec="seconds")
    new = [{"step": found.info["step"], "what": what, "when": now} for what in [*learning, *changed]]
    return Origin(clock, [*found.info.get(_CHANGES, []), *new], validation or then, learning, changed)


def warn_of_changes(origin: Origin, found: Found) -> None:
    """Log how the resumed run differs from the checkpoint; called after the checkpoint is loaded."""
    if origin.learning:
        log.warning(
            "the recipe or its data have changed since %s, so this is another run from here on (%s): set them back"
            " to continue the same run",
            *(found.path, "; ".join(origin.learning)),
        )
    if origin.validation_changed:
        log.warning(
            "%s than at the checkpoint %s: validation metrics from step %d on can't be compared with those before%s",
            *("; ".join(origin.validation_changed), found.path, found.info["step"]),
            ", and the metrics with the teacher's context in view are left out" if found.info["in_context"] else "",
        )
