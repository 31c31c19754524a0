"""The plan: which rank trains which answer, in which optimizer batch and micro-batch. A pure function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distill.types import Layout, MicroBatch, OptimizerBatch, Rollout, View


@dataclass(frozen=True)
class PackingConfig:
    """How answers become micro-batches."""

    optimizer_batch: int
    """Answers in an optimizer step."""
    sequences: int | None
    """At most this many answers in a micro-batch; None: only ``tokens`` counts."""
    tokens: int | None
    """At most this many tokens in a micro-batch, of the longer view (one answer may be longer); None: no limit."""
    quadratic: float = 1e-4
    """Cost of a sequence of n tokens is n + quadratic * n^2: the attention's share of the FLOPs."""


def plan(
    rollouts: Sequence[Rollout], layout: Layout, packing_config: PackingConfig, seed: int, step: int
) -> list[OptimizerBatch]:
    """Deal a step's answers to optimizer batches, ranks and micro-batches; returns this rank's part.

    Pure and deterministic: every rank calls it with the same rollouts and knows the whole plan. Which answers share an
    optimizer batch depends on ``seed`` and ``step`` alone, never on length or layout. Inside a batch every rank gets
    the same number of micro-batches, the k-th of all ranks costing about the same; a rank left without answers in one
    gets a dummy row of weight 0.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    order: list[int] = torch.randperm(len(rollouts), generator=generator).tolist()
    size = packing_config.optimizer_batch
    return [_optimizer_batch(rollouts, order[i : i + size], layout, packing_config) for i in range(0, len(order), size)]


def _optimizer_batch(
    rollouts: Sequence[Rollout], members: list[int], layout: Layout, packing_config: PackingConfig
) -> OptimizerBatch:
    tokens = {i: _tokens_read(rollouts[i]) for i in members}
    rows = deal(tokens, layout.dp_size, packing_config)
    return OptimizerBatch(
        micro_batches=tuple(pack([(i, rollouts[i]) for i in row[layout.dp_rank]]) for row in rows),
        response_tokens=sum(len(rollouts[i].response_ids) for i in members),
    )


def _tokens_read(rollout: Rollout) -> int:
    """Tokens of the longer of the two views."""
    return max(len(rollout.prompt.student_ids), len(rollout.teacher_prefix_ids)) + len(rollout.response_ids)


def deal(tokens: dict[int, int], ranks: int, packing_config: PackingConfig) -> list[list[list[int]]]:
    """Sequences (id -> tokens) into rows of bins, a row a micro-batch, a bin a rank; no bin over the limits.

    The fewest rows that hold them are taken: longest first, each to the cheapest bin with room. Bins are then sorted
    by cost and cut into rows, so that a row's bins are alike, and inside each row the rank with the least work so far
    takes the dearest bin.
    """
    cost = {i: n + packing_config.quadratic * n * n for i, n in tokens.items()}
    longest_first = sorted(tokens, key=lambda i: (-cost[i], i))
    num_rows = _fewest_rows(tokens, ranks, packing_config)
    while (bins := _fill(longest_first, tokens, cost, num_rows * ranks, packing_config)) is None:
        num_rows += 1
    bins.sort(key=lambda members: -sum(cost[i] for i in members))
    work = [0.0] * ranks
    rows = []
    for k in range(num_rows):
        row: list[list[int]] = [[] for _ in range(ranks)]
        by_work = sorted(range(ranks), key=lambda rank: (work[rank], rank))
        for rank, members in zip(by_work, bins[k * ranks : (k + 1) * ranks], strict=True):
            row[rank] = sorted(members)
            work[rank] += sum(cost[i] for i in members)
        rows.append(row)
    return rows


def _fewest_rows(tokens: dict[int, int], ranks: int, limits: PackingConfig) -> int:
    """No fewer rows can hold the sequences, whatever their order."""
    by_tokens = 1 if limits.tokens is None else sum(min(n, limits.tokens) for n in tokens.values()) / limits.tokens
    by_sequences = 1 if limits.sequences is None else len(tokens) / limits.sequences
    return max(1, math.ceil(max(by_tokens, by_sequences) / ranks))


def _fill(
    longest_first: list[int], tokens: dict[int, int], cost: dict[int, float], num_bins: int, limits: PackingConfig
) -> list[list[int]] | None:
    """Each sequence to the cheapest bin with room for it; None if one finds none."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    load, filled = [0.0] * num_bins, [0] * num_bins
    for i in longest_first:
        for b in sorted(range(num_bins), key=lambda b: (load[b], b)):
            fits = limits.tokens is None or filled[b] + tokens[i] <= limits.tokens
            if not bins[b] or (fits and (limits.sequences is None or len(bins[b]) < limits.sequences)):
                bins[b].append(i)
                load[b] += cost[i]
                filled[b] += tokens[i]
                break
        else:
            return None
    return bins


def pack(members: Sequence[tuple[int, Rollout]]) -> MicroBatch:
    """A micro-batch of answers (place in the step's list, rollout), end to end without padding.

    Row n of both views is the position before response token n: the last of the prefix for an answer's first token.
    No members: one dummy sequence of one token and one row of weight 0, so that collectives stay in step.
    """
    if not members:
        view = view_of([((0,), (0,))])
        one, minus_one = torch.zeros(1, dtype=torch.int64), torch.full((1,), -1)
        return MicroBatch(view, view, one, torch.zeros(1), torch.zeros(1), minus_one)
    rollouts = [rollout for _, rollout in members]
    lengths = torch.tensor([len(r.response_ids) for r in rollouts])
    sampled_N = torch.tensor([t for r in rollouts for t in r.response_ids])
    return MicroBatch(
        student=view_of([(r.prompt.student_ids, r.response_ids) for r in rollouts]),
        teacher=view_of([(r.teacher_prefix_ids or r.prompt.student_ids, r.response_ids) for r in rollouts]),
        sampled_N=sampled_N,
        sampled_logprobs_N=torch.tensor([p for r in rollouts for p in r.logprobs]),
        weight_N=torch.ones(len(sampled_N)),
        rollout_N=torch.tensor([i for i, _ in members]).repeat_interleave(lengths),
    )


def view_of(sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> View:
    """(prefix, response) pairs as one reading; a response's last token predicts nothing and is not read."""
    tokens: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    bounds = [0]
    for prefix, response in sequences:
        start = bounds[-1]
        tokens += prefix
        tokens += response[:-1]
        bounds.append(len(tokens))
        positions += range(bounds[-1] - start)
        rows += range(start + len(prefix) - 1, bounds[-1])
    return View(torch.tensor(tokens), torch.tensor(positions), tuple(bounds), torch.tensor(rows))
