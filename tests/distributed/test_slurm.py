"""scripts/train.sbatch on a real Slurm, two nodes a run: start, stop, requeue, a lost node, and what doesn't match."""

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
STEPS = 24

BRAKE = """
import os, time
if os.environ.get("BRAKE_S") or os.environ.get("BRAKE_UNTIL"):
    from distill.supervise.status import Status

    set_step = Status.set_step

    def slow(self, step):
        set_step(self, step)
        time.sleep(float(os.environ.get("BRAKE_S", 0)))
        while step > 2 and not os.path.exists(os.environ.get("BRAKE_UNTIL", "/")):
            time.sleep(0.1)

    Status.set_step = slow
"""
"""Every step takes so many seconds longer, or the third one until a file is there: what happens to a run in its middle
needs one, on any machine.
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"Slurm isn't installed ({', '.join(missing)}): apt-get install slurm-wlm munge")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_tiny_run(tmp_path_factory.mktemp("run"))
    (root / "brake").mkdir()
    (root / "brake/sitecustomize.py").write_text(BRAKE)
    return root


def _run(tiny: Path, name: str, *overrides: str, nodes: int = 2) -> list[str]:
    """The arguments of a run of one rank a node."""
    return [
        *("--config", str(tiny / "recipe.yaml")),
        *("runtime.device=cpu", f"cluster.num_nodes={nodes}", "cluster.gpus_per_node=1"),
        *(f"distillation.{key}" for key in (f"max_num_steps={STEPS}", "max_num_epochs=100")),
        f"checkpointing.checkpoint_dir={tiny}/checkpoints/{name}",
        f"logger.log_dir={tiny}/logs/{name}",
        *overrides,
    ]


def _braked(cluster: Cluster, tiny: Path, seconds: float) -> dict[str, str]:
    return {"BRAKE_S": str(seconds), "PYTHONPATH": f"{tiny}/brake:{cluster.environment['PYTHONPATH']}"}


def _rows(tiny: Path, name: str, job: int) -> list[dict[str, Any]]:
    folder = tiny / "logs" / name / f"job_{job}"
    return _train_rows(folder) if (folder / "metrics.jsonl").exists() else []


def _same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """The same numbers at every step, but for what a resumed step can't know."""
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, STEPS + 1))
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() | SINCE_THE_LAST_SYNC == their.keys() | SINCE_THE_LAST_SYNC
        for key in our.keys() - SINCE_THE_LAST_SYNC:
            assert our[key] == their[key] or math.isnan(our[key]), (our["step"], key)


def _ended_well(cluster: Cluster, job: int) -> dict[str, str]:
    found = cluster.ended(job)
    assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), cluster.output(job)
    return found


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tiny: Path) -> tuple[int, list[dict[str, Any]]]:
    """A run of two nodes from its first step to its last: the job's number, and the metrics."""
    job = cluster.submit("-N2", "scripts/train.sbatch", *_run(tiny, "undisturbed"))
    _ended_well(cluster, job)
    return job, _rows(tiny, "undisturbed", job)


def test_a_job_of_two_nodes_trains_and_leaves_its_logs(cluster, tiny, undisturbed) -> None:
    job, rows = undisturbed
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    said = cluster.output(job)
    assert "2 x 1 ranks, rendezvous 127.0.0.1:" in said and "2 ranks: dp 2" in said, said
    logs = cluster.root / f"{job}-logs"
    assert sorted(file.name for file in (logs / "logs").iterdir()) == ["rank_00000.log", "rank_00001.log"]
    assert json.loads((logs / "status.json").read_text())["state"] == "finished"
    written = [path for path in (tiny / "logs/undisturbed").rglob("*") if not path.is_symlink()]
    assert written and not [path for path in written if path.stat().st_mode & 0o002], "writable for everyone"


def test_without_an_agent_the_same_run_binds_to_the_given_interface(cluster, tiny, undisturbed) -> None:
    """One task a rank, started by srun itself; the numbers are torchrun's."""
    arguments = ["-N2", "scripts/train.sbatch", *_run(tiny, "agentless")]
    job = cluster.submit(*arguments, DISTILL_LAUNCHER="srun", GLOO_SOCKET_IFNAME="lo")
    _ended_well(cluster, job)
    _same(_rows(tiny, "agentless", job), undisturbed[1])


def test_srun_alone_starts_a_run(cluster, tiny, undisturbed) -> None:
    """Without the script: Slurm's variables are enough, though no node's name resolves."""
    python = cluster.environment["PYTHON"]
    run_dir = tiny / "logs/alone/job_0"
    command = ["srun", "-N2", "-n2", "-K", python, "-m", "distill.train", *_run(tiny, "alone")]
    found = cluster.run(*command, f"runtime.run_dir={run_dir}")
    assert found.returncode == 0, found.stderr
    _same(_train_rows(run_dir), undisturbed[1])


