"""Teachers in the student's module: frozen base, live, averaged and copied adapters, in every layout."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.batching.plan import PackingConfig, plan
from distill.config import Config
from distill.distributed.world import World
from distill.metrics.step import Metrics
from distill.model.dtensor import local_shard
from distill.model.following_teacher import build_teacher
from distill.model.hf_files import find_model
from distill.model.hf_load import local_slices
from distill.model.student import Student
from distill.model.teacher import ScoringTeacher
from distill.model.teacher_check import verify_teacher
from distill.types import Rollout, TopK
from distill.validation.token_kl import compare_tokens
from tests.harness import config_for, fixed_rollouts
from tests.helpers import run_ranks, save_tiny_model

pytestmark = pytest.mark.slow
VOCAB, VALID = 383, 381  # ranks have unequal parts of the vocabulary, and two tokens are padding
DECAY, RANK, ALPHA = 0.7, 3, 8.0  # three rows of A on four ranks: the shards have different sizes
CONTEXT, LORA = "distillation.context_distillation", "policy.dtensor_cfg.lora_cfg"
CASES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "dp 4": (1, 1, ()),
    "tp 2, sampled": (2, 1, ("loss_fn.kl_type=sampled", "policy.dtensor_cfg.reshard_after_forward=false")),
    "cp 2, larger packs": (
        *(1, 2),
        ("teacher.dynamic_batching.enabled=true", "teacher.dynamic_batching.logprob_mb_tokens=140"),
    ),
    "tp 2, cp 2": (2, 2, ("policy.dtensor_cfg.activation_checkpointing=true",)),
    "tp 2, cp 2, full vocabulary": (2, 2, ("distillation.topk_logits_k=0",)),
}
"""Maps a name to the tensor- and context-parallel size of four ranks, and to settings."""
MODES = ("self_frozen", "self_live", "self_ema", "self_periodic", "self_frozen, init_from")
TESTED = [(name, mode) for name in CASES for mode in MODES if name == "tp 2, cp 2" or mode == "self_ema"]
SINGLE = PackingConfig(6, sequences=1, tokens=None)  # several micro-batches on each rank
STEPS, TRAINED_STEPS = 3, 5


def _config(root: Path, mode: str, *settings: str) -> Config:
    return config_for(
        root,
        root,
        f"{LORA}.enabled=true",
        f"{LORA}.dim={RANK}",
        f"{LORA}.alpha={ALPHA}",
        f"{CONTEXT}.enabled=true",
        f"{CONTEXT}.mode={mode.partition(',')[0]}",
        f"{CONTEXT}.ema_decay={DECAY}",
        f"{CONTEXT}.refresh_period=2",
        "policy.optimizer.kwargs.lr=1e-2",
        *settings,
        ranks=4,
    )


def _adapter(name: str, shape: Sequence[int], version: int) -> Tensor:
    """Return the complete values of an adapter's parameter in one of several versions of the student."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {version}".encode()))
    return 0.2 * torch.randn(*shape, generator=generator)


def _set_adapters(student: Student, version: int) -> None:
    for name, parameter in student.model.named_trained():
        complete = _adapter(name, parameter.shape, version)
        local_shard(parameter.detach()).copy_(complete[local_slices(parameter)])


def _average(name: str, shape: Sequence[int], mode: str) -> Tensor | None:
    """Return the complete adapter that the teacher has after ``STEPS`` steps; None: it has no adapters."""
    versions = [_adapter(name, shape, version) for version in range(STEPS + 1)]
    average = versions[0]
    for version in versions[1:]:
        average = DECAY * average + (1 - DECAY) * version
    initial = {"self_frozen": None, "self_frozen, init_from": versions[0]}
    return {"self_live": versions[-1], "self_ema": average, "self_periodic": versions[2], **initial}[mode]


def _build(root: Path, world: World, student: Student, mode: str, *settings: str) -> ScoringTeacher:
    config = _config(root, mode, *settings)
    if "init_from" in mode:
        lora = replace(config.policy.dtensor_cfg.lora_cfg, init_from="a folder")
        parallel = replace(config.policy.dtensor_cfg, lora_cfg=lora)
        config = replace(config, policy=replace(config.policy, dtensor_cfg=parallel))
    return build_teacher(config, find_model(str(root), ""), world, VALID, student)


def _shards(student: Student) -> dict[str, Tensor]:
    return {name: local_shard(parameter.detach()).clone() for name, parameter in student.model.named_trained()}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _without_context(rollouts: Sequence[Rollout]) -> list[Rollout]:
    return [replace(rollout, teacher_prefix_ids=()) for rollout in rollouts]


