"""Every rank watched by a thread of its own: who is gone, who stands still, and who has said that he leaves.

The ranks tell each other over the rendezvous's store, with a connection of the thread's own, so it works while all
main threads sit in a collective for ever.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from distill.runtime.place import HERE, Place, waits_for_others
from distill.runtime.status import Ending

log = logging.getLogger(__name__)

POLL_S = 2.0
SILENT_POLLS = 20
"""Looks without a sign of life after which a rank counts as gone: 40 s. Looks are counted, not seconds, so that a job
that was suspended whole, or a machine that is out of breath, is not taken for dead."""
_STORE_TIMEOUT = timedelta(seconds=10)
_NOBODY = "-"


@dataclass(frozen=True)
class Beat:
    """A sign of life."""

    count: int
    place: Place
    waits: bool
    """Whether the rank waits for others."""

    @classmethod
    def parse(cls, text: bytes) -> Beat:
        """Of what ``text`` made."""
        count, place, waits = json.loads(text)
        return cls(count, Place(**place), waits)

    def text(self) -> str:
        """As the store has it."""
        return json.dumps([self.count, asdict(self.place), self.waits])


class Roll:
    """The main rank's judgement of everyone's beats, look by look; it knows no clock.

    ``timeout_s``: of a phase in which no rank makes progress.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._counts: list[int] = []
        self._silent: list[int] = []
        self._places: list[Place] = []
        self._still = 0

    def read(self, beats: Sequence[Beat]) -> Ending | None:
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
            return Ending("failed", f"{_ranks(gone)} gave no sign of life for {SILENT_POLLS * POLL_S:g} s", 1)
        if self._still * POLL_S >= self.timeout_s:
            return Ending("failed", self._stands_still(beats), 1)
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
            f"{where} made no progress for {self.timeout_s:g} s (runtime.phase_timeout_s): {_ranks(late)} of"
            f" {len(beats)} did not arrive where the others wait, in {_name(furthest)}"
        )


def _name(place: Place) -> str:
    return f"{place.phase} of step {place.step}" if place.step else place.phase


def _ranks(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:20])) + (f" and {len(ranks) - 20} more" if len(ranks) > 20 else "")
    return f"rank {named}" if len(ranks) == 1 else f"ranks {named}"


class Watch:
    """The watching thread of this rank.

    ``store``: the rendezvous's; ``leave`` ends the process and is called in the thread; ``parent``: the process whose
    end this one may not outlive, None for no matter whose. All ranks make it and call ``start`` at the same point.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, leave: Callable[[Ending], None], parent: int | None = None
    ) -> None:
        self._store = dist.PrefixStore("watch", store.clone())  # type: ignore[attr-defined]
        self._store.set_timeout(_STORE_TIMEOUT)
        self._rank, self._size = rank, size
        self.holds_store = rank == 0 and size > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        """Whether the store ends with this process."""
        self._leave = leave
        self._parent = parent
        self._neighbours: Mapping[int, _Process] = {}
        self._count = 0
        self._mains = -1
        self._unheard = 0
        self.roll = Roll(timeout_s=float("inf"))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self, barrier: Callable[[], None]) -> None:
        """Tell the others of this rank, and watch; ``barrier``: returns when all ranks came there."""
        if self._rank == 0:
            self._store.set("end", _NOBODY)
        self._store.set(f"process/{self._rank}", json.dumps(_Process.this()))
        self._beat()
        barrier()
        processes = [
            _Process(*json.loads(text))
            for text in self._store.multi_get([f"process/{rank}" for rank in range(self._size)])
        ]
        here = processes[self._rank].host
        self._neighbours = {r: p for r, p in enumerate(processes) if p.host == here and r != self._rank}
        self._thread.start()

    def stop(self) -> None:
        """Watch no more: from here on ranks may end in any order."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(_STORE_TIMEOUT.total_seconds())

    def announce(self, ending: Ending) -> Ending:
        """Tell all ranks that this one leaves, and that they must; the ending that was told first, which holds."""
        try:
            first = self._store.compare_set("end", _NOBODY, json.dumps(ending))
        except (dist.DistError, RuntimeError):  # whoever holds the store is gone: the others see that too
            return ending
        return Ending(*json.loads(first))

    def _run(self) -> None:
        failures = 0.0
        while not self._stopped.wait(POLL_S):
            began = time.monotonic()
            try:
                ending = self._look()
                failures = 0.0
            except (dist.DistError, RuntimeError) as error:
                failures += POLL_S + time.monotonic() - began
                # Who held the store may be known to be dead.
                ending = self._missed() or (self._lost(error) if failures >= SILENT_POLLS * POLL_S else None)
            if ending is not None and not self._stopped.is_set():
                self._leave(ending)
                return

    def _lost(self, error: Exception) -> Ending:
        return Ending("failed", f"rank 0, or whoever held the rendezvous, is gone ({str(error).splitlines()[0]})", 1)

    def _look(self) -> Ending | None:
        if self._parent is not None and os.getppid() != self._parent:
            reason = f"the launcher (process {self._parent}) of rank {self._rank} ended"
            return self.announce(Ending("failed", reason, 1))
        self._beat()
        ranks = range(self._size) if self._rank == 0 else [0]
        end, *beats = self._store.multi_get(["end", *(f"beat/{rank}" for rank in ranks)])
        if end.decode() != _NOBODY:
            return Ending(*json.loads(end))
        if missed := self._missed():
            return self.announce(missed)
        found = [Beat.parse(beat) for beat in beats]
        ending = self.roll.read(found) if self._rank == 0 else self._main_lives(found[0])
        return None if ending is None else self.announce(ending)

    def _missed(self) -> Ending | None:
        """Why to leave where a rank of this host is dead."""
        dead = [rank for rank, process in self._neighbours.items() if not process.lives()]
        if not dead:
            return None
        return Ending("failed", f"{_ranks(dead)} on {socket.gethostname()} died without a word: killed, or crashed", 1)

    def _beat(self) -> None:
        self._count += 1
        self._store.set(f"beat/{self._rank}", Beat(self._count, HERE, waits_for_others()).text())

    def _main_lives(self, beat: Beat) -> Ending | None:
        self._unheard = self._unheard + 1 if beat.count == self._mains else 0
        self._mains = beat.count
        if self._unheard < SILENT_POLLS:
            return None
        return Ending("failed", f"rank 0 gave no sign of life for {SILENT_POLLS * POLL_S:g} s", 1)


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
