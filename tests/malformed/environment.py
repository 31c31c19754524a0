"""Malformed environment variables of torchrun, srun and SLURM."""

from __future__ import annotations

from tests.malformed.case import Case, Workshop, way

TORCHRUN: dict[str, str | None] = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29555",
}
SRUN: dict[str, str | None] = {
    **dict.fromkeys(TORCHRUN),
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_NODES": "1",
}


BROKEN: list[tuple[str, str | None]] = [
    *(("RANK", value) for value in ("abc", "", "-1", "7", "1.5", "0x1")),
    *(("WORLD_SIZE", value) for value in ("abc", "", "0", "-2", None)),
    *(("LOCAL_RANK", value) for value in ("abc", "", "-1", "7")),
    *(("LOCAL_WORLD_SIZE", value) for value in ("abc", "", "0", "-1")),
    *(("MASTER_ADDR", value) for value in ("", "no such host", "host.invalid", None)),
    *(("MASTER_PORT", value) for value in ("abc", "", "-1", "99999999", "0.5", None)),
]
"""Values that are invalid for one and for two ranks; None: the variable is unset."""


@way
def _environment_of_torchrun(shop: Workshop) -> Case:
    name, value = shop.rng.choice([*BROKEN, ("RANK", "1"), ("LOCAL_RANK", "1")])
    return shop.case(name, env={**TORCHRUN, name: value}, detail=f"{name}={value}")


@way
def _environment_of_srun(shop: Workshop) -> Case:
    name, value = shop.rng.choice(
        [
            *(("SLURM_NTASKS", value) for value in ("abc", "", "-2", "2.5")),
            *(("SLURM_PROCID", value) for value in ("abc", "", "-1", "2")),
            *(("SLURM_LOCALID", value) for value in ("abc", "", "-1", "2", None)),
            *(("SLURM_NODEID", value) for value in ("abc", "-4")),
            *(("SLURM_JOB_ID", value) for value in ("abc",)),
            *(("SLURM_STEP_ID", value) for value in ("abc",)),
            *(("SLURM_STEP_TASKS_PER_NODE", value) for value in ("abc", "(x2)", "2(x", "2(xa)", None)),
            *(("SLURM_STEP_NODELIST", value) for value in ("[", ",", "host.invalid", None)),
        ]
    )
    others = {"SLURM_STEP_TASKS_PER_NODE": "TASKS_PER_NODE", "SLURM_STEP_NODELIST": "NODELIST|MASTER_ADDR"}
    return shop.case(others.get(name, name), env={**SRUN, name: value}, detail=f"{name}={value}")


@way
def _environment_of_a_slurm_step(shop: Workshop) -> Case:
    value = shop.rng.choice(["abc", "", "2", "-1"])
    names = "cluster.num_nodes" if value == "2" else "SLURM_STEP_NUM_NODES"
    return shop.case(names, env={"SLURM_STEP_NUM_NODES": value}, detail=value)
