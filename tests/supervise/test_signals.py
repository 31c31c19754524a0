"""Stop signals and the time limit of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from distill.supervise.signals import SAME_REQUEST_S, SIGNALS, Deadline, StopSignals, seconds_of
from scripts.launch import ROOT


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _recording(clock: Clock, calls: list[str]) -> StopSignals:
    return StopSignals(lambda name: calls.append(f"first {name}"), lambda name: calls.append(f"later {name}"), clock)


def test_duplicates_of_a_signal_are_one_request_and_a_later_signal_is_another() -> None:
    clock, calls = Clock(), list[str]()
    signals = _recording(clock, calls)
    assert signals.requested is None
    signals.handle(signal.SIGUSR1)
    for wait in (0.0, 0.1, SAME_REQUEST_S - 0.1):
        clock.now += wait
        signals.handle(signal.SIGTERM)
    assert calls == ["first SIGUSR1"] and signals.requested == signal.SIGUSR1
    clock.now += SAME_REQUEST_S
    signals.handle(signal.SIGTERM)
    assert calls == ["first SIGUSR1", "later SIGTERM"]


def test_the_main_thread_sees_a_signal_immediately_and_its_late_handler_is_no_second_request() -> None:
    clock, calls = Clock(), list[str]()
    signals = _recording(clock, calls)
    signals.listen()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.requested == signal.SIGUSR1, "before the next line of the main thread"
        clock.now += 60  # the main thread's handler may run long after the signal thread's
        signals._in_main_thread(signal.SIGUSR1, None)
    finally:
        signals.close()
    assert calls == ["first SIGUSR1"]


MAIN_THREAD_HANGS = """
import os, signal, sys, threading, time
from distill.supervise.signals import StopSignals
received = threading.Event()
signals = StopSignals(lambda name: received.set(), lambda name: None)
signals.listen()
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
import ctypes
def wait():
    received.wait(30)
    print("received", signals.requested.name, flush=True)
    os._exit(3)
threading.Thread(target=wait).start()
ctypes.CDLL(None).select(0, None, None, None, None)  # never returns to Python
time.sleep(60)
"""

FORKS = """
import os, signal
from distill.supervise.signals import StopSignals
calls = []
signals = StopSignals(calls.append, calls.append)
signals.listen()
read_end, write_end = os.pipe()
children = []
for _ in range(2):
    children.append(os.fork())
    if children[-1] == 0:
        os.write(write_end, b"x")
        while True:
            signal.pause()
    os.read(read_end, 1)
os.kill(children[0], signal.SIGTERM)
_, code = os.waitpid(children[0], 0)
print(os.waitstatus_to_exitcode(code), signals.requested)
signals.close()  # returns although the second child still holds the inherited socket
os.kill(children[1], signal.SIGKILL)
print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
"""


def _python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_signal_is_received_while_the_main_thread_hangs_in_a_call() -> None:
    found = _python(MAIN_THREAD_HANGS)
    assert (found.returncode, found.stdout) == (3, "received SIGTERM\n"), found.stderr


def test_a_signal_ends_a_forked_child_and_is_no_request_to_its_parent() -> None:
    found = _python(FORKS)
    assert found.stdout.split() == ["-15", "None", "True"], found.stderr


def test_close_restores_the_signal_handlers() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    signals = StopSignals(lambda name: None, lambda name: None)
    signals.listen()
    assert all(signal.getsignal(number) not in before for number in SIGNALS)
    signals.close()
    signals.close()
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(("text", "seconds"), [("00:03:45:00", 13500.0), ("01:00:00:01", 86401.0), (None, None)])
def test_a_time_limit_is_converted_to_seconds(text, seconds) -> None:
    assert seconds_of(text) == seconds


def test_the_deadline_is_near_when_one_more_step_and_its_save_may_end_after_it() -> None:
    clock = Clock()
    deadline = Deadline(1000.0, clock.now, clock)
    assert not deadline.is_near()
    clock.now += 500
    deadline.record(200.0, 0.0)  # no save yet: it is expected to take as long as a step
    assert not deadline.is_near()
    clock.now += 101
    assert deadline.is_near()
    deadline.record(100.0, 50.0)
    assert not deadline.is_near(), "200 s for the step and 50 s for the save end at 851 s"
    clock.now += 150
    assert deadline.is_near()
    assert not Deadline(None, 0.0, clock).is_near()
