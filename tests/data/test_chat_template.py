"""Chat templates: which template student and teacher use, and which templates are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill import inputs
from distill.data.chat_template import check_chat_template
from distill.data.rendering import chat_ids
from distill.data.tokenizer import load_tokenizer
from distill.errors import UserError
from distill.inputs import find_models
from tests.data.byte_level import load
from tests.harness import config_for
from tests.helpers import save_tiny_model
from tests.tiny_tokenizer import CHATML, tiny_tokenizer


def test_the_configured_chat_templates_are_used_by_student_and_teacher(tmp_path: Path) -> None:
    for name in ("student", "other"):
        save_tiny_model(tmp_path / name, "qwen3")
        tiny_tokenizer(chat_template=f"{name}: {{{{ messages[0].content }}}}").save_pretrained(tmp_path / name)
    for name in ("mine", "theirs"):
        (tmp_path / f"{name}.jinja").write_text(f"\ufeff{name}: {{{{ messages[0].content }}}}\n")
    context = "distillation.context_distillation"
    mine, theirs = (f"{who}.tokenizer.chat_template={tmp_path}/{file}.jinja" for who, file in
                    (("policy", "mine"), ("teacher", "theirs")))  # fmt: skip
    for mode in ("frozen", "self_frozen"):
        for teacher, keys, writes in (
            ("student", (), ("student", "student")),
            ("student", (mine,), ("mine", "mine")),
            ("student", (theirs,), ("student", "theirs")),
            ("student", (mine, theirs), ("mine", "theirs")),
            ("other", (mine,), ("mine", "other")),
            ("other", (mine, theirs), ("mine", "theirs")),
            ("student", ("policy.tokenizer.chat_template=default",), ("student", "student")),
        ):
            if mode != "frozen" and (teacher == "other" or not keys or "default" in keys[0]):
                continue
            words = (f"{context}.enabled=true", f"{context}.mode={mode}", f"{context}.chat_template=true")
            template = f"{context}.teacher_prefix_template={{problem}}"
            models_ = find_models(config_for(tmp_path / "student", tmp_path / teacher, *words, template, *keys))
            chat = [[{"role": "user", "content": "1+1"}]]
            read = [models_.tokenizer, models_.teachers_tokenizer]
            assert [t.decode(chat_ids(t, chat)[0]) for t in read] == [f"{name}: 1+1" for name in writes]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"one\n{% for m in messages %}\n{{ m.content ", "line 3"),
        (b"\xff\xfe{{ messages }}", "UTF-8"),
        (b"Solve: {}", r"'What is 1\+2\?' .*'Solve: \{\}'"),
        (None, "not exist"),
    ],
)
def test_an_unusable_chat_template_file_is_refused(tmp_path: Path, content: bytes | None, fault: str) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    if content is not None:
        (tmp_path / "own.jinja").write_bytes(content)
    with pytest.raises(UserError, match=fault) as caught:
        load(tmp_path, chat_template=str(tmp_path / "own.jinja"))
    assert (caught.value.key, caught.value.value) == ("policy.tokenizer.chat_template", str(tmp_path / "own.jinja"))


def test_a_teacher_with_the_students_tokenizer_files_shares_the_tokenizer_but_not_the_stop_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def load_and_count(*given: Any) -> Any:
        loaded.append(given)
        return load_tokenizer(*given)

    monkeypatch.setattr(inputs, "load_tokenizer", load_and_count)
    for name, stop in (("student", 258), ("teacher", 256)):
        save_tiny_model(tmp_path / name, "qwen3")
        tiny_tokenizer().save_pretrained(tmp_path / name)
        (tmp_path / name / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    config = config_for(tmp_path / "student", tmp_path / "teacher", "distillation.context_distillation.mode=frozen")
    found = find_models(config)
    assert found.stop_token_ids == (256, 258) and found.teachers_tokenizer is found.tokenizer and len(loaded) == 1
    (tmp_path / "teacher/chat_template.jinja").write_text("T {{ messages[0].content }}")
    assert find_models(config).teachers_tokenizer.chat_template == "T {{ messages[0].content }}"
    assert len(loaded) == 3


MESSAGES = "{% for m in messages %}CONTENT{% endfor %}"


@pytest.mark.parametrize(
    "content", ["{{ m.content.split()|join('\n') }}", "{{ m.content.replace(' ', '') }}", "{{ m.content.upper() }}"]
)
def test_a_chat_template_may_change_white_space_and_case(tmp_path: Path, content: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=MESSAGES.replace("CONTENT", content))
    check_chat_template(tokenizer, "policy.tokenizer.name=x", "policy.tokenizer.chat_template")


def test_a_chat_template_is_checked_with_its_configured_arguments(tmp_path: Path) -> None:
    template = MESSAGES.replace("CONTENT", "{% if mode == 'solve' %}{{ m.content }}{% endif %}")
    save_tiny_model(tmp_path / "own", "qwen3")
    tiny_tokenizer(chat_template=template).save_pretrained(tmp_path / "own")
    (tmp_path / "template.jinja").write_text(template)
    solve, other = "tokenizer.chat_template_kwargs={mode: solve}", "tokenizer.chat_template_kwargs={mode: other}"
    context = [f"distillation.context_distillation.{word}" for word in ("enabled=true", "chat_template=true")]
    context.append("distillation.context_distillation.teacher_prefix_template={problem}")
    for key in ((), (f"policy.tokenizer.chat_template={tmp_path}/template.jinja",)):
        words = ("distillation.allow_degenerate=true", *key)
        find_models(config_for(tmp_path / "own", tmp_path / "own", f"policy.{solve}", *words))
        with pytest.raises(UserError) as caught:
            find_models(config_for(tmp_path / "own", tmp_path / "own", f"policy.{other}", *words))
        template_file = f"{tmp_path}/template.jinja" if key else None
        assert (caught.value.key, caught.value.value) == ("policy.tokenizer.chat_template", template_file)
        theirs = [f"teacher.{word.removeprefix('policy.')}" for word in key]
        settings = (f"policy.{solve}", f"teacher.{other}", *words, *theirs, *context)
        with pytest.raises(UserError) as caught:
            find_models(config_for(tmp_path / "own", tmp_path / "own", *settings))
        assert (caught.value.key, caught.value.value) == ("teacher.tokenizer.chat_template", template_file)


def test_the_default_of_named_templates_is_used_and_a_missing_template_is_logged(tmp_path: Path, caplog: Any) -> None:
    save_tiny_model(tmp_path / "m", "qwen3")
    named = {"default": "D {{ messages[0].content }}", "tool_use": "T {{ messages[0].content }}"}
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "m")
    listed = [{"name": name, "template": text} for name, text in named.items()]
    settings = json.loads((tmp_path / "m/tokenizer_config.json").read_text())
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": listed}))
    config = config_for(tmp_path / "m", tmp_path / "m", "distillation.allow_degenerate=true")
    tokenizer = find_models(config).tokenizer
    assert tokenizer.decode(chat_ids(tokenizer, [[{"role": "user", "content": "a"}]])[0]) == "D a"
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "m/chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    caplog.clear()
    with caplog.at_level("INFO"):
        assert find_models(config).tokenizer.chat_template is None
    (line,) = [record.getMessage() for record in caplog.records if "chat template" in record.getMessage()]
    assert "chat_template.json" in line
