"""Watchdog thread of each rank: detects ranks that died, hang, make no progress or have an error.

Ranks exchange heartbeats through the rendezvous store. The watchdog has a separate connection to the store, so it works
while the main threads hang in a collective. The host of the store may hang too, so every call to the store has a
timeout.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from distill.supervise.progress import CURRENT, Progress, in_collective
from distill.supervise.status import ExitStatus, retryable_failure

log = logging.getLogger(__name__)

POLL_S = 2.0
SILENT_POLLS = 20
"""A rank counts as dead after this number of polls (40 s in total) without a new heartbeat.

Polls are counted instead of seconds. While a job is suspended, time passes without polls, but its ranks are not dead.
"""
_SILENCE = f"{SILENT_POLLS * POLL_S:g} s"
_STORE_TIMEOUT_S = 8.0
"""Seconds to wait for a reply of the rendezvous store; torch's calls may otherwise block forever."""
_NO_STATUS = "-"
_STORE_ERRORS = (dist.DistError, RuntimeError, TimeoutError)
T = TypeVar("T")


@dataclass(frozen=True)
class Heartbeat:
    """Message that each rank sends through the rendezvous store in every poll of its watchdog."""

    count: int
    """Number of heartbeats that this rank has sent, including this one."""
    progress: Progress
    in_collective: bool
    """Whether the rank's main thread is in a collective, where it waits for other ranks."""

    @classmethod
    def parse(cls, text: bytes) -> Heartbeat:
        """Return the heartbeat that is encoded in the JSON ``text``; inverse of the method ``text``."""
        count, progress, waiting = json.loads(text)
        return cls(count, Progress(**progress), waiting)

    def text(self) -> str:
        """Return the heartbeat as JSON."""
        return json.dumps([self.count, asdict(self.progress), self.in_collective])


class FailureDetector:
    """Detects dead ranks and phases without progress from the heartbeats of all ranks; used on rank 0.

    ``timeout_s``: the run fails if no rank makes progress for this number of seconds. Time is measured in polls of
    POLL_S seconds each.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._counts: list[int] = []
        self._silent_polls: list[int] = []
        self.progress: list[Progress] = []
        """Progress of all ranks in the last poll, by rank; empty before the first poll."""
        self._polls_without_progress = 0

    def poll(self, heartbeats: Sequence[Heartbeat]) -> ExitStatus | None:
        """Compare the heartbeats of all ranks with those of the previous poll.

        Returns an exit status if the run must end, else None.
        """
        counts = [heartbeat.count for heartbeat in heartbeats]
        if not self._counts:
            self._counts, self._silent_polls = [-1] * len(counts), [0] * len(counts)
        self._silent_polls = [
            silent + 1 if count == before else 0
            for silent, count, before in zip(self._silent_polls, counts, self._counts, strict=True)
        ]
        self._counts = counts
        progress = [heartbeat.progress for heartbeat in heartbeats]
        advanced = progress != self.progress or not all(each.timed for each in progress)
        self._polls_without_progress = 0 if advanced else self._polls_without_progress + 1
        self.progress = progress
        if dead := [rank for rank, silent in enumerate(self._silent_polls) if silent >= SILENT_POLLS]:
            return retryable_failure(f"{rank_names(dead)} sent no heartbeat for {_SILENCE}")
        if self._polls_without_progress * POLL_S >= self.timeout_s:
            return ExitStatus("failed", self._describe_stall(heartbeats), 1)
        return None

    def _describe_stall(self, heartbeats: Sequence[Heartbeat]) -> str:
        furthest = max((heartbeat.progress for heartbeat in heartbeats), key=lambda progress: progress.phase_changes)
        late = [r for r, each in enumerate(heartbeats) if each.progress.phase_changes < furthest.phase_changes]
        if not late:  # all ranks are in the same phase: ranks outside of a collective are late
            late = [rank for rank, heartbeat in enumerate(heartbeats) if not heartbeat.in_collective]
        limit = f"runtime.phase_timeout_s={self.timeout_s:g} (seconds; at least 1800 while loading)"
        fix = "increase runtime.phase_timeout_s if this phase can take longer"
        if not late or len(late) == len(heartbeats):
            return f"no rank made progress in {_phase_name(furthest)} for {limit}: {fix}"
        phases = " and ".join(sorted({_phase_name(heartbeats[rank].progress) for rank in late}))
        return (
            f"{phases} made no progress for {limit}: {rank_names(late)} of {len(heartbeats)} did not reach"
            f" {_phase_name(furthest)}, in which the other ranks wait; {fix}"
        )


def rank_names(ranks: Sequence[int]) -> str:
    """Return ``ranks`` as text, ``rank 3`` or ``ranks 3, 5``; at most 20 rank numbers are listed."""
    text = ", ".join(map(str, ranks[:20])) + (f" and {len(ranks) - 20} more" if len(ranks) > 20 else "")
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


def _phase_name(progress: Progress) -> str:
    return f"{progress.phase} of step {progress.step}" if progress.step else progress.phase


def _parse_announcement(text: str) -> ExitStatus:
    _, status = json.loads(text)
    return ExitStatus(*status)


def _in_thread(call: Callable[[], T]) -> Future[T]:
    """Run ``call`` in a new thread, so that the caller can wait for the result with a timeout."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="watchdog store call", daemon=True).start()
    return future


