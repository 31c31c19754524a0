"""Build the teacher's prefixes: the token ids that the teacher reads before each response.

A prefix is the student's prompt or, in context distillation, a template filled with the problem, a trace and columns of
the dataset, or a conversation in a column. A trace is a text with reasoning: a part of the response, or a column. Both
models score the same response tokens, so a response is never truncated. The teacher's window is the maximum length of
prefix and response together (teacher.max_total_sequence_length). If prefix and response exceed the window, the prefix
is shortened, or the response is dropped and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from distill.data.clock import RunClock
from distill.data.conversations import Chat
from distill.data.rendering import TemplateKeys, chat_ids, token_ids
from distill.data.rendering_checks import TemplateCheck
from distill.data.teacher_context import SYSTEM_KEY, TEMPLATE_KEY, TeacherContext
from distill.data.text_checks import check_ids
from distill.data.thoughts import extract_column_trace, extract_trace, inside_thoughts
from distill.errors import UserError
from distill.types import Problem, Prompt, Rollout, Stats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distill.config import Config, ContextDistillationConfig

log = logging.getLogger(__name__)

TRACE_COVERAGE = "context_distillation_trace_coverage"
"""Name of the metric: number of responses with a trace / number of all responses."""
TRUNCATION_RATE = "context_distillation_prefix_truncation_rate"
"""Name of the metric: number of truncated teacher prefixes / number of responses that are not dropped."""
_CHAT_TEMPLATE_KEY, _KWARGS_KEY = "teacher.tokenizer.chat_template", "teacher.tokenizer.chat_template_kwargs"

DropReason = Literal["missing_trace", "too_long_response", "no_prefix_budget", "prefix_too_long"]
"""Reason for dropping a response. The student is not trained on a dropped response.

missing_trace: no trace was found, or the problem lacks a column that the teacher reads; too_long_response: the response
is longer than the teacher's window (teacher.max_total_sequence_length); no_prefix_budget: the response is exactly as
long as the window; prefix_too_long: prefix and response exceed the window even with the shortest allowed trace.
"""
_REFERENCE_ZERO_METRICS = ("invalid_message", "for_dp_divisibility")
"""Reasons for dropping a response in NeMo-RL that cannot occur in this program.

Their metrics are reported as 0, so that dashboards made for NeMo-RL have all their metrics.
"""


@dataclass(frozen=True)
class PrefixStats:
    """Metrics of the teacher prefixes that one rank has built in a step.

    The metrics of the step are computed from the sums of these values over all ranks.
    """

    means: Stats = field(default_factory=dict)
    """Maps the name of each averaged metric to (sum, count). Metrics with count 0 are omitted."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """Maps the name of each counting metric (a number of prefixes or responses) to its value."""

    def __add__(self, other: PrefixStats) -> PrefixStats:
        """Return the metrics of both sets of prefixes; exact, because all values are integers."""
        means, totals = dict(self.means), dict(self.totals)
        for name, (total, count) in other.means.items():
            old = means.get(name, (0.0, 0.0))
            means[name] = old[0] + total, old[1] + count
        totals |= {name: totals.get(name, 0.0) + value for name, value in other.totals.items()}
        return PrefixStats(means, totals)


@dataclass(frozen=True)
class Prefix:
    """The teacher's prefix for one response: the tokens that the teacher reads before the response."""

    token_ids: tuple[int, ...]
    """Token ids that the teacher reads before the response."""
    inside_thought: bool
    """Whether the prefix ends inside an open think block (after an opening tag without a closing tag)."""


class TeacherPrefixes(Protocol):
    """Interface of builders of teacher prefixes: the tokens that the teacher reads before a response."""

    def add(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], PrefixStats]:
        """Return copies of the rollouts with ``teacher_prefix_ids`` set, and this rank's metrics.

        The copies have the order of ``rollouts``. Rollouts that are dropped (see DropReason) are omitted. Not
        collective: each rank passes the rollouts that it generated.
        """

    def prefix_of(self, prompt: Prompt) -> Prefix | DropReason:
        """Return the prefix that the teacher would read before a response of one token to ``prompt``.

        If this response would be dropped, returns the reason.
        """

    def can_read(self, problem: Problem) -> bool:
        """Return whether ``problem`` has all columns that the teacher's prefix needs."""


