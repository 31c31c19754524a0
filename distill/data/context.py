"""What the teacher reads before each answer: the student's own prompt, or a template with the problem and a trace.

Only the tokens before the answer differ between the two models; the answer's tokens are the same, and the i-th of them
is compared with the i-th. An answer never is cut: the prefix gives way, or the answer is left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from distill.data.prompts import chat_ids, token_ids
from distill.data.template import Template
from distill.types import Rollout, Stats, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distill.config import Config

Overflow = Literal["truncate_prefix_only", "truncate_prefix_from_end"]
MissingTrace = Literal["empty", "drop_sample"]

_TEMPLATE_KEY = "distillation.context_distillation.teacher_prefix_template"
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def extract_trace(text: str) -> str:
    """The first ``<think>...</think>`` span of an answer, stripped; "" where there is none or it is not closed."""
    span = _THINK.search(text)
    return span.group(1).strip() if span else ""


@dataclass(frozen=True)
class ViewCounts:
    """What happened on this rank while prefixes were made, to be added up over ranks."""

    means: Stats = field(default_factory=dict)
    """(sum, count) by name; a mean over nothing is left out."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """Counts by name."""


class TeacherViews(Protocol):
    """Gives answers what the teacher reads before them."""

    def prefixed(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], ViewCounts]:
        """The answers that are trained on, in order, with ``teacher_prefix_ids``; and what happened to the others.

        Called by each rank for the answers it generated, without talking to the others.
        """
        ...


class SamePromptViews:
    """The teacher reads what the student read: plain distillation."""

    def prefixed(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], ViewCounts]:
        """All answers, each with its own prompt as the teacher's prefix; no metrics."""
        return [replace(rollout, teacher_prefix_ids=rollout.prompt.student_ids) for rollout in rollouts], ViewCounts()


def teacher_views(config: Config, tokenizer: PreTrainedTokenizerBase) -> TeacherViews:
    """The views that a recipe asks for. The chat template gets the teacher's own arguments, or else the student's."""
    context = config.distillation.context_distillation
    if not context.enabled:
        return SamePromptViews()
    own = config.teacher.tokenizer.chat_template_kwargs
    return ContextViews(
        tokenizer,
        context.teacher_prefix_template,
        max_tokens=config.teacher.max_total_sequence_length,
        overflow=context.overflow_policy,
        missing_trace=context.trace_extractor.missing_trace_policy,
        chat_template=context.chat_template,
        template_kwargs=config.policy.tokenizer.chat_template_kwargs if own is None else own,
    )


@dataclass(frozen=True)
class _Sample:
    """An answer on its way, and its trace."""

    rollout: Rollout
    trace: str

    @property
    def length(self) -> int:
        return len(self.rollout.response_ids)


class ContextViews:
    """The teacher reads a template with the raw problem and the trace of the answer that it is about to score.

    ``max_tokens`` is the teacher's window, prefix and answer together. With ``chat_template`` the filled template is a
    user message with a generation prompt; without, it is bare text. Raises UserError for a template that names anything
    but ``{problem}`` and ``{trace}``, or not the problem.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        max_tokens: int,
        overflow: Overflow = "truncate_prefix_only",
        missing_trace: MissingTrace = "empty",
        chat_template: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = Template(template, ("problem", "trace"), _TEMPLATE_KEY)
        if self._template.count("problem") == 0:
            raise UserError(
                f"{_TEMPLATE_KEY} has no {{problem}}: put it in, or the teacher does not know what is asked"
            )
        self._max_tokens = max_tokens
        self._overflow = overflow
        # A template without {trace} needs none: plain context distillation.
        self._drops_missing = missing_trace == "drop_sample" and self._template.count("trace") > 0
        self._chat_template = chat_template
        self._template_kwargs = template_kwargs

    def prefixed(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], ViewCounts]:
        """The answers with the teacher's prefixes, those left out that lack a trace or do not fit; and the counts.

        Names and formulas are the reference system's: ``trace_coverage`` is answers with a trace over all answers,
        before any is left out; ``prefix_truncation_rate`` is cut prefixes over answers that stay
        (``valid_samples``); ``dropped_samples`` is the sum of its three parts.
        """
        samples = [_Sample(rollout, trace) for rollout, trace in zip(rollouts, self._traces(rollouts), strict=True)]
        traced = [s for s in samples if s.trace or not self._drops_missing]
        short = [s for s in traced if s.length <= self._max_tokens]
        valid = [s for s in short if s.length < self._max_tokens]
        dropped = {
            "missing_trace": len(samples) - len(traced),
            "too_long_response": len(traced) - len(short),
            "no_prefix_budget": len(short) - len(valid),
        }
        prefixes = self._prefixes(valid)
        cut = [self._cut(ids, self._max_tokens - s.length) for ids, s in zip(prefixes, valid, strict=True)]
        truncated = sum(len(ids) < len(whole) for ids, whole in zip(cut, prefixes, strict=True))
        views = [replace(s.rollout, teacher_prefix_ids=tuple(ids)) for s, ids in zip(valid, cut, strict=True)]
        return views, ViewCounts(self._means(samples, cut, truncated), _totals(dropped, truncated, len(valid)))

    def _traces(self, rollouts: Sequence[Rollout]) -> list[str]:
        # Special tokens stay in the text: in some tokenizers the think tags are among them.
        as_it_is = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return [extract_trace(str(self._tokenizer.decode(list(r.response_ids), **as_it_is))) for r in rollouts]

    def _prefixes(self, samples: Sequence[_Sample]) -> list[list[int]]:
        texts = [self._template.fill({"problem": s.rollout.prompt.problem.text, "trace": s.trace}) for s in samples]
        if not self._chat_template:
            return token_ids(self._tokenizer, texts)
        return chat_ids(self._tokenizer, [[{"role": "user", "content": text}] for text in texts], self._template_kwargs)

    def _cut(self, prefix: list[int], budget: int) -> list[int]:
        """At most ``budget`` >= 1 tokens of the prefix: its last ones, or its first."""
        if len(prefix) <= budget:
            return prefix
        return prefix[-budget:] if self._overflow == "truncate_prefix_only" else prefix[:budget]

    def _means(self, samples: Sequence[_Sample], prefixes: Sequence[list[int]], truncated: int) -> Stats:
        traces = [s.trace for s in samples if s.trace]
        trace_tokens = sum(map(len, token_ids(self._tokenizer, traces)))
        means = {
            "trace_coverage": (len(traces), len(samples)),
            "trace_mean_chars": (sum(map(len, traces)), len(traces)),
            "trace_mean_tokens": (trace_tokens, len(traces)),
            "prefix_truncation_rate": (truncated, len(prefixes)),
            "prefix_mean_tokens": (sum(map(len, prefixes)), len(prefixes)),
        }
        return {_named(name): (float(total), float(count)) for name, (total, count) in means.items() if count}


def _totals(dropped: Mapping[str, int], truncated: int, valid: int) -> dict[str, float]:
    totals = {
        "valid_samples": valid,
        "prefix_truncation_count": truncated,
        "dropped_samples": sum(dropped.values()),
        **{f"dropped_{reason}": count for reason, count in dropped.items()},
    }
    return {_named(name): float(total) for name, total in totals.items()}


def _named(name: str) -> str:
    return f"context_distillation_{name}"
