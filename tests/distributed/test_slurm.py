"""scripts/train.sbatch on a real Slurm with two nodes per run: start, stop, requeue, node failure, refused recipes."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm_cluster import Cluster, missing_programs
from tests.test_train import SINCE_THE_LAST_SYNC, _train_rows, make_tiny_run

pytestmark = pytest.mark.slurm
STEPS = 10

HOLD = """
import os, time
if hold := os.environ.get("HOLD_UNTIL"):
    from distill.supervise.status import Status

    set_step = Status.set_step

    def hold_third_step(self, step):
        set_step(self, step)
        while step > 2 and not os.path.exists(hold):
            time.sleep(0.1)

    Status.set_step = hold_third_step
"""
"""sitecustomize.py that holds a run after its third step until a file exists, so that a test can interrupt the run
there on any machine."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"Slurm is not installed ({', '.join(missing)}): apt-get install slurm-wlm munge")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_tiny_run(tmp_path_factory.mktemp("run"))
    (root / "hold").mkdir()
    (root / "hold/sitecustomize.py").write_text(HOLD)
    return root


def _run(tiny: Path, name: str, *overrides: str) -> list[str]:
    """Return the arguments of a run on two nodes with one rank each."""
    return [
        *("--config", str(tiny / "recipe.yaml")),
        *("runtime.device=cpu", "cluster.num_nodes=2", "cluster.gpus_per_node=1"),
        *(f"distillation.{key}" for key in (f"max_num_steps={STEPS}", "max_num_epochs=100")),
        f"checkpointing.checkpoint_dir={tiny}/checkpoints/{name}",
        f"logger.log_dir={tiny}/logs/{name}",
        *overrides,
    ]


class HeldJob:
    """A submitted job that waits after its third step until ``release``, also if it is requeued before."""

    def __init__(self, cluster: Cluster, tiny: Path, name: str, *options: str) -> None:
        self.cluster, self.tiny, self.name = cluster, tiny, name
        self._file = tiny / f"{name} is released"
        environment = {
            "HOLD_UNTIL": str(self._file),
            "PYTHONPATH": f"{tiny}/hold:{cluster.environment['PYTHONPATH']}",
        }
        self.number = cluster.submit("-N2", *options, "scripts/train.sbatch", *_run(tiny, name), **environment)

    def wait_for_third_step(self) -> None:
        """Return when the job waits."""
        self.cluster.until("three steps", lambda: len(self.rows()) >= 3, job=self.number)

    def release(self, after: str = "") -> None:
        """Let the job continue as soon as its output contains ``after``."""
        self.cluster.until(f"the output {after!r}", lambda: after in self.output(), job=self.number)
        self._file.touch()

    def rows(self) -> list[dict[str, Any]]:
        """Return the metrics of all finished steps."""
        return _rows(self.tiny, self.name, self.number)

    def output(self) -> str:
        """Return the batch script's output."""
        return self.cluster.output(self.number)

    def requeued(self) -> bool:
        """Return whether the job was requeued."""
        return self.cluster.job(self.number)["Restarts"] != "0"


def _rows(tiny: Path, name: str, job: int) -> list[dict[str, Any]]:
    folder = tiny / "logs" / name / f"job_{job}"
    return _train_rows(folder) if (folder / "metrics.jsonl").exists() else []


def _assert_same_metrics(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Compare the metrics of every step, except those that a resumed step cannot compute."""
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, STEPS + 1))
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() | SINCE_THE_LAST_SYNC == their.keys() | SINCE_THE_LAST_SYNC
        for key in our.keys() - SINCE_THE_LAST_SYNC:
            assert our[key] == their[key] or math.isnan(our[key]), (our["step"], key)


def _completed(cluster: Cluster, job: int) -> dict[str, str]:
    """Wait for the end of a job, check that it succeeded, and return Slurm's description of it."""
    found = cluster.ended(job)
    assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), cluster.output(job)
    return found


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tiny: Path) -> tuple[int, list[dict[str, Any]]]:
    """Job number and metrics of a run that is not interrupted."""
    job = cluster.submit("-N2", "scripts/train.sbatch", *_run(tiny, "undisturbed"))
    _completed(cluster, job)
    return job, _rows(tiny, "undisturbed", job)


