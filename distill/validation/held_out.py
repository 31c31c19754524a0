"""Load the held-out problems, which only validation uses, and select the grader of each problem."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from distill.config import DatasetConfig
from distill.data.columns import TextColumn
from distill.data.content import TOKENS, ContentHashes, columns_of, content_hash, content_of
from distill.data.grading import THINK_TAGS, check_gold, check_grader
from distill.data.prompts import load_prompts
from distill.data.sources import keyed
from distill.errors import UserError
from distill.types import Prompt
from distill.validation.scores import source_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_KEY = "data.validation"


@dataclass(frozen=True)
class HeldOut:
    """The held-out prompts of validation, with their graders and dataset names; equal on every rank."""

    prompts: tuple[Prompt, ...] = ()
    graders: Mapping[int, str] | None = None
    """Maps prompt ids to grader names. Responses to prompts without an entry are not graded."""
    names: Mapping[int, str] | None = None
    """Maps each prompt id to the name of the prompt's dataset, as used in metric names."""

    def content(self, trace_column: str | None, columns: Sequence[str] = ()) -> ContentHashes:
        """Return a dict from the name of a part, such as "problems", to its hash; empty without prompts.

        The parts are the problems, gold answers, traces, other columns and token ids. ``trace_column``:
        dataset column with the traces (reasoning texts); None: traces are not hashed. ``columns``: other columns that
        the teacher reads.
        """
        if not self.prompts:
            return {}
        problems = [prompt.problem for prompt in self.prompts]
        return {
            "problems": content_hash(map(content_of, problems)),
            "gold answers": content_hash((p.problem.answer, self.grader(p), self.name(p)) for p in self.prompts),
            **({} if trace_column is None else {"traces": content_hash(p.columns.get(trace_column) for p in problems)}),
            **({"columns": content_hash(columns_of(problem, columns) for problem in problems)} if columns else {}),
            TOKENS: content_hash(prompt.student_ids for prompt in self.prompts),
        }

    def grader(self, prompt: Prompt) -> str | None:
        """Return the name of the grader for responses to ``prompt``; None if the responses are not graded."""
        return (self.graders or {}).get(prompt.prompt_id)

    def name(self, prompt: Prompt) -> str:
        """Return the name of the prompt's dataset, as used in metric names."""
        return (self.names or {})[prompt.prompt_id]


def load_held_out(
    datasets: Sequence[DatasetConfig],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    template_kwargs: Mapping[str, Any] | None,
    at_most: int | None,
    trace_column: str | None = None,
    think_tags: tuple[str, str] = THINK_TAGS,
    extra: Sequence[TextColumn] = (),
) -> HeldOut:
    """Load at most ``at_most`` held-out (validation) prompts (None: all).

    Prompts of more than ``max_tokens`` tokens are skipped. The remaining prompts are taken from the datasets in turn,
    so that ``at_most`` keeps prompts of every dataset. ``trace_column``: dataset column with the trace (reasoning text)
    for the teacher's prompt; None: no column is needed. ``extra``: other columns that the teacher reads. A problem
    without one of these columns is kept, but responses to it are not compared with the teacher. ``think_tags``: opening
    and closing tag of a think block. ``template_kwargs``: arguments of the chat template. Raises UserError for unusable
    data.
    """
    each: list[list[Prompt]] = []
    graders: dict[int, str] = {}
    first = 0
    for key, dataset in keyed(datasets, _KEY):
        if dataset.env_name is not None:
            check_grader(dataset.env_name, key)
        found = load_prompts(
            [dataset], tokenizer, max_tokens, template_kwargs, key, trace_column, False, think_tags, extra
        )
        prompts = [replace(prompt, prompt_id=first + prompt.prompt_id) for prompt in found]
        first += len(found) + found.skipped
        each.append(prompts)
        if dataset.env_name is not None:
            graders |= _graders(dataset.env_name, prompts, key)
        needed = [
            *([] if trace_column is None else [trace_column]),
            *(column.name for column in extra if column.kind != "unread"),
        ]
        _warn_of_missing_columns(key, prompts, needed)
    in_turn = (prompts[i] for i in range(max(map(len, each))) for prompts in each if i < len(prompts))
    sets = zip(datasets, each, strict=True)
    names = source_names([(of[0].problem.source, dataset.subset or "", dataset.split or "") for dataset, of in sets])
    named = {prompt.prompt_id: name for name, prompts in zip(names, each, strict=True) for prompt in prompts}
    return HeldOut(tuple(islice(in_turn, at_most)), graders, named)


def _warn_of_missing_columns(key: str, prompts: Sequence[Prompt], needed: Sequence[str]) -> None:
    """Log a warning for each column in ``needed`` that some prompts lack; ``key``: the dataset's configuration key."""
    for name in dict.fromkeys(needed):
        if lacking := sum(name not in prompt.problem.columns for prompt in prompts):
            log.warning(
                "%s: %d of %d problems have no column %s, which the teacher's prompt needs, so their responses are not"
                " compared with the teacher and do not count in the metric in_context_accuracy: add the column to"
                " include these problems",
                *(key, lacking, len(prompts), name),
            )


def _graders(name: str, prompts: Sequence[Prompt], key: str) -> dict[int, str]:
    """Return a dict that maps the id of each prompt with a gold answer to the grader's ``name``.

    ``key``: configuration key of the dataset, for messages. Raises UserError if no prompt has a gold answer, or if the
    grader cannot use a gold answer.
    """
    gradable = [prompt for prompt in prompts if prompt.problem.answer]
    if not gradable:
        raise UserError(
            f"{key}.env_name={name} requires gold answers, but {prompts[0].problem.source} has none",
            f"set {key}.output_key to the column of the gold answers, or set {key}.env_name=null",
            key=f"{key}.env_name",
            value=name,
        )
    if len(gradable) < len(prompts):
        missing = len(prompts) - len(gradable)
        log.warning(
            "%s: %d of %d problems have no gold answer, so responses to them are not graded", key, missing, len(prompts)
        )
    for prompt in gradable:
        check_gold(name, prompt.problem.answer, key)
    return {prompt.prompt_id: name for prompt in gradable}
