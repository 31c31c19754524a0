"""Progress on the console: heartbeat lines, the progress bar of a terminal, and marked warnings; with a fake clock."""

from __future__ import annotations

import errno
import io
import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from distill.distributed import program
from distill.errors import UserError
from distill.supervise import progress, progress_report
from distill.supervise.logs import console, log_to_console
from distill.supervise.progress import Progress, counted, heartbeat, phase, set_step, task, untimed
from distill.supervise.progress_report import SILENCE_S, ProgressReporter
from distill.supervise.quantities import duration, short_count
from distill.supervise.status import ExitStatus
from distill.supervise.supervisor import Supervisor, exit_process


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Console:
    """Console with a clock; ``wait`` polls the reporter of these ranks once per second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> None:
        self.now, self.stream = 0.0, stream
        self.ranks: list[Progress] = [progress.CURRENT]
        monkeypatch.setattr("sys.stderr", stream)
        self.log = logging.getLogger("distill")
        log_to_console(is_main=True)
        handler = console()
        assert handler is not None
        handler._clock, handler.last_output = lambda: self.now, 0.0
        self.reporter = ProgressReporter(handler, lambda: self.ranks, lambda: self.now)

    def wait(self, seconds: int, each_second: Callable[[], None] = lambda: None) -> list[str]:
        """Return the lines of these seconds without their time of day."""
        start = len(self.stream.getvalue())
        for _ in range(seconds):
            self.now += 1
            each_second()
            self.reporter.poll()
        return [line[9:] for line in self.stream.getvalue()[start:].splitlines()]


@pytest.fixture(autouse=True)
def _fresh_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "CURRENT", Progress())


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch) -> Console:
    return Console(monkeypatch, io.StringIO())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    return Console(monkeypatch, Terminal())


def test_a_long_phase_logs_a_line_before_20_s_of_silence(file: Console) -> None:
    assert SILENCE_S + 1 < 20
    with phase("creating the engine"):
        assert file.wait(46) == [f"creating the engine: {seconds} s so far" for seconds in (14, 29, 44)]
        file.log.info("a line")
        assert len(file.wait(14)) == 0, "the line is output"


def test_a_phase_with_items_shows_percent_tokens_per_second_and_remaining_time(file: Console) -> None:
    set_step(3)
    with phase("generation"), task(512, "responses"):
        file.wait(1)
        lines = file.wait(20, lambda: heartbeat(done=8, tokens=12400))
    assert lines == ["generation of step 3: 22% of 512 responses, 12.4k tok/s, 50 s left"]


def test_items_of_all_ranks_are_added_and_a_rank_that_has_finished_counts_as_complete(file: Console) -> None:
    first = Progress(10, "generation", 3, total=10, done=1, unit="responses", tokens=50)
    other = replace(first, total=30, done=9, tokens=100)
    file.ranks = [first, other]
    file.wait(1)
    file.now += 14
    assert file.wait(1)[-1].startswith("generation of step 3: 25% of 40 responses, 10 tok/s")
    file.ranks = [first, Progress(12, "batching", 3)]
    assert file.wait(15)[-1].startswith("generation of step 3: 78% of 40 responses"), "the rank that is behind"


def test_a_nested_task_ends_and_the_outer_task_continues() -> None:
    with task(4, "responses"):
        heartbeat(done=1, tokens=5)
        with task(2, "tensors"):
            heartbeat(done=2)
        heartbeat(done=1)
        current = progress.CURRENT
        assert (current.total, current.done, current.unit, current.tokens) == (4, 2, "responses", 5)
    assert current is progress.CURRENT and (current.total, current.work_units) == (0, 3)


def test_an_item_is_finished_when_the_next_one_is_requested() -> None:
    with task(3, "micro-batches"):
        assert [progress.CURRENT.done for _ in counted("abc")] == [0, 1, 2] and progress.CURRENT.done == 3


def test_a_terminal_shows_a_bar_which_log_lines_do_not_overwrite(terminal: Console) -> None:
    with phase("generation"), task(4, "responses"):
        heartbeat(done=1)
        terminal.wait(2)
        written = terminal.stream.getvalue()
        assert written.endswith("generation: [######------------------] 25% of 4 responses, 3 s left")
        terminal.log.info("a line")
        assert terminal.stream.getvalue()[len(written) :].startswith("\r\x1b[K")
        assert terminal.stream.getvalue().endswith("a line\n")
    terminal.wait(1)
    assert not terminal.stream.getvalue().endswith("left"), "a short phase has no bar"
    assert terminal.stream.getvalue().count("\n") == 1, "no heartbeat lines"


def test_a_run_continues_after_its_terminal_was_closed(terminal: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write to a closed terminal fails, such as that of a run in the background after a logout."""

    def fail(text: str = "") -> None:
        raise OSError(errno.EIO, "Input/output error")

    with phase("generation"), task(4, "responses"):
        terminal.wait(2)
        monkeypatch.setattr(terminal.stream, "write", fail)
        monkeypatch.setattr(terminal.stream, "flush", fail)
        terminal.log.info("a line")
        terminal.now += 1
        heartbeat(done=1)
        terminal.reporter.poll()
        terminal.log.info("a line after a new bar")
        terminal.reporter.poll()
    terminal.reporter.stop()
    program._print_error("key=1 is wrong")
    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    monkeypatch.setattr("distill.supervise.supervisor.ignore_signals", lambda: None)
    with pytest.raises(SystemExit) as caught:
        exit_process(0)
    assert caught.value.code == 0