class SamePromptPrefixes:
    """Teacher prefixes without context, also for distillation.control: the teacher reads the student's prompt."""

    def add(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], PrefixStats]:
        """Return all rollouts with the student's prompt as the teacher's prefix, and empty metrics."""
        prefixes = [self.prefix_of(rollout.prompt) for rollout in rollouts]
        return [with_prefix(*pair) for pair in zip(rollouts, prefixes, strict=True)], PrefixStats()

    def prefix_of(self, prompt: Prompt) -> Prefix:
        """Return the student's prompt as the teacher's prefix."""
        return Prefix(prompt.student_ids, prompt.inside_thought)

    def can_read(self, problem: Problem) -> bool:
        """Return True, because no column is needed."""
        return True


def with_prefix(rollout: Rollout, prefix: Prefix) -> Rollout:
    """Return a copy of ``rollout`` with the teacher's prefix."""
    return replace(rollout, teacher_prefix_ids=prefix.token_ids, teacher_inside_thought=prefix.inside_thought)


def build_teacher_prefixes(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    valid_vocab: int | None = None,
    clock: RunClock | None = None,
) -> TeacherPrefixes:
    """Return the object that builds the teacher's prefixes, as selected by the configuration.

    A prefix is the token ids that the teacher reads before a response. ``tokenizer``: the teacher's tokenizer. Its chat
    template receives the teacher's chat_template_kwargs, or else the student's. ``valid_vocab``: number of token ids
    with an embedding; a prefix with any other id raises UserError; None: ids are not checked. ``clock``: the clock that
    chat templates read; None: they read the current time.
    """
    if not config.distillation.context_distillation.enabled or config.distillation.control:
        return SamePromptPrefixes()
    return build_context_prefixes(config, tokenizer, valid_vocab, clock)


def build_context_prefixes(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    valid_vocab: int | None = None,
    clock: RunClock | None = None,
) -> ContextPrefixes:
    """Return the object that builds prefixes with the teacher's context, also for distillation.control.

    Arguments: see ``build_teacher_prefixes``.
    """
    context = config.distillation.context_distillation
    kwargs, key = teacher_template_kwargs(config)
    if clock is not None:
        kwargs = clock.template_kwargs(tokenizer, kwargs, key)
    max_tokens = config.teacher.max_total_sequence_length
    return ContextPrefixes(tokenizer, context, max_tokens, kwargs, valid_vocab, kwargs_key=key)


def teacher_template_kwargs(config: Config) -> tuple[Mapping[str, Any] | None, str]:
    """Return the arguments of the teacher's chat template and the configuration key that sets them."""
    own = config.teacher.tokenizer.chat_template_kwargs
    if own is None:
        return config.policy.tokenizer.chat_template_kwargs, "policy.tokenizer.chat_template_kwargs"
    return own, _KWARGS_KEY


@dataclass(frozen=True)
class _Sample:
    rollout: Rollout
    trace: str

    @property
    def problem(self) -> Problem:
        return self.rollout.prompt.problem

    @property
    def length(self) -> int:
        return len(self.rollout.response_ids)


