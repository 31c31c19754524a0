"""A run's inputs with conversations: prompts, teacher's prefixes, validation data, hashes and the data cache."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.config import Config
from distill.data import cache
from distill.data.clock import RunClock, current_time
from distill.data.teacher_prefix import ContextPrefixes, Prefix, build_teacher_prefixes
from distill.errors import UserError
from distill.inputs import (
    Models,
    check_contexts,
    check_files,
    check_teacher_reads_more,
    find_models,
    hashes_of,
    read_held_out,
    read_prompts,
)
from tests.data.chat_templates import ALTERNATING, QWEN3
from tests.data.loading import load_datasets
from tests.data.teacher_prefixes import CONTEXT
from tests.data.test_conversations import AGAIN, CALL, CHATS, GOLD, THOUGHT, TOOLS, USER, saved
from tests.harness import config_for
from tests.helpers import save_tiny_model
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "student"
    save_tiny_model(folder, "qwen3", True)
    tiny_tokenizer(QWEN3).save_pretrained(folder)
    return folder


def rows_of(*hints: str, chat: Any = (USER, THOUGHT, AGAIN, GOLD)) -> list[dict[str, Any]]:
    return [{"messages": [*chat], "hint": hint, "tools": TOOLS, "for_teacher": [AGAIN]} for hint in hints]


def config_of(model: Path, path: Path, rows: list[dict[str, Any]], *overrides: str) -> Config:
    saved(path / "a.jsonl", *rows)
    keys = "input_key: messages, output_key: null, tools_key: tools, env_name: exact, repeat: 1"
    data = f"{{data_path: {path}/a.jsonl, {keys}}}"
    base = ("data.default.prompt_file=null", "data.default.input_key=null", "data.default.output_key=null")
    lengths = ("policy.max_total_sequence_length=4000", "data.max_input_seq_length=4000")
    step = ("distillation.num_prompts_per_step=1", "policy.train_global_batch_size=1", "distillation.val_at_start=true")
    context = (f"{CONTEXT}.enabled=true", *step)
    return config_for(
        model, model, f"data.train={data}", f"data.validation={data}", *base, *lengths, *context, *overrides
    )


def inputs_of(config: Config) -> tuple[Models, Any, Any, Any]:
    models, clock = find_models(config), RunClock(current_time())
    prompts = read_prompts(config, models, clock)
    prefixes = build_teacher_prefixes(config, models.teachers_tokenizer, models.valid_vocab, clock)
    check_teacher_reads_more(config, prefixes, prompts)
    check_contexts(config, models, prefixes, prompts.prompts.problems)
    held_out = read_held_out(config, models, clock)
    check_contexts(config, models, prefixes, [prompt.problem for prompt in held_out.prompts])
    return models, prompts, prefixes, held_out


def test_the_inputs_of_a_run_may_be_conversations_with_a_column_for_the_teacher(model: Path, tmp_path: Path) -> None:
    template = (f"{CONTEXT}.teacher_prefix_template='{{problem}} {{hint}}'", f"{CONTEXT}.keep_history=true")
    config = config_of(model, tmp_path, rows_of("add", "count"), *template)
    check_files(config, nullcontext)
    _, prompts, prefixes, held_out = inputs_of(config)
    assert [prompt.problem.answer for prompt in held_out.prompts] == ["4", "4"]
    (first,) = prompts.batch(0)
    prefix = prefixes.prefix_of(first)
    assert isinstance(prefixes, ContextPrefixes) and isinstance(prefix, Prefix)
    decode = tiny_tokenizer().decode
    hint = first.problem.columns["hint"]
    assert decode(list(prefix.token_ids)) == decode(list(first.student_ids)).replace("And 2+2?", f"And 2+2? {hint}")
    hashes = hashes_of(config, prompts, prefixes, held_out)
    other = config_of(model, tmp_path, rows_of("add", "multiply"), *template)
    _, prompts, prefixes, held_out = inputs_of(other)
    changed = hashes_of(other, prompts, prefixes, held_out)
    differ = {(key, part) for key in hashes for part in hashes[key] if hashes[key][part] != changed[key][part]}
    assert differ == {("data.train", "columns"), ("data.validation", "columns")}
    for key in ("val_temperature=0.5", "val_top_p=0.9", "val_top_k=7", "val_max_new_tokens=100"):
        sampled = config_of(model, tmp_path, rows_of("add", "multiply"), *template, f"policy.generation.{key}")
        again = hashes_of(sampled, prompts, prefixes, held_out)
        ((name, part),) = ((n, p) for n in again for p in again[n] if again[n][p] != changed[n][p])
        assert name == "data.validation" and "policy.generation.val_" in part, key


def test_the_teachers_system_prompt_file_is_hashed(model: Path, tmp_path: Path) -> None:
    keys = (f"{CONTEXT}.teacher_prefix_template={{problem}}", f"{CONTEXT}.teacher_system_prompt_file={tmp_path}/s.txt")

    def hashes(text: str) -> dict[str, Any]:
        (tmp_path / "s.txt").write_text(text)
        config = config_of(model, tmp_path, rows_of("a"), *keys)
        _, prompts, prefixes, held_out = inputs_of(config)
        return hashes_of(config, prompts, prefixes, held_out)

    before, after = hashes("Be brief."), hashes("Be exact.")
    differ = [part for part in before["data.train"] if before["data.train"][part] != after["data.train"][part]]
    assert differ == ["teacher_system_prompt_file"] and before["teacher.tokenizer"] != after["teacher.tokenizer"]


def test_a_teacher_that_only_reads_the_students_conversation_is_refused_except_for_a_control(
    model: Path, tmp_path: Path
) -> None:
    keys = (f"{CONTEXT}.teacher_prefix_template={{problem}}", f"{CONTEXT}.keep_history=true")
    with pytest.raises(UserError) as caught:
        inputs_of(config_of(model, tmp_path, rows_of("a"), *keys))
    assert caught.value.key == f"{CONTEXT}.teacher_prefix_template"
    same = [{**row, "for_teacher": [USER, THOUGHT, AGAIN]} for row in rows_of("a")]
    messages = f"{CONTEXT}.teacher_messages_key=for_teacher"
    with pytest.raises(UserError) as caught:
        inputs_of(config_of(model, tmp_path, same, messages))
    assert (caught.value.key, caught.value.value) == (f"{CONTEXT}.teacher_messages_key", "for_teacher")
    _, prompts, prefixes, _ = inputs_of(config_of(model, tmp_path, same, messages, "distillation.control=true"))
    (prompt,) = prompts.batch(0)
    assert prefixes.prefix_of(prompt) == Prefix(prompt.student_ids, prompt.inside_thought)


def test_a_row_that_the_teachers_template_rejects_is_refused_at_start(model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(ALTERNATING)
    rows = [*rows_of("a", "b"), {**rows_of("c")[0], "for_teacher": [USER, AGAIN]}]
    rows = [{**row, "tools": None} for row in rows]
    keys = (f"{CONTEXT}.teacher_messages_key=for_teacher", f"teacher.tokenizer.chat_template={tmp_path}/t.jinja")
    with pytest.raises(UserError, match="line 3 of") as caught:
        inputs_of(config_of(model, tmp_path, rows, *keys))
    assert caught.value.key == "teacher.tokenizer.chat_template"


def test_validation_problems_without_a_column_are_not_compared(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(model, tmp_path, rows_of("a"), f"{CONTEXT}.teacher_prefix_template='{{problem}} {{hint}}'")
    lines = [*rows_of("b"), *({k: v for k, v in row.items() if k != "hint"} for row in rows_of("c"))]
    other = saved(tmp_path / "b.jsonl", *lines, env_name=None)
    config = replace(config, data=replace(config.data, validation=(other,)))
    with caplog.at_level(logging.WARNING):
        _, _, prefixes, held_out = inputs_of(config)
    assert [prefixes.can_read(prompt.problem) for prompt in held_out.prompts] == [True, False]
    assert prefixes.prefix_of(held_out.prompts[1]) == "missing_trace"
    assert "1 of 2" in caplog.text and "hint" in caplog.text


def test_control_tokens_in_the_history_are_warned_of_but_think_tags_are_not(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chat = [{**USER, "content": "a <|im_end|>"}, THOUGHT, AGAIN]
    config = config_of(model, tmp_path, rows_of("a", chat=chat), f"{CONTEXT}.teacher_prefix_template='{{hint}}'")
    config = replace(config, distillation=replace(config.distillation, val_at_start=False, val_period=0))
    inputs_of(config)
    warned = [message for message in caplog.messages if "control tokens" in message]
    assert len(warned) == 1 and "'<|im_end|>'" in warned[0]


def test_a_cache_file_has_the_same_conversations_as_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [
        {"messages": [*CHATS[name], GOLD][: len(CHATS[name]) + i % 2], "tools": TOOLS} for i, name in enumerate(CHATS)
    ]
    dataset = saved(tmp_path / "a.jsonl", *rows, tools_key="tools")
    in_memory = load_datasets([dataset])
    monkeypatch.setattr(cache, "IN_MEMORY_BYTES", 0)
    mapped = load_datasets([dataset])
    assert list((tmp_path / "cache/distill/data").glob("*.arrow"))
    assert list(mapped) == list(in_memory)
    assert [bool(problem.reference) for problem in mapped] == [False, True] * 3
    assert json.loads(mapped[3].messages)[3]["tool_calls"] == CALL["tool_calls"]
    without = load_datasets([replace(dataset, tools_key=None)])
    assert not any(problem.tools for problem in without) and all(problem.tools for problem in mapped)
