"""A vocabulary-parallel head on two ranks gives the numbers of a complete head."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distill.config import LossConfig
from distill.errors import UserError
from distill.loss import OffPolicyRows, Sampled, VocabParallel, fused_linear_kl, teacher_topk
from distill.types import LossOutput, Targets, TeacherRows
from tests.helpers import run_ranks
from tests.loss.test_fused import name, rows_and_head
from tests.loss_oracle import LOSSES

SAMPLED = LossConfig(kl_type="sampled", token_kl_cap=1.5)
CASES = [*LOSSES, SAMPLED]
ROWS, VOCAB, PADDED, VALID = 9, 40, 48, 43
"""Two ranks have 24 columns each; 19 of the last rank's are real."""


def _inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    hidden, head, t_hidden, t_head = rows_and_head(ROWS, PADDED, 8, dtype=dtype)
    ids_N = torch.arange(ROWS) * 4
    weight_N = torch.tensor([1.0, 1, 0, 1, 0.5, 1, 1, 0, 1], dtype=torch.float64)
    return hidden, head, t_hidden, t_head, ids_N, weight_N


def _step(
    config: LossConfig,
    k: int,
    parallel: VocabParallel | None,
    rows: bool = False,
    ties: bool = False,
    **options: Any,
) -> tuple[Any, ...]:
    """Return loss, gradients and metrics with this rank's shard of the head, or with the complete head.

    ``rows``: whether the targets are the teacher's hidden rows and this rank's part of its head, instead of its top-k.
    ``ties``: whether the student's logits are small whole numbers.
    """
    hidden, head, t_hidden, t_head, ids_N, weight_N = _inputs(torch.float64)
    if ties:
        hidden, head = hidden.round(), head.round()
    extra_ids_N = ids_N if config.kl_type == "sampled" else None
    part, first = slice(None), 0
    if parallel is not None:
        first, columns = parallel.first, PADDED // dist.get_world_size(parallel.group)
        part = slice(first, first + columns)
        head = head[part].clone()
    targets: Targets = TeacherRows(t_hidden, t_head[:45][part], first)  # fewer padding rows than the student's head
    if not rows:
        temperature = config.temperature or 0.6
        targets = teacher_topk(t_hidden, t_head, k, temperature, valid_vocab=VALID, extra_ids_N=extra_ids_N)
    hidden.requires_grad_()
    head.requires_grad_()
    output: LossOutput = fused_linear_kl(
        hidden,
        head,
        targets,
        config,
        weight_N,
        Sampled(ids_N, torch.zeros(ROWS, dtype=torch.float64) - 2, 0.6),
        chunk_rows=4,
        valid_vocab=VALID,
        stop_token_ids=[3, 37],
        topk_logits_k=k,
        parallel=parallel,
        **options,
    )
    (output.kl_sum / 3).backward()
    stats = {metric: float(total) / (float(count) or 1.0) for metric, (total, count) in output.stats.items()}
    return output.kl_sum.detach(), hidden.grad, head.grad, stats


TOPKS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 id": (1, {}),
    "6 ids": (6, {}),
    "more ids than a rank has columns": (30, {}),
    "all ids": (VALID, {}),
    "ties": (6, {"ties": True}),
    "no rows": (6, {"rows": 0}),
    "chunks": (6, {"chunk_rows": 4}),
    "extra and sampled ids": (6, {"extra": True, "sampled": True}),
    "sampled ids only": (30, {"sampled": True}),
    "all ids and extra ids": (VALID, {"extra": True}),
}
"""Maps a name to the number of ids of a top-k, and to options of ``_topk``."""


