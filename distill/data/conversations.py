"""Conversations in a dataset's column: parsed, checked, and stored as JSON in Problem.messages and Problem.tools.

A conversation is a list of messages with the roles system, user, assistant and tool. Its prompt ends at the last user
or tool message. An assistant message after the prompt is the reference: a response that is never part of the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.data.grading import THINK_TAGS, final_part
from distill.errors import any_of, reason, show
from distill.types import Problem

Message = dict[str, Any]
"""A message: its role and content, and optionally tool_calls, tool_call_id, name, reasoning_content, ..."""

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Maps each accepted spelling of a role to the role that chat templates use."""
_CALLS = ("function_call", "tool_call")
"""Roles whose text is the JSON of a tool call (ShareGPT)."""
_LOOKS_LIKE_MESSAGES = re.compile(
    rf"""\s*\[\s*\{{(?s:.*?)['"](?:role|from)\\?['"]\s*:\s*\\?['"](?:{"|".join(ROLES)})\\?['"]"""
)
"""Matches a list of messages, also if it is malformed or written by Python (single quotes)."""
_LOOKS_LIKE_CALL = re.compile(r"""(?:tool|function)_?call|python_tag|<function|["']name["']\s*:""", re.IGNORECASE)
_OBJECT_WITH_MESSAGES = re.compile(rf"""\s*\{{\s*['"]\w+['"]\s*:(?:{_LOOKS_LIKE_MESSAGES.pattern})""")
"""Matches an object whose first value is a list of messages, also if it is malformed."""


class ConversationError(ValueError):
    """A malformed conversation or list of tools; the caller adds the configuration key and the row."""

    def __init__(self, cause: str, fix: str) -> None:
        super().__init__(cause)
        self.fix = fix


class Chat(list[Message]):
    """The messages of one conversation, in order, with the tools that the chat template shows to the model."""

    def __init__(self, messages: Iterable[Message], tools: list[Any] | None = None) -> None:
        super().__init__(messages)
        self.tools = tools
        """JSON schemas of the tools; None: no tools."""


@dataclass(frozen=True)
class Conversation:
    """A checked conversation."""

    messages: Sequence[Message]
    """Messages of the prompt: the last one is from the user or from a tool."""
    reference: str = ""
    """Text of the assistant message after the prompt; "" without one, or if it calls tools."""
    is_prompt: bool = True
    """Whether the conversation ends with the prompt, without an assistant message after it."""
    calls_tools: bool = False
    """Whether the assistant message after the prompt calls tools."""
    think_tags: tuple[str, str] = THINK_TAGS
    """Opening and closing tag of a think block in the reference."""

    @property
    def text(self) -> str:
        """Return the text of the last user message."""
        return str(self.messages[last_user(self.messages)]["content"])

    @property
    def gold(self) -> str:
        """Return the reference without its reasoning, as a gold answer."""
        return final_part(self.reference, self.think_tags)


def chat_of(problem: Problem, text: str, system: str = "") -> Chat:
    """Return the conversation of ``problem`` with ``text`` in place of the last user message, and its tools.

    ``system``: a system message that replaces the conversation's own system message; "": its own is kept.
    """
    messages = stored_messages(problem.messages) if problem.messages else [{"role": "user", "content": ""}]
    at = last_user(messages)
    messages[at] = {**messages[at], "content": text}
    if system:
        messages = [{"role": "system", "content": system}, *messages[has_system(messages) :]]
    return Chat(messages, json.loads(problem.tools) if problem.tools else None)


def stored_messages(text: str) -> list[Message]:
    """Return the messages in ``text``, the JSON in Problem.messages or in a column of conversations."""
    messages: list[Message] = json.loads(text)
    return messages


def last_user(messages: Sequence[Message]) -> int:
    """Return the index of the last user message."""
    return max(i for i, message in enumerate(messages) if message["role"] == "user")


def has_system(messages: Sequence[Message]) -> bool:
    """Return whether the first message is a system message."""
    return bool(messages[0]["role"] == "system")


