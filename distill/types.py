"""What flows between the rooms.

Letters in names: P prompts, G answers per prompt, B sequences in a micro-batch, T positions, N response tokens (rows of
the loss), V vocabulary, K kept ids, D hidden width, W ranks. A tensor's name ends in its axes: ``tokens_T``,
``ids_NK``. Log-probs are in nats, float32. The decisive choice is N: after packing, everything is a row per response
token, in the same order for student and teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Stats = dict[str, tuple[float | Tensor, float | Tensor]]
"""Metrics as (sum, count) pairs by name: added up over micro-batches and ranks, divided once at the end."""


@dataclass(frozen=True)
class Problem:
    """One line of a dataset, raw: before prompt file and chat template."""

    text: str
    answer: str = ""
    """The gold answer; empty where the data has none."""
    source: str = ""
    """Which dataset it came from: a path or a hub name."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The other columns that the configuration names (a precomputed trace, say), by their names there."""


@dataclass(frozen=True)
class Prompt:
    """A problem as the student reads it."""

    prompt_id: int
    """Stable across epochs and restarts: the problem's place in the dataset, repeats counted."""
    student_ids: tuple[int, ...]
    """Token ids with the chat template and the generation prompt."""
    problem: Problem
    inside_thought: bool = False
    """The prompt ends inside an open thought (a generation prompt that ends with ``<think>``)."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Each answer's seed comes from (seed, step, prompt_id, answer), never from global state."""

    temperature: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    """Ids that end an answer (and belong to it): the union of student's and teacher's."""
    responses_per_prompt: int = 1
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    seed: int = 0
    max_total_length: int | None = None
    """Prompt and answer together, in tokens; an answer that reaches it ends as "length". None: no limit."""

    @property
    def full(self) -> bool:
        """Whether every token of the vocabulary can be drawn."""
        return self.top_p >= 1 and not self.top_k


@dataclass(frozen=True)
class Rollout:
    """One answer of the student."""

    prompt: Prompt
    response_index: int
    """Index of the response among the G responses to its prompt."""
    response_ids: tuple[int, ...]
    """R >= 1 token ids, with the stop token if it stopped."""
    logprobs: tuple[float, ...]
    """R log-probs of the sampled tokens in nats, the sampler's, at the sampling temperature."""
    finish: Literal["stop", "length"]
    version: int
    """The version of the weights that sampled it: the step of the sync."""
    teacher_prefix_ids: tuple[int, ...] = ()
    """What the teacher reads before the answer; made by the rank that generated it, so that tokenising is spread."""
    teacher_inside_thought: bool = False
    """``teacher_prefix_ids`` end inside an open thought."""

    def __post_init__(self) -> None:
        assert len(self.response_ids) == len(self.logprobs) >= 1, (len(self.response_ids), len(self.logprobs))


@dataclass(frozen=True)
class SharedPrefixes:
    """How T positions that are read once stand for S positions of sequences with common prefixes."""

    expand_S: Tensor
    """int64 [S]: the position, of T, that stands at each place of the sequences."""
    source_T: Tensor
    """int64 [T]: the first place, of S, where each position stands."""

    def to(self, device: torch.device) -> SharedPrefixes:
        """The same with its tensors on ``device``."""
        return SharedPrefixes(self.expand_S.to(device), self.source_T.to(device))


@dataclass(frozen=True)
class SequenceShards:
    """How the T positions of a pack lie on the R ranks that read it together, each of them M positions.

    Every rank has room for as many; what no position fills is padding, which nobody attends to.
    """

    slot_T: Tensor
    """int64 [T]: where each position of the pack stands in the ranks' parts end to end."""
    position_P: Tensor
    """int64 [R * M]: the position at each place of the ranks' parts end to end; 0 at padding."""

    def to(self, device: torch.device) -> SequenceShards:
        """The same with its tensors on ``device``."""
        return SequenceShards(self.slot_T.to(device), self.position_P.to(device))


@dataclass(frozen=True)
class View:
    """One model's reading of a packed micro-batch: B sequences end to end, without padding.

    S is the length of all sequences together. Where sequences share a prefix that is read once, T is smaller than S
    and ``shared`` says which of the T positions make up each sequence; otherwise T is S. With ``shards`` the ranks of a
    group read the pack together: ``tokens_T``, ``positions_T`` and ``rows_N`` are then this rank's part (M positions),
    while ``bounds`` and ``shared`` are still about the whole pack.
    """

    tokens_T: Tensor
    """int64 [T]."""
    positions_T: Tensor
    """int64 [T], counted from 0 in every sequence."""
    bounds: tuple[int, ...]
    """B + 1 cumulative lengths, from 0 to S."""
    rows_N: Tensor
    """int64 [N]: the position whose hidden state predicts response token n."""
    shared: SharedPrefixes | None = None
    shards: SequenceShards | None = None

    def to(self, device: torch.device) -> View:
        """The same view with its tensors on ``device``."""
        return View(
            self.tokens_T.to(device),
            self.positions_T.to(device),
            self.bounds,
            self.rows_N.to(device),
            None if self.shared is None else self.shared.to(device),
            None if self.shards is None else self.shards.to(device),
        )


