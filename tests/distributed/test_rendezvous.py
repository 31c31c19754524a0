"""Launcher variables of a rank, and ranks that do or do not find each other."""

from __future__ import annotations

import contextlib
import io
import os
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from distill.distributed import launcher, slurm
from distill.distributed.program import run_program, start_process
from distill.distributed.rendezvous import Rendezvous
from distill.distributed.world import World
from distill.errors import UserError
from distill.supervise.status import read_status
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
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without a launcher's variables."""
    of_torch = (*TORCHRUN, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in of_torch:
            monkeypatch.delenv(name)
    return monkeypatch


def test_ranks_started_by_srun_get_torchs_variables(environment) -> None:
    for name, value in SRUN.items():
        environment.setenv(name, value)
    found = slurm.torch_environment()
    port = int(found.pop("MASTER_PORT"))
    assert found.pop(slurm.LAUNCH_ID) == "4242.0.0"
    assert found == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "jwb0012",
    }
    assert 1024 < port < 65536
    environment.setenv("SLURM_JOB_ID", "4243")
    assert int(slurm.torch_environment()["MASTER_PORT"]) != port, "two jobs on one node"


def test_torchrun_under_srun_keeps_its_variables(environment) -> None:
    for name, value in SRUN.items():
        environment.setenv(name, value)
    environment.setenv("RANK", "0")
    assert slurm.torch_environment() == {}


def test_a_single_process_needs_no_rendezvous(environment) -> None:
    assert slurm.torch_environment() == {}
    environment.setenv("SLURM_NTASKS", "1")
    environment.setenv("SLURM_PROCID", "0")
    assert slurm.torch_environment() == {}
    assert launcher.rank_by_launcher() == 0


@pytest.mark.parametrize(
    ("variables", "key"),
    [
        ({**TORCHRUN, "RANK": "2"}, "RANK"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE"),
        ({**TORCHRUN, "MASTER_PORT": "0"}, "MASTER_PORT"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({**SRUN, "SLURM_PROCID": "8"}, "SLURM_PROCID"),
        ({**SRUN, "SLURM_LOCALID": "4"}, "SLURM_LOCALID"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4x2"}, "SLURM_TASKS_PER_NODE"),
        ({**SRUN, "SLURM_STEP_NODELIST": ","}, "SLURM_JOB_NODELIST"),
    ],
)
def test_an_invalid_launcher_variable_is_a_user_error_with_its_name(environment, variables, key) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(UserError) as error:
        launcher.rank_by_launcher()
    assert error.value.key == key


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("jwb[0012-0014,0020],x1", "jwb0012"), ("gpu-a[3,7]", "gpu-a3")],
)
def test_first_host_of_a_node_list(nodes, first) -> None:
    assert slurm.first_host(nodes) == first


@pytest.mark.parametrize(
    ("tasks", "node", "count"), [("4(x2),3", 0, 4), ("4(x2),3", 1, 4), ("4(x2),3", 2, 3), ("8", 0, 8)]
)
def test_tasks_of_a_node(tasks, node, count) -> None:
    assert slurm.tasks_of_node(tasks, node) == count


def _listening_addresses() -> list[str]:
    """Return the addresses, in hexadecimal, at which this machine listens on the rendezvous port."""
    world = World()
    port = f":{int(os.environ['MASTER_PORT']):04X}"
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table]
    found = [local.removesuffix(port) for _, local, _, state, *_ in lines if local.endswith(port) and state == "0A"]
    world.close()
    return found


@pytest.mark.slow
def test_the_rendezvous_listens_at_the_given_address_only() -> None:
    assert run_ranks(2, _listening_addresses) == [["0100007F"]] * 2


PORT_IN_USE, MISSING, NO_STORE, OTHER_MACHINE = "port in use", "missing ranks", "no store", "other machine's address"


