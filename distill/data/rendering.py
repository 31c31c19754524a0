"""Render conversations with a chat template, and tokenize texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from distill.data.conversations import Message
from distill.errors import UserError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Location = Callable[[int], str]
"""Function that returns the location of conversation i for messages, such as "line 3 of FILE"."""


class TemplateKeys(NamedTuple):
    """Names of the configuration keys of a chat template, for error messages."""

    template: str
    """Configuration key for the path of the template file."""
    kwargs: str
    """Configuration key for the arguments of the template."""
    system: str = "data.default.system_prompt_file"
    """Configuration key for the system message."""


STUDENT_KEYS = TemplateKeys("policy.tokenizer.chat_template", "policy.tokenizer.chat_template_kwargs")

_RANDOM, _RENDERINGS = ("random", "lipsum"), 16
"""Jinja functions with random results; number of test renderings of a template that calls one."""


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[list[Message]],
    template_kwargs: Mapping[str, Any] | None = None,
    keys: TemplateKeys = STUDENT_KEYS,
    location: Location | None = None,
) -> list[list[int]]:
    """Return the token ids of each conversation, ending with the chat template's generation prompt.

    Each conversation is rendered once, completely, with its tools. As in transformers and vLLM, the template writes all
    special tokens, including BOS; the tokenizer adds none. Without a chat template, a conversation may only have a
    system and a user message; their texts are joined by a blank line, and the tokenizer's BOS is added (see token_ids).
    ``template_kwargs``: arguments of the chat template, such as ``enable_thinking``. ``keys``: the template's
    configuration keys, for error messages; ``location``: see Location. Raises UserError if the template rejects a
    conversation, or renders the same conversation to different texts.
    """
    if not chats:
        return []
    if tokenizer.chat_template is None:
        texts = [_plain_text(tokenizer, chat, keys, i, location) for i, chat in enumerate(chats)]
        return token_ids(tokenizer, texts, special_tokens=True)
    kwargs = dict(template_kwargs or {})
    _raise_if_random(tokenizer, chats[0], kwargs, keys)
    return token_ids(tokenizer, _rendered(tokenizer, chats, kwargs, keys, location))


def render(
    tokenizer: PreTrainedTokenizerBase,
    chat: list[Message],
    template_kwargs: Mapping[str, Any],
    add_generation_prompt: bool = True,
) -> str:
    """Return the text of ``chat``, a Chat or a list of messages, with the tokenizer's chat template.

    Some templates fail on the content null of a message with tool calls, or write it as "None"; others require it. For
    the former, an empty text replaces null.
    """
    settings = {**template_kwargs, "tokenize": False, "add_generation_prompt": add_generation_prompt}
    if tools := getattr(chat, "tools", None):
        settings["tools"] = tools

    def rendered(messages: list[Message]) -> str:
        return str(tokenizer.apply_chat_template(messages, **settings))

    if all(message.get("content", "") is not None for message in chat):
        return rendered(chat)
    without_null = [{**message, "content": ""} if message.get("content", "") is None else message for message in chat]
    try:
        text = rendered(chat)
    except Exception:  # a template is a program, which can fail in any way
        return rendered(without_null)
    other = rendered(without_null)
    return other if text.count("None") > other.count("None") else text


def _plain_text(
    tokenizer: PreTrainedTokenizerBase, chat: list[Message], keys: TemplateKeys, i: int, location: Location | None
) -> str:
    """Return the text of a conversation without a chat template; raise UserError for tools and several turns."""
    roles = [message["role"] for message in chat]
    if roles not in (["user"], ["system", "user"]) or getattr(chat, "tools", None):
        what = "tools" if getattr(chat, "tools", None) else f"the roles {', '.join(roles)}"
        raise UserError(
            f"{tokenizer.name_or_path} has no chat template, but the conversation{_at(i, location)} has {what}",
            f"set {keys.template} to the path of a Jinja file, or use problems of one user message",
            key=keys.template,
        )
    return "\n\n".join(message["content"] for message in chat)


def _at(i: int, location: Location | None) -> str:
    return "" if location is None else f" in {location(i)}"


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[list[Message]],
    kwargs: dict[str, Any],
    keys: TemplateKeys,
    location: Location | None = None,
) -> list[str]:
    has_tools = any(getattr(chat, "tools", None) for chat in chats)
    reserved = ("add_generation_prompt", "tokenize", *(("tools",) if has_tools else ()))
    if given := sorted(kwargs.keys() & reserved):
        raise UserError(
            f"{keys.kwargs} sets the reserved arguments {' and '.join(given)}",
            f"remove these arguments from {keys.kwargs}",
            key=f"{keys.kwargs}.{given[0]}",
            value=kwargs[given[0]],
        )
    texts: list[str] = []
    try:
        for chat in chats:
            texts.append(render(tokenizer, chat, kwargs))
    except Exception as error:  # a template is a program, which can fail in any way
        where = _at(len(texts), location)
        raise _rejected(tokenizer, chats[len(texts)], kwargs, keys, error, where) from None
    return texts


def _rejected(
    tokenizer: PreTrainedTokenizerBase,
    chat: list[Message],
    kwargs: Mapping[str, Any],
    keys: TemplateKeys,
    error: Exception,
    where: str,
) -> UserError:
    roles = ", ".join(message["role"] for message in chat)
    fix = f"change {keys.kwargs} or {keys.template}"
    if isinstance(tokenizer.chat_template, dict) and "chat_template" not in kwargs:
        fix = f"set {keys.kwargs}.chat_template to one of {', '.join(tokenizer.chat_template)}, or {fix}"
    if len(chat) > 2 or where:
        fix = f"correct this row, or {fix}"
    if chat[0]["role"] == "system":
        fix = f"remove {keys.system}, or {fix}"
    return UserError(
        f"the chat template of {tokenizer.name_or_path} rejects a conversation{where} with the roles {roles}"
        f" ({reason(error)})",
        fix,
        key=keys.template,
    )


def _raise_if_random(
    tokenizer: PreTrainedTokenizerBase, chat: list[Message], kwargs: dict[str, Any], keys: TemplateKeys
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
