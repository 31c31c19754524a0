"""What the watch makes of the ranks' signs of life."""

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
from distill.supervise.watchdog import POLL_S, SILENT_POLLS, Beat, FailureDetector, Watchdog
from scripts.launch import ROOT


def _looks(
    roll: FailureDetector, number: int, places: Sequence[Progress], waits: Sequence[int] = (), dead: Sequence[int] = ()
) -> list[ExitStatus | None]:
    """What ``number`` looks find, at ranks that live in these places but for the dead."""
    counts = getattr(roll, "test_counts", [0] * len(places))
    found = []
    for _ in range(number):
        counts = [count + (rank not in dead) for rank, count in enumerate(counts)]
        beats = [Beat(counts[rank], where, rank in waits) for rank, where in enumerate(places)]
        found.append(roll.read([Beat.parse(beat.text().encode()) for beat in beats]))
    roll.test_counts = counts  # type: ignore[attr-defined]
    return found


GENERATION = Progress(number=7, phase="generation", step=3, done=40)
VIEWS = Progress(number=10, phase="data_processing: making the teacher's views", step=3, done=90)
TIMEOUT = 6 * POLL_S


def test_a_phase_without_progress_ends_the_run_and_names_the_ranks_that_are_behind() -> None:
    roll = FailureDetector(TIMEOUT)
    found = _looks(roll, 7, [VIEWS, GENERATION, VIEWS])
    assert found[:6] == [None] * 6 and found[6] is not None
    assert found[6].state == "failed" and found[6].exit_code == 1
    assert found[6].reason == (
        "generation of step 3 made no progress for 12 s (runtime.phase_timeout_s): rank 1 of 3 did not arrive where the"
        " others wait, in data_processing: making the teacher's views of step 3"
    )


def test_a_phase_that_goes_on_may_take_for_ever_and_those_who_wait_for_it_too() -> None:
    roll, slow = FailureDetector(TIMEOUT), GENERATION
    for _ in range(20):
        slow = dataclasses.replace(slow, done=slow.done + 1)
        assert _looks(roll, 6, [VIEWS, slow]) == [None] * 6


def test_what_has_no_limit_has_none() -> None:
    download = dataclasses.replace(GENERATION, timed=False)
    assert _looks(FailureDetector(TIMEOUT), 50, [VIEWS, download]) == [None] * 50


def test_in_one_phase_the_ranks_that_wait_for_nobody_are_named() -> None:
    *_, found = _looks(FailureDetector(TIMEOUT), 7, [GENERATION] * 3, waits=[0, 2])
    assert found is not None and "rank 1 of 3 did not arrive" in found.reason
    for waits in ([], [0, 1, 2]):
        *_, found = _looks(FailureDetector(TIMEOUT), 7, [GENERATION] * 3, waits=waits)
        assert found is not None and found.reason.startswith("no rank made progress in generation of step 3 for 12 s")


def test_a_silent_rank_is_gone_and_one_that_speaks_again_is_not() -> None:
    roll, moving = FailureDetector(1e9), [GENERATION, VIEWS]
    assert _looks(roll, SILENT_POLLS, moving, dead=[1]) == [None] * SILENT_POLLS
    assert _looks(roll, 1, moving) == [None]
    *before, found = _looks(roll, SILENT_POLLS, moving, dead=[1])
    assert before == [None] * (SILENT_POLLS - 1)
    assert found is not None and found.reason == "rank 1 gave no sign of life for 40 s"


def test_silence_ends_a_run_within_a_minute() -> None:
    assert (SILENT_POLLS + 2) * POLL_S < 60


def test_phases_are_numbered_and_named_with_the_parts_that_they_have() -> None:
    progress.CURRENT.__init__()  # type: ignore[misc]
    seen = []
    with progress.phase("generation"):
        seen.append((progress.CURRENT.number, progress.CURRENT.phase))
        with progress.phase("waking the engine", timed=False):
            seen.append((progress.CURRENT.number, progress.CURRENT.phase))
            assert not progress.CURRENT.timed
        seen.append((progress.CURRENT.number, progress.CURRENT.phase))
    seen.append((progress.CURRENT.number, progress.CURRENT.phase))
    with progress.phase("training"):
        seen.append((progress.CURRENT.number, progress.CURRENT.phase))
    assert progress.CURRENT.timed
    assert seen == [
        (1, "generation"),
        (2, "generation: waking the engine"),
        (3, "generation"),
        (4, "after generation"),
        (5, "training"),
    ]


