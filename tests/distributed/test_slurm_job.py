"""What the batch script is told of its job, and the commands of scripts/README.md."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distill.config import parse_args
from distill.distributed import slurm
from distill.distributed.slurm_job import main

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


def _told(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, str]:
    assert main([*RECIPE, *overrides]) == 0
    return dict(line.split("=", 1) for line in capsys.readouterr().out.splitlines())


def _refused(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    assert main([*RECIPE, *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_a_job_is_told_where_its_ranks_meet_and_write(job, capsys) -> None:
    first = _told(capsys)
    port = int(first.pop("PORT"))
    run_dir = "logs/my-distillation-1n4g/job_4242"
    assert first == {"NODES": "1", "RANKS": "4", "ADDRESS": "localhost", "RUN_DIR": run_dir}
    assert int(_told(capsys)["PORT"]) == port, "a requeued job would tell its ranks otherwise"
    job.setenv("SLURM_JOB_ID", "4243")
    assert int(_told(capsys)["PORT"]) != port, "two jobs on one node would clash"
    with socket.create_server(("", port)):
        job.setenv("SLURM_JOB_ID", "4242")
        assert int(_told(capsys)["PORT"]) == port + 1, "some other program is there"
    job.setenv("SLURM_JOB_ID", "4243")
    assert _told(capsys, "runtime.run_dir=my runs/one")["RUN_DIR"] == "'my runs/one'"


def test_ports_of_jobs_and_steps_side_by_side_differ_and_no_connection_is_given_them() -> None:
    ports = [slurm.port(job, step) for job in range(7_000_000, 7_000_200) for step in range(30)]
    assert len(set(ports)) == len(ports) and min(ports) > 1024
    assert max(slurm.port(job) for job in range(20_000)) < 32768


def test_an_allocation_that_does_not_match_is_refused_with_both_remedies(job, capsys) -> None:
    said = _refused(capsys, "cluster.num_nodes=2")
    assert said.startswith("error: cluster.num_nodes=2 but the job has 1 nodes")
    assert "sbatch -N2" in said and "set cluster.num_nodes=1" in said
    job.setenv("SLURM_GPUS_ON_NODE", "8")
    said = _refused(capsys)
    assert "cluster.gpus_per_node=4 but the job has 8 GPUs on a node" in said
    assert "--gpus-per-node=4" in said and "set cluster.gpus_per_node=8" in said
    assert _told(capsys, "runtime.device=cpu")["RANKS"] == "4"
    job.setenv("SLURM_GPUS_ON_NODE", "4")
    assert _told(capsys)["RANKS"] == "4"
    assert "--dry-run needs no job" in _refused(capsys, "--dry-run")
    assert "distillation.max_num_stepz" in _refused(capsys, "distillation.max_num_stepz=3")


def test_the_rendezvous_is_on_the_given_interface(job, capsys) -> None:
    job.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert _told(capsys)["ADDRESS"] == "127.0.0.1"
    job.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    assert "GLOO_SOCKET_IFNAME=nosuch0 has no address" in _refused(capsys)


def test_a_node_without_a_resolvable_name_has_the_address_that_slurm_knows(job, tmp_path, capsys) -> None:
    def only_numbers(host: str, port: None) -> None:
        if not host[0].isdigit():
            raise socket.gaierror("not known")

    job.setattr(socket, "getaddrinfo", only_numbers)
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "NodeName=$3 NodeAddr=10.1.2.3 NodeHostName=$3"\n')
    (tmp_path / "scontrol").chmod(0o755)
    job.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert slurm.address_of("node7") == _told(capsys)["ADDRESS"] == "10.1.2.3"
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    assert slurm.address_of("node7") == "node7"
    assert "first node localhost has no address" in _refused(capsys) and "GLOO_SOCKET_IFNAME" in _refused(capsys)


COMMANDS = re.findall(r"`(sbatch -N[^`]*train\.sbatch[^`]*)`", (ROOT / "scripts/README.md").read_text())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_scripts_readme_means_something_here(command: str) -> None:
    before, _, after = command.partition("scripts/train.sbatch ")
    cluster = parse_args([word.replace("recipes/", f"{ROOT}/recipes/") for word in shlex.split(after)]).config.cluster
    gpus = re.search(r"--gpus-per-node=(\d+)", before)
    asked = int(re.findall(r"-N(\d+)", before)[0]), int(gpus.group(1)) if gpus else 4
    assert (cluster.num_nodes, cluster.gpus_per_node) == asked


def test_the_scripts_readme_runs_every_recipe_of_a_cluster_that_the_old_commands_did() -> None:
    runs = {word for command in COMMANDS for word in command.split() if word.startswith("recipes/")}
    on_a_cluster = {f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*-[0-9]n[0-9]g*")}
    assert len(COMMANDS) >= 12 and {name for name in on_a_cluster if "-4n4g" not in name} <= runs


# ---- the batch script, with stand-ins for Slurm's commands (test_slurm.py has the real ones) ----

STANDS_IN = {
    "srun": 'printf "%s" "$STATUS" > "$DISTILL_STATUS_FILE"; exit "$CODE"',
    "squeue": "echo RUNNING",
    "scontrol": 'echo "$@" >> "$ASKED"; exit "${SCONTROL:-0}"',
}


class Submitted:
    """A job's folder, and what its script did with the ends of its runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "distill").symlink_to(ROOT / "distill")
        (folder / "bin").mkdir()
        for name, does in STANDS_IN.items():
            (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
            (folder / "bin" / name).chmod(0o755)

    def start(self, restarts: int, code: int, status: dict[str, object] | None, **more: str) -> tuple[int, bool, str]:
        """The script's exit code, whether it asked for a requeue, and what it said."""
        asked = self.folder / "asked"
        asked.unlink(missing_ok=True)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            **JOB,
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "ASKED": str(asked),
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_RESTART_COUNT": f"{restarts}",
            "CODE": f"{code}",
            "STATUS": "" if status is None else json.dumps(status, indent=2),
            **more,
        }
        arguments = [*RECIPE, f"runtime.run_dir={self.folder}/run"]
        command = ["bash", str(ROOT / "scripts/train.sbatch"), *arguments]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        requeued = asked.exists() and asked.read_text() == "requeue 4242\n"
        return ended.returncode, requeued, ended.stderr


