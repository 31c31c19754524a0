"""Data types that several packages of ``distill`` use.

Capital letters in names are sizes: P prompts, G responses per prompt, B sequences in a micro-batch, T positions, N
response tokens (rows of the loss), V vocabulary, K top-k ids, D hidden width, W ranks. A tensor's name ends in the
letters of its axes: ``tokens_T``, ``ids_NK``. Log-probs are in nats, float32. After packing, student and teacher have
one row per response token, in the same order: row n of both predicts the same token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

Stats = dict[str, tuple[float | Tensor, float | Tensor]]
"""Maps the name of a metric to (sum, count).

Sums and counts are added over micro-batches and ranks; the metric is then sum / count.
"""


def map_tensors(value: T, function: Callable[[Tensor], Tensor]) -> T:
    """Return a copy of a dataclass with ``function`` applied to its tensors and to those of nested dataclasses."""
    if isinstance(value, Tensor):
        return function(value)  # type: ignore[return-value]
    if not is_dataclass(value):
        return value
    instance: Any = value
    mapped = {field.name: map_tensors(getattr(instance, field.name), function) for field in fields(instance)}
    return replace(instance, **mapped)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Problem:
    """One row of a dataset, before the prompt file (a text template) and the chat template are applied."""

    text: str
    """The problem; in a conversation, the text of the last user message."""
    answer: str = ""
    """The gold answer; empty if the dataset has none."""
    source: str = ""
    """Path or hub name of the dataset."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Maps the names of other dataset columns that the run uses to values, for example a reasoning trace."""
    reference: str = ""
    """A response from the dataset, for off-policy training; empty if the dataset has none."""
    messages: str = ""
    """JSON of the conversation's messages up to the last user or tool message; empty if the row is a plain text."""
    tools: str = ""
    """JSON of the list of tools that the chat template shows to the model; empty if the row has none."""
    system: str = ""
    """Text of the dataset's system_prompt_file; empty without this file."""


@dataclass(frozen=True)
class Prompt:
    """The student's prompt for a problem, as token ids."""

    prompt_id: int
    """Index of the problem among all rows of the datasets; stable across epochs and restarts."""
    student_ids: tuple[int, ...]
    """Token ids of the prompt, including the chat template and its generation prompt."""
    problem: Problem
    inside_thought: bool = False
    """Whether the prompt ends inside a think block, for example if the chat template adds ``<think>``."""
    max_new_tokens: int | None = None
    """Maximum number of tokens of a response to this prompt, if it is lower than ``Sampling.max_new_tokens``."""


@dataclass(frozen=True)
class Sampling:
    """Settings with which the engine samples responses.

    The random seed of each response is a hash of (seed, step, prompt_id, response_index), so it does not depend on the
    order in which responses are generated.
    """

    temperature: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    """Token ids that end a response; the stop token is part of the response."""
    responses_per_prompt: int = 1
    top_p: float = 1.0
    top_k: int = 0
    """Number of most likely tokens to sample from; 0: the full vocabulary."""
    seed: int = 0
    max_total_length: int | None = None
    """Maximum number of tokens of prompt plus response; None: no limit. A response that reaches it ends."""
    logprob_interval: int = 1
    """The engine returns log-probs for one of this many responses on average; 1: for all responses."""
    omitted: tuple[tuple[int, int], ...] = ()
    """Pairs (prompt_id, response_index) of responses that are not generated. The other responses do not change."""

    @property
    def full(self) -> bool:
        """Return whether every token of the vocabulary can be sampled."""
        return self.top_p >= 1 and not self.top_k


@dataclass(frozen=True)
class Rollout:
    """One response of the student to a prompt."""

    prompt: Prompt
    response_index: int
    """Index of the response among the G responses to its prompt."""
    response_ids: tuple[int, ...]
    """The R >= 1 token ids of the response, including the stop token if the response ends with one."""
    logprobs: tuple[float, ...]
    """Log-probs of the R response tokens in nats, from the generation engine, at the sampling temperature.

    Empty if the engine did not compute them (``Sampling.logprob_interval``).
    """
    finish: Literal["stop", "length"]
    version: int
    """Version of the weights that generated the response.

    It is the number of training steps that were finished when the engine received these weights. With partial rollouts
    it is the version of the last segment.
    """
    teacher_prefix_ids: tuple[int, ...] = ()
    """Token ids that the teacher reads before the response; added by the rank that generated the response."""
    teacher_inside_thought: bool = False
    """Whether ``teacher_prefix_ids`` end inside a think block."""
    off_policy: bool = False
    """Whether the response comes from the dataset; it has no log-probs."""
    older_tokens: int = 0
    """Number of tokens, from the first one on, that older weights generated than those of the step that trains on them.

    0 without partial rollouts.
    """
    order: int = 0
    """Number of a training response among all responses of the run, in the order of the data; 0 in a validation."""

    def __post_init__(self) -> None:
        lengths = len(self.response_ids), len(self.logprobs)
        assert lengths[0] >= 1 and lengths[1] in (0, lengths[0]), lengths


