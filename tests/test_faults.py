"""Real runs of two ranks that are killed, told to stop, hung and fed with nan at chosen moments."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from distill.supervise.status import STATUS_FILE, read_status
from scripts.launch import ENVIRONMENT, ROOT, torchrun
from tests.faulty_train import FELL
from tests.helpers import free_port
from tests.test_train import SINCE_THE_LAST_SYNC, _command, _train_rows, make_tiny_run

pytestmark = [pytest.mark.faults, pytest.mark.slow]

HANG_S = 60
"""Seconds in which everything that began must have ended, after the launcher has."""
MARK = "DISTILL_TEST_MARK"
SIGNALS = ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout", "120")


class Ended(NamedTuple):
    """How a run ended."""

    code: int
    said: str
    status: dict[str, Any]
    left: list[int]
    """Processes of it that were still there a minute after the launcher ended."""
    seconds: float
    """From the fault to the end of the last process; without a fault from the launcher's end."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("run"))


def run(
    root: Path, name: str, *overrides: str, fault: dict[str, Any] | None = None, launcher: Sequence[str] = ()
) -> Ended:
    """Two ranks under torchrun until all their processes are gone."""
    mark = uuid.uuid4().hex
    command = torchrun(2, "-m", "tests.faulty_train", *_command(root, name, *overrides))
    command[3:3] = launcher
    environment = {**os.environ, **ENVIRONMENT, MARK: mark}
    fell = root / f"{mark}.fell"
    if fault is not None:
        environment |= {"FAULT": json.dumps(fault), FELL: str(fell)}
    with (root / f"{mark}.log").open("w+") as file:
        code = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=300, check=False
        ).returncode
        began = time.monotonic()
        left = marked(mark)
        while left and time.monotonic() - began < HANG_S:
            time.sleep(0.2)
            left = marked(mark)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        since_fault = time.time() - float(fell.read_text()) if fell.exists() else 0.0
        seconds = max(time.monotonic() - began, since_fault)
        file.seek(0)
        said = file.read()
    return Ended(code, said, read_status(root / f"runs/{name}" / STATUS_FILE), left, seconds)


def marked(mark: str) -> list[int]:
    """Processes with the mark in their environment, zombies aside."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def newest(root: Path, name: str) -> int:
    """The newest whole checkpoint's step."""
    folders = (root / "checkpoints" / name).glob("step_*")
    return max((int(f.name[5:]) for f in folders if (f / "training_info.json").is_file()), default=0)


def rows(root: Path, name: str) -> list[dict[str, Any]]:
    """The run's metrics, but for what a resumed run can't know."""
    return [{k: v for k, v in row.items() if k not in SINCE_THE_LAST_SYNC} for row in _train_rows(root / "runs" / name)]


STEPS = 8
SAVES = ("save", "shards", "bytes", "finish", "naming")


def kills(seed: int) -> list[dict[str, Any]]:
    """Twelve of them, in order of steps: twice in each of three phases, five in a save, of a rank or of the whole tree.

    A save is killed where it begins, before the first shard, in the middle of one, before a whole one is sealed, and
    between seal and name.
    """
    draw = random.Random(seed)
    moments = [*("generation", "sync", "backward") * 2, *SAVES]
    moments.append(draw.choice(("teacher", "optimizer", "metrics")))
    draw.shuffle(moments)
    faults: list[dict[str, Any]] = []
    for moment, step in zip(moments, sorted(draw.choices(range(1, STEPS + 1), k=len(moments))), strict=True):
        at = step + step % 2 if moment in ("save", "shards") else step  # a checkpoint is written every other step
        nth = draw.randint(1, 2) if moment in ("generation", "backward") else 1
        fault: dict[str, Any] = {"step": at, "moment": moment, "nth": nth}
        faults.append({**fault, "rank": draw.randint(0, 1), "what": draw.choice(("kill_rank", "kill_tree"))})
    faults.sort(key=lambda fault: fault["step"])
    for fault in faults:
        if fault["moment"] in ("finish", "naming"):  # the main rank's work, as soon as both have written
            fault.update(step=None, rank=0)
        if fault["moment"] == "bytes":  # by a thread, in whatever step that is
            fault.update(step=None, nth=draw.randint(2, 30))
    return faults


