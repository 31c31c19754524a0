"""Weights are fresh: bit sums, gathered weights, and what an engine that ignores a sync is told."""

from __future__ import annotations

import datetime
import logging
import math
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
from distill.model.hf_files import find_model
from distill.model.student import Student
from distill.model.weights import GatheredWeights
from distill.rollout.gpu_memory import SleepGuard
from distill.rollout.sync import FLOAT32_LIMIT, WeightSync, check_equal
from distill.types import SyncReport
from tests.harness import CompleteWeights, config_for
from tests.helpers import run_ranks, save_tiny_model

GIB = 2**30


def _slow_sums(tensor: torch.Tensor) -> BitSums:
    """The twin: one element at a time, in Python's integers."""
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
def test_bit_sums_are_those_of_the_plain_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert BitSums(*bit_sums(tensor).tolist()) == _slow_sums(tensor)


def test_bit_sums_add_over_rows_and_over_columns_at_whole_words() -> None:
    tensor = torch.randn(7, 12).bfloat16()
    whole = bit_sums(tensor)
    assert torch.equal(bit_sums(tensor[:3]) + bit_sums(tensor[3:], first_row=3), whole)
    assert torch.equal(bit_sums(tensor[:, :8]) + bit_sums(tensor[:, 8:]), whole)
    assert torch.equal(bit_sums(tensor[:0]), torch.zeros(2, dtype=torch.int64))


def test_bit_sums_see_one_bit_a_sign_of_zero_and_rows_in_another_order() -> None:
    tensor = torch.randn(4, 4)
    flipped = tensor.clone()
    flipped.view(torch.int32)[2, 1] ^= 1
    assert not torch.equal(bit_sums(tensor), bit_sums(flipped))
    assert not torch.equal(bit_sums(torch.zeros(4)), bit_sums(-torch.zeros(4)))
    exchanged = bit_sums(tensor.flip(0))
    assert exchanged[0] == bit_sums(tensor)[0] and exchanged[1] != bit_sums(tensor)[1]


def test_changed_counts_tensors() -> None:
    one, other = BitSums(1, 2), BitSums(1, 3)
    assert changed_names({}, {"a": one, "b": other}) == ["a", "b"]
    assert changed_names({"a": one, "b": one}, {"a": one, "b": other}) == ["b"]


def _gathered(folder: Path, poison: bool, tp: int = 1) -> Any:
    world = World()
    world.build_mesh("cpu", tp, 1)
    size = f"policy.dtensor_cfg.tensor_parallel_size={tp}"
    config = config_for(folder, folder, "distillation.allow_degenerate=true", size, ranks=world.size)
    student = Student(config, find_model(str(folder), "a model"), world, 384, ())
    if poison:
        if world.rank == world.size - 1:
            with torch.no_grad():
                student.model.causal_lm.model.layers[1].mlp.up_proj.weight.to_local()[-1, -1] = torch.nan
        weights = student.weights()
        try:
            for _ in weights:
                pass
        except RuntimeError as error:
            return str(error)
        return "nothing was said"
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        weights = GatheredWeights(student.model.named_hf_parameters(), dtype, 50_000, world.replica_mesh, tp)
        sent = [(name, tensor.clone(), sums) for name, tensor, sums in weights.with_sums()]
        found[dtype] = {name: t for name, t, _ in sent}, {name: sums for name, _, sums in sent}
    return found


@pytest.mark.parametrize(("ranks", "tp"), [(1, 1), (2, 1), (3, 1), (4, 2)])  # over 3, few shards end at a whole word
def test_gathered_weights_are_the_checkpoints_and_carry_their_bit_sums(tmp_path: Path, ranks: int, tp: int) -> None:
    folder = save_tiny_model(tmp_path / "m", "qwen2", False, vocab=385)  # biases; an odd vocabulary: uneven shards
    files = find_model(str(folder), "a model")
    for found in run_ranks(ranks, _gathered, folder, False, tp):
        for dtype, (tensors, sums) in found.items():
            assert tensors.keys() == files.files.keys()
            for name, tensor in tensors.items():
                assert torch.equal(tensor, files.tensor(name).to(dtype)), name
            assert sums == bit_sums_by_name(tensors.items())


