"""Render problems into tokenized prompts, and select the prompts of each training step."""

from __future__ import annotations

import base64
import hashlib
import logging
import random
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from distill.data.content import TOKENS, ContentHashes, changed_parts, describe_change
from distill.data.grading import THINK_TAGS
from distill.data.prompt_files import Messages, PromptFormat, read_datasets
from distill.data.table import Problems
from distill.data.thoughts import inside_thoughts
from distill.errors import UserError, reason
from distill.types import Problem, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distill.config import DatasetConfig

log = logging.getLogger(__name__)


class TemplateKeys(NamedTuple):
    """Names of the configuration keys of a chat template, for error messages."""

    template: str
    """Configuration key for the path of the template file."""
    kwargs: str
    """Configuration key for the arguments of the template."""


_STUDENT_KEYS = TemplateKeys("policy.tokenizer.chat_template", "policy.tokenizer.chat_template_kwargs")

_CHUNK = 1000
"""Number of conversations that are rendered and tokenized in one batch."""
_RANDOM, _RENDERINGS = ("random", "lipsum"), 16
"""Jinja functions with random results; number of test renderings of a template that calls one."""


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Messages],
    template_kwargs: Mapping[str, Any] | None = None,
    keys: TemplateKeys = _STUDENT_KEYS,
) -> list[list[int]]:
    """Return the token ids of each conversation, ending with the chat template's generation prompt.

    As in transformers and vLLM, the template writes all special tokens, including BOS; the tokenizer adds none. Without
    a chat template, the messages' texts are joined by blank lines, and the tokenizer's BOS is added (see token_ids).
    ``template_kwargs``: arguments of the chat template, such as ``enable_thinking``. ``keys``: the template's
    configuration keys, for error messages. Raises UserError if the template rejects a conversation, or renders the same
    conversation to different texts.
    """
    if not chats:
        return []
    if tokenizer.chat_template is None:
        return token_ids(tokenizer, ["\n\n".join(m["content"] for m in chat) for chat in chats], special_tokens=True)
    kwargs = dict(template_kwargs or {})
    _raise_if_random(tokenizer, chats[0], kwargs, keys)
    return token_ids(tokenizer, _rendered(tokenizer, chats, kwargs, keys))


def _rendered(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Messages], kwargs: dict[str, Any], keys: TemplateKeys
) -> list[str]:
    fixed = {"tokenize": False, "add_generation_prompt": True}
    if reserved := sorted(fixed.keys() & kwargs.keys()):
        raise UserError(
            f"{keys.kwargs} sets the reserved arguments {' and '.join(reserved)}",
            f"remove these arguments from {keys.kwargs}",
            key=f"{keys.kwargs}.{reserved[0]}",
            value=kwargs[reserved[0]],
        )
    try:
        return [str(tokenizer.apply_chat_template(chat, **fixed, **kwargs)) for chat in chats]
    except Exception as error:  # a template is a program, which can fail in any way
        raise _rejected(tokenizer, chats[0], kwargs, keys, error) from None


def _rejected(
    tokenizer: PreTrainedTokenizerBase,
    chat: Messages,
    kwargs: Mapping[str, Any],
    keys: TemplateKeys,
    error: Exception,
) -> UserError:
    roles = ", ".join(message["role"] for message in chat)
    fix = f"change {keys.kwargs} or {keys.template}"
    if isinstance(tokenizer.chat_template, dict) and "chat_template" not in kwargs:
        fix = f"set {keys.kwargs}.chat_template to one of {', '.join(tokenizer.chat_template)}, or {fix}"
    if chat[0]["role"] == "system":
        fix = f"remove data.default.system_prompt_file, or {fix}"
    return UserError(
        f"the chat template of {tokenizer.name_or_path} rejects a conversation with the roles {roles}"
        f" ({reason(error)})",
        fix,
        key=keys.template,
    )


