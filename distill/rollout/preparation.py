"""Grade responses and build their teacher prefixes in a background thread while the engine generates other responses.

The thread runs only inside the ``with`` block around the engine's calls. So no other code uses the tokenizers or the
grader's worker processes at the same time: tokenizers of Hugging Face can fail if several threads use one of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Thread

from distill.data.grading import Verdict
from distill.data.teacher_prefix import Prefix, PrefixStats, TeacherPrefixes, with_prefix
from distill.data.train_grader import TrainGrader
from distill.errors import reason
from distill.supervise.progress import heartbeat
from distill.types import Rollout

log = logging.getLogger(__name__)

Add = Callable[[Rollout], None]
"""Function that receives a complete response, as soon as it ended; it returns at once."""

_Key = tuple[int, int, int]
"""Prompt id, response index and order of a response; the same prompt may be in the pool twice, with another order."""


@dataclass(frozen=True)
class _Prepared:
    """The grade of a response, the teacher's prefix and the metrics of this prefix.

    They depend on the prompt and on the fields ``finish`` and ``response_ids``.
    """

    finish: str
    response_ids: tuple[int, ...]
    verdict: Verdict | None
    prefix: Prefix | None
    """None if the response was dropped, or if distillation.train_on excludes it."""
    counts: PrefixStats

    def is_of(self, rollout: Rollout) -> bool:
        """Return whether ``rollout``, which has the same prompt, has this result."""
        ids = rollout.response_ids
        return rollout.finish == self.finish and (ids is self.response_ids or ids == self.response_ids)


class Preparation:
    """Grades and teacher prefixes of this rank's responses, computed in advance or when they are requested.

    The results do not depend on what was computed in advance. ``train_on``: the verdict of the responses to train on,
    or "all"; other responses need no prefix. Not collective.
    """

    def __init__(self, grader: TrainGrader, teacher_prefixes: TeacherPrefixes, train_on: str) -> None:
        self._grader, self._teacher_prefixes, self._train_on = grader, teacher_prefixes, train_on
        self._prepared: dict[_Key, _Prepared] = {}
        self.background_s = 0.0
        """Seconds that the thread worked in the last ``while_generating`` block."""

    @contextmanager
    def while_generating(self, waiting: Sequence[Rollout] = ()) -> Iterator[Add]:
        """Prepare responses in a background thread during the ``with`` block; one block per training step.

        The block's value is a function to call with each complete response of this rank as soon as it ended. At the end
        of the block, the thread finishes the response that it works on. Responses that are not prepared then are
        prepared when they are requested. So are those after a response that causes an exception, which is raised then.
        ``waiting``: complete responses of earlier steps on this rank. Their results are kept, or computed; all other
        results of earlier steps are dropped.
        """
        kept = {_key_of(rollout): self._result(rollout) for rollout in waiting}
        self._prepared = {key: result for key, result in kept.items() if result is not None}
        self.background_s = 0.0
        queue, stopped = SimpleQueue[Rollout | None](), Event()
        for rollout in waiting:
            queue.put(rollout)
        # A daemon, because a failed run must not wait for a grader before it exits.
        thread = Thread(target=self._work, args=(queue, stopped), name="preparation of responses", daemon=True)
        thread.start()
        try:
            yield queue.put
        finally:
            stopped.set()
            queue.put(None)
        thread.join()  # not after an exception in the block

    def _work(self, queue: SimpleQueue[Rollout | None], stopped: Event) -> None:
        # No heartbeat here: it would hide from the watchdog that the main thread hangs.
        while (rollout := queue.get()) is not None and not stopped.is_set():
            started = time.monotonic()
            try:
                self._prepare(rollout)
            except Exception as error:  # of any type: it is raised again on the main thread, if it repeats
                log.warning(
                    "a response could not be prepared in the background (%s); trying again later", reason(error)
                )
                return
            self.background_s += time.monotonic() - started

    def _prepare(self, rollout: Rollout) -> None:
        if self._result(rollout) is not None:
            return
        verdict = self._grader.verdict(rollout)
        added, counts = self._teacher_prefixes.add([rollout] if self._trains_on(verdict) else [])
        prefix = _prefix_of(added[0]) if added else None
        self._prepared[_key_of(rollout)] = _Prepared(rollout.finish, rollout.response_ids, verdict, prefix, counts)

    def _result(self, rollout: Rollout) -> _Prepared | None:
        """Return the result that was computed in advance; None if it was not."""
        found = self._prepared.get(_key_of(rollout))
        return found if found is not None and found.is_of(rollout) else None

    def _trains_on(self, verdict: Verdict | None) -> bool:
        return self._train_on in ("all", verdict)

    def verdicts(self, rollouts: Sequence[Rollout]) -> list[Verdict | None]:
        """Return the grade of each response; None if the response is not graded.

        Raises RuntimeError if the worker process of a grader does not start.
        """
        return [self._verdict(rollout) for rollout in rollouts]

    def _verdict(self, rollout: Rollout) -> Verdict | None:
        heartbeat()
        found = self._result(rollout)
        return self._grader.verdict(rollout) if found is None else found.verdict

    def prefixes(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], PrefixStats]:
        """Return what ``TeacherPrefixes.add`` returns or raises for the same rollouts; forget their results."""
        found = [self._result(rollout) for rollout in rollouts]
        # All missing ones in one call, because tokenizers use several cores then.
        added, counts = self._teacher_prefixes.add([r for r, result in zip(rollouts, found, strict=True) if not result])
        by_key = {_key_of(rollout): _prefix_of(rollout) for rollout in added}
        prefixed = []
        for rollout, result in zip(rollouts, found, strict=True):
            self._prepared.pop(_key_of(rollout), None)
            prefix = result.prefix if result else by_key.get(_key_of(rollout))
            counts = counts + result.counts if result else counts
            if prefix is not None:
                prefixed.append(with_prefix(rollout, prefix))
        return prefixed, counts


def _prefix_of(rollout: Rollout) -> Prefix:
    return Prefix(rollout.teacher_prefix_ids, rollout.teacher_inside_thought)


def _key_of(rollout: Rollout) -> _Key:
    return rollout.prompt.prompt_id, rollout.response_index, rollout.order
