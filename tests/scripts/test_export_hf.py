"""scripts.export_hf combines a checkpoint, the models of its recipe and the options of the command line."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.checkpoint.base_model import BASE
from distill.errors import UserError
from distill.model.export_files import EXPORT_FILES
from scripts import export_hf
from tests.helpers import save_tiny_model
from tests.model.test_model_card import RECIPE
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
    """Return a base model, which stops at <|endoftext|>."""
    return _model(tmp_path_factory.mktemp("models") / "base", 256, "<|endoftext|>")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an instruct model, which stops at <|im_end|> and at an id beyond the student's vocabulary."""
    folder = _model(tmp_path_factory.mktemp("models") / "instruct", 258, "<|im_end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 3000]}))
    return folder


def _info(student: Path, teacher: Path, chat_template: str | None = None, **others: Any) -> dict[str, Any]:
    """Return the training_info of a checkpoint without stop ids."""
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
    assert "[3000]" in caplog.text
    files, _, _ = export_hf._files(tmp_path, _info(student, student), None, None)
    assert _stops(files) == 256
    recorded = _info(student, teacher, stop_token_ids=[258])
    assert _stops(export_hf._files(tmp_path, recorded, None, None)[0]) == 258


def test_a_missing_teacher_gives_a_warning_and_its_stop_ids_are_an_option(student, tmp_path, caplog) -> None:
    info = _info(student, tmp_path / "gone")
    with caplog.at_level(logging.WARNING):
        files, _, _ = export_hf._files(tmp_path, info, None, None)
    assert _stops(files) == 256 and f"teacher.model_name={tmp_path / 'gone'}" in caplog.text
    assert "--stop-token-ids" in caplog.text
    assert _stops(export_hf._files(tmp_path, info, None, [258, 256])[0]) == [256, 258]
    with pytest.raises(UserError, match=r"0\.\.\d+") as refused:
        export_hf._files(tmp_path, info, None, [3000])
    assert (refused.value.key, refused.value.value) == ("--stop-token-ids", 3000)
    with pytest.raises(UserError, match=r"\[258\]") as refused:
        export_hf._files(tmp_path, info | {"stop_token_ids": [258]}, None, [256])
    assert (refused.value.key, refused.value.value) == ("--stop-token-ids", [256])


def test_an_old_checkpoint_has_the_tokenizer_and_chat_template_of_the_recipe(student, tmp_path) -> None:
    info = _info(student, student, str(tmp_path / "moved.jinja"), stop_token_ids=[256])
    with pytest.raises(UserError, match=r"moved\.jinja") as refused:
        export_hf._files(tmp_path, info, str(student), None)
    assert refused.value.key == "policy.tokenizer.chat_template"
    (tmp_path / "moved.jinja").write_text("{{ messages[0]['content'] }}")
    other = tiny_tokenizer(extra=("<|other|>",))
    other.save_pretrained(tmp_path / "other")
    info["recipe"]["policy"]["tokenizer"]["name"] = str(tmp_path / "other")
    files, _, _ = export_hf._files(tmp_path, info, str(student), None)
    assert files.contents["chat_template.jinja"] == b"{{ messages[0]['content'] }}"
    assert files.contents["tokenizer.json"] == (tmp_path / "other/tokenizer.json").read_bytes()


def test_the_option_model_is_refused_for_all_weights_with_their_configuration(student, tmp_path) -> None:
    (tmp_path / EXPORT_FILES).mkdir()
    shutil.copy(student / "config.json", tmp_path / EXPORT_FILES)
    info = _info(student, student, stop_token_ids=[256], files={f"{EXPORT_FILES}/config.json": {}})
    with pytest.raises(UserError) as refused:
        export_hf._files(tmp_path, info, str(student), None)
    assert (refused.value.key, refused.value.value) == ("--model", str(student))
    _, config, _ = export_hf._files(tmp_path, {**info, BASE: {"checksum": {}}}, str(tmp_path / "moved"), None)
    assert config.model_type == "llama", "the adapters need only the weights of the base"


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [({"lm_head.weight": (4,)}, {}), ({}, {"lm_head.weight": (4,)}), ({"a": (2, 3)}, {"a": (3, 2)})],
)
def test_a_model_with_other_tensors_than_the_checkpoint_is_refused(tmp_path, monkeypatch, stored, wanted) -> None:
    """For example, a head that was trained separately must not disappear because the model ties it."""
    stored, wanted = ({name: torch.Size(size) for name, size in each.items()} for each in (stored, wanted))
    monkeypatch.setattr(export_hf, "_shapes", lambda _: stored)
    with pytest.raises(UserError) as refused:
        next(export_hf._weights(tmp_path, wanted, torch.float32, "a model"))
    assert refused.value.key == "--model" and next(iter(stored | wanted)) in refused.value.problem


def test_the_error_for_a_missing_student_suggests_the_option_model(student: Path, tmp_path: Path) -> None:
    info = _info(tmp_path / "gone", student, stop_token_ids=[256])
    with pytest.raises(UserError) as refused:
        export_hf._files(tmp_path, info, None, None)
    assert (refused.value.key, refused.value.value) == ("policy.model_name", str(tmp_path / "gone"))
    assert "--model" in refused.value.fix
    with pytest.raises(UserError) as refused:
        export_hf._files(tmp_path, info, str(tmp_path / "lost"), None)
    assert (refused.value.key, refused.value.value) == ("--model", str(tmp_path / "lost"))
    assert "--model" not in refused.value.fix


def test_the_option_merge_is_refused_for_a_checkpoint_without_adapters(tmp_path: Path) -> None:
    export_hf._check_options(tmp_path, {BASE: {"checksum": {}}}, True, "bfloat16")
    export_hf._check_options(tmp_path, {BASE: None}, False, "bfloat16")
    with pytest.raises(UserError) as refused:
        export_hf._check_options(tmp_path, {BASE: None}, True, None)
    assert (refused.value.key, refused.value.value) == ("--merge", True)


@pytest.mark.parametrize("out", [".", "..", "/", "./"])
def test_an_existing_output_folder_is_refused(out: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert export_hf.main([str(tmp_path), out]) == 2
    assert "exists" in capsys.readouterr().err
