"""Stop requests: agreement of all ranks on whether and after which step the run stops early."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import NamedTuple

from distill.supervise.signals import Deadline


class StopRequested(Exception):
    """Request to stop after ``step`` finished steps; the run saves a checkpoint and exits with code 0.

    All ranks raise it together.
    """

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"stop after step {step}: {reason}")
        self.step = step
        self.reason = reason


class StopRequest(NamedTuple):
    """One rank's reasons to stop the run: a received signal, or the time limit."""

    signal: int = 0
    """Number of the received signal; 0 if no signal was received."""
    out_of_time: bool = False
    """Whether one more training step is expected to exceed the time limit."""


class StopCheck:
    """Collective check of whether any rank requests that the run stops early.

    ``received_signal`` returns the number of the signal that this rank received, or 0. ``gather`` returns the requests
    of all ranks and is collective. ``deadline``: the time limit. ``time_limit``: configuration ``key=value`` of the
    time limit; it is the reported reason if the run stops because of the time limit.
    """

    def __init__(
        self,
        received_signal: Callable[[], int],
        gather: Callable[[StopRequest], list[StopRequest]],
        deadline: Deadline,
        time_limit: str,
    ) -> None:
        self._received_signal = received_signal
        self._gather = gather
        self._deadline = deadline
        self._time_limit = time_limit

    def has_signal(self) -> bool:
        """Return whether this rank received a stop signal; not collective."""
        return self._received_signal() != 0

    def record_duration(self, step_s: float, save_s: float) -> None:
        """Record the durations of a training step and of a checkpoint save, in seconds.

        ``step_s``: without saves. ``save_s``: 0 if no save has finished.
        """
        self._deadline.record(step_s, save_s)

    def raise_if_requested(self, step: int, check_time: bool = True) -> None:
        """Raise StopRequested on all ranks if any rank requests a stop; collective.

        A signal takes precedence over the time limit. ``step``: number of finished steps. ``check_time``: whether to
        check the time limit.
        """
        own = StopRequest(self._received_signal(), check_time and self._deadline.is_near())
        requests = self._gather(own)
        if number := max(request.signal for request in requests):
            raise StopRequested(step, signal.Signals(number).name)
        if any(request.out_of_time for request in requests):
            raise StopRequested(step, self._time_limit)