def as_json(value: Any) -> str:
    """Return ``value`` as JSON with its order of keys; raise ConversationError for a value that JSON does not have."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConversationError(f"it has a value that JSON cannot store: {reason(error)}", "use JSON values") from None


def may_be_messages(value: Any) -> bool:
    """Return whether ``value`` is an empty list or a list with an object, so that it should be a conversation."""
    return isinstance(value, list) and (not value or any(isinstance(each, Mapping) for each in value))


def is_content_parts(value: Any) -> bool:
    """Return whether ``value`` is the content of one message as a list of parts, not a list of messages."""
    parts = value if isinstance(value, list) else []
    return bool(parts) and all(isinstance(p, Mapping) and "type" in p and not {"role", "from"} & set(p) for p in parts)


def read_conversation(
    value: Any, drop_nulls: bool = False, think_tags: tuple[str, str] = THINK_TAGS
) -> Conversation | None:
    """Return the conversation in ``value``, a list of messages or its JSON text; None if ``value`` is another text.

    ``drop_nulls``: remove keys with the value null at any depth, because a row of an Arrow table has null in place of
    absent keys. ``think_tags``: see Conversation. Raises ConversationError for a malformed conversation.
    """
    if isinstance(value, str):
        value = _parsed_messages(value)
        if value is None:
            return None
    if not isinstance(value, list):
        raise ConversationError(f"it is a value of type {type(value).__name__}", "write a list of messages")
    if not value:
        raise ConversationError("the list of messages is empty", "remove the row, or add a user message")
    messages = [_message(each, f"message {i}", drop_nulls) for i, each in enumerate(value, 1)]
    _check_order(messages)
    if messages[-1]["role"] != "assistant":
        return Conversation(messages)
    calls = bool(messages[-1].get("tool_calls"))
    return Conversation(messages[:-1], _reference(messages[-1], think_tags), False, calls, think_tags)


def read_tools(value: Any, drop_nulls: bool = False) -> list[Any]:
    """Return the tools in ``value``: a list of JSON schemas or its JSON text; [] if there are none.

    ``drop_nulls``: see ``read_conversation``. Raises ConversationError unless each tool is an object with a name.
    """
    if isinstance(value, str) and value.strip():
        value = _parsed(value, "the list of tools")
    if value is None or value == "" or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, list):
        raise ConversationError(f"it is a value of type {type(value).__name__}", "write a list of JSON schemas")
    tools = [_parsed(each, f"tool {i}") if isinstance(each, str) else each for i, each in enumerate(value, 1)]
    for i, tool in enumerate(tools, 1):
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(inner, Mapping) or not _is_text(inner.get("name")):
            raise ConversationError(
                f"tool {i} is not a JSON object with the name of a function",
                'write each tool as {"type": "function", "function": {"name": ..., "parameters": {...}}}',
            )
    return [_without_nulls(tool) for tool in tools] if drop_nulls else tools


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _parsed_messages(text: str) -> Any:
    """Return the list in ``text`` if it is the JSON of a list of messages; None if it is another text.

    Raises ConversationError for the JSON of an object that contains messages, or is one.
    """
    if text.lstrip().startswith("{"):
        _refuse_object(text)
    if not text.lstrip().startswith("["):
        return None
    if _LOOKS_LIKE_MESSAGES.match(text):
        return _parsed(text, "the list of messages")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) and any(map(_is_message, value)) else None


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and (set(value) >= {"role", "content"} or set(value) >= {"from", "value"})


def _refuse_object(text: str) -> None:
    """Raise ConversationError if ``text`` is the JSON of an object that contains messages, or is one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    values = value.values() if isinstance(value, Mapping) else ()
    has_messages = any(isinstance(each, list) and any(map(_is_message, each)) for each in values)
    if _is_message(value) or has_messages or _OBJECT_WITH_MESSAGES.match(text):
        raise ConversationError("it is the text of an object instead of a list", "write the list of messages itself")


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"{what} is not valid JSON: {reason(error)}", "correct the JSON text") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _message(value: Any, name: str, drop_nulls: bool) -> Message:
    """Return a message with the keys of chat templates; ``name``: its number, for messages."""
    if not isinstance(value, Mapping):
        fix = 'write each message as {"role": ..., "content": ...}'
        raise ConversationError(f"{name} is {_quoted(value)} instead of an object with role and content", fix)
    given = {key: each for key, each in value.items() if each is not None}
    role_key, text_key = ("role", "content") if "role" in given else ("from", "value")
    spelling = given.pop(role_key, None)
    role = ROLES.get(spelling.strip().lower()) if isinstance(spelling, str) else None
    if spelling is None:
        raise ConversationError(f"{name} has no role (keys: {', '.join(map(str, value))})", "add the key role or from")
    if role is None:
        fix = f"write {any_of(dict.fromkeys(ROLES.values()))}"
        raise ConversationError(f"{name} has the unknown role {_quoted(spelling)}", fix)
    thought = given.get("reasoning_content", "")
    if not isinstance(thought, str):
        cause = f"{role} {name} has a reasoning_content of type {type(thought).__name__}"
        raise ConversationError(cause, "write reasoning_content as a text")
    content = _content(given.pop(text_key, None), f"{role} {name}")
    calls = _calls(given, str(spelling).strip().lower(), content, name, drop_nulls)
    if calls and role != "assistant":
        raise ConversationError(f"{name} has tool_calls and the role {role}", "write tool_calls in assistant messages")
    if str(spelling).strip().lower() in _CALLS:
        content = None
    if content is None and not calls:
        rule = f"add the key {text_key} with a text" + (", or tool_calls" if role == "assistant" else "")
        raise ConversationError(f"{role} {name} has no text (keys: {', '.join(map(str, value))})", rule)
    others = {key: _without_nulls(each) if drop_nulls else each for key, each in given.items()}
    return {"role": role, "content": content, **others, **({"tool_calls": calls} if calls else {})}


def _quoted(value: Any) -> str:
    """Return ``value`` for messages, with quotation marks around a text."""
    return repr(show(value)) if isinstance(value, str) else show(value)


