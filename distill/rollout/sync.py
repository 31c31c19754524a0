"""Push the student's weights to the engine, and verify that the engine uses them."""

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
"""Maximum allowed difference between float32 log-probs of the engine and the trainer, in nats.

Rounding causes a difference of 1e-6 to 3e-6.
"""
GROSS_LIMIT = 0.5
"""Maximum allowed mean difference between the engine's and the trainer's bfloat16 log-probs, in nats.

The mean is over tokens. Rounding causes a difference of 0.04; wrong weights cause a difference above 1. The limit also
holds for float32 weights if the loss rounds the logits (loss_fn.logits_dtype).
"""
_CHANGED_BYTES = 0.9
"""Limit of (bytes of changed tensors) / (bytes of trained tensors) in a sync of the weights.

After each sync, the engine computes the log-probs of a fixed test prompt. An error is raised if weights changed, the
log-probs equal those of the previous sync, and the ratio is at least this limit. Below the limit only a warning is
logged, because rounding may hide the effect of a few changed bits. Bytes are counted instead of tensors, because many
small tensors (norms) often do not change at small learning rates. With low-rank adapters only the adapted tensors are
trained. A step of a small learning rate changes a part of their elements, because their rounding is dithered.
"""
_CHANGED_TENSORS = 20
"""Minimum number of changed tensors for an error; with fewer tensors, only a warning is logged.

The number is summed over the syncs since the log-probs of the test prompt changed. If few layers have adapters and the
learning rate is tiny, a sync changes only a few elements, and rounding may hide their effect. Of 29 changes of the last
bit of one bfloat16 element of SmolLM2-135M, 10 changed the log-probs. The effect of 20 is thus hidden with a
probability of 0.02%.
"""
_WARNING_RATIO = 3.0
"""Limit of ``difference / first_difference``, above which a warning is logged.

``difference``: mean difference between the log-probs of trainer and engine in the current training step;
``first_difference``: the same in the first step after the run started or resumed.
"""


