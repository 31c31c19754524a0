"""Malformed conversations and tools, columns of the teacher's templates and keys of the teacher's context."""

from __future__ import annotations

from typing import Any

from tests.malformed.case import Case, Workshop, way
from tests.malformed.data import json_lines

USER, ASSISTANT, SYSTEM, TOOL = (
    {"role": role, "content": f"text of {role}"} for role in ("user", "assistant", "system", "tool")
)
INPUT_KEY = "data.train.input_key=messages"
CONTEXT = "distillation.context_distillation"


def conversation_case(shop: Workshop, names: str, bad: Any, *overrides: str, **columns: Any) -> Case:
    """Return a run of several good rows and one row whose messages are ``bad``."""
    good: list[Any] = [{"messages": [USER], "answer": "1", "tools": [], "hint": "h"}] * shop.rng.randrange(4, 9)
    at = shop.rng.randrange(len(good) + 1)
    rows = [*good[:at], {"messages": bad, "answer": "1", "tools": [], "hint": "h", **columns}, *good[at:]]
    path = shop.file("messages.jsonl", json_lines(rows))
    case = shop.case(names, f"data.train.data_path={path}", INPUT_KEY, *overrides)
    case.detail = repr(bad)[:100] + repr(columns)[:100]
    return case


@way
def _conversation_with_roles_in_a_wrong_order(shop: Workshop) -> Case:
    roles = [
        [ASSISTANT, USER],
        [SYSTEM],
        [USER, SYSTEM],
        [USER, ASSISTANT, ASSISTANT],
        [USER, TOOL],
        [USER, ASSISTANT, TOOL],
        [TOOL],
        [ASSISTANT],
        [],
    ]
    return conversation_case(shop, INPUT_KEY, shop.rng.choice(roles))


@way
def _message_without_role_or_text(shop: Workshop) -> Case:
    wrong = [
        {"role": "critic", "content": "x"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "user", "content": 3},
        {"content": "x"},
        {"from": "human"},
        {},
        "x",
        None,
        3,
    ]
    return conversation_case(shop, INPUT_KEY, [USER, shop.rng.choice(wrong)])


@way
def _malformed_json_of_messages(shop: Workshop) -> Case:
    texts = ['[{"role": "user"', "[{'role': 'user', 'content': 'x'}]", "text", '[{"role": "user", "content": 3}]', "[]"]
    return conversation_case(shop, INPUT_KEY, shop.rng.choice(texts))


@way
def _malformed_tool_call(shop: Workshop) -> Case:
    calls = ["add", [3], [{}], [{"function": {"name": 3}}], [{"name": "add", "arguments": "{"}], {"name": "add"}]
    message = {"role": "assistant", "content": None, "tool_calls": shop.rng.choice(calls)}
    return conversation_case(shop, INPUT_KEY, [USER, message, TOOL])


@way
def _malformed_tools(shop: Workshop) -> Case:
    tools = shop.rng.choice(["add", "[", 3, {"name": "add"}, [3], [{}], [{"function": {"name": ""}}]])
    return conversation_case(shop, "data.train.tools_key=tools", [USER], "data.train.tools_key=tools", tools=tools)


@way
def _conversation_or_tools_that_the_template_omits(shop: Workshop) -> Case:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    bad, tools = shop.rng.choice([([USER, call, TOOL], []), ([USER], [{"name": "add"}])])
    key = "policy.tokenizer.chat_template|the chat template of"
    return conversation_case(shop, key, bad, "data.train.tools_key=tools", tools=tools)


@way
def _placeholder_that_is_no_column(shop: Workshop) -> Case:
    key = f"{CONTEXT}.teacher_prefix_template"
    word = shop.rng.choice(["{hnt}", "{question.text}", "{answer.0}", "{a.b.c}", "{Question}", "{solution2}"])
    return shop.context(key, f"{key}={{problem}} {word}")


@way
def _column_of_the_teacher_without_texts(shop: Workshop) -> Case:
    key = f"{CONTEXT}.teacher_prefix_template"
    case = conversation_case(shop, key, [USER], hint=shop.rng.choice([["a"], {"a": 1}, True, [USER]]))
    context = shop.context(key, f"{key}={{problem}} {{hint}}").argv[2:]
    case.argv += context
    return case


@way
def _messages_of_the_teacher_that_end_with_a_response(shop: Workshop) -> Case:
    key = f"{CONTEXT}.teacher_messages_key"
    bad = shop.rng.choice([[USER, ASSISTANT], [], "text", None, 3, [SYSTEM], [USER, TOOL]])
    case = conversation_case(shop, key, [USER], hint=bad)
    case.argv += shop.context(key, f"{key}=hint").argv[2:]
    return case


@way
def _keys_of_the_teachers_context_that_exclude_each_other(shop: Workshop) -> Case:
    file = shop.file("system.txt", "Be brief.")
    key, *overrides = shop.rng.choice(
        [
            ("keep_history", f"{CONTEXT}.teacher_messages_key=answer"),
            ("teacher_system_prompt_file", f"{CONTEXT}.teacher_messages_key=answer"),
            ("keep_history", f"{CONTEXT}.chat_template=false"),
            ("teacher_system_prompt_file", f"{CONTEXT}.chat_template=false"),
        ]
    )
    value = {"keep_history": "true", "teacher_system_prompt_file": str(file)}[key]
    return shop.context(f"{CONTEXT}.{key}", f"{CONTEXT}.{key}={value}", *overrides)


@way
def _malformed_system_prompt_file_of_the_teacher(shop: Workshop) -> Case:
    text = shop.rng.choice(["", " \n", "{problem.text}", "{trace!r}", "{hint:>9}", "{no_column}"])
    path = shop.file("system.txt", text)
    key = f"{CONTEXT}.teacher_system_prompt_file"
    return shop.context(key, f"{key}={path}")