@dataclass(frozen=True)
class SharedPrefixes:
    """Mapping between the S positions of a micro-batch's sequences and the T positions that are computed.

    T is smaller than S if several sequences share a prefix (the tokens before the response). A shared prefix is
    computed once.
    """

    expand_S: Tensor
    """int64 [S]: for each position of the sequences, its index among the T computed positions."""
    source_T: Tensor
    """int64 [T]: for each computed position, the first of the S positions that are mapped to it."""


@dataclass(frozen=True)
class SequenceShards:
    """Distribution of a packed micro-batch's T positions over R ranks that compute it together.

    Each rank has M slots for positions. If T < R * M, the remaining R * M - T slots are padding, to which no position
    attends.
    """

    slot_T: Tensor
    """int64 [T]: for each position, the index of its slot among all R * M slots, ordered by rank."""
    position_P: Tensor
    """int64 [P] with P = R * M slots: for each slot, the index of its position; any index for a padding slot."""


@dataclass(frozen=True)
class View:
    """Input of one model for a packed micro-batch: B sequences concatenated without padding.

    S is the total length of the sequences. If sequences share a prefix that is computed once, T is smaller than S and
    ``shared`` maps the S positions to the T positions; otherwise T is S. With ``shards`` several ranks compute the
    micro-batch together: ``tokens_T``, ``positions_T`` and ``rows_N`` are then this rank's part (M positions), but
    ``bounds`` and ``shared`` describe the complete micro-batch.
    """

    tokens_T: Tensor
    """int64 [T]: token ids."""
    positions_T: Tensor
    """int64 [T]: position in the sequence, from 0."""
    bounds: tuple[int, ...]
    """B + 1 cumulative sequence lengths, from 0 to S."""
    rows_N: Tensor
    """int64 [N]: index of the position whose hidden state predicts response token n."""
    shared: SharedPrefixes | None = None
    shards: SequenceShards | None = None
    bounds_B: Tensor | None = None
    """int32 [B + 1]: ``bounds`` on the device; None: attention copies ``bounds`` to the device, which waits for it."""

    def to(self, device: torch.device) -> View:
        """Return a copy with all tensors on ``device``."""
        return map_tensors(self, lambda tensor: tensor.to(device))


@dataclass(frozen=True)
class ResponseGrid:
    """Places of rows in a matrix with one row per response of a micro-batch and one column per token.

    Context-parallel ranks share the responses of a micro-batch, and the matrix is the same on all of them. Each of them
    has other rows of the loss.
    """

    cell_N: Tensor
    """int64 [N]: index of each row of the loss in the flattened matrix."""
    responses: int
    """Number of rows of the matrix."""
    tokens: int
    """Number of columns of the matrix: the most tokens of a response that the models read."""
    rows_per_rank: int
    """The largest number of rows of the loss on one of the context-parallel ranks."""


@dataclass(frozen=True)
class MicroBatch:
    """Input of one forward and backward pass on one rank: packed sequences with N response tokens.

    A view is the input of one model. Row n of the student's view and row n of the teacher's view predict the same
    token, ``sampled_N[n]``. With tensor parallelism the ranks of a tensor-parallel group train the same rows, and each
    rank's teacher view has a contiguous part of these rows; ``rows_per_tp_rank`` has the sizes of the parts. A response
    is read up to its last token with a position weight, so it may have fewer rows than tokens.
    """

    student: View
    teacher: View
    sampled_N: Tensor
    """int64 [N]: sampled response token of each row."""
    sampled_logprobs_N: Tensor
    """float32 [N]: the generation engine's log-probs of the response tokens; nan in rows without log-probs."""
    weight_N: Tensor
    """float32 [N]: loss weight of each row, from its position; 0 in the dummy sequence of an empty micro-batch."""
    rollout_N: Tensor
    """int64 [N]: index of each row's rollout in ``OptimizerBatch.rollouts``; -1 for a dummy sequence."""
    token_N: Tensor
    """int32 [N]: index of each row's token in the response, from 0."""
    length_N: Tensor
    """int32 [N]: number of tokens of each row's complete response."""
    off_policy_N: Tensor | None = None
    """bool [N]: whether each row's response comes from the dataset; None if no response of the micro-batch does."""
    older_N: Tensor | None = None
    """bool [N]: whether older weights generated each row's token (``Rollout.older_tokens``); None if none of them."""
    grid: ResponseGrid | None = None
    """Places of the rows in the responses; None unless the weights depend on outputs of the models."""
    rows_per_tp_rank: tuple[int, ...] = ()
    """Number of rows of the teacher's view on each tensor-parallel rank; empty without tensor parallelism."""

    kept_M: Tensor | None = None
    """int64 [M]: indices of the rows of nonzero weight, ascending; None: the loss reads them from the device."""
    off_policy_M: Tensor | None = None
    """int64 [M]: those of ``kept_M`` that are off-policy; None: the loss reads them from the device, or none exist."""

    def to(self, device: torch.device) -> MicroBatch:
        """Return a copy with all tensors on ``device``."""
        return map_tensors(self, lambda tensor: tensor.to(device))


