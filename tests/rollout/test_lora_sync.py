"""Syncs of a student with low-rank adapters: merged weights of every layout, copies, faults, the probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.distributed.world import World
from distill.model.checksum import BitSums, bit_sums
from distill.model.dtensor import local_shard
from distill.model.hf_config import model_config
from distill.model.hf_files import find_model
from distill.model.lora_merge import dithered
from distill.model.student import Student
from distill.model.weights import GatheredWeights
from distill.rollout.sync import WeightSync
from distill.rollout.transformers_engine import TransformersEngine
from tests.harness import sync_error
from tests.helpers import run_ranks, save_tiny_model
from tests.rollout.lora_scenarios import SCALE, lora_student, random_adapters, set_adapters

pytestmark = pytest.mark.slow

CASES = ((1, 1, "bfloat16"), (2, 1, "float32"), (2, 2, "bfloat16"))
"""Tensor-parallel size, replicas and precision on four ranks. Four shards of the six rows of A are uneven."""
DTYPES = (torch.float32, torch.bfloat16)


@torch.no_grad()
def _with_exact_sums(student: Student) -> dict[str, Tensor]:
    """Round weights and adapters, so that sums of their products are exact in any order; return the adapters."""
    for _, parameter in student.model.named_hf_parameters():
        shard = local_shard(parameter)
        shard.copy_((shard.float() * 2**14).round() / 2**14)
    steps = {"lora_A": 2**5, "lora_B": 2**9}
    complete = {
        name: (values * steps[name[-6:]]).round() / steps[name[-6:]]
        for name, values in random_adapters(student, 3, 0.05).items()
    }
    set_adapters(student, complete)
    return complete


def _merged(base: Tensor, name: str, adapters: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The merged weight by its definition, in float64; a bfloat16 weight is then rounded with the dither."""
    layer = name.removesuffix(".weight")
    if f"{layer}.lora_A" not in adapters:
        return base.to(dtype)
    product = adapters[f"{layer}.lora_B"].double() @ adapters[f"{layer}.lora_A"].double()
    merged = (base.double() + SCALE * product).float()
    return dithered(merged, name) if dtype == torch.bfloat16 else merged


def _compared(student: Student, bases: dict[str, Tensor], adapters: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """Return the names of the sent weights that differ from the definition, and the number of merged weights."""
    wrong, names, merged = [], [], 0
    for name, tensor, sums in student.weights(dtype).with_sums():
        names.append(name)
        right = torch.equal(tensor, _merged(bases[name], name, adapters, dtype))
        wrong += [] if right and sums == BitSums(*bit_sums(tensor).tolist()) else [name]
        merged += not torch.equal(tensor, bases[name].to(dtype))
    return wrong + sorted({*names} ^ {*bases}), merged


def _on_four_ranks(folder: Path) -> tuple[dict[Any, Any], dict[str, list[str]]]:
    world = World()
    return _merged_in_layouts(folder, world), _with_one_flipped_bit(folder, world)


@pytest.fixture(scope="module")
def on_four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[Any, Any], dict[str, list[str]]]]:
    """Return the comparisons and the errors on each rank; the model has biases and an odd vocabulary."""
    return run_ranks(4, _on_four_ranks, save_tiny_model(tmp_path_factory.mktemp("m"), "qwen2", False, vocab=385))


def _merged_in_layouts(folder: Path, world: World) -> dict[Any, Any]:
    """Return the comparison of the sent weights with their definition, for each layout and dtype."""
    found = {}
    for tp, replicas, precision in CASES:
        world.build_mesh("cpu", tp, 1, replicas)
        student = lora_student(folder, world, tp, replicas, f"policy.precision={precision}")
        student._weights._bucket_bytes = 50_000
        adapters = _with_exact_sums(student)
        base = GatheredWeights(student.model.named_hf_parameters(), torch.float32, 2**30, world.replica_mesh, tp)
        bases = {name: tensor.clone() for name, tensor in base}
        for dtype in DTYPES:
            found[tp, replicas, dtype] = _compared(student, bases, adapters, dtype)
    return found


def test_a_sync_sends_the_merged_weights_with_their_bit_sums_in_every_layout(on_four_ranks) -> None:
    for found, _ in on_four_ranks:
        assert len(found) == 6
        for case, compared in found.items():
            assert compared == ([], 14), case  # seven linear layers in each of two decoder layers


ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.1.mlp"
FLIPPED = {  # by number of replicas, with tensor-parallel size 2: (parameter with a flipped bit on rank 3, place)
    1: [
        (f"{MLP}.up_proj.lora_A", "rank"),  # gathered, so that ranks 1 and 3 have the flipped bit
        (f"{MLP}.down_proj.lora_B", "rank 3"),
        ("model.layers.0.input_layernorm.weight", "rank 3"),
    ],
    2: [
        (f"{ATTENTION}.q_proj.lora_B", "replica 1"),
        (f"{ATTENTION}.o_proj.lora_A", "replica 1"),
        (f"{MLP}.up_proj.weight", "replica 1"),
    ],
}

