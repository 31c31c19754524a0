"""The transfer of a step's micro-batches gives the same tensors as copying them one by one."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.batching.plan import PackingConfig, plan
from distill.batching.transfer import copy_batches, copy_together, to_device
from distill.errors import UserError
from distill.model.student import Student
from distill.types import Layout, MicroBatch, OptimizerBatch, map_tensors
from tests.harness import fixed_rollouts

CPU = torch.device("cpu")
LAYOUTS = {
    "one rank": Layout(0, 1),
    "dummy micro-batch": Layout(7, 9),
    "tp 2, cp 2": Layout(0, 1, 1, 2, 1, 2, teacher_size=4),
}


def _batches(layout: Layout) -> list[OptimizerBatch]:
    rollouts = fixed_rollouts(8)
    rollouts += [type(r)(r.prompt, 1, (*r.response_ids, 7), (-1.0, *r.logprobs), "stop", 0) for r in rollouts[:3]]
    return plan(rollouts, layout, PackingConfig(6, sequences=None, tokens=150), seed=0, step=0)


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_transfer_equals_a_copy_of_each_tensor(name: str) -> None:
    batches = _batches(LAYOUTS[name])
    for batch, moved in zip(batches, copy_batches(batches, CPU), strict=True):
        assert (moved.response_tokens, moved.rollouts) == (batch.response_tokens, batch.rollouts)
        for ours, theirs in zip(moved, (each.to(CPU) for each in batch), strict=True):
            added = _without_added(ours)
            assert ours.rows_per_tp_rank == theirs.rows_per_tp_rank
            for view, expected in ((ours.student, theirs.student), (ours.teacher, theirs.teacher)):
                assert view.bounds == expected.bounds
                assert view.bounds_B is not None and view.bounds_B.dtype == torch.int32
                assert view.bounds_B.tolist() == list(view.bounds)
            assert ours.kept_M is not None
            assert torch.equal(ours.kept_M, theirs.weight_N.nonzero().squeeze(1))
            copied, originals = _tensors(added), _tensors(theirs)
            assert len(copied) == len(originals) >= 10
            for copy, original in zip(copied, originals, strict=True):
                assert copy.dtype == original.dtype and torch.equal(copy, original)


def _without_added(micro_batch: MicroBatch) -> MicroBatch:
    views = [replace(view, bounds_B=None) for view in (micro_batch.student, micro_batch.teacher)]
    return replace(micro_batch, student=views[0], teacher=views[1], kept_M=None)


def test_all_tensors_of_a_step_share_one_aligned_buffer() -> None:
    tensors = _tensors(copy_batches(_batches(LAYOUTS["tp 2, cp 2"]), CPU)[0].micro_batches[0])
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert all(tensor.storage_offset() * tensor.element_size() % 16 == 0 for tensor in tensors)


def test_tensors_of_any_dtype_and_size_are_copied() -> None:
    tensors = [torch.arange(n, dtype=dtype) for n in (0, 1, 7) for dtype in (torch.int64, torch.int32, torch.float32)]
    tensors.append(torch.arange(6).view(2, 3))
    copies = copy_together(tensors, CPU)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True))
    assert copy_together([], CPU) == []


def test_on_a_cpu_the_batches_stay_as_they_are() -> None:
    batches = _batches(LAYOUTS["one rank"])
    assert all(ours is theirs for ours, theirs in zip(to_device(batches, CPU), batches, strict=True))
    assert to_device([], torch.device("cpu")) == []


def test_a_response_with_an_unknown_token_is_refused_before_the_transfer() -> None:
    """On a GPU nothing checks the ids later."""
    actions: list[str] = []

    def all_or_none(action: str) -> Any:
        actions.append(action)
        return contextlib.nullcontext()

    student: Any = SimpleNamespace(_valid_vocab=300, device=CPU, _all_or_none=all_or_none)
    with pytest.raises(UserError) as refused:
        Student.to_device(student, _batches(LAYOUTS["one rank"]))
    assert (refused.value.key, len(actions)) == ("sampled_ids_N", 1)
