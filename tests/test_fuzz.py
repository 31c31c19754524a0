"""Malformed runs are refused with exit code 2 and one sentence, without a traceback and without a hang."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import random
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from scripts.launch import ENVIRONMENT, ROOT, torchrun
from tests.helpers import free_port, run_ranks
from tests.malformed import BROKEN, CANARY, TORCHRUN, WAYS, Case, malformed
from tests.test_train import _command, make_tiny_run

pytestmark = pytest.mark.slow
HANGS_AFTER_S = 300
"""Time limit of a case; cases normally take less than a second."""

Ended = tuple[int, str]
"""Exit code (-1: the program raised an exception) and standard error."""


def run_cases(cases: Sequence[Case], ports: Sequence[int] = ()) -> list[Ended]:
    """Run the program for each case in this process, with ``ports`` as one of several ranks."""
    ended = []
    for i, case in enumerate(cases):
        launched = {"MASTER_PORT": str(ports[i])} if ports else dict.fromkeys(TORCHRUN)
        with _environment({**launched, **case.env}):
            faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
            ended.append(run_case(case))
            faulthandler.cancel_dump_traceback_later()
    return ended


def run_case(case: Case) -> Ended:
    """Return exit code and standard error; an exception is printed as a traceback."""
    from distill.train import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as output, hidden(case):
        try:
            code = main(case.argv)
        except BaseException:
            code = -1
            traceback.print_exc()
            if dist.is_initialized():
                dist.destroy_process_group()
    return code, output.getvalue()


@contextlib.contextmanager
def hidden(case: Case) -> Iterator[None]:
    """Let the package ``case.absent`` seem not to be installed."""
    with pytest.MonkeyPatch.context() as patch:
        if case.absent:
            patch.setitem(sys.modules, case.absent, None)
        yield


@contextlib.contextmanager
def _environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    before = dict(os.environ)
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def fault_of(case: Case, ended: Ended) -> str:
    """Return how the end of a malformed run differs from one error sentence with exit code 2; empty: it does not."""
    code, output = ended
    lines = output.splitlines()
    sentences = [line for line in lines if line.startswith("error: ")]
    if "Traceback" in output:
        return f"a traceback: {lines[-1]}"
    if code != 2:
        return f"exit code {code}"
    if len(sentences) != 1 or lines[-1] != sentences[0]:
        return f"{len(sentences)} sentences, the last line being {lines[-1] if lines else ''!r}"
    if not any(name in sentences[0] for name in case.names.split("|")):
        return f"{case.names!r} is not named: {sentences[0]}"
    if ": " not in sentences[0].removeprefix("error: "):
        return f"no remedy: {sentences[0]}"
    return ""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Create a working run, and disable network access of all libraries."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield make_tiny_run(tmp_path_factory.mktemp("fuzz"))


def _faults(ended: Sequence[tuple[Case, Ended]]) -> list[str]:
    return [f"{case.way} ({case.detail}): {fault}" for case, end in ended if (fault := fault_of(case, end))]


def test_malformed_runs_of_every_way_are_refused_in_one_sentence_each(root) -> None:
    cases = malformed(root, len(WAYS), seed=20, ranks=1)
    (ended,) = run_ranks(1, run_cases, cases)
    assert _faults(list(zip(cases, ended, strict=True))) == []
    assert not (root / CANARY).exists(), "code from an input was executed"


def test_12_malformed_runs_on_two_ranks_are_refused_by_all_ranks_with_one_sentence(root) -> None:
    cases = malformed(root, 12, seed=21, ranks=2, among=lambda way: not way.startswith("environment"))
    first, second = run_ranks(2, run_cases, cases, [free_port() for _ in cases])
    assert _faults(list(zip(cases, first, strict=True))) == []
    for case, (code, output) in zip(cases, second, strict=True):  # libraries may print warnings
        assert code == 2 and not any(line.startswith(("error: ", "Traceback")) for line in output.splitlines()), case
    assert not (root / CANARY).exists(), "code from an input was executed"


@pytest.mark.faults
def test_8_malformed_runs_under_torchrun_exit_with_code_2_and_one_sentence(root) -> None:
    """Real launchers and processes. With a malformed variable, each rank may print the error."""
    rng = random.Random(22)
    cases = malformed(root, 4, seed=22, ranks=2, among=lambda way: not way.startswith(("environment", "absent")))
    for name, value in [*rng.sample(BROKEN, 3), ("GLOO_SOCKET_IFNAME", "nowhere0")]:
        cases.append(Case(f"the variable {name}", _command(root, "environment"), name, {name: value}, f"{value}"))
    faults = []
    for case in cases:
        unset = [part for name, value in case.env.items() if value is None for part in ("-u", name)]
        values = [f"{name}={value}" for name, value in case.env.items() if value is not None]
        program = [sys.executable, "-m", "distill.train", *case.argv]
        command = torchrun(2, "--no-python", "env", *unset, *values, *program)
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS_AFTER_S, check=False)
        if fault := _fault_under_torchrun(case, ended.stderr):
            faults.append(f"{case.way} ({case.detail}): {fault}")
    assert faults == []
    assert not (root / CANARY).exists(), "code from an input was executed"


def _fault_under_torchrun(case: Case, output: str) -> str:
    """Apply ``fault_of`` to the launcher's report, which has the exit code of the first failed rank."""
    sentences = [line for line in output.splitlines() if line.startswith("error: ")]
    sentences = sorted(set(sentences)) if case.env.keys() & dict(BROKEN).keys() else sentences
    code = re.findall(r"Root Cause.*?exitcode  : (-?\d+)", output, re.DOTALL)
    ours = f'File "{ROOT}/distill' in output
    report = "\n".join(["Traceback"] * ours + sentences)
    return fault_of(case, (int(code[-1]) if code else 0, report))


def test_every_fault_of_a_refusal_is_detected() -> None:
    case = Case("", [], "policy.seed")
    good = (2, "a warning\nerror: policy.seed=x is wrong: set it to 3\n")
    assert fault_of(case, good) == ""
    bad = {
        "exit code": (0, ""),
        "a traceback": (2, "Traceback (most recent call last):\nerror: policy.seed=x is wrong: set it to 3\n"),
        "2 sentences": (2, good[1] + "error: policy.seed is wrong: set it\n"),
        "0 sentences": (2, "policy.seed=x is wrong\n"),
        "1 sentences, the last line": (2, good[1] + "and so on\n"),
        "is not named": (2, "error: data.train is wrong: set it\n"),
        "no remedy": (2, "error: policy.seed is wrong\n"),
    }
    for fault, ended in bad.items():
        assert fault in fault_of(case, ended)
