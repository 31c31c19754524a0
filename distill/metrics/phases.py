"""Phases of a training step: their names, metric tags, seconds and memory."""

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
"""The phases of a step in their order, in the names that code, console and summary use."""
PHASES: tuple[Phase, ...] = get_args(Phase)

OUTSIDE_THROUGHPUT: tuple[Phase, ...] = ("validation", "checkpointing")
"""Phases that process no training tokens: tokens per second exclude their time."""

TIMING = "timing/train/"
"""Prefix of the metrics of a step's durations."""

_TAGS = {
    "sync": "prepare_for_generation",
    "batching": "data_processing",
    "teacher": "teacher_logprob_inference",
    "training": "policy_training",
}
"""Metric tags that differ from the phase's name; users know these tags from NeMo-RL."""


def timing_tag(name: str) -> str:
    """Return the metric name of a phase's seconds."""
    return f"{TIMING}{_TAGS.get(name, name)}"


class Phases:
    """Seconds and memory of a step by phase; the constructor starts the step's clock.

    On CUDA each phase starts and ends with a device synchronization, so its time includes its kernels. ``memory`` is in
    bytes: the peak of torch's allocator on CUDA, otherwise the process's resident memory at the end of the phase.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the block's time to phase ``name``, which may occur several times in a step; update the progress."""
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
        """Return ``timing/train/*`` as (seconds, 1): the mean over ranks, so that the phases add up to the step."""
        seconds = {**self.seconds, "total_step_time": time.perf_counter() - self._start}
        return {timing_tag(name): (value, 1.0) for name, value in seconds.items()}

    def _synchronize(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize(self._device)

    @property
    def _on_cuda(self) -> bool:
        return self._device is not None and self._device.type == "cuda"