def _content(value: Any, name: str) -> str | None:
    """Return the text of a message's content: a text, or a list of text parts, which are concatenated."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else f"a value of type {type(value).__name__}"
        raise ConversationError(f"{name} has {kind} in place of a text", "write a text or a list of text parts")
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
    for i, (part, text) in enumerate(zip(value, parts, strict=True), 1):
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text" or not isinstance(text, str):
            found = f"of type {_quoted(kind)}" if kind != "text" else "without a text"
            raise ConversationError(f"{name} has the part {i} {found}", "keep only parts of the type text")
    return "".join(map(str, parts))


def _calls(given: Message, spelling: str, content: str | None, name: str, drop_nulls: bool) -> list[Any]:
    """Remove the tool calls from the other keys ``given`` of a message, and return them; [] without a call."""
    found = given.pop("tool_calls", None)
    if found is None and "function_call" in given:
        found = [given.pop("function_call")]
    if found is None and spelling in _CALLS:
        parsed = _parsed(content or "", f"the tool call in {name}")
        found = parsed if isinstance(parsed, list) else [parsed]
    if isinstance(found, str):
        found = _parsed(found, f"tool_calls of {name}")
    if found is not None and not isinstance(found, list):
        kind = type(found).__name__
        raise ConversationError(f"{name} has tool_calls of type {kind}", "write tool_calls as a list of calls")
    return [_call(call, f"tool call {i} of {name}", drop_nulls) for i, call in enumerate(found or [], 1)]


def _call(value: Any, name: str, drop_nulls: bool) -> Message:
    """Return a tool call with its arguments as an object, which chat templates write as JSON."""
    inner = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(inner, Mapping) or not _is_text(inner.get("name")):
        form = '{"type": "function", "function": {"name": ..., "arguments": {...}}}'
        raise ConversationError(f"{name} has no function name", f"write the call as {form}")
    arguments = inner.get("arguments", inner.get("parameters"))
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"the arguments text of {name}") if arguments.strip() else {}
    if not isinstance(arguments, Mapping | None):
        kind = type(arguments).__name__
        raise ConversationError(f"{name} has arguments of type {kind}", "write the arguments as a JSON object")
    arguments = _without_nulls(arguments) if drop_nulls else arguments
    function = {"name": inner["name"], "arguments": {} if arguments is None else arguments}
    outer = {key: each for key, each in value.items() if key in ("id", "type") and each is not None}
    return {"type": "function", **outer, "function": function}


def _check_order(messages: Sequence[Message]) -> None:
    """Raise ConversationError if the roles of the messages cannot follow each other."""
    roles = [message["role"] for message in messages]
    start = roles.index(next((role for role in roles if role != "system"), "system"))
    end = len(roles) - (roles[-1] == "assistant")
    if roles[:end][-1:] == ["system"]:
        cause = f"message {end}, the last message of the prompt, is a system message"
        raise ConversationError(cause, "end the prompt with a user or tool message")
    if start > 1:
        fix = "join their texts into one system message"
        raise ConversationError(f"the first {start} messages are system messages", fix)
    if roles[start] != "user":
        cause = f"message {start + 1}, the first after the system message, has the role {roles[start]}"
        cause = cause if start else f"the first message has the role {roles[0]}"
        raise ConversationError(cause, "begin the conversation with a user message")
    if roles[-2:] == ["assistant", "assistant"]:
        raise ConversationError(
            "the last two messages have the role assistant, so the prompt would not end at a user or tool message",
            "keep only one assistant message after the last user message",
        )
    for i, role in enumerate(roles):
        if role == "tool":
            _check_tool(messages, i)


def _check_tool(messages: Sequence[Message], at: int) -> None:
    """Raise ConversationError unless an assistant message before tool message ``at`` has called the tool."""
    called = next(i for i in range(at - 1, -1, -1) if messages[i]["role"] != "tool")
    calls = messages[called].get("tool_calls", [])
    fix = "add tool_calls to the assistant message before it, or remove the tool message"
    is_call = messages[called]["role"] == "assistant" and (
        calls or _LOOKS_LIKE_CALL.search(messages[called]["content"])
    )
    if not is_call or (calls and at - called > len(calls)):
        raise ConversationError(f"message {at + 1} is a tool message without a call", fix)
    known = [call.get("id") for call in calls]
    wanted = messages[at].get("tool_call_id")
    if wanted is not None and None not in known and known and wanted not in known:
        cause = (
            f"message {at + 1} has tool_call_id={_quoted(wanted)}, but the calls before it have"
            f" {any_of(map(_quoted, known))}"
        )
        raise ConversationError(cause, "correct tool_call_id")


def _reference(message: Message, think_tags: tuple[str, str]) -> str:
    """Return the text of the assistant message after the prompt, with its separate reasoning as a think block.

    The separate reasoning is not used if the text has a think tag, because the text then contains the reasoning.
    """
    if message.get("tool_calls"):
        return ""  # the text alone would be an incomplete response
    text, thought = str(message["content"]), str(message.get("reasoning_content", "")).strip()
    if not thought or any(tag in text for tag in think_tags):
        return text
    return f"{think_tags[0]}\n{thought}\n{think_tags[1]}\n\n{text}"
