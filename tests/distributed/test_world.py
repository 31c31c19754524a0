"""The ranks of a run: environments, agreement, errors that leave together."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist

from distill.distributed import slurm
from distill.distributed.program import run_program, start_process
from distill.distributed.rendezvous import Rendezvous
from distill.distributed.world import World
from distill.errors import UserError
from distill.run_dir import new_run_dir
from distill.supervise.status import read_status
from scripts.launch import ROOT, torchrun
from tests.helpers import free_port, run_ranks

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "jwb[0012-0013]",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    of_torch = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in of_torch:
            monkeypatch.delenv(name)
    return monkeypatch


def test_srun_tells_a_task_its_place(environment) -> None:
    for name, value in SRUN.items():
        environment.setenv(name, value)
    found = slurm.torch_environment()
    port = int(found.pop("MASTER_PORT"))
    assert found.pop(slurm.START) == "4242.0.0"
    assert found == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "jwb0012",
    }
    assert 1024 < port < 65536
    environment.setenv("SLURM_JOB_ID", "4243")
    assert int(slurm.torch_environment()["MASTER_PORT"]) != port, "two jobs on one node would clash"


def test_torchrun_under_srun_is_left_alone(environment) -> None:
    for name, value in SRUN.items():
        environment.setenv(name, value)
    environment.setenv("RANK", "0")
    assert slurm.torch_environment() == {}


def test_a_lone_process_needs_no_rendezvous(environment) -> None:
    assert slurm.torch_environment() == {}
    environment.setenv("SLURM_NTASKS", "1")
    environment.setenv("SLURM_PROCID", "0")
    assert slurm.torch_environment() == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("jwb[0012-0014,0020],x1", "jwb0012"), ("gpu-a[3,7]", "gpu-a3")],
)
def test_the_first_host_of_a_node_list(nodes, first) -> None:
    assert slurm.first_host(nodes) == first


@pytest.mark.parametrize(
    ("tasks", "node", "count"), [("4(x2),3", 0, 4), ("4(x2),3", 1, 4), ("4(x2),3", 2, 3), ("8", 0, 8)]
)
def test_tasks_of_a_node(tasks, node, count) -> None:
    assert slurm.tasks_of_node(tasks, node) == count


def _listening() -> list[str]:
    """The addresses, in hexadecimal, at which this machine listens on the port of the rendezvous."""
    world = World()
    port = f":{int(os.environ['MASTER_PORT']):04X}"
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table]
    found = [local.removesuffix(port) for _, local, _, state, *_ in lines if local.endswith(port) and state == "0A"]
    world.close()
    return found


@pytest.mark.slow
def test_the_rendezvous_listens_at_the_given_address_alone() -> None:
    assert run_ranks(2, _listening) == [["0100007F"]] * 2


TAKEN, LONELY, NOBODY = "the port is taken", "rank 1 never comes", "nobody keeps the rendezvous"
ELSEWHERE = "the address is another machine's"


def _before_there_is_a_world(folder: str) -> dict[str, tuple[int, str, dict[str, object]]]:
    """The program's exit code, what it says and its status, where its ranks don't find each other."""
    from distill.distributed import rendezvous

    rendezvous.PATIENCE_S = 2.0
    found = {}
    for name, rank, size in ((TAKEN, 0, 2), (LONELY, 0, 3), (NOBODY, 1, 2), (ELSEWHERE, 0, 2)):
        status = Path(folder) / f"{name}.json"
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_PORT": str(free_port()), "DISTILL_STATUS_FILE": str(status)}
        os.environ["MASTER_ADDR"] = "192.0.2.1" if name == ELSEWHERE else "127.0.0.1"  # an address of documentation's
        rendezvous._OWN_PATIENCE_S = 1.0 if name == ELSEWHERE else 60.0
        with contextlib.ExitStack() as stack:
            if name == TAKEN:
                stack.enter_context(socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))))
            said = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            start_process()
            code = run_program(lambda world: None)
        found[name] = (code, said.getvalue().replace(os.environ["MASTER_PORT"], "PORT"), read_status(status))
    return found


@pytest.mark.slow
def test_ranks_that_do_not_find_each_other_say_why_and_leave(tmp_path) -> None:
    (found,) = run_ranks(1, _before_there_is_a_world, str(tmp_path))
    says = {
        TAKEN: (2, "MASTER_PORT=PORT is taken on 127.0.0.1, by another run perhaps: set it to a free port"),
        LONELY: (1, "ranks 1, 2 of 3 did not come to the rendezvous 127.0.0.1:PORT in 2 s"),
        NOBODY: (1, "rank 1 found nobody who keeps the rendezvous 127.0.0.1:PORT, rank 0 or a launcher, for 2 s"),
    }
    code, said, status = found.pop(ELSEWHERE)
    assert code == status["exit_code"] == 2 and said.startswith("error: MASTER_ADDR=192.0.2.1 is where rank 0 can't be")
    for name, (code, sentence) in says.items():
        assert found[name][:2] == (code, f"error: {sentence}\n")
        assert found[name][2]["exit_code"] == code and found[name][2]["lost"] is (code == 1)


@pytest.mark.parametrize(
    ("launched", "other"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "8"}),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, {"SLURM_RESTART_COUNT": "0"}),
        ({"TORCHELASTIC_RUN_ID": "7.0", "TORCHELASTIC_RESTART_COUNT": "1"}, {"TORCHELASTIC_RUN_ID": "8.0"}),
        ({"TORCHELASTIC_RUN_ID": "7.0", "TORCHELASTIC_RESTART_COUNT": "1"}, {"TORCHELASTIC_RESTART_COUNT": "0"}),
        ({}, None),
        ({"SLURM_JOB_ID": "7"}, None),
    ],
    ids=[
        "a job",
        "an earlier start of the job",
        "a launcher",
        "an earlier start by the launcher",
        "none: ranks by hand",
        "none: ranks by hand in steps of a job",
    ],
)
def test_a_rank_of_another_start_at_the_same_rendezvous_is_not_taken_for_ours(environment, launched, other) -> None:
    """Though it calls itself what a rank of ours would."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **launched}
    by_srun = "SLURM_JOB_ID" in launched and other is not None

    def store(rank: int, variables: dict[str, str]) -> dist.Store:
        with environment.context() as context:
            places = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2"}
            placed = {**places, "SLURM_TASKS_PER_NODE": "2"} if by_srun else {"RANK": str(rank)}
            for name, value in {**common, **placed, **variables}.items():
                context.setenv(name, value)
            for name, value in slurm.torch_environment().items():
                context.setenv(name, value)
            return Rendezvous().store

    first, ours = store(0, {}), store(1, {} if other is not None else {"SLURM_STEP_ID": "1"})
    ours.set("come/1", "")
    assert first.check(["come/1"])
    if other is not None:
        strange = store(1, other)
        assert not strange.check(["come/1"])
        strange.set("come/0", "")
        assert not first.check(["come/0"])


