"""What the batch script is told of its job, and the commands of scripts/README.md."""

from __future__ import annotations

import os
import re
import shlex
import socket
from pathlib import Path

import pytest

from distill.config import parse_args
from distill.runtime import slurm
from distill.runtime.slurm_job import main

ROOT = Path(__file__).resolve().parent.parent
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
