"""Counted peak memory of a step on fake CUDA tensors, compared with the forecast of ``distill.memory``.

The models have few layers here. With all layers, each case can be run from the command line; see ``drive.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.fakecuda import preload
from tests.fakecuda.build import Case
from tests.fakecuda.cases import run_cases_without_errors

REASON = preload.missing()
pytestmark = [pytest.mark.fakecuda, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

TOLERANCE = 0.05
LAYERS = 4
CASES = {
    # One response of the maximum length in each pack.
    "4b <- 32b, 8 ranks": Case(student="4b", teacher="32b", layers=LAYERS, ranks=8, responses=(7892,)),
    "8b <- 14b, two replicas, cp 2, layers stay gathered": Case(
        student="8b",
        teacher="14b",
        layers=LAYERS,
        ranks=16,
        replicas=2,
        cp=2,
        responses=(7892,),
        overrides=("policy.dtensor_cfg.reshard_after_forward=false",),
    ),
}
# Two sequences of half the limit of a pack, for student and teacher.
ALL_WEIGHTS = Case(
    recipe="recipes/qwen3-14b-context-self-distillation-4n4g.yaml",
    layers=LAYERS,
    prompt=2048,
    teacher_prefix=2048,
    responses=(15360, 15360),
)
LORA = replace(ALL_WEIGHTS, recipe="recipes/qwen3-14b-context-self-distillation-lora-1n4g.yaml")
CASES |= {
    f"14b <- {of}, recomputation {mode}": replace(
        case, overrides=(f"policy.dtensor_cfg.activation_checkpointing={mode}",)
    )
    for of, case, mode in (
        ("14b", ALL_WEIGHTS, "true"),
        ("14b", ALL_WEIGHTS, "selective"),
        ("itself with adapters", LORA, "selective"),
        ("itself with adapters", LORA, "false"),
    )
}
CASES |= {
    "8b <- itself with averaged adapters, one GPU": replace(
        LORA,
        recipe="recipes/qwen3-8b-context-self-distillation-lora-1n1g.yaml",
        overrides=(
            "distillation.context_distillation.mode=self_ema",
            "policy.dtensor_cfg.activation_checkpointing=true",
        ),
    ),
    "8b with adapters <- 14b": Case(
        student="8b",
        teacher="14b",
        layers=LAYERS,
        ranks=8,
        responses=(7892,),
        overrides=("policy.dtensor_cfg.lora_cfg.enabled=true",),
    ),
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_cases_without_errors(CASES)


@pytest.mark.parametrize("phase", ["sync", "teacher", "training"])
@pytest.mark.parametrize("name", CASES)
def test_the_forecast_of_device_memory_is_within_5_percent(found: dict[str, Any], name: str, phase: str) -> None:
    peak = found[name]["memory"][phase]
    assert peak["forecast"] == pytest.approx(peak["counted"], rel=TOLERANCE), peak


@pytest.mark.parametrize("name", CASES)
def test_the_forecast_of_pinned_memory_is_exact(found: dict[str, Any], name: str) -> None:
    """Micro-batches depend on the lengths of responses; their forecast is for responses of the maximum length."""
    pinned, forecast = found[name]["pinned"], found[name]["pinned"]["forecast"]
    transfer = pinned["micro-batches"]
    assert pinned["bytes"] == forecast["teacher shards"] + forecast["optimizer state"] + transfer, pinned
    assert 0.7 * forecast["micro-batches"] <= transfer <= forecast["micro-batches"], pinned
    assert pinned["rounded"] - pinned["bytes"] <= transfer, "slabs consist of powers of two"