def _two_of_three(folder: str) -> tuple[int, str, dict[str, object]]:
    """As on ranks 0 and 2 of a world whose rank 1 never comes; the first has the longer patience."""
    from distill.distributed import rendezvous

    rank = 2 * int(os.environ["RANK"])
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    os.environ["DISTILL_STATUS_FILE"] = f"{folder}/status.json"
    rendezvous.PATIENCE_S = 60.0 if rank == 0 else 2.0
    with contextlib.redirect_stderr(io.StringIO()) as said:
        start_process()
        code = run_program(lambda world: None)
    return code, said.getvalue(), read_status(Path(folder) / "status.json")


@pytest.mark.slow
def test_the_first_rank_to_give_up_speaks_for_all(tmp_path) -> None:
    first, last = run_ranks(2, _two_of_three, str(tmp_path))
    assert (first[0], last[0]) == (1, 1)
    assert first[1] == "" and last[1].startswith("error: rank 1 of 3 did not come to the rendezvous 127.0.0.1:")
    assert first[2]["reason"] == last[2]["reason"] == last[1].removeprefix("error: ").strip()


def _agree() -> dict[str, object]:
    world = World()
    seen: dict[str, object] = {"gathered": world.gather(world.rank * 10), "main's": world.broadcast(f"of {world.rank}")}
    for name, error in (("user", UserError("a=1 is wrong: set 2")), ("bug", KeyError("x"))):
        try:
            with world.all_or_none("testing"):
                if world.rank == 1:
                    raise error
        except Exception as raised:
            seen[name] = f"{type(raised).__name__}: {raised}"
    with world.all_or_none("testing"):
        pass
    refusals = []
    clusters = [(1, 4, "cpu", 1, 1), (2, 1, "cpu", 1, 1), (1, 2, "cpu", 3, 1), (1, 2, "cpu", 1, 1)]
    for nodes, cluster in [*(("1", cluster) for cluster in clusters), ("2", clusters[-1])]:
        os.environ["SLURM_STEP_NUM_NODES"] = nodes
        try:
            world.check_cluster(*cluster)
        except UserError as refused:
            refusals.append(str(refused))
    world.build_mesh("cpu", tp=1, cp=1)
    assert world.mesh is not None
    seen.update(refusals=refusals, axes=world.mesh.mesh_dim_names, shape=tuple(world.mesh.shape), layout=world.layout)
    world.close()
    return seen


