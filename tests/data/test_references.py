"""Responses of the dataset: tokenization after the prompt, stop ids, and refusal of missing ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.config import Config, DatasetConfig, load_config
from distill.data.prompts import Prompts, load_prompts
from distill.data.references import References, check_references, written_stop_id
from distill.errors import UserError
from distill.types import Problem, Prompt
from tests.data.byte_level import CORPUS, byte_level
from tests.data.chat_templates import QWEN3
from tests.data.test_thoughts import THINKING_2507
from tests.harness import REPO
from tests.tiny_tokenizer import CHATML, THINK, tiny_tokenizer

END_OF_TEXT, END = 256, 258
QWEN_STOPS = (END_OF_TEXT, END)


def prompt_of(tokenizer: Any, reference: str, problem: str = "1+1?") -> Prompt:
    chat = [{"role": "user", "content": problem}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Prompt(0, ids, Problem(problem, reference=reference), text.rstrip().endswith(THINK[0]))


def response_text(tokenizer: Any, prompt: Prompt, stops: tuple[int, ...] = QWEN_STOPS) -> str:
    ids = References(tokenizer, stops, len(tokenizer), THINK).response_ids(prompt)
    return str(tokenizer.decode(list(ids)))


@pytest.mark.parametrize("reference", ["2", " 2\n", "<think>one and one</think>\n2", "\n\nSo 2.", "é 日本"])
def test_prompt_and_response_have_the_ids_of_the_rendered_conversation(reference: str) -> None:
    tokenizer = tiny_tokenizer()
    prompt = prompt_of(tokenizer, reference)
    ids = References(tokenizer, QWEN_STOPS, 261, THINK).response_ids(prompt)
    chat = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": reference}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    complete = tokenizer(rendered.removesuffix("\n"), add_special_tokens=False)["input_ids"]
    assert [*prompt.student_ids, *ids] == complete and ids[-1] == END


def metaspace() -> Any:
    """A tokenizer that writes a space before the first word of a text, like Llama 2's."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyz.", "<0x0A>", "<unk>", "▁a", "▁b"]
    merges = [("▁", "a"), ("▁", "b")]
    vocab = {token: i for i, token in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(("reference", "expected"), [("b c", ["b", "▁", "c"]), (" b c", ["▁b", "▁", "c"])])
def test_a_response_gets_no_space_that_the_text_of_the_conversation_lacks(reference: str, expected: list[str]) -> None:
    tokenizer = metaspace()
    prompt = Prompt(0, tuple(tokenizer("is it a.")["input_ids"]), Problem("p", reference=reference))
    ids = References(tokenizer, (), len(tokenizer), THINK).response_ids(prompt)
    assert tokenizer.convert_ids_to_tokens(list(ids)) == expected
    assert tokenizer(reference)["input_ids"] != list(ids) or reference.startswith(" ")


def test_a_token_that_would_span_prompt_and_response_is_split(tmp_path: Path) -> None:
    byte_level(tmp_path, {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    word = next(word for word in CORPUS[0].split() if len(tokenizer.tokenize(word)) < len(word))
    prompt = Prompt(
        0, tuple(tokenizer(word[:1], add_special_tokens=False)["input_ids"]), Problem("p", reference=word[1:])
    )
    ids = References(tokenizer, (), len(tokenizer), THINK).response_ids(prompt)
    assert tokenizer.decode([*prompt.student_ids, *ids]) == word


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("<think>\nsum</think>\n2", "sum</think>\n2"),
        ("<think>sum</think>2", "sum</think>2"),
        ("\n<think>\n\nsum</think>2", "\nsum</think>2"),
        ("sum</think>2", "sum</think>2"),
    ],
)
def test_a_prompt_inside_a_think_block_is_continued_without_a_second_tag(reference: str, expected: str) -> None:
    tokenizer = tiny_tokenizer(THINKING_2507)
    prompt = prompt_of(tokenizer, reference)
    assert prompt.inside_thought and response_text(tokenizer, prompt) == f"{expected}<|im_end|>"


def test_the_stop_id_is_the_one_that_the_chat_template_writes() -> None:
    other = CHATML.replace("<|im_end|>", "<|endoftext|>")
    assert written_stop_id(tiny_tokenizer(), QWEN_STOPS, {}) == END
    assert written_stop_id(tiny_tokenizer(other), QWEN_STOPS, {}) == END_OF_TEXT
    assert written_stop_id(tiny_tokenizer(other), (END,), {}) == END, "the template's token is no stop id: EOS"
    assert written_stop_id(tiny_tokenizer(None), QWEN_STOPS, {}) == END, "EOS"
    assert written_stop_id(tiny_tokenizer(None), (7, END_OF_TEXT), {}) == 7, "EOS is no stop id"
    assert written_stop_id(tiny_tokenizer("{{ raise_exception('no') }}"), QWEN_STOPS, {}) == END
    assert written_stop_id(tiny_tokenizer(), (), {}) is None


def test_a_response_ends_at_its_first_stop_token() -> None:
    tokenizer = tiny_tokenizer()
    assert response_text(tokenizer, prompt_of(tokenizer, "2<|endoftext|>3")) == "2<|endoftext|>"
    assert response_text(tokenizer, prompt_of(tokenizer, "2<|im_end|>")) == "2<|im_end|>"
    assert response_text(tokenizer, prompt_of(tokenizer, "2"), ()) == "2"


def test_a_token_without_an_embedding_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    references = References(tokenizer, (END,), 259, THINK)
    with pytest.raises(UserError) as caught:
        references.response_ids(prompt_of(tokenizer, "<think>"))
    assert caught.value.key == "distillation.off_policy.column"


def prompts(tmp_path: Path, count: int) -> Prompts:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"q": f"1+{i}?", "a": "2"}) + "\n" for i in range(count)))
    return load_prompts([DatasetConfig(data_path=str(path), input_key="q", output_key="a")], tiny_tokenizer(), 100)


