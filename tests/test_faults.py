"""Real runs of two ranks that are killed, stopped, frozen, hung or get NaN at chosen moments."""

from __future__ import annotations

import json
import os
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
from tests.faulty_train import FAULT_TIME
from tests.helpers import free_port
from tests.test_adapter_runs import adapter_overrides
from tests.test_partial_rollouts import DEPENDS_ON_TIME, PARTIAL, write_problems
from tests.test_train import SINCE_THE_LAST_SYNC, _command, _train_rows, make_tiny_run

pytestmark = [pytest.mark.faults, pytest.mark.slow]

TIMEOUT_S = 600
"""Seconds after which a run counts as hung; long, because the machine may be busy."""
EXIT_S = 60
"""Seconds after a fault, or after the launcher's end, in which all processes must exit."""
MARK = "DISTILL_TEST_MARK"
SIGNALS = ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout", "120")


class Ended(NamedTuple):
    """How a run ended."""

    code: int
    output: str
    status: dict[str, Any]
    remaining: list[int]
    """Processes of the run that did not exit within EXIT_S after the launcher."""
    seconds: float
    """Seconds from the fault to the end of the last process; without a fault, from the launcher's end."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_tiny_run(tmp_path_factory.mktemp("run"))
    write_problems(root, "spread.jsonl")
    return root


def partial_rollouts(root: Path) -> list[str]:
    """Return settings with which half of the responses are finished after each step; the other half is in the pool."""
    given = [f"{PARTIAL}.enabled=true", f"{PARTIAL}.finish_share=0.5", f"{PARTIAL}.max_age=1"]
    given += [f"data.train={{data_path: {root}/spread.jsonl, env_name: null}}", "policy.generation.max_new_tokens=28"]
    return [*given, "logger.num_train_samples_to_print=0", "logger.report=false"]


def run(
    root: Path, name: str, *overrides: str, fault: dict[str, Any] | None = None, launcher: Sequence[str] = ()
) -> Ended:
    """Run two ranks under torchrun, with options ``launcher``, until all their processes have exited."""
    mark = uuid.uuid4().hex
    command = torchrun(2, "-m", "tests.faulty_train", *_command(root, name, *overrides))
    command[3:3] = launcher
    environment = {**os.environ, **ENVIRONMENT, MARK: mark}
    fault_time = root / f"{mark}.time"
    if fault is not None:
        environment |= {"FAULT": json.dumps(fault), FAULT_TIME: str(fault_time)}
    with (root / f"{mark}.log").open("w+") as file:
        code = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=TIMEOUT_S, check=False
        ).returncode
        began = time.time()
        while (remaining := marked(mark)) and time.time() - began < EXIT_S:
            time.sleep(0.2)
        seconds = time.time() - (float(fault_time.read_text()) if fault_time.exists() else began)
        for pid in remaining:
            os.kill(pid, signal.SIGKILL)
        file.seek(0)
        output = file.read()
    return Ended(code, output, read_status(root / f"runs/{name}" / STATUS_FILE), remaining, seconds)


def marked(mark: str) -> list[int]:
    """Return the processes with ``mark`` in their environment, except zombies."""
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
    """Return the step of the newest complete checkpoint."""
    folders = (root / "checkpoints" / name).glob("step_*")
    return max((int(f.name[5:]) for f in folders if (f / "training_info.json").is_file()), default=0)


def rows(root: Path, name: str) -> list[dict[str, Any]]:
    """Return the run's metrics, except those that depend on time or that a resumed run cannot compute."""
    left_out = {*SINCE_THE_LAST_SYNC, *DEPENDS_ON_TIME}
    return [{k: v for k, v in row.items() if k not in left_out} for row in _train_rows(root / "runs" / name)]