@pytest.fixture
def submitted(tmp_path: Path) -> Submitted:
    return Submitted(tmp_path)


def _status(state: str, reason: str = "", saved: int | None = 0, lost: bool = False) -> dict[str, object]:
    where = {"began": saved, "step": 5, "saved": saved}
    return {"state": state, **where, "reason": reason, "exit_code": 1, "lost": lost}


@pytest.mark.parametrize(
    ("code", "status", "ends", "requeues"),
    [
        (0, _status("finished"), 0, False),
        (1, _status("refused", "a=1 is wrong: set 2"), 2, False),
        (1, _status("failed", "rank 1: RuntimeError: broken"), 1, False),
        (1, _status("failed", "rank 1 on node2 died without a word", lost=True), 0, True),
        (1, _status("stopped", "SIGTERM"), 0, True),
        (1, _status("stopped", "checkpointing.checkpoint_must_save_by=00:04:00:00"), 0, False),
        (137, _status("running"), 0, True),
        (3, None, 3, False),
    ],
    ids=["finished", "refused", "failed", "lost", "told to stop", "by the clock", "all killed", "never began"],
)
def test_how_a_run_ended_decides_what_becomes_of_its_job(submitted, code, status, ends, requeues) -> None:
    found, requeued, said = submitted.start(0, code, status)
    assert (found, requeued) == (ends, requeues), said


def test_a_job_that_saves_nothing_any_more_is_given_up_at_the_fourth_end(submitted) -> None:
    """However many steps it took in between; a start that never looked for a checkpoint changes nothing."""
    died = "rank 1 on node2 died without a word"
    messages: list[str] = []

    def requeues(*saved: int | None, since: int = 0) -> list[bool]:
        ends = [_status("failed", died, step, lost=True) for step in saved]
        started = [submitted.start(since + i, 1, status) for i, status in enumerate(ends)]
        messages.extend(message for _, _, message in started)
        return [requeued for _, requeued, _ in started]

    assert requeues(None, 0, 0, 20, 20, None, 20) == [True] * 6 + [False]
    assert "it has ended four times in a row with nothing saved after step 20" in messages[-1]
    assert requeues(20, since=7) == [True], "whom an operator gives one more chance begins to count anew"
    assert requeues(60, 60, 60, 60) == [True] * 3 + [False], "and so does another job in the same folder"
    code, _, said = submitted.start(0, 1, _status("failed", died, 60, lost=True))
    assert code == 0, said


def test_a_job_that_slurm_does_not_requeue_says_so(submitted) -> None:
    code, _, said = submitted.start(0, 1, _status("stopped", "SIGUSR1"), SCONTROL="1")
    assert code == 1 and "Slurm doesn't requeue it: submit it again to continue" in said
