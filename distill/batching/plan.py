"""Assign rollouts to optimizer batches, ranks and micro-batches, and pack them into tensors.

A rollout is one sampled response with its prompt. A prefix is the text before the response; it may differ between
student and teacher. A view is the packed input of one model, student or teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distill.batching.balance import ROUND_COST, balance
from distill.batching.context_parallel import split
from distill.types import Layout, MicroBatch, OptimizerBatch, Rollout, SharedPrefixes, View

_GROUP_FRACTIONS = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Maximum costs that ``balance_responses`` tries for a group of responses with a shared prefix.

The unit is (cost of all responses of the optimizer batch) / (number of data-parallel ranks).
"""


@dataclass(frozen=True)
class PackingConfig:
    """Size limits of optimizer batches and micro-batches, and settings for packing responses into them."""

    optimizer_batch: int
    """Maximum number of responses in an optimizer batch, which is the data of one optimizer update."""
    sequences: int | None
    """Maximum number of responses in a micro-batch; None means no limit on this number."""
    tokens: int | None
    """Maximum number of tokens in a micro-batch; None means no limit.

    Every response counts with its prefix, even if responses share the prefix. The prefix is the text before the
    response; if it differs between student and teacher, the longer one counts. A response that exceeds the limit is the
    only response of its micro-batch.
    """
    quadratic: float = 0.0
    """Factor q in the cost n + q n^2 of training on a sequence of n tokens; see ``ModelFlops.quadratic``."""
    share_prefixes: bool = True
    """Whether a micro-batch computes a prefix once if several responses have it.

    A prefix is the text before the response.
    """
    expected: int | None = None
    """Number of responses of a step before filtering; None means that responses are not filtered.

    This number determines the number of optimizer batches, over which the remaining responses are distributed evenly.
    Otherwise the last batch could have few responses, but the same influence on the weights as a full batch.
    """