class ContextPrefixes:
    """Teacher prefixes in context distillation: filled templates, or a conversation in a column (see TeacherContext).

    The trace is a text with reasoning, from the scored response or from a dataset column. ``max_tokens``: maximum
    length of prefix and response together. If ``context.chat_template`` is true, the filled template is the last user
    message, followed by a generation prompt; if false, it is plain text after the tokenizer's BOS. Raises UserError for
    a template without placeholders for data, with malformed placeholders or with at least ``max_tokens`` tokens, and
    for a prefix with a token id that is not less than ``valid_vocab``. ``kwargs_key``: the configuration key of
    ``template_kwargs``, for messages.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: ContextDistillationConfig,
        max_tokens: int,
        template_kwargs: Mapping[str, Any] | None = None,
        valid_vocab: int | None = None,
        kwargs_key: str = _KWARGS_KEY,
    ) -> None:
        self._tokenizer = tokenizer
        self._template_keys = TemplateKeys(_CHAT_TEMPLATE_KEY, kwargs_key, SYSTEM_KEY)
        self._valid_vocab = valid_vocab
        self._context = context
        self._max_tokens = max_tokens
        self._template_kwargs = template_kwargs
        self._teacher_context = TeacherContext.of(context)
        shows_trace = self._teacher_context.shows_trace
        # A template without {trace} needs no trace, so no response is dropped for a missing trace.
        self._drops_missing = context.trace_extractor.missing_trace_policy == "drop_sample" and shows_trace
        self._check_window()
        if shows_trace and context.trace_source == "dynamic":
            log.warning(
                "trace_source=dynamic: the teacher reads the reasoning that it scores, and may simply confirm it"
            )

    def _check_window(self) -> None:
        """Raise UserError if the teacher's prompt with empty placeholders fills the teacher's window.

        The window is teacher.max_total_sequence_length tokens.
        """
        if self._context.teacher_messages_key is not None:
            return
        (empty,) = self._fill([(self._teacher_context.empty(), "")])
        if len(empty) >= self._max_tokens:
            raise UserError(
                f"the teacher's prompt of {TEMPLATE_KEY} has {len(empty)} tokens with empty placeholders, so no"
                f" response fits into teacher.max_total_sequence_length={self._max_tokens}",
                "shorten the template or the system message, or raise teacher.max_total_sequence_length",
                key=TEMPLATE_KEY,
                value=self._context.teacher_prefix_template,
            )

    def add(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], PrefixStats]:
        """Return the rollouts that are not dropped, with their teacher prefixes, and this rank's metrics.

        Metric names and formulas equal those of NeMo-RL. ``trace_coverage``: responses with a trace / all responses,
        including dropped responses. ``prefix_truncation_rate``: truncated prefixes / ``valid_samples``, the number of
        responses that are not dropped. ``dropped_samples``: the sum of the ``dropped_*`` counts. Raises UserError for a
        problem without a column that the teacher reads.
        """
        for rollout in rollouts:
            self._check_columns(rollout.prompt.problem)
        samples = [_Sample(rollout, trace) for rollout, trace in zip(rollouts, self._traces(rollouts), strict=True)]
        traced = [s for s in samples if s.trace or not self._drops_missing]
        short = [s for s in traced if s.length <= self._max_tokens]
        with_budget = [s for s in short if s.length < self._max_tokens]
        complete = self._prefixes(with_budget)
        fitted = [(s, ids, self._fit(s, ids)) for s, ids in zip(with_budget, complete, strict=True)]
        valid = [(s, ids, fit) for s, ids, fit in fitted if fit is not None]
        dropped: dict[DropReason, int] = {
            "missing_trace": len(samples) - len(traced),
            "too_long_response": len(traced) - len(short),
            "no_prefix_budget": len(short) - len(with_budget),
            "prefix_too_long": len(with_budget) - len(valid),
        }
        truncated = sum(len(fit) < len(ids) for _, ids, fit in valid)
        inside = self._inside_thoughts([(s, fit) for s, _, fit in valid])
        kept = [
            with_prefix(s.rollout, Prefix(tuple(fit), opened))
            for (s, _, fit), opened in zip(valid, inside, strict=True)
        ]
        return kept, PrefixStats(self._means(samples, kept, truncated), _totals(dropped, truncated, len(valid)))

    def prefix_of(self, prompt: Prompt) -> Prefix | DropReason:
        """Return the prefix that the teacher would read before a response of one token to ``prompt``.

        If this response would be dropped, returns the reason.
        """
        if not self.can_read(prompt.problem):
            return "missing_trace"
        kept, stats = self.add([Rollout(prompt, 0, (0,), (0.0,), "length", 0)])
        if kept:
            return Prefix(kept[0].teacher_prefix_ids, kept[0].teacher_inside_thought)
        return next(reason for reason in get_args(DropReason) if stats.totals[_metric(f"dropped_{reason}")])

    def check_problem(self, problem: Problem, trace: str) -> None:
        """Raise UserError if the template filled with ``problem`` and ``trace`` has an invalid token id.

        A token id is invalid if the models have no embedding for it.
        """
        self._fill([(problem, trace)])

    def can_read(self, problem: Problem) -> bool:
        """Return whether ``problem`` has all columns that the teacher's prefix needs."""
        return self._teacher_context.lacks(problem) is None

    @property
    def reads_conversations(self) -> bool:
        """Return whether the teacher reads several turns of the dataset."""
        return self._teacher_context.has_conversation

    def check_conversations(self, problems: Sequence[Problem], location: Callable[[int], str]) -> None:
        """Raise UserError if the teacher's chat template rejects a conversation, or omits a part of it.

        One conversation for each sequence of roles is rendered, because templates reject sequences of roles. Skipped
        unless the teacher reads conversations or tools. ``location``: returns the location of problem i, for messages.
        """
        if not self._context.chat_template:
            return
        check = TemplateCheck(self._tokenizer, self._template_kwargs, self._template_keys)
        seen = set()
        for i, problem in enumerate(problems):
            if not (self._teacher_context.has_conversation or problem.tools) or not self.can_read(problem):
                continue
            chat = self._teacher_context.chat(problem, "")
            kind = (*(message["role"] + str("tool_calls" in message) for message in chat), bool(problem.tools))
            if kind not in seen:
                seen.add(kind)
                self._ids([chat], lambda _, i=i: location(i))  # type: ignore[misc]
                check([chat], lambda _, i=i: location(i))  # type: ignore[misc]

    def _traces(self, rollouts: Sequence[Rollout]) -> list[str]:
        extractor, texts = self._context.trace_extractor, map(self._trace_source, rollouts)
        if self._context.trace_source == "static_dataset":
            return [extract_column_trace(text, extractor) for text in texts]
        return [extract_trace(t, extractor, r.prompt.inside_thought) for r, t in zip(rollouts, texts, strict=True)]

    def _inside_thoughts(self, prefixes: Sequence[tuple[_Sample, list[int]]]) -> list[bool]:
        """Return for each (sample, prefix after truncation) whether the prefix ends inside a think block."""
        chats = self._chats([(s.problem, s.trace) for s, _ in prefixes]) if self._context.chat_template else None
        ids, tags = [ids for _, ids in prefixes], self._context.trace_extractor.think_tags
        return [*map(bool, inside_thoughts(self._tokenizer, chats, ids, tags, self._template_kwargs))]

    def _trace_source(self, rollout: Rollout) -> str:
        """Return the text that contains the trace: the response, or the value of the problem's trace column."""
        if self._context.trace_source == "dynamic":
            # Keep special tokens, because the think tags of some tokenizers are special tokens. Drop the stop token:
            # it would become part of an unclosed think block and would end the teacher's user message.
            ids = rollout.response_ids[:-1] if rollout.finish == "stop" else rollout.response_ids
            verbatim = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
            return str(self._tokenizer.decode(list(ids), **verbatim))
        return rollout.prompt.problem.columns[self._context.static_trace.answer_column or ""]

    def _check_columns(self, problem: Problem) -> None:
        if (column := self._teacher_context.lacks(problem)) is not None:
            raise UserError(
                f"{column.key}={column.name} is missing in a problem of {problem.source} (columns:"
                f" {', '.join(problem.columns) or 'none'})",
                f"set {column.key} to a column that all rows of the dataset have",
                key=column.key,
                value=column.name,
            )

    def _prefixes(self, samples: Sequence[_Sample]) -> list[list[int]]:
        return self._fill([(s.problem, s.trace) for s in samples])

    def _fill(self, values: Sequence[tuple[Problem, str]]) -> list[list[int]]:
        """Fill the templates with each (problem, trace); return the token ids of each prefix."""
        if self._context.chat_template:
            filled = self._ids(self._chats(values), lambda i: f"the problem {values[i][0].text[:40]!r}")
        else:
            texts = [self._teacher_context.text(problem, trace) for problem, trace in values]
            filled = token_ids(self._tokenizer, texts, special_tokens=True)
        if self._valid_vocab is not None:
            key = self._teacher_context.key
            for (problem, _), ids in zip(values, filled, strict=True):
                what = key + (f" for the problem {problem.text[:40]!r}" if problem.text else "")
                check_ids(self._tokenizer, ids, self._valid_vocab, what, key)
        return filled

    def _ids(self, chats: Sequence[Chat], location: Callable[[int], str]) -> list[list[int]]:
        return chat_ids(self._tokenizer, chats, self._template_kwargs, self._template_keys, location)

    def _chats(self, values: Sequence[tuple[Problem, str]]) -> list[Chat]:
        return [self._teacher_context.chat(problem, trace) for problem, trace in values]

    def _fit(self, sample: _Sample, prefix: list[int]) -> list[int] | None:
        """Return the prefix; if prefix and response exceed the teacher's window, truncate the prefix.

        The window is teacher.max_total_sequence_length. The setting overflow_policy selects the part of the prefix to
        remove. Returns None if the prefix is too long even with the shortest allowed trace.
        """
        if len(prefix) <= (budget := self._max_tokens - sample.length):
            return prefix
        if self._context.overflow_policy == "truncate_prefix_only":
            return prefix[-budget:]
        if self._context.overflow_policy == "truncate_prefix_from_end":
            return prefix[:budget]
        return self._with_shorter_trace(sample, budget)

    def _with_shorter_trace(self, sample: _Sample, budget: int) -> list[int] | None:
        """Cut the end of the trace so that the prefix has at most ``budget`` tokens; return the prefix.

        As much of the trace as possible is kept. Returns None if the prefix is too long even with the shortest
        allowed trace.
        """

        def prefix(characters: int) -> list[int]:
            return self._prefixes([replace(sample, trace=sample.trace[:characters])])[0]

        # If responses without a trace are dropped, at least one character of the trace must remain.
        least = 1 if self._drops_missing else 0
        kept = _largest_fitting(lambda characters: len(prefix(characters)), least, len(sample.trace), budget)
        return None if kept is None else prefix(kept)

    def _means(self, samples: Sequence[_Sample], kept: Sequence[Rollout], truncated: int) -> Stats:
        traces = [s.trace for s in samples if s.trace]
        trace_tokens = sum(map(len, token_ids(self._tokenizer, traces)))
        means = {
            "trace_coverage": (len(traces), len(samples)),
            "trace_mean_chars": (sum(map(len, traces)), len(traces)),
            "trace_mean_tokens": (trace_tokens, len(traces)),
            "prefix_truncation_rate": (truncated, len(kept)),
            "prefix_mean_tokens": (sum(len(rollout.teacher_prefix_ids) for rollout in kept), len(kept)),
        }
        return {_metric(name): (float(total), float(count)) for name, (total, count) in means.items() if count}