def _raise_if_random(
    tokenizer: PreTrainedTokenizerBase, chat: Messages, kwargs: dict[str, Any], keys: TemplateKeys
) -> None:
    """Raise UserError if repeated renderings of ``chat`` differ; all ranks need the same prompts."""
    sources = f"{tokenizer.chat_template} {kwargs.get('chat_template')}"
    if not any(name in sources for name in _RANDOM):
        return
    if len(set(_rendered(tokenizer, [chat] * _RENDERINGS, kwargs, keys))) > 1:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} calls the Jinja function {' or '.join(_RANDOM)} and renders"
            " the same conversation to different texts, but all ranks and all resumes of the run need the same prompts",
            "remove this call from the template",
            key=keys.template,
        )


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special_tokens: bool = False
) -> list[list[int]]:
    """Return the token ids of each text.

    ``special_tokens``: whether the ids begin with the tokenizer's special tokens for the start of a text (BOS). A text
    that already begins with BOS gets no second BOS. EOS is not appended, because a prompt must not end with EOS.
    """
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    opening = opening_ids(tokenizer) if special_tokens else []
    return [row if row[: len(opening)] == opening else opening + row for row in ids]


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the special tokens that the tokenizer adds before a text: usually BOS or no token."""
    bare, full = (tokenizer("a", add_special_tokens=added, verbose=False)["input_ids"] for added in (False, True))
    starts = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    return list(full[: next(starts, 0)])


@dataclass(frozen=True)
class Prompts:
    """Tokenized prompts of a list of datasets, in order; prompts that are too long are left out.

    All token ids are in one array (4 bytes per token). A Prompt is created on access.
    """

    problems: Sequence[Problem]
    """Problem of each prompt."""
    prompt_ids: tuple[int, ...]
    """Index of each prompt in the list of all problems, counting repeated problems and skipped prompts."""
    tokens: array[int]
    """Concatenated token ids of all prompts."""
    bounds: array[int]
    """Start of each prompt in ``tokens``, then len(tokens): prompt i is tokens[bounds[i]:bounds[i + 1]]."""
    skipped: int
    """Number of prompts that were left out because they are too long."""
    inside_thought: bytes = b""
    """One byte per prompt: 1 if it ends inside a think block (after ``<think>``), else 0; b"": all are 0."""

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, i: int) -> Prompt:
        if not 0 <= i < len(self):
            raise IndexError(i)
        ids = tuple(self.tokens[self.bounds[i] : self.bounds[i + 1]])
        return Prompt(self.prompt_ids[i], ids, self.problems[i], any(self.inside_thought[i : i + 1]))

    def __iter__(self) -> Iterator[Prompt]:
        return (self[i] for i in range(len(self)))

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
) -> Prompts:
    """Load the datasets and tokenize their prompts.

    Each dataset may set its own prompt file and system prompt file. Prompts of more than ``max_tokens`` tokens are
    skipped and counted. ``key``: the datasets' configuration key, for error messages. ``trace_column``: the column with
    reasoning for the teacher, or None; ``trace_required``: whether each row must have this column. ``think_tags``: the
    tags that begin and end the reasoning in a response. The result depends only on the arguments and files, so it is
    equal on all ranks. Raises UserError for invalid data and if all prompts are too long.
    """
    problems: list[Problems] = []
    rows: list[array[int]] = []
    inside = bytearray()
    for dataset, prompt_format, found in read_datasets(datasets, key, trace_column, trace_required):
        chats = _Chats(prompt_format, found[: len(found) // dataset.repeat])  # repetitions are tokenized once
        found_rows = _tokenized(tokenizer, chats, template_kwargs)
        inside += inside_thoughts(tokenizer, chats, found_rows, think_tags, template_kwargs) * dataset.repeat
        rows += found_rows * dataset.repeat
        problems.append(found)
    return _without_long_prompts(Problems.joined(problems), rows, inside, max_tokens, key)


@dataclass(frozen=True)
class _Chats(Sequence[Messages]):
    """Conversations for the problems of a dataset, created on access to save memory."""

    format: PromptFormat
    problems: Problems

    def __len__(self) -> int:
        return len(self.problems)

    @overload
    def __getitem__(self, at: int) -> Messages: ...
    @overload
    def __getitem__(self, at: slice) -> list[Messages]: ...
    def __getitem__(self, at: int | slice) -> Messages | list[Messages]:
        if isinstance(at, slice):
            return [self.format.chat(problem) for problem in self.problems[at]]
        return self.format.chat(self.problems[at])


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Messages], template_kwargs: Mapping[str, Any] | None
) -> list[array[int]]:
    rows: list[array[int]] = []
    for start in range(0, len(chats), _CHUNK):
        rows += [array("i", ids) for ids in chat_ids(tokenizer, chats[start : start + _CHUNK], template_kwargs)]
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
