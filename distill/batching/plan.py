"""The plan: which rank trains which answer, in which optimizer batch and micro-batch. A pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distill.batching.balance import ROW_COST, deal
from distill.batching.context_parallel import split
from distill.types import Layout, MicroBatch, OptimizerBatch, Rollout, SharedPrefixes, View

_GROUP_SHARES = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""What a group of answers that share a prefix may cost, in shares of a rank's work."""


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
    quadratic: float = 0.0
    """Cost of a sequence of n tokens is n + quadratic * n^2: the attention's share of the FLOPs. See quadratic_cost."""
    share_prefixes: bool = True
    """Read a prefix that several answers of a micro-batch begin with once, and deal answers so that many do."""
    expected: int | None = None
    """Answers of a step before any is left out: they make so many optimizer batches, over which those that stay are
    spread evenly, so that the last one is no remnant whose few answers weigh a whole step; None: those that stay."""


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
    batches = _optimizer_batches(order, packing_config)
    return [_optimizer_batch(rollouts, members, layout, packing_config) for members in batches]


def _optimizer_batches(order: list[int], packing_config: PackingConfig) -> list[list[int]]:
    """Answers cut into optimizer batches, in order, none of them empty."""
    size, count = packing_config.optimizer_batch, len(order)
    if packing_config.expected is None or count >= packing_config.expected:
        return [order[i : i + size] for i in range(0, count, size)]
    batches = min(-(-packing_config.expected // size), count)
    return [order[i * count // batches : (i + 1) * count // batches] for i in range(batches)]


def _optimizer_batch(
    rollouts: Sequence[Rollout], members: list[int], layout: Layout, packing_config: PackingConfig
) -> OptimizerBatch:
    share = packing_config.share_prefixes
    rows = deal_answers(rollouts, members, layout.dp_size, packing_config)

    def whole(answers: list[int]) -> MicroBatch:
        return pack([(i, rollouts[i]) for i in answers], share)

    return OptimizerBatch(
        micro_batches=tuple(split([whole(row[dp]) for dp in layout.teacher_dp_ranks], layout) for row in rows),
        response_tokens=sum(len(rollouts[i].response_ids) for i in members),
        rollouts=rollouts,
    )


def deal_answers(
    rollouts: Sequence[Rollout], members: Sequence[int], ranks: int, packing_config: PackingConfig
) -> list[list[list[int]]]:
    """An optimizer batch's answers (places in ``rollouts``) in rows of micro-batches, one a rank; some may be empty.

    Answers that share a prefix are dealt one by one, in small groups and in larger ones: the larger, the less is read,
    but the less alike are the ranks. The way that needs the least time is taken.
    """
    answers = _Answers(rollouts, members, packing_config)
    deals = []
    tried: list[list[list[int]]] = []
    for share in _GROUP_SHARES:
        groups = answers.groups(share * answers.cost(members) / ranks)
        if groups in tried:
            continue
        tried.append(groups)
        tokens = {g: sum(answers.reads[i] for i in group) for g, group in enumerate(groups)}
        cost = {g: answers.cost(group) for g, group in enumerate(groups)}
        rows = deal(tokens, cost, ranks, packing_config)
        deals.append([[sorted(i for g in part for i in groups[g]) for part in row] for row in rows])
    return min(deals, key=lambda rows: sum(ROW_COST + max(map(answers.cost, row)) for row in rows))


class _Answers:
    """What is read for the answers of an optimizer batch, in numbers."""

    def __init__(self, rollouts: Sequence[Rollout], members: Sequence[int], packing_config: PackingConfig) -> None:
        self.members = members
        self.config = packing_config
        self.reads = {i: _tokens_read(rollouts[i]) for i in members}
        self.prefix_reads = {i: self.reads[i] - len(rollouts[i].response_ids) for i in members}
        self.first_with_prefix = {i: i for i in members}
        if packing_config.share_prefixes:
            first: dict[tuple[tuple[int, ...], ...], int] = {}
            for i in members:
                key = (rollouts[i].prompt.student_ids, rollouts[i].teacher_prefix_ids)
                self.first_with_prefix[i] = first.setdefault(key, i)

    def cost(self, answers: Sequence[int]) -> float:
        """Of one micro-batch: tokens, a shared prefix's once, and attention from each answer to all before it."""
        prefixes = {self.first_with_prefix[i] for i in answers}
        tokens = sum(self.reads[i] - self.prefix_reads[i] for i in answers)
        tokens += sum(self.prefix_reads[i] for i in prefixes)
        return tokens + self.config.quadratic * sum(self.reads[i] ** 2 for i in answers)

    def groups(self, dearest: float) -> list[list[int]]:
        """Answers with one prefix, shortest first, in groups within the budget that cost no more than ``dearest``.

        Where micro-batches are counted in answers, groups would leave some of them short: there is one answer in each.
        """
        groups: list[list[int]] = []
        latest: dict[int, list[int]] = {}
        for i in sorted(self.members, key=self.reads.__getitem__):
            group = latest.get(self.first_with_prefix[i])
            if group is None or self.config.sequences is not None or not self._may_join(i, group, dearest):
                latest[self.first_with_prefix[i]] = group = []
                groups.append(group)
            group.append(i)
        return groups

    def _may_join(self, i: int, group: list[int], dearest: float) -> bool:
        tokens = self.reads[i] + sum(self.reads[j] for j in group)
        return (self.config.tokens is None or tokens <= self.config.tokens) and self.cost([*group, i]) <= dearest


def _tokens_read(rollout: Rollout) -> int:
    """Tokens of the longer of the two views."""
    return max(len(rollout.prompt.student_ids), len(rollout.teacher_prefix_ids)) + len(rollout.response_ids)


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


def _shared(spread: list[int], count: int) -> SharedPrefixes:
    first = [-1] * count
    for place, position in reversed(list(enumerate(spread))):
        first[position] = place
    return SharedPrefixes(torch.tensor(spread), torch.tensor(first))