def test_a_problem_without_a_response_is_refused_at_start_and_named(tmp_path: Path) -> None:
    found = prompts(tmp_path, 3)
    recipe = ["--config", str(REPO / "recipes/distillation_math.yaml")]
    check_references(load_config(recipe), found, tiny_tokenizer())
    config = load_config([*recipe, "distillation.off_policy.share=0.25", "distillation.off_policy.column=trace"])
    with pytest.raises(UserError) as caught:
        check_references(config, found, tiny_tokenizer())
    error = caught.value
    assert (error.key, error.value) == ("distillation.off_policy.column", "trace")
    assert f"line 1 of {tmp_path}/data.jsonl" in error.problem and "1+0?" in error.problem


CLOSED = {"enable_thinking": False}


def off_policy_config() -> Config:
    return load_config(["--config", str(REPO / "recipes/distillation_math.yaml"), "distillation.off_policy.share=0.5"])


def conversations(path: Path, problem: str, reference: str) -> DatasetConfig:
    chat = [{"role": "user", "content": problem}, {"role": "assistant", "content": reference}]
    path.write_text(json.dumps({"messages": chat}) + "\n")
    return DatasetConfig(data_path=str(path), input_key="messages")


@pytest.mark.parametrize(
    ("reference", "expected", "warns"),
    [("<think>\nth\n</think>\n\n2", "2", True), ("\n<think></think>2", "2", False), ("2", "2", False),
     (" 2", " 2", False)],
)  # fmt: skip
def test_a_prompt_with_a_closed_think_block_is_continued_without_a_second_block(
    tmp_path: Path, reference: str, expected: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config, tokenizer = off_policy_config(), tiny_tokenizer(QWEN3)
    dataset = conversations(tmp_path / "a.jsonl", "</think>", reference)
    for kwargs, text, warnings in ((CLOSED, expected, warns), ({}, reference, False)):
        caplog.clear()
        found = load_prompts([dataset], tokenizer, 1000, kwargs)
        check_references(config, found, tokenizer)
        assert response_text(tokenizer, found[0]) == f"{text}<|im_end|>"
        assert bool(caplog.records) is warnings


def test_a_response_of_reasoning_only_is_refused_after_a_closed_think_block(tmp_path: Path) -> None:
    for i, reference in enumerate(("<think>a", "<think>a</think>\n")):
        dataset = conversations(tmp_path / f"{i}.jsonl", "1+1?", reference)
        found = load_prompts([dataset], tiny_tokenizer(QWEN3), 1000, CLOSED)
        with pytest.raises(UserError) as caught:
            check_references(off_policy_config(), found, tiny_tokenizer(QWEN3))
        assert caught.value.key == "distillation.off_policy.column"
        assert f"line 1 of {tmp_path}/{i}.jsonl" in caught.value.problem


@pytest.mark.parametrize("reference", ["2<think>", ""])
def test_an_unusable_response_is_named_by_its_file_and_row(reference: str, tmp_path: Path) -> None:
    """The first file is read twice, and its first prompt is too long: ids, rows and files differ in number."""
    files = {"one": ["1" * 90, "1+1?"], "two": ["2+2?", "3+3?"]}
    for name, questions in files.items():
        lines = (json.dumps({"q": question, "a": "2"}) + "\n" for question in questions)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    datasets = [
        DatasetConfig(data_path=f"{tmp_path}/{name}.jsonl", input_key="q", output_key="a", repeat=repeat)
        for name, repeat in (("one", 2), ("two", 1))
    ]
    found = load_prompts(datasets, tiny_tokenizer(), 100)
    assert [prompt.prompt_id for prompt in found] == [1, 3, 4, 5]
    references = References(tiny_tokenizer(), (), 259, THINK, location=found.location)
    for prompt, location in zip(found, ("2 of one", "2 of one", "1 of two", "2 of two"), strict=True):
        with pytest.raises(UserError) as caught:
            references.response_ids(replace(prompt, problem=replace(prompt.problem, reference=reference)))
        file = f"{tmp_path}/{location.rpartition(' ')[2]}.jsonl"
        assert f"line {location[0]} of {file}" in caught.value.problem
        assert caught.value.key == "distillation.off_policy.column"
