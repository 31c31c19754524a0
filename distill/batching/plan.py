"""Assign rollouts to optimizer batches, ranks and micro-batches, and pack them into tensors.

A rollout is one sampled response with its prompt. A prefix is the text before the response; it may differ between
student and teacher. A view is the packed input of one model, student or teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.batching.balance import ROUND_COST, balance
from distill.batching.context_parallel import TeacherInput, split
from distill.batching.position_weights import loss_divisor, row_weights, tokens_read
from distill.config import TokenWeightsConfig
from distill.types import Layout, MicroBatch, OptimizerBatch, ResponseGrid, Rollout, SharedPrefixes, View

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
    weights: TokenWeightsConfig | None = None
    """Weights of the response tokens (``loss_fn.token_weights``); None means that every token has the weight 1.

    Responses without a token of nonzero position weight are not packed. The models read the other responses up to the
    last such token.
    """

    def reads(self, rollout: Rollout) -> int:
        """Return the number of response tokens of ``rollout`` that are rows of the loss."""
        return tokens_read(self.weights, len(rollout.response_ids))


def plan(
    rollouts: Sequence[Rollout], layout: Layout, packing_config: PackingConfig, seed: int, step: int
) -> list[OptimizerBatch]:
    """Assign a step's rollouts to optimizer batches, ranks and micro-batches; return this rank's batches.

    ``rollouts`` has the rollouts of all ranks. The function is deterministic, and every rank calls it with the same
    rollouts. ``seed`` and ``step`` determine which responses are in an optimizer batch; their lengths and the parallel
    layout have no influence. Within a batch every rank gets the same number of micro-batches, and the k-th
    micro-batches of all ranks cost about the same. A micro-batch without responses consists of a dummy row of weight 0.
    An optimizer batch in which no token has a position weight has no micro-batches. The context-parallel and
    tensor-parallel ranks that compute a micro-batch together get shards of it.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**64)
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
    share, weights = packing_config.share_prefixes, packing_config.weights
    lengths = [len(rollouts[i].response_ids) for i in members]
    read = [i for i in members if packing_config.reads(rollouts[i])]
    rounds = balance_responses(rollouts, read, layout.dp_size, packing_config) if read else []

    def packed(responses: list[int], own: bool) -> MicroBatch | TeacherInput:
        indexed = [(i, rollouts[i]) for i in responses]
        return pack(indexed, share, weights) if own else pack_teacher(indexed, share, weights)

    return OptimizerBatch(
        micro_batches=tuple(
            split([packed(by_rank[dp], dp == layout.dp_rank) for dp in layout.teacher_dp_ranks], layout)
            for by_rank in rounds
        ),
        response_tokens=sum(lengths),
        rollouts=rollouts,
        known_divisor=None if weights is None else loss_divisor(weights, lengths),
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
        self.prefix_reads = {i: _prefix_tokens(rollouts[i]) for i in members}
        self.reads = {i: self.prefix_reads[i] + packing_config.reads(rollouts[i]) for i in members}
        self.first_with_prefix = {i: i for i in members}
        if packing_config.share_prefixes:
            first: dict[tuple[tuple[int, ...], ...], int] = {}
            for i in members:
                key = (rollouts[i].prompt.student_ids, rollouts[i].teacher_prefix_ids)
                self.first_with_prefix[i] = first.setdefault(key, i)

    def cost(self, responses: Sequence[int]) -> float:
        """Return the cost of training on a micro-batch of ``responses``, in units of the cost of one token.

        The cost is the number of tokens, with each shared prefix counted once, plus q n^2 for each response. n is the
        number of tokens of prefix and response that are read; q is ``PackingConfig.quadratic``.
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
        groups: list[_Group] = []
        latest: dict[int, _Group] = {}
        for i in sorted(self.members, key=self.reads.__getitem__):
            group = latest.get(self.first_with_prefix[i])
            if group is None or self.config.sequences is not None or not self._may_join(i, group, max_cost):
                latest[self.first_with_prefix[i]] = group = _Group(computed=self.prefix_reads[i])
                groups.append(group)
            group.members.append(i)
            group.reads += self.reads[i]
            group.computed += self.reads[i] - self.prefix_reads[i]
            group.squares += self.reads[i] ** 2
        return [group.members for group in groups]

    def _may_join(self, i: int, group: _Group, max_cost: float) -> bool:
        tokens = group.reads + self.reads[i]
        computed = group.computed + self.reads[i] - self.prefix_reads[i]
        cost = computed + self.config.quadratic * (group.squares + self.reads[i] ** 2)
        return (self.config.tokens is None or tokens <= self.config.tokens) and cost <= max_cost


@dataclass
class _Group:
    """Responses with the same prefix; the running totals keep the grouping linear in the number of responses."""

    computed: int
    """Number of tokens, with the shared prefix counted once."""
    reads: int = 0
    """Number of tokens, with the prefix counted for every response."""
    squares: int = 0
    """Sum of the squared numbers of tokens of prefix plus response."""
    members: list[int] = field(default_factory=list)


def _prefix_tokens(rollout: Rollout) -> int:
    """Return the number of tokens of the longer prefix of both models."""
    return max(len(rollout.prompt.student_ids), len(rollout.teacher_prefix_ids))


def _logprobs(rollout: Rollout) -> NDArray[np.float32]:
    """Return the log-probs of the response tokens, nan if the engine did not compute them: float32 [R]."""
    if not rollout.logprobs:
        return np.full(len(rollout.response_ids), math.nan, np.float32)
    return np.fromiter(rollout.logprobs, np.float32, len(rollout.logprobs))


def pack(
    members: Sequence[tuple[int, Rollout]], share: bool = False, weights: TokenWeightsConfig | None = None
) -> MicroBatch:
    """Pack rollouts into one micro-batch: concatenate prefixes and responses without padding.

    ``members`` has pairs of (index in the step's list of rollouts, rollout). Loss row n belongs to response token n. In
    the input of each model, row n refers to the position that predicts this token: the position of the token before it.
    With ``share`` a repeated prefix is included only once. ``weights``: as in ``PackingConfig``; every response needs a
    token of nonzero position weight. If ``members`` is empty, the micro-batch is a dummy sequence of one token with one
    row of weight 0, so that every rank runs the same collectives.
    """
    if not members:
        return _dummy(weights)
    rollouts = [rollout for _, rollout in members]
    of_tokens = [row_weights(weights, len(r.response_ids)) for r in rollouts]
    counts = [len(weight_R) for weight_R in of_tokens]
    assert all(counts), "a response without a weight"
    responses = [_int64(r.response_ids)[:n] for r, n in zip(rollouts, counts, strict=True)]
    token_N = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])
    is_off_policy, older = [r.off_policy for r in rollouts], [r.older_tokens for r in rollouts]
    logprobs = [_logprobs(r)[:n] for r, n in zip(rollouts, counts, strict=True)]
    return MicroBatch(
        student=_view([r.prompt.student_ids for r in rollouts], responses, share),
        teacher=_view([_teacher_prefix(r) for r in rollouts], responses, share),
        sampled_N=torch.from_numpy(np.concatenate(responses)),
        sampled_logprobs_N=torch.from_numpy(np.concatenate(logprobs)),
        weight_N=torch.from_numpy(np.concatenate(of_tokens)),
        rollout_N=_rollout_numbers(members, counts),
        token_N=torch.from_numpy(token_N),
        length_N=torch.from_numpy(np.repeat(np.array([len(r.response_ids) for r in rollouts], np.int32), counts)),
        off_policy_N=torch.from_numpy(np.repeat(is_off_policy, counts)) if any(is_off_policy) else None,
        older_N=torch.from_numpy(token_N < np.repeat(older, counts)) if any(older) else None,
        grid=_grid(counts, token_N) if weights is not None and weights.depends_on_models else None,
    )


def _grid(counts: Sequence[int], token_N: NDArray[np.int32]) -> ResponseGrid:
    width = max(counts)
    cell_N = np.repeat(np.arange(len(counts)) * width, counts) + token_N
    return ResponseGrid(torch.from_numpy(cell_N), len(counts), width, len(token_N))


def pack_teacher(
    members: Sequence[tuple[int, Rollout]], share: bool = False, weights: TokenWeightsConfig | None = None
) -> TeacherInput:
    """Return only the part of ``pack(members, share, weights)`` that other ranks of the teacher group need."""
    if not members:
        dummy = _dummy()
        return TeacherInput(dummy.teacher, dummy.rollout_N)
    counts = [tokens_read(weights, len(rollout.response_ids)) for _, rollout in members]
    responses = [_int64(rollout.response_ids)[:n] for (_, rollout), n in zip(members, counts, strict=True)]
    view = _view([_teacher_prefix(rollout) for _, rollout in members], responses, share)
    return TeacherInput(view, _rollout_numbers(members, counts))


def _dummy(weights: TokenWeightsConfig | None = None) -> MicroBatch:
    view = view_of([((0,), (0,))])
    zero, minus_one = torch.zeros(1, dtype=torch.int64), torch.full((1,), -1)
    token_N = np.zeros(1, np.int32)
    return MicroBatch(
        student=view,
        teacher=view,
        sampled_N=zero,
        sampled_logprobs_N=torch.zeros(1),
        weight_N=torch.zeros(1),
        rollout_N=minus_one,
        token_N=torch.from_numpy(token_N),
        length_N=torch.ones(1, dtype=torch.int32),
        grid=_grid([1], token_N) if weights is not None and weights.depends_on_models else None,
    )


def _teacher_prefix(rollout: Rollout) -> Sequence[int]:
    return rollout.teacher_prefix_ids or rollout.prompt.student_ids


def _rollout_numbers(members: Sequence[tuple[int, Rollout]], counts: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.repeat([i for i, _ in members], counts))


def view_of(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], share: bool = False) -> View:
    """Pack pairs of (prefix, response) token ids into the input of one model.

    The last token of each response is omitted, because it predicts no token. If ``share`` is True, the result contains
    a repeated prefix once, and later sequences with this prefix refer to its positions.
    """
    return _view([prefix for prefix, _ in sequences], [_int64(response) for _, response in sequences], share)


_Int64s = NDArray[np.int64]


def _view(prefixes: Sequence[Sequence[int]], responses: Sequence[_Int64s], share: bool) -> View:
    """Return ``view_of`` for responses that are already arrays; Python's integers are converted only once."""
    tokens: list[_Int64s] = []
    positions: list[_Int64s] = []
    rows: list[_Int64s] = []
    expand: list[_Int64s] = []
    bounds = [0]
    count = 0
    begins: dict[tuple[int, ...], int] = {}
    for prefix, response in zip(prefixes, responses, strict=True):
        begin = begins.get(tuple(prefix)) if share else None
        if begin is None:
            begins[tuple(prefix)] = begin = count
            tokens.append(_int64(prefix))
            positions.append(np.arange(len(prefix)))
            count += len(prefix)
        own = np.arange(count, count + len(response) - 1)
        tokens.append(response[:-1])
        positions.append(np.arange(len(prefix), len(prefix) + len(own)))
        expand += [np.arange(begin, begin + len(prefix)), own]
        rows += [np.array([begin + len(prefix) - 1]), own]
        bounds.append(bounds[-1] + len(prefix) + len(own))
        count += len(own)
    shared = _shared_prefixes(np.concatenate(expand), count) if bounds[-1] > count else None
    tokens_T, positions_T, rows_N = (torch.from_numpy(np.concatenate(parts)) for parts in (tokens, positions, rows))
    return View(tokens_T, positions_T, tuple(bounds), rows_N, shared)


def _shared_prefixes(expand_S: _Int64s, count: int) -> SharedPrefixes:
    source_T = np.full(count, -1)
    source_T[expand_S[::-1]] = np.arange(len(expand_S))[::-1]  # the last assignment counts: the first slot
    return SharedPrefixes(torch.from_numpy(expand_S), torch.from_numpy(source_T))


def _int64(ids: Sequence[int]) -> _Int64s:
    return np.fromiter(ids, np.int64, len(ids))