def test_a_run_killed_at_twelve_moments_ends_as_an_undisturbed_one_bit_for_bit(root) -> None:
    line = f"distillation.max_num_steps={STEPS}"
    whole = run(root, "whole", line)
    assert whole.code == 0 and whole.status["state"] == "finished", whole.said
    for fault in kills(seed=7):
        killed = run(root, "killed", line, fault=fault)
        assert killed.code != 0 and not killed.left and killed.seconds < HANG_S, (fault, killed.said)
        expected = ("running",) if fault["what"] == "kill_tree" else ("failed", "running")
        assert killed.status["state"] in expected, (fault, killed.said)
    ended = run(root, "killed", line)
    assert ended.code == 0 and ended.status["state"] == "finished", ended.said
    assert rows(root, "killed") == rows(root, "whole")
    same_weights(root, "killed", "whole", STEPS)


def same_weights(root: Path, name: str, other: str, step: int) -> None:
    """The exports of two runs are the same bit for bit."""
    ours, theirs = (load_file(root / f"checkpoints/{n}/step_{step}/hf/model.safetensors") for n in (name, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


PHASES = ("sync", "generation", "data", "teacher", "forward", "backward", "optimizer")


def test_a_request_to_stop_in_any_phase_ends_the_run_with_a_checkpoint_of_its_last_step(root) -> None:
    """Each phase once, by turns with each signal and way; every run goes on from the one before."""
    ways = ("tell_launcher SIGTERM", "tell_launcher SIGUSR1", "tell_all SIGTERM", "tell_rank SIGUSR1")
    only = ("distillation.max_num_steps=8", "checkpointing.save_period=1000")
    for step, moment in enumerate(PHASES, 1):
        way = ways[step % 4]
        fault: dict[str, Any] = {"step": step, "moment": moment, "rank": step % 2, "what": way}
        stopped = run(root, "told", *only, fault=fault, launcher=SIGNALS)
        assert not stopped.left, (fault, stopped.said)
        status = {key: stopped.status[key] for key in ("state", "step", "reason", "exit_code")}
        expected = {"state": "stopped", "step": step, "reason": way.split()[1], "exit_code": 0}
        assert status == expected, (fault, stopped.said)
        assert newest(root, "told") == step and stopped.seconds < HANG_S
        if way.startswith("tell_rank"):
            assert stopped.code == 0, "torchrun saw both ranks end well"
    ended = run(root, "told", *only)
    assert ended.status["state"] == "finished" and [row["step"] for row in rows(root, "told")] == list(range(1, 9))


VALIDATED = (
    "data.validation={{data_path: {root}/problems.jsonl}}",
    "distillation.val_period=2",
    "distillation.val_at_end=true",
)


@pytest.mark.parametrize(
    ("moment", "fault", "step"),
    [
        ("save", {"step": 2}, 2),
        ("shards", {"step": 2}, 2),
        ("bytes", {"step": None, "nth": 5}, None),
        ("validation", {"step": 3}, 2),
        ("validation", {"step": 4, "nth": 2}, 4),
    ],
    ids=["save", "shards", "bytes", "validation", "validation at the end"],
)
def test_a_request_to_stop_in_a_save_or_a_validation_is_heard_there(root, undisturbed, moment, fault, step) -> None:
    """Nothing is half written, no step is begun after the request, and the run ends as one that nobody stopped."""
    name = f"{moment} {step}"
    line = [part.format(root=root) for part in VALIDATED]
    told = {**fault, "moment": moment, "rank": 1, "what": "tell_all SIGTERM"}
    stopped = run(root, name, *line, fault=told, launcher=SIGNALS)
    assert not stopped.left and stopped.seconds < HANG_S, stopped.said
    assert (stopped.status["state"], stopped.status["reason"]) == ("stopped", "SIGTERM"), stopped.said
    at = stopped.status["step"]
    assert newest(root, name) == at and at == (step or at), stopped.said
    assert not list((root / "checkpoints" / name).glob("tmp_*"))
    ended = run(root, name, *line)
    assert ended.status["state"] == "finished", ended.said
    assert rows(root, name) == rows(root, undisturbed)
    same_weights(root, name, undisturbed, 4)


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> str:
    """The name of a run of four steps with validations."""
    whole = run(root, "undisturbed", *(part.format(root=root) for part in VALIDATED))
    assert whole.status["state"] == "finished", whole.said
    return "undisturbed"


def test_a_signal_while_loading_and_a_second_one_in_a_step_end_the_run_at_once(root) -> None:
    fault = {"step": 0, "moment": "loading", "rank": 1, "what": "tell_rank SIGUSR1"}
    loading = run(root, "early", fault=fault)
    assert loading.code == 0 and not loading.left and newest(root, "early") == 0, loading.said
    assert (loading.status["state"], loading.status["reason"]) == ("stopped", "SIGUSR1 before the first step")
    fault = {"step": 2, "moment": "generation", "rank": 1, "what": "tell_twice SIGTERM"}
    twice = run(root, "early", fault=fault)
    assert twice.code != 0 and not twice.left, twice.said
    assert (twice.status["state"], twice.status["step"]) == ("stopped", 1)
    assert twice.status["exit_code"] == 128 + signal.SIGTERM


@pytest.mark.parametrize("how", ["kill_launcher", "tell_launcher SIGUSR1"])
def test_ranks_do_not_outlive_their_launcher(root, how) -> None:
    """A plain SIGUSR1 ends a launcher that was not told to handle it, as a kill does."""
    fault = {"step": 2, "moment": "generation", "rank": 0, "what": how}
    orphaned = run(root, how, "distillation.max_num_steps=1000", fault=fault)
    assert orphaned.code < 0 and not orphaned.left, orphaned.said
    assert orphaned.status["state"] == "failed" and "the launcher (process" in orphaned.status["reason"]


HANGS = {
    "generation": "generation of step 2 made",
    "backward": "policy_training of step 2 made",
    "save": "checkpointing of step 2 made",
}


@pytest.mark.parametrize("moment", HANGS)
def test_a_rank_that_hangs_ends_the_run_on_all_and_is_named_with_its_phase(root, moment) -> None:
    fault = {"step": 2, "moment": moment, "rank": 1, "what": "hang"}
    hung = run(root, f"hung in {moment}", "runtime.phase_timeout_s=8", fault=fault)
    assert hung.code != 0 and not hung.left, hung.said
    reason = hung.status["reason"]
    assert hung.status["state"] == "failed" and hung.status["exit_code"] == 1
    assert HANGS[moment] in reason and "rank 1 of 2" in reason, reason
    assert f"error: {reason}" in hung.said
    stacks = (root / f"runs/hung in {moment}/logs/rank_00001.log").read_text()
    assert "in hang" in stacks, "the stack tells where it hangs"


@pytest.mark.parametrize(
    ("moment", "what", "says"),
    [
        ("forward", "nan_loss", "1 of 1 micro-batches"),
        ("forward", "nan_weight", "rank 1's shard of model."),
        ("optimizer", "nan_weight_after", "after step 3 rank 1's shard of model."),
    ],
)
def test_nan_stops_the_step_on_all_ranks_and_names_the_samples_and_the_checkpoint_stays(
    root, moment, what, says
) -> None:
    fault = {"step": 3, "moment": moment, "rank": 1, "what": what}
    failed = run(root, what, "checkpointing.save_period=1", fault=fault)
    assert failed.code != 0 and not failed.left
    assert (failed.status["state"], failed.status["exit_code"], failed.status["step"]) == ("failed", 1, 2)
    assert says in failed.status["reason"], failed.said
    assert failed.said.count(f"error: {failed.status['reason']}") == 1 and failed.said.count("exitcode  : 1") == 2
    assert newest(root, what) == 2 and 'Traceback (most recent call last):\n  File "/tmp' not in failed.said
    files = root / f"runs/{what}/nonfinite"
    if what == "nan_weight_after":
        assert not files.exists()
        return
    first, *samples = map(json.loads, (files / "step_3_rank_1.jsonl").read_text().splitlines())
    assert (first["step"], first["rank"]) == (3, 1) and "nan" in first["losses"]
    assert samples and all(sample["loss"] == "nan" and sample["response_ids"] and sample["text"] for sample in samples)
    others = (files / "step_3_rank_0.jsonl").read_text().splitlines()
    assert len(others) == 1 if what == "nan_loss" else len(others) > 1, "only what the nan was found in"
    ended = run(root, what, "checkpointing.save_period=1")
    assert ended.status["state"] == "finished", ended.said


def test_a_run_with_a_time_limit_saves_before_it_and_leaves(root) -> None:
    limit = "checkpointing.checkpoint_must_save_by=00:00:00:01"
    limited = run(root, "limited", limit, "checkpointing.save_period=1000")
    assert limited.code == 0 and limited.status["state"] == "stopped" and limited.status["step"] == 1, limited.said
    assert limited.status["reason"] == limit
    assert newest(root, "limited") == 1


def test_with_vllm_too_a_killed_and_a_stopped_run_end_as_an_undisturbed_one(root) -> None:
    line = ("policy.generation.backend=vllm", "distillation.max_num_steps=4")
    whole = run(root, "whole with vllm", *line)
    assert whole.status["state"] == "finished", whole.said
    fault = {"step": 2, "moment": "vllm", "nth": 5, "rank": 1, "what": "tell_launcher SIGUSR1"}
    stopped = run(root, "vllm", *line, fault=fault, launcher=SIGNALS)
    assert stopped.status["state"] == "stopped" and not stopped.left, stopped.said
    fault = {"step": 3, "moment": "vllm", "nth": 5, "rank": 0, "what": "kill_rank"}
    killed = run(root, "vllm", *line, fault=fault)
    assert killed.status["reason"].startswith("rank 0 on") and not killed.left, killed.said
    ended = run(root, "vllm", *line)
    assert ended.status["state"] == "finished", ended.said
    assert rows(root, "vllm") == rows(root, "whole with vllm")
    same_weights(root, "vllm", "whole with vllm", 4)


@pytest.mark.parametrize(
    ("does", "victim", "elsewhere", "says"),
    [
        ("kill_rank", 0, False, "rank 0 on"),
        ("kill_rank", 1, False, "rank 1 on"),
        ("kill_rank", 1, True, "rank 0: RuntimeError: "),
        ("freeze_rank", 0, False, "the rendezvous store of rank 0 "),
        ("freeze_rank", 1, True, "rank 1 sent no heartbeat"),
    ],
)
def test_without_a_launcher_too_a_lost_rank_takes_the_other_down(root, does, victim, elsewhere, says) -> None:
    """Rank 0 holds the rendezvous's store here. ``elsewhere``: rank 1 has a host name, so that nobody sees it die."""
    name = f"{does} {victim} {elsewhere}"
    fault = {"step": 2, "moment": "generation", "rank": victim, "what": does}
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.faulty_train", *_command(root, name)]
    if elsewhere and subprocess.run(["unshare", "--uts", "true"], check=False).returncode:
        pytest.skip("another host's name takes a privileged user")
    other = ["unshare", "--uts", "sh", "-c", 'hostname elsewhere; exec "$@"', "sh"] if elsewhere else []
    ranks = []
    for rank, before in enumerate(([], other)):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "FAULT": json.dumps(fault)}
        environment = {**os.environ, **ENVIRONMENT, **place, **own, FELL: str(root / f"{name}.fell")}
        ranks.append(subprocess.Popen([*before, *command], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL))
    try:
        assert ranks[1 - victim].wait(300) == 1
        assert time.time() - float((root / f"{name}.fell").read_text()) < HANG_S
        status = read_status(root / f"runs/{name}" / STATUS_FILE)
        assert status["state"] == "failed" and status["retryable"] is True and str(status["reason"]).startswith(says), (
            status
        )
        if does == "freeze_rank":
            ranks[victim].send_signal(signal.SIGCONT)
            assert ranks[victim].wait(HANG_S) == 1, "awake again it sees that it is alone"
        else:
            assert ranks[victim].wait(HANG_S) == -signal.SIGKILL
    finally:
        for each in ranks:
            each.kill()
            each.wait()


def test_a_rank_that_gives_no_sign_of_life_ends_the_run(root) -> None:
    """Its interpreter is stuck, the watching thread with it."""
    fault = {"step": 2, "moment": "generation", "rank": 1, "what": "hang_in_c"}
    silent = run(root, "silent", fault=fault, launcher=("--shutdown-timeout", "5"))
    assert silent.code != 0 and not silent.left
    assert silent.status["reason"].startswith("rank 1 sent no heartbeat"), silent.said
