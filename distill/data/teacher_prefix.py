"""What the teacher reads before each answer: the student's own prompt, or a template with the problem and a trace.

Only the tokens before the answer differ between the two models; the answer's tokens are the same, and the i-th of them
is compared with the i-th. An answer never is cut: the prefix gives way, or the answer is left out and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from distill.config.template import teacher_template
from distill.data.clock import RunClock
from distill.data.prompts import Messages, chat_ids, token_ids
from distill.data.text_checks import check_ids
from distill.data.thoughts import extract_column_trace, extract_trace, inside_thoughts
from distill.errors import UserError
from distill.types import Problem, Rollout, Stats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distill.config import Config, ContextDistillationConfig

logger = logging.getLogger(__name__)

TRUNCATION_RATE = "context_distillation_prefix_truncation_rate"
_KEY = "distillation.context_distillation"


@dataclass(frozen=True)
class PrefixStats:
    """What happened on this rank while prefixes were made, to be added up over ranks."""

    means: Stats = field(default_factory=dict)
    """(sum, count) by name; a mean over nothing is left out."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """Counts by name."""


class TeacherPrefixes(Protocol):
    """Gives answers what the teacher reads before them."""

    def add(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], PrefixStats]:
        """The answers that are trained on, in order, with ``teacher_prefix_ids``; and what happened to the others.

        Called by each rank for the answers it generated, without talking to the others.
        """
        ...


class SamePromptViews:
    """The teacher reads what the student read: plain distillation."""

    def add(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], PrefixStats]:
        """All answers, each with its own prompt as the teacher's prefix; no metrics."""
        views = [
            replace(r, teacher_prefix_ids=r.prompt.student_ids, teacher_inside_thought=r.prompt.inside_thought)
            for r in rollouts
        ]
        return views, PrefixStats()


def build_teacher_prefixes(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    valid_vocab: int | None = None,
    clock: RunClock | None = None,
) -> TeacherPrefixes:
    """The views that a recipe asks for.

    ``tokenizer``: the teacher's, whose chat template is used; it gets the teacher's own arguments, or the student's.
    ``valid_vocab``: ids at or past it are in no context, as an embedding lacks them; None: not checked.
    ``clock``: the time that the chat template sees; None: the current time at each rendering.
    """
    context = config.distillation.context_distillation
    if not context.enabled:
        return SamePromptViews()
    kwargs, key = teacher_template_kwargs(config)
    if clock is not None:
        kwargs = clock.template_kwargs(tokenizer, kwargs, key)
    return ContextPrefixes(tokenizer, context, config.teacher.max_total_sequence_length, kwargs, valid_vocab)


def teacher_template_kwargs(config: Config) -> tuple[Mapping[str, Any] | None, str]:
    """The recipe's arguments of the teacher's chat template, and the key that they come from."""
    own = config.teacher.tokenizer.chat_template_kwargs
    if own is None:
        return config.policy.tokenizer.chat_template_kwargs, "policy.tokenizer.chat_template_kwargs"
    return own, "teacher.tokenizer.chat_template_kwargs"


@dataclass(frozen=True)
class _Sample:
    """An answer on its way, and its trace."""

    rollout: Rollout
    trace: str

    @property
    def length(self) -> int:
        return len(self.rollout.response_ids)


