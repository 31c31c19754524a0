"""Phases of a training step: names, metric tags, durations and memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from distill.distributed.host_memory import resident_bytes
from distill.supervise.progress import phase
from distill.types import Stats

Phase = Literal["sync", "generation", "validation", "batching", "teacher", "training", "checkpointing"]
"""Names of the phases of a training step, in order; also used on the console and in the summary."""
PHASES: tuple[Phase, ...] = get_args(Phase)

OUTSIDE_THROUGHPUT: tuple[Phase, ...] = ("validation", "checkpointing")
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


class Phases:
    """Durations and memory of one step on this rank, by phase; the step's timer starts in the constructor.

    On CUDA the device is synchronized at the start and the end of each phase, so a duration includes the phase's
    kernels. ``seconds`` maps each phase to its duration. ``memory`` maps each phase to a number of bytes: on CUDA the
    peak of torch's allocator, otherwise the process's resident memory at the end of the phase.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the ``with`` block as phase ``name``, and set the current phase for the watchdog.

        A phase may occur several times in a step; its durations are added.
        """
        self._synchronize()
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        with phase(name):
            try:
                yield
            finally:
                self._synchronize()
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
                used = torch.cuda.max_memory_allocated(self._device) if self._on_cuda else resident_bytes()
                if used is not None:
                    self.memory[name] = max(self.memory.get(name, 0), used)

    def stats(self) -> Stats:
        """Return the durations as metrics ``timing/train/*``: pairs (seconds, 1), to be averaged over ranks.

        Means are used instead of maxima, so that the durations of the phases add up to the duration of the step.
        """
        seconds = {**self.seconds, "total_step_time": time.perf_counter() - self._start}
        return {timing_tag(name): (value, 1.0) for name, value in seconds.items()}

    def _synchronize(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize(self._device)

    @property
    def _on_cuda(self) -> bool:
        return self._device is not None and self._device.type == "cuda"