@pytest.mark.parametrize(
    ("nodes", "asked", "override", "sentence"),
    [
        (1, "", "", "cluster.num_nodes=2 but the job has 1 nodes: submit it by sbatch -N2, or set cluster.num_nodes=1"),
        (2, "--gpus-per-node=1", "cluster.gpus_per_node=4", "cluster.gpus_per_node=4 but the job has 1 GPUs on a node"),
        (2, "", "distillation.max_steps=4", "max_num_steps"),
    ],
    ids=["nodes", "GPUs", "recipe"],
)
def test_what_does_not_match_is_refused_before_anything_starts(cluster, tiny, nodes, asked, override, sentence) -> None:
    slurms = [f"-N{nodes}", *([asked] if asked else [])]
    overrides = ["runtime.device=auto", *([override] if override else [])]
    job = cluster.submit(*slurms, "scripts/train.sbatch", *_run(tiny, "refused", *overrides))
    found, said = cluster.ended(job), cluster.output(job)
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "2:0"), said
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1, said
    assert not (tiny / "logs/refused").exists()


def test_a_requeued_job_continues_as_if_nothing_had_happened(cluster, tiny, undisturbed) -> None:
    """An operator's requeue: SIGTERM to every process, three times over."""
    job = cluster.submit("-N2", "scripts/train.sbatch", *_run(tiny, "requeued"), **_braked(cluster, tiny, 0.5))
    cluster.until("three steps", lambda: len(_rows(tiny, "requeued", job)) >= 3, job=job)
    assert cluster.run("scontrol", "requeue", str(job)).returncode == 0
    found = _ended_well(cluster, job)
    said = cluster.output(job)
    assert found["Restarts"] == "1" and said.count("restart ") == 2, said
    assert "stopped after step" in said and "resumed from" in said, said
    _same(_rows(tiny, "requeued", job), undisturbed[1])


def test_a_run_that_nears_its_time_limit_saves_and_requeues_itself(cluster, tiny, undisturbed) -> None:
    """In its middle the limit is drawn so near that Slurm warns of it, once; for the second start there is time."""
    limit = ["--time=60", "--signal=B:USR1@100"]
    job = cluster.submit("-N2", *limit, "scripts/train.sbatch", *_run(tiny, "limited"), **_braked(cluster, tiny, 3))
    cluster.until("three steps", lambda: len(_rows(tiny, "limited", job)) >= 3, job=job)
    hours, minutes, _ = map(int, cluster.job(job)["RunTime"].split(":"))
    near = cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
    assert near.returncode == 0, near.stderr
    cluster.until("the requeue", lambda: cluster.job(job)["Restarts"] != "0", job=job)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    found = _ended_well(cluster, job)
    said = cluster.output(job)
    assert int(found["Restarts"]) >= 1 and "received SIGUSR1" in said, said
    assert "stopped SIGUSR1" in said and "requeueing;" in said and "resumed from" in said, said
    assert "TIME LIMIT" not in said, said
    _same(_rows(tiny, "limited", job), undisturbed[1])


def test_a_cancelled_job_saves_and_stays_cancelled(cluster, tiny) -> None:
    job = cluster.submit("-N2", "scripts/train.sbatch", *_run(tiny, "cancelled"), **_braked(cluster, tiny, 0.5))
    cluster.until("three steps", lambda: len(_rows(tiny, "cancelled", job)) >= 3, job=job)
    cluster.run("scancel", str(job))
    assert cluster.ended(job)["JobState"] == "CANCELLED"
    said = cluster.output(job)
    assert "stopped after step" in said and "requeueing;" not in said, said
    steps = len(_rows(tiny, "cancelled", job))
    assert (tiny / f"checkpoints/cancelled/step_{steps}").exists(), said


def test_a_lost_node_ends_the_job_soon_and_it_resumes_on_another(cluster, tiny, undisturbed) -> None:
    job = cluster.submit("-N2", "scripts/train.sbatch", *_run(tiny, "lost"), **_braked(cluster, tiny, 0.5))
    cluster.until("three steps", lambda: len(_rows(tiny, "lost", job)) >= 3, job=job)
    assert cluster.job(job)["NodeList"] == "node[1-2]"
    cluster.kill_node("node2")
    cluster.until("the requeue", lambda: cluster.job(job)["Restarts"] != "0", 60, job)
    assert _ended_well(cluster, job)["NodeList"] == "node[1,3]"
    said = cluster.output(job)
    assert "killed or crashed" in said and "resumed from" in said, said
    _same(_rows(tiny, "lost", job), undisturbed[1])
    cluster.start_node("node2")


def test_two_jobs_on_the_same_nodes_keep_apart(cluster, tiny, undisturbed) -> None:
    names, go = ("one", "two"), tiny / "both are at work"
    held = {**_braked(cluster, tiny, 0.0), "BRAKE_UNTIL": str(go)}
    jobs = [cluster.submit("-wnode[1,3]", "-N2", "scripts/train.sbatch", *_run(tiny, name), **held) for name in names]

    def at_work() -> bool:
        for job in jobs:
            assert cluster.job(job)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), cluster.output(job)
        return all(_rows(tiny, *pair) for pair in zip(names, jobs, strict=True))

    cluster.until("both to take steps", at_work)
    go.touch()
    for name, job in zip(names, jobs, strict=True):
        _ended_well(cluster, job)
        _same(_rows(tiny, name, job), undisturbed[1])


def test_nothing_is_left_of_any_job(cluster) -> None:
    """The last of these tests: all jobs have ended."""
    with contextlib.suppress(TimeoutError):
        cluster.until("every process to end", lambda: not cluster.leftovers(), 30)
    assert cluster.leftovers() == {}
