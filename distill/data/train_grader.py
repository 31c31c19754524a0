"""Grade training responses: which datasets have gold answers that their grader can use, and the grades."""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from distill.config import Config, DatasetConfig
from distill.data.content import ContentHashes, content_hash
from distill.data.golds import SECONDS, pattern_for, sample_of, shortened, unusable_golds
from distill.data.grading import THINK_TAGS, Grader, Verdict, check_gold, check_grader
from distill.data.prompts import Prompts
from distill.data.sources import keyed
from distill.errors import MissingError, UserError
from distill.types import Problem, Prompt, Rollout

log = logging.getLogger(__name__)

_KEY, _TRAIN_ON = "data.train", "distillation.train_on"
_LIMIT = 5.0
"""Time limit for grading one training response, in seconds; a response above it gets the verdict "failed"."""


@dataclass(frozen=True)
class Graders:
    """Graders of the training problems; equal on every rank."""

    names: tuple[str | None, ...] = (None,)
    """Name of the grader of each dataset; None: its responses are not graded."""
    starts: tuple[int, ...] = (0,)
    """First prompt id of each dataset."""

    def of(self, prompt: Prompt) -> str | None:
        """Return the name of the grader for ``prompt``; None if its responses are not graded."""
        name = self.names[bisect_right(self.starts, prompt.prompt_id) - 1]
        return name if prompt.problem.answer else None


def find_graders(config: Config, prompts: Prompts) -> Graders:
    """Return the graders of data.train; call it on one rank only, because it may start a worker process.

    A dataset is graded if it has an env_name, and if most of a sample of its gold answers are usable.
    Raises UserError if distillation.train_on is not all, but a dataset or a problem cannot be graded.
    """
    required, names = config.distillation.train_on != "all", []
    with Grader(SECONDS) as grade:
        for i, (key, dataset) in enumerate(keyed(config.data.train, _KEY)):
            indices = _indices(prompts, i)
            if required:
                _check_required(config, (prompts[index] for index in indices), key, dataset)
            golds = [gold for index in sample_of(indices) if (gold := prompts[index].problem.answer)]
            refusal = _refusal(golds, key, dataset.env_name, grade)
            if refusal is not None and required:
                raise refusal
            if refusal is not None:
                log.info("train/accuracy does not count the responses to %s: %s", key, refusal)
            names.append(dataset.env_name if refusal is None else None)
    return Graders(tuple(names), prompts.starts)


def _indices(prompts: Prompts, number: int) -> range:
    """Return the indices of the prompts of the dataset ``number``."""
    bounds = [*prompts.starts, prompts.prompt_ids[-1] + 1]
    first, end = (bisect_left(prompts.prompt_ids, bound) for bound in bounds[number : number + 2])
    return range(first, end)


def _check_required(config: Config, own: Iterable[Prompt], key: str, dataset: DatasetConfig) -> None:
    """Raise UserError if the responses to some of the prompts ``own`` of a dataset cannot be graded."""
    setting = f"{_TRAIN_ON}={config.distillation.train_on}"
    if dataset.env_name is None:
        raise UserError(
            f"{setting} requires a grader, but {key}.env_name=null",
            f"set {key}.env_name to math, exact, regex or choice, or {_TRAIN_ON}=all",
            key=f"{key}.env_name",
        )
    for prompt in own:
        problem = prompt.problem
        if not problem.answer:
            raise UserError(
                f"{setting} requires a gold answer for every problem, but problem {prompt.prompt_id + 1} of data.train"
                f" ({problem.source}: {problem.text[:40]!r}) has none",
                f"set {key}.output_key to the column of the gold answers, remove the problem, or set {_TRAIN_ON}=all",
                key=f"{key}.output_key",
                value=dataset.output_key,
            )
        check_gold(dataset.env_name, problem.answer, key)


def _refusal(golds: Sequence[str], key: str, name: str | None, grade: Grader) -> UserError | None:
    """Return why the grader ``name`` cannot use a sample of ``golds``, or None; starts no process for numbers."""
    if name is None or not golds:
        return None
    try:
        check_grader(name, key)
    except MissingError as error:
        return error
    unusable = unusable_golds(golds, name, grade)
    if 2 * len(unusable) <= len(golds):
        return None
    pair = pattern_for(unusable)
    return UserError(
        f"{len(unusable)} of {len(golds)} checked gold answers are unusable for {key}.env_name={name} (for example"
        f" {shortened(unusable[0])!r})",
        f"set {key}.output_pattern='{pair[1]}', which extracts the text after {pair[0]}"
        if pair
        else f"set {key}.output_key to the column of the final answers, or {key}.env_name to another grader",
        key=f"{key}.env_name",
        value=name,
    )


def gold_hashes(config: Config, problems: Iterable[Problem]) -> ContentHashes:
    """Return a hash of the graders and gold answers if they select responses (distillation.train_on); else empty."""
    if config.distillation.train_on == "all":
        return {}
    graders = [dataset.env_name for dataset in config.data.train]
    return {"golds": content_hash([*graders, *(problem.answer for problem in problems)])}


class TrainGrader:
    """Grades training responses on the rank that has them; its worker processes run until ``close``.

    ``decode`` returns the text of token ids, with special tokens. ``think_tags``: tags of a think block.
    """

    def __init__(
        self, graders: Graders, decode: Callable[[Sequence[int]], str], think_tags: tuple[str, str] = THINK_TAGS
    ) -> None:
        self._graders, self._decode, self._think_tags = graders, decode, think_tags
        self._grade = Grader(_LIMIT)

    def verdict(self, rollout: Rollout) -> Verdict | None:
        """Return the grade of a response; None if the response is not graded. Not for several threads at a time.

        Raises RuntimeError if the worker process of a grader does not start.
        """
        prompt, name = rollout.prompt, self._graders.of(rollout.prompt)
        if name is None:
            return None
        ids = rollout.response_ids[:-1] if rollout.finish == "stop" else rollout.response_ids
        inside, tags = prompt.inside_thought, self._think_tags
        return self._grade(name, self._decode(ids), prompt.problem.answer, think_tags=tags, inside_thought=inside)

    def close(self) -> None:
        """End the worker processes."""
        self._grade.close()