def _failed_rendezvous(folder: str) -> dict[str, tuple[int, str, dict[str, object]]]:
    """Return exit code, console output and status of runs whose ranks do not find each other."""
    from distill.distributed import rendezvous

    rendezvous.TIMEOUT_S = 2.0
    found = {}
    for name, rank, size in ((PORT_IN_USE, 0, 2), (MISSING, 0, 3), (NO_STORE, 1, 2), (OTHER_MACHINE, 0, 2)):
        status = Path(folder) / f"{name}.json"
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_PORT": str(free_port()), "DISTILL_STATUS_FILE": str(status)}
        # 192.0.2.0/24 is reserved for documentation, so no machine has this address
        os.environ["MASTER_ADDR"] = "192.0.2.1" if name == OTHER_MACHINE else "127.0.0.1"
        rendezvous._OWN_STORE_TIMEOUT_S = 1.0 if name == OTHER_MACHINE else 60.0
        with contextlib.ExitStack() as stack:
            if name == PORT_IN_USE:
                stack.enter_context(socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))))
            printed = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            start_process()
            code = run_program(lambda world: None)
        found[name] = (code, printed.getvalue().replace(os.environ["MASTER_PORT"], "PORT"), read_status(status))
    return found


@pytest.mark.slow
def test_ranks_that_do_not_find_each_other_exit_with_the_reason(tmp_path) -> None:
    (found,) = run_ranks(1, _failed_rendezvous, str(tmp_path))
    expected = {
        PORT_IN_USE: (2, "MASTER_PORT=PORT "),
        MISSING: (1, "ranks 1, 2 of 3 "),
        NO_STORE: (1, "rank 1 "),
        OTHER_MACHINE: (2, "MASTER_ADDR=192.0.2.1 "),
    }
    for name, (code, start) in expected.items():
        exit_code, printed, status = found[name]
        assert exit_code == status["exit_code"] == code and printed.startswith(f"error: {start}"), found[name]
        assert printed.count("\n") == 1 and status["retryable"] is (code == 1)


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
        "another job",
        "an earlier start of the job",
        "another torchrun",
        "an earlier start by torchrun",
        "no launcher, same launch",
        "no launcher, same launch in two steps of a job",
    ],
)
def test_ranks_of_another_launch_at_the_same_port_are_ignored(environment, launched, other) -> None:
    """``other``: variables of a rank of another launch that has the same rank; None: ranks of one launch."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **launched}
    by_srun = "SLURM_JOB_ID" in launched and other is not None

    def store(rank: int, variables: dict[str, str]) -> dist.Store:
        with environment.context() as context:
            tasks = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2"}
            of_rank = {**tasks, "SLURM_TASKS_PER_NODE": "2"} if by_srun else {"RANK": str(rank)}
            for name, value in {**common, **of_rank, **variables}.items():
                context.setenv(name, value)
            for name, value in slurm.torch_environment().items():
                context.setenv(name, value)
            return Rendezvous().store

    first, second = store(0, {}), store(1, {} if other is not None else {"SLURM_STEP_ID": "1"})
    second.set("arrived/1", "")
    assert first.check(["arrived/1"])
    if other is not None:
        stranger = store(1, other)
        assert not stranger.check(["arrived/1"])
        stranger.set("arrived/0", "")
        assert not first.check(["arrived/0"])


def _two_of_three(folder: str) -> tuple[int, str, dict[str, object]]:
    """Run as rank 0 or 2 of 3 ranks, of which rank 1 never comes; rank 2 times out first."""
    from distill.distributed import rendezvous

    rank = 2 * int(os.environ["RANK"])
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    os.environ["DISTILL_STATUS_FILE"] = f"{folder}/status.json"
    rendezvous.TIMEOUT_S = 60.0 if rank == 0 else 2.0
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        start_process()
        code = run_program(lambda world: None)
    return code, printed.getvalue(), read_status(Path(folder) / "status.json")


@pytest.mark.slow
def test_only_the_first_rank_that_times_out_reports_the_missing_rank(tmp_path) -> None:
    first, last = run_ranks(2, _two_of_three, str(tmp_path))
    assert (first[0], last[0]) == (1, 1)
    assert first[1] == "" and last[1].startswith("error: rank 1 of 3 ")
    assert first[2]["reason"] == last[2]["reason"] == last[1].removeprefix("error: ").strip()
