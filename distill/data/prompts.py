"""Prompts: problems filled into a prompt file, put through the chat template, and dealt out in an order that depends on
nothing but (seed, step)."""

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
from typing import TYPE_CHECKING, Any, overload

from distill.config.template import Template
from distill.data.content import TOKENS, Content, changed_parts, subjects
from distill.data.grading import THINK_TAGS
from distill.data.sources import keyed, load_dataset_problems
from distill.data.table import Problems
from distill.data.template import read_prompt_file, read_text
from distill.data.thoughts import inside_thoughts
from distill.errors import UserError, reason
from distill.types import Problem, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distill.config import DatasetConfig

logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]

_CHUNK = 1000
"""Conversations rendered and tokenised at a time."""
_RANDOM, _RENDERINGS = ("random", "lipsum"), 16
"""Jinja's names that draw random numbers, and how many renderings of one conversation are compared."""


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Messages], template_kwargs: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """The token ids of each conversation, ready for the model's response.

    They end with the chat template's generation prompt. As in transformers and vLLM, a template writes all special
    tokens itself, BOS too: the tokenizer adds none. A tokenizer without a chat template reads the messages' bare texts,
    blank lines between them, after its own BOS (see token_ids). ``template_kwargs`` go to the chat template
    (``enable_thinking``, say). Raises UserError where the template refuses a conversation.
    """
    if not chats:
        return []
    if tokenizer.chat_template is None:
        return token_ids(tokenizer, ["\n\n".join(m["content"] for m in chat) for chat in chats], special_tokens=True)
    kwargs = dict(template_kwargs or {})
    _raise_if_random(tokenizer, chats[0], kwargs)
    return token_ids(tokenizer, _rendered(tokenizer, chats, kwargs))


def _rendered(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Messages], kwargs: dict[str, Any]) -> list[str]:
    ours = {"tokenize": False, "add_generation_prompt": True}
    if ours.keys() & kwargs.keys():
        keys = " and ".join(sorted(ours.keys() & kwargs.keys()))
        raise UserError(
            f"policy.tokenizer.chat_template_kwargs sets {keys}, which a prompt needs as it is: take it out"
        )
    try:
        return [str(tokenizer.apply_chat_template(chat, **ours, **kwargs)) for chat in chats]
    except Exception as error:  # the template is a program of the model's: it can fail in any way
        roles = ", ".join(message["role"] for message in chats[0])
        remedy = "change policy.tokenizer.chat_template_kwargs or policy.tokenizer.chat_template"
        if isinstance(tokenizer.chat_template, dict) and "chat_template" not in kwargs:
            names = ", ".join(tokenizer.chat_template)
            remedy = f"set policy.tokenizer.chat_template_kwargs.chat_template to one of {names}, or {remedy}"
        if chats[0][0]["role"] == "system":
            remedy = f"leave out data.default.system_prompt_file, or {remedy}"
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} refuses a conversation of {roles} ({reason(error)}):"
            f" {remedy}"
        ) from None


