"""Stop ids of a model are those of transformers and the EOS token of its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, GenerationConfig

from distill.data.stop_ids import stop_ids, usable_stop_ids
from distill.errors import UserError
from tests.tiny_tokenizer import tiny_tokenizer

KEY = "teacher.model_name"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [3, 4]}, {"eos_token_id": 5}, {3, 4}),
        ({"eos_token_id": 3}, {}, {3}),
        ({}, {"eos_token_id": 5}, set()),  # transformers reads config.json only if the other file is missing
        (None, {"eos_token_id": [5, 6]}, {5, 6}),
        (None, {"eos_token_id": None}, set()),
    ],
)
def test_stop_ids_are_those_of_transformers_and_the_tokenizers_eos(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any], expected: set[int]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        oracle = GenerationConfig.from_pretrained(tmp_path)
    else:
        oracle = GenerationConfig.from_model_config(AutoConfig.from_pretrained(tmp_path))
    theirs = oracle.eos_token_id if isinstance(oracle.eos_token_id, list) else [oracle.eos_token_id]
    assert {*theirs} - {None} == expected
    files: Any = SimpleNamespace(name="m", folder=tmp_path)
    assert stop_ids(files, tiny_tokenizer(), KEY) == tuple(sorted({*expected, 258}))


def test_stop_ids_of_a_text_config_are_used(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"eos_token_id": 7}}')
    files: Any = SimpleNamespace(name="m", folder=tmp_path)
    assert stop_ids(files, tiny_tokenizer(), KEY) == (7, 258)


@pytest.mark.parametrize(
    ("content", "fault"), [('{"eos_token_id": "xyz"}', "eos_token_id=xyz"), ("{", "line 1"), ("[]", "JSON object")]
)
def test_invalid_files_with_stop_ids_are_refused_with_model_file_and_fault(
    tmp_path: Path, content: str, fault: str
) -> None:
    files: Any = SimpleNamespace(name="m", folder=tmp_path)
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError) as caught:
            stop_ids(files, tiny_tokenizer(), KEY)
        assert (caught.value.key, caught.value.value) == (KEY, "m")
        assert caught.value.problem.startswith(f"{KEY}=m ")
        assert fault in caught.value.problem and f" {name}" in caught.value.problem


def test_unusable_ordinary_and_missing_stop_ids_are_logged(caplog: Any) -> None:
    tokenizer = tiny_tokenizer()
    plus = tokenizer.convert_tokens_to_ids("+")
    assert usable_stop_ids((256, 258, 259), tokenizer, 261, "m") == (256, 258, 259) and not caplog.records
    assert usable_stop_ids((plus, 258, 300), tokenizer, 261, "m") == (plus, 258)
    beyond, text = [record.getMessage() for record in caplog.records]
    assert "[300]" in beyond and "261" in beyond
    assert f"[{plus}]" in text and "('+')" in text
    caplog.clear()
    assert usable_stop_ids((), tokenizer, 261, "m") == ()
    assert "policy.generation.stop_token_ids" in caplog.text