def test_a_job_of_two_nodes_trains_and_writes_its_logs(cluster, tiny, undisturbed) -> None:
    job, rows = undisturbed
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    output = cluster.output(job)
    assert "2 x 1 ranks, rendezvous 127.0.0.1:" in output and "2 ranks: dp 2" in output, output
    logs = cluster.root / f"{job}-logs"
    assert sorted(file.name for file in (logs / "logs").iterdir()) == ["rank_00000.log", "rank_00001.log"]
    assert json.loads((logs / "status.json").read_text())["state"] == "finished"
    written = [path for path in (tiny / "logs/undisturbed").rglob("*") if not path.is_symlink()]
    assert written and not [path for path in written if path.stat().st_mode & 0o002], "writable by other users"


def test_a_job_without_agents_uses_the_given_interface_and_has_the_same_metrics(cluster, tiny, undisturbed) -> None:
    arguments = ["-N2", "scripts/train.sbatch", *_run(tiny, "agentless")]
    job = cluster.submit(*arguments, DISTILL_LAUNCHER="srun", GLOO_SOCKET_IFNAME="lo")
    _completed(cluster, job)
    _assert_same_metrics(_rows(tiny, "agentless", job), undisturbed[1])


def test_plain_srun_starts_a_run(cluster, tiny, undisturbed) -> None:
    """Without the batch script, on nodes whose names cannot be resolved."""
    python = cluster.environment["PYTHON"]
    run_dir = tiny / "logs/srun/job_0"
    command = ["srun", "-N2", "-n2", "-K", python, "-m", "distill.train", *_run(tiny, "srun")]
    found = cluster.run(*command, f"runtime.run_dir={run_dir}")
    assert found.returncode == 0, found.stderr
    _assert_same_metrics(_train_rows(run_dir), undisturbed[1])


REFUSED = {
    "nodes": ("-N1", "", "", "cluster.num_nodes=2"),
    "GPUs": ("-N2", "--gpus-per-node=1", "cluster.gpus_per_node=4", "cluster.gpus_per_node=4"),
    "unknown key": ("-N2", "", "distillation.max_steps=4", "distillation.max_steps"),
}
"""Options of jobs, their overrides, and the key that the error names."""


def test_a_recipe_that_does_not_match_its_job_is_refused_before_any_rank_starts(cluster, tiny) -> None:
    jobs = {}
    for name, (nodes, gpus, override, _) in REFUSED.items():
        overrides = filter(None, ("runtime.device=auto", override))
        options = filter(None, (nodes, gpus))
        jobs[name] = cluster.submit(*options, "scripts/train.sbatch", *_run(tiny, "refused", *overrides))
    for name, job in jobs.items():
        found, output = cluster.ended(job), cluster.output(job)
        assert (found["JobState"], found["ExitCode"]) == ("FAILED", "2:0"), output
        assert output.startswith("error: ") and REFUSED[name][-1] in output and output.count("\n") == 1, output
    assert not (tiny / "logs/refused").exists()


