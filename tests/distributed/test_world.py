"""The ranks of a run: small collectives, error consensus, cluster checks, log files."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from distill.distributed.cluster import check_cluster
from distill.distributed.launcher import write_error_file
from distill.distributed.program import exit_process, run_program, start_process
from distill.distributed.world import World
from distill.errors import UserError
from distill.run_dir import new_run_dir
from distill.supervise.logs import log_to_console
from tests.helpers import exit_codes, run_ranks


def _collectives() -> dict[str, object]:
    world = World()
    found: dict[str, object] = {"gathered": world.gather(world.rank * 10), "main's": world.broadcast(world.rank)}
    for name, error in (("user", UserError("a=1 is wrong", "set 2", key="a", value=1)), ("bug", KeyError("x"))):
        try:
            with world.all_or_none("testing"):
                if world.rank == 1:
                    raise error
        except UserError as raised:
            found[name] = (type(raised).__name__, raised.problem, raised.fix, raised.key, raised.value)
        except Exception as raised:
            found[name] = f"{type(raised).__name__}: {raised}"
    with world.all_or_none("testing"):
        pass
    refused = []
    clusters = [(1, 4, "cpu", 1, 1), (2, 1, "cpu", 1, 1), (1, 2, "cpu", 3, 1), (1, 2, "cpu", 1, 1)]
    for nodes, cluster in [*(("1", cluster) for cluster in clusters), ("2", clusters[-1])]:
        os.environ["SLURM_STEP_NUM_NODES"] = nodes
        try:
            check_cluster(world, *cluster)
        except UserError as error:
            refused.append((error.key, error.value))
    world.build_mesh("cpu", tp=1, cp=1)
    assert world.mesh is not None
    found.update(refused=refused, axes=world.mesh.mesh_dim_names, shape=tuple(world.mesh.shape), layout=world.layout)
    world.close()
    return found


@pytest.mark.slow
def test_an_error_on_one_rank_is_raised_on_all_ranks_with_its_fields() -> None:
    first, second = run_ranks(2, _collectives)
    assert first["gathered"] == second["gathered"] == [0, 10]
    assert first["main's"] == second["main's"] == 0
    assert first["user"] == second["user"] == ("CollectiveUserError", "a=1 is wrong", "set 2", "a", "1")
    assert second["bug"] == "KeyError: 'x'"
    assert first["bug"] == "RuntimeError: rank 1 failed while testing: 'x'"
    assert (first["axes"], first["shape"]) == (("replica", "shard", "tp"), (1, 2, 1))
    assert first["refused"] == [
        ("cluster.gpus_per_node", 4),
        ("cluster.gpus_per_node", 1),
        ("policy.dtensor_cfg.tensor_parallel_size", 3),
        ("cluster.num_nodes", 1),
    ]


@pytest.mark.parametrize(
    ("nodes", "gpus", "command"),
    [
        (1, 4, "torchrun --nproc-per-node 4 -m distill.train"),
        (
            2,
            8,
            "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m distill.train",
        ),
    ],
)
def test_a_wrong_number_of_ranks_is_refused_with_the_torchrun_command(nodes: int, gpus: int, command: str) -> None:
    world = cast(World, SimpleNamespace(size=2, local_size=2))
    with pytest.raises(UserError) as caught:
        check_cluster(world, nodes, gpus, "cpu", 1, 1)
    assert command in caught.value.fix
    assert "cluster.num_nodes=1 and cluster.gpus_per_node=2" in caught.value.fix


def test_torchruns_report_ends_with_the_error_of_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_error_file("not under torchrun")
    file = str(tmp_path / "error.json")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", file)
    write_error_file("a=1 is wrong: set 2")
    report = str(ChildFailedError("distill.train", {0: ProcessFailure(0, 123, 2, file)})).splitlines()
    assert report[-2] == "  traceback : a=1 is wrong: set 2"


def _fails_on_one_rank(folder: Path, error: Exception) -> None:
    """Run a program that raises ``error`` on rank 1 only; the console output goes to a file."""
    os.dup2(os.open(folder / os.environ["RANK"], os.O_WRONLY | os.O_CREAT, 0o600), 2)

    def program(world: World) -> None:
        if world.rank == 1:
            raise error
        dist.barrier()  # a collective of the models: not on the control group

    start_process()
    exit_process(run_program(program))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "printed", "code"),
    [
        (UserError("a=1 is wrong", "set 2", key="a", value=1), "error: a=1 is wrong: set 2", 2),
        (RuntimeError("broken"), "\nRuntimeError: broken", 1),
    ],
    ids=["user error", "traceback"],
)
def test_an_error_on_one_rank_only_is_printed_once_and_ends_all_ranks(tmp_path, error, printed, code) -> None:
    first, failed = exit_codes(2, _fails_on_one_rank, tmp_path, error)
    output = "".join((tmp_path / rank).read_text() for rank in "01")
    assert first and failed == code and output.count(printed) == 1, output


def test_run_directories_are_numbered_unless_one_is_given(tmp_path) -> None:
    log_dir = str(tmp_path / "logs")
    assert [new_run_dir(log_dir, None).name for _ in range(2)] == ["exp_001", "exp_002"]
    assert new_run_dir(log_dir, str(tmp_path / "mine")) == tmp_path / "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"runtime\.run_dir="):
        new_run_dir(log_dir, str(tmp_path / "file" / "below"))


def _log(folder: str) -> None:
    log_to_console(is_main=False)
    world = World()
    logging.getLogger("distill.test").info("before the run directory")
    world.supervisor.log_to(Path(folder), world.rank)
    logging.getLogger("distill.test").info("from rank %d", world.rank)
    world.close()


@pytest.mark.slow
def test_every_rank_logs_to_its_own_file(tmp_path) -> None:
    run_ranks(2, _log, str(tmp_path))
    files = sorted((tmp_path / "logs").iterdir())
    assert [f.name for f in files] == ["rank_00000.log", "rank_00001.log"]
    lines = [[line.rpartition(": ")[2] for line in f.read_text().splitlines()] for f in files]
    assert lines == [["before the run directory", f"from rank {rank}"] for rank in range(2)]
