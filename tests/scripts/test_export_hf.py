"""What scripts.export_hf takes from a checkpoint, from the models of its recipe and from the command line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from distill.errors import UserError
from distill.model.export_files import EXPORT_FILES
from scripts import export_hf
from tests.helpers import save_tiny_model
from tests.model.test_export_files import RECIPE
from tests.tiny_tokenizer import tiny_tokenizer


def _model(folder: Path, eos: int, eos_token: str) -> Path:
    save_tiny_model(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = eos_token
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, which stops at <|endoftext|>."""
    return _model(tmp_path_factory.mktemp("models") / "base", 256, "<|endoftext|>")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An instruct model, which stops at <|im_end|>, and an id past the student's vocabulary."""
    folder = _model(tmp_path_factory.mktemp("models") / "instruct", 258, "<|im_end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 3000]}))
    return folder


def _info(student: Path, teacher: Path, chat_template: str | None = None, **others: Any) -> dict[str, Any]:
    """The record of a checkpoint that holds no stop ids."""
    policy = RECIPE["policy"] | {
        "model_name": str(student),
        "tokenizer": {"name": str(student), "chat_template": chat_template},
    }
    policy["generation"] = RECIPE["policy"]["generation"] | {"stop_token_ids": None}
    both = {"model_name": str(teacher), "tokenizer": {"name": str(teacher)}}
    return {"step": 4, "recipe": RECIPE | {"policy": policy, "teacher": both}, "files": {}, **others}


def _stops(files: Any) -> Any:
    return json.loads(files.contents["generation_config.json"])["eos_token_id"]


def test_an_old_checkpoint_is_exported_with_the_stop_ids_of_both_models(student, teacher, tmp_path, caplog) -> None:
    files, _, _ = export_hf._files(tmp_path, _info(student, teacher), None, None)
    assert _stops(files) == [256, 258] and "(258)" in files.contents["README.md"].decode()
    assert "stop ids [3000] are past" in caplog.text
    files, _, _ = export_hf._files(tmp_path, _info(student, student), None, None)
    assert _stops(files) == 256
    recorded = _info(student, teacher, stop_token_ids=[258])
    assert _stops(export_hf._files(tmp_path, recorded, None, None)[0]) == 258


def test_the_stop_ids_of_a_missing_teacher_are_warned_of_and_can_be_given(student, tmp_path, caplog) -> None:
    info = _info(student, tmp_path / "gone")
    with caplog.at_level(logging.WARNING):
        files, _, _ = export_hf._files(tmp_path, info, None, None)
    assert _stops(files) == 256 and f"teacher.model_name={tmp_path / 'gone'}" in caplog.text
    assert "--stop-token-ids" in caplog.text
    assert _stops(export_hf._files(tmp_path, info, None, [258, 256])[0]) == [256, 258]
    with pytest.raises(UserError, match=r"--stop-token-ids has 3000, which is no token: give ids in 0\.\.\d+"):
        export_hf._files(tmp_path, info, None, [3000])
    with pytest.raises(UserError, match=r"--stop-token-ids can't change the ids \[258\]"):
        export_hf._files(tmp_path, info | {"stop_token_ids": [258]}, None, [256])


def test_another_source_model_gets_the_chat_template_that_the_checkpoint_stores(student, tmp_path) -> None:
    info = _info(student, student, str(tmp_path / "moved.jinja"), stop_token_ids=[256])
    with pytest.raises(UserError, match=r"^policy\.tokenizer\.chat_template=.*moved\.jinja does not exist"):
        export_hf._files(tmp_path, info, str(student), None)
    (tmp_path / EXPORT_FILES).mkdir()
    (tmp_path / EXPORT_FILES / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    info["files"] = {f"{EXPORT_FILES}/chat_template.jinja": "1234"}
    files, _, _ = export_hf._files(tmp_path, info, str(student), None)
    assert files.contents["chat_template.jinja"] == b"{{ messages[0]['content'] }}"


def test_a_model_that_was_moved_can_be_named(student: Path, tmp_path: Path) -> None:
    info = _info(tmp_path / "gone", student, stop_token_ids=[256])
    with pytest.raises(UserError, match=r"^policy\.model_name=.* does not exist.*as --model$"):
        export_hf._files(tmp_path, info, None, None)
    with pytest.raises(UserError, match=r"^--model=.*lost does not exist(?!.*--model$)"):
        export_hf._files(tmp_path, info, str(tmp_path / "lost"), None)


@pytest.mark.parametrize("out", [".", "..", "/", "./"])
def test_a_folder_without_a_name_of_its_own_exists(out: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert export_hf.main([str(tmp_path), out]) == 2
    assert "exists: remove it, or name another folder" in capsys.readouterr().err
