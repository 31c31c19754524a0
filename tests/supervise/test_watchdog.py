"""Watchdog: failures that ranks detect from each other's heartbeats."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

import pytest
import torch.distributed as dist

from distill.distributed.program import is_connection_loss
from distill.supervise import progress, watchdog
from distill.supervise.progress import Progress
from distill.supervise.status import ExitStatus
from distill.supervise.watchdog import POLL_S, SILENT_POLLS, FailureDetector, Heartbeat, Watchdog
from scripts.launch import ROOT


class Ranks:
    """Heartbeats of a few ranks for a failure detector, poll by poll."""

    def __init__(self, timeout_s: float) -> None:
        self.detector = FailureDetector(timeout_s)
        self._counts: dict[int, int] = {}

    def poll(
        self, polls: int, progress: Sequence[Progress], waiting: Sequence[int] = (), dead: Sequence[int] = ()
    ) -> list[ExitStatus | None]:
        """Return the results of ``polls`` polls with this progress of each rank; ``dead`` ranks send no heartbeat."""
        found = []
        for _ in range(polls):
            beats = []
            for rank, each in enumerate(progress):
                self._counts[rank] = self._counts.get(rank, 0) + (rank not in dead)
                beats.append(Heartbeat(self._counts[rank], each, rank in waiting))
            found.append(self.detector.poll([Heartbeat.parse(beat.text().encode()) for beat in beats]))
        return found


GENERATION = Progress(phase_changes=7, phase="generation", step=3, work_units=40)
BATCHING = Progress(phase_changes=10, phase="batching: adding prefixes", step=3, work_units=90)
TIMEOUT = 6 * POLL_S


def test_a_phase_without_progress_ends_the_run_and_names_the_ranks_that_are_behind() -> None:
    found = Ranks(TIMEOUT).poll(7, [BATCHING, GENERATION, BATCHING])
    assert found[:6] == [None] * 6 and found[6] is not None
    assert (found[6].state, found[6].exit_code, found[6].retryable) == ("failed", 1, False)
    reason = found[6].reason
    assert reason.startswith("generation of step 3 ") and "runtime.phase_timeout_s=12 " in reason
    assert ": rank 1 of 3 " in reason and "batching: adding prefixes of step 3" in reason


def test_a_phase_with_progress_has_no_time_limit_and_neither_have_ranks_that_wait_for_it() -> None:
    ranks, slow = Ranks(TIMEOUT), GENERATION
    for _ in range(20):
        slow = dataclasses.replace(slow, work_units=slow.work_units + 1)
        assert ranks.poll(6, [BATCHING, slow]) == [None] * 6


def test_an_untimed_phase_has_no_time_limit() -> None:
    download = dataclasses.replace(GENERATION, timed=False)
    assert Ranks(TIMEOUT).poll(50, [BATCHING, download]) == [None] * 50


def test_in_one_phase_the_ranks_outside_of_a_collective_are_named() -> None:
    *_, found = Ranks(TIMEOUT).poll(7, [GENERATION] * 3, waiting=[0, 2])
    assert found is not None and "rank 1 of 3" in found.reason
    for waiting in ([], [0, 1, 2]):
        *_, found = Ranks(TIMEOUT).poll(7, [GENERATION] * 3, waiting=waiting)
        assert found is not None and "rank 1" not in found.reason and "generation of step 3" in found.reason


def test_a_rank_without_heartbeats_is_dead_unless_they_return() -> None:
    ranks, both = Ranks(1e9), [GENERATION, BATCHING]
    assert ranks.poll(SILENT_POLLS, both, dead=[1]) == [None] * SILENT_POLLS
    assert ranks.poll(1, both) == [None]
    *before, found = ranks.poll(SILENT_POLLS, both, dead=[1])
    assert before == [None] * (SILENT_POLLS - 1)
    assert found is not None and found.retryable and found.reason.startswith("rank 1 ")


def test_a_rank_without_heartbeats_ends_the_run_within_a_minute() -> None:
    assert (SILENT_POLLS + 2) * POLL_S < 60


def test_phases_are_counted_and_nested_phases_are_named_with_the_outer_one() -> None:
    progress.CURRENT.__init__()  # type: ignore[misc]
    seen = []

    def look() -> None:
        seen.append((progress.CURRENT.phase_changes, progress.CURRENT.phase))

    with progress.phase("generation"):
        look()
        with progress.phase("loading weights", timed=False):
            look()
            assert not progress.CURRENT.timed
        look()
    look()
    with progress.phase("training"):
        look()
    assert progress.CURRENT.timed
    assert seen == [
        (1, "generation"),
        (2, "generation: loading weights"),
        (3, "generation"),
        (4, "after generation"),
        (5, "training"),
    ]


def test_all_ranks_exit_with_the_first_announced_status() -> None:
    store = dist.HashStore()
    watchdogs = [Watchdog(store, rank, 2, lambda status: None) for rank in range(2)]
    watchdogs[0]._store.set("exit", "-")
    first, second = ExitStatus("failed", "rank 1: broken", 1), ExitStatus("failed", "rank 0: broken", 1)
    assert watchdogs[1].announce(first) == (first, True)
    assert watchdogs[0].announce(second) == (first, False)
    assert watchdogs[0].announce(first) == (first, False), "the same status, announced by another rank"
    for each in watchdogs:
        each._send_heartbeat()
    assert [each._poll() for each in watchdogs] == [first, first]


def test_the_end_of_the_launcher_ends_the_run() -> None:
    store = dist.HashStore()
    watching = Watchdog(store, 1, 2, lambda status: None, launcher_error=lambda: "the launcher ended")
    store.set("watchdog/exit", "-")
    assert watching._poll() == ExitStatus("failed", "the launcher ended", 1, retryable=True)


def test_a_killed_rank_of_the_same_host_is_detected_at_the_next_poll() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = watchdog._start_ticks(child.pid)
    assert start is not None
    process = watchdog._Process("here", child.pid, start)
    assert process.is_alive()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # leaves a zombie
    assert not process.is_alive()
    child.wait()
    assert not process.is_alive()
    assert not watchdog._Process("here", os.getpid(), "1").is_alive(), "another process with the same pid"


STORE_HOST = """
import torch.distributed as dist

store = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
print(store.port, flush=True)
input()
"""


@pytest.fixture
def store_host() -> Iterator[tuple[subprocess.Popen[str], dist.Store]]:
    """A process that hosts a store, and a connection to it."""
    command = [sys.executable, "-c", STORE_HOST]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        yield process, dist.TCPStore("127.0.0.1", int(process.stdout.readline()), 2, False)
    finally:
        process.kill()
        process.wait()


def _freeze(process: subprocess.Popen[str]) -> None:
    """Stop a process, and return when it has stopped: the signal takes effect a little later."""
    process.send_signal(signal.SIGSTOP)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)


def test_ranks_exit_when_the_store_freezes(store_host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection stays open but no reply comes, as from a machine without power."""
    process, store = store_host
    monkeypatch.setattr(watchdog, "POLL_S", 0.1)
    ended: list[ExitStatus] = []
    has_ended = threading.Event()

    def end_process(status: ExitStatus) -> None:
        ended.append(status)
        has_ended.set()

    watching = Watchdog(store, 1, 2, end_process)
    store.set("watchdog/exit", "-")
    store.set("watchdog/heartbeat/0", Heartbeat(0, GENERATION, False).text())
    store.set("watchdog/process/0", '["another host", 1, ""]')
    watching.start(lambda: None)
    _freeze(process)
    monkeypatch.setattr(
        watchdog, "_STORE_TIMEOUT_S", 0.3
    )  # not earlier: a busy machine takes longer for the calls above
    announced: list[tuple[ExitStatus, bool]] = []
    status = ExitStatus("stopped", "SIGTERM", 0)
    announcing = threading.Thread(target=lambda: announced.append(watching.announce(status)), daemon=True)
    announcing.start()
    assert has_ended.wait(60)
    assert [status.exit_code for status in ended] == [1] and ended[0].retryable and "rank 0" in ended[0].reason
    announcing.join(60)
    assert announced == [(status, True)], "announcing has a timeout too"


def test_a_store_that_replies_again_in_time_ends_nothing(store_host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is suspended and continues, as on a suspended machine: the pending call gets its reply, late."""
    process, store = store_host
    watching = Watchdog(store, 1, 2, lambda status: None)
    monkeypatch.setattr(watchdog, "_STORE_TIMEOUT_S", 0.1)
    store.set("watchdog/exit", "-")
    store.set("watchdog/heartbeat/0", Heartbeat(0, GENERATION, False).text())
    called = threading.Event()
    send_and_read = watching._send_and_read

    def counted() -> list[bytes]:
        called.set()
        return send_and_read()

    watching._send_and_read = counted  # type: ignore[method-assign]
    _freeze(process)
    with pytest.raises(TimeoutError):
        watching._exchange()
    assert called.wait(60)
    called.clear()
    for _ in range(2):
        with pytest.raises(TimeoutError):
            watching._exchange()
        assert not called.is_set(), "one call at a time"
    process.send_signal(signal.SIGCONT)
    monkeypatch.setattr(watchdog, "_STORE_TIMEOUT_S", 60.0)
    assert watching._poll() is None and not called.is_set()
    assert watching._poll() is None and called.is_set()


@pytest.mark.parametrize(
    ("message", "is_retryable"),
    [
        ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:22431", True),
        ("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?", True),
        ("Application timeout caused pair closure", True),
        ("NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27", True),
        ("ncclRemoteError: A call failed possibly due to a network error or a remote process exiting", True),
        ("CUDA error: uncorrectable ECC error encountered", True),
        ("Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000", False),
        ("libnccl.so.2: cannot open shared object file", False),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("index 5 is out of bounds for dimension 0 with size 0", False),
    ],
)
def test_a_failed_peer_or_device_is_retryable_and_an_error_of_the_program_is_not(message, is_retryable) -> None:
    assert is_connection_loss(RuntimeError(message)) is is_retryable