def _in_layout(root: Path, world: World, name: str) -> dict[str, Any]:
    """Return the comparisons of student and teacher in one layout, for each mode, and other observations."""
    tp, cp, settings = CASES[name]
    world.build_mesh("cpu", tp, cp, teacher=None)
    files, rollouts = find_model(str(root), ""), fixed_rollouts(6, vocab=VALID)
    student = Student(_config(root, "self_frozen", *settings), files, world, VALID, ())
    before = _shards(student)
    assert not any(tensor.any() for key, tensor in before.items() if key.endswith("lora_B"))
    compare = partial(compare_tokens, world, student, packing=SINGLE, seed=0, top_tokens=0)
    teacher = _build(root, world, student, "self_frozen", *settings)
    found: dict[str, Any] = {"no context": compare(teacher, _without_context(rollouts), 0)}
    _set_adapters(student, 0)
    teachers = {mode: _build(root, world, student, mode, *settings) for case, mode in TESTED if case == name}
    for step in range(1, STEPS + 1):
        _set_adapters(student, step)
        for teacher in teachers.values():
            teacher.after_step(student, step)
    own = _shards(student)
    for mode, teacher in teachers.items():
        found[mode] = compare(teacher, rollouts, 0)
        found[f"{mode}, verified"] = verify_teacher(teacher, [(1, 2, 3), (4, 5)])
        teacher.offload()
    found["student is unchanged"] = _equal(_shards(student), own)
    return found


def _after_training(root: Path, world: World) -> dict[str, Any]:
    """Train with each teacher; return whether its targets changed, and whether a resumed teacher has its targets."""
    world.build_mesh("cpu", 2, 2, teacher=None)
    found = {}
    for mode in MODES[:3:2]:
        student = Student(_config(root, mode), find_model(str(root), ""), world, VALID, ())
        teacher = _build(root, world, student, mode)
        (batch,) = plan(fixed_rollouts(6, vocab=VALID), world.layout, SINGLE, seed=0, step=0)
        with teacher.on_device():
            first = [cast(TopK, each) for each in teacher.targets_of(batch.micro_batches)]
        for step in range(1, TRAINED_STEPS + 1):
            student.train(batch, first, Metrics())
            student.end_step()
            teacher.after_step(student, step)
        resumed = _build(root, world, student, mode)
        for name, tensor in teacher.state().items():  # as loading a checkpoint does
            local_shard(resumed.state()[name]).copy_(local_shard(tensor))
        resumed.resume(student)
        with teacher.on_device(), resumed.on_device():
            then, again = ([cast(TopK, t.targets(each)) for each in batch] for t in (teacher, resumed))
        found[mode] = {
            "unchanged": all(map(_same_targets, first, then)),
            "resumed": all(map(_same_targets, then, again)),
            "trained": any(tensor.any() for key, tensor in _shards(student).items() if key.endswith("lora_B")),
            "state": {key: local_shard(tensor).dtype for key, tensor in teacher.state().items()},
            "names": sorted(f"teacher.{name}" for name, _ in student.model.named_trained()),
        }
    return found


def _same_targets(one: TopK, other: TopK) -> bool:
    return torch.equal(one.ids_NK, other.ids_NK) and torch.equal(one.logprobs_NK, other.logprobs_NK)


def _after_an_error(root: Path, world: World) -> dict[str, bool]:
    """Return whether the student has its adapters after the first forward of the model, and after a failed one.

    Both forwards are those of a teacher with other adapters.
    """
    world.build_mesh("cpu", 2, 2, teacher=None)
    student = Student(_config(root, "self_ema"), find_model(str(root), ""), world, VALID, ())
    teacher = _build(root, world, student, "self_ema")
    _set_adapters(student, 1)
    own = _shards(student)
    (batch,) = plan(fixed_rollouts(4, vocab=VALID), world.layout, SINGLE, seed=0, step=0)
    with teacher.on_device():
        teacher.targets(batch.micro_batches[0])
    found = {"first forward": _equal(_shards(student), own)}

    def failing(*_: Any) -> Any:
        assert not _equal(_shards(student), own), "the teacher's forward has the stored adapters"
        raise RuntimeError("failed")

    student.model.register_forward_pre_hook(failing)
    with pytest.raises(RuntimeError, match="failed"), teacher.on_device():
        teacher.targets(batch.micro_batches[0])
    return found | {"failed forward": _equal(_shards(student), own)}


def _on_ranks(root: Path) -> dict[str, Any]:
    world = World()
    found: dict[str, Any] = {name: _in_layout(root, world, name) for name in CASES}
    found["training"] = _after_training(root, world)
    found["restored"] = _after_an_error(root, world)
    world.close()
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("m"), "qwen3", False, hidden=64, heads=8, kv_heads=4, vocab=VOCAB)


