"""Verification of a sync: bit sums, gathered weights, the probe, memory of a sleeping engine."""

from __future__ import annotations

import datetime
import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from distill.distributed.world import World
from distill.metrics.step import Metrics, waits
from distill.model.checksum import BitSums, bit_sums, bit_sums_by_name, changed_names, wrap_int64
from distill.model.dtensor import local_shard
from distill.model.hf_files import find_model
from distill.model.student import Student
from distill.model.weights import GatheredWeights
from distill.rollout.gpu_memory import SleepGuard, Tag
from distill.rollout.sync import FLOAT32_LIMIT, WeightSync, check_equal
from distill.types import SyncReport
from tests.harness import CompleteWeights, config_for, sync_error
from tests.helpers import run_ranks, save_tiny_model

GIB = 2**30


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The warnings that ``distill`` logs."""
    logging.getLogger("distill").propagate = True
    with caplog.at_level(logging.WARNING, "distill"):
        yield caplog


def _slow_sums(tensor: torch.Tensor) -> BitSums:
    """The bit sums by their definition, element by element in Python integers."""
    bits = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    rows = (tensor if tensor.ndim > 1 else tensor[:, None]).contiguous().view(bits).flatten(1).tolist()
    per_word = 8 // tensor.element_size()
    mask = 2 ** (8 * tensor.element_size()) - 1
    sums = []
    for row in rows:
        words: list[int] = []
        for start in range(0, len(row), per_word):
            places = enumerate(row[start : start + per_word])
            words.append(sum((value & mask) << (8 * tensor.element_size() * place) for place, value in places))
        sums.append(sum(words))
    return BitSums(wrap_int64(sum(sums)), wrap_int64(sum(i * row for i, row in enumerate(sums, 1))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 8), (3, 7), (6,), (4, 3, 2), (1, 1)])
def test_bit_sums_follow_their_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert BitSums(*bit_sums(tensor).tolist()) == _slow_sums(tensor)


def test_bit_sums_add_up_over_splits_of_rows_and_columns() -> None:
    tensor = torch.randn(7, 12).bfloat16()
    total = bit_sums(tensor)
    assert torch.equal(bit_sums(tensor[:3]) + bit_sums(tensor[3:], first_row=3), total)
    assert torch.equal(bit_sums(tensor[:, :8]) + bit_sums(tensor[:, 8:]), total)
    assert torch.equal(bit_sums(tensor[:0]), torch.zeros(2, dtype=torch.int64))


def test_bit_sums_detect_one_bit_the_sign_of_zero_and_exchanged_rows() -> None:
    tensor = torch.randn(4, 4)
    flipped = tensor.clone()
    flipped.view(torch.int32)[2, 1] ^= 1
    assert not torch.equal(bit_sums(tensor), bit_sums(flipped))
    assert not torch.equal(bit_sums(torch.zeros(4)), bit_sums(-torch.zeros(4)))
    exchanged = bit_sums(tensor.flip(0))
    assert exchanged[0] == bit_sums(tensor)[0] and exchanged[1] != bit_sums(tensor)[1]


def test_changed_names_the_tensors_with_other_sums() -> None:
    one, other = BitSums(1, 2), BitSums(1, 3)
    assert changed_names({}, {"a": one, "b": other}) == ["a", "b"]
    assert changed_names({"a": one, "b": one}, {"a": one, "b": other}) == ["b"]


def _student(folder: Path, world: World, tp: int, replicas: int = 1) -> Student:
    world.build_mesh("cpu", tp, 1, replicas)
    size = (f"policy.dtensor_cfg.tensor_parallel_size={tp}", f"policy.dtensor_cfg.replicate_size={replicas}")
    config = config_for(folder, folder, "distillation.allow_degenerate=true", *size, ranks=world.size)
    return Student(config, find_model(str(folder), "a model"), world, 384, ())


def _gathered(folder: Path, world: World, tp: int = 1) -> Any:
    student, found = _student(folder, world, tp), {}
    for dtype in (torch.float32, torch.bfloat16):
        weights = GatheredWeights(student.model.named_hf_parameters(), dtype, 50_000, world.replica_mesh, tp)
        sent = [(name, tensor.clone(), sums) for name, tensor, sums in weights.with_sums()]
        found[dtype] = {name: t for name, t, _ in sent}, {name: sums for name, _, sums in sent}
    return found


def _with_a_nan(folder: Path, world: World) -> str:
    """Return the error of a sync with a NaN on the last rank."""
    student = _student(folder, world, 1)
    if world.rank == world.size - 1:
        with torch.no_grad():
            student.model.causal_lm.model.layers[1].mlp.up_proj.weight.to_local()[-1, -1] = torch.nan
    return sync_error(student)


def _on_ranks(folders: dict[str, Path]) -> dict[str, Any]:
    """Run all scenarios of two, three or four ranks in the same processes; return their results by name."""
    world = World(datetime.timedelta(seconds=60))
    found = {"gathered": _gathered(folders["qwen2"], world, 2 if world.size == 4 else 1)}
    if world.size == 4:
        found["flipped"] = _with_one_flipped_bit(folders["qwen3"], world)
    if world.size == 2:
        found["collectives"] = _collectives(folders["qwen3"], world, 2)
        found["nan"] = _with_a_nan(folders["llama"], world)
        found["short"] = _short(world)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a model of each family; qwen2 has biases, and its odd vocabulary makes uneven shards."""
    root = tmp_path_factory.mktemp("models")
    return {
        "qwen2": save_tiny_model(root / "qwen2", "qwen2", False, vocab=385),
        "qwen3": save_tiny_model(root / "qwen3", "qwen3", True, layers=6),
        "llama": save_tiny_model(root / "llama", "llama", True),
    }