def test_the_time_between_two_phases_is_named(file: Console) -> None:
    assert file.wait(15) == ["starting the run: 14 s so far"]
    with phase("finding the models"), untimed():
        assert not progress.CURRENT.timed
        assert file.wait(15) == ["finding the models: 14 s so far"]
    assert progress.CURRENT.timed
    assert file.wait(15) == ["starting the run, after finding the models: 14 s so far"]
    set_step(3)
    with phase("validation"), phase("teacher_comparison"):
        assert file.wait(15) == ["validation: teacher comparison of step 3: 14 s so far"]
    assert file.wait(15) == ["step 3, after validation: 14 s so far"]


def test_the_supervisor_shows_progress_and_continues_after_an_error(
    file: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls, shown = 0, threading.Event()

    def ranks(supervisor: Supervisor) -> list[Progress]:
        nonlocal polls
        polls += 1
        if polls <= 2:
            raise ValueError("no progress")
        shown.set()
        return [Progress()]

    monkeypatch.setattr(Supervisor, "_progress_of_ranks", ranks)
    monkeypatch.setattr(progress_report, "POLL_S", 0.01)
    supervisor = Supervisor(is_main=True)
    supervisor.listen()
    try:
        assert shown.wait(60)
    finally:
        supervisor.close()
    assert file.stream.getvalue().count("cannot show the progress") == 1


def _draw_bar(supervisor: Supervisor) -> None:
    assert supervisor._reporter is not None
    supervisor._reporter._console.show_bar("starting the run: 8 s so far")


def test_an_error_is_printed_on_its_own_line_of_a_terminal(terminal: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    def world(supervisor: Supervisor) -> None:
        _draw_bar(supervisor)
        raise UserError("key=1 is wrong", "write key=2")

    monkeypatch.setattr("sys.stderr", terminal.stream)
    monkeypatch.setattr(program, "World", world)
    monkeypatch.setattr(program, "rank_by_launcher", lambda: 0)
    assert program.run_program(lambda world: None) == 2
    assert "so far\r\x1b[Kerror: key=1 is wrong" in terminal.stream.getvalue()


@pytest.mark.parametrize("by_watchdog", [False, True])
def test_a_rank_that_ends_does_not_draw_a_progress_bar_below_its_error(
    by_watchdog: bool, terminal: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor, alive = Supervisor(is_main=True), list[bool]()

    def end(code: int) -> None:
        alive.append(supervisor._reporter is not None and supervisor._reporter._thread.is_alive())

    monkeypatch.setattr("sys.stderr", terminal.stream)
    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr("logging.shutdown", lambda: None)
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr("distill.supervise.supervisor.exit_process", end)
    supervisor.listen()
    _draw_bar(supervisor)
    status = ExitStatus("failed", "rank 1 failed", 1)
    if by_watchdog:
        supervisor._exit_from_thread(status)
    else:
        supervisor.abort(status, program._print_error)
    supervisor.close()
    assert alive == [False]
    assert terminal.stream.getvalue().endswith("so far\r\x1b[Kerror: rank 1 failed\n")


def test_a_console_line_has_the_time_of_day_and_warnings_are_marked(file: Console) -> None:
    file.log.info("plain")
    file.log.warning("%s happened", "this")
    file.log.error("error: this failed")
    file.log.info("\ntable")
    plain, warning, error, *table = file.stream.getvalue().splitlines()
    assert plain[2] == plain[5] == ":" and plain[8:] == " plain"
    assert warning[8:] == " warning: this happened" and error == "error: this failed" and table == ["", "table"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (3599, "1 h 0 min"), (11520, "3 h 12 min"), (187200, "2 d 4 h")],
)
def test_durations_have_at_most_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(105.2, "105"), (12_400, "12.4k"), (999_600, "1M"), (2.5e12, "2.5T")])
def test_large_numbers_have_three_digits(number: float, text: str) -> None:
    assert short_count(number) == text
