"""Conversations as problems: token ids, references, tools, spellings, and their hashes. A byte is a token here."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.config import DatasetConfig
from distill.data.content import data_hashes
from distill.data.conversations import read_conversation
from distill.data.prompts import load_prompts
from distill.types import Problem, Prompt
from distill.validation import load_held_out
from tests.data.chat_templates import LLAMA3, QWEN3
from tests.data.loading import load_datasets
from tests.tiny_tokenizer import tiny_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
USER, AGAIN = {"role": "user", "content": "1+1?"}, {"role": "user", "content": "And 2+2?"}
THOUGHT = {"role": "assistant", "content": "<think>\nadd\n</think>\n\n2"}
GOLD = {"role": "assistant", "content": "4"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"b": {"type": "number"}, "a": None}}}]


def call(name: str = "add", **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def called(*calls: dict[str, Any], content: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


ANSWER = {"role": "tool", "content": "4"}
CALL = called(call(b=2, a=2.5))
CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER],
    "system": [SYSTEM, USER],
    "thoughts": [SYSTEM, USER, THOUGHT, AGAIN],
    "a tool": [USER, THOUGHT, AGAIN, CALL, ANSWER],
    "a thought before a tool": [USER, {**CALL, "content": "<think>\nx\n</think>\n\nfirst"}, ANSWER],
    "separate reasoning": [USER, {**CALL, "content": "", "reasoning_content": "x"}, ANSWER],
}


def saved(path: Path, *rows: Mapping[str, Any], **keys: Any) -> DatasetConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetConfig(data_path=str(path), **{"input_key": "messages", **keys})


def problem_of(path: Path, messages: Any, **keys: Any) -> Problem:
    (problem,) = load_datasets([saved(path, {"messages": messages}, **keys)])
    return problem


def prompt_of(path: Path, messages: Any, template: str, row: Mapping[str, Any] | None = None, **keys: Any) -> Prompt:
    dataset = saved(path / "a.jsonl", {"messages": messages, **(row or {})}, **keys)
    (prompt,) = load_prompts([dataset], tiny_tokenizer(template), 100_000)
    return prompt


def text_of(prompt: Prompt) -> str:
    return str(tiny_tokenizer().decode(list(prompt.student_ids)))


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [QWEN3, LLAMA3])
@pytest.mark.parametrize("has_tools", [False, True])
@pytest.mark.parametrize("name", CHATS)
def test_a_conversations_ids_equal_apply_chat_template_of_the_complete_conversation(
    tmp_path: Path, template: str, has_tools: bool, name: str
) -> None:
    chat, tokenizer = CHATS[name], tiny_tokenizer(template)
    columns: dict[str, Any] = {"row": {"tools": TOOLS}, "tools_key": "tools"} if has_tools else {}
    prompt = prompt_of(tmp_path, chat, template, **columns)
    # Qwen3's template fails on null, so transformers reads an empty text there.
    filled = [{**message, "content": message["content"] or ""} for message in chat]
    settings = {"tokenize": False, "add_generation_prompt": True, "tools": TOOLS if has_tools else None}
    text = tokenizer.apply_chat_template(filled, **settings)
    assert list(prompt.student_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_qwen3_strips_thoughts_from_the_history_and_llama3_keeps_them(tmp_path: Path) -> None:
    chat = CHATS["thoughts"]
    assert text_of(prompt_of(tmp_path, chat, QWEN3)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\nAnd 2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    assert text_of(prompt_of(tmp_path, chat, LLAMA3)) == (
        f"<|begin_of_text|>{header('system')}Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
        f"Be brief.<|eot_id|>{header('user')}1+1?<|eot_id|>{header('assistant')}<think>\nadd\n</think>\n\n2<|eot_id|>"
        f"{header('user')}And 2+2?<|eot_id|>{header('assistant')}"
    )


def test_a_tools_turn_and_its_call_are_rendered(tmp_path: Path) -> None:
    text = text_of(prompt_of(tmp_path, [AGAIN, CALL, ANSWER], QWEN3, {"tools": TOOLS}, tools_key="tools"))
    assert text.endswith(
        "<|im_start|>user\nAnd 2+2?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "add", "arguments": {"b": 2, "a": 2.5}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert (
        '{"type": "function", "function": {"name": "add", "parameters": {"b": {"type": "number"}, "a": null}}}' in text
    )


def test_the_prompt_file_applies_to_the_last_user_message(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Solve: {}")
    (tmp_path / "system.txt").write_text("Be kind.")
    files: dict[str, Any] = {
        "prompt_file": str(tmp_path / "prompt.txt"),
        "system_prompt_file": str(tmp_path / "system.txt"),
    }
    prompt = prompt_of(tmp_path, [USER, THOUGHT, AGAIN, CALL, ANSWER], QWEN3, **files)
    text = text_of(prompt)
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>")
    assert "<|im_start|>user\nSolve: And 2+2?<|im_end|>" in text
    assert prompt.problem.text == "And 2+2?"


def test_think_tags_in_the_history_do_not_open_the_response(tmp_path: Path) -> None:
    opened = {"role": "assistant", "content": "<think>never closed"}
    opening = QWEN3 + "{{- '<think>\\n' if add_generation_prompt and enable_thinking is not defined }}"
    for chat, template, inside in (
        ([USER, opened, AGAIN], QWEN3, False),
        ([USER, opened, {"role": "user", "content": "<think>"}], QWEN3, False),
        ([USER, CALL, {"role": "tool", "content": "<think>"}], QWEN3, False),
        ([USER, THOUGHT, AGAIN], opening, True),
        ([USER, CALL, ANSWER], opening, True),
    ):
        assert prompt_of(tmp_path, chat, template).inside_thought is inside


# -- references and gold answers --------------------------------------------------------------------------------------


def test_an_assistant_message_at_the_end_is_the_reference_and_never_in_the_prompt(tmp_path: Path) -> None:
    chat = CHATS["thoughts"]
    with_reference = prompt_of(tmp_path, [*chat, {"role": "assistant", "content": "<think>\ny\n</think>\n\n4 "}], QWEN3)
    without = prompt_of(tmp_path, chat, QWEN3)
    assert with_reference.student_ids == without.student_ids
    assert with_reference.problem.reference == "<think>\ny\n</think>\n\n4 "
    assert (with_reference.problem.answer, with_reference.problem.text) == ("4", "And 2+2?")
    assert (without.problem.answer, without.problem.reference) == ("", "")


def test_output_key_has_priority_over_the_reference_as_gold_answer(tmp_path: Path) -> None:
    dataset = saved(tmp_path / "a.jsonl", {"messages": [USER, GOLD], "gold": "5"}, output_key="gold")
    (problem,) = load_datasets([dataset])
    assert (problem.answer, problem.reference) == ("5", "4")
    (problem,) = load_datasets([saved(tmp_path / "a.jsonl", {"messages": [USER], "output": "6"})])
    assert (problem.answer, problem.reference) == ("6", "")


def test_output_pattern_applies_to_the_reference(tmp_path: Path) -> None:
    solution = {"role": "assistant", "content": "Add them. #### 2"}
    problem = problem_of(tmp_path / "a.jsonl", [USER, solution], output_pattern="####")
    assert (problem.answer, problem.reference) == ("2", "Add them. #### 2")


def test_a_reference_that_calls_a_tool_is_no_text(tmp_path: Path) -> None:
    problem = problem_of(tmp_path / "a.jsonl", [USER, {**CALL, "content": "I call add."}])
    assert (problem.reference, problem.answer) == ("", "")


def test_conversations_are_validated_with_their_references_as_gold_answers(tmp_path: Path) -> None:
    dataset = saved(tmp_path / "a.jsonl", {"messages": [USER, THOUGHT, AGAIN, GOLD]}, env_name="exact")
    held_out = load_held_out([dataset], tiny_tokenizer(QWEN3), 1000, None, None)
    (prompt,) = held_out.prompts
    assert (prompt.problem.answer, held_out.grader(prompt)) == ("4", "exact")


@pytest.mark.parametrize(
    ("content", "reasoning", "reference"),
    [
        ("4", " y\n", "[T]\ny\n[/T]\n\n4"),
        ("[T]x[/T]4", "y", "[T]x[/T]4"),
        ("x[/T]4", "y", "x[/T]4"),
        ("4", None, "4"),
        ("<think>x</think>4", " ", "<think>x</think>4"),
    ],
)
def test_separate_reasoning_of_the_reference_becomes_one_think_block(
    content: str, reasoning: str | None, reference: str
) -> None:
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    found = read_conversation([USER, message], think_tags=("[T]", "[/T]"))
    assert found is not None
    assert (found.reference, found.gold) == (reference, "4" if "<" not in content else content)


def test_assistant_messages_as_gold_answers_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    named: dict[str, Any] = {"output_key": "messages.1.content"}
    for keys, count in (({}, 1), ({"env_name": None}, 0), (named, 0)):
        caplog.clear()
        rows = [{"messages": [USER]}, {"messages": [USER, GOLD]}][not count if keys is named else 0 :]
        load_datasets([saved(tmp_path / "a.jsonl", *rows, **keys)])
        assert len(["gold" for text in caplog.messages if text.startswith("gold answers of data.train")]) == count


# -- spellings --------------------------------------------------------------------------------------------------------

SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "And 2+2?"},
    {"from": "function_call", "value": '{"name": "add", "arguments": {"b": 2, "a": 2.5}}'},
    {"from": "observation", "value": "4"},
    {"from": "gpt", "value": "4"},
]
OPENAI = [SYSTEM, AGAIN, CALL, ANSWER, GOLD]


@pytest.mark.parametrize(
    "spelling",
    [
        SHAREGPT,
        json.dumps(SHAREGPT),
        json.dumps(OPENAI, indent=2),
        [SYSTEM, AGAIN, called({"id": None, "name": "add", "arguments": '{"b": 2, "a": 2.5}'}), ANSWER, GOLD],
        [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "2+2?"}]},
         {**CALL, "name": None}, ANSWER, GOLD],
        [SYSTEM, AGAIN, {"role": "assistant", "function_call": CALL["tool_calls"][0]["function"]}, ANSWER, GOLD],
    ],
)  # fmt: skip
def test_all_spellings_give_the_same_problem(tmp_path: Path, spelling: Any) -> None:
    expected = problem_of(tmp_path / "a.jsonl", OPENAI)
    assert json.loads(expected.messages) == [SYSTEM, AGAIN, CALL, ANSWER]
    assert problem_of(tmp_path / "a.jsonl", spelling) == expected


def test_parquet_and_jsonl_give_the_same_conversations(tmp_path: Path) -> None:
    """Arrow adds keys with null to all messages and arguments; they are removed."""
    lines = [{"messages": CHATS[name], "tools": TOOLS} for name in CHATS if name != "separate reasoning"]
    lines.append({"messages": [USER, called(call("sub", c=1), call(b=1)), ANSWER, ANSWER], "tools": TOOLS})
    without_null = [{"type": "function", "function": {"name": "add", "parameters": {"b": {"type": "number"}}}}]
    dataset = saved(tmp_path / "a.jsonl", *({**row, "tools": without_null} for row in lines), tools_key="tools")
    pq.write_table(pa.Table.from_pylist(lines), tmp_path / "a.parquet")
    table = DatasetConfig(data_path=str(tmp_path / "a.parquet"), input_key="messages", tools_key="tools")
    ours, theirs = load_datasets([dataset]), load_datasets([table])
    key = [(json.loads(p.messages), json.loads(p.tools), p.text) for p in ours]
    assert [(json.loads(p.messages), json.loads(p.tools), p.text) for p in theirs] == key


@pytest.mark.parametrize(
    "text", ["[1, 2] + [3]", "[", '["role"]', "[{}]", "[]", '[{"a": 1}]', '{"role": "user"}', "[x]"]
)
def test_a_text_that_looks_like_a_list_is_a_text(tmp_path: Path, text: str) -> None:
    problem = problem_of(tmp_path / "a.jsonl", text)
    assert (problem.text, problem.messages) == (text, "")


def test_a_call_in_the_text_of_an_assistant_message_allows_a_tool_turn() -> None:
    text = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    chat = [USER, {"role": "assistant", "content": text}, ANSWER]
    found = read_conversation(chat)
    assert found is not None and list(found.messages) == chat


def test_rows_without_a_user_text_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = saved(
        tmp_path / "a.jsonl", {"messages": None}, {"messages": [{**USER, "content": " "}]}, {"messages": [USER]}
    )
    assert [problem.text for problem in load_datasets([dataset])] == ["1+1?"]
    assert "2 of 3" in caplog.text


# -- hashes -----------------------------------------------------------------------------------------------------------


def test_hashes_change_with_messages_tools_reference_and_columns() -> None:
    base = {"text": "a", "messages": "m", "tools": "t", "reference": "r", "columns": {"hint": "h", "unread": "u"}}

    def hashes(**changed: Any) -> Mapping[str, str]:
        return data_hashes([], [Problem(**{**base, **changed})], None, ["hint"], references=True)

    def changes(**changed: Any) -> set[str]:
        return {part for part, value in hashes(**changed).items() if hashes()[part] != value}

    assert changes(messages="n") == changes(tools="n") == changes(text="n") == {"problems"}
    assert changes(reference="n") == {"references"}
    assert changes(columns={"hint": "n"}) == {"columns"}
    assert changes(columns={**base["columns"], "unread": "n"}) == set()  # type: ignore[dict-item]


def test_references_are_hashed_only_if_the_run_trains_on_them() -> None:
    problem = Problem("1+1?", reference="2")
    assert "references" not in data_hashes([], [problem], None)
    assert "references" in data_hashes([], [problem], None, references=True)


def test_hashes_of_plain_problems_have_no_new_parts() -> None:
    """A checkpoint of problems as texts can be resumed."""
    found = data_hashes([], [Problem("1+1?")], None)
    assert set(found) == {"problems", "prompt_file", "system_prompt_file"}
    assert found["problems"] == "f938061da9690bf7"


def test_held_out_hashes_change_with_the_history(tmp_path: Path) -> None:
    def content(first: str) -> Mapping[str, str]:
        chat = [{**USER, "content": first}, THOUGHT, AGAIN]
        dataset = saved(tmp_path / "a.jsonl", {"messages": chat}, env_name=None)
        return load_held_out([dataset], tiny_tokenizer(QWEN3), 1000, None, None).content(None)

    assert content("a")["problems"] == content("a")["problems"] != content("b")["problems"]