@pytest.fixture(scope="module")
def ranks(root: Path) -> list[dict[str, Any]]:
    return run_ranks(4, _on_ranks, root)


@pytest.fixture(scope="module")
def logits(root: Path) -> dict[str, list[Tensor]]:
    """Return float64 logits of plain models with merged adapters: the student, and the teacher of each mode."""
    rollouts = fixed_rollouts(6, vocab=VALID)
    prompts = [rollout.prompt.student_ids for rollout in rollouts]
    prefixes = [rollout.teacher_prefix_ids for rollout in rollouts]
    found = {"student": _plain_logits(root, partial(_adapter, version=STEPS), prompts, rollouts)}
    for mode in MODES:
        found[mode] = _plain_logits(root, partial(_average, mode=mode), prefixes, rollouts)
    return found


@torch.no_grad()
def _plain_logits(
    root: Path, adapter: Callable[..., Tensor | None], prefixes: Sequence[Any], rollouts: Sequence[Rollout]
) -> list[Tensor]:
    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float64)
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            a = adapter(f"model.{name}.lora_A", (RANK, module.in_features))
            b = adapter(f"model.{name}.lora_B", (module.out_features, RANK))
            if a is not None and b is not None:
                module.weight += ALPHA / RANK * b.double() @ a.double()
    return [
        model(torch.tensor([[*prefix, *rollout.response_ids]])).logits[0, len(prefix) - 1 : -1, :VALID]
        for prefix, rollout in zip(prefixes, rollouts, strict=True)
    ]


def _kls(ours: Tensor, theirs: Tensor, ids: Sequence[int], settings: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return both KLs of each row over the ids that the loss compares and one outcome for all other ids."""
    q, p = ours.log_softmax(-1), theirs.log_softmax(-1)
    best = p.topk(16).indices
    kept = torch.zeros_like(q, dtype=torch.bool).scatter(1, best, True)
    if "loss_fn.kl_type=sampled" in settings:
        kept.scatter_(1, torch.tensor(ids)[:, None], True)
    if "distillation.topk_logits_k=0" not in settings:
        q, p = (
            torch.cat([x.masked_fill(~kept, -80.0), x.masked_fill(kept, -80.0).logsumexp(1, keepdim=True)], 1)
            for x in (q, p)
        )
    return (p.exp() * (p - q)).sum(1), (q.exp() * (q - p)).sum(1)


@pytest.mark.parametrize(("name", "mode"), TESTED)
def test_token_kls_equal_those_of_plain_models_with_merged_adapters(ranks, logits, name, mode) -> None:
    for i, rollout in enumerate(fixed_rollouts(6, vocab=VALID)):
        wanted = _kls(logits["student"][i], logits[mode][i], rollout.response_ids, CASES[name][2])
        for found in (rank[name][mode][i] for rank in ranks):
            ours = found.forward_kl_R, found.reverse_kl_R
            torch.testing.assert_close(ours, tuple(x.float() for x in wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_student_that_has_not_trained_equals_the_frozen_teacher_without_context(ranks, name) -> None:
    for each in (one for rank in ranks for one in rank[name]["no context"]):
        assert max(each.forward_kl_R.abs().max(), each.reverse_kl_R.abs().max()) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_a_forward_of_the_teacher_leaves_the_students_adapters_unchanged(ranks, name) -> None:
    assert all(rank[name]["student is unchanged"] for rank in ranks)


@pytest.mark.parametrize(("name", "mode"), TESTED)
def test_the_base_of_a_teacher_with_adapters_is_verified(ranks, name, mode) -> None:
    assert all(rank[name][f"{mode}, verified"] < 1e-4 for rank in ranks)


def test_targets_of_the_frozen_base_are_bitwise_unchanged_by_five_steps(ranks) -> None:
    for rank in ranks:
        frozen, average = rank["training"]["self_frozen"], rank["training"]["self_ema"]
        assert frozen["trained"] and average["trained"]
        assert frozen["unchanged"] and not frozen["state"]
        assert not average["unchanged"], "the average follows the student"


def test_a_resumed_teacher_with_averaged_adapters_has_the_same_targets(ranks) -> None:
    for rank in ranks:
        average = rank["training"]["self_ema"]
        assert average["resumed"] and average["state"] == dict.fromkeys(average["names"], torch.float32)


@pytest.mark.parametrize("forward", ["first forward", "failed forward"])
def test_the_student_has_its_adapters_after_the_teachers(ranks, forward) -> None:
    assert all(rank["restored"][forward] for rank in ranks)