@dataclass(frozen=True)
class MicroBatch:
    """What one rank trains in one forward and backward: N response tokens, read by student and teacher.

    Row n of the student's view and row n of the teacher's predict the same token, ``sampled_N[n]``. Under tensor
    parallelism the ranks of a group train the same rows, and the teacher's view has this rank's share of them:
    ``rows_per_tp_rank`` says how many each has, in the order of the rows.
    """

    student: View
    teacher: View
    sampled_N: Tensor
    """int64 [N]: the response tokens."""
    sampled_logprobs_N: Tensor
    """float32 [N]: the sampler's log-probs of them."""
    weight_N: Tensor
    """float32 [N]: 1 for a row that counts, 0 for one that does not (a dummy's)."""
    rollout_N: Tensor
    """int64 [N]: which answer the row belongs to, by its place in the step's list of rollouts; -1 for a dummy's."""
    rows_per_tp_rank: tuple[int, ...] = ()
    """Rows of the teacher's view on each rank of the tensor-parallel group; empty where there is no such group."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on ``device``."""
        return MicroBatch(
            self.student.to(device),
            self.teacher.to(device),
            self.sampled_N.to(device),
            self.sampled_logprobs_N.to(device),
            self.weight_N.to(device),
            self.rollout_N.to(device),
            self.rows_per_tp_rank,
        )


@dataclass(frozen=True)
class OptimizerBatch:
    """The micro-batches of this rank in one optimizer step; every rank has the same number of them."""

    micro_batches: tuple[MicroBatch, ...]
    response_tokens: int
    """Response tokens of the whole optimizer batch over all ranks: what the summed loss is divided by."""

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.micro_batches)

    def __len__(self) -> int:
        return len(self.micro_batches)


@dataclass(frozen=True)
class Layout:
    """This rank's place among those that train: ranks are numbered (dp, cp, tp), tp innermost.

    A data-parallel group of ``cp_size * tp_size`` ranks trains a micro-batch together. The teacher reads those of
    ``teacher_size`` consecutive ranks (whole data-parallel groups) as one pack, its positions spread over them.
    """

    dp_rank: int
    dp_size: int
    cp_rank: int = 0
    cp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    teacher_size: int = 1

    @property
    def group_size(self) -> int:
        """Ranks of a data-parallel group."""
        return self.cp_size * self.tp_size

    @property
    def rank(self) -> int:
        """This rank's number among all that train."""
        return (self.dp_rank * self.cp_size + self.cp_rank) * self.tp_size + self.tp_rank

    @property
    def teacher_dp_ranks(self) -> range:
        """The data-parallel groups whose micro-batches this rank's teacher group reads, in order."""
        count = max(1, self.teacher_size // self.group_size)
        first = self.dp_rank // count * count
        return range(first, first + count)


@dataclass(frozen=True)
class TopK:
    """The teacher's K most likely tokens of each row, and the mass it gives to all others."""

    ids_NK: Tensor
    """int32 or int64 [N, K]; -1 pads a row (its log-prob is -inf)."""
    logprobs_NK: Tensor
    """float32 [N, K], normalised over the full vocabulary at the loss's temperature."""
    log_tail_N: Tensor
    """float32 [N]: log of the mass outside the K ids, from the logits themselves, never log(1 - sum p)."""
    entropy_N: Tensor | None = None
    """float32 [N]: entropy of the full distribution in nats, for the metrics."""


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's hidden rows; ``head_VD`` turns them into logits inside the student's chunk loop."""

    hidden_ND: Tensor
    head_VD: Tensor


Targets = TopK | TeacherRows
"""What the teacher says of N rows."""


@dataclass(frozen=True)
class LossOutput:
    """The loss of one micro-batch on this rank."""

    kl_sum: Tensor
    """Scalar float32: sum of weight_N * kl_N, differentiable, not yet divided by the number of tokens."""
    stats: Stats
    """Metrics of the same rows as (sum, count), without gradient."""


@dataclass(frozen=True)
class SyncReport:
    """What one sync brought to the engine."""

    version: int
    tensors: int
    bytes: int
    seconds: float
    changed: int = 0
    """Tensors that are not what the sync before brought; all of them at the first."""
    changed_bytes: int = 0
    """Their bytes."""
