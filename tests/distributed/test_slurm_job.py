"""Plan and decisions of the batch script, and the commands of scripts/SLURM.md."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from distill.config import parse_args
from distill.distributed import hardware, slurm
from distill.distributed.hardware import TorchBuild
from distill.distributed.slurm_job import main, variables
from distill.errors import UserError
from distill.supervise.status import ExitStatus
from distill.supervise.supervisor import Supervisor

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ["--config", str(ROOT / "recipes/my-distillation-1n4g.yaml")]  # one node of four
JOB = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost"}


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [n for n in os.environ if n.startswith("SLURM_") or n == "GLOO_SOCKET_IFNAME"]:
        monkeypatch.delenv(name)
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def _fake_torch(monkeypatch: pytest.MonkeyPatch, finds_gpu: bool) -> None:
    """Replace the installed torch by one that finds GPUs, or by a build without CUDA."""
    fake = TorchBuild("2.13.0+cu130", "13.0", True) if finds_gpu else TorchBuild("2.13.0+cpu", None, False)
    monkeypatch.setattr(hardware, "torch_build", lambda: fake)


def _plan(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, str]:
    assert main([*RECIPE, *overrides]) == 0
    return dict(line.split("=", 1) for line in capsys.readouterr().out.splitlines())


def _refused_key(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """Check that the plan is refused with one sentence; return the key that the error names."""
    assert main([*RECIPE, *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    with pytest.raises(UserError) as error:
        variables([*RECIPE, *overrides])
    return error.value.key


def test_the_plan_has_ranks_rendezvous_and_run_directory(job, capsys) -> None:
    first = _plan(capsys)
    port = int(first.pop("PORT"))
    run_dir = "logs/my-distillation-1n4g/job_4242"
    assert first == {"NODES": "1", "RANKS": "4", "ADDRESS": "localhost", "RUN_DIR": run_dir}
    assert int(_plan(capsys)["PORT"]) == port, "the same after a requeue"
    job.setenv("SLURM_JOB_ID", "4243")
    assert int(_plan(capsys)["PORT"]) != port, "two jobs on one node"
    with socket.create_server(("", port)):
        job.setenv("SLURM_JOB_ID", "4242")
        assert int(_plan(capsys)["PORT"]) == port + 1, "another program uses the first port"
    job.setenv("SLURM_JOB_ID", "4243")
    assert _plan(capsys, "runtime.run_dir=my runs/one")["RUN_DIR"] == "'my runs/one'"


def test_ports_of_jobs_and_steps_differ_and_are_below_the_ephemeral_range() -> None:
    ports = [slurm.port(job, step) for job in range(7_000_000, 7_000_200) for step in range(30)]
    assert len(set(ports)) == len(ports) and min(ports) > 1024
    assert max(slurm.port(job) for job in range(20_000)) < 32768


def test_a_recipe_that_does_not_match_the_allocation_is_refused(job, capsys) -> None:
    _fake_torch(job, finds_gpu=True)
    assert _refused_key(capsys, "cluster.num_nodes=2") == "cluster.num_nodes"
    job.setenv("SLURM_GPUS_ON_NODE", "8")
    assert _refused_key(capsys) == "cluster.gpus_per_node"
    assert _plan(capsys, "runtime.device=cpu")["RANKS"] == "4"
    job.setenv("SLURM_GPUS_ON_NODE", "4")
    assert _plan(capsys)["RANKS"] == "4"
    for flag in ("--dry-run", "--dry_run", "--help"):
        assert _refused_key(capsys, flag) == flag.replace("_", "-")
    assert main([*RECIPE, "distillation.max_num_stepz=3"]) == 2


def test_a_job_with_gpus_that_torch_cannot_use_is_refused_before_any_rank_starts(job, capsys) -> None:
    job.setenv("SLURM_GPUS_ON_NODE", "4")
    _fake_torch(job, finds_gpu=False)
    assert _refused_key(capsys) == "runtime.device"
    assert main(RECIPE) == 2
    printed = capsys.readouterr().err
    assert "torch 2.13.0+cpu" in printed and "make venv-gpu" in printed and "runtime.device=cpu" in printed
    assert _plan(capsys, "runtime.device=cpu")["RANKS"] == "4"
    _fake_torch(job, finds_gpu=True)
    assert _plan(capsys)["RANKS"] == "4"


OLD_COMMAND = (
    "uv run python examples/run_distillation.py --config"
    " examples/configs/recipes/llm/my-context-self-distillation-1n4g.yaml"
    " cluster.num_nodes=2 logger.wandb_enabled=False"
)


@pytest.mark.parametrize("arguments", [[], RECIPE])
def test_a_command_in_the_environment_is_refused_with_the_new_command(job, arguments: list[str]) -> None:
    """The old batch script ran this variable, and this one runs its arguments."""
    job.setenv("COMMAND", OLD_COMMAND)
    with pytest.raises(UserError) as caught:
        variables(arguments)
    assert caught.value.key == "COMMAND"
    new = "--config recipes/my-context-self-distillation-1n4g.yaml cluster.num_nodes=2 logger.wandb_enabled=False"
    assert f"scripts/train.sbatch {new}" in caught.value.fix
    for broken in ("'", "--config", "ls"):
        job.setenv("COMMAND", broken)
        with pytest.raises(UserError) as caught:
            variables(arguments)
        assert caught.value.key == "COMMAND" and "recipes/NAME.yaml" in caught.value.fix


def test_a_job_without_a_recipe_is_refused(job) -> None:
    with pytest.raises(UserError) as caught:
        variables(["distillation.seed=3"])
    assert caught.value.key == "--config"


def test_both_fixes_are_printed_if_the_allocation_does_not_match(job, capsys) -> None:
    assert main([*RECIPE, "cluster.num_nodes=2"]) == 2
    printed = capsys.readouterr().err
    assert "-N2" in printed and "cluster.num_nodes=1" in printed


def test_the_rendezvous_is_on_the_given_interface(job, capsys) -> None:
    job.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert _plan(capsys)["ADDRESS"] == "127.0.0.1"
    job.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    assert _refused_key(capsys) == "GLOO_SOCKET_IFNAME"


def test_a_node_whose_name_cannot_be_resolved_gets_its_address_from_slurm(job, tmp_path, capsys) -> None:
    def only_numbers(host: str, port: None) -> None:
        if not host[0].isdigit():
            raise socket.gaierror("not known")

    job.setattr(socket, "getaddrinfo", only_numbers)
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "NodeName=$3 NodeAddr=10.1.2.3 NodeHostName=$3"\n')
    (tmp_path / "scontrol").chmod(0o755)
    job.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert slurm.address_of("node7") == _plan(capsys)["ADDRESS"] == "10.1.2.3"
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    assert slurm.address_of("node7") == "node7"
    assert _refused_key(capsys) == "GLOO_SOCKET_IFNAME"


COMMANDS = re.findall(r"`(sbatch -N[^`]*train\.sbatch[^`]*)`", (ROOT / "scripts/SLURM.md").read_text())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_slurm_page_fits_its_recipe(command: str) -> None:
    before, _, after = command.partition("scripts/train.sbatch ")
    cluster = parse_args([word.replace("recipes/", f"{ROOT}/recipes/") for word in shlex.split(after)]).config.cluster
    gpus = re.search(r"--gpus-per-node=(\d+)", before)
    given = int(re.findall(r"-N(\d+)", before)[0]), int(gpus.group(1)) if gpus else 4
    assert (cluster.num_nodes, cluster.gpus_per_node) == given


def test_the_slurm_page_has_a_command_for_every_cluster_recipe() -> None:
    runs = {word for command in COMMANDS for word in command.split() if word.startswith("recipes/")}
    on_a_cluster = {f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*-[0-9]n[0-9]g*")}
    assert len(COMMANDS) >= 12 and {name for name in on_a_cluster if "-4n4g" not in name} <= runs


# ---- the batch script with replacements of Slurm's commands (test_slurm.py uses a real Slurm) ----

SRUN = """trap "" USR1
[[ -z ${SIGNAL:-} ]] || kill "-$SIGNAL" "$PPID"
printf "%s" "$STATUS" > "$DISTILL_STATUS_FILE"
exit "$CODE"
"""
REPLACEMENTS = {
    "srun": SRUN,
    "squeue": "echo RUNNING",
    "scontrol": 'echo "$@" >> "$SCONTROL_CALLS"; exit "${SCONTROL:-0}"',
}


class BatchJob:
    """A job's directory, in which the batch script runs with replaced commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "distill").symlink_to(ROOT / "distill")
        (folder / "bin").mkdir()
        for name, script in REPLACEMENTS.items():
            (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
            (folder / "bin" / name).chmod(0o755)

    def start(self, restarts: int, code: int, status: dict[str, object] | None, **more: str) -> tuple[int, bool, str]:
        """Run the script for ranks that exit with ``code`` and ``status``.

        Returns its exit code, whether it requeued the job, and its messages.
        """
        calls = self.folder / "calls"
        calls.unlink(missing_ok=True)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            **JOB,
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "SCONTROL_CALLS": str(calls),
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_RESTART_COUNT": f"{restarts}",
            "CODE": f"{code}",
            "STATUS": "" if status is None else json.dumps(status, indent=2),
            **more,
        }
        arguments = [*RECIPE, f"runtime.run_dir={self.folder}/run"]
        command = ["bash", str(ROOT / "scripts/train.sbatch"), *arguments]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        requeued = calls.exists() and calls.read_text() == "requeue 4242\n"
        return ended.returncode, requeued, ended.stderr


