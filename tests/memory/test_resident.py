"""The memory forecast of a run without a GPU, compared with the resident memory of the process."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from distill.distributed.planned import PlannedWorld
from distill.memory.forecast import GIB, compare, plan_memory
from tests.memory.test_forecast import known, recipe


def test_without_a_gpu_the_resident_memory_is_compared_with_the_largest_phase(caplog) -> None:
    """Freed memory stays resident, so each phase has the peak of all phases before it."""
    config, world = recipe("my-distillation-1n4g.yaml"), PlannedWorld(1, 1, torch.device("cpu"))
    shapes = known(config.policy.model_name), known(config.teacher.model_name)
    planned = plan_memory(config, *shapes, world.device)
    assert planned is not None and planned.resident > 0
    found = replace(planned, resident=GIB // 2)
    with caplog.at_level(logging.INFO):
        compare(found, {"sync": 3 * GIB, "training": 5 * GIB, "validation": 9 * GIB}, 0, world)
        compare(found, {}, 0, world)
    (record,) = caplog.records
    assert record.args == (5.0, 0.5, "training", max(map(found.total, found.phases)) / GIB)
