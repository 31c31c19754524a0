"""Configuration of the teacher's context: templates, refusals, chat templates of student and teacher."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.config import ContextDistillationConfig, DatasetConfig, load_config
from distill.data.prompts import PromptOrder, load_prompts
from distill.data.teacher_prefix import SamePromptPrefixes, build_teacher_prefixes
from distill.errors import UserError
from distill.inputs import check_teacher_reads_more, find_models
from tests.data.teacher_prefixes import CONTEXT, RESPONSE, STATIC, prefixes, read, rollout
from tests.harness import REPO, config_for
from tests.helpers import save_tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

RECIPE = ("--config", str(REPO / "recipes/distillation_math.yaml"))

# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "source", "solutions", "refused"),
    [
        ("{problem}", "dynamic", ["<think>a</think>"], True),
        ("{problem}{trace}", "dynamic", [""], False),  # traces are unknown before the rollouts
        ("{problem}{trace}", "static_dataset", ["", "no span"], True),
        ("{problem}{trace}", "static_dataset", ["", "", "<think>a</think>"], False),
        ("{problem}{{trace}}", "dynamic", [""], False),
        ("{problem}.", "static_dataset", [""], False),
    ],
)
def test_a_self_teacher_that_reads_only_the_students_prompt_is_refused(
    tmp_path: Path, template: str, source: str, solutions: list[str], refused: bool
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"input": "1+1?", "solution": s}) + "\n" for s in solutions))
    context = "distillation.context_distillation"
    config = load_config(
        [
            *RECIPE,
            *("policy.model_name=m", "teacher.model_name=m", f"{context}.enabled=true"),
            *(f"{context}.teacher_prefix_template={template}", f"{context}.trace_source={source}"),
            *([f"{context}.static_trace.answer_column=solution"] if source == "static_dataset" else []),
        ]
    )
    dataset = DatasetConfig(data_path=str(tmp_path / "a.jsonl"))
    prompts = load_prompts([dataset], tiny_tokenizer(), 100, trace_column="solution")
    order = PromptOrder(prompts, 1, seed=0, shuffle=False)
    built = build_teacher_prefixes(config, tiny_tokenizer())
    with pytest.raises(UserError) if refused else contextlib.nullcontext() as caught:
        check_teacher_reads_more(config, built, order)
    if caught is not None:
        assert (caught.value.key, caught.value.value) == (f"{CONTEXT}.teacher_prefix_template", template)
        assert "student" in caught.value.problem and "allow_degenerate" in caught.value.fix


def test_a_template_that_fills_the_window_is_refused() -> None:
    with pytest.raises(UserError, match=r" 9 tokens .*teacher\.max_total_sequence_length=9:") as caught:
        prefixes("Solve: {problem}, {trace}", max_tokens=9)
    assert caught.value.key == f"{CONTEXT}.teacher_prefix_template"
    prefixes("Solve: {problem}, {trace}", max_tokens=10)
    with pytest.raises(UserError, match=" 28 tokens"):  # with those of the chat template
        prefixes("Solve: {problem}, {trace}", max_tokens=28, chat_template=True)


@pytest.mark.parametrize(
    ("template", "source", "warns"),
    [("{problem}{trace}", {}, 1), ("{problem}{trace}", STATIC, 0), ("{problem} {{trace}}", {}, 0)],
)
def test_a_trace_of_the_scored_response_is_warned_of_once(
    caplog: pytest.LogCaptureFixture, template: str, source: dict[str, Any], warns: int
) -> None:
    with caplog.at_level(logging.WARNING):
        found = prefixes(template, **source)
        for _ in range(3):
            found.add([rollout(RESPONSE, solution="")])
    assert len(caplog.records) == warns
    assert all("trace_source=dynamic" in text and len(text) <= 100 for text in caplog.messages)


def test_the_configuration_selects_the_teacher_prefixes() -> None:
    config = load_config(RECIPE)
    tokenizer = tiny_tokenizer()
    assert isinstance(build_teacher_prefixes(config, tokenizer), SamePromptPrefixes)
    context = replace(
        config.distillation.context_distillation, enabled=True, overflow_policy="truncate_prefix_from_end",
        teacher_prefix_template="{problem} {trace}", chat_template=False,
    )  # fmt: skip
    config = replace(
        config,
        distillation=replace(config.distillation, context_distillation=context),
        teacher=replace(config.teacher, max_total_sequence_length=10),
    )
    made, _ = build_teacher_prefixes(config, tokenizer).add([rollout(RESPONSE)])
    assert read(made) == ["1+1"]
    dropping = replace(context, trace_extractor=replace(context.trace_extractor, missing_trace_policy="drop_sample"))
    config = replace(config, distillation=replace(config.distillation, context_distillation=dropping))
    assert build_teacher_prefixes(config, tokenizer).add([rollout("2")])[0] == []


def test_the_trace_column_is_required_only_if_it_is_read() -> None:
    context = ContextDistillationConfig(enabled=True, **STATIC)
    assert context.trace_column == "solution"
    assert replace(context, enabled=False).trace_column is None
    assert replace(context, trace_source="dynamic").trace_column is None


def test_the_chat_template_gets_the_teachers_arguments_or_else_the_students() -> None:
    config = load_config(RECIPE)
    context = replace(config.distillation.context_distillation, enabled=True, teacher_prefix_template="{problem}")
    config = replace(config, distillation=replace(config.distillation, context_distillation=context))
    quiet = {"enable_thinking": False}
    for student, teacher, thinks in ((None, None, True), (quiet, None, False), (quiet, {}, True), (None, quiet, False)):
        policy = replace(config.policy, tokenizer=replace(config.policy.tokenizer, chat_template_kwargs=student))
        other = replace(config.teacher, tokenizer=replace(config.teacher.tokenizer, chat_template_kwargs=teacher))
        made, _ = build_teacher_prefixes(replace(config, policy=policy, teacher=other), tiny_tokenizer()).add(
            [rollout("2")]
        )
        assert ("</think>" not in read(made)[0]) == thinks


def test_errors_of_the_teachers_chat_template_have_the_teachers_keys() -> None:
    for template in ("{{ raise_exception('no') }}", "{{ ['a', 'b'] | random }}"):
        with pytest.raises(UserError) as caught:
            prefixes("{problem}", tokenizer=tiny_tokenizer(template), chat_template=True)
        assert caught.value.key == "teacher.tokenizer.chat_template" and "policy." not in str(caught.value)
    words = ("enabled=true", "chat_template=true", "teacher_prefix_template={problem}")
    same_model = ("policy.model_name=m", "teacher.model_name=m")
    context = [*same_model, *(f"{CONTEXT}.{word}" for word in words)]
    for who in ("policy", "teacher"):  # the teacher's template has the student's arguments by default
        config = load_config([*RECIPE, *context, f"{who}.tokenizer.chat_template_kwargs={{tokenize: true}}"])
        with pytest.raises(UserError) as caught:
            build_teacher_prefixes(config, tiny_tokenizer())
        assert (caught.value.key, caught.value.value) == (f"{who}.tokenizer.chat_template_kwargs.tokenize", True)


def test_a_self_teacher_uses_the_students_chat_template(tmp_path: Path) -> None:
    """The configured student tokenizer has another chat template than the student's model folder."""
    for name in ("student", "teacher", "chat"):
        save_tiny_model(tmp_path / name, "qwen3")
        tiny_tokenizer(chat_template=f"{name}: {{{{ messages[0]['content'] }}}}").save_pretrained(tmp_path / name)
    context = "distillation.context_distillation"
    named = (f"policy.tokenizer.name={tmp_path}/chat", f"{context}.enabled=true", f"{context}.chat_template=true")
    for teacher, mode, wrote in (("student", "self_frozen", "chat"), ("teacher", "frozen", "teacher")):
        keys = (*named, f"{context}.mode={mode}", f"{context}.teacher_prefix_template={{problem}}")
        config = config_for(tmp_path / "student", tmp_path / teacher, *keys)
        (made,), _ = build_teacher_prefixes(config, find_models(config).teachers_tokenizer).add([rollout("2")])
        assert read([made]) == [f"{wrote}: 1+1?"]