def _raise_if_random(tokenizer: PreTrainedTokenizerBase, chat: Messages, kwargs: dict[str, Any]) -> None:
    """Refuse a chat template that draws random numbers: ranks and resumed runs could not render the same prompts."""
    sources = f"{tokenizer.chat_template} {kwargs.get('chat_template')}"
    if not any(name in sources for name in _RANDOM):
        return
    if len(set(_rendered(tokenizer, [chat] * _RENDERINGS, kwargs))) > 1:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} writes another text each time it renders one conversation"
            f" ({' or '.join(_RANDOM)}), so no run could be resumed: remove the random part from the template"
        )


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special_tokens: bool = False
) -> list[list[int]]:
    """The token ids of each text; ``special_tokens``: after the tokens that the tokenizer puts before a text (BOS).

    BOS is never doubled where the text begins with it, and nothing is appended: a prompt must not end in EOS.
    """
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    opening = opening_ids(tokenizer) if special_tokens else []
    return [row if row[: len(opening)] == opening else opening + row for row in ids]


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text: BOS in most models, none in others."""
    bare, full = (tokenizer("a", add_special_tokens=added, verbose=False)["input_ids"] for added in (False, True))
    starts = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    return list(full[: next(starts, 0)])


@dataclass(frozen=True)
class Prompts:
    """The prompts of a list of datasets, in the datasets' order, those that are too long left out.

    Token ids are kept in one array: 4 bytes a token, and a Prompt is made when it is asked for.
    """

    problems: Sequence[Problem]
    prompt_ids: tuple[int, ...]
    """Each prompt's place in the list of all problems, repeats and skipped ones counted."""
    tokens: array[int]
    bounds: array[int]
    """len + 1 cumulative token counts."""
    skipped: int
    """How many prompts were too long."""
    inside_thought: bytes = b""
    """One byte a prompt: 1 if it ends inside an open thought, else 0. Empty: none does."""

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
        """A hash of every prompt's id and tokens: another dataset, prompt file or chat template has another one."""
        digest = hashlib.sha256(array("q", self.prompt_ids).tobytes())
        digest.update(self.bounds.tobytes())
        digest.update(self.tokens.tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def sums(self) -> array[int]:
        """A 32-bit sum of each prompt's tokens, to tell how many of another list's prompts are other ones."""
        bounds = zip(self.bounds, self.bounds[1:], strict=False)
        return array("I", (zlib.crc32(self.tokens[begin:end].tobytes()) for begin, end in bounds))


def load_prompts(
    datasets: Sequence[DatasetConfig],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    template_kwargs: Mapping[str, Any] | None = None,
    where: str = "data.train",
    trace_column: str | None = None,
    trace_needed: bool = True,
    think_tags: tuple[str, str] = THINK_TAGS,
) -> Prompts:
    """Load the datasets and tokenise their prompts, each with its own prompt file and system prompt.

    A prompt of more than ``max_tokens`` tokens is skipped and counted. ``where`` is the key that a message names,
    ``trace_column`` a column that every problem must have (see load_problems), or may have without ``trace_needed``.
    ``think_tags`` open and close a thought (see inside_thoughts).
    Every rank gets the same from the same arguments, without talking to the others. Raises UserError for what the user
    can put right, also if no prompt is left.
    """
    problems: list[Problems] = []
    rows: list[array[int]] = []
    inside = bytearray()
    for key, dataset in keyed(datasets, where):
        wording = _Wording.of(dataset, key)
        found = load_dataset_problems(dataset, key, trace_column, trace_needed)
        once = found[: len(found) // dataset.repeat]
        chats = _Chats(wording, once)
        found_rows = _tokenised(tokenizer, chats, template_kwargs)
        inside += inside_thoughts(tokenizer, chats, found_rows, think_tags, template_kwargs) * dataset.repeat
        rows += found_rows * dataset.repeat
        problems.append(found)
    return _fitting(Problems.joined(problems), rows, inside, max_tokens, where)


@dataclass(frozen=True)
class _Wording:
    """What stands around the problems of one dataset."""

    prompt: Template | None
    system: str | None

    @classmethod
    def of(cls, dataset: DatasetConfig, where: str) -> _Wording:
        prompt_file, system_file = dataset.prompt_file, dataset.system_prompt_file
        return cls(
            read_prompt_file(prompt_file, f"{where}.prompt_file") if prompt_file else None,
            read_text(system_file, f"{where}.system_prompt_file") if system_file else None,
        )

    def chat(self, problem: Problem) -> Messages:
        system = [{"role": "system", "content": self.system}] if self.system else []
        text = self.prompt.fill({"": problem.text}) if self.prompt else problem.text
        return [*system, {"role": "user", "content": text}]


@dataclass(frozen=True)
class _Chats(Sequence[Messages]):
    """The conversations of a dataset's problems, each made when it is read: all at once they would fill the memory."""

    wording: _Wording
    problems: Problems

    def __len__(self) -> int:
        return len(self.problems)

    @overload
    def __getitem__(self, place: int) -> Messages: ...
    @overload
    def __getitem__(self, place: slice) -> list[Messages]: ...
    def __getitem__(self, place: int | slice) -> Messages | list[Messages]:
        if isinstance(place, slice):
            return [self.wording.chat(problem) for problem in self.problems[place]]
        return self.wording.chat(self.problems[place])


def _tokenised(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Messages], template_kwargs: Mapping[str, Any] | None
) -> list[array[int]]:
    rows: list[array[int]] = []
    for start in range(0, len(chats), _CHUNK):
        rows += [array("i", ids) for ids in chat_ids(tokenizer, chats[start : start + _CHUNK], template_kwargs)]
        if len(rows) % (10 * _CHUNK) == 0:
            logger.info("tokenised %d of %d prompts", len(rows), len(chats))
    return rows


def _fitting(
    problems: Problems, rows: Sequence[array[int]], inside_thought: bytearray, max_tokens: int, where: str
) -> Prompts:
    """The prompts of at most ``max_tokens`` tokens; says how many there are, and warns of those left out."""
    kept = [i for i, ids in enumerate(rows) if len(ids) <= max_tokens]
    skipped = len(rows) - len(kept)
    remedy = "raise data.max_input_seq_length and policy.max_total_sequence_length, or shorten the problems"
    if not kept:
        raise UserError(f"{where}: all {len(rows)} prompts are longer than {max_tokens} tokens: {remedy}")
    if skipped:
        longest = max(map(len, rows))
        logger.warning(
            "%s: %d of %d prompts are longer than %d tokens (the longest has %d) and are skipped: %s",
            *(where, skipped, len(rows), max_tokens, longest, remedy),
        )
    logger.info("%s: %d prompts", where, len(kept))
    tokens, bounds = array("i"), array("q", [0])
    for i in kept:
        tokens.extend(rows[i])
        bounds.append(len(tokens))
    inside = bytes(inside_thought[i] for i in kept)
    return Prompts(problems.select(kept), tuple(kept), tokens, bounds, skipped, inside)


@dataclass(frozen=True)
class PromptOrder:
    """Which prompts a step takes: a pure function of (seed, step), the same on every rank. Steps count from 0.

    Every epoch has its own permutation, by (seed, epoch), cut into batches of ``num_prompts_per_step``; the rest at the
    end of an epoch that fills no batch is left out of that epoch. With ``shuffle`` off the order is the datasets'.
    Raises UserError if there are fewer prompts than one step takes.
    """

    prompts: Prompts
    num_prompts_per_step: int
    seed: int
    shuffle: bool = True
    inputs: Content = field(default_factory=dict)
    """Hashes of what the prompts and the teacher's prefixes are made from."""

    def __post_init__(self) -> None:
        n = len(self.prompts)
        if not 1 <= self.num_prompts_per_step <= n:
            raise UserError(
                f"distillation.num_prompts_per_step={self.num_prompts_per_step} does not fit the {n} prompts of "
                f"data.train: set it to 1..{n}, or raise data.train.repeat"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the prompts."""
        return len(self.prompts) // self.num_prompts_per_step

    def steps(self, max_num_steps: int, max_num_epochs: int) -> int:
        """How many steps a whole run takes: until the first of the two limits."""
        return min(max_num_steps, max_num_epochs * self.steps_per_epoch)

    def epoch(self, step: int) -> int:
        """The epoch that ``step`` belongs to, from 0."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> tuple[Prompt, ...]:
        """The prompts of ``step``."""
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
        """The latest epoch's permutation, kept because a shuffle of 100k takes longer than a batch."""
        return {}

    @property
    def content(self) -> Content:
        """``inputs``, and the hash of the tokens that follow from them."""
        return {**self.inputs, TOKENS: self.prompts.fingerprint}

    def state(self, step: int) -> dict[str, Any]:
        """The position before ``step``, for a checkpoint: plain JSON."""
        return {
            "step": step,
            "epoch": self.epoch(step),
            "step_in_epoch": step % self.steps_per_epoch,
            "seed": self.seed,
            "shuffle": int(self.shuffle),
            "num_prompts_per_step": self.num_prompts_per_step,
            "num_prompts": len(self.prompts),
            "fingerprint": self.prompts.fingerprint,
            "content": dict(self.content),
            "sums": base64.b85encode(self.prompts.sums.tobytes()).decode(),
        }

    def changes(self, state: Mapping[str, Any]) -> list[str]:
        """What differs from a saved position's data, prompts and order of prompts, one phrase each.

        The seed may differ: then only the steps from here on have another order. A position of an earlier version holds
        the hash of the tokens alone.
        """
        then: Content = state.get("content", {TOKENS: state["fingerprint"]})
        changes = []
        if parts := changed_parts(then, self.content):
            changes.append(f"{subjects(parts, known=len(then) > 1)} changed{self._difference(state)}")
        return changes + [
            f"{key} was {type(now)(state[name])} and is {now}"
            for name, key in _SETTINGS.items()
            if state[name] != (now := getattr(self, name))
        ]

    def _difference(self, state: Mapping[str, Any]) -> str:
        """In brackets, how many prompts a saved position had and how many are other ones; empty where none is."""
        if state["fingerprint"] == self.prompts.fingerprint:
            return ""
        then = Counter(array("I", base64.b85decode(str(state["sums"]))))
        now = Counter(self.prompts.sums)
        gone, new = (then - now).total(), (now - then).total()
        if not gone and not new:
            return f" (its {now.total()} prompts are the same in another order)"
        return f" (of its {then.total()} prompts {gone} are gone, and of the {now.total()} now {new} are new)"


_SETTINGS = {"shuffle": "data.shuffle", "num_prompts_per_step": "distillation.num_prompts_per_step"}
"""The fields that make the order of prompts, and the keys they come from."""
