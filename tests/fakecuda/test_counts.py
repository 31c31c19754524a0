"""What a training step on fake CUDA tensors does, counted: launches and bytes of a layer, host syncs, memory.

Two runs that differ only in the number of layers give the numbers of one layer. All other tests share these runs.
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

SETTINGS = (
    "policy.dtensor_cfg.activation_checkpointing=true",
    "teacher.dynamic_batching.logprob_mb_tokens=8192",  # the teacher does not join micro-batches
)
ONE = Case(student="4b", teacher="32b", layers=1, ranks=8, overrides=SETTINGS)
TOKENS = 8187
"""Positions of a pack of ``ONE``: three sequences of 2,730 tokens without the last token of each."""
CASES = {"one": ONE, "two": replace(ONE, layers=2)}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_cases_without_errors(CASES)


def per_layer(found: dict[str, Any], scope: str, class_: str, key: str) -> float:
    """Return launches, bytes or FLOPs of one layer and one micro-batch of the student."""
    one, two = (found[name]["work"][scope][class_][key] for name in ("one", "two"))
    return float(two - one) / ONE.micro_batches


LAUNCHES = {
    ("teacher/targets", "matmul"): 7,
    ("teacher/targets", "attention"): 1,
    ("training/forward", "matmul"): 7,
    ("training/forward", "attention"): 1,
    ("training/backward", "matmul"): 20,  # the last product is not recomputed
    ("training/backward", "attention"): 2,
}
"""Kernels of one layer with activation checkpointing."""
MAX_ELEMENTWISE_LAUNCHES = {"teacher/targets": 8, "training/forward": 8, "training/backward": 34}
MAX_ELEMENTWISE_BYTES = {"teacher/targets": 294_000, "training/forward": 132_000, "training/backward": 408_000}
"""Bytes that the elementwise kernels of one layer read and write for each token."""


def test_a_layer_launches_this_many_kernels(found: dict[str, Any]) -> None:
    assert {key: per_layer(found, *key, "launches") for key in LAUNCHES} == LAUNCHES


@pytest.mark.parametrize("scope", MAX_ELEMENTWISE_LAUNCHES)
def test_elementwise_kernels_of_a_layer_stay_below_their_limits(found: dict[str, Any], scope: str) -> None:
    assert 0 < per_layer(found, scope, "elementwise", "launches") <= MAX_ELEMENTWISE_LAUNCHES[scope]
    assert 0 < per_layer(found, scope, "elementwise", "bytes") / TOKENS <= MAX_ELEMENTWISE_BYTES[scope]


IN_MICRO_BATCHES: dict[tuple[str, str, str], int] = {}
"""Host syncs inside of micro-batches (teacher, forward and backward) of a step: none."""
BETWEEN_MICRO_BATCHES = {
    # Sums of each of the two gathered buckets, and of each of the 13 tensors on arrival.
    ("sync", "copy to host", "model/weights.py GatheredWeights._finish"): 2,
    ("sync", "tolist", "rollout/engine.py EngineBase._checked"): 13,
    # A gather on another stream may still read the shards that are freed.
    ("teacher", "torch.cuda.synchronize", "model/host_offload.py FrozenOffload.release"): 1,
    # A gradient that is not finite must not change the weights.
    ("training/optimizer", "item", "model/student.py Student.grad_norm"): 1,
}
"""Other host syncs of a step with one optimizer step: (scope, kind, function) -> number."""
_MEASUREMENT = "metrics/phases.py Phases._synchronize"
"""Waits at both ends of each phase, for the durations of the phases."""


def test_the_host_waits_for_the_device_only_in_these_places(found: dict[str, Any]) -> None:
    waits = {(scope, kind, place): n for scope, kind, place, n in found["one"]["syncs"] if place != _MEASUREMENT}
    inside = {key: n for key, n in waits.items() if key[0].endswith(("/targets", "/forward", "/backward"))}
    assert inside == IN_MICRO_BATCHES
    assert {key: n for key, n in waits.items() if key not in inside} == BETWEEN_MICRO_BATCHES
