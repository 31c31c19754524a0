"""The plan: which rank trains which answer, in which optimizer batch and micro-batch. A pure function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distill.runtime.split import split
from distill.types import Layout, MicroBatch, OptimizerBatch, Rollout, Shared, View


@dataclass(frozen=True)
class PackingConfig:
    """How answers become micro-batches."""

    optimizer_batch: int
    """Answers in an optimizer step."""
    sequences: int | None
    """At most this many answers in a micro-batch; None: only ``tokens`` counts."""
    tokens: int | None
    """At most this many tokens in a micro-batch, of the longer view (one answer may be longer); None: no limit.
    Each answer counts with its prefix, also where prefixes are shared."""
    quadratic: float = 1e-4
    """Cost of a sequence of n tokens is n + quadratic * n^2: the attention's share of the FLOPs."""
    share_prefixes: bool = True
    """Read a prefix that several answers of a micro-batch begin with once, and deal answers so that many do."""


def plan(
    rollouts: Sequence[Rollout], layout: Layout, packing_config: PackingConfig, seed: int, step: int
) -> list[OptimizerBatch]:
    """Deal a step's answers to optimizer batches, ranks and micro-batches; returns this rank's part.

    Pure and deterministic: every rank calls it with the same rollouts and knows the whole plan. Which answers share an
    optimizer batch depends on ``seed`` and ``step`` alone, never on length or layout. Inside a batch every rank gets
    the same number of micro-batches, the k-th of all ranks costing about the same; a rank left without answers in one
    gets a dummy row of weight 0. Ranks that read together get their parts of the same micro-batches.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    order: list[int] = torch.randperm(len(rollouts), generator=generator).tolist()
    size = packing_config.optimizer_batch
    return [_optimizer_batch(rollouts, order[i : i + size], layout, packing_config) for i in range(0, len(order), size)]


def _optimizer_batch(
    rollouts: Sequence[Rollout], members: list[int], layout: Layout, packing_config: PackingConfig
) -> OptimizerBatch:
    share = packing_config.share_prefixes
    units = {unit[0]: unit for unit in _units(rollouts, members, layout.dp_size, packing_config)}
    tokens = {i: sum(_tokens_read(rollouts[j]) for j in unit) for i, unit in units.items()}
    cost = {i: _cost([rollouts[j] for j in unit], packing_config.quadratic) for i, unit in units.items()}
    rows = deal(tokens, layout.dp_size, packing_config, cost)

    def whole(members: list[int]) -> MicroBatch:
        return pack([(j, rollouts[j]) for j in sorted(j for i in members for j in units[i])], share)

    return OptimizerBatch(
        micro_batches=tuple(split([whole(row[dp]) for dp in layout.teacher_dp_ranks], layout) for row in rows),
        response_tokens=sum(len(rollouts[i].response_ids) for i in members),
    )


def _units(
    rollouts: Sequence[Rollout], members: list[int], ranks: int, packing_config: PackingConfig
) -> list[list[int]]:
    """The answers in groups that go to one micro-batch together, because they share what is read before them.

    A group has at most a quarter of a rank's answers, so that ranks can still be dealt alike. Where micro-batches are
    counted in answers, groups would leave some of them short: there every answer is on its own.
    """
    if not packing_config.share_prefixes or packing_config.sequences is not None:
        return [[i] for i in members]
    largest = -(-len(members) // (4 * ranks))
    units: list[list[int]] = []
    latest: dict[tuple[tuple[int, ...], ...], int] = {}
    room: dict[int, int] = {}
    for i in members:
        rollout = rollouts[i]
        read = _tokens_read(rollout)
        u = latest.get(key := (rollout.prompt.student_ids, rollout.teacher_prefix_ids))
        if u is None or len(units[u]) == largest or (packing_config.tokens is not None and room[u] < read):
            latest[key] = u = len(units)
            units.append([])
            room[u] = packing_config.tokens or 0
        units[u].append(i)
        room[u] -= read
    return units


def _prefix_read(rollout: Rollout) -> int:
    """Tokens before the answer in the longer of the two views."""
    return max(len(rollout.prompt.student_ids), len(rollout.teacher_prefix_ids))


def _tokens_read(rollout: Rollout) -> int:
    """Tokens of the longer of the two views."""
    return _prefix_read(rollout) + len(rollout.response_ids)


def _cost(unit: Sequence[Rollout], quadratic: float) -> float:
    """Cost of answers that share their prefix: every token once, but attention from each answer to all before it."""
    tokens = _prefix_read(unit[0]) + sum(len(rollout.response_ids) for rollout in unit)
    return tokens + quadratic * sum(_tokens_read(rollout) ** 2 for rollout in unit)


def deal(
    tokens: dict[int, int], ranks: int, packing_config: PackingConfig, cost: dict[int, float] | None = None
) -> list[list[list[int]]]:
    """Sequences (id -> tokens) into rows of bins, a row a micro-batch, a bin a rank; no bin over the limits.

    The fewest rows that hold them are taken: longest first, each to the cheapest bin with room. Bins are then sorted
    by cost and cut into rows, so that a row's bins are alike, and inside each row the rank with the least work so far
    takes the dearest bin. ``cost`` (id -> cost) stands for that of a lone sequence of as many tokens.
    """
    if cost is None:
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


def pack(members: Sequence[tuple[int, Rollout]], share: bool = False) -> MicroBatch:
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
        student=view_of([(r.prompt.student_ids, r.response_ids) for r in rollouts], share),
        teacher=view_of([(r.teacher_prefix_ids or r.prompt.student_ids, r.response_ids) for r in rollouts], share),
        sampled_N=sampled_N,
        sampled_logprobs_N=torch.tensor([p for r in rollouts for p in r.logprobs]),
        weight_N=torch.ones(len(sampled_N)),
        rollout_N=torch.tensor([i for i, _ in members]).repeat_interleave(lengths),
    )


def view_of(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], share: bool = False) -> View:
    """(prefix, response) pairs as one reading; a response's last token predicts nothing and is not read.

    With ``share`` a prefix that comes again is not read again: its sequence refers to where it stands.
    """
    tokens: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    spread: list[int] = []
    bounds = [0]
    begins: dict[tuple[int, ...], int] = {}
    for prefix, response in sequences:
        begin = begins.get(tuple(prefix)) if share else None
        if begin is None:
            begins[tuple(prefix)] = begin = len(tokens)
            tokens += prefix
            positions += range(len(prefix))
        own = range(len(tokens), len(tokens) + len(response) - 1)
        tokens += response[:-1]
        positions += range(len(prefix), len(prefix) + len(own))
        spread += [*range(begin, begin + len(prefix)), *own]
        rows += [begin + len(prefix) - 1, *own]
        bounds.append(len(spread))
    shared = _shared(spread, len(tokens)) if len(spread) > len(tokens) else None
    return View(torch.tensor(tokens), torch.tensor(positions), tuple(bounds), torch.tensor(rows), shared)


def _shared(spread: list[int], count: int) -> Shared:
    first = [-1] * count
    for place, position in reversed(list(enumerate(spread))):
        first[position] = place
    return Shared(torch.tensor(spread), torch.tensor(first))