def test_the_first_word_holds_and_reaches_the_others() -> None:
    store = dist.HashStore()
    left: list[list[ExitStatus]] = [[], []]
    watches = [Watchdog(store, rank, 2, left[rank].append) for rank in range(2)]
    watches[0]._store.set("end", "-")
    first, second = ExitStatus("failed", "rank 1: broken", 1), ExitStatus("failed", "rank 0 is gone", 1)
    assert watches[1].announce(first) == (first, True)
    assert watches[0].announce(second) == (first, False)
    assert watches[0].announce(first) == (first, False), "the same words of another rank"
    for each in watches:
        each._beat()
    assert [each._look() for each in watches] == [first, first]


def test_a_neighbour_that_was_killed_is_missed_at_the_next_look() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    began = watchdog._began(child.pid)
    assert began is not None
    process = watchdog._Process("here", child.pid, began)
    assert process.lives()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie, which nobody has fetched yet
    assert not process.lives()
    child.wait()
    assert not process.lives()
    assert not watchdog._Process("here", os.getpid(), "1").lives(), "another process of the same number"


KEEPER = """
import torch.distributed as dist

store = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
print(store.port, flush=True)
input()
"""


@pytest.fixture
def keeper() -> Iterator[tuple[subprocess.Popen[str], dist.Store]]:
    """A process that keeps a store, and a connection to it."""
    command = [sys.executable, "-c", KEEPER]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        yield process, dist.TCPStore("127.0.0.1", int(process.stdout.readline()), 2, False)
    finally:
        process.kill()
        process.wait()


def _freeze(process: subprocess.Popen[str]) -> None:
    """Stop a process, and come back when it stands still: the signal alone takes effect a little later."""
    process.send_signal(signal.SIGSTOP)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)


def test_a_store_that_freezes_holds_nobody(keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is there, and so is its connection, but nothing comes back: as from a machine without power."""
    process, store = keeper
    monkeypatch.setattr(watchdog, "POLL_S", 0.1)
    ended: list[ExitStatus] = []
    left = threading.Event()

    def leave(ending: ExitStatus) -> None:
        ended.append(ending)
        left.set()

    watching = Watchdog(store, 1, 2, leave)
    store.set("watch/end", "-")
    store.set("watch/beat/0", Beat(0, GENERATION, False).text())
    store.set("watch/process/0", '["another host", 1, ""]')
    watching.start(lambda: None)
    _freeze(process)
    monkeypatch.setattr(watchdog, "_STORE_S", 0.3)  # of a store that is busy, a machine that is busy may make more
    announced: list[tuple[ExitStatus, bool]] = []
    mine = ExitStatus("stopped", "SIGTERM", 0)
    announcing = threading.Thread(target=lambda: announced.append(watching.announce(mine)), daemon=True)
    announcing.start()
    assert left.wait(60), "the watch waits for ever"
    assert [ending.reason for ending in ended] == ["rank 0, or whoever holds the rendezvous, gave no answer for 2 s"]
    assert ended[0].lost and ended[0].exit_code == 1
    announcing.join(60)
    assert announced == [(mine, True)], "nor does he wait who has something to say"


def test_a_store_that_comes_back_is_forgiven(keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Suspended and woken, as with a whole machine: the same question is answered, late, and none is asked twice."""
    process, store = keeper
    watching = Watchdog(store, 1, 2, lambda ending: None)
    monkeypatch.setattr(watchdog, "_STORE_S", 0.1)
    store.set("watch/end", "-")
    store.set("watch/beat/0", Beat(0, GENERATION, False).text())
    asked = threading.Event()
    hear = watching._beat_and_hear

    def counted() -> list[bytes]:
        asked.set()
        return hear()

    watching._beat_and_hear = counted  # type: ignore[method-assign]
    _freeze(process)
    with pytest.raises(TimeoutError):
        watching._heard()
    assert asked.wait(60)
    asked.clear()
    for _ in range(2):
        with pytest.raises(TimeoutError):
            watching._heard()
        assert not asked.is_set(), "one question at a time"
    process.send_signal(signal.SIGCONT)
    monkeypatch.setattr(watchdog, "_STORE_S", 60.0)
    assert watching._look() is None and not asked.is_set()
    assert watching._look() is None and asked.is_set()


@pytest.mark.parametrize(
    ("words", "is_lost"),
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
def test_what_tells_of_a_lost_rank_and_what_of_a_fault_of_the_program(words, is_lost) -> None:
    assert is_connection_loss(RuntimeError(words)) is is_lost
