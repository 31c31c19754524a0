"""Check that a chat template renders all parts of the conversations: each role, tool calls and tools."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distill.data.conversations import Chat
from distill.data.rendering import STUDENT_KEYS, Location, TemplateKeys, render
from distill.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "marker5b1c92e7"
"""Text that replaces a part of a conversation, to find this part in the rendered text."""


class TemplateCheck:
    """Check of one chat template: the first conversation with each kind of part is rendered with a marker in this part.

    The first message of a role and later ones are two kinds; so are the first and the last tool.

    ``template_kwargs``: arguments of the template; ``keys``: its configuration keys, for messages.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_kwargs: Mapping[str, Any] | None,
        keys: TemplateKeys = STUDENT_KEYS,
    ) -> None:
        self._tokenizer, self._kwargs, self._keys = tokenizer, dict(template_kwargs or {}), keys
        self._checked: set[str] = set()

    def __call__(self, chats: Sequence[Chat], location: Location) -> None:
        """Raise UserError if the template omits a part of a conversation; ``location``: see Location."""
        if self._tokenizer.chat_template is None:
            return
        for i, chat in enumerate(chats):
            for part, marked in _marked(chat, self._checked):
                self._checked.add(part)
                if self._omits(marked):
                    raise UserError(
                        f"the chat template of {self._tokenizer.name_or_path} omits the {part} of the conversation in"
                        f" {location(i)}, so the model would not read it",
                        f"set {self._keys.template} to a Jinja file that renders it, or remove it from the data",
                        key=self._keys.template,
                    )

    def _omits(self, marked: Chat) -> bool:
        try:
            return _MARK not in render(self._tokenizer, marked, self._kwargs)
        except Exception:  # a template may refuse the marker, for example if it parses the text of a tool message
            return False


def _marked(chat: Chat, checked: set[str]) -> Iterator[tuple[str, Chat]]:
    """Yield (name, copy of ``chat`` with the marker in this part) for each kind of part that is not in ``checked``."""
    seen: set[str] = set()
    for i, message in enumerate(chat):
        role = message["role"]
        part = f"{'later ' if role in seen else ''}{role} message"
        seen.add(role)
        if part not in checked and message["content"] and not message.get("tool_calls"):
            yield part, Chat([*chat[:i], {**message, "content": _MARK}, *chat[i + 1 :]], chat.tools)
        for part, at in _first_and_last(message.get("tool_calls"), "tool call"):
            if part not in checked:
                call = copy.deepcopy(message)
                call["tool_calls"][at]["function"]["name"] = _MARK
                yield part, Chat([*chat[:i], call, *chat[i + 1 :]], chat.tools)
    for part, at in _first_and_last(chat.tools, "tool"):
        if part not in checked:
            tools = copy.deepcopy(chat.tools or [])
            tools[at].get("function", tools[at])["name"] = _MARK
            yield part, Chat(chat, tools)


def _first_and_last(parts: Sequence[Any] | None, name: str) -> list[tuple[str, int]]:
    """Return (name of the part, index) of the first of ``parts`` and, if there are several, of the last."""
    found = [(f"first {name}", 0)] if parts else []
    return [*found, (f"last {name}", -1)] if len(parts or ()) > 1 else found
