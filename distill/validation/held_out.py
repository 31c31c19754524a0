"""The held-out problems and who judges their answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from distill.config import DatasetConfig
from distill.data.content import TOKENS, ContentHashes, content_hash
from distill.data.grading import THINK_TAGS, check_gold, check_grader
from distill.data.prompts import load_prompts
from distill.data.sources import keyed
from distill.errors import UserError
from distill.types import Prompt
from distill.validation.scores import source_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_WHERE = "data.validation"


@dataclass(frozen=True)
class HeldOut:
    """The prompts of validation, the same on every rank."""

    prompts: tuple[Prompt, ...] = ()
    judges: Mapping[int, str] | None = None
    """The judge of each prompt by its id; a prompt without one, or without a gold answer, is not judged."""
    names: Mapping[int, str] | None = None
    """The name in metrics of each prompt's dataset, by the prompt's id."""

    def content(self, trace_column: str | None) -> ContentHashes:
        """Hashes of what validation metrics depend on; empty without prompts."""
        if not self.prompts:
            return {}
        problems = [prompt.problem for prompt in self.prompts]
        return {
            "problems": content_hash(problem.text for problem in problems),
            "gold answers": content_hash((p.problem.answer, self.judge(p), self.name(p)) for p in self.prompts),
            **({} if trace_column is None else {"traces": content_hash(p.columns.get(trace_column) for p in problems)}),
            TOKENS: content_hash(prompt.student_ids for prompt in self.prompts),
        }

    def judge(self, prompt: Prompt) -> str | None:
        """Who judges answers to ``prompt``."""
        return (self.judges or {}).get(prompt.prompt_id)

    def name(self, prompt: Prompt) -> str:
        """The name in metrics of the prompt's dataset."""
        return (self.names or {})[prompt.prompt_id]


def load_held_out(
    datasets: Sequence[DatasetConfig],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    template_kwargs: Mapping[str, Any] | None,
    at_most: int | None,
    trace_column: str | None = None,
    think_tags: tuple[str, str] = THINK_TAGS,
) -> HeldOut:
    """Exactly ``at_most`` prompts (None: all), or all there are where there are fewer.

    Several datasets give one each in turn, in their own order, so that a limit starves none of them. A prompt of more
    than ``max_tokens`` is left out before. A problem may lack the ``trace_column``; the teacher can't read it then.
    ``think_tags`` open and close a thought.
    Raises UserError for what the user can put right.
    """
    each: list[list[Prompt]] = []
    judges: dict[int, str] = {}
    first = 0
    for key, dataset in keyed(datasets, _WHERE):
        if dataset.env_name is not None:
            check_grader(dataset.env_name, key)
        found = load_prompts([dataset], tokenizer, max_tokens, template_kwargs, key, trace_column, False, think_tags)
        prompts = [replace(prompt, prompt_id=first + prompt.prompt_id) for prompt in found]
        first += len(found) + found.skipped
        each.append(prompts)
        if dataset.env_name is not None:
            judges |= _judges(dataset.env_name, prompts, key)
        lacking = sum(trace_column is not None and trace_column not in prompt.problem.columns for prompt in prompts)
        if lacking:
            logger.warning(
                "%s: %d of %d problems have no %s, which the teacher's template needs: answers to them are not compared"
                " with the teacher, nor given with its context in view",
                *(key, lacking, len(prompts), trace_column),
            )
    in_turn = (prompts[i] for i in range(max(map(len, each))) for prompts in each if i < len(prompts))
    sets = zip(datasets, each, strict=True)
    names = source_names([(of[0].problem.source, dataset.subset or "", dataset.split or "") for dataset, of in sets])
    named = {prompt.prompt_id: name for name, prompts in zip(names, each, strict=True) for prompt in prompts}
    return HeldOut(tuple(islice(in_turn, at_most)), judges, named)


def _judges(name: str, prompts: Sequence[Prompt], where: str) -> dict[int, str]:
    """The judge of each prompt with a gold answer; refuses a dataset that has none, and says how many lack one."""
    judged = [prompt for prompt in prompts if prompt.problem.answer]
    if not judged:
        raise UserError(
            f"{where}.env_name={name} has no gold answer to judge by in {prompts[0].problem.source}: name the column of"
            f" the answers in {where}.output_key, or set {where}.env_name=null"
        )
    if len(judged) < len(prompts):
        missing = len(prompts) - len(judged)
        logger.warning("%s: %d of %d problems have no gold answer and are not judged", where, missing, len(prompts))
    for prompt in judged:
        check_gold(name, prompt.problem.answer, where)
    return {prompt.prompt_id: name for prompt in judged}
