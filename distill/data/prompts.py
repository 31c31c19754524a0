"""Render problems into tokenized prompts, and select the prompts of each training step."""

from __future__ import annotations

import base64
import hashlib
import logging
import random
import zlib
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

from distill.data.columns import TextColumn
from distill.data.content import TOKENS, ContentHashes, changed_parts, describe_change
from distill.data.conversations import Chat
from distill.data.grading import THINK_TAGS
from distill.data.prompt_files import PromptFormat, read_datasets
from distill.data.rendering import chat_ids
from distill.data.rendering_checks import TemplateCheck
from distill.data.table import Problems
from distill.data.thoughts import inside_thoughts
from distill.errors import UserError
from distill.types import Problem, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distill.config import DatasetConfig

log = logging.getLogger(__name__)


_CHUNK = 1000
"""Number of conversations that are rendered and tokenized in one batch."""


@dataclass(frozen=True)
class Prompts:
    """Tokenized prompts of a list of datasets, in order; prompts that are too long are left out.

    All token ids are in one array (4 bytes per token). A Prompt is created on access.
    """

    problems: Sequence[Problem]
    """Problem of each prompt."""
    prompt_ids: tuple[int, ...]
    """Index of each prompt in the list of all problems, ascending; it counts repeated problems and skipped prompts."""
    tokens: array[int]
    """Concatenated token ids of all prompts."""
    bounds: array[int]
    """Start of each prompt in ``tokens``, then len(tokens): prompt i is tokens[bounds[i]:bounds[i + 1]]."""
    skipped: int
    """Number of prompts that were left out because they are too long."""
    inside_thought: bytes = b""
    """One byte per prompt: 1 if it ends inside a think block (after ``<think>``), else 0; b"": all are 0."""
    starts: tuple[int, ...] = (0,)
    """First prompt id of each dataset, in the order of the datasets."""

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, i: int) -> Prompt:
        if not 0 <= i < len(self):
            raise IndexError(i)
        ids = tuple(self.tokens[self.bounds[i] : self.bounds[i + 1]])
        return Prompt(self.prompt_ids[i], ids, self.problems[i], any(self.inside_thought[i : i + 1]))

    def __iter__(self) -> Iterator[Prompt]:
        return (self[i] for i in range(len(self)))

    def location(self, prompt_id: int) -> str:
        """Return the location of the prompt with the id ``prompt_id`` for messages, such as "line 3 of FILE"."""
        if not isinstance(self.problems, Problems):
            return f"problem {prompt_id + 1} of data.train"
        return self.problems.location(bisect_left(self.prompt_ids, prompt_id))

    def find(self, prompt_id: int, student_ids: tuple[int, ...]) -> Prompt | None:
        """Return the prompt with this id if it has these token ids, otherwise None."""
        i = bisect_left(self.prompt_ids, prompt_id)
        found = self[i] if i < len(self) and self.prompt_ids[i] == prompt_id else None
        return found if found is not None and found.student_ids == student_ids else None

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of the prompt indices (``prompt_ids``) and token ids of all prompts."""
        digest = hashlib.sha256(array("q", self.prompt_ids).tobytes())
        digest.update(self.bounds.tobytes())
        digest.update(self.tokens.tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def checksums(self) -> array[int]:
        """Return a 32-bit checksum of the token ids of each prompt.

        A resume compares the checksums with those in the checkpoint, to count the changed prompts.
        """
        bounds = zip(self.bounds, self.bounds[1:], strict=False)
        return array("I", (zlib.crc32(self.tokens[begin:end].tobytes()) for begin, end in bounds))


def load_prompts(
    datasets: Sequence[DatasetConfig],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    template_kwargs: Mapping[str, Any] | None = None,
    key: str = "data.train",
    trace_column: str | None = None,
    trace_required: bool = True,
    think_tags: tuple[str, str] = THINK_TAGS,
    extra: Sequence[TextColumn] = (),
    reference: TextColumn | None = None,
) -> Prompts:
    """Load the datasets and tokenize their prompts.

    Each dataset may set its own prompt file and system prompt file. Prompts of more than ``max_tokens`` tokens are
    skipped and counted. ``key``: the datasets' configuration key, for error messages. ``trace_column``: the column with
    reasoning for the teacher, or None; ``extra``: other columns that the teacher reads; ``trace_required``: whether
    each row must have these columns. ``reference``: the column of the reference responses, see ``load_problems``.
    ``think_tags``: the tags that begin and end the reasoning in a response. The result depends only on the arguments
    and files, so it is equal on all ranks. Raises UserError for invalid data and if all prompts are too long.
    """
    problems: list[Problems] = []
    rows: list[array[int]] = []
    inside = bytearray()
    starts = []
    read = read_datasets(datasets, key, trace_column, trace_required, extra, reference, think_tags)
    for dataset, prompt_format, found in read:
        chats = _Chats(prompt_format, found[: len(found) // dataset.repeat])  # repetitions are tokenized once
        found_rows = _tokenized(tokenizer, chats, template_kwargs)
        inside += inside_thoughts(tokenizer, chats, found_rows, think_tags, template_kwargs) * dataset.repeat
        starts.append(len(rows))
        rows += found_rows * dataset.repeat
        problems.append(found)
    return replace(
        _without_long_prompts(Problems.joined(problems), rows, inside, max_tokens, key), starts=tuple(starts)
    )


@dataclass(frozen=True)
class _Chats(Sequence[Chat]):
    """Conversations for the problems of a dataset, created on access to save memory."""

    format: PromptFormat
    problems: Problems

    def __len__(self) -> int:
        return len(self.problems)

    @overload
    def __getitem__(self, at: int) -> Chat: ...
    @overload
    def __getitem__(self, at: slice) -> list[Chat]: ...
    def __getitem__(self, at: int | slice) -> Chat | list[Chat]:
        if isinstance(at, slice):
            return [self.format.chat(problem) for problem in self.problems[at]]
        return self.format.chat(self.problems[at])


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, chats: _Chats, template_kwargs: Mapping[str, Any] | None
) -> list[array[int]]:
    rows: list[array[int]] = []
    check = TemplateCheck(tokenizer, template_kwargs) if chats.problems.has_conversations else None
    for start in range(0, len(chats), _CHUNK):
        chunk, problems = chats[start : start + _CHUNK], chats.problems[start : start + _CHUNK]
        rows += [array("i", ids) for ids in chat_ids(tokenizer, chunk, template_kwargs, location=problems.location)]
        if check is not None:
            check(chunk, problems.location)
        if len(rows) % (10 * _CHUNK) == 0:
            log.info("tokenized %d of %d prompts", len(rows), len(chats))
    return rows


def _without_long_prompts(
    problems: Problems, rows: Sequence[array[int]], inside_thought: bytearray, max_tokens: int, key: str
) -> Prompts:
    kept = [i for i, ids in enumerate(rows) if len(ids) <= max_tokens]
    skipped = len(rows) - len(kept)
    fix = "raise data.max_input_seq_length and policy.max_total_sequence_length, or shorten the problems"
    if not kept:
        raise UserError(f"{key}: all {len(rows)} prompts are longer than {max_tokens} tokens", fix, key=key)
    if skipped:
        log.warning(
            "%s: skipping %d of %d prompts that are longer than %d tokens (longest: %d): %s",
            *(key, skipped, len(rows), max_tokens, max(map(len, rows)), fix),
        )
    log.info("%s: loaded %d prompts", key, len(kept))
    tokens, bounds = array("i"), array("q", [0])
    for i in kept:
        tokens.extend(rows[i])
        bounds.append(len(tokens))
    inside = bytes(inside_thought[i] for i in kept)
    return Prompts(problems.select(kept), tuple(kept), tokens, bounds, skipped, inside)


@dataclass(frozen=True)
class PromptOrder:
    """Order of the training prompts: the batch of prompts of each step, identical on all ranks.

    Steps count from 0. Each epoch is a permutation of all prompts, derived from (seed, epoch) and split into batches of
    ``num_prompts_per_step``. An incomplete last batch is dropped. Raises UserError for fewer prompts than one batch.
    """

    prompts: Prompts
    """All training prompts, in the order of the datasets."""
    num_prompts_per_step: int
    """Number of prompts in the batch of one step."""
    seed: int
    """Seed of the permutations of all epochs."""
    shuffle: bool = True
    """Whether each epoch permutes the prompts; false: prompts keep the order of the datasets."""
    input_hashes: ContentHashes = field(default_factory=dict)
    """Maps each input of the student's and teacher's prompts, such as ``problems``, to its hash."""

    def __post_init__(self) -> None:
        n = len(self.prompts)
        if not 1 <= self.num_prompts_per_step <= n:
            raise UserError(
                f"distillation.num_prompts_per_step={self.num_prompts_per_step} must be between 1 and {n}, the number"
                " of prompts in data.train",
                f"set it to at most {n}, or increase data.train.repeat",
                key="distillation.num_prompts_per_step",
                value=self.num_prompts_per_step,
            )

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of steps per epoch: the number of full batches in one epoch."""
        return len(self.prompts) // self.num_prompts_per_step

    def steps(self, max_num_steps: int, max_num_epochs: int) -> int:
        """Return the number of steps of the run, limited by ``max_num_steps`` and by ``max_num_epochs``."""
        return min(max_num_steps, max_num_epochs * self.steps_per_epoch)

    def epoch(self, step: int) -> int:
        """Return the epoch of ``step``, counted from 0."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> tuple[Prompt, ...]:
        """Return the batch of prompts of ``step``."""
        start = step % self.steps_per_epoch * self.num_prompts_per_step
        order = self._permutation(self.epoch(step))
        return tuple(self.prompts[i] for i in order[start : start + self.num_prompts_per_step])

    def _permutation(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(len(self.prompts))
        if epoch not in self._permutations:
            self._permutations.clear()
            order = list(range(len(self.prompts)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._permutations[epoch] = order
        return self._permutations[epoch]

    @cached_property
    def _permutations(self) -> dict[int, list[int]]:
        """Return a cache that maps the last used epoch to the permutation of prompt indices in this epoch."""
        return {}

    @property
    def content_hashes(self) -> ContentHashes:
        """Return ``input_hashes`` with the additional entry ``tokens``, the hash of the tokenized prompts."""
        return {**self.input_hashes, TOKENS: self.prompts.fingerprint}

    def state(self, step: int) -> dict[str, Any]:
        """Return JSON values for a checkpoint before ``step``: position in the data, settings and hashes.

        The entry ``sums`` has the prompts' checksums in base85, so that a resume can count the changed prompts.
        """
        return {
            "step": step,
            "epoch": self.epoch(step),
            "step_in_epoch": step % self.steps_per_epoch,
            "seed": self.seed,
            "shuffle": int(self.shuffle),
            "num_prompts_per_step": self.num_prompts_per_step,
            "num_prompts": len(self.prompts),
            "fingerprint": self.prompts.fingerprint,
            "content": dict(self.content_hashes),
            "sums": base64.b85encode(self.prompts.checksums.tobytes()).decode(),
        }

    def changes(self, state: Mapping[str, Any]) -> list[str]:
        """Return one phrase per difference between this order and ``state``, the state in a checkpoint.

        The inputs of the prompts and the fields in ``_SETTINGS`` are compared. The seed is not compared, because it
        changes only the order of later prompts. A checkpoint of an earlier program version has no hashes of the inputs;
        then only the hash of the tokenized prompts is compared. Phrases about settings equal those of
        ``recipe_diff.changed_keys``, so that a resume can remove duplicates.
        """
        saved: ContentHashes = state.get("content", {TOKENS: state["fingerprint"]})
        changes = []
        if parts := changed_parts(saved, self.content_hashes):
            change = describe_change(parts, all_compared=len(saved) > 1)
            changes.append(f"{change}{self._count_changed_prompts(state)}")
        return changes + [
            f"{key} was {type(now)(state[name])} and is {now}"
            for name, key in _SETTINGS.items()
            if state[name] != (now := getattr(self, name))
        ]

    def _count_changed_prompts(self, state: Mapping[str, Any]) -> str:
        """Return the changes of the prompts as text, such as " (2 of 9 prompts removed, 1 added)".

        ``state``: the state in the checkpoint to compare with. Returns "" if no prompt changed, and a text about the
        order if only the order of the prompts changed.
        """
        if state["fingerprint"] == self.prompts.fingerprint:
            return ""
        before = Counter(array("I", base64.b85decode(str(state["sums"]))))
        after = Counter(self.prompts.checksums)
        removed, added = (before - after).total(), (after - before).total()
        if not removed and not added:
            return f" (same {after.total()} prompts in a different order)"
        return f" ({removed} of {before.total()} prompts removed, {added} added)"


_SETTINGS = {"shuffle": "data.shuffle", "num_prompts_per_step": "distillation.num_prompts_per_step"}
"""Maps each field of PromptOrder that is compared on resume to its configuration key."""