class Watchdog:
    """Watchdog thread of this rank. All ranks create a watchdog and call ``start`` at the same point.

    ``store``: the rendezvous store. ``end_process``: function that ends the process with the given exit status; the
    watchdog thread calls it. ``launcher_error``: returns an error message if the launcher has ended, else None.
    ``holds_store``: whether this process serves the store, which then closes when this process exits.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        end_process: Callable[[ExitStatus], None],
        launcher_error: Callable[[], str | None] = lambda: None,
        holds_store: bool = False,
    ) -> None:
        self._store = dist.PrefixStore("watchdog", store.clone())  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=2 * _STORE_TIMEOUT_S))
        self._rank, self._size = rank, size
        self.holds_store = holds_store and size > 1
        self._end_process = end_process
        self._launcher_error = launcher_error
        self._neighbours: Mapping[int, _Process] = {}
        self._count = 0
        self._main_count = -1
        self._main_silent_polls = 0
        self.detector = FailureDetector(timeout_s=float("inf"))
        self._pending: Future[list[bytes]] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self, barrier: Callable[[], None]) -> None:
        """Send this process's host and process id to other ranks, and start the watchdog thread; collective.

        ``barrier``: function that returns when all ranks have called it.
        """
        if self._rank == 0:
            self._store.set("exit", _NO_STATUS)
        self._store.set(f"process/{self._rank}", json.dumps(_Process.current()))
        self._send_heartbeat()
        barrier()
        replies = self._store.multi_get([f"process/{rank}" for rank in range(self._size)])
        processes = [_Process(*json.loads(text)) for text in replies]
        host = processes[self._rank].host
        self._neighbours = {r: p for r, p in enumerate(processes) if p.host == host and r != self._rank}
        self._thread.start()

    def progress_of_ranks(self) -> list[Progress]:
        """Return the progress of all ranks, by rank: of this process now, of other ranks as last received.

        Call it on rank 0 only, which receives the heartbeats of all ranks.
        """
        return [CURRENT, *self.detector.progress[1:]]

    def stop(self) -> None:
        """Stop the watchdog thread, so that ranks that exit from now on are not reported as failed."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(_STORE_TIMEOUT_S + POLL_S)

    def announce(self, status: ExitStatus) -> tuple[ExitStatus, bool]:
        """Announce ``status`` to all ranks as the exit status of the run.

        All ranks exit with the status that was announced first. Returns this status, and whether this rank announced
        it.
        """
        message = json.dumps([self._rank, status])
        call = _in_thread(lambda: self._store.compare_set("exit", _NO_STATUS, message))
        try:
            first = call.result(_STORE_TIMEOUT_S).decode()
        except _STORE_ERRORS:  # the store's host is dead or frozen, which the other ranks detect themselves
            return status, True
        return _parse_announcement(first), first == message

    def dead_neighbour(self) -> ExitStatus | None:
        """Return an exit status if another rank on this host has died, else None."""
        dead = [rank for rank, process in self._neighbours.items() if not process.is_alive()]
        if not dead:
            return None
        host = socket.gethostname()
        return retryable_failure(f"{rank_names(dead)} on {host} exited without reporting a status (killed or crashed)")

    def _run(self) -> None:
        failing_s = 0.0
        while not self._stopped.wait(POLL_S):
            began = time.monotonic()
            try:
                status = self._poll()
                failing_s = 0.0
            except _STORE_ERRORS as error:
                # min() excludes time in which the machine was suspended.
                failing_s += POLL_S + min(time.monotonic() - began, _STORE_TIMEOUT_S)
                status = self.dead_neighbour()  # maybe rank 0, which held the store
                if status is None and failing_s >= SILENT_POLLS * POLL_S:
                    status = _store_failure(error)
            if status is not None and not self._stopped.is_set():
                self._end_process(status)
                return

    def _poll(self) -> ExitStatus | None:
        """Exchange heartbeats once; return an exit status if the run must end, else None.

        Raises one of _STORE_ERRORS if the rendezvous store fails.
        """
        if message := self._launcher_error():
            return self.announce(retryable_failure(message))[0]
        announced, *messages = self._exchange()
        if announced.decode() != _NO_STATUS:
            return _parse_announcement(announced.decode())
        if status := self.dead_neighbour():
            return self.announce(status)[0]
        heartbeats = [Heartbeat.parse(message) for message in messages]
        found = self.detector.poll(heartbeats) if self._rank == 0 else self._check_main(heartbeats[0])
        return None if found is None else self.announce(found)[0]

    def _exchange(self) -> list[bytes]:
        """Run ``_send_and_read`` in another thread and return its result.

        Raises TimeoutError if the store does not reply within _STORE_TIMEOUT_S seconds. The next call then waits for
        the same reply.
        """
        pending = self._pending or _in_thread(self._send_and_read)
        self._pending = pending
        try:
            return pending.result(_STORE_TIMEOUT_S)
        finally:
            if pending.done():
                self._pending = None

    def _send_and_read(self) -> list[bytes]:
        """Send a heartbeat; return the announced exit status and the heartbeats that this rank checks.

        Rank 0 checks the heartbeats of all ranks, other ranks only that of rank 0.
        """
        self._send_heartbeat()
        ranks = range(self._size) if self._rank == 0 else [0]
        return self._store.multi_get(["exit", *(f"heartbeat/{rank}" for rank in ranks)])

    def _send_heartbeat(self) -> None:
        self._count += 1
        self._store.set(f"heartbeat/{self._rank}", Heartbeat(self._count, CURRENT, in_collective()).text())

    def _check_main(self, heartbeat: Heartbeat) -> ExitStatus | None:
        self._main_silent_polls = self._main_silent_polls + 1 if heartbeat.count == self._main_count else 0
        self._main_count = heartbeat.count
        if self._main_silent_polls < SILENT_POLLS:
            return None
        return retryable_failure(f"rank 0 sent no heartbeat for {_SILENCE}")


