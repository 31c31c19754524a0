"""A student with low-rank adapters and a vLLM engine: what the engine computes after each sync."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distill.distributed.world import World
from distill.model.dtensor import local_shard
from distill.model.hf_files import find_model
from distill.model.hf_load import local_slices
from distill.model.lora_merge import AdapterMerge
from distill.model.student import Student
from distill.rollout.sync import WeightSync
from tests.harness import config_for

VALID = 300
RANK, SCALE = 6, 8
LORA = (
    "distillation.allow_degenerate=true",
    "policy.dtensor_cfg.lora_cfg.enabled=true",
    f"policy.dtensor_cfg.lora_cfg.dim={RANK}",
    f"policy.dtensor_cfg.lora_cfg.alpha={RANK * SCALE}",
)


def lora_student(folder: Path, world: World, tp: int, replicas: int, *overrides: str, valid: int = VALID) -> Student:
    """Return a student with adapters on the ranks of ``world``, whose mesh is built; collective."""
    size = (f"policy.dtensor_cfg.tensor_parallel_size={tp}", f"policy.dtensor_cfg.replicate_size={replicas}")
    config = config_for(folder, folder, *LORA, *size, *overrides, ranks=world.size)
    return Student(config, find_model(str(folder), "a model"), world, valid, ())


def random_adapters(student: Student, seed: int, size: float) -> dict[str, torch.Tensor]:
    """Return random values of all adapters by name; B is smaller than A by the factor ``size``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.1 * (size if name.endswith("lora_B") else 1.0) * torch.randn(parameter.shape, generator=generator)
        for name, parameter in student.model.named_trained()
    }


@torch.no_grad()
def set_adapters(student: Student, complete: Mapping[str, torch.Tensor]) -> None:
    """Set this rank's shards of the adapters to those of the tensors ``complete``; not collective."""
    for name, parameter in student.model.named_trained():
        local_shard(parameter).copy_(complete[name][local_slices(parameter)])


def lora_syncs(world: World, engine: Any, folder: Path, tp: int, probe: list[int]) -> dict[str, Any]:
    """Sync a student of two ranks to an engine of two ranks (tp=2), or to one on each (tp=1); return what was seen.

    The engine sleeps before and afterwards. The result contains the merged weights, and the error of a sync without the
    adapters.
    """
    world.build_mesh("cpu", tp, 1)
    student = lora_student(folder, world, tp, 1)
    sync = WeightSync(world, engine, student, VALID)
    seen: dict[str, Any] = {"difference": [], "probes": []}
    for version in range(3):
        if version:
            set_adapters(student, random_adapters(student, version, 0.1))
        sync.push_weights(version)  # float32: raises if the probe differs from the trainer's log-probs
        found = engine.probe(probe)
        seen["difference"].append(max(abs(a - b) for a, b in zip(found, student.logprobs(probe), strict=True)))
        seen["probes"].append(found)
        engine.sleep()
    seen["merged"] = {name: tensor.clone() for name, tensor in student.weights()}
    student._weights._merge = AdapterMerge([], world.shard_mesh)
    try:
        sync.push_weights(3)
    except RuntimeError as error:
        seen["without adapters"] = str(error)
    engine.sleep()
    return seen