@dataclass(frozen=True)
class OptimizerBatch:
    """Micro-batches of this rank for one optimizer step; every rank has the same number of micro-batches."""

    micro_batches: tuple[MicroBatch, ...]
    response_tokens: int
    """Number of response tokens of the optimizer batch over all ranks, with any weight."""
    rollouts: Sequence[Rollout] = ()
    """Rollouts of the training step from all ranks; ``MicroBatch.rollout_N`` is an index into them."""
    known_divisor: float | None = None
    """Divisor of the loss that is summed over all ranks, from lengths and position weights; None: ``response_tokens``.

    0 if no token of the optimizer batch has a weight; it then has no micro-batches.
    """

    @property
    def divisor(self) -> float:
        """Return the divisor of the loss, except for weights that depend on outputs of the models."""
        return self.response_tokens if self.known_divisor is None else self.known_divisor

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.micro_batches)

    def __len__(self) -> int:
        return len(self.micro_batches)


@dataclass(frozen=True)
class Layout:
    """This rank's position in the device mesh of training; ranks are numbered (dp, cp, tp), tp innermost.

    The ``cp_size * tp_size`` ranks of a data-parallel group train one micro-batch together. For the teacher,
    ``teacher_size`` consecutive ranks, which form complete data-parallel groups, combine their micro-batches into one
    packed micro-batch and compute it together. A teacher in the student's module reads the micro-batch of one
    data-parallel group, split as that of the student: over the ``teacher_size = cp_size`` context-parallel ranks, and
    with all rows on every tensor-parallel rank.
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
        """Return the number of ranks that train one micro-batch together (a data-parallel group)."""
        return self.cp_size * self.tp_size

    @property
    def rank(self) -> int:
        """Return this rank's number among all training ranks."""
        return (self.dp_rank * self.cp_size + self.cp_rank) * self.tp_size + self.tp_rank

    @property
    def teacher_tp_size(self) -> int:
        """Return the number of tensor-parallel ranks that compute different rows of the teacher's input."""
        return self.tp_size if self.teacher_size >= self.group_size else 1

    @property
    def teacher_rank(self) -> int:
        """Return this rank's number among the ranks that compute a micro-batch of the teacher together."""
        return self.rank * self.teacher_tp_size // self.tp_size % self.teacher_size

    @property
    def teacher_dp_ranks(self) -> range:
        """Return the indices of the data-parallel groups whose micro-batches this rank's teacher computes."""
        count = max(1, self.teacher_size // self.group_size)
        first = self.dp_rank // count * count
        return range(first, first + count)


@dataclass(frozen=True)
class TopK:
    """The teacher's K most likely tokens for each response token, and the probability of all other tokens."""

    ids_NK: Tensor
    """int32 or int64 [N, K]: token ids; -1 is padding, with log-prob -inf."""
    logprobs_NK: Tensor
    """float32 [N, K]: log-probs over the full vocabulary, at the loss's temperature."""
    log_tail_N: Tensor
    """float32 [N]: log of the total probability of all tokens except the K ids.

    It is computed from the logits, because log(1 - sum p) would lose precision.
    """
    entropy_N: Tensor | None = None
    """float32 [N]: entropy of the teacher's full distribution in nats, for metrics; None if not computed."""
    sampled_logprob_N: Tensor | None = None
    """float32 [N]: the teacher's log-prob of the sampled token, at the loss's temperature; None if not computed."""


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's final hidden state for each response token, and the teacher's LM head.

    The loss computes the teacher's logits from both, one chunk of tokens at a time.
    """

    hidden_ND: Tensor
    head_VD: Tensor | None = None
    """Rows of the LM head, beginning with that of token ``first``; None: the student's LM head.

    With tensor parallelism a rank needs only the rows of the tokens whose student logits it computes.
    """
    first: int = 0
    """Token id of the first row of ``head_VD``."""


Targets = TopK | TeacherRows
"""Outputs of the teacher for the N rows of a micro-batch. The loss compares the student to them."""


@dataclass(frozen=True)
class LossOutput:
    """The loss of one micro-batch on this rank."""

    kl_sum: Tensor
    """Scalar float32, differentiable: sum of weight_N * divergence over the rows, not their mean."""
    stats: Stats
    """Metrics of the micro-batch's rows, without gradient."""
    micro_batch: MicroBatch | None = None
    """The micro-batch with the final weights of its rows; None unless the student returns the output."""
    row_values: Mapping[str, Tensor] = field(default_factory=dict)
    """Values of each metric at the rows of nonzero weight, in order; empty unless the student returns the output."""


@dataclass(frozen=True)
class SyncReport:
    """Result of one sync of the student's weights to the generation engine."""

    version: int
    tensors: int
    bytes: int
    seconds: float
    changed: int = 0
    """Number of tensors that changed since the previous sync; the first sync counts all tensors."""
    changed_bytes: int = 0
    """Total size in bytes of the tensors that changed since the previous sync."""
