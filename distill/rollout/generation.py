"""How a step gets its responses: ``Lockstep`` generates all of them completely; see also ``partial``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from distill.checkpoint import Found
from distill.data.prompts import PromptOrder
from distill.metrics.step import Metrics
from distill.rollout.engine import Engine
from distill.rollout.requests import rollout_of
from distill.rollout.responses import StepResponses
from distill.rollout.stream import numbered_requests
from distill.types import Prompt, Rollout

log = logging.getLogger(__name__)

POOL_INFO = "partial_rollouts"
"""Key of training_info.json with the numbers of responses and tokens in the pool of partial rollouts."""
POOL_FILE = "partial_rollouts.npz"
"""File of a checkpoint with the pool of partial rollouts."""


@dataclass(frozen=True)
class Generated:
    """Responses that a step trains on."""

    own: Sequence[Rollout]
    """Responses that this rank grades, and for which it builds the teacher's prefixes."""
    batch: Sequence[Prompt]
    """The step's batch of prompts; responses from the dataset belong to them."""
    prompts: Sequence[Prompt]
    """The prompts of all ranks' responses and of the batch."""


class Generation(Protocol):
    """Generation of the responses that each step trains on.

    The argument ``step`` is a number of finished steps, which is also the version of the weights.
    """

    def generate(self, step: int, metrics: Metrics) -> Generated:
        """Return the responses for the step after ``step``; collective. The engine must be ready.

        Calls with increasing ``step``.
        """

    def files(self, step: int) -> Mapping[str, bytes]:
        """Return the files that a checkpoint of ``step`` needs, by name.

        ``step``: the argument of the last call of ``generate``, or the step after it.
        """

    def info(self, step: int) -> Mapping[str, Any]:
        """Return entries for training_info.json of a checkpoint of ``step``; see ``files``."""

    def restore(self, found: Found) -> None:
        """Continue from the checkpoint ``found``; collective."""


class Lockstep:
    """All responses of a step are generated completely, and all ranks wait for the longest one."""

    def __init__(self, prompts: PromptOrder, responses: StepResponses, engine: Engine) -> None:
        self._prompts, self._responses, self._engine = prompts, responses, engine

    def generate(self, step: int, metrics: Metrics) -> Generated:
        """Return the responses to the step's batch of prompts; see Generation.generate."""
        engine, batch = self._engine, self._prompts.batch(step)
        assert engine.version == step, (engine.version, step)
        sampling = self._responses.sampling_at(step, batch)
        requests = numbered_requests(batch, sampling, step, engine.window, engine.share_of(batch))
        with self._responses.preparation.while_generating() as add:
            segments = engine.segments(requests, sampling, on_ended=lambda segment: add(rollout_of(segment, step)))
        return Generated([rollout_of(segment, step) for segment in segments], batch, batch)

    def files(self, step: int) -> Mapping[str, bytes]:
        """Return no files: no response is unfinished after a step."""
        return {}

    def info(self, step: int) -> Mapping[str, Any]:
        """Return no entries."""
        return {}

    def restore(self, found: Found) -> None:
        """Warn if the checkpoint has responses of partial rollouts, which this run does not train on."""
        if counts := found.info.get(POOL_INFO):
            warn_of_discarded(counts["responses"], counts["tokens"], found, "partial_rollouts.enabled is now false")


def warn_of_discarded(responses: int, tokens: int, found: Found, why: str) -> None:
    """Log that responses in the pool of a checkpoint are discarded, because distillation.``why``."""
    if responses:
        log.warning(
            "%d responses with %d tokens, which were generated before checkpoint %s and not trained on, are discarded,"
            " because distillation.%s: undo the change to train on them",
            *(responses, tokens, found.path, why),
        )