def assert_same_weights(root: Path, name: str, other: str, step: int, file: str = "hf/model.safetensors") -> None:
    """Check that the exports of two runs are equal bit for bit; ``file``: file of the weights in a checkpoint."""
    ours, theirs = (load_file(root / f"checkpoints/{n}/step_{step}/{file}") for n in (name, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def assert_same_pools(root: Path, name: str, other: str, step: int) -> None:
    """Check that two runs end with the same pool, that no pool was empty, and that pools held unfinished responses."""
    ours, theirs = (root / f"checkpoints/{n}/step_{step}/partial_rollouts.npz" for n in (name, other))
    assert ours.read_bytes() == theirs.read_bytes()
    found = rows(root, name)
    assert all(row["train/partial/pool_responses"] > 0 for row in found)
    assert all(row["train/partial/waiting_responses"] < row["train/partial/pool_responses"] for row in found)
    assert sum(row["train/partial/older_token_share"] > 0 for row in found) > len(found) / 2


STEPS = 6
KILLS: tuple[tuple[str, int | None, int, int, str], ...] = (
    ("cut", 3, 1, 1, "kill_tree"),
    ("shards", 4, 1, 1, "kill_rank"),
    ("bytes", None, 20, 1, "kill_tree"),
    ("finish", None, 1, 0, "kill_rank"),
    ("naming", None, 1, 0, "kill_tree"),
    ("teacher", 6, 1, 1, "kill_rank"),
)
"""Kills as (moment, step, nth, rank, what); see ``faulty_train``. A checkpoint is written every second step.

Two phases: between the cut and the completion of the oldest responses, and while the teacher's adapters replace those
of the student. Four moments of one save: before the first shard, inside a shard, which a background thread writes,
before the manifest, and between the manifest and the final name.
"""


def test_a_run_killed_in_two_phases_and_in_a_save_ends_bit_for_bit_as_an_undisturbed_one(root) -> None:
    """With adapters and their average as the teacher; every checkpoint has a pool of unfinished responses."""
    line = [*adapter_overrides(root), *partial_rollouts(root)]
    line += [f"distillation.max_num_steps={STEPS}", "checkpointing.save_period=2"]
    undisturbed = run(root, "not killed", *line)
    assert undisturbed.code == 0 and undisturbed.status["state"] == "finished", undisturbed.output
    for moment, step, nth, rank, what in KILLS:
        fault = {"moment": moment, "step": step, "nth": nth, "rank": rank, "what": what}
        killed = run(root, "killed", *line, fault=fault)
        assert killed.code != 0 and not killed.remaining and killed.seconds < EXIT_S, (fault, killed.output)
        expected = ("running",) if what == "kill_tree" else ("failed", "running")
        assert killed.status["state"] in expected, (fault, killed.output)
    ended = run(root, "killed", *line)
    assert ended.code == 0 and ended.status["state"] == "finished", ended.output
    assert rows(root, "killed") == rows(root, "not killed")
    assert_same_weights(root, "killed", "not killed", STEPS, "peft/adapter_model.safetensors")
    assert_same_pools(root, "killed", "not killed", STEPS)


def test_a_signal_while_loading_and_a_second_signal_in_a_step_stop_the_run_immediately(root) -> None:
    fault = {"step": 0, "moment": "loading", "rank": 1, "what": "signal_rank SIGUSR1"}
    loading = run(root, "early", fault=fault)
    assert loading.code == 0 and not loading.remaining and newest(root, "early") == 0, loading.output
    assert loading.status["state"] == "stopped" and loading.status["reason"].startswith("SIGUSR1 ")
    fault = {"step": 2, "moment": "generation", "rank": 1, "what": "signal_twice SIGTERM"}
    twice = run(root, "early", fault=fault)
    assert twice.code != 0 and not twice.remaining, twice.output
    assert (twice.status["state"], twice.status["step"]) == ("stopped", 1)
    assert twice.status["exit_code"] == 128 + signal.SIGTERM and twice.status["reason"].startswith("SIGTERM ")


HANGS = {"generation": "generation of step 2 ", "save": "checkpointing of step 2 "}


@pytest.mark.parametrize("moment", HANGS)
def test_a_hung_rank_ends_the_run_and_is_named_with_its_phase(root, moment) -> None:
    fault = {"step": 2, "moment": moment, "rank": 1, "what": "hang"}
    hung = run(root, f"hung in {moment}", "runtime.phase_timeout_s=10", fault=fault)
    assert hung.code != 0 and not hung.remaining, hung.output
    reason = hung.status["reason"]
    assert hung.status["state"] == "failed" and hung.status["exit_code"] == 1
    assert HANGS[moment] in reason and "rank 1 of 2" in reason, reason
    assert f"error: {reason}" in hung.output
    stacks = (root / f"runs/hung in {moment}/logs/rank_00001.log").read_text()
    assert "in hang" in stacks, "the stack shows the function that hangs"


def test_a_rank_without_heartbeats_ends_the_run(root) -> None:
    """The process exists, so only its heartbeats show that it does nothing."""
    fault = {"step": 2, "moment": "generation", "rank": 1, "what": "freeze_rank"}
    silent = run(root, "silent", fault=fault, launcher=("--shutdown-timeout", "5"))
    assert silent.code != 0 and not silent.remaining
    assert silent.status["reason"] == "rank 1 sent no heartbeat for 40 s", silent.output


VALIDATED = (
    "data.validation={{data_path: {root}/problems.jsonl}}",
    "distillation.val_period=2",
    "distillation.val_at_end=true",
    "distillation.max_num_steps=10",
)


STOPS: tuple[tuple[str, int | None, int, str, tuple[int, ...]], ...] = (
    ("sync", 1, 1, "signal_rank SIGUSR1", (1,)),
    ("generation", 2, 1, "signal_launcher SIGTERM", (2,)),
    ("shards", 4, 1, "signal_all SIGTERM", (4,)),
    ("backward", 5, 1, "signal_launcher SIGUSR1", (5,)),
    ("bytes", None, 5, "signal_all SIGTERM", (6, 7, 8)),  # in a background thread, during any step
    ("validation", 9, 1, "signal_all SIGTERM", (8,)),
    ("teacher", 9, 1, "signal_rank SIGUSR1", (9,)),
    ("validation", 10, 2, "signal_all SIGTERM", (10,)),  # the validation at the end
)
"""Stops as (moment, step, nth, what, possible last steps); a checkpoint and a validation are due every second step."""


def test_a_stop_signal_in_phases_saves_and_validations_leaves_a_complete_checkpoint(root) -> None:
    """Every run resumes the previous one; the last one ends bit for bit as an undisturbed one."""
    line = [part.format(root=root) for part in VALIDATED]
    undisturbed = run(root, "validated", *line)
    assert undisturbed.status["state"] == "finished", undisturbed.output
    for moment, step, nth, what, steps in STOPS:
        fault = {"moment": moment, "step": step, "nth": nth, "rank": 1, "what": what}
        stopped = run(root, "stopped", *line, fault=fault, launcher=SIGNALS)
        assert not stopped.remaining and stopped.seconds < EXIT_S, (fault, stopped.output)
        status = {key: stopped.status[key] for key in ("state", "reason", "exit_code")}
        assert status == {"state": "stopped", "reason": what.split()[1], "exit_code": 0}, (fault, stopped.output)
        last = stopped.status["step"]
        assert last in steps and last == stopped.status["checkpoint_step"] == newest(root, "stopped"), stopped.output
        assert not list((root / "checkpoints/stopped").glob("tmp_*")), fault
        if what.startswith("signal_rank"):
            assert stopped.code == 0, "torchrun saw both ranks succeed"
    ended = run(root, "stopped", *line)
    assert ended.status["state"] == "finished", ended.output
    assert rows(root, "stopped") == rows(root, "validated")
    assert_same_weights(root, "stopped", "validated", 10)


@pytest.mark.parametrize(
    ("moment", "what", "reason"),
    [
        ("forward", "nan_loss", "1 of 1 micro-batches"),
        ("forward", "nan_weight", "rank 1's shard of model."),
        ("optimizer", "nan_weight_after", "step 3 (rank 1's shard of model."),
    ],
)
def test_nan_ends_the_run_on_all_ranks_with_a_report_and_keeps_the_checkpoint(root, moment, what, reason) -> None:
    fault = {"step": 3, "moment": moment, "rank": 1, "what": what}
    failed = run(root, what, "checkpointing.save_period=1", fault=fault)
    assert failed.code != 0 and not failed.remaining
    assert (failed.status["state"], failed.status["exit_code"], failed.status["step"]) == ("failed", 1, 2)
    assert reason in failed.status["reason"], failed.output
    assert failed.output.count(f"error: {failed.status['reason']}") == 1, failed.output
    assert failed.output.count("exitcode  : 1") == 2, failed.output
    assert newest(root, what) == 2 and 'Traceback (most recent call last):\n  File "/tmp' not in failed.output
    files = root / f"runs/{what}/nonfinite"
    if what == "nan_weight_after":
        assert not files.exists()
        return
    first, *samples = map(json.loads, (files / "step_3_rank_1.jsonl").read_text().splitlines())
    assert (first["step"], first["rank"]) == (3, 1) and "nan" in first["losses"]
    assert samples and all(sample["loss"] == "nan" and sample["response_ids"] and sample["text"] for sample in samples)
    lines = (files / "step_3_rank_0.jsonl").read_text().splitlines()
    if what == "nan_weight":
        assert len(lines) > 1, "no micro-batch is named, so all samples are written"
        return
    assert len(lines) == 1, "only the samples of the NaN loss are written"
    # The run resumes from the kept checkpoint; the time limit stops it after the step that failed before.
    limit = "checkpointing.checkpoint_must_save_by=00:00:00:01"
    limited = run(root, what, limit, "checkpointing.save_period=1000")
    assert limited.code == 0 and limited.status["reason"] == limit, limited.output
    assert (limited.status["state"], limited.status["step"], newest(root, what)) == ("stopped", 3, 3), limited.output


def test_ranks_exit_when_their_launcher_is_killed(root) -> None:
    fault = {"step": 2, "moment": "generation", "rank": 0, "what": "kill_launcher"}
    orphaned = run(root, "orphaned", "distillation.max_num_steps=1000", fault=fault)
    assert orphaned.code < 0 and not orphaned.remaining, orphaned.output
    assert orphaned.status["state"] == "failed" and "launcher" in orphaned.status["reason"]


def test_with_vllm_a_stopped_and_killed_run_ends_bit_for_bit_as_an_undisturbed_one(root) -> None:
    """With partial rollouts: stopped after the cut, and killed while segments run."""
    line = ("policy.generation.backend=vllm", "distillation.max_num_steps=4", *partial_rollouts(root))
    undisturbed = run(root, "undisturbed vllm", *line)
    assert undisturbed.status["state"] == "finished", undisturbed.output
    fault = {"step": 2, "moment": "cut", "rank": 1, "what": "signal_launcher SIGUSR1"}
    stopped = run(root, "vllm", *line, fault=fault, launcher=SIGNALS)
    assert stopped.status["state"] == "stopped" and not stopped.remaining, stopped.output
    fault = {"step": 3, "moment": "vllm", "nth": 5, "rank": 0, "what": "kill_rank"}
    killed = run(root, "vllm", *line, fault=fault)
    assert killed.status["reason"].startswith("rank 0 ") and not killed.remaining, killed.output
    ended = run(root, "vllm", *line)
    assert ended.status["state"] == "finished", ended.output
    assert rows(root, "vllm") == rows(root, "undisturbed vllm")
    assert_same_weights(root, "vllm", "undisturbed vllm", 4)
    assert_same_pools(root, "vllm", "undisturbed vllm", 4)


@pytest.mark.parametrize(
    ("what", "victim", "moment", "other_host", "reason"),
    [
        ("kill_rank", 0, "generation", False, "rank 0 "),
        ("kill_rank", 1, "backward", True, "rank 0: RuntimeError: "),
        (
            "freeze_rank",
            0,
            "generation",
            False,
            "the rendezvous store of rank 0 or its launcher did not reply for 40 s",
        ),
        ("freeze_rank", 1, "generation", False, "rank 1 sent no heartbeat for 40 s"),
    ],
)
def test_without_an_agent_a_killed_or_frozen_rank_ends_the_other(
    root, what, victim, moment, other_host, reason
) -> None:
    """Rank 0 holds the rendezvous store. ``other_host``: rank 1 has another host name, so its process is not polled."""
    name = f"{what} {victim} {other_host}"
    fault = {"step": 2, "moment": moment, "rank": victim, "what": what}
    launch = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.faulty_train", *_command(root, name)]
    if other_host and subprocess.run(["unshare", "--uts", "true"], check=False).returncode:
        pytest.skip("setting a host name needs a privileged user")
    renamed = ["unshare", "--uts", "sh", "-c", 'hostname otherhost; exec "$@"', "sh"] if other_host else []
    ranks = []
    for rank, prefix in enumerate(([], renamed)):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "FAULT": json.dumps(fault)}
        own[FAULT_TIME] = str(root / f"{name}.time")
        environment = {**os.environ, **ENVIRONMENT, **launch, **own}
        ranks.append(subprocess.Popen([*prefix, *command], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL))
    try:
        assert ranks[1 - victim].wait(TIMEOUT_S) == 1
        assert time.time() - float((root / f"{name}.time").read_text()) < EXIT_S
        status = read_status(root / f"runs/{name}" / STATUS_FILE)
        assert status["state"] == "failed" and status["retryable"] is True, status
        assert str(status["reason"]).startswith(reason), status
        if what == "freeze_rank":
            ranks[victim].send_signal(signal.SIGCONT)
            assert ranks[victim].wait(EXIT_S) == 1, "a rank that continues detects that the run has ended"
        else:
            assert ranks[victim].wait(EXIT_S) == -signal.SIGKILL
    finally:
        for each in ranks:
            each.kill()
            each.wait()