@pytest.fixture(scope="module")
def on_ranks(folders: dict[str, Path]) -> dict[int, list[dict[str, Any]]]:
    """Return the results of each rank, by number of ranks. With 3 ranks, shards end within a 64-bit word."""
    return {ranks: run_ranks(ranks, _on_ranks, folders) for ranks in (2, 3, 4)}


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_gathered_weights_equal_the_checkpoint_and_have_its_bit_sums(folders: Any, on_ranks: Any, ranks: int) -> None:
    files = find_model(str(folders["qwen2"]), "a model")
    for rank in on_ranks[ranks]:
        for dtype, (tensors, sums) in rank["gathered"].items():
            assert tensors.keys() == files.files.keys()
            for name, tensor in tensors.items():
                assert torch.equal(tensor, files.tensor(name).to(dtype)), name
            assert sums == bit_sums_by_name(tensors.items())


class _Collectives(TorchDispatchMode):
    """Counts the collectives of torch.distributed."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def _collectives(folder: Path, world: World, tp: int) -> dict[str, Any]:
    parameters = _student(folder, world, tp).model.named_hf_parameters()
    found: dict[str, Any] = {"parameters": len(parameters), "bytes": sum(p.numel() * 4 for _, p in parameters)}
    for buckets in (1, 4, 8):
        weights = GatheredWeights(parameters, torch.float32, found["bytes"] // buckets, world.replica_mesh, tp)
        with _Collectives() as counted:
            for _ in weights:
                pass
        found[str(buckets)] = counted.calls
    return found


def test_the_number_of_collectives_of_a_sync_grows_with_bytes_not_parameters(on_ranks: Any) -> None:
    found = on_ranks[2][0]["collectives"]
    assert found["parameters"] > 60
    assert found["1"] == 1
    for buckets in (4, 8):  # two consecutive buckets hold more than one bucket's size
        assert buckets <= found[str(buckets)] <= 2 * buckets, found


def test_weights_that_are_not_finite_raise_on_every_rank(on_ranks: Any) -> None:
    errors = [rank["nan"] for rank in on_ranks[2]]
    assert errors[0] == errors[1]
    assert "model.layers.1.mlp.up_proj.weight" in errors[0]


FLIPPED = [  # tensor-parallel size, replicas, weight with a flipped bit on rank 3, reported place
    (2, 1, "model.layers.1.self_attn.k_norm.weight", "rank 3"),  # copied on the tensor-parallel ranks
    (2, 2, "model.norm.weight", "rank 3"),
    (2, 2, "model.layers.0.mlp.up_proj.weight", "replica 1"),  # split by tensor parallelism: one copy per replica
]


def _with_one_flipped_bit(folder: Path, world: World) -> list[tuple[str, str]]:
    """Return the errors of two syncs for each case: with equal copies, and with a flipped bit."""
    errors = []
    for tp, replicas, weight, _ in FLIPPED:
        student = _student(folder, world, tp, replicas)
        equal = sync_error(student)
        if world.rank == 3:
            shard = local_shard(dict(student.model.named_hf_parameters())[weight])
            shard.detach().view(torch.int32).view(-1)[-1] ^= 1
        errors.append((equal, sync_error(student)))
    return errors


def test_a_sync_compares_all_copies_of_a_weight(on_ranks: Any) -> None:
    by_rank = [rank["flipped"] for rank in on_ranks[4]]
    for errors in by_rank:
        assert errors == by_rank[0], "ranks report different errors"
        for (_, _, weight, where), (equal, flipped) in zip(FLIPPED, errors, strict=True):
            assert equal == ""
            assert weight in flipped and where in flipped


class ScriptedEngine:
    """An engine without a model, with given numbers of changed tensors and log-probs of the probe."""

    replica, replicas = 0, 1

    def __init__(self, changed: list[int], probes: list[list[float]]) -> None:
        self._changed, self._probes = iter(changed), iter(probes)
        self.calls: list[str] = []

    def wake(self, what: str) -> None:
        self.calls.append(what)

    def sync(self, weights: CompleteWeights, version: int) -> SyncReport:
        self.calls.append("sync")
        changed = next(self._changed)
        return SyncReport(version, 100, 1000, 0.5, changed, 950 if changed > 50 else 10 * changed)

    def probe(self, token_ids: list[int]) -> list[float]:
        return next(self._probes)


class OneRank:
    """A world of one rank, without process groups."""

    def all_or_none(self, what: str) -> Any:
        return nullcontext()


def _sync(
    changed: list[int],
    probes: list[list[float]],
    dtype: torch.dtype = torch.bfloat16,
    trained: float = 1.0,
    rounds_logits: bool = False,
) -> WeightSync:
    trainer = _trainer(dtype, trained, rounds_logits)
    return WeightSync(OneRank(), ScriptedEngine(changed, probes), trainer, 50)  # type: ignore[arg-type]


def _trainer(dtype: torch.dtype = torch.bfloat16, trained: float = 1.0, rounds_logits: bool = False) -> Any:
    return SimpleNamespace(
        dtype=dtype,
        rounds_logits=rounds_logits,
        trained_share=trained,
        offload=lambda: None,
        weights=lambda: CompleteWeights([]),
        logprobs=lambda ids: [-1.0, -2.0],
    )


def test_a_probe_that_does_not_change_with_the_weights_raises() -> None:
    sync = _sync([100, 60], [[-1.0, -2.0]] * 2)  # 60 of 100 tensors with 95% of the bytes: the rest may be norms
    sync.push_weights(0)
    with pytest.raises(RuntimeError, match=r"60 of 100 .*95%"):
        sync.push_weights(1)


def test_a_probe_that_does_not_change_with_the_adapted_weights_raises() -> None:
    """Of all bytes, 40% change: nearly all of those that adapters train, or a part of those of full training."""
    for trained in (0.44, 0.45, 1.0):
        sync = _sync([100, 40], [[-1.0, -2.0]] * 2, trained=trained)
        sync.push_weights(0)
        with pytest.raises(RuntimeError) if trained < 0.445 else nullcontext():
            sync.push_weights(1)


def test_a_probe_that_does_not_change_with_few_adapted_weights_raises_after_several_syncs(
    warnings: pytest.LogCaptureFixture,
) -> None:
    """Rounding may hide a few changed elements of seven adapted weights, but not those of three syncs."""
    same, other = [-1.0, -2.0], [-1.0, -2.5]
    sync = _sync([100, *[7] * 6], [same, same, same, other, other, other, other], trained=0.07)
    for version in range(6):
        sync.push_weights(version)
    assert len(warnings.records) == 4
    with pytest.raises(RuntimeError, match="7 of 100"):
        sync.push_weights(6)


def test_a_probe_need_not_change_when_few_tensors_or_none_changed(warnings: pytest.LogCaptureFixture) -> None:
    sync = _sync([10, 0, 3], [[-1.0, -2.0]] * 3)
    sync.push_weights(0)
    sync.push_weights(1)
    assert not warnings.records
    sync.push_weights(2)
    assert "3 of 100" in warnings.text


def test_a_sync_wakes_the_engine_in_two_parts_and_reports_its_cost() -> None:
    sync = _sync([10, 10], [[-1.0, -2.0], [-1.5, -2.0]])
    offloads: list[int] = []
    sync._student.offload = lambda: offloads.append(1)  # type: ignore[method-assign]
    sync.push_weights(0, Metrics())
    metrics = Metrics()
    sync.push_weights(1, metrics)
    assert sync._engine.calls == ["weights", "sync", "kv"] * 2  # type: ignore[attr-defined]
    assert len(offloads) == 2
    assert metrics.reduce() == {"timing/train/weight_sync": 0.5, "sync_changed_tensors": 10.0, "probe_change": 0.25}


def test_in_float32_the_probe_must_equal_the_trainers_log_probs() -> None:
    _sync([10], [[-1.0, -2.0 + 0.5 * FLOAT32_LIMIT]], torch.float32).push_weights(0)
    with pytest.raises(RuntimeError, match=r"0\.001 nats"):
        _sync([10], [[-1.0, -2.001]], torch.float32).push_weights(0)
    with pytest.raises(RuntimeError, match="nan"):
        check_equal([math.nan], [0.0])


def test_a_large_difference_between_trainer_and_sampler_raises() -> None:
    with pytest.raises(RuntimeError, match=r"0\.001 nats.* 0\.0001"):
        _sync([], [], torch.float32).observe(1e-3)
    rounded = _sync([], [], torch.float32, rounds_logits=True)
    rounded.observe(0.03)
    for sync in (_sync([], []), rounded):
        with pytest.raises(RuntimeError, match=r"0\.6 nats.* 0\.5"):
            sync.observe(0.6)


def test_a_growing_difference_between_trainer_and_sampler_warns(warnings: pytest.LogCaptureFixture) -> None:
    sync = _sync([], [])
    for value in (0.03, 0.08, math.nan):
        sync.observe(value)
    assert not warnings.records
    sync.observe(0.1)
    (record,) = warnings.records
    assert record.args == (0.1, 0.03)


OUT_OF_MEMORY = "too little memory"


class ShortEngine(ScriptedEngine):
    """An engine of two ranks whose probe is collective; rank 1 has too little memory to wake."""

    def wake(self, what: str) -> None:
        if what == "kv" and dist.get_rank() == 1:
            raise RuntimeError(OUT_OF_MEMORY)

    def probe(self, token_ids: list[int]) -> list[float]:
        dist.barrier()
        return [-1.0]


def _short(world: World) -> str:
    try:
        WeightSync(world, ShortEngine([1], []), _trainer(), 50).push_weights(0)  # type: ignore[arg-type]
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_rank_that_cannot_wake_stops_all_ranks_before_the_probe(on_ranks: Any) -> None:
    first, second = (rank["short"] for rank in on_ranks[2])
    assert second == OUT_OF_MEMORY
    assert "rank 1" in first and OUT_OF_MEMORY in first


class FakeMemory:
    """Memory of a device with given numbers of bytes, for machines without a GPU."""

    def __init__(self, free: int = 0, outside_torch: int = 0, cached: int = 0) -> None:
        self.free_bytes, self.outside_bytes, self.cached_bytes = free, outside_torch, cached
        self.releases = 0

    def free(self) -> int:
        return self.free_bytes

    def release(self) -> None:
        self.free_bytes, self.cached_bytes = self.free_bytes + self.cached_bytes, 0
        self.releases += 1

    def needed(self, tag: Tag) -> int:
        return {"weights": 3 * GIB, "kv_cache": 4 * GIB}[tag]

    def outside_torch(self) -> int:
        return self.outside_bytes


def test_waking_with_too_little_free_memory_raises() -> None:
    guard = SleepGuard(FakeMemory(free=3 * GIB, outside_torch=GIB))
    guard.check_free("weights")
    with pytest.raises(RuntimeError, match=r"kv_cache .*4\.00 GiB.*3\.00 GiB.*1\.00 GiB"):
        guard.check_free("kv_cache")


def test_cached_memory_is_released_only_if_the_engine_needs_it() -> None:
    memory = FakeMemory(free=3 * GIB, cached=GIB)
    guard = SleepGuard(memory)
    guard.check_free("weights")
    assert memory.releases == 0
    guard.check_free("kv_cache")
    assert (memory.releases, memory.free_bytes) == (1, 4 * GIB)


def test_growing_memory_of_a_sleeping_engine_warns_once_per_gib(warnings: pytest.LogCaptureFixture) -> None:
    memory = FakeMemory()
    guard = SleepGuard(memory)
    for residual in (2.0, 2.5, 2.9):
        memory.outside_bytes = int(residual * GIB)
        guard.after_sleep()
    assert not warnings.records
    for residual in (3.1, 3.2, 4.2):
        memory.outside_bytes = int(residual * GIB)
        guard.after_sleep()
    assert [record.args for record in warnings.records] == [
        (pytest.approx(3.1), pytest.approx(2.0)),
        (pytest.approx(4.2), pytest.approx(2.0)),
    ]


def test_the_wait_for_the_slowest_rank_is_a_fraction_of_generation() -> None:
    values = {"timing/train/generation": 3.0, "timing/train/generation_slowest": 4.0}
    assert waits(values) == {"timing/train/generation_wait_share": 0.25}
    assert waits({}) == {}
    assert waits(values | {"timing/train/generation_busy": 1.0}) == {"timing/train/generation_wait_share": 0.75}