@pytest.mark.slow
def test_ranks_agree_before_anyone_leaves() -> None:
    first, second = run_ranks(2, _agree)
    assert first["gathered"] == second["gathered"] == [0, 10]
    assert first["main's"] == second["main's"] == "of 0"
    assert first["user"] == second["user"] == "CollectiveUserError: a=1 is wrong: set 2"
    assert second["bug"] == "KeyError: 'x'"
    assert first["bug"] == "RuntimeError: rank 1 failed while testing: 'x'"
    assert (first["axes"], first["shape"]) == (("replica", "shard", "tp"), (1, 2, 1))
    refusals = first["refusals"]
    assert len(refusals) == 4
    assert "cluster.gpus_per_node=4" in refusals[0] and "2 were started" in refusals[0]
    assert "cluster.gpus_per_node=1" in refusals[1] and "2 ranks" in refusals[1]
    assert "this Slurm step runs on 2 nodes, each with a world of its own" in refusals[3]
    assert "tensor_parallel_size=3" in refusals[2] and "does not divide the 2 ranks" in refusals[2]


ALONE = """
import torch.distributed as dist
from distill.distributed.program import run_program, leave, start_process
from distill.errors import UserError

def program(world):
    if world.rank == 1:
        raise UserError("a=1 is wrong: set 2")
    dist.barrier()  # as in a collective of the models: not the control group's

start_process()
leave(run_program(program))
"""


@pytest.mark.slow
def test_a_rank_that_meets_an_error_alone_says_it_and_hangs_nobody(tmp_path) -> None:
    (tmp_path / "alone.py").write_text(ALONE)
    command = torchrun(2, str(tmp_path / "alone.py"))
    found = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert found.returncode != 0
    assert found.stderr.count("error: a=1 is wrong: set 2") == 1 and "exitcode  : 2" in found.stderr, found.stderr


@pytest.mark.slow
def test_a_fault_of_one_rank_keeps_its_traceback_and_ends_all(tmp_path) -> None:
    (tmp_path / "alone.py").write_text(ALONE.replace('UserError("a=1 is wrong: set 2")', 'RuntimeError("broken")'))
    found = subprocess.run(
        torchrun(2, str(tmp_path / "alone.py")),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode != 0
    assert found.stderr.count("\nRuntimeError: broken") == 1 and "exitcode  : 1" in found.stderr, found.stderr


def test_run_folders_count_up_and_a_given_one_is_taken(tmp_path) -> None:
    log_dir = str(tmp_path / "logs")
    assert [new_run_dir(log_dir, None).name for _ in range(2)] == ["exp_001", "exp_002"]
    assert new_run_dir(log_dir, str(tmp_path / "mine")) == tmp_path / "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"runtime\.run_dir=.*can't be made"):
        new_run_dir(log_dir, str(tmp_path / "file" / "below"))


@pytest.mark.slow
def test_every_rank_logs_to_its_own_file(tmp_path) -> None:
    run_ranks(2, _log, str(tmp_path))
    files = sorted((tmp_path / "logs").iterdir())
    assert [f.name for f in files] == ["rank_00000.log", "rank_00001.log"]
    said = [[line.rpartition(": ")[2] for line in f.read_text().splitlines()] for f in files]
    assert said == [["before there was a folder", f"hello from {rank}"] for rank in range(2)]


def _log(folder: str) -> None:
    from pathlib import Path

    from distill.distributed.program import log_to_console

    log_to_console(main=False)
    world = World()
    logging.getLogger("distill.test").info("before there was a folder")
    world.log_to(Path(folder))
    logging.getLogger("distill.test").info("hello from %d", world.rank)
    world.close()