RECEIVED = f"{ATTENTION}.o_proj.weight"
"""Weight whose columns are split, so that each tensor-parallel rank has its own columns of A."""


def _with_one_flipped_bit(folder: Path, world: World) -> dict[str, list[str]]:
    """Return, for each parameter, the errors of three syncs: with equal copies, with a flipped bit, with a NaN."""
    errors = {}
    for replicas, cases in FLIPPED.items():
        world.build_mesh("cpu", 2, 1, replicas)
        student = lora_student(folder, world, 2, replicas, "policy.precision=bfloat16")
        set_adapters(student, random_adapters(student, 0, 0.1))
        parameters = dict(student.model.named_trained()) | dict(student.model.named_hf_parameters())
        for name, _ in cases:
            own = local_shard(parameters[name]).detach()
            before = own.clone()
            errors[name] = [sync_error(student)]
            if world.rank == 3:
                own.view(torch.int16).view(-1)[0] ^= 1  # the lowest bit also of float32
            errors[name].append(sync_error(student))
            if world.rank % 2 == 1:  # in both replicas: ranks of another replica learn of a NaN only from the watchdog
                own[-1] = torch.nan
            errors[name].append(sync_error(student))
            own.copy_(before)
        if replicas == 1:
            errors[RECEIVED] = [sync_error(student), _error_with_another_matrix(student, world.rank)]
    return errors


def _error_with_another_matrix(student: Student, rank: int) -> str:
    """Return the error of a sync in which rank 3 receives another A of the weight RECEIVED than was sent."""
    merge = student._weights._merge
    gather = merge.gather

    def changed(names: Any) -> dict[str, Tensor]:
        matrices = gather(names)
        if rank == 3 and RECEIVED in matrices:
            matrices[RECEIVED][-1, -1] += 1
        return matrices

    merge.gather = changed  # type: ignore[method-assign]
    return sync_error(student)


def test_a_sync_finds_other_copies_and_nan_in_weights_and_adapters(on_four_ranks) -> None:
    by_rank = [errors for _, errors in on_four_ranks]
    for errors in by_rank:
        assert errors == by_rank[0], "ranks report different errors"
        for name, where in (case for cases in FLIPPED.values() for case in cases):
            weight = f"{name.rpartition('.')[0]}.weight"
            equal, flipped, nan = errors[name]
            assert equal == ""
            assert weight in flipped and where in flipped
            assert weight in nan and "nan" in nan
        assert errors[RECEIVED][0] == "" and RECEIVED in errors[RECEIVED][1]


def _small_steps(folder: Path) -> dict[str, Any]:
    """Sync a bfloat16 student to an engine before training, without a step, and after two steps with a tiny rate."""
    world = World()
    world.build_mesh("cpu", 1, 1)
    overrides = "policy.precision=bfloat16", "policy.optimizer.kwargs.lr=1e-5", "policy.scheduler=[]"
    student = lora_student(folder, world, 1, 1, *overrides, valid=384)
    shape = model_config(find_model(str(folder), "a model"), "a model")
    engine = TransformersEngine(shape, torch.bfloat16, torch.device("cpu"), 4, 64, 384)
    sync = WeightSync(world, engine, student, 384)
    reports: list[Any] = []
    receive = engine.sync
    engine.sync = lambda weights, version: reports.append(receive(weights, version)) or reports[-1]  # type: ignore
    weights, share = [], student.trained_share
    for version in range(4):
        if version > 1:
            for name, parameter in student.model.named_trained():  # the first gradient of A is 0, because B is 0
                seen = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(version))
                parameter.grad = torch.empty_like(parameter)
                local_shard(parameter.grad).copy_(seen if "lora_B" in name or version > 2 else torch.zeros(()))
            student.step()
        sync.push_weights(version)  # raises if the probe does not change
        engine.sleep()
        weights.append({name: tensor.clone() for name, tensor in student.weights()})
    return {"reports": reports, "weights": weights, "share": share}


def test_the_probe_changes_after_a_step_with_a_small_learning_rate(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m", "llama", True, hidden=128)
    (seen,) = run_ranks(1, _small_steps, folder)
    files = find_model(str(folder), "a model")
    for name, tensor in seen["weights"][0].items():  # B is 0: the student is the base
        assert torch.equal(tensor, files.tensor(name).bfloat16()), name
    _, same, first, second = seen["reports"]
    assert same.changed == 0
    assert first.changed == second.changed == 14
    assert first.changed_bytes / first.bytes == pytest.approx(seen["share"])