@pytest.fixture
def batch_job(tmp_path: Path) -> BatchJob:
    return BatchJob(tmp_path)


def _status(state: str, reason: str = "", saved: int | None = 0, retryable: bool = False) -> dict[str, object]:
    steps = {"start_step": saved, "step": 5, "checkpoint_step": saved}
    return {"state": state, "reason": reason, "exit_code": 1, **steps, "retryable": retryable}


KILLED = "rank 1 on node2 was killed"


def _stop_reason(report: str) -> str:
    """Return the reason with which a rank exits when the supervisor's method ``report`` receives SIGTERM."""
    supervisor = Supervisor(is_main=False)
    with patch.object(supervisor, "_announce_and_exit", side_effect=SystemExit) as end, contextlib.suppress(SystemExit):
        getattr(supervisor, report)("SIGTERM")
    status: ExitStatus = end.call_args.args[0]
    assert status.state == "stopped"
    return status.reason


@pytest.mark.parametrize(
    ("code", "status", "exits", "requeues"),
    [
        (0, _status("finished"), 0, False),
        (1, _status("refused", "a=1 is wrong: set 2"), 2, False),
        (1, _status("failed", "rank 1: RuntimeError: broken"), 1, False),
        (1, _status("failed", KILLED, retryable=True), 0, True),
        (1, _status("stopped", "SIGTERM"), 0, True),
        (0, _status("stopped", _stop_reason("_first_signal")), 0, True),
        (1, _status("stopped", _stop_reason("_later_signal")), 0, True),
        (1, _status("stopped", "checkpointing.checkpoint_must_save_by=00:04:00:00"), 0, False),
        (137, _status("running"), 0, True),
        (3, None, 3, False),
    ],
    ids=[
        *("finished", "refused", "failed", "retryable", "stopped", "stopped while loading", "second signal"),
        *("time limit of the recipe", "killed", "no status"),
    ],
)
def test_the_status_of_a_run_decides_whether_its_job_is_requeued(batch_job, code, status, exits, requeues) -> None:
    found, requeued, messages = batch_job.start(0, code, status)
    assert (found, requeued) == (exits, requeues), messages


