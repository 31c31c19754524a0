"""Requests to stop, and what stands in the status of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distill.supervise.signals import SAME_REQUEST_S, SIGNALS, Deadline, StopSignals, seconds_of
from distill.supervise.status import STATUS_FILE, ExitStatus, Status, read_status
from scripts.launch import ROOT


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_duplicates_of_a_signal_are_one_request_and_a_later_one_is_another() -> None:
    clock, told = Clock(), list[str]()
    signals = StopSignals(lambda name: told.append(f"first {name}"), lambda name: told.append(f"again {name}"), clock)
    assert signals.asked is None
    signals.notice(signal.SIGUSR1)
    for wait in (0.0, 0.1, SAME_REQUEST_S - 0.1):
        clock.now += wait
        signals.notice(signal.SIGTERM)
    assert told == ["first SIGUSR1"] and signals.asked == signal.SIGUSR1
    clock.now += SAME_REQUEST_S
    signals.notice(signal.SIGTERM)
    assert told == ["first SIGUSR1", "again SIGTERM"]


def test_the_main_thread_knows_a_signal_at_once_and_a_late_handler_is_no_second_request() -> None:
    clock, told = Clock(), list[str]()
    signals = StopSignals(lambda name: told.append(f"first {name}"), lambda name: told.append(f"again {name}"), clock)
    signals.listen()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.asked == signal.SIGUSR1, "before another line of the loop runs"
        clock.now += 60  # the thread may hear of it long after, and the main thread long after the thread
        signals._in_main_thread(signal.SIGUSR1, None)
    finally:
        signals.close()
    assert told == ["first SIGUSR1"]


LISTENS = """
import os, signal, subprocess, sys, threading, time
from distill.supervise.signals import StopSignals
heard = threading.Event()
signals = StopSignals(lambda name: heard.set(), lambda name: None)
signals.listen()
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
import ctypes
threading.Thread(target=lambda: (heard.wait(30), print("heard", signals.asked.name, flush=True), os._exit(3))).start()
ctypes.CDLL(None).select(0, None, None, None, None)  # the main thread never comes back to Python
time.sleep(60)
"""

FORKS = """
import os, signal
from distill.supervise.signals import StopSignals
told = []
signals = StopSignals(told.append, told.append)
signals.listen()
ready, tell = os.pipe()
children = []
for _ in range(2):
    children.append(os.fork())
    if children[-1] == 0:
        os.write(tell, b"x")
        while True:
            signal.pause()
    os.read(ready, 1)
os.kill(children[0], signal.SIGTERM)
_, code = os.waitpid(children[0], 0)
print(os.waitstatus_to_exitcode(code), signals.asked)
signals.close()  # though the other child still has what it inherited
os.kill(children[1], signal.SIGKILL)
print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
"""


def _python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_signal_is_heard_while_the_main_thread_is_stuck_in_a_call() -> None:
    found = _python(LISTENS)
    assert (found.returncode, found.stdout) == (3, "heard SIGTERM\n"), found.stderr


def test_a_forked_child_ends_by_a_signal_and_its_parent_does_not_take_it_for_its_own() -> None:
    found = _python(FORKS)
    assert found.stdout.split() == ["-15", "None", "True"], found.stderr


def test_the_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    signals = StopSignals(lambda name: None, lambda name: None)
    signals.listen()
    assert all(signal.getsignal(number) not in before for number in SIGNALS)
    signals.close()
    signals.close()
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(("text", "seconds"), [("00:03:45:00", 13500.0), ("01:00:00:01", 86401.0), (None, None)])
def test_a_time_limit_in_seconds(text, seconds) -> None:
    assert seconds_of(text) == seconds


def test_a_run_stops_where_one_more_step_and_its_save_might_end_too_late() -> None:
    clock = Clock()
    deadline = Deadline(1000.0, clock.now, clock)
    assert not deadline.near()
    clock.now += 500
    deadline.took(200.0, 0.0)  # a save is not known yet, and may last as long as a step
    assert not deadline.near()
    clock.now += 101
    assert deadline.near()
    deadline.took(100.0, 50.0)
    assert not deadline.near(), "200 for the step and 50 for the save end at 851"
    clock.now += 150
    assert deadline.near()
    assert not Deadline(None, 0.0, clock).near()


def test_the_status_says_how_a_run_goes_and_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_STATUS_FILE", str(tmp_path / "elsewhere.json"))
    main, other = Status(main=True), Status(main=False)
    assert read_status(tmp_path / "elsewhere.json")["state"] == "running", "there before a run has a folder"
    for status in (main, other):
        status.begin(tmp_path, 3)
    other.at(4)
    found = read_status(tmp_path / STATUS_FILE)
    assert found == read_status(tmp_path / "elsewhere.json")
    assert (found["state"], found["step"]) == ("running", 3), "the main rank writes"
    main.at(4)
    other.end(ExitStatus("finished", "", 0))
    assert read_status(tmp_path / STATUS_FILE)["state"] == "running"
    main.end(ExitStatus("stopped", "SIGTERM", 0))
    main.end(ExitStatus("failed", "what comes of that", 1))
    found = read_status(tmp_path / STATUS_FILE)
    found.pop("time")
    told = {"state": "stopped", "reason": "SIGTERM", "exit_code": 0, "lost": False}
    assert found == {**told, "began": 3, "step": 4, "saved": 3}, "the first end holds"
    main.at(5)
    assert read_status(tmp_path / STATUS_FILE)["state"] == "stopped", "a main thread that goes on for a moment"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere.json", STATUS_FILE]


def test_what_stands_there_before_is_an_old_end_or_one_of_a_faster_rank(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "elsewhere.json"
    monkeypatch.setenv("DISTILL_STATUS_FILE", str(file))
    file.write_text('{"state": "failed", "reason": "rank 3: broken"}')
    Status(main=True).end(ExitStatus("stopped", "SIGTERM before the first step", 0))
    assert read_status(file)["reason"] == "rank 3: broken"
    os.utime(file, (0, 0))
    Status(main=False)
    assert read_status(file)["state"] == "failed"
    Status(main=True)
    assert read_status(file)["state"] == "running"


def test_a_rank_that_leaves_alone_says_so_unless_an_end_is_known(tmp_path: Path) -> None:
    main, other = Status(main=True), Status(main=False)
    for status in (main, other):
        status.begin(tmp_path, 0)
    other.end(ExitStatus("failed", "rank 1: broken", 1), alone=True)
    assert read_status(tmp_path / STATUS_FILE)["reason"] == "rank 1: broken"
    main.end(ExitStatus("stopped", "SIGTERM before the first step", 0))
    assert read_status(tmp_path / STATUS_FILE)["reason"] == "rank 1: broken", "why the launcher ended the other one"


def test_a_status_that_cannot_be_written_hides_nothing(tmp_path: Path) -> None:
    status = Status(main=True)
    status.begin(tmp_path / "gone", 0)
    status.end(ExitStatus("finished", "", 0))
    assert read_status(tmp_path / "gone" / STATUS_FILE) == {}
    assert os.listdir(tmp_path) == []
