"""Durations and memory of the phases of a training step."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from distill.distributed.host_memory import resident_bytes
from distill.metrics.names import Phase, timing_tag
from distill.supervise.progress import phase
from distill.types import Stats

_ENGINE_AWAKE: tuple[Phase, ...] = ("sync", "generation", "validation")
"""Phases in which the generation engine holds its memory, if ``engine_asleep`` is None."""

_open_peaks: list[int] = []
"""Peak of torch's allocator in each phase that this process is in, outermost first, in bytes.

A nested phase resets the allocator's peak, so the peak of the outer phase until then is kept here.
"""


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
        self._memory: dict[tuple[str, bool], int] = {}
        """Maps (phase, whether the generation engine is asleep) to the largest number of bytes."""

    @property
    def memory(self) -> dict[str, int]:
        """Return a dict from phase to its number of bytes, including the engine's memory pool."""
        largest: dict[str, int] = {}
        for (name, _), size in self._memory.items():
            largest[name] = max(largest.get(name, 0), size)
        return largest

    @contextmanager
    def __call__(self, name: str, engine_asleep: bool | None = None) -> Iterator[None]:
        """Measure the ``with`` block as phase ``name``, and set the current phase for the watchdog.

        A phase may occur several times in a step; its durations are added. It may contain phases of other ``Phases``,
        whose memory it includes. ``engine_asleep``: whether the generation engine is asleep in the complete block;
        None: the default of this phase.
        """
        key = (name, name not in _ENGINE_AWAKE if engine_asleep is None else engine_asleep)
        self._synchronize()
        self._begin_peak()
        start = time.perf_counter()
        with phase(name):
            try:
                yield
            finally:
                self._synchronize()
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
                used = self._end_peak() if self._on_cuda else resident_bytes()
                if used is not None:
                    self._memory[key] = max(self._memory.get(key, 0), used)

    def stats(self) -> Stats:
        """Return the durations as metrics ``timing/train/*``: pairs (seconds, 1), to be averaged over ranks.

        Means are used instead of maxima, so that the durations of the phases add up to the duration of the step.
        """
        seconds = {**self.seconds, "total_step_time": time.perf_counter() - self._start}
        return {timing_tag(name): (value, 1.0) for name, value in seconds.items()}

    def memory_gib(self, pool_bytes: int, omitted: Collection[str] = ()) -> dict[str, float]:
        """Return the metrics ``memory/PHASE_gib`` and their maximum ``memory/peak_gib`` of this rank, in GiB.

        ``pool_bytes``: size of the engine's memory pool, which torch counts as allocated even while the engine sleeps;
        it is subtracted in the phases in which the engine sleeps. ``omitted``: phases without a metric.
        """
        used: dict[str, float] = {}
        for (name, asleep), size in self._memory.items():
            if name not in omitted:
                used[name] = max(used.get(name, 0.0), (size - (pool_bytes if asleep else 0)) / 2**30)
        peak = {"memory/peak_gib": max(used.values())} if used else {}
        return {f"memory/{name}_gib": size for name, size in used.items()} | peak

    def _begin_peak(self) -> None:
        if self._on_cuda:
            self._keep_peak()
            torch.cuda.reset_peak_memory_stats(self._device)
            _open_peaks.append(0)

    def _end_peak(self) -> int:
        """Return the peak of the phase that ends, and include it in the peak of the outer phase."""
        self._keep_peak()
        peak = _open_peaks.pop()
        if _open_peaks:
            _open_peaks[-1] = max(_open_peaks[-1], peak)
        return peak

    def _keep_peak(self) -> None:
        if _open_peaks:
            _open_peaks[-1] = max(_open_peaks[-1], torch.cuda.max_memory_allocated(self._device))

    def _synchronize(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize(self._device)

    @property
    def _on_cuda(self) -> bool:
        return self._device is not None and self._device.type == "cuda"
