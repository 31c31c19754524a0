"""Whether the engine answers with the student's weights of this very step: the sync, and what must follow from it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Protocol

import torch

from distill.distributed.world import World
from distill.metrics.step import Metrics
from distill.rollout.engine import Engine, Weights
from distill.types import SyncReport

log = logging.getLogger(__name__)

PROBE_TOKENS = 24
FLOAT32_LIMIT = 1e-4
"""Nats by which the engine's log-probs may differ from the trainer's in float32: other kernels make 1e-6 to 3e-6."""
GROSS_LIMIT = 0.5
"""Nats a token by which trainer and sampler never differ for rounding: bfloat16 makes 0.04, garbage above 1."""
_MOST = 0.9
"""Share of the bytes, by changed tensors, from which on the probe's log-probs must have moved: a few flipped bits may
round away. Norms are many tensors and few bytes, and at small learning rates they often stay."""
_ALARM = 3.0
"""Times its first value that the sampler-against-trainer difference may reach before it is warned of."""


class Trainer(Protocol):
    """What freshness asks of the student."""

    dtype: torch.dtype

    def offload(self) -> None:
        """Move the optimizer's moments to host memory."""

    def weights(self) -> Weights:
        """The weights as they are now; all ranks drain them."""

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """What the engine's probe must equal; collective."""


class WeightSync:
    """Brings the student's weights to the engine and holds the engine to them.

    Every rank makes it and calls its methods at the same points. ``valid_vocab``: ids of the probe's tokens lie below.
    The probe is one fixed prompt whose log-probs must move when the weights did, and equal the trainer's in float32.
    The log-probs of sampled tokens are watched too, but prove little in bfloat16: there a sync that is one step old
    differs hardly more than a right one does by rounding.
    """

    def __init__(self, world: World, engine: Engine, student: Trainer, valid_vocab: int) -> None:
        self._world = world
        self._engine = engine
        self._student = student
        generator = torch.Generator().manual_seed(0)
        self._probe_ids = torch.randint(0, valid_vocab, (PROBE_TOKENS,), generator=generator).tolist()
        self._last: list[float] | None = None
        self._first_difference: float | None = None

    def push_weights(self, version: int, metrics: Metrics | None = None) -> None:
        """Wake the engine with the student's weights of now, proven, ready to generate; collective.

        Raises RuntimeError, on all ranks, where the engine's answers don't follow the weights.
        """
        engine, student = self._engine, self._student
        student.offload()  # the engine needs the memory of the optimizer's moments
        with self._world.all_or_none("waking the engine"):
            engine.wake("weights")
        report = engine.sync(student.weights(), version)
        with self._world.all_or_none("waking the engine's cache"):
            engine.wake("kv")
        with self._world.all_or_none("probing the engine"):  # all of an engine's ranks are awake: they compute together
            said = engine.probe(self._probe_ids)
            moved = self._moved(said, report)
        if student.dtype == torch.float32:
            wanted = student.logprobs(self._probe_ids)
            with self._world.all_or_none("comparing the engine with the trainer"):
                check_equal(said, wanted)
        if metrics is not None:
            metrics.add_max({"timing/train/weight_sync": report.seconds})
            metrics.add({"sync_changed_tensors": (float(report.changed), 1), "probe_change": (moved, 1)})

    def _moved(self, said: list[float], report: SyncReport) -> float:
        """Mean |change| of the probe's log-probs since the last sync, in nats."""
        last, self._last = self._last, said
        if last is None:
            return math.nan
        if report.changed and said == last:
            problem = (
                f"{report.changed} of {report.tensors} tensors changed, {report.changed_bytes / report.bytes:.0%} of"
                " all bytes are theirs, and the engine answers the probe exactly as before"
            )
            if report.changed_bytes >= _MOST * report.bytes:
                raise RuntimeError(f"{problem}: it does not use the weights it was sent")
            log.warning(problem)
        return sum(abs(a - b) for a, b in zip(said, last, strict=True)) / len(said)

    def observe(self, difference: float) -> None:
        """Judge a step's mean |trainer's - sampler's| log-prob of sampled tokens; the same value on every rank."""
        if math.isnan(difference):  # nothing was trained
            return
        limit = FLOAT32_LIMIT if self._student.dtype == torch.float32 else GROSS_LIMIT
        if difference > limit:
            raise RuntimeError(
                f"trainer and sampler differ by {difference:.3g} nats a token, and {limit:g} is the most that rounding"
                " explains: they do not have the same weights, temperature or prompts"
            )
        if self._first_difference is None:
            self._first_difference = difference
        elif difference > _ALARM * self._first_difference:
            log.warning(
                "trainer and sampler differ by %.3g nats a token, %.3g at first: look at the engine's weights",
                *(difference, self._first_difference),
            )


def check_equal(said: Sequence[float], wanted: Sequence[float]) -> None:
    """Raise RuntimeError where the engine's log-probs of the probe are not the trainer's, in float32."""
    apart = max(abs(a - b) for a, b in zip(said, wanted, strict=True))
    if not apart <= FLOAT32_LIMIT:
        raise RuntimeError(
            f"the engine's log-probs of the probe differ from the trainer's by {apart:.3g} nats in float32, more than"
            f" {FLOAT32_LIMIT:g}: it does not compute with the weights it was sent"
        )