def _topk(
    parallel: VocabParallel | None,
    k: int,
    rows: int = ROWS,
    ties: bool = False,
    extra: bool = False,
    sampled: bool = False,
    chunk_rows: int | None = None,
) -> dict[str, torch.Tensor | None]:
    """Return a top-k of the teacher with this rank's shard of its head, or with the complete head; ids ascending."""
    _, _, t_hidden, t_head, ids_N, _ = _inputs(torch.float64)
    if ties:
        t_hidden, t_head = t_hidden.round(), t_head.round()
    if parallel is not None:
        t_head = t_head[parallel.first : parallel.first + PADDED // dist.get_world_size(parallel.group)].clone()
    extra_ids_N, sampled_ids_N = (ids_N[:rows] if given else None for given in (extra, sampled))
    found = teacher_topk(
        *(t_hidden[:rows], t_head, k, 0.6, chunk_rows, VALID, extra_ids_N),
        sampled_ids_N=sampled_ids_N,
        parallel=parallel,
    )
    ids_NK, order_NK = found.ids_NK.sort(dim=1)
    return vars(found) | {"ids_NK": ids_NK, "logprobs_NK": found.logprobs_NK.gather(1, order_NK)}


def _all_steps(parallel: VocabParallel | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for config in CASES:
        student = dataclasses.replace(config, support="student")
        found[name(config)] = _step(config, 6, parallel)
        found[f"{name(config)}, student's support"] = _step(student, 6, parallel, rows=True)
        found[f"{name(config)}, full vocabulary"] = _step(config, 0, parallel, rows=True)
    student = LossConfig("reverse", support="student")
    for k in (1, 30, VALID):  # more ids than a rank has columns; K = V: no rank has a tail
        found[f"{k} ids"] = _step(LossConfig("reverse"), k, parallel)
        found[f"{k} of the student's ids"] = _step(student, k, parallel, rows=True)
    found["teacher's top-k from hidden rows"] = _step(LossConfig(), 6, parallel, rows=True)
    found["ties"] = _step(student, 6, parallel, rows=True, ties=True)
    for k, rows in ((6, False), (0, True)):
        found[f"two temperatures, {k} ids"] = _step(LossConfig(temperature=2.0), k, parallel, rows)
        found[f"cap, {k} ids"] = _step(LossConfig("jsd", token_kl_cap=0.1), k, parallel, rows)
        for kl_type in ("mixed", "jsd"):
            found[f"clip of {kl_type}, {k} ids"] = _step(LossConfig(kl_type, entry_clip=0.02), k, parallel, rows)
        for few in (False, True):  # a group of rows without rows, and a chunk of one row
            off_policy = OffPolicyRows(
                torch.arange(ROWS) % 9 == 1 if few else torch.zeros(ROWS).bool(), LossConfig("jsd")
            )
            found[f"off-policy, {few}, {k} ids"] = _step(LossConfig(), k, parallel, rows, off_policy=off_policy)
    for support in ("teacher", "student"):
        config = LossConfig(support=support)
        overlap_N = torch.arange(ROWS) % 2 == 0
        found[f"overlap, {support}"] = _step(config, 30, parallel, rows=True, overlap_N=overlap_N)
    return found


def _d_hidden(dtype: torch.dtype, parallel: VocabParallel | None) -> torch.Tensor:
    """Return the hidden rows' gradient of bf16 operands; many rows make the mean rounding error stable."""
    tensors = rows_and_head(64, 512, 64, dtype=torch.bfloat16)
    hidden, head, t_hidden, t_head = (tensor.to(dtype) for tensor in tensors)
    topk = teacher_topk(t_hidden, t_head, 16, 1.0)
    if parallel is not None:
        columns = 512 // dist.get_world_size(parallel.group)
        parallel = VocabParallel(parallel.group, dist.get_rank() * columns, 512)
        head = head[parallel.first : parallel.first + columns].clone()
    hidden.requires_grad_()
    fused_linear_kl(hidden, head, topk, LossConfig(), torch.ones(64), parallel=parallel).kl_sum.backward()
    assert hidden.grad is not None
    return hidden.grad.double()


def _on_ranks() -> dict[str, Any]:
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parallel = VocabParallel(dist.group.WORLD, rank * PADDED // ranks, PADDED)
    found = _all_steps(parallel)
    found["rounded"] = _d_hidden(torch.bfloat16, parallel)
    found["top-k"] = {case: _topk(parallel, k, **options) for case, (k, options) in TOPKS.items()}
    calls: list[tuple[Any, int]] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        calls.append((op, tensor.numel()))
        all_reduce(tensor, op=op, group=group)

    dist.all_reduce = counted  # type: ignore[assignment]
    _step(LossConfig(), 6, parallel)
    found["calls"] = [(str(op), numel) for op, numel in calls]
    dist.all_reduce = all_reduce
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """Return the results of two ranks."""
    return run_ranks(2, _on_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("case", TOPKS)
def test_a_teachers_top_k_of_a_split_vocabulary_is_that_of_the_complete_vocabulary(ranks, case) -> None:
    k, options = TOPKS[case]
    complete = _topk(None, k, **options)
    for rank in ranks:
        for field, numbers in complete.items():
            found = rank["top-k"][case][field]
            if numbers is None:
                assert found is None, field
            elif field == "ids_NK":
                assert torch.equal(found, numbers)
            else:
                torch.testing.assert_close(found, numbers, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_vocabulary_parallel_head_gives_the_complete_heads_numbers(ranks) -> None:
    complete = _all_steps(None)
    exact = _d_hidden(torch.float64, None)
    rounding = (_d_hidden(torch.bfloat16, None) - exact).norm()
    for rank, found in enumerate(ranks):
        own = slice(rank * PADDED // len(ranks), (rank + 1) * PADDED // len(ranks))
        for case, (loss, d_hidden, d_head, stats) in complete.items():
            loss_, d_hidden_, d_head_, stats_ = found[case]
            assert float(loss_) == pytest.approx(float(loss), rel=1e-12), case
            assert (d_hidden_ - d_hidden).norm() <= 1e-12 * d_hidden.norm(), case
            assert (d_head_ - d_head[own]).norm() <= 1e-12 * d_head.norm(), case
            assert stats_ == pytest.approx(stats, rel=1e-9), case
            if rank == len(ranks) - 1:
                assert (d_head_[VALID - own.start :] == 0).all()
        assert (found["rounded"] - exact).norm() <= 1.02 * rounding, "the ranks' terms are rounded before their sum"
        # Seven rows of weight other than 0 in chunks of four: one maximum, one packed sum and one dHidden per chunk.
        kept = [4, 3]
        assert found["calls"] == [
            call
            for rows in kept
            for call in (
                ("RedOpType.MAX", rows),
                ("RedOpType.SUM", rows * (6 + 2 + 1)),
                ("RedOpType.SUM", rows * 8),
            )
        ]


def test_unsupported_settings_of_a_vocabulary_parallel_head_are_refused_by_all_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If only one rank raised, the other ranks would wait for it."""
    monkeypatch.setattr(dist, "get_world_size", lambda group: 4)
    hidden, head, t_hidden, t_head, _, weight_N = _inputs(torch.float64)
    topk = teacher_topk(t_hidden, t_head, 6, 1.0, valid_vocab=36)
    group: Any = None
    for first in (0, 12, 24, 36):
        with pytest.raises(UserError, match="only 36") as error:
            fused_linear_kl(
                hidden,
                head[first : first + 12],
                topk,
                LossConfig(),
                weight_N,
                valid_vocab=36,
                parallel=VocabParallel(group, first, PADDED),
            )
        assert (error.value.key, error.value.value) == ("policy.dtensor_cfg.tensor_parallel_size", 4)