def _largest_fitting(length: Callable[[int], int], low: int, high: int, limit: int) -> int | None:
    """Return the largest n in [low, high) with ``length(n) <= limit``; None if no n fits.

    The search stops early at an n with ``length(n) == limit``. ``length`` must not decrease, and ``length(high)`` must
    exceed ``limit``. A call of ``length`` is slow, because it tokenizes a text. To need few calls, the search
    interpolates linearly; after four consecutive steps that do not halve the interval, it bisects.
    """
    short, long, slow = length(low), length(high), 0
    if short > limit:
        return None
    while high - low > 1 and short < limit:
        width = high - low
        step = width // 2 if slow > 3 else width * (limit - short) // (long - short)
        middle = low + min(max(step, 1), width - 1)
        found = length(middle)
        if found <= limit:
            low, short = middle, found
        else:
            high, long = middle, found
        slow = slow + 1 if high - low > width // 2 else 0
    return low


def _totals(dropped: Mapping[DropReason, int], truncated: int, valid: int) -> dict[str, float]:
    totals = {
        "valid_samples": valid,
        "prefix_truncation_count": truncated,
        "dropped_samples": sum(dropped.values()),
        **{f"dropped_{reason}": count for reason, count in dropped.items()},
        **{f"dropped_{reason}": 0 for reason in _REFERENCE_ZERO_METRICS},
    }
    return {_metric(name): float(total) for name, total in totals.items()}


def _metric(name: str) -> str:
    return f"context_distillation_{name}"
