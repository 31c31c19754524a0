"""What the watch makes of the ranks' signs of life."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence

import torch.distributed as dist

from distill.runtime import place, watch
from distill.runtime.place import Place
from distill.runtime.status import Ending
from distill.runtime.watch import POLL_S, SILENT_POLLS, Beat, Roll, Watch


def _looks(
    roll: Roll, number: int, places: Sequence[Place], waits: Sequence[int] = (), dead: Sequence[int] = ()
) -> list[Ending | None]:
    """What ``number`` looks find, at ranks that live in these places but for the dead."""
    counts = getattr(roll, "test_counts", [0] * len(places))
    found = []
    for _ in range(number):
        counts = [count + (rank not in dead) for rank, count in enumerate(counts)]
        beats = [Beat(counts[rank], where, rank in waits) for rank, where in enumerate(places)]
        found.append(roll.read([Beat.parse(beat.text().encode()) for beat in beats]))
    roll.test_counts = counts  # type: ignore[attr-defined]
    return found


GENERATION = Place(number=7, phase="generation", step=3, done=40)
VIEWS = Place(number=10, phase="data_processing: making the teacher's views", step=3, done=90)
TIMEOUT = 6 * POLL_S


def test_a_phase_without_progress_ends_the_run_and_names_the_ranks_that_are_behind() -> None:
    roll = Roll(TIMEOUT)
    found = _looks(roll, 7, [VIEWS, GENERATION, VIEWS])
    assert found[:6] == [None] * 6 and found[6] is not None
    assert found[6].state == "failed" and found[6].exit_code == 1
    assert found[6].reason == (
        "generation of step 3 made no progress for 12 s (runtime.phase_timeout_s): rank 1 of 3 did not arrive where the"
        " others wait, in data_processing: making the teacher's views of step 3"
    )


def test_a_phase_that_goes_on_may_take_for_ever_and_those_who_wait_for_it_too() -> None:
    roll, slow = Roll(TIMEOUT), GENERATION
    for _ in range(20):
        slow = dataclasses.replace(slow, done=slow.done + 1)
        assert _looks(roll, 6, [VIEWS, slow]) == [None] * 6


def test_what_has_no_limit_has_none() -> None:
    download = dataclasses.replace(GENERATION, timed=False)
    assert _looks(Roll(TIMEOUT), 50, [VIEWS, download]) == [None] * 50


def test_in_one_phase_the_ranks_that_wait_for_nobody_are_named() -> None:
    *_, found = _looks(Roll(TIMEOUT), 7, [GENERATION] * 3, waits=[0, 2])
    assert found is not None and "rank 1 of 3 did not arrive" in found.reason
    for waits in ([], [0, 1, 2]):
        *_, found = _looks(Roll(TIMEOUT), 7, [GENERATION] * 3, waits=waits)
        assert found is not None and found.reason.startswith("no rank made progress in generation of step 3 for 12 s")


def test_a_silent_rank_is_gone_and_one_that_speaks_again_is_not() -> None:
    roll, moving = Roll(1e9), [GENERATION, VIEWS]
    assert _looks(roll, SILENT_POLLS, moving, dead=[1]) == [None] * SILENT_POLLS
    assert _looks(roll, 1, moving) == [None]
    *before, found = _looks(roll, SILENT_POLLS, moving, dead=[1])
    assert before == [None] * (SILENT_POLLS - 1)
    assert found is not None and found.reason == "rank 1 gave no sign of life for 40 s"


def test_silence_ends_a_run_within_a_minute() -> None:
    assert (SILENT_POLLS + 2) * POLL_S < 60


def test_phases_are_numbered_and_named_with_the_parts_that_they_have() -> None:
    place.HERE.__init__()  # type: ignore[misc]
    seen = []
    with place.doing("generation"):
        seen.append((place.HERE.number, place.HERE.phase))
        with place.doing("waking the engine", timed=False):
            seen.append((place.HERE.number, place.HERE.phase))
            assert not place.HERE.timed
        seen.append((place.HERE.number, place.HERE.phase))
    seen.append((place.HERE.number, place.HERE.phase))
    with place.doing("training"):
        seen.append((place.HERE.number, place.HERE.phase))
    assert place.HERE.timed
    assert seen == [
        (1, "generation"),
        (2, "generation: waking the engine"),
        (3, "generation"),
        (4, "after generation"),
        (5, "training"),
    ]


def test_the_first_word_holds_and_reaches_the_others() -> None:
    store = dist.HashStore()
    left: list[list[Ending]] = [[], []]
    watches = [Watch(store, rank, 2, left[rank].append) for rank in range(2)]
    watches[0]._store.set("end", "-")
    first, second = Ending("failed", "rank 1: broken", 1), Ending("failed", "rank 0 is gone", 1)
    assert watches[1].announce(first) == first
    assert watches[0].announce(second) == first
    for each in watches:
        each._beat()
    assert [each._look() for each in watches] == [first, first]


def test_a_neighbour_that_was_killed_is_missed_at_the_next_look() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    began = watch._began(child.pid)
    assert began is not None
    process = watch._Process("here", child.pid, began)
    assert process.lives()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie, which nobody has fetched yet
    assert not process.lives()
    child.wait()
    assert not process.lives()
    assert not watch._Process("here", os.getpid(), "1").lives(), "another process of the same number"