class _Collectives(TorchDispatchMode):
    """Counts what goes through torch.distributed, by any door."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def _collectives(folder: Path, tp: int) -> dict[str, Any]:
    world = World()
    world.build_mesh("cpu", tp, 1)
    size = f"policy.dtensor_cfg.tensor_parallel_size={tp}"
    config = config_for(folder, folder, "distillation.allow_degenerate=true", size, ranks=world.size)
    student = Student(config, find_model(str(folder), "a model"), world, 384, ())
    parameters = student.model.named_hf_parameters()
    found: dict[str, Any] = {"parameters": len(parameters), "bytes": sum(p.numel() * 4 for _, p in parameters)}
    for share in (1, 4, 8):
        weights = GatheredWeights(parameters, torch.float32, found["bytes"] // share, world.replica_mesh, tp)
        with _Collectives() as counted:
            for _ in weights:
                pass
        found[str(share)] = counted.calls
    return found


def test_collectives_of_a_sync_grow_with_bytes_not_with_parameters(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m", "qwen3", True, layers=6)
    found = run_ranks(2, _collectives, folder, 2)[0]
    assert found["parameters"] > 60
    assert found["1"] == 1
    for share in (4, 8):  # a bucket ends before the tensor that it has no room for: at least half of it is full
        assert share <= found[str(share)] <= 2 * share, found


def test_weights_that_are_not_finite_never_leave_and_every_rank_says_so(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m", "llama", True)
    said = run_ranks(2, _gathered, folder, True)
    assert said[0] == said[1]
    assert "model.layers.1.mlp.up_proj.weight" in said[0]


class ScriptedEngine:
    """An engine that answers the probe as told: what freshness makes of it needs no model."""

    replica, replicas = 0, 1

    def __init__(self, changed: list[int], probes: list[list[float]]) -> None:
        self._changed, self._probes = iter(changed), iter(probes)
        self.calls: list[str] = []

    def wake(self, what: str) -> None:
        self.calls.append(what)

    def sync(self, weights: CompleteWeights, version: int) -> SyncReport:
        self.calls.append("sync")
        changed = next(self._changed)
        return SyncReport(version, 10, 1000, 0.5, changed, 950 if changed > 5 else 10 * changed)

    def probe(self, token_ids: list[int]) -> list[float]:
        return next(self._probes)


class OneRank:
    """A world of one, without process groups."""

    def all_or_none(self, doing: str) -> Any:
        from contextlib import nullcontext

        return nullcontext()


def _freshness(changed: list[int], probes: list[list[float]], dtype: torch.dtype = torch.bfloat16) -> WeightSync:
    trainer = SimpleNamespace(
        dtype=dtype, offload=lambda: None, weights=lambda: CompleteWeights([]), logprobs=lambda ids: [-1.0, -2.0]
    )
    return WeightSync(OneRank(), ScriptedEngine(changed, probes), trainer, 50)  # type: ignore[arg-type]


def test_a_probe_that_does_not_move_with_the_weights_ends_the_run() -> None:
    freshness = _freshness([10, 6], [[-1.0, -2.0]] * 2)  # norms are many tensors and few bytes: they may stay
    freshness.push_weights(0)
    with pytest.raises(RuntimeError, match="6 of 10 tensors changed, 95% of all bytes are theirs, and the engine ans"):
        freshness.push_weights(1)


def test_a_probe_need_not_move_when_few_tensors_or_none_changed(caplog: pytest.LogCaptureFixture) -> None:
    freshness = _freshness([10, 0, 3], [[-1.0, -2.0]] * 3)
    freshness.push_weights(0)
    freshness.push_weights(1)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "distill"):
        logging.getLogger("distill").propagate = True
        freshness.push_weights(2)
    assert "3 of 10 tensors changed" in caplog.text


def test_a_sync_is_waking_sending_waking_and_its_cost_is_a_metric() -> None:
    freshness = _freshness([10, 10], [[-1.0, -2.0], [-1.5, -2.0]])
    freshness.push_weights(0, Metrics())
    metrics = Metrics()
    freshness.push_weights(1, metrics)
    assert freshness._engine.calls == ["weights", "sync", "kv"] * 2  # type: ignore[attr-defined]
    assert metrics.reduce() == {"timing/train/weight_sync": 0.5, "sync_changed_tensors": 10.0, "probe_change": 0.25}


def test_in_float32_the_probe_must_equal_the_trainers() -> None:
    _freshness([10], [[-1.0, -2.0 + 0.5 * FLOAT32_LIMIT]], torch.float32).push_weights(0)
    with pytest.raises(RuntimeError, match="does not compute with the weights it was sent"):
        _freshness([10], [[-1.0, -2.001]], torch.float32).push_weights(0)
    with pytest.raises(RuntimeError):
        check_equal([math.nan], [0.0])


def test_the_difference_between_trainer_and_sampler_is_judged(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError, match=r"differ by 0\.001 nats a token, and 0\.0001 is the most"):
        _freshness([], [], torch.float32).observe(1e-3)
    with pytest.raises(RuntimeError, match=r"differ by 0\.6 nats a token, and 0\.5 is the most"):
        _freshness([], []).observe(0.6)
    freshness = _freshness([], [])
    logging.getLogger("distill").propagate = True
    with caplog.at_level(logging.WARNING, "distill"):
        for value in (0.03, 0.08, math.nan):
            freshness.observe(value)
        assert not caplog.records
        freshness.observe(0.1)
    assert "differ by 0.1 nats a token, 0.03 at first" in caplog.text


class ShortEngine(ScriptedEngine):
    """An engine of two ranks, one of which lacks the memory to wake; its probe is computed by both together."""

    def wake(self, what: str) -> None:
        if what == "kv" and dist.get_rank() == 1:
            raise RuntimeError("waking the engine's kv_cache needs more memory")

    def probe(self, token_ids: list[int]) -> list[float]:
        dist.barrier()
        return [-1.0]


def _short() -> str:
    world = World(datetime.timedelta(seconds=20))
    trainer = SimpleNamespace(dtype=torch.bfloat16, weights=lambda: CompleteWeights([]), offload=lambda: None)
    try:
        WeightSync(world, ShortEngine([1], []), trainer, 50).push_weights(0)  # type: ignore[arg-type]
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_rank_that_cannot_wake_stops_the_others_before_they_compute_with_it() -> None:
    short, other = "waking the engine's kv_cache needs more memory", "rank 1 failed while waking the engine's cache"
    assert run_ranks(2, _short) == [f"{other}: {short}", short]


class FakeMemory:
    """Stands in for a CUDA device's memory, the one part that is missing on a machine without a GPU."""

    def __init__(self, free: int = 0, others: int = 0) -> None:
        self.is_free, self.is_others = free, others

    def free(self) -> int:
        return self.is_free

    def others(self) -> int:
        return self.is_others