class ContextPrefixes:
    """The teacher reads a template with the raw problem, and the trace of the answer that it scores or a dataset's.

    ``max_tokens`` is the teacher's window, prefix and answer together. With ``context.chat_template`` the filled
    template is a user message with a generation prompt; without, it is bare text after the tokenizer's BOS. Raises
    UserError for a template that names anything but ``{problem}`` and ``{trace}``, or not the problem, or that fills
    the window alone, and for a context with an id at or past ``valid_vocab``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: ContextDistillationConfig,
        max_tokens: int,
        template_kwargs: Mapping[str, Any] | None = None,
        valid_vocab: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._valid_vocab = valid_vocab
        self._context = context
        self._max_tokens = max_tokens
        self._template_kwargs = template_kwargs
        self._template = teacher_template(context.teacher_prefix_template)
        shows_trace = self._template.count("trace") > 0
        # A template without {trace} needs none: plain context distillation.
        self._drops_missing = context.trace_extractor.missing_trace_policy == "drop_sample" and shows_trace
        (alone,) = self._filled([("", "")])
        if len(alone) >= max_tokens:
            raise UserError(
                f"{_KEY}.teacher_prefix_template has {len(alone)} tokens before problem, trace and answer come in, and "
                f"teacher.max_total_sequence_length={max_tokens} is to hold all of them: shorten it, or raise "
                "teacher.max_total_sequence_length"
            )
        if shows_trace and context.trace_source == "dynamic":
            logger.warning(
                "%s.trace_source=dynamic lets the teacher read the reasoning of the answer before it scores that "
                "answer, and it may agree with what it has read: %s.trace_source=static_dataset takes traces from the "
                "data, and a template without {trace} needs none",
                *(_KEY, _KEY),
            )

    def add(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], PrefixStats]:
        """The answers with the teacher's prefixes, those left out that lack a trace or do not fit; and the counts.

        Names and formulas are the reference system's: ``trace_coverage`` is answers with a trace over all answers,
        before any is left out; ``prefix_truncation_rate`` is cut prefixes over answers that stay
        (``valid_samples``); ``dropped_samples`` is the sum of its parts. Raises UserError for a problem without the
        column of the traces.
        """
        samples = [_Sample(rollout, trace) for rollout, trace in zip(rollouts, self._traces(rollouts), strict=True)]
        traced = [s for s in samples if s.trace or not self._drops_missing]
        short = [s for s in traced if s.length <= self._max_tokens]
        roomy = [s for s in short if s.length < self._max_tokens]
        whole = self._prefixes(roomy)
        fitted = [(s, ids, self._fitted(s, ids)) for s, ids in zip(roomy, whole, strict=True)]
        valid = [(s, ids, cut) for s, ids, cut in fitted if cut is not None]
        dropped = {
            "missing_trace": len(samples) - len(traced),
            "too_long_response": len(traced) - len(short),
            "no_prefix_budget": len(short) - len(roomy),
            "prefix_too_long": len(roomy) - len(valid),
        }
        truncated = sum(len(cut) < len(ids) for _, ids, cut in valid)
        inside = self._inside_thoughts([(s, cut) for s, _, cut in valid])
        views = [
            replace(s.rollout, teacher_prefix_ids=tuple(cut), teacher_inside_thought=opened)
            for (s, _, cut), opened in zip(valid, inside, strict=True)
        ]
        return views, PrefixStats(self._means(samples, views, truncated), _totals(dropped, truncated, len(valid)))

    def check_problem(self, problem: Problem, trace: str) -> None:
        """Raise UserError for an id at or past ``valid_vocab`` in the problem's context, which shows ``trace``."""
        self._filled([(problem.text, trace)])

    def _traces(self, rollouts: Sequence[Rollout]) -> list[str]:
        extractor, texts = self._context.trace_extractor, map(self._trace_source, rollouts)
        if self._context.trace_source == "static_dataset":
            return [extract_column_trace(text, extractor) for text in texts]
        return [extract_trace(t, extractor, r.prompt.inside_thought) for r, t in zip(rollouts, texts, strict=True)]

    def _inside_thoughts(self, views: Sequence[tuple[_Sample, list[int]]]) -> list[bool]:
        """Whether each (sample, prefix as the teacher reads it) ends inside an open thought."""
        texts = self._texts([(s.rollout.prompt.problem.text, s.trace) for s, _ in views])
        chats = _chats(texts) if self._context.chat_template else None
        prefixes, tags = [ids for _, ids in views], self._context.trace_extractor.think_tags
        return [*map(bool, inside_thoughts(self._tokenizer, chats, prefixes, tags, self._template_kwargs))]

    def _trace_source(self, rollout: Rollout) -> str:
        """The text that an answer's trace is taken from."""
        if self._context.trace_source == "dynamic":
            # Special tokens stay in the text: in some tokenizers the think tags are among them. The stop token goes: an
            # unclosed span would take it along, and it would end the teacher's user message.
            ids = rollout.response_ids[:-1] if rollout.finish == "stop" else rollout.response_ids
            as_it_is = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
            return str(self._tokenizer.decode(list(ids), **as_it_is))
        column, problem = self._context.static_trace.answer_column or "", rollout.prompt.problem
        if column not in problem.columns:
            raise UserError(
                f"{_KEY}.static_trace.answer_column={column} is missing in a problem of {problem.source}, which has "
                f"{', '.join(problem.columns) or 'no other column of texts'}: set it to a column of all its problems"
            )
        return problem.columns[column]

    def _prefixes(self, samples: Sequence[_Sample]) -> list[list[int]]:
        return self._filled([(s.rollout.prompt.problem.text, s.trace) for s in samples])

    def _filled(self, values: Sequence[tuple[str, str]]) -> list[list[int]]:
        """The token ids of the template with each (problem, trace)."""
        texts = self._texts(values)
        if self._context.chat_template:
            filled = chat_ids(self._tokenizer, _chats(texts), self._template_kwargs)
        else:
            filled = token_ids(self._tokenizer, texts, special_tokens=True)
        if self._valid_vocab is not None:
            for (problem, _), ids in zip(values, filled, strict=True):
                what = f"{_KEY}.teacher_prefix_template" + (f" for the problem {problem[:40]!r}" if problem else "")
                check_ids(self._tokenizer, ids, self._valid_vocab, what)
        return filled

    def _texts(self, values: Sequence[tuple[str, str]]) -> list[str]:
        return [self._template.fill({"problem": problem, "trace": trace}) for problem, trace in values]

    def _fitted(self, sample: _Sample, prefix: list[int]) -> list[int] | None:
        """The prefix itself where it fits before its answer, else what the overflow policy leaves; None: nothing."""
        budget = self._max_tokens - sample.length
        if len(prefix) <= budget:
            return prefix
        if self._context.overflow_policy == "truncate_prefix_only":
            return prefix[-budget:]
        if self._context.overflow_policy == "truncate_prefix_from_end":
            return prefix[:budget]
        return self._with_less_trace(sample, budget)

    def _with_less_trace(self, sample: _Sample, budget: int) -> list[int] | None:
        """The prefix with as much of the trace's beginning as fits; None where the rest alone does not."""

        def prefix(characters: int) -> list[int]:
            return self._prefixes([replace(sample, trace=sample.trace[:characters])])[0]

        # Where an answer without a trace is left out, one whose trace is cut to nothing is too.
        least = 1 if self._drops_missing else 0
        kept = _most_that_fits(lambda characters: len(prefix(characters)), least, len(sample.trace), budget)
        return None if kept is None else prefix(kept)

    def _means(self, samples: Sequence[_Sample], views: Sequence[Rollout], truncated: int) -> Stats:
        traces = [s.trace for s in samples if s.trace]
        trace_tokens = sum(map(len, token_ids(self._tokenizer, traces)))
        means = {
            "trace_coverage": (len(traces), len(samples)),
            "trace_mean_chars": (sum(map(len, traces)), len(traces)),
            "trace_mean_tokens": (trace_tokens, len(traces)),
            "prefix_truncation_rate": (truncated, len(views)),
            "prefix_mean_tokens": (sum(len(view.teacher_prefix_ids) for view in views), len(views)),
        }
        return {_named(name): (float(total), float(count)) for name, (total, count) in means.items() if count}


def _chats(texts: Sequence[str]) -> list[Messages]:
    return [[{"role": "user", "content": text}] for text in texts]


def _most_that_fits(length: Callable[[int], int], low: int, high: int, limit: int) -> int | None:
    """The largest number from ``low`` to below ``high`` whose rising ``length`` is within ``limit``, or one before it
    that reaches the limit; None where there is none. ``high`` is known not to fit.

    A length is a tokenisation, so a guess goes where a straight line would; to the middle once lines have led nowhere.
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


_NEVER = ("invalid_message", "for_dp_divisibility")
"""Reasons of the reference system that no answer is left out for here; their zeros stand where they always stood."""


def _totals(dropped: Mapping[str, int], truncated: int, valid: int) -> dict[str, float]:
    totals = {
        "valid_samples": valid,
        "prefix_truncation_count": truncated,
        "dropped_samples": sum(dropped.values()),
        **{f"dropped_{reason}": count for reason, count in dropped.items()},
        **{f"dropped_{reason}": 0 for reason in _NEVER},
    }
    return {_named(name): float(total) for name, total in totals.items()}


def _named(name: str) -> str:
    return f"context_distillation_{name}"
