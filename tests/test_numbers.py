"""The optimizer step in float32 does not depend on ranks, micro-batches or packing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill.batching.plan import PackingConfig
from distill.distributed.world import World
from tests.harness import (
    WARM_UP,
    Step,
    config_for,
    differences,
    fixed_rollouts,
    plain_step,
    plain_update,
    sharded_step,
)
from tests.helpers import run_ranks, save_tiny_model

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
VOCAB = 383  # odd, so that the two ranks' shards of embedding and head have different sizes
SHAPES = [*((family, tied) for family in ("llama", "qwen3") for tied in (True, False)), ("gemma3_text", True)]
LOSSES = [
    ("mixed", "loss_fn.outside_topk=bucket"),
    ("reverse", "loss_fn.outside_topk=bucket"),
    ("mixed", "loss_fn.zero_outside_topk=false"),
    ("sampled", "loss_fn.outside_topk=bucket"),
    ("mixed", "loss_fn.support=student"),
    ("mixed", "distillation.topk_logits_k=0"),
]
PACKINGS = {
    "one micro-batch": PackingConfig(12, sequences=None, tokens=None),
    "several, by tokens": PackingConfig(12, sequences=None, tokens=120),
    "four of at most three responses": PackingConfig(12, sequences=3, tokens=None),
    "single responses": PackingConfig(12, sequences=1, tokens=None),
}
SEVERAL = "several, by tokens"
QWEN3 = ("qwen3", True)
RUNS = [(*shape, name) for shape in SHAPES for name in PACKINGS if shape == QWEN3 or name == SEVERAL]
"""Family, tied embedding and packing of each step; on one rank only the model ``QWEN3``."""


def _folders(root: Path, family: str, tied: bool) -> tuple[Path, Path]:
    return root / f"{family}-{tied}-student", root / f"{family}-{tied}-teacher"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family, tied in SHAPES:
        student, teacher = _folders(root, family, tied)
        save_tiny_model(student, family, tied, seed=1, vocab=VOCAB)
        # The reference requires a unique top-k, so the seeds avoid ties.
        seed = 5 if (family, tied) == ("qwen3", False) else 2
        save_tiny_model(teacher, family, tied, seed=seed, layers=3, vocab=VOCAB)
    return root


def _all_steps(root: Path) -> dict[tuple[str, bool, str], Step]:
    """Run all models and packings in the same processes, because starting a process takes longer than a step."""
    world = World()
    world.build_mesh("cpu", tp=1, cp=1)
    steps = {}
    for family, tied, name in RUNS:
        if world.size == 1 and (family, tied) != QWEN3:
            continue
        config = config_for(*_folders(root, family, tied), "loss_fn.outside_topk=bucket", ranks=world.size)
        steps[family, tied, name] = sharded_step(config, world, fixed_rollouts(vocab=VOCAB), PACKINGS[name])
    for kl_type, setting in LOSSES[1:] if world.size > 1 else ():
        config = config_for(*_folders(root, *QWEN3), f"loss_fn.kl_type={kl_type}", setting, ranks=world.size)
        steps[*QWEN3, f"{kl_type} {setting}"] = sharded_step(
            config, world, fixed_rollouts(vocab=VOCAB), PACKINGS[SEVERAL]
        )
    config = config_for(
        *_folders(root, *QWEN3),
        "loss_fn.outside_topk=bucket",
        "policy.dtensor_cfg.activation_checkpointing=true",
        "runtime.logits_chunk_rows=7",
        ranks=world.size,
    )
    if world.size > 1:
        steps[*QWEN3, "checkpointed"] = sharded_step(
            config, world, fixed_rollouts(vocab=VOCAB), PACKINGS["one micro-batch"]
        )
    world.close()
    return steps


@pytest.fixture(scope="module")
def steps(models: Path) -> dict[int, list[dict[tuple[str, bool, str], Step]]]:
    """Return a list with the results of each rank, by number of ranks."""
    return {ranks: run_ranks(ranks, _all_steps, models) for ranks in (1, 2)}


@pytest.mark.parametrize(("family", "tied"), SHAPES)
def test_step_equals_plain_pytorch_for_every_packing(models, steps, family, tied) -> None:
    config = config_for(*_folders(models, family, tied), "loss_fn.outside_topk=bucket")
    reference = plain_step(config, fixed_rollouts(vocab=VOCAB))
    names = [name for *shape, name in RUNS if tuple(shape) == (family, tied)]
    for ranks, name in ((ranks, name) for ranks in ((1, 2) if (family, tied) == QWEN3 else (2,)) for name in names):
        found = differences(steps[ranks][0][family, tied, name], reference)
        worst = max(found, key=found.__getitem__)
        assert found[worst] < TOLERANCE, f"{ranks} ranks, {name}: {worst} differs by {found[worst]:.2g}"


@pytest.mark.parametrize(("kl_type", "setting"), LOSSES[1:])
def test_step_equals_plain_pytorch_for_other_losses(models, steps, kl_type, setting) -> None:
    config = config_for(*_folders(models, *QWEN3), f"loss_fn.kl_type={kl_type}", setting)
    step = steps[2][0][*QWEN3, f"{kl_type} {setting}"]
    found = differences(step, plain_step(config, fixed_rollouts(vocab=VOCAB)))
    worst = max(found, key=found.__getitem__)
    assert found[worst] < TOLERANCE, f"{worst} differs by {found[worst]:.2g}"


def test_step_is_the_same_with_activation_checkpointing_and_chunked_logits(models, steps) -> None:
    config = config_for(*_folders(models, *QWEN3), "loss_fn.outside_topk=bucket")
    found = differences(steps[2][0][*QWEN3, "checkpointed"], plain_step(config, fixed_rollouts(vocab=VOCAB)))
    assert all(value < TOLERANCE for value in found.values()), found


def test_update_equals_plain_pytorch_and_is_equal_on_all_ranks(models, steps) -> None:
    """Compare the product's update with PyTorch's AdamW on the product's gradients.

    The reference's gradients are not used: Adam divides by the size of a gradient, so a rounding difference of a tiny
    gradient would become a large difference of the update.
    """
    for family, tied in SHAPES:
        config = config_for(*_folders(models, family, tied), "loss_fn.outside_topk=bucket")
        for ranks in (1, 2) if (family, tied) == QWEN3 else (2,):
            step = steps[ranks][0][family, tied, SEVERAL]
            for name, weight in plain_update(config, step.gradients).items():
                lr, ulp = config.policy.optimizer.kwargs.lr * WARM_UP, torch.finfo(torch.float32).eps
                moved, limit = (step.weights[name] - weight).abs(), 1e-3 * lr + ulp * weight.abs()
                assert (moved <= limit).all(), (family, tied, ranks, name, (moved - limit).max())
        ours, theirs = (seen[family, tied, SEVERAL] for seen in steps[2])
        assert all(torch.equal(ours.weights[name], theirs.weights[name]) for name in ours.weights)
