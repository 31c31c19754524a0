"""Extract the text of think blocks (reasoning in a response), and detect prompts that end inside one.

Chat templates of reasoning models may end the generation prompt with an opening tag (``<think>``). The response then
begins inside the think block and contains only the closing tag.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from distill.data.conversations import Chat, Message
from distill.data.grading import THINK_TAGS
from distill.data.rendering import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distill.config import TraceExtractorConfig

log = logging.getLogger(__name__)

_KEY = "distillation.context_distillation.trace_extractor.think_tags"
_TAIL = 256
"""Number of tokens to decode at the end of a prompt; every generation prompt is assumed to be shorter."""
_CHUNK = 1000
"""Number of prompts that are decoded in one call."""
_END_OF_MESSAGE = "[end of message 5b1c92e7]"
"""Text that marks the end of the last message in a rendered chat; real messages do not contain it."""
_THINK_LIKE = re.compile(r"(?:<\|?[\w:]*(?:think|thought)\w*\|?>|\[THINK\])\Z", re.IGNORECASE)
"""Regular expression for a text that ends with an opening think tag in any common notation."""


def extract_trace(text: str, extractor: TraceExtractorConfig, inside_thought: bool = False) -> str:
    """Return the trace in ``text``: the think block that ``extractor`` selects; "" if there is no block.

    A think block begins after an opening tag and ends at the next closing tag. An opening tag inside a block is part of
    its text; a closing tag outside of a block is ignored. ``extractor.unclosed_span`` defines the treatment of a block
    without a closing tag. ``inside_thought``: whether the text begins inside a block, because the prompt ends with an
    opening tag. ``extractor.type="full_text"`` selects the complete text.
    """
    if extractor.type == "full_text":
        return text.strip()
    blocks = list(_think_blocks(extractor.think_tags[0] + text if inside_thought else text, extractor))
    if not blocks:
        return ""
    return {"first": blocks[0], "last": blocks[-1], "longest": max(blocks, key=len)}[extractor.selection]


def _think_blocks(text: str, extractor: TraceExtractorConfig) -> Iterator[str]:
    (opening, closing), at = extractor.think_tags, 0
    while (start := text.find(opening, at)) >= 0:
        start += len(opening)
        end = text.find(closing, start)
        if end >= 0 or extractor.unclosed_span == "to_end":
            yield text[start : end if end >= 0 else None].strip()
        if end < 0:  # later blocks are not closed either, and another search would take quadratic time
            return
        at = end + len(closing)


def extract_column_trace(text: str, extractor: TraceExtractorConfig) -> str:
    """Return the trace in ``text``, a value of a dataset's trace column; "" if it has no think block.

    If a closing tag comes before any opening tag, the text before the closing tag is the first think block: the value
    is then a response to a prompt that ended with the opening tag. Otherwise the result equals ``extract_trace``.
    """
    opening, closing = extractor.think_tags
    before, found, _ = text.partition(closing)
    return extract_trace(text, extractor, bool(found and before.strip() and opening not in before))


def inside_thoughts(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[list[Message]] | None,
    ids: Sequence[Sequence[int]],
    think_tags: tuple[str, str] = THINK_TAGS,
    template_kwargs: Mapping[str, Any] | None = None,
) -> bytes:
    """Return one byte per prompt: 1 if the prompt ends inside an open think block, else 0.

    ``ids``: the token ids of the prompts; ``chats``: the conversations of the prompts, or None for prompts of plain
    text. In a rendered chat, only tags in the generation prompt count, not tags in messages. If the prompts are plain
    text, or the tokenizer has no chat template, a prompt ends inside a think block if it ends with the opening tag.
    Logs a warning once if a generation prompt ends with an opening tag that is not in ``think_tags``.
    """
    opening = think_tags[0]
    rendered = chats is not None and tokenizer.chat_template is not None
    states = bytearray()
    unknown = ""
    for start in range(0, len(ids), _CHUNK):
        tails = tokenizer.batch_decode(
            [list(one[-_TAIL:]) for one in ids[start : start + _CHUNK]],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        for i, tail in enumerate(map(str.rstrip, tails), start):
            at_the_end = tail.endswith(opening)
            if not rendered or not _opens(tail, think_tags):
                states.append(at_the_end)
                found = _THINK_LIKE.search(tail) if rendered and not at_the_end else None
                unknown = unknown or (found.group() if found else "")
                continue
            assert chats is not None
            # Rendering again is slow. It is needed only if the tag may belong to a message.
            clear = at_the_end and not any(opening in (message["content"] or "") for message in chats[i])
            states.append(clear or _opens(_generation_prompt(tokenizer, chats[i], template_kwargs or {}), think_tags))
    if unknown:
        _warn_of_tag(tokenizer, unknown, think_tags)
    return bytes(states)


@cache  # warn once, although the prompts of a run are passed in many calls
def _warn_of_tag(tokenizer: PreTrainedTokenizerBase, unknown: str, think_tags: tuple[str, str]) -> None:
    log.warning(
        "the chat template of %s ends prompts with %s, which differs from the opening tag in %s=[%s, %s], so the"
        " reasoning is graded together with the answer, and context distillation finds no reasoning to use as a"
        " trace: set this key to the model's opening and closing tag",
        *(tokenizer.name_or_path, unknown, _KEY, *think_tags),
    )


def _opens(text: str, think_tags: tuple[str, str]) -> bool:
    """Return whether the last think tag in ``text`` is the opening tag."""
    return text.rfind(think_tags[0]) > text.rfind(think_tags[1])


def _generation_prompt(
    tokenizer: PreTrainedTokenizerBase, chat: list[Message], template_kwargs: Mapping[str, Any]
) -> str:
    """Return the text that the chat template adds after the last message to start the response."""
    complete = render(tokenizer, chat, template_kwargs)
    try:
        messages_only = render(tokenizer, chat, template_kwargs, add_generation_prompt=False)
    except Exception:  # the template is the model's code and can raise any exception
        messages_only = ""
    if messages_only and complete != messages_only and complete.startswith(messages_only):
        return complete[len(messages_only) :]
    # The template ignores add_generation_prompt, or renders the last message differently without this argument.
    last = {**chat[-1], "content": chat[-1]["content"] + _END_OF_MESSAGE}
    marked = Chat([*chat[:-1], last], getattr(chat, "tools", None))
    return render(tokenizer, marked, template_kwargs).rpartition(_END_OF_MESSAGE)[2]
