"""What the teacher reads: columns in templates, system messages, complete messages, histories. A byte is a token."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.config import ContextDistillationConfig, load_config
from distill.data.conversations import as_json
from distill.data.prompts import load_prompts
from distill.data.teacher_context import TeacherContext, check_history, context_columns, reads_traces
from distill.data.teacher_prefix import (
    ContextPrefixes,
    SamePromptPrefixes,
    build_context_prefixes,
    build_teacher_prefixes,
)
from distill.errors import UserError
from distill.types import Problem, Prompt, Rollout
from distill.validation import context_is_known
from tests.data.chat_templates import ALTERNATING, QWEN3
from tests.data.loading import load_datasets
from tests.data.teacher_prefixes import CONTEXT, RESPONSE, counted, prefixes, read
from tests.data.test_conversations import AGAIN, ANSWER, CALL, GOLD, SYSTEM, THOUGHT, TOOLS, USER, saved
from tests.harness import REPO
from tests.tiny_tokenizer import tiny_tokenizer

RECIPE = ("--config", str(REPO / "recipes/distillation_math.yaml"), "policy.model_name=m", "teacher.model_name=m")
TEMPLATE, SYSTEM_FILE, MESSAGES = (
    f"{CONTEXT}.teacher_{name}" for name in ("prefix_template", "system_prompt_file", "messages_key")
)


def response(problem: Problem, text: str = RESPONSE) -> Rollout:
    ids = tuple(tiny_tokenizer()(text)["input_ids"])
    return Rollout(Prompt(0, (7, 8), problem), 0, ids, (0.0,) * len(ids), "length", version=0)


def teachers_text(problem: Problem, template: str = "{problem}", chat_template: str = QWEN3, **context: Any) -> str:
    found = prefixes(template, tokenizer=tiny_tokenizer(chat_template), chat_template=True, **context)
    return read(found.add([response(problem)])[0])[0]


CONVERSATION = Problem("And 2+2?", columns={"hint": "add"}, messages=as_json([SYSTEM, USER, THOUGHT, AGAIN]))

# -- columns ----------------------------------------------------------------------------------------------------------


def test_a_template_takes_any_column(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"input": "1+1?", "hint": "add", "level": 3, "rate": 0.5, "info": {"key": ["x", "{hint}"]}}
    ]
    context = ContextDistillationConfig(
        enabled=True, teacher_prefix_template="{problem} {hint} {level} {rate} {info.key.1} {{hint}}{trace}"
    )
    (prompt,) = load_prompts(
        [saved(tmp_path / "a.jsonl", *rows, input_key="input")], tiny_tokenizer(), 100, extra=context_columns(context)
    )
    assert prompt.problem.columns == {"hint": "add", "level": "3", "rate": "0.5", "info.key.1": "{hint}"}
    found = prefixes(context.teacher_prefix_template)
    assert read(found.add([response(prompt.problem)])[0]) == ["1+1? add 3 0.5 {hint} {hint}abc"]


def column_refusal(tmp_path: Path, template: str, *rows: dict[str, Any]) -> UserError:
    context = ContextDistillationConfig(enabled=True, teacher_prefix_template=template)
    dataset = saved(tmp_path / "a.jsonl", *rows, input_key="input")
    with pytest.raises(UserError) as caught:
        load_prompts([dataset], tiny_tokenizer(), 100, extra=context_columns(context))
    assert caught.value.key == TEMPLATE and f"{tmp_path}/a.jsonl" in caught.value.problem
    return caught.value


def test_a_placeholder_that_is_no_column_is_refused_with_similar_names(tmp_path: Path) -> None:
    error = column_refusal(tmp_path, "{problem} {hnt}", {"input": "1+1?", "hint": "add"})
    assert error.value == "{hnt}"
    assert "{hint}" in error.fix and "{{hnt}}" in error.fix


@pytest.mark.parametrize("row", [{"other": "x"}, {"hint": ["a"]}, {"hint": {"a": 1}}, {"hint": True}])
def test_a_row_without_a_usable_column_is_refused_with_its_number(tmp_path: Path, row: dict[str, Any]) -> None:
    error = column_refusal(tmp_path, "{problem} {hint}", {"input": "a", "hint": "x"}, {"input": "b", **row})
    assert error.value == "{hint}" and "line 2" in error.problem


def test_null_in_a_column_is_an_empty_text_and_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = ContextDistillationConfig(enabled=True, teacher_prefix_template="{problem}{hint}")
    rows: list[dict[str, Any]] = [{"input": "a", "hint": "x"}, {"input": "b", "hint": None}, {"input": "c", "hint": ""}]
    dataset = saved(tmp_path / "a.jsonl", *rows, input_key="input")
    found = load_prompts([dataset], tiny_tokenizer(), 100, extra=context_columns(context))
    assert [prompt.problem.columns for prompt in found] == [{"hint": "x"}, {"hint": ""}, {"hint": ""}]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "2 of 3" in caplog.text and "line 2" in caplog.text


def test_the_reference_column_is_the_reference(tmp_path: Path) -> None:
    config = load_config(
        [
            *RECIPE,
            "teacher.model_name=other",
            "distillation.off_policy.column=expert",
            "distillation.off_policy.share=0.5",
        ]
    )
    from distill.inputs import reference_column

    dataset = saved(tmp_path / "a.jsonl", {"messages": [USER, GOLD], "expert": "two"})
    (prompt,) = load_prompts([dataset], tiny_tokenizer(), 100, reference=reference_column(config))
    assert (prompt.problem.reference, prompt.problem.answer) == ("two", "4")
    bad = saved(tmp_path / "a.jsonl", {"messages": [USER], "expert": "two"}, {"messages": [USER]})
    with pytest.raises(UserError) as caught:
        load_prompts([bad], tiny_tokenizer(), 100, reference=reference_column(config))
    assert (caught.value.key, caught.value.value) == ("distillation.off_policy.column", "expert")
    off = replace(config.distillation, off_policy=replace(config.distillation.off_policy, share=0.0))
    assert reference_column(replace(config, distillation=off)) is None
    off = replace(config.distillation, off_policy=replace(config.distillation.off_policy, column=None))
    own = reference_column(replace(config, distillation=off))
    dataset = saved(tmp_path / "a.jsonl", {"messages": [USER, GOLD], "expert": "two"})
    (prompt,) = load_prompts([dataset], tiny_tokenizer(), 100, reference=own)
    assert (prompt.problem.reference, prompt.problem.answer) == ("4", "4")


@pytest.mark.parametrize("name", ["gold-answer", "gold answer", "1", "é-b"])
def test_a_literal_word_that_is_a_column_is_refused(tmp_path: Path, name: str) -> None:
    error = column_refusal(tmp_path, f"{{problem}} {{{name}}}", {"input": "1+1?", name: "x"})
    assert error.value == f"{{{name}}}"
    for template in (f"{{problem}} {{{{{name}}}}}", "{problem} {gold-}", f"{{problem}} {{{name}-x}}"):
        context = ContextDistillationConfig(enabled=True, teacher_prefix_template=template)
        dataset = saved(tmp_path / "a.jsonl", {"input": "1+1?", name: "x"}, input_key="input")
        (prompt,) = load_prompts([dataset], tiny_tokenizer(), 100, extra=context_columns(context))
        assert prompt.problem.columns == {}


def test_unused_columns_named_problem_or_trace_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[dict[str, Any]] = [{"input": "a"}, {"input": "b", "problem": "p", "trace": None}]
    for template, input_key, trace_column, expected in (
        ("{problem}{trace}", "input", None, ["problem", "trace"]),
        ("{problem}", "input", None, ["problem"]),
        ("{problem}{trace}", "problem", "trace", []),
    ):
        caplog.clear()
        context = ContextDistillationConfig(enabled=True, teacher_prefix_template=template)
        dataset = saved(tmp_path / "a.jsonl", *rows[trace_column is not None :], input_key=input_key)
        load_prompts([dataset], tiny_tokenizer(), 100, trace_column=trace_column, extra=context_columns(context))
        assert [text.partition("{")[2].partition("}")[0] for text in caplog.messages] == expected


def test_a_prompt_that_ends_with_a_tools_result_requires_the_history(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = saved(tmp_path / "a.jsonl", {"messages": [USER]}, {"messages": [USER, THOUGHT, AGAIN, CALL, ANSWER]})
    problems = load_datasets([dataset])
    context = ContextDistillationConfig(enabled=True, teacher_prefix_template="{problem}")
    with pytest.raises(UserError) as caught:
        check_history(context, problems, problems.location, "data.train")
    assert (caught.value.key, caught.value.value) == (f"{CONTEXT}.keep_history", False)
    assert f"line 2 of {tmp_path}/a.jsonl" in caught.value.problem
    for allowed in (replace(context, keep_history=True), replace(context, teacher_messages_key="m")):
        check_history(allowed, problems, problems.location, "data.train")
    assert not caplog.records
    turns = [Problem("a"), CONVERSATION, Problem("b", messages=as_json([SYSTEM, USER])), CONVERSATION]
    check_history(context, turns, str, "data.train")
    assert len(caplog.records) == 1 and "2 of 4" in caplog.text


# -- messages ---------------------------------------------------------------------------------------------------------


def test_the_teachers_system_message_is_a_filled_template(tmp_path: Path) -> None:
    path = tmp_path / "system.txt"
    path.write_text("Hint: {hint}. {{x}} {trace}\n")
    text = teachers_text(CONVERSATION, "Solve {problem}", teacher_system_prompt_file=str(path))
    assert text == (
        "<|im_start|>system\nHint: add. {x} abc<|im_end|>\n<|im_start|>user\nSolve And 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    context = ContextDistillationConfig(
        enabled=True, teacher_system_prompt_file=str(path), teacher_prefix_template="{problem}"
    )
    assert reads_traces(context) and [column.name for column in TeacherContext.of(context).columns] == ["hint"]


def test_the_teacher_keeps_the_students_history(tmp_path: Path) -> None:
    text = teachers_text(CONVERSATION, "{problem} ({hint})", keep_history=True)
    chat = [SYSTEM, USER, THOUGHT, {**AGAIN, "content": "And 2+2? (add)"}]
    settings = {"tokenize": False, "add_generation_prompt": True}
    assert text == tiny_tokenizer(QWEN3).apply_chat_template(chat, **settings)
    (tmp_path / "system.txt").write_text("Be exact.")
    text = teachers_text(CONVERSATION, keep_history=True, teacher_system_prompt_file=str(tmp_path / "system.txt"))
    chat = [{**SYSTEM, "content": "Be exact."}, USER, THOUGHT, AGAIN]
    assert text == tiny_tokenizer(QWEN3).apply_chat_template(chat, **settings)
    assert teachers_text(CONVERSATION).count("<|im_start|>") == 2  # only the template and the generation prompt


def test_the_teacher_keeps_the_system_prompt_file_and_the_tools(tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("Be kind.")
    dataset = saved(
        tmp_path / "a.jsonl",
        {"messages": [USER, CALL, ANSWER], "tools": TOOLS},
        system_prompt_file=str(tmp_path / "system.txt"),
        tools_key="tools",
    )
    (prompt,) = load_prompts([dataset], tiny_tokenizer(QWEN3), 10_000)
    text = teachers_text(prompt.problem, keep_history=True)
    assert text == tiny_tokenizer().decode(list(prompt.student_ids))
    assert '"name": "add"' in teachers_text(prompt.problem)


def test_the_teacher_reads_complete_messages_of_a_column(tmp_path: Path) -> None:
    context = ContextDistillationConfig(enabled=True, teacher_messages_key="for_teacher")
    chat = [{"from": "system", "value": "Use {hint}."}, {"from": "human", "value": "2+2, so?"}]
    dataset = saved(tmp_path / "a.jsonl", {"messages": [USER, THOUGHT, AGAIN], "for_teacher": chat})
    (prompt,) = load_prompts([dataset], tiny_tokenizer(QWEN3), 1000, extra=context_columns(context))
    assert teachers_text(prompt.problem, teacher_messages_key="for_teacher") == (
        "<|im_start|>system\nUse {hint}.<|im_end|>\n<|im_start|>user\n2+2, so?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not reads_traces(context)


@pytest.mark.parametrize(
    "chat", [[USER, GOLD], [], [GOLD], "text", "", None, 3, {"role": "user", "content": "x"}, [USER, ANSWER], [SYSTEM]]
)
def test_malformed_messages_for_the_teacher_are_refused_with_their_row(tmp_path: Path, chat: Any) -> None:
    context = ContextDistillationConfig(enabled=True, teacher_messages_key="for_teacher")
    rows = [{"messages": [USER], "for_teacher": [USER]}, {"messages": [USER], "for_teacher": chat}]
    with pytest.raises(UserError) as caught:
        load_prompts([saved(tmp_path / "a.jsonl", *rows)], tiny_tokenizer(), 1000, extra=context_columns(context))
    assert (caught.value.key, caught.value.value) == (MESSAGES, "for_teacher")
    assert "line 2" in caught.value.problem


def test_overflow_policies_truncate_the_trace_but_not_the_history() -> None:
    problem = replace(CONVERSATION, messages=as_json([USER, THOUGHT, AGAIN]))
    full = teachers_text(problem, "{problem}|{trace}", keep_history=True)
    length, tokens = len(tiny_tokenizer()(RESPONSE)["input_ids"]), len(tiny_tokenizer()(full)["input_ids"])
    settings: dict[str, Any] = {"tokenizer": tiny_tokenizer(QWEN3), "chat_template": True, "keep_history": True}
    made, _ = prefixes("{problem}|{trace}", tokens + length - 2, **settings).add([response(problem)])
    assert read(made) == [full.replace("|abc", "|a")]
    _, counts = prefixes("{problem}|{trace}", tokens + length - 4, **settings).add([response(problem)])
    assert counted(counts)["dropped_prefix_too_long"] == 1
    for policy, kept in (("truncate_prefix_only", slice(2, None)), ("truncate_prefix_from_end", slice(None, -2))):
        found = prefixes("{problem}|{trace}", tokens + length - 2, **settings, overflow_policy=policy)
        (made_one,) = found.add([response(problem)])[0]
        assert list(made_one.teacher_prefix_ids) == tiny_tokenizer()(full)["input_ids"][kept]


def test_complete_messages_that_are_too_long_are_dropped() -> None:
    problem = Problem("a", columns={"m": as_json([USER])})
    settings: dict[str, Any] = {"tokenizer": tiny_tokenizer(QWEN3), "chat_template": True, "teacher_messages_key": "m"}
    _, counts = prefixes(max_tokens=15, **settings).add([response(problem)])
    assert counted(counts)["dropped_prefix_too_long"] == 1


# -- checks at start --------------------------------------------------------------------------------------------------


def test_a_conversation_that_the_teachers_template_rejects_is_refused_at_start() -> None:
    found = prefixes("{problem}", tokenizer=tiny_tokenizer(ALTERNATING), chat_template=True, keep_history=True)
    problems = [Problem("a"), Problem("b", messages=as_json([USER, AGAIN]))]
    with pytest.raises(UserError, match="row 1") as caught:
        found.check_conversations(problems, lambda i: f"row {i}")
    assert caught.value.key == "teacher.tokenizer.chat_template"
    prefixes(tokenizer=tiny_tokenizer(ALTERNATING), chat_template=True).check_conversations(problems, str)


def test_an_empty_or_malformed_system_prompt_file_of_the_teacher_is_refused(tmp_path: Path) -> None:
    for content in ("", " \n", "{problem.text}", "{hint!r}", "\n{trace:>9}"):
        (tmp_path / "system.txt").write_text(content)
        context = ContextDistillationConfig(enabled=True, teacher_system_prompt_file=str(tmp_path / "system.txt"))
        with pytest.raises(UserError) as caught:
            TeacherContext.of(context)
        assert (caught.value.key, caught.value.value) == (SYSTEM_FILE, str(tmp_path / "system.txt"))
    with pytest.raises(UserError) as caught:
        TeacherContext.of(replace(context, teacher_system_prompt_file=str(tmp_path / "none.txt")))
    assert caught.value.key == SYSTEM_FILE


ON = f"{CONTEXT}.enabled=true"
MESSAGES_ON = (ON, f"{MESSAGES}=m")


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        (f"{CONTEXT}.teacher_system_prompt_file", (*MESSAGES_ON, f"{SYSTEM_FILE}=a.txt")),
        (f"{CONTEXT}.keep_history", (*MESSAGES_ON, f"{CONTEXT}.keep_history=true")),
        (
            f"{CONTEXT}.trace_source",
            (*MESSAGES_ON, f"{CONTEXT}.trace_source=static_dataset", f"{CONTEXT}.static_trace.answer_column=s"),
        ),
        (
            f"{CONTEXT}.trace_extractor.missing_trace_policy",
            (*MESSAGES_ON, f"{CONTEXT}.trace_extractor.missing_trace_policy=drop_sample"),
        ),
        (MESSAGES, (*MESSAGES_ON, f"{CONTEXT}.chat_template=false")),
        (SYSTEM_FILE, (ON, f"{SYSTEM_FILE}=a.txt", f"{CONTEXT}.chat_template=false")),
        (f"{CONTEXT}.keep_history", (ON, f"{CONTEXT}.keep_history=true", f"{CONTEXT}.chat_template=false")),
        (MESSAGES, (ON, f"{MESSAGES}=''")),
        (SYSTEM_FILE, (ON, f"{SYSTEM_FILE}=' '")),
        (f"{CONTEXT}.refresh_period", (f"{CONTEXT}.refresh_period=0",)),
        ("distillation.control", ("distillation.control=true", "distillation.allow_degenerate=true")),
        (
            "distillation.control",
            (ON, "distillation.control=true", "teacher.model_name=other", f"{CONTEXT}.mode=frozen"),
        ),
        ("data.train.tools_key", ("data.train.tools_key=''",)),
    ],
)
def test_keys_without_effect_are_refused(key: str, overrides: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        load_config([*RECIPE, *overrides])
    assert caught.value.key == key


def test_a_control_reads_the_students_prompt_and_is_not_degenerate() -> None:
    config = load_config([*RECIPE, ON, "distillation.control=true", f"{TEMPLATE}={{problem}}"])
    assert isinstance(build_teacher_prefixes(config, tiny_tokenizer()), SamePromptPrefixes)
    assert isinstance(build_context_prefixes(config, tiny_tokenizer()), ContextPrefixes)
    without = replace(config, distillation=replace(config.distillation, control=False))
    assert isinstance(build_teacher_prefixes(without, tiny_tokenizer()), ContextPrefixes)
    assert context_is_known(config)


def test_periodic_refreshes_may_have_any_period() -> None:
    load_config([*RECIPE, ON, f"{CONTEXT}.mode=self_periodic", f"{CONTEXT}.refresh_period=1"])
