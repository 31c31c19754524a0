"""Names of the phases of a training step and of their metrics; imports no torch."""

from __future__ import annotations

from typing import Literal, get_args

Phase = Literal["sync", "generation", "validation", "batching", "teacher", "training", "checkpointing", "samples"]
"""Names of the phases of a training step, in order; also used on the console and in the summary."""
PHASES: tuple[Phase, ...] = get_args(Phase)

OUTSIDE_THROUGHPUT: tuple[Phase, ...] = ("validation", "checkpointing", "samples")
"""Phases that process no training tokens; their time is excluded from tokens per second."""

TIMING = "timing/train/"
"""Prefix of the metric names of durations within a training step; the unit is seconds."""

_TAGS = {
    "sync": "prepare_for_generation",
    "batching": "data_processing",
    "teacher": "teacher_logprob_inference",
    "training": "policy_training",
}
"""Maps a phase to its name in metric names. Phases without an entry keep their name.

The metric names are those of NeMo-RL.
"""


def timing_tag(name: str) -> str:
    """Return the name of the metric for the duration of the phase ``name``, in seconds."""
    return f"{TIMING}{_TAGS.get(name, name)}"