def plan(
    rollouts: Sequence[Rollout], layout: Layout, packing_config: PackingConfig, seed: int, step: int
) -> list[OptimizerBatch]:
    """Assign a step's rollouts to optimizer batches, ranks and micro-batches; return this rank's batches.

    ``rollouts`` has the rollouts of all ranks. The function is deterministic, and every rank calls it with the same
    rollouts. ``seed`` and ``step`` determine which responses are in an optimizer batch; their lengths and the parallel
    layout have no influence. Within a batch every rank gets the same number of micro-batches, and the k-th
    micro-batches of all ranks cost about the same. A micro-batch without responses consists of a dummy row of weight 0.
    The context-parallel and tensor-parallel ranks that compute a micro-batch together get shards of it.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    order: list[int] = torch.randperm(len(rollouts), generator=generator).tolist()
    batches = _optimizer_batches(order, packing_config)
    return [_optimizer_batch(rollouts, members, layout, packing_config) for members in batches]


def _optimizer_batches(order: list[int], packing_config: PackingConfig) -> list[list[int]]:
    """Split the rollout indices ``order`` into consecutive, non-empty optimizer batches."""
    size, count = packing_config.optimizer_batch, len(order)
    if packing_config.expected is None or count >= packing_config.expected:
        return [order[i : i + size] for i in range(0, count, size)]
    batches = min(-(-packing_config.expected // size), count)
    return [order[i * count // batches : (i + 1) * count // batches] for i in range(batches)]


def _optimizer_batch(
    rollouts: Sequence[Rollout], members: list[int], layout: Layout, packing_config: PackingConfig
) -> OptimizerBatch:
    share = packing_config.share_prefixes
    rounds = balance_responses(rollouts, members, layout.dp_size, packing_config)

    def packed(responses: list[int]) -> MicroBatch:
        return pack([(i, rollouts[i]) for i in responses], share)

    return OptimizerBatch(
        micro_batches=tuple(
            split([packed(by_rank[dp]) for dp in layout.teacher_dp_ranks], layout) for by_rank in rounds
        ),
        response_tokens=sum(len(rollouts[i].response_ids) for i in members),
        rollouts=rollouts,
    )


def balance_responses(
    rollouts: Sequence[Rollout], members: Sequence[int], ranks: int, packing_config: PackingConfig
) -> list[list[list[int]]]:
    """Assign the responses of an optimizer batch to rounds of one micro-batch per rank.

    In a round every data-parallel rank computes one micro-batch, which may be empty. ``members`` and the result are
    indices into ``rollouts``; the result is nested by round and rank. Responses with the same prefix are assigned in
    groups. Larger groups repeat the prefix less often, but smaller groups balance the ranks better. The function
    therefore tries several maximum group costs and returns the assignment with the lowest estimated time.
    """
    costs = _ResponseCosts(rollouts, members, packing_config)
    candidates = []
    tried: list[list[list[int]]] = []
    for fraction in _GROUP_FRACTIONS:
        groups = costs.groups(fraction * costs.cost(members) / ranks)
        if groups in tried:
            continue
        tried.append(groups)
        tokens = {g: sum(costs.reads[i] for i in group) for g, group in enumerate(groups)}
        cost = {g: costs.cost(group) for g, group in enumerate(groups)}
        rounds = balance(tokens, cost, ranks, packing_config)
        candidates.append(
            [[sorted(i for g in of_rank for i in groups[g]) for of_rank in by_rank] for by_rank in rounds]
        )
    return min(candidates, key=lambda rounds: sum(ROUND_COST + max(map(costs.cost, by_rank)) for by_rank in rounds))


class _ResponseCosts:
    """Numbers of tokens and training costs of the responses in an optimizer batch."""

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

    def cost(self, responses: Sequence[int]) -> float:
        """Return the cost of training on a micro-batch of ``responses``, in units of the cost of one token.

        The cost is the number of tokens, with each shared prefix counted once, plus q n^2 for each response. n is the
        number of tokens of response and prefix; q is ``PackingConfig.quadratic``.
        """
        prefixes = {self.first_with_prefix[i] for i in responses}
        tokens = sum(self.reads[i] - self.prefix_reads[i] for i in responses)
        tokens += sum(self.prefix_reads[i] for i in prefixes)
        return tokens + self.config.quadratic * sum(self.reads[i] ** 2 for i in responses)

    def groups(self, max_cost: float) -> list[list[int]]:
        """Group responses with the same prefix, shortest first; return the response indices of each group.

        A group of several responses costs at most ``max_cost`` and fits into one micro-batch. If the configuration
        limits the number of responses in a micro-batch, every group has one response, because larger groups might
        leave micro-batches partly empty.
        """
        groups: list[list[int]] = []
        latest: dict[int, list[int]] = {}
        for i in sorted(self.members, key=self.reads.__getitem__):
            group = latest.get(self.first_with_prefix[i])
            if group is None or self.config.sequences is not None or not self._may_join(i, group, max_cost):
                latest[self.first_with_prefix[i]] = group = []
                groups.append(group)
            group.append(i)
        return groups

    def _may_join(self, i: int, group: list[int], max_cost: float) -> bool:
        tokens = self.reads[i] + sum(self.reads[j] for j in group)
        return (self.config.tokens is None or tokens <= self.config.tokens) and self.cost([*group, i]) <= max_cost


def _tokens_read(rollout: Rollout) -> int:
    """Return the number of tokens of prefix plus response, for the model with the longer prefix."""
    return max(len(rollout.prompt.student_ids), len(rollout.teacher_prefix_ids)) + len(rollout.response_ids)


def pack(members: Sequence[tuple[int, Rollout]], share: bool = False) -> MicroBatch:
    """Pack rollouts into one micro-batch: concatenate prefixes and responses without padding.

    ``members`` has pairs of (index in the step's list of rollouts, rollout). Loss row n belongs to response token n. In
    the input of each model, row n refers to the position that predicts this token: the position of the token before it.
    With ``share`` a repeated prefix is included only once. If ``members`` is empty, the micro-batch is a dummy sequence
    of one token with one row of weight 0, so that every rank runs the same collectives.
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
    """Pack pairs of (prefix, response) token ids into the input of one model.

    The last token of each response is omitted, because it predicts no token. If ``share`` is True, the result contains
    a repeated prefix once, and later sequences with this prefix refer to its positions.
    """
    tokens: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    expand: list[int] = []
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
        expand += [*range(begin, begin + len(prefix)), *own]
        rows += [begin + len(prefix) - 1, *own]
        bounds.append(len(expand))
    shared = _shared_prefixes(expand, len(tokens)) if len(expand) > len(tokens) else None
    return View(torch.tensor(tokens), torch.tensor(positions), tuple(bounds), torch.tensor(rows), shared)


def _shared_prefixes(expand: list[int], count: int) -> SharedPrefixes:
    source = [-1] * count
    for slot, position in reversed(list(enumerate(expand))):
        source[position] = slot
    return SharedPrefixes(torch.tensor(expand), torch.tensor(source))
