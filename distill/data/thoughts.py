"""Whether a prompt ends inside an open thought, and the spans of thought in a text.

Chat templates of reasoning models may end the generation prompt with an opening tag (``<think>``). The response then
begins inside the thought and holds only the closing tag.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distill.data.grading import THINK_TAGS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distill.config import TraceExtractorConfig

log = logging.getLogger(__name__)

_KEY = "distillation.context_distillation.trace_extractor.think_tags"
_TAIL = 256
"""Tokens at a prompt's end that are decoded: more than any generation prompt has."""
_CHUNK = 1000
_END_OF_MESSAGE = "[end of message 5b1c92e7]"
"""Marks where the last message ends in a rendered conversation; a text that no message contains by chance."""
_THINK_LIKE = re.compile(r"(?:<\|?[\w:]*(?:think|thought)\w*\|?>|\[THINK\])\Z", re.IGNORECASE)


def extract_trace(text: str, extractor: TraceExtractorConfig, inside_thought: bool = False) -> str:
    """The span of thought in ``text`` that ``extractor`` selects, without surrounding white space; "" if none.

    A span begins after an opening tag, or at the start of the text with ``inside_thought``, and ends at the first
    closing tag that follows; an opening tag inside a span is part of its text, a closing tag outside of a span is
    ignored. A span without a closing tag is decided by ``extractor.unclosed_span``. So the result with
    ``inside_thought`` is that of the opening tag followed by ``text``. ``type=full_text`` takes all of the text.
    """
    if extractor.type == "full_text":
        return text.strip()
    spans = list(_spans(extractor.think_tags[0] + text if inside_thought else text, extractor))
    if not spans:
        return ""
    return {"first": spans[0], "last": spans[-1], "longest": max(spans, key=len)}[extractor.selection]


def _spans(text: str, extractor: TraceExtractorConfig) -> Iterator[str]:
    (opening, closing), at = extractor.think_tags, 0
    while (start := text.find(opening, at)) >= 0:
        start += len(opening)
        end = text.find(closing, start)
        if end >= 0 or extractor.unclosed_span == "to_end":
            yield text[start : end if end >= 0 else None].strip()
        if end < 0:  # no later span is closed either
            return
        at = end + len(closing)


def extract_column_trace(text: str, extractor: TraceExtractorConfig) -> str:
    """The trace in a dataset's column, whose prompt is not known; "" if none.

    If the first tag is a closing one, with text before it, the column was written by a model whose prompt opened the
    thought: that text is the first span. Otherwise as ``extract_trace``.
    """
    opening, closing = extractor.think_tags
    before, found, _ = text.partition(closing)
    return extract_trace(text, extractor, bool(found and before.strip() and opening not in before))


def inside_thoughts(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[list[dict[str, str]]] | None,
    ids: Sequence[Sequence[int]],
    think_tags: tuple[str, str] = THINK_TAGS,
    template_kwargs: Mapping[str, Any] | None = None,
) -> bytes:
    """For each prompt 1 if it ends inside an open thought, else 0.

    ``ids`` are the prompts' token ids, ``chats`` the conversations that they were rendered from; None for bare text.
    In a rendered conversation only the generation prompt counts: a tag in a message opens nothing. Bare text, also that
    of a tokenizer without a chat template, has no such border: it ends inside a thought if the opening tag is its last
    text. Logs a warning if a generation prompt ends with an opening tag that is not the one of ``think_tags``.
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
            # Rendering again is slow. It is needed only where the tag may be a message's.
            clear = at_the_end and not any(opening in message["content"] for message in chats[i])
            states.append(clear or _opens(_generation_prompt(tokenizer, chats[i], template_kwargs or {}), think_tags))
    if unknown:
        log.warning(
            "the chat template of %s ends a prompt with %s, which opens no thought under %s=[%s, %s]: set it to the"
            " model's opening and closing tag, or traces and grading treat the thoughts as the answer",
            *(tokenizer.name_or_path, unknown, _KEY, *think_tags),
        )
    return bytes(states)


def _opens(text: str, think_tags: tuple[str, str]) -> bool:
    """Whether the last tag in ``text`` is an opening one."""
    return text.rfind(think_tags[0]) > text.rfind(think_tags[1])


def _generation_prompt(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], template_kwargs: Mapping[str, Any]
) -> str:
    """What the chat template writes behind the conversation for the response."""

    def render(messages: list[dict[str, str]], generation: bool) -> str:
        settings = {**template_kwargs, "tokenize": False, "add_generation_prompt": generation}
        return str(tokenizer.apply_chat_template(messages, **settings))

    with_it = render(chat, True)
    try:
        without = render(chat, False)
    except Exception:  # the template is a program of the model: it can fail in any way
        without = ""
    if without and with_it != without and with_it.startswith(without):
        return with_it[len(without) :]
    # The template ignores add_generation_prompt, or ends a conversation without it otherwise.
    last = {**chat[-1], "content": chat[-1]["content"] + _END_OF_MESSAGE}
    return render([*chat[:-1], last], True).rpartition(_END_OF_MESSAGE)[2]