def _store_failure(error: Exception) -> ExitStatus:
    if isinstance(error, TimeoutError | dist.DistStoreError):  # only some of the store's calls have a timeout
        return retryable_failure(f"the rendezvous store of rank 0 or its launcher did not reply for {_SILENCE}")
    return retryable_failure(
        f"the rendezvous store of rank 0 or its launcher disconnected ({str(error).splitlines()[0]})"
    )


class _Process(NamedTuple):
    """Identity of a rank's process; ranks on the same host use it to detect that the process has ended."""

    host: str
    """Host name and PID namespace of the process; process ids are comparable only if both are equal."""
    pid: int
    start_ticks: str
    """Start time of the process in clock ticks after the boot; empty if unknown."""

    @classmethod
    def current(cls) -> _Process:
        """Return the identity of the calling process."""
        try:
            namespace = os.readlink("/proc/self/ns/pid")
        except OSError:
            namespace = f"unknown to {os.getpid()}"
        return cls(f"{socket.gethostname()} {namespace}", os.getpid(), _start_ticks(os.getpid()) or "")

    def is_alive(self) -> bool:
        """Return whether the process is running; True if its start time is unknown."""
        return not self.start_ticks or _start_ticks(self.pid) == self.start_ticks


def _start_ticks(pid: int) -> str | None:
    """Return the start time of process ``pid`` in clock ticks; None if it has exited or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
