"""The held-out problems and who judges their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from distill.config import DatasetConfig
from distill.data.problems import keyed
from distill.data.prompts import load_prompts
from distill.data.verify import check_gold, check_judge
from distill.types import Prompt
from distill.validation.scores import source_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WHERE = "data.validation"


@dataclass(frozen=True)
class HeldOut:
    """The prompts of validation, the same on every rank."""

    prompts: tuple[Prompt, ...] = ()
    judges: Mapping[int, str] | None = None
    """The judge of each prompt by its id; a prompt without one, or without a gold answer, is not judged."""
    names: Mapping[str, str] | None = None
    """The name in metrics of each dataset, by Problem.source."""

    def judge(self, prompt: Prompt) -> str | None:
        """Who judges answers to ``prompt``."""
        return (self.judges or {}).get(prompt.prompt_id)

    def name(self, prompt: Prompt) -> str:
        """The name in metrics of the prompt's dataset."""
        return (self.names or {})[prompt.problem.source]


def load_held_out(
    datasets: Sequence[DatasetConfig],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    template_kwargs: Mapping[str, Any] | None,
    at_most: int | None,
    trace_column: str | None = None,
) -> HeldOut:
    """Exactly ``at_most`` prompts (None: all), or all there are where there are fewer.

    Several datasets give one each in turn, in their own order, so that a limit starves none of them. A prompt of more
    than ``max_tokens`` is left out before. ``trace_column``: as in ``load_prompts``. Raises UserError for what the user
    can put right.
    """
    each: list[list[Prompt]] = []
    judges: dict[int, str] = {}
    first = 0
    for key, dataset in keyed(datasets, _WHERE):
        if dataset.env_name is not None:
            check_judge(dataset.env_name, key)
        found = load_prompts([dataset], tokenizer, max_tokens, template_kwargs, key, trace_column)
        prompts = [replace(prompt, prompt_id=first + prompt.prompt_id) for prompt in found]
        first += len(found) + found.skipped
        each.append(prompts)
        for prompt in prompts:
            if dataset.env_name is not None and prompt.problem.answer:
                check_gold(dataset.env_name, prompt.problem.answer, key)
                judges[prompt.prompt_id] = dataset.env_name
    in_turn = (prompts[i] for i in range(max(map(len, each))) for prompts in each if i < len(prompts))
    chosen = tuple(islice(in_turn, at_most))
    return HeldOut(chosen, judges, source_names([prompt.problem.source for prompt in chosen]))
