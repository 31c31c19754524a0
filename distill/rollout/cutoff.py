"""Cutoff of a step's unfinished segments, from the segments that ended on all engines; needs no collective."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

POLL_S = 0.2
"""Minimum number of seconds between two reads of what the other engines published; more with more than 64 engines."""
_ENGINES_PER_POLL_S = 64


class Store(Protocol):
    """Methods of torch's key-value store that are used here."""

    def set(self, key: str, value: str) -> None:
        """Set the value of a key."""

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Return the values of the keys; waits until all of them exist."""


class EndedSegments:
    """Numbers of new tokens of the segments that ended, published by each engine through the rendezvous store.

    Each engine has one key, which it overwrites. Its value begins with the step, so that values of earlier steps are
    ignored. All ranks must create the object, and pass a barrier, before the first ``StoreCutoff``: a read waits for
    missing keys. With one engine nothing is published.
    """

    def __init__(self, store: Store, engine: int, engines: int) -> None:
        self._store, self._engine = store, engine
        self._others = [f"ended_segments/{other}" for other in range(engines) if other != engine]
        self.poll_s = POLL_S * max(1, engines // _ENGINES_PER_POLL_S)
        self.publish(-1, ())

    def publish(self, step: int, new_tokens: Sequence[int]) -> None:
        """Replace the published numbers of this engine."""
        if self._others:
            self._store.set(f"ended_segments/{self._engine}", " ".join(map(str, (step, *new_tokens))))

    def of_others(self, step: int) -> list[int]:
        """Return the numbers that the other engines published in ``step``."""
        found = self._store.multi_get(self._others) if self._others else []
        values = [list(map(int, value.split())) for value in found]
        return [number for of_step, *numbers in values if of_step == step for number in numbers]


class StoreCutoff:
    """Cutoff of one step; see ``requests.Cutoff``.

    ``needed``: number of segments that must end. The bound is the ``needed``-th smallest number of new tokens among the
    segments that are known to have ended. It never increases, and is at least T*, because more segments can only lower
    it.
    """

    def __init__(
        self, ended: EndedSegments, step: int, needed: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._published, self._step, self._needed, self._clock = ended, step, needed, clock
        self._own: list[int] = []
        self._others: list[int] = []
        self._next_poll = 0.0

    def ended(self, new_tokens: Sequence[int]) -> None:
        """Report that segments of this engine ended; see Cutoff.ended."""
        self._own += new_tokens
        self._published.publish(self._step, self._own)

    def limit(self) -> int | None:
        """Return the current upper bound of T*; see Cutoff.limit."""
        if self._needed <= 0:
            return 0
        if (now := self._clock()) >= self._next_poll:
            self._others = self._published.of_others(self._step)
            self._next_poll = now + self._published.poll_s
        known = sorted(self._own + self._others)
        return known[self._needed - 1] if len(known) >= self._needed else None
