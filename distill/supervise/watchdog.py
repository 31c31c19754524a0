"""Every rank watched by a thread of its own: who is gone, who stands still, and who has said that he leaves.

The ranks tell each other over the rendezvous's store, with a connection of the watch's own, so it works while all
main threads sit in a collective for ever. Whoever holds the store may freeze, so nothing waits for its answer without a
limit.
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

from distill.distributed.launcher import launcher, launcher_lives
from distill.distributed.rendezvous import named
from distill.supervise.progress import CURRENT, Progress, waits_for_others
from distill.supervise.status import ExitStatus, lost

log = logging.getLogger(__name__)

POLL_S = 2.0
SILENT_POLLS = 20
"""Looks without a sign of life after which a rank counts as gone: 40 s. Looks are counted, not seconds, so that a job
that was suspended whole, or a machine that is out of breath, is not taken for dead."""
_STORE_S = 8.0
"""How long the store may take for an answer, whose own calls may wait for ever."""
_NOBODY = "-"
_NO_STORE = (dist.DistError, RuntimeError, TimeoutError)
T = TypeVar("T")


@dataclass(frozen=True)
class Beat:
    """A sign of life."""

    count: int
    place: Progress
    waits: bool
    """Whether the rank waits for others."""

    @classmethod
    def parse(cls, text: bytes) -> Beat:
        """Of what ``text`` made."""
        count, place, waits = json.loads(text)
        return cls(count, Progress(**place), waits)

    def text(self) -> str:
        """As the store has it."""
        return json.dumps([self.count, asdict(self.place), self.waits])


class FailureDetector:
    """The main rank's judgement of everyone's beats, look by look; it knows no clock.

    ``timeout_s``: of a phase in which no rank makes progress.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._counts: list[int] = []
        self._silent: list[int] = []
        self._places: list[Progress] = []
        self._still = 0

    def read(self, beats: Sequence[Beat]) -> ExitStatus | None:
        """Look at the beats of all ranks; why the run must end, if it must."""
        counts, places = [beat.count for beat in beats], [beat.place for beat in beats]
        if not self._counts:
            self._counts, self._silent = [-1] * len(beats), [0] * len(beats)
        self._silent = [
            silent + 1 if count == before else 0
            for silent, count, before in zip(self._silent, counts, self._counts, strict=True)
        ]
        self._counts = counts
        moves = places != self._places or not all(place.timed for place in places)
        self._still = 0 if moves else self._still + 1
        self._places = places
        if gone := [rank for rank, silent in enumerate(self._silent) if silent >= SILENT_POLLS]:
            return lost(f"{named(gone)} gave no sign of life for {SILENT_POLLS * POLL_S:g} s")
        if self._still * POLL_S >= self.timeout_s:
            return ExitStatus("failed", self._stands_still(beats), 1)
        return None

    def _stands_still(self, beats: Sequence[Beat]) -> str:
        furthest = max(beats, key=lambda beat: beat.place.number).place
        late = [rank for rank, beat in enumerate(beats) if beat.place.number < furthest.number]
        if not late:  # all are in one phase: some of them waiting, the others not come to where those wait
            late = [rank for rank, beat in enumerate(beats) if not beat.waits]
        if not late or len(late) == len(beats):
            return f"no rank made progress in {_name(furthest)} for {self.timeout_s:g} s (runtime.phase_timeout_s)"
        where = " and ".join(sorted({_name(beats[rank].place) for rank in late}))
        return (
            f"{where} made no progress for {self.timeout_s:g} s (runtime.phase_timeout_s): {named(late)} of"
            f" {len(beats)} did not arrive where the others wait, in {_name(furthest)}"
        )


def _told(end: str) -> ExitStatus:
    """How the run ends, as a rank has told."""
    _, ending = json.loads(end)
    return ExitStatus(*ending)


def _asked(call: Callable[[], T]) -> Future[T]:
    """What a call to the store will answer, if ever: by a thread of its own, that may be given up."""
    future: Future[T] = Future()

    def answer() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=answer, name="watch's store", daemon=True).start()
    return future


def _name(place: Progress) -> str:
    return f"{place.phase} of step {place.step}" if place.step else place.phase