class Trainer(Protocol):
    """Attributes and methods of the student model that a weight sync to the engine uses."""

    dtype: torch.dtype
    rounds_logits: bool

    @property
    def trained_share(self) -> float:
        """Return the fraction of the elements of all weights in tensors that training changes."""

    def offload(self) -> None:
        """Move the moments of the optimizer (AdamW) to host memory."""

    def weights(self) -> Weights:
        """Return the current weights; iterating over the weights is collective."""

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Return the log-probs of all ``token_ids`` except the first, in nats; collective."""


class WeightSync:
    """Pushes the student's weights to the generation engine, and verifies that the engine uses them.

    All methods are collective. After each push, the engine computes the log-probs of a fixed test prompt, the probe,
    which consists of random token ids below ``valid_vocab``. The probe's log-probs must change when the weights change.
    In float32 they must also equal the trainer's log-probs. ``observe`` compares the engine's log-probs of the sampled
    tokens with the trainer's. In bfloat16 this comparison often cannot detect weights that are one step old, because
    rounding changes the log-probs almost as much as one training step.
    """

    def __init__(self, world: World, engine: Engine, student: Trainer, valid_vocab: int) -> None:
        self._world = world
        self._engine = engine
        self._student = student
        generator = torch.Generator().manual_seed(0)
        self._probe_ids = torch.randint(0, valid_vocab, (PROBE_TOKENS,), generator=generator).tolist()
        self._last_logprobs: list[float] | None = None
        self._changed_tensors = 0
        """Number of tensors that changed in syncs without an effect on the probe, since its log-probs changed."""
        self._first_difference: float | None = None

    def push_weights(self, version: int, metrics: Metrics | None = None) -> None:
        """Wake the engine, and load and verify the student's current weights; collective.

        First moves the optimizer's moments to host memory. Afterwards the engine is ready to generate. ``version``:
        number of finished training steps. If ``metrics`` is given, three metrics are added to it: duration of the
        sync, number of changed tensors, and change of the log-probs of the probe (a fixed test prompt). Raises
        RuntimeError on all ranks if the engine does not use the weights.
        """
        engine, student = self._engine, self._student
        student.offload()  # the engine needs the device memory of the optimizer's moments
        with self._world.all_or_none("waking the engine"):
            engine.wake("weights")
        report = engine.sync(student.weights(), version)
        with self._world.all_or_none("waking the engine's cache"):
            engine.wake("kv")
        with self._world.all_or_none("probing the engine"):  # collective within an engine, whose ranks are all awake
            logprobs = engine.probe(self._probe_ids)
            change = self._probe_change(logprobs, report)
        if student.dtype == torch.float32:
            expected = student.logprobs(self._probe_ids)
            with self._world.all_or_none("comparing the engine with the trainer"):
                check_equal(logprobs, expected)
        if metrics is not None:
            metrics.add_max({"timing/train/weight_sync": report.seconds})
            metrics.add({"sync_changed_tensors": (float(report.changed), 1), "probe_change": (change, 1)})

    def _probe_change(self, logprobs: list[float], report: SyncReport) -> float:
        """Return the mean absolute change of the probe's log-probs since the last sync, in nats per token.

        ``logprobs``: the engine's current log-probs of the probe (a fixed test prompt). Returns nan at the first sync.
        Raises RuntimeError if weights changed but no log-prob changed. Logs a warning instead if less than the fraction
        _CHANGED_BYTES of the trained weights' bytes is in changed tensors, or if they are fewer than _CHANGED_TENSORS.
        """
        last, self._last_logprobs = self._last_logprobs, logprobs
        if last is None:
            return math.nan
        if logprobs != last:
            self._changed_tensors = 0
        elif report.changed:
            problem = (
                f"{report.changed} of {report.tensors} weight tensors ({report.changed_bytes / report.bytes:.0%} of all"
                " bytes) changed since the previous weight sync, but the generation engine computes the same log-probs"
                " as before for a fixed test prompt"
            )
            if report.changed_bytes >= _CHANGED_BYTES * self._student.trained_share * report.bytes:
                self._changed_tensors += report.changed
            if self._changed_tensors >= _CHANGED_TENSORS:
                raise RuntimeError(f"{problem}: the engine does not use the weights that it received")
            log.warning("%s, perhaps because the change is smaller than the rounding error", problem)
        return sum(abs(a - b) for a, b in zip(logprobs, last, strict=True)) / len(logprobs)

    def observe(self, difference: float) -> None:
        """Check the mean difference between the trainer's and the engine's log-probs in one training step.

        ``difference``: in nats per sampled token, equal on all ranks; nan if the step trained on no tokens that
        the current weights generated. Raises RuntimeError if the difference is larger than rounding can explain. Warns
        if the difference exceeds _WARNING_RATIO times the first difference that this process observed.
        """
        if math.isnan(difference):
            return
        is_exact = self._student.dtype == torch.float32 and not self._student.rounds_logits
        limit = FLOAT32_LIMIT if is_exact else GROSS_LIMIT
        if difference > limit:
            raise RuntimeError(
                f"the log-probs of trainer and engine differ by {difference:.3g} nats per token, and rounding explains"
                f" at most {limit:g}: trainer and engine use different weights, temperatures or prompts"
            )
        if self._first_difference is None:
            self._first_difference = difference
        elif difference > _WARNING_RATIO * self._first_difference:
            log.warning(
                "the log-probs of trainer and engine differ by %.3g nats per token, up from %.3g in the first step"
                " after the run started or resumed: check that the engine's weights are current",
                *(difference, self._first_difference),
            )


def check_equal(logprobs: Sequence[float], expected: Sequence[float]) -> None:
    """Raise RuntimeError if two float32 log-probs of the same token differ by more than FLOAT32_LIMIT.

    ``logprobs``, ``expected``: log-probs of the probe (a fixed test prompt) from the engine and from the trainer.
    """
    difference = max(abs(a - b) for a, b in zip(logprobs, expected, strict=True))
    if not difference <= FLOAT32_LIMIT:  # also for nan
        raise RuntimeError(
            f"the float32 log-probs of the probe prompt differ by {difference:.3g} nats between engine and trainer,"
            f" more than {FLOAT32_LIMIT:g}: the engine does not use the weights that it received"
        )