def test_waking_without_enough_free_memory_is_refused_with_the_figures() -> None:
    guard = SleepGuard(FakeMemory(free=3 * GIB, others=GIB))
    guard.check_free("weights", 3 * GIB)
    with pytest.raises(RuntimeError, match=r"kv_cache needs 4\.00 GiB and 3\.00 GiB are free \(1\.00 GiB are held"):
        guard.check_free("kv_cache", 4 * GIB)


def test_memory_that_grows_from_sleep_to_sleep_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    memory = FakeMemory()
    guard = SleepGuard(memory)
    logging.getLogger("distill").propagate = True
    with caplog.at_level(logging.WARNING, "distill"):
        for residual in (2.0, 2.5, 2.9):
            memory.is_others = int(residual * GIB)
            guard.asleep()
        assert not caplog.records
        for residual in (3.1, 3.2, 4.2):  # once for every further GiB
            memory.is_others = int(residual * GIB)
            guard.asleep()
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        "the sleeping engine leaves 3.10 GiB in use, 2.00 GiB after the first step",
        "the sleeping engine leaves 4.20 GiB in use, 2.00 GiB after the first step",
    ]


def test_the_wait_for_the_longest_answer_is_a_share_of_generation() -> None:
    values = {"timing/train/generation": 3.0, "timing/train/generation_slowest": 4.0}
    assert waits(values) == {"timing/train/generation_wait_share": 0.25}
    assert waits({}) == {}
