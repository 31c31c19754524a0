"""Responses from the dataset for off-policy training: check that they exist, and tokenize them after their prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from distill.config import Config
from distill.data.prompts import Prompts
from distill.data.rendering import token_ids
from distill.data.text_checks import check_ids
from distill.errors import UserError, show
from distill.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_KEY = "distillation.off_policy"
_TAIL = 64
"""Number of tokens at the end of a prompt that are tokenized again together with the reference."""
_MARK = "5b1c92e7"
"""Text of the last message of a rendered example; it marks where the message ends."""


def check_references(config: Config, prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if off-policy training is enabled and a problem has no usable response (reference).

    Logs a warning if prompts end inside a think block that their reference does not close, and if the reasoning of
    references is not used because their prompts end with a closed think block. Reads all problems.
    """
    given = config.distillation.off_policy
    if not given.share:
        return
    tags, unclosed, removed = config.distillation.context_distillation.trace_extractor.think_tags, 0, 0
    closing = tags[1]
    for prompt in prompts:
        reference = prompt.problem.reference
        if not reference.strip():
            raise _missing(given.share, given.column, prompt, prompts.location(prompt.prompt_id))
        unclosed += prompt.inside_thought and closing not in reference
        if _thought(reference, tags) is None or not _ends_closed(tokenizer, _tail(tokenizer, prompt), closing):
            continue
        if not without_thought(reference, tags):
            raise UserError(
                f"the response in {prompts.location(prompt.prompt_id)} has no text after its reasoning, but its prompt"
                " disables reasoning with a closed think block",
                "add the answer to the response, or enable thinking in policy.tokenizer.chat_template_kwargs",
                key=f"{_KEY}.column",
                value=given.column,
            )
        removed += bool(_thought(reference, tags))
    if removed:
        log.warning(
            "%s: the reasoning of %d of %d responses in the dataset is not used, because their prompts end with a"
            " closed think block: enable thinking in policy.tokenizer.chat_template_kwargs to train on the reasoning",
            *(_KEY, removed, len(prompts)),
        )
    if unclosed:
        log.warning(
            "%s: %d of %d prompts end inside a think block, but their responses in the dataset do not contain %s, so"
            " the student learns to write the answer as reasoning: add the reasoning and the closing tag to the"
            " responses, or disable thinking in policy.tokenizer.chat_template_kwargs",
            *(_KEY, unclosed, len(prompts), closing),
        )


def _tail(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """Return the text of the last tokens of ``prompt``."""
    ids = list(prompt.student_ids[-_TAIL:])
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _ends_closed(tokenizer: PreTrainedTokenizerBase, tail: str, closing: str) -> bool:
    """Return whether the chat template ends the prompt with a closed think block."""
    return tokenizer.chat_template is not None and tail.rstrip().endswith(closing)


def _thought(text: str, think_tags: tuple[str, str]) -> str | None:
    """Return the think block at the start of ``text``, to the end if it is not closed; None without a block."""
    opening, closing = think_tags
    if not text.lstrip().startswith(opening):
        return None
    return text.lstrip().removeprefix(opening).partition(closing)[0].strip()


def without_thought(text: str, think_tags: tuple[str, str]) -> str:
    """Return ``text`` without the think block at its start, and the white space after the block."""
    return text if _thought(text, think_tags) is None else text.partition(think_tags[1])[2].lstrip()


def _missing(share: float, column: str | None, prompt: Prompt, location: str) -> UserError:
    where = "an assistant message at the end of the conversation" if column is None else f"a text in column {column}"
    key = f"{_KEY}.column"
    return UserError(
        f"{_KEY}.share={share} with {key}={show(column)} requires {where} for every problem, but"
        f" {location} ({prompt.problem.text[:40]!r}) has none",
        f"add the response, set {key} to the column of the responses, or set {_KEY}.share=0",
        key=key,
        value=column,
    )


class References:
    """Token ids of the responses in the dataset, as a continuation of their prompts.

    ``stop_token_ids``: ids that end a response. ``valid_vocab``: number of valid token ids. ``think_tags``: opening and
    closing tag of a think block. ``template_kwargs``: arguments of the chat template. ``location``: returns the
    location of the problem with a prompt id, for error messages, such as "line 3 of FILE".
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
        valid_vocab: int,
        think_tags: tuple[str, str],
        template_kwargs: dict[str, Any] | None = None,
        location: Callable[[int], str] = "prompt id {} of data.train".format,
    ) -> None:
        self._location = location
        self._tokenizer = tokenizer
        self._stops = frozenset(stop_token_ids)
        self._stop = written_stop_id(tokenizer, stop_token_ids, template_kwargs or {})
        self._valid_vocab = valid_vocab
        self._think_tags = think_tags

    def response_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the token ids of the reference of ``prompt``, with the stop id at the end if a stop id exists.

        The ids continue the text of the prompt: the reference is tokenized together with the end of the prompt, or
        alone if a token would span both. If the prompt ends inside a think block, an opening tag at the start of the
        reference is removed; if it ends with a closed think block, the think block at the start of the reference is
        removed. The response ends at the first stop id in the text. Raises UserError if an id has no embedding.
        """
        tail = _tail(self._tokenizer, prompt)
        text = self._continuation(prompt, tail)
        before, joint, alone = token_ids(self._tokenizer, [tail, tail + text, text])
        ids = joint[len(before) :] if joint[: len(before)] == before else alone
        what = f"the response in {self._location(prompt.prompt_id)}"
        check_ids(self._tokenizer, ids, self._valid_vocab, what, f"{_KEY}.column")
        end = next((i for i, token in enumerate(ids) if token in self._stops), None)
        stop = () if self._stop is None else (self._stop,)
        found = (*ids, *stop) if end is None else tuple(ids[: end + 1])
        if not found:
            raise UserError(
                f"{what} has no text, and no stop token exists",
                "correct the response, or set policy.generation.stop_token_ids",
                key=f"{_KEY}.column",
            )
        return found

    def _continuation(self, prompt: Prompt, tail: str) -> str:
        """Return the reference without the opening think tag, and white space after it, that the prompt contains.

        After a closed think block, the complete think block of the reference is removed.
        """
        text, (opening, closing) = prompt.problem.reference, self._think_tags
        if not prompt.inside_thought and _ends_closed(self._tokenizer, tail, closing):
            return without_thought(text, self._think_tags)
        if not (prompt.inside_thought and text.lstrip().startswith(opening)):
            return text
        written, rest = tail.rpartition(opening)[2], text.lstrip().removeprefix(opening)
        return rest.removeprefix(written) if rest.startswith(written) else rest.lstrip()


def written_stop_id(
    tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int], template_kwargs: dict[str, Any]
) -> int | None:
    """Return the stop id that ends a response from the dataset; None if ``stop_token_ids`` is empty.

    It is the first stop id that the chat template writes after an assistant message. If it writes none, it is the
    tokenizer's EOS id, or else the first of ``stop_token_ids``.
    """
    written = _ids_after_assistant(tokenizer, template_kwargs)
    candidates = [*written, tokenizer.eos_token_id, *stop_token_ids]
    return next((token for token in candidates if token in stop_token_ids), None)


def _ids_after_assistant(tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> list[int]:
    """Return the ids that the chat template writes after an assistant message; empty without a usable template."""
    if tokenizer.chat_template is None:
        return []
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": _MARK}]
    try:
        text = str(tokenizer.apply_chat_template(chat, **{**template_kwargs, "tokenize": False}))
    except Exception:  # the template is a program, which can fail in any way
        return []
    _, found, after = text.rpartition(_MARK)
    return token_ids(tokenizer, [after])[0] if found and after else []