@pytest.mark.parametrize("signal", ["", "USR1"])
def test_a_job_that_an_alarm_stopped_is_not_requeued_even_near_its_time_limit(batch_job, signal: str) -> None:
    """``signal``: signal that Slurm sends to the script before the ranks end."""
    status = _status("stopped", "alarm train/loss>2 at step 3: train/loss is 4, above 2")
    code, requeued, messages = batch_job.start(0, 0, status, SIGNAL=signal)
    assert (code, requeued) == (0, False), messages
    assert "distillation.alarms" in messages and "checkpoint_must_save_by" not in messages
    assert ("SIGUSR1" in messages) == bool(signal)


def test_a_job_is_not_requeued_after_four_ends_without_a_new_checkpoint(batch_job) -> None:
    """The number of steps in between has no influence, nor has a start that ends before it searches a checkpoint."""
    messages: list[str] = []

    def requeues(*saved: int | None, since: int = 0) -> list[bool]:
        statuses = [_status("failed", KILLED, step, retryable=True) for step in saved]
        started = [batch_job.start(since + i, 1, status) for i, status in enumerate(statuses)]
        messages.extend(message for _, _, message in started)
        return [requeued for _, requeued, _ in started]

    assert requeues(None, 0, 0, 20, 20, None, 20) == [True] * 6 + [False]
    assert "not requeued" in messages[-1] and "step 20" in messages[-1]
    assert requeues(20, since=7) == [True], "the count starts again if an operator requeues the job"
    assert requeues(60, 60, 60, 60) == [True] * 3 + [False], "and for another job in the same run directory"
    code, _, message = batch_job.start(0, 1, _status("failed", KILLED, 60, retryable=True))
    assert code == 0, message


def test_a_job_that_slurm_refuses_to_requeue_fails_with_a_message(batch_job) -> None:
    code, _, message = batch_job.start(0, 1, _status("stopped", "SIGUSR1"), SCONTROL="1")
    assert code == 1 and "submit it again" in message
