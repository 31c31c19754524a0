"""Checks of prompts against the tokenizers: vocabularies, ids without an embedding, control and unknown tokens."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from distill.data import text_checks
from distill.data.clock import RunClock, current_time
from distill.data.rendering import token_ids
from distill.data.teacher_prefix import ContextPrefixes
from distill.data.text_checks import check_texts
from distill.data.tokenizer_checks import compare_vocabularies
from distill.errors import UserError
from distill.inputs import check_contexts, find_models, read_prompts
from distill.types import Problem, Prompt
from tests.data.byte_level import BOS, byte_level, load
from tests.harness import config_for
from tests.helpers import save_tiny_model
from tests.tiny_tokenizer import tiny_tokenizer


def _prompt(tokenizer: Any, i: int, text: str, **columns: str) -> Prompt:
    return Prompt(i, tuple(token_ids(tokenizer, [text])[0]), Problem(text, source="file.jsonl", columns=columns))


def test_characters_missing_in_the_vocabulary_are_logged_as_warnings(tmp_path: Path, caplog: Any) -> None:
    alphabet = {chr(c): c for c in range(128)} | {"▁": 128, "<unk>": 129, BOS: 130}
    marks: dict[str, Any] = {
        "pre_tokenizer": pre_tokenizers.Metaspace(split=False),
        "decoder": decoders.Metaspace(),
        "model": models.BPE(alphabet, [], unk_token="<unk>"),
    }
    tokenizer = load(byte_level(tmp_path, {"unk_token": "<unk>"}, **marks))
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "<unk>" in caplog.text
    caplog.clear()
    prompts = [_prompt(tokenizer, i, text) for i, text in enumerate(["plain", "grün", "A 😀"])]
    check_texts(prompts, tokenizer, 10_000, "data.train")
    unknown, changed = [record.getMessage() for record in caplog.records]
    assert unknown.startswith("data.train: 2 prompts ")
    assert "problem 2 (file.jsonl: 'grün')" in unknown and "'<unk>'" in unknown
    assert "2 of the first 3" in changed and "'grün'" in changed and "'gr<unk>n'" in changed


def test_vocabularies_are_compared_by_content(caplog: Any) -> None:
    same, other = tiny_tokenizer(), tiny_tokenizer(extra=("<|other|>",))
    compare_vocabularies(same, tiny_tokenizer(), "a", "b")
    assert not caplog.records
    with pytest.raises(UserError, match=r"policy\.model_name=a .*<\|other\|>") as caught:
        compare_vocabularies(same, other, "a", "b")
    assert (caught.value.key, caught.value.value) == ("teacher.model_name", "b")


def test_equal_vocabularies_with_different_pre_tokenizers_are_logged(tmp_path: Path, caplog: Any) -> None:
    student = load(byte_level(tmp_path / "a", {}))
    single_digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    teacher = load(byte_level(tmp_path / "b", {}))
    teacher.backend_tokenizer.pre_tokenizer = single_digits
    assert student.get_vocab() == teacher.get_vocab()
    compare_vocabularies(student, teacher, "a", "b")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "policy.model_name=a" in caplog.text and "teacher.model_name=b" in caplog.text


def _save_tokenizer_beyond_embeddings(root: Path) -> tuple[str, ...]:
    """Save a tiny model with 384 embeddings; return overrides for a tokenizer of 400 ids."""
    save_tiny_model(root / "m", "qwen3")
    tiny_tokenizer(extra=tuple(f"<x{i}>" for i in range(139))).save_pretrained(root / "t")
    return f"policy.tokenizer.name={root}/t", f"teacher.tokenizer.name={root}/t"


def test_an_id_without_an_embedding_is_refused_with_its_row(tmp_path: Path) -> None:
    names = _save_tokenizer_beyond_embeddings(tmp_path)
    for last, refused in (("<x122>", False), ("<x123>", True)):  # 261 + 122 = 383, the last row
        rows = "".join(json.dumps({"input": f"What is {text}?"}) + "\n" for text in ("1", "2", last))
        (tmp_path / "rows.jsonl").write_text(rows)
        few = ("distillation.allow_degenerate=true", "distillation.num_prompts_per_step=1",
               "policy.train_global_batch_size=1")  # fmt: skip
        config = config_for(tmp_path / "m", tmp_path / "m", *names, *few)
        train = (replace(config.data.train[0], data_path=f"{tmp_path}/rows.jsonl", output_key=None, prompt_file=None),)
        config = replace(config, data=replace(config.data, train=train))
        found = find_models(config)
        assert found.valid_vocab == 384
        if not refused:
            assert len(read_prompts(config, found, RunClock(current_time())).prompts) == 3
            continue
        with pytest.raises(
            UserError, match=r"problem 3 \(.*rows\.jsonl: 'What is <x123>\?'\) .*<x123>.*id 384"
        ) as caught:
            read_prompts(config, found, RunClock(current_time()))
        assert (caught.value.key, caught.value.value) == ("data.train", None)


def test_a_context_with_an_id_without_an_embedding_is_refused(tmp_path: Path) -> None:
    names = _save_tokenizer_beyond_embeddings(tmp_path)
    context = "distillation.context_distillation"
    words = (
        f"{context}.enabled=true", f"{context}.teacher_prefix_template={{problem}} {{trace}}",
        f"{context}.trace_source=static_dataset", f"{context}.static_trace.answer_column=hint",
    )  # fmt: skip
    config = config_for(tmp_path / "m", tmp_path / "m", *names, *words)
    found = find_models(config)

    def check(hint: str) -> None:
        prefixes = ContextPrefixes(found.teachers_tokenizer, config.distillation.context_distillation, 99, None, 384)
        problem = Problem("1+1?", columns={"hint": f"<think>{hint}</think>"})
        check_contexts(config, found, prefixes, [problem])

    check("<x122>")
    with pytest.raises(UserError, match=r"'1\+1\?' .*<x123>") as caught:
        check("<x123>")
    assert (caught.value.key, caught.value.value) == (f"{context}.teacher_prefix_template", None)
    template = replace(config.distillation.context_distillation, teacher_prefix_template="<x130> {problem}")
    with pytest.raises(UserError, match="<x130>") as caught:
        ContextPrefixes(found.teachers_tokenizer, template, 99, None, 384)
    assert (caught.value.key, caught.value.value) == (f"{context}.teacher_prefix_template", None)


def test_control_tokens_in_problems_and_traces_are_logged(caplog: Any) -> None:
    tokenizer = tiny_tokenizer(special_think=False)
    prompts = [
        _prompt(tokenizer, 0, "a < b, <think>plain</think>"),
        _prompt(tokenizer, 1, "x", hint="b<|im_start|>system"),
        _prompt(tokenizer, 2, "y<|im_end|>"),
    ]
    check_texts(prompts, tokenizer, 261, "data.train")
    check_texts(prompts, tokenizer, 261, "data.train", "hint")
    first, again, second = [record.getMessage() for record in caplog.records]
    assert first.startswith("data.train: 1 prompts ") and "'<|im_end|>'" in first
    assert "problem 3 (file.jsonl: 'y<" in first
    assert again == first
    assert second.startswith("data.train: 1 prompts ") and "'<|im_start|>'" in second
    assert "column hint" in second and "problem 2 " in second


def test_think_tags_are_allowed_in_the_trace_column_and_logged_in_a_problem(caplog: Any) -> None:
    tokenizer = tiny_tokenizer(special_think=True)
    tags = ("<think>", "</think>")
    prompts = [_prompt(tokenizer, i, "x", hint="<think>a</think>b") for i in range(3)]
    check_texts(prompts, tokenizer, 261, "data.train", "hint", tags)
    assert not caplog.records
    prompts += [_prompt(tokenizer, 3, "x", hint="<think>a<|im_end|>"), _prompt(tokenizer, 4, "<think>")]
    check_texts(prompts, tokenizer, 261, "data.train", "hint", tags)
    in_text, in_column = [record.getMessage() for record in caplog.records]
    assert "1 prompts" in in_text and "'<think>'" in in_text and "problem 5" in in_text
    assert "1 prompts" in in_column and "'<|im_end|>'" in in_column and "column hint" in in_column


def test_the_search_for_thousands_of_control_tokens_is_fast(caplog: Any) -> None:
    tokens = [f"{'<[abcdefg'[i % 9]}{i * 7919 % 6200}]>" for i in range(6200)]
    decoder = {i: AddedToken(token, special=True) for i, token in enumerate(tokens)}
    text = "If a < b and [c, d] be given, find the sum of all of them. " * 40
    prompts = [Prompt(i, (1,), Problem(text)) for i in range(600)]
    tokenizer = SimpleNamespace(added_tokens_decoder=decoder)
    begun = time.process_time()
    text_checks._warn_of_control_tokens(prompts, tokenizer, "data.train", (), ("<think>", "</think>"))
    assert time.process_time() - begun < 2.5
