"""Low-rank adapters in every layout: four ranks take the same step as peft in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.batching.plan import PackingConfig
from distill.config import Config
from distill.distributed.world import World
from distill.model.dtensor import local_shard
from distill.model.hf_files import find_model
from distill.model.hf_load import local_slices
from distill.model.student import Student
from tests.harness import Step, config_for, copies_that_differ, differences, fixed_rollouts, plain_step, sharded_step
from tests.helpers import run_ranks, save_tiny_model
from tests.lora_oracle import LORA, adapted_model

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
VOCAB = 383
SHAPES = [("llama", True), ("qwen3", False), ("gemma3_text", True)]
QWEN3 = SHAPES[1]
PACKED = PackingConfig(8, sequences=None, tokens=120)
SINGLE = PackingConfig(8, sequences=1, tokens=None)
ROLLOUTS = 8
_CHECKPOINTING = "policy.dtensor_cfg.activation_checkpointing"
_SOME_LAYERS = "policy.dtensor_cfg.lora_cfg.target_modules=[o_proj,k_proj,up_proj]"
_MLP = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
_PLAN = ", ".join(f"layers.*.mlp.{name}: {style}" for name, style in _MLP.items())
_ONLY_MLP = f"policy.dtensor_cfg.custom_parallel_plan={{{_PLAN}}}"
OWN_BASE = "distillation.context_distillation.enabled=true"
"""The teacher is the student without adapters, and reads other prefixes."""


@dataclass(frozen=True)
class Case:
    """A layout of four ranks, with packing and configuration overrides."""

    tp: int
    cp: int
    replicas: int = 1
    packing: PackingConfig = PACKED
    settings: tuple[str, ...] = ()
    """Overrides that change the reference."""
    recomputation: str = "false"
    plan: tuple[str, ...] = ()


CASES = {
    "dp 4, single responses": Case(1, 1, packing=SINGLE),
    "tp 2, selective": Case(2, 1, recomputation="selective"),
    "cp 2, checkpointed": Case(1, 2, recomputation="true"),
    "tp 2, cp 2": Case(2, 2),
    "replicas, tp 2, single responses": Case(2, 1, replicas=2, packing=SINGLE),
    "tp 2, some layers, selective": Case(2, 1, settings=(_SOME_LAYERS,), recomputation="selective"),
    "tp 2, attention replicated": Case(2, 1, plan=(_ONLY_MLP,)),
    "tp 2, cp 2, own base": Case(2, 2, settings=(OWN_BASE,), recomputation="true"),
}
PLAIN = ("dp 4, single responses", "tp 2, selective", "cp 2, checkpointed", "tp 2, cp 2")
RUNS = [(shape, name) for shape in SHAPES for name in (CASES if shape == QWEN3 else PLAIN)]
HALF = "policy.precision=bfloat16"


def _folders(root: Path, family: str, tied: bool) -> tuple[Path, Path]:
    return root / f"{family}-{tied}-student", root / f"{family}-{tied}-teacher"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    shape = dict(hidden=64, heads=8, kv_heads=4, vocab=VOCAB)
    for family, tied in SHAPES:
        student, teacher = _folders(root, family, tied)
        save_tiny_model(student, family, tied, seed=1, **shape)
        save_tiny_model(teacher, family, tied, seed=3, **shape)
    return root


def _config(root: Path, shape: tuple[str, bool], case: Case, *overrides: str) -> Config:
    settings = ("loss_fn.outside_topk=bucket", *LORA, *case.settings, *case.plan, *overrides)
    student, teacher = _folders(root, *shape)
    teacher = student if OWN_BASE in case.settings else teacher
    return config_for(student, teacher, *settings, f"{_CHECKPOINTING}={case.recomputation}", ranks=4)


def _build(world: World, case: Case) -> None:
    world.build_mesh("cpu", case.tp, case.cp, case.replicas, None if OWN_BASE in case.settings else 1)


def _all_steps(root: Path) -> dict[str, Any]:
    """Run all models and layouts in the same four processes, because starting a process takes longer than a step."""
    world = World()
    steps, rollouts = {}, fixed_rollouts(ROLLOUTS, vocab=VOCAB)
    for shape, name in RUNS:
        _build(world, CASES[name])
        steps[shape, name] = sharded_step(_config(root, shape, CASES[name]), world, rollouts, CASES[name].packing)
    case = CASES["replicas, tp 2, single responses"]
    _build(world, case)
    config = _config(root, QWEN3, case, HALF)
    different = copies_that_differ(config, world, rollouts[:4], PackingConfig(4, sequences=4, tokens=None), count=20)
    initial = world.gather(_initial(config, world))
    world.close()
    return {"steps": steps, "different": different, "initial": initial} if world.is_main else {}


def _initial(config: Config, world: World) -> dict[str, Any]:
    """Return this rank's shards of the initial adapters, with their slices of the complete tensors."""
    student = Student(config, find_model(config.policy.model_name, "a model"), world, VOCAB, ())
    return {
        name: (local_slices(parameter), local_shard(parameter).detach().clone())
        for name, parameter in student.model.named_trained()
    }


@pytest.fixture(scope="module")
def found(models: Path) -> dict[str, Any]:
    """Return the results of ``_all_steps`` on the main rank."""
    first: dict[str, Any] = run_ranks(4, _all_steps, models)[0]
    return first


@pytest.fixture(scope="module")
def references(models: Path) -> dict[tuple[tuple[str, bool], tuple[str, ...]], Step]:
    pairs = {(shape, CASES[name].settings): CASES[name] for shape, name in RUNS}
    rollouts = fixed_rollouts(ROLLOUTS, vocab=VOCAB)
    return {key: plain_step(_config(models, key[0], case), rollouts) for key, case in pairs.items()}


@pytest.mark.parametrize(("shape", "name"), RUNS)
def test_a_step_of_adapters_equals_peft_for_every_layout(found, references, shape, name) -> None:
    reference = references[shape, CASES[name].settings]
    assert len(reference.gradients) == 2 * 2 * (3 if _SOME_LAYERS in CASES[name].settings else 7), (
        "A and B of two layers"
    )
    found_differences = differences(found["steps"][shape, name], reference)
    worst = max(found_differences, key=found_differences.__getitem__)
    assert found_differences[worst] < TOLERANCE, f"{worst} differs by {found_differences[worst]:.2g}"


def test_twenty_steps_change_no_frozen_weight_and_keep_copies_of_adapters_equal(found) -> None:
    assert found["different"] == []


def test_initial_adapters_do_not_depend_on_the_layout(found, models) -> None:
    config = _config(models, QWEN3, CASES["dp 4, single responses"])
    files = find_model(config.policy.model_name, "a model")
    model = adapted_model(files, config.policy.dtensor_cfg.lora_cfg, config.distillation.seed)
    expected = dict(model.named_trained())
    for shards in found["initial"]:
        assert shards.keys() == expected.keys()
        for name, (slices, shard) in shards.items():
            assert shard.dtype == torch.float32
            assert torch.equal(shard, expected[name][slices]), name