@pytest.fixture(scope="module")
def interrupted(cluster: Cluster, tiny: Path) -> dict[str, HeldJob]:
    """Four jobs that run at the same time on the same nodes and are interrupted after their third step.

    requeued: an operator's requeue sends SIGTERM to every process, three times. cancelled: by scancel. limited: the
    limit is set so near that Slurm sends SIGUSR1; the second start has enough time. failed node: node2 dies.
    """
    shared = "--nodelist=node[1,3]"
    jobs = {"failed node": HeldJob(cluster, tiny, "failed node")}
    jobs |= {name: HeldJob(cluster, tiny, name, shared) for name in ("requeued", "cancelled")}
    limited = HeldJob(cluster, tiny, "limited", shared, "--time=60", "--signal=B:USR1@160")
    for job in (*jobs.values(), limited):
        job.wait_for_third_step()
    assert cluster.job(jobs["failed node"].number)["NodeList"] == "node[1-2]"
    hours, minutes, _ = map(int, cluster.job(limited.number)["RunTime"].split(":"))
    near = f"TimeLimit={60 * hours + minutes + 3}"
    for command in (
        ("scontrol", "update", f"JobId={limited.number}", near),
        ("scontrol", "requeue", str(jobs["requeued"].number)),
        ("scancel", str(jobs["cancelled"].number)),
    ):
        done = cluster.run(*command)
        assert done.returncode == 0, done.stderr
    cluster.kill_node("node2")
    for name in ("requeued", "cancelled"):
        jobs[name].release(after="received SIGTERM")
    cluster.until("the requeue", jobs["failed node"].requeued, 60, jobs["failed node"].number)
    jobs["failed node"].release()
    limited.release(after="received SIGUSR1")
    cluster.until("the requeue", limited.requeued, job=limited.number)
    cluster.run("scontrol", "update", f"JobId={limited.number}", "TimeLimit=60")
    return jobs | {"limited": limited}


def test_a_requeued_job_resumes_bit_for_bit(cluster, interrupted, undisturbed) -> None:
    job = interrupted["requeued"]
    found, output = _completed(cluster, job.number), job.output()
    assert found["Restarts"] == "1" and output.count("restart ") == 2, output
    assert "stopped after" in output and "resumed from" in output, output
    _assert_same_metrics(job.rows(), undisturbed[1])


def test_a_cancelled_job_saves_and_stays_cancelled(cluster, tiny, interrupted) -> None:
    job = interrupted["cancelled"]
    assert cluster.ended(job.number)["JobState"] == "CANCELLED"
    output = job.output()
    assert "stopped after" in output and "requeueing;" not in output, output
    assert (tiny / f"checkpoints/cancelled/step_{len(job.rows())}").exists(), output


def test_a_job_near_its_time_limit_saves_and_requeues_itself(cluster, interrupted, undisturbed) -> None:
    job = interrupted["limited"]
    found, output = _completed(cluster, job.number), job.output()
    assert int(found["Restarts"]) >= 1 and "stopped SIGUSR1" in output, output
    assert "requeueing;" in output and "resumed from" in output and "TIME LIMIT" not in output, output
    _assert_same_metrics(job.rows(), undisturbed[1])


def test_a_failed_node_ends_the_job_and_it_resumes_on_another_node(cluster, interrupted, undisturbed) -> None:
    job = interrupted["failed node"]
    assert _completed(cluster, job.number)["NodeList"] == "node[1,3]"
    output = job.output()
    assert "(killed" in output and "resumed from" in output, output
    _assert_same_metrics(job.rows(), undisturbed[1])
    cluster.start_node("node2")


def test_the_acceptance_job_checks_collectives_over_two_nodes(cluster, tmp_path) -> None:
    arguments = ("--ranks", "1", "--only", "collectives", "--out", str(tmp_path))
    job = cluster.submit("-N2", "--output=distill-%j.out", "scripts/accept.sbatch", *arguments)
    _completed(cluster, job)
    for folder in (tmp_path, tmp_path / "node_1"):
        found = json.loads((folder / "accept.json").read_text())
        checks = {check["name"]: check["value"] for check in found["parts"][1]["numbers"]}
        assert found["passed"] and checks["ranks at the rendezvous"] == 2, found


def test_no_process_of_any_job_remains(cluster) -> None:
    """Must be the last test: all jobs have ended."""
    with contextlib.suppress(TimeoutError):
        cluster.until("every process to end", lambda: not cluster.leftovers(), 30)
    assert cluster.leftovers() == {}
