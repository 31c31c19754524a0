"""Malformed conversations and tools are refused with the configuration key, the file and the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.config import DatasetConfig
from distill.data.columns import TextColumn
from distill.data.prompts import load_prompts
from distill.errors import UserError
from tests.data.chat_templates import ALTERNATING, LLAMA3, QWEN3
from tests.data.loading import load_datasets
from tests.data.test_conversations import AGAIN, ANSWER, CALL, GOLD, SYSTEM, THOUGHT, TOOLS, USER, call, called, saved
from tests.tiny_tokenizer import CHATML, tiny_tokenizer


def refused(path: Path, messages: Any, template: str | None = None, before: Any = (USER,), **keys: Any) -> UserError:
    """Return the error of a dataset whose second row has ``messages``."""
    row = {"messages": messages, "tools": keys.pop("tools", None)}
    dataset = saved(path / "a.jsonl", {"messages": list(before), "tools": None}, row, **keys)

    def load() -> object:
        if template is None:
            return load_datasets([dataset])
        return load_prompts([dataset], tiny_tokenizer(template or None), 100_000)

    with pytest.raises(UserError) as caught:
        load()
    assert "\n" not in str(caught.value)
    assert "line 2" in caught.value.problem and f"{path}/a.jsonl" in caught.value.problem
    return caught.value


MALFORMED: dict[str, Any] = {
    "empty list": [],
    "assistant first": [GOLD, USER],
    "assistant first after system": [SYSTEM, GOLD, USER],
    "only an assistant": [GOLD],
    "only a system message": [SYSTEM],
    "system last": [USER, SYSTEM],
    "system last after a reference": [USER, GOLD, SYSTEM],
    "system before the reference": [USER, SYSTEM, GOLD],
    "system after a turn, before the reference": [USER, THOUGHT, SYSTEM, GOLD],
    "only a system message and a reference": [SYSTEM, GOLD],
    "two system messages at the start": [SYSTEM, SYSTEM, USER],
    "reasoning that is a list": [USER, {**GOLD, "reasoning_content": ["x"]}],
    "reasoning that is a number, in the history": [USER, {**GOLD, "reasoning_content": 3}, AGAIN],
    "an object as text": json.dumps({"messages": [USER, GOLD]}),
    "an object with other keys as text": json.dumps({"id": 1, "messages": [USER]}),
    "a malformed object as text": '{"messages": [{"role": "user", "content": "x"}',
    "one message as text": json.dumps(USER),
    "two assistant messages at the end": [USER, THOUGHT, GOLD],
    "tool first": [ANSWER],
    "tool after user": [USER, ANSWER],
    "tool after an assistant without a call": [USER, GOLD, ANSWER],
    "tool after system": [USER, CALL, SYSTEM, ANSWER],
    "two answers to one call": [USER, CALL, ANSWER, ANSWER],
    "wrong call id": [USER, called({**call(), "id": "a"}), {**ANSWER, "tool_call_id": "b"}],
    "unknown role": [USER, {"role": "critic", "content": "x"}],
    "role in a list": [{"role": ["user"], "content": "x"}],
    "role null": [{"role": None, "content": "x"}],
    "no role": [{"content": "x"}],
    "mixed spellings": [{"role": "user", "value": "x"}],
    "mixed spellings of a list": [{"from": "human", "content": "x"}],
    "content null": [{"role": "user", "content": None}],
    "assistant content null without a call": [USER, {"role": "assistant", "content": None}, AGAIN],
    "empty list of calls": [USER, {"role": "assistant", "content": None, "tool_calls": []}, AGAIN],
    "content is a number": [{"role": "user", "content": 3}],
    "content is an object": [{"role": "user", "content": {"text": "x"}}],
    "no parts": [{"role": "user", "content": []}],
    "an image": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    "a part without a text": [{"role": "user", "content": [{"type": "text"}]}],
    "a part that is a number": [{"role": "user", "content": [3]}],
    "message is a text": [USER, "x"],
    "message is null": [USER, None],
    "message is a list": [[USER], USER],
    "calls of a user": [{**USER, "tool_calls": [call()]}],
    "calls are an object": [USER, {"role": "assistant", "content": "", "tool_calls": call()}, ANSWER],
    "a call without a name": [USER, called({"function": {"arguments": {}}}), ANSWER],
    "a call that is a text": [USER, {"role": "assistant", "content": "", "tool_calls": ["add"]}, ANSWER],
    "arguments that are no JSON": [USER, called({"name": "add", "arguments": "{a}"}), ANSWER],
    "arguments that are a list": [USER, called({"name": "add", "arguments": [1]}), ANSWER],
    "a function call that is no JSON": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "add(1)"}],
    "a list that is not closed": '[{"role": "user", "content": "x"}',
    "a list of Python": "[{'role': 'user', 'content': 'x'}]",
    "text among conversations": "1+1?",
    "an object": {"role": "user", "content": "x"},
    "a message in an object": {"messages": [USER]},
    "a surrogate": [{"role": "user", "content": "\ud800"}],
    "a surrogate in a name": [{**USER, "name": "\ud800"}],
    "a surrogate in the reference": [USER, {**GOLD, "content": "\ud800"}],
    "infinity": [USER, called(call(a=float("inf"))), ANSWER],
    "a number": 3,
    "true": True,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_conversation_is_refused_with_its_row(tmp_path: Path, name: str) -> None:
    """Also its JSON text. The texts [] and [null] are texts, which are refused because row 1 has a conversation."""
    messages = MALFORMED[name]
    for given in (messages, json.dumps(messages)) if isinstance(messages, list) else (messages,):
        error = refused(tmp_path, given)
        assert error.key in ("data.train.input_key", "data.train")
        assert error.fix


@pytest.mark.parametrize(
    "tools",
    [
        {"type": "function"}, [3], ["add"], [{}], [{"name": ""}], [{"function": {}}], [{"function": "add"}], "[", "add",
        '{"name": "add"}', 3, [[TOOLS[0]]], [None], [{**TOOLS[0], "x": float("nan")}], [{"name": "\ud800"}],
    ],
)  # fmt: skip
def test_malformed_tools_are_refused_with_their_row(tmp_path: Path, tools: Any) -> None:
    error = refused(tmp_path, [USER], tools=tools, tools_key="tools")
    assert error.key in ("data.train.tools_key", "data.train")


def test_a_missing_column_is_refused_with_its_row_and_similar_names(tmp_path: Path) -> None:
    rows = [{"messages": [USER], "tools": TOOLS}, {"mesages": [USER], "tools": TOOLS}]
    with pytest.raises(UserError) as caught:
        load_datasets([saved(tmp_path / "a.jsonl", *rows)])
    assert (caught.value.key, caught.value.value) == ("data.train.input_key", "messages")
    assert f"line 2 of {tmp_path}/a.jsonl" in caught.value.problem and "mesages" in caught.value.fix
    with pytest.raises(UserError) as caught:
        load_datasets([saved(tmp_path / "a.jsonl", rows[0], {"messages": [USER]}, tools_key="tools")])
    assert (caught.value.key, caught.value.value) == ("data.train.tools_key", "tools")
    pq.write_table(pa.Table.from_pylist([{"messages": [USER]}]), tmp_path / "a.parquet")
    dataset = DatasetConfig(data_path=str(tmp_path / "a.parquet"), input_key="messages", tools_key="tools")
    with pytest.raises(UserError) as caught:
        load_datasets([dataset])
    assert caught.value.key == "data.train.tools_key"


@pytest.mark.parametrize("name", [name for name in MALFORMED if name.endswith(" as text")])
def test_the_text_of_an_object_is_refused_in_the_first_row_too(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        load_datasets([saved(tmp_path / "a.jsonl", {"messages": MALFORMED[name]})])
    assert (caught.value.key, caught.value.value) == ("data.train.input_key", "messages")


def test_errors_name_the_key_that_fixes_them(tmp_path: Path) -> None:
    tools = refused(tmp_path, [USER], tools_key="tools", tools=3)
    assert tools.key == "data.train.tools_key"
    rows: list[dict[str, Any]] = [{"messages": [USER], "tools": TOOLS}, {"messages": [USER]}]
    with pytest.raises(UserError) as caught:
        load_datasets([saved(tmp_path / "a.jsonl", *rows, tools_key="tools")])
    assert "this row" in caught.value.fix and "null" in caught.value.fix
    parts = {"role": "user", "content": [{"type": "text", "text": "1+1?"}]}
    for chat, path, column in (([parts], "messages.0.content", "messages"), ([SYSTEM, parts], "m.1.content", "m")):
        dataset = saved(tmp_path / "a.jsonl", {column: chat}, input_key=path)
        with pytest.raises(UserError) as caught:
            load_datasets([dataset])
        assert (caught.value.key, caught.value.value) == ("data.train.input_key", path)
        assert f"data.train.input_key to {column}," in caught.value.fix
    assert "'hi'" in refused(tmp_path, [USER, "hi"]).problem
    assert "'critic'" in refused(tmp_path, [USER, {"role": "critic", "content": "x"}]).problem


@pytest.mark.parametrize(
    ("chat", "path"),
    [([USER, GOLD], "r.1.content"), ([USER, GOLD, AGAIN, GOLD], "r.3.content"),
     ([{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "r.1.value")],
)  # fmt: skip
def test_a_column_of_messages_as_reference_is_refused_with_the_path_of_the_response(
    tmp_path: Path, chat: Any, path: str
) -> None:
    dataset = saved(tmp_path / "a.jsonl", {"messages": [USER], "r": chat})
    column = TextColumn("r", "distillation.off_policy.column")
    with pytest.raises(UserError) as caught:
        load_prompts([dataset], tiny_tokenizer(QWEN3), 1000, reference=column)
    assert caught.value.key == "distillation.off_policy.column" and path in caught.value.fix


def test_a_reference_that_calls_tools_is_refused_with_its_row_if_it_is_trained_on(tmp_path: Path) -> None:
    dataset = saved(tmp_path / "a.jsonl", {"messages": [USER, GOLD]}, {"messages": [USER, CALL]})
    assert len(load_prompts([dataset], tiny_tokenizer(QWEN3), 1000)) == 2
    column = TextColumn("", "distillation.off_policy.column", required=False, kind="message")
    with pytest.raises(UserError) as caught:
        load_prompts([dataset], tiny_tokenizer(QWEN3), 1000, reference=column)
    assert caught.value.key == "distillation.off_policy.column"
    assert f"line 2 of {tmp_path}/a.jsonl" in caught.value.problem and "calls tools" in caught.value.problem


def test_conversations_in_a_table_are_refused_with_their_row(tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_pylist([{"messages": [USER]}, {"messages": [USER, GOLD, ANSWER]}]), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match=r"row 1 of .*a\.parquet") as caught:
        load_datasets([DatasetConfig(data_path=str(tmp_path / "a.parquet"), input_key="messages")])
    assert caught.value.key == "data.train.input_key"


# -- chat templates ---------------------------------------------------------------------------------------------------


def test_a_conversation_that_the_template_rejects_is_refused_with_its_row(tmp_path: Path) -> None:
    for chat, template in (
        ([USER, AGAIN], ALTERNATING),
        ([SYSTEM, USER], ALTERNATING),
        ([USER, called(call(), call()), ANSWER, ANSWER], LLAMA3),
    ):
        error = refused(tmp_path, chat, template)
        assert error.key == "policy.tokenizer.chat_template"
        assert ", ".join(message["role"] for message in chat) in error.problem


def test_several_turns_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    for chat, tools in (([USER, THOUGHT, AGAIN], None), ([USER, AGAIN], None), ([USER], TOOLS)):
        assert refused(tmp_path, chat, "", tools=tools, tools_key="tools").key == "policy.tokenizer.chat_template"
    dataset = saved(tmp_path / "a.jsonl", {"messages": [SYSTEM, USER]})
    (prompt,) = load_prompts([dataset], tiny_tokenizer(None), 100)
    assert tiny_tokenizer().decode(list(prompt.student_ids)) == "Be brief.\n\n1+1?"


ONLY_TURNS = "{% for m in messages if m.role in ('user', 'assistant') %}[{{ m.role }}]{{ m.content }}{% endfor %}"


FIRST_SYSTEM = "{{ messages[0].content }}{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("chat", "tools", "template"),
    [
        ([USER], TOOLS, CHATML),
        ([USER, CALL, ANSWER], None, CHATML),
        ([SYSTEM, USER], None, ONLY_TURNS),
        ([USER, {**CALL, "content": "x"}, ANSWER], TOOLS, ONLY_TURNS),
        ([USER, THOUGHT, AGAIN], None, "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"),
        ([USER, THOUGHT, AGAIN], None, "{{ messages[-1].content }}"),
        ([SYSTEM, USER, THOUGHT, SYSTEM, AGAIN], None, FIRST_SYSTEM),
        ([USER], [*TOOLS, call("sub")], CHATML + "{{ tools[0] if tools }}"),
        (
            [USER, called(call(), call("sub")), ANSWER, ANSWER],
            TOOLS,
            ONLY_TURNS + "{{ tools }}{% for m in messages %}{{ m.content if m.role == 'tool' }}"
            "{{ m.tool_calls[0] if m.tool_calls }}{% endfor %}",
        ),
    ],
)
def test_a_template_that_omits_a_part_of_a_conversation_is_refused(
    tmp_path: Path, chat: Any, tools: Any, template: str
) -> None:
    assert refused(tmp_path, chat, template, tools=tools, tools_key="tools").key == "policy.tokenizer.chat_template"


def test_tools_in_the_templates_arguments_and_in_a_column_are_refused(tmp_path: Path) -> None:
    dataset = saved(tmp_path / "a.jsonl", {"messages": [USER], "tools": TOOLS}, tools_key="tools")
    with pytest.raises(UserError) as caught:
        load_prompts([dataset], tiny_tokenizer(QWEN3), 1000, {"tools": TOOLS})
    assert caught.value.key == "policy.tokenizer.chat_template_kwargs.tools"


def test_two_system_messages_are_refused_with_the_row(tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("Be kind.")
    error = refused(tmp_path, [SYSTEM, USER], QWEN3, system_prompt_file=str(tmp_path / "system.txt"))
    assert (error.key, error.value) == ("data.train.system_prompt_file", str(tmp_path / "system.txt"))