class Watchdog:
    """The watching thread of this rank.

    ``store``: the rendezvous's; ``leave`` ends the process and is called in the thread. All ranks make it and call
    ``start`` at the same point.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, leave: Callable[[ExitStatus], None]) -> None:
        self._store = dist.PrefixStore("watch", store.clone())  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=2 * _STORE_S))
        self._rank, self._size = rank, size
        self.holds_store = rank == 0 and size > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        """Whether the store ends with this process."""
        self._leave = leave
        self._neighbours: Mapping[int, _Process] = {}
        self._count = 0
        self._mains = -1
        self._unheard = 0
        self.roll = FailureDetector(timeout_s=float("inf"))
        self._asking: Future[list[bytes]] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self, meet: Callable[[], None]) -> None:
        """Tell the others of this rank, and watch; ``meet``: returns when all ranks came there."""
        if self._rank == 0:
            self._store.set("end", _NOBODY)
        self._store.set(f"process/{self._rank}", json.dumps(_Process.this()))
        self._beat()
        meet()
        processes = [
            _Process(*json.loads(text))
            for text in self._store.multi_get([f"process/{rank}" for rank in range(self._size)])
        ]
        here = processes[self._rank].host
        self._neighbours = {r: p for r, p in enumerate(processes) if p.host == here and r != self._rank}
        self._thread.start()

    def stop(self) -> None:
        """Watchdog no more: from here on ranks may end in any order."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(_STORE_S + POLL_S)

    def announce(self, ending: ExitStatus) -> tuple[ExitStatus, bool]:
        """Tell all ranks that this one leaves, and that they must; the ending that was told first, which holds, and
        whether that is this rank's.
        """
        mine = json.dumps([self._rank, ending])
        try:
            first = _asked(lambda: self._store.compare_set("end", _NOBODY, mine)).result(_STORE_S).decode()
        except _NO_STORE:  # whoever holds the store is gone or frozen: the others see that too
            return ending, True
        return _told(first), first == mine

    def _run(self) -> None:
        failures = 0.0
        while not self._stopped.wait(POLL_S):
            began = time.monotonic()
            try:
                ending = self._look()
                failures = 0.0
            except _NO_STORE as error:
                # No longer than it waits: what a suspended machine sleeps beside that isn't the store's silence.
                failures += POLL_S + min(time.monotonic() - began, _STORE_S)
                # Who held the store may be known to be dead.
                ending = self.missed() or (self._lost(error) if failures >= SILENT_POLLS * POLL_S else None)
            if ending is not None and not self._stopped.is_set():
                self._leave(ending)
                return

    def _lost(self, error: Exception) -> ExitStatus:
        if isinstance(error, TimeoutError | dist.DistStoreError):  # the store's calls know a limit for a part of them
            return lost(f"rank 0, or whoever holds the rendezvous, gave no answer for {SILENT_POLLS * POLL_S:g} s")
        return lost(f"rank 0, or whoever held the rendezvous, is gone ({str(error).splitlines()[0]})")

    def _look(self) -> ExitStatus | None:
        if not launcher_lives():
            return self.announce(lost(f"the launcher (process {launcher()}) of rank {self._rank} ended"))[0]
        end, *beats = self._heard()
        if end.decode() != _NOBODY:
            return _told(end.decode())
        if missed := self.missed():
            return self.announce(missed)[0]
        found = [Beat.parse(beat) for beat in beats]
        ending = self.roll.read(found) if self._rank == 0 else self._main_lives(found[0])
        return None if ending is None else self.announce(ending)[0]

    def _heard(self) -> list[bytes]:
        """What the others have told, after this rank has; raises TimeoutError, and waits on at the next look."""
        asking = self._asking or _asked(self._beat_and_hear)
        self._asking = asking
        try:
            return asking.result(_STORE_S)
        finally:
            if asking.done():
                self._asking = None

    def _beat_and_hear(self) -> list[bytes]:
        self._beat()
        ranks = range(self._size) if self._rank == 0 else [0]
        return self._store.multi_get(["end", *(f"beat/{rank}" for rank in ranks)])

    def missed(self) -> ExitStatus | None:
        """Why to leave where a rank of this host is dead."""
        dead = [rank for rank, process in self._neighbours.items() if not process.lives()]
        if not dead:
            return None
        return lost(f"{named(dead)} on {socket.gethostname()} died without a word: killed, or crashed")

    def _beat(self) -> None:
        self._count += 1
        self._store.set(f"beat/{self._rank}", Beat(self._count, CURRENT, waits_for_others()).text())

    def _main_lives(self, beat: Beat) -> ExitStatus | None:
        self._unheard = self._unheard + 1 if beat.count == self._mains else 0
        self._mains = beat.count
        if self._unheard < SILENT_POLLS:
            return None
        return lost(f"rank 0 gave no sign of life for {SILENT_POLLS * POLL_S:g} s")


class _Process(NamedTuple):
    """A process as its neighbours know it."""

    host: str
    """Where its number means something: processes of another container see other numbers, as on another host."""
    pid: int
    began: str
    """When, in the kernel's ticks; empty where that can't be known."""

    @classmethod
    def this(cls) -> _Process:
        """The calling one."""
        try:
            space = os.readlink("/proc/self/ns/pid")
        except OSError:
            space = f"unknown to {os.getpid()}"
        return cls(f"{socket.gethostname()} {space}", os.getpid(), _began(os.getpid()) or "")

    def lives(self) -> bool:
        """Whether it still runs."""
        return not self.began or _began(self.pid) == self.began


def _began(pid: int) -> str | None:
    """When process ``pid`` of this host began, in the kernel's ticks; None where it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
