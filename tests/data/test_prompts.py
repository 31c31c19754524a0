"""Loading of problems and prompt files, rendering of prompts, and the order of prompts."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from array import array
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import DatasetConfig
from distill.data.prompt_files import read_prompt_file
from distill.data.prompts import PromptOrder, Prompts, load_prompts
from distill.data.rendering import chat_ids
from distill.errors import UserError
from distill.types import Problem
from tests.data.loading import load_datasets, refusal
from tests.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[2]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> DatasetConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetConfig(data_path=str(path), input_key="question", output_key="answer")


def questions(*texts: str) -> list[dict[str, Any]]:
    return [{"question": text, "answer": "1"} for text in texts]


# -- problems ----------------------------------------------------------------------------------------------------------


def test_jsonl_rows_become_problems_with_their_trace_column(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "1+1?", "answer": 2, "trace": "carry", "level": 3, "hint": "count"},
        {"question": "é?", "answer": None},
    ]
    dataset = jsonl(tmp_path / "a.jsonl", rows)
    assert load_datasets([dataset], trace_column="trace", trace_required=False) == [
        Problem("1+1?", "2", dataset.data_path or "", {"trace": "carry"}),
        Problem("é?", "", dataset.data_path or "", {}),
    ]


def test_parquet_and_jsonl_give_the_same_problems(tmp_path: Path) -> None:
    rows = [{"question": "1+1?", "answer": "2", "trace": "carry"}, {"question": "2+2?", "answer": "4", "trace": "none"}]
    table = pa.Table.from_pylist([{**row, "unread": [[1.0] * 8]} for row in rows])
    pq.write_table(table, tmp_path / "a.parquet")
    parquet = DatasetConfig(data_path=str(tmp_path / "a.parquet"), input_key="question", output_key="answer")
    lines = load_datasets([jsonl(tmp_path / "a.jsonl", rows)], trace_column="trace")
    assert [(p.text, p.answer, p.columns) for p in load_datasets([parquet], trace_column="trace")] == [
        (p.text, p.answer, p.columns) for p in lines
    ]
    assert lines[0].columns == {"trace": "carry"}


def test_datasets_are_concatenated_and_repeated(tmp_path: Path) -> None:
    first = jsonl(tmp_path / "a.jsonl", questions("a", "b"))
    second = jsonl(tmp_path / "b.jsonl", questions("c"))
    twice = DatasetConfig(data_path=first.data_path, input_key="question", output_key="answer", repeat=2)
    assert [p.text for p in load_datasets([twice, second])] == ["a", "b", "a", "b", "c"]


def test_json_lists_byte_order_marks_and_blank_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(questions("a", "b"), indent=2))
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"question": "c"}\n\n{"question": "d"}')
    datasets = [DatasetConfig(data_path=str(tmp_path / name), input_key="question") for name in ("a.json", "b.jsonl")]
    assert [p.text for p in load_datasets(datasets)] == ["a", "b", "c", "d"]


def test_split_slices_select_part_of_a_file(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", questions(*"abcdefghij"))
    for split, texts in (("train[:20%]", "ab"), ("train[8:]+train[:1]", "ija"), ("train", "abcdefghij")):
        dataset = DatasetConfig(data_path=str(tmp_path / "a.jsonl"), input_key="question", split=split)
        assert "".join(p.text for p in load_datasets([dataset])) == texts


def test_rows_without_text_are_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = jsonl(tmp_path / "a.jsonl", [*questions("a", "  "), {"question": None, "answer": "1"}])
    assert [p.text for p in load_datasets([dataset])] == ["a"]
    assert "2 of 3" in caplog.text


def test_save_to_disk_folders_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    saved = datasets.DatasetDict({"test": datasets.Dataset.from_list(questions("a", "b"))})
    saved.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "files").mkdir()
    jsonl(tmp_path / "files" / "train.jsonl", questions("c"))
    both = [
        DatasetConfig(data_path=str(tmp_path / "saved"), split="test", input_key="question"),
        DatasetConfig(data_path=str(tmp_path / "files"), input_key="question", output_key="answer"),
    ]
    assert [p.text for p in load_datasets(both)] == ["a", "b", "c"]


def test_short_names_select_hub_dataset_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    requested = []
    rows = {
        "openai/gsm8k": [{"question": "1+1?", "answer": "first 1, then 1\n#### 2"}],
        "BytedTsinghua-SIA/DAPO-Math-17k": [
            {"prompt": [{"role": "user", "content": "3?"}], "reward_model": {"ground_truth": "3"}, "kind": "x"}
        ],
        "HuggingFaceH4/aime_2024": [{"problem": "4?", "answer": "4", "solution": "s"}],
    }

    def load_dataset(name: str, subset: str | None, split: str) -> Any:
        requested.append((name, subset, split))
        return datasets.Dataset.from_list(rows[name])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    names = [DatasetConfig(dataset_name=name) for name in ("gsm8k", "DAPOMath17K", "HuggingFaceH4/aime_2024")]
    assert load_datasets(names) == [
        Problem("1+1?", "2", "openai/gsm8k"),
        Problem("3?", "3", "BytedTsinghua-SIA/DAPO-Math-17k"),
        Problem("4?", "4", "HuggingFaceH4/aime_2024"),
    ]
    assert requested[0] == ("openai/gsm8k", "main", "train")


@pytest.mark.slow
def test_small_files_need_neither_the_datasets_library_nor_the_cache(tmp_path: Path) -> None:
    dataset = jsonl(tmp_path / "a.jsonl", questions("a"))
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import sys; from distill.data.sources import load_problems; from distill.config import DatasetConfig; "
        f"dataset = DatasetConfig(data_path={dataset.data_path!r}, input_key='question'); "
        "print(len(load_problems(dataset, 'data.train'))); "
        "assert 'datasets' not in sys.modules"
    )
    env = {"HOME": str(home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert list(home.iterdir()) == []


BAD_FILES: dict[str, tuple[str | bytes | None, str, str]] = {
    "missing.jsonl": (None, "data_path", "not exist"),
    "empty.jsonl": ("", "", "is empty"),
    "blank.jsonl": ('{"question": " "}', "input_key", "no text"),
    "torn.jsonl": ('{"question": "a"}\n\n{"question": "b', "data_path", "line 3 (Unterminated"),
    "list.jsonl": ('{"question": "a"}\n["b"]', "data_path", "line 2"),
    "half.jsonl": ('{"question": "a"}\n{"question": "\\ud83d"}', "", "line 2"),
    "deep.jsonl": ("[" * 100_000, "data_path", "line 1 (maximum recursion"),
    "bytes.jsonl": (b'{"question": "\xff"}', "data_path", "line 1"),
    "column.jsonl": ('{"problem": "a", "gold": 1}', "input_key", "line 1 of"),
    "second.jsonl": ('{"question": "a"}\n{"problem": "b"}', "input_key", "line 2"),
    "type.jsonl": ('{"question": ["a"]}', "input_key", "type list in line 1"),
    "notes.txt": ("a", "data_path", "unknown file"),
    "text.parquet": ("a", "data_path", "Parquet file"),
}
"""The content of a file, the key of the refusal below data.train, and a fragment of the message."""


@pytest.mark.parametrize("name", BAD_FILES)
def test_malformed_files_are_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    content, key, fragment = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refusal(tmp_path / name, output_key=None)
    assert error.key == f"data.train.{key}".rstrip(".")
    assert (error.value is None) == (key == "")  # a file or row is not the value of data.train
    assert fragment in error.problem.replace(str(tmp_path), "") and name in error.problem


def test_truncated_parquet_files_and_invalid_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(questions(*"abcdefgh")), path)
    complete = path.read_bytes()
    for length in (0, 3, len(complete) // 2, len(complete) - 1):
        path.write_bytes(complete[:length])
        error = refusal(path, output_key=None)
        assert (error.key, error.value) == ("data.train.data_path", str(path))
    column = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"question": column}), path)
    assert "'utf-8' codec" in str(refusal(path, output_key=None))


def test_named_pipes_are_refused_instead_of_blocking(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet"):
        os.mkfifo(tmp_path / name)
        assert refusal(tmp_path / name).key == "data.train.data_path"
    with pytest.raises(UserError) as caught:
        read_prompt_file(str(tmp_path / "a.jsonl"), "data.train.prompt_file")
    assert (caught.value.key, caught.value.value) == ("data.train.prompt_file", str(tmp_path / "a.jsonl"))


def test_missing_and_mistyped_table_columns_are_refused_with_the_existing_names(tmp_path: Path) -> None:
    pq.write_table(pa.table({"problem": ["a"], "gold": [[1]]}), tmp_path / "a.parquet")
    for input_key, output_key, key, fragment in [
        ("question", "gold", "input_key", "problem, gold"),
        ("problem", "gold", "output_key", "row 0"),
        ("problem", "answer", "output_key", "problem, gold"),
    ]:
        error = refusal(tmp_path / "a.parquet", input_key=input_key, output_key=output_key)
        assert error.key == f"data.train.{key}" and fragment in str(error)


def test_invalid_dataset_keys_are_refused(tmp_path: Path) -> None:
    good = jsonl(tmp_path / "a.jsonl", questions("a")).data_path
    bad: list[tuple[list[DatasetConfig], str, Any]] = [
        ([], "data.train", None),
        ([DatasetConfig()], "data.train", None),
        ([DatasetConfig(data_path=good, repeat=0)], "data.train.repeat", 0),
        ([DatasetConfig(dataset_name="DeepScalr")], "data.train.dataset_name", "DeepScalr"),
        (
            [DatasetConfig(data_path=good, input_key="question", split="validation")],
            "data.train.split",
            "validation",
        ),
        (
            [DatasetConfig(data_path=good, input_key="question"), DatasetConfig(data_path="nowhere.jsonl")],
            "data.train.1.data_path",
            "nowhere.jsonl",
        ),
    ]
    for datasets, key, value in bad:
        with pytest.raises(UserError) as caught:
            load_datasets(datasets)
        assert (caught.value.key, caught.value.value) == (key, value)


def test_an_invalid_slice_of_a_file_is_refused_as_a_slice(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", questions("a"))
    for split, fault in (("train[:abc]", "slice"), ("train+train[", "slice"), ("test[:1]", "single file")):
        error = refusal(tmp_path / "a.jsonl", split=split)
        assert (error.key, error.value) == ("data.train.split", split)
        assert fault in error.problem and "train[:" in error.fix


def test_hub_datasets_are_refused_without_access_to_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for dataset, key, value in [
        (DatasetConfig(dataset_name="DeepScaler"), "dataset_name", "agentica-org/DeepScaleR-Preview-Dataset"),
        (DatasetConfig(data_path="someone/something", split="test"), "data_path", "someone/something"),
    ]:
        with pytest.raises(UserError, match=dataset.split or "train") as caught:
            load_datasets([dataset])
        assert (caught.value.key, caught.value.value) == (f"data.train.{key}", value)


# -- prompt files ------------------------------------------------------------------------------------------------------


def test_prompt_files_are_filled_like_str_format() -> None:
    text = (ROOT / "prompts" / "cot.txt").read_text()
    problem = "Is {x} in \\frac{1}{2} or {{}}?"
    assert read_prompt_file(str(ROOT / "prompts" / "cot.txt"), "prompt_file").fill({"": problem}) == text.format(
        problem
    )
    assert "\\boxed{}" in text.format(problem)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("{}\n{x.__class__}", "{x.__class__} on line 2"),
        ("{problem}", "{problem}"),
        ("no placeholder", "{}"),
        ("{{}}", "{}"),
        ("\\boxed{} {}", "2 placeholders"),
    ],
)
def test_invalid_prompt_files_are_refused_in_one_sentence(text: str, fragment: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(UserError, match=re.escape(fragment)) as caught:
        read_prompt_file(str(tmp_path / "p.txt"), "data.default.prompt_file")
    assert str(caught.value).startswith(f"data.default.prompt_file={tmp_path / 'p.txt'}")


def test_missing_prompt_files_are_refused_before_the_data_are_read(tmp_path: Path) -> None:
    for dataset, key in (
        (DatasetConfig(data_path="nowhere.jsonl", prompt_file="nowhere.txt"), "prompt_file"),
        (DatasetConfig(data_path="nowhere.jsonl", system_prompt_file="nowhere.txt"), "system_prompt_file"),
    ):
        with pytest.raises(UserError) as caught:
            load_prompts([dataset], tiny_tokenizer(), 100)
        assert (caught.value.key, caught.value.value) == (f"data.train.{key}", "nowhere.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        read_prompt_file(str(tmp_path / "binary.txt"), "data.train.prompt_file")


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_render_system_prompt_and_prompt_file_in_the_chat_template(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffSolve {} with \\boxed{{}}")  # with a byte order mark
    (tmp_path / "s.txt").write_text("\ufeffBe {kind}")
    jsonl(tmp_path / "a.jsonl", questions("1{}1"))
    dataset = DatasetConfig(
        data_path=str(tmp_path / "a.jsonl"),
        input_key="question",
        prompt_file=str(tmp_path / "p.txt"),
        system_prompt_file=str(tmp_path / "s.txt"),
    )
    tokenizer = tiny_tokenizer()
    (prompt,) = load_prompts([dataset], tokenizer, 1000)
    rendered = (
        "<|im_start|>system\nBe {kind}<|im_end|>\n<|im_start|>user\nSolve 1{}1 with \\boxed{}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.decode(list(prompt.student_ids)) == rendered
    assert prompt.problem.text == "1{}1"
    (other,) = load_prompts([dataset], tokenizer, 1000, {"enable_thinking": False})
    assert tokenizer.decode(list(other.student_ids)) == rendered + "<think>\n\n</think>\n\n"


def test_each_dataset_uses_its_own_prompt_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Solve {}")
    first = jsonl(tmp_path / "a.jsonl", questions("a"))
    second = DatasetConfig(
        data_path=first.data_path, input_key="question", prompt_file=str(tmp_path / "p.txt"), repeat=2
    )
    tokenizer = tiny_tokenizer(chat_template=None)
    prompts = load_prompts([first, second], tokenizer, 100)
    assert [tokenizer.decode(list(p.student_ids)) for p in prompts] == ["a", "Solve a", "Solve a"]
    assert [p.prompt_id for p in prompts] == [0, 1, 2]


def test_token_ids_equal_those_of_apply_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    chats = [[{"role": "user", "content": text}] for text in ("a", "é<think>b", "")]
    expected = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    assert chat_ids(tokenizer, chats) == expected


def test_errors_of_a_chat_template_are_one_sentence() -> None:
    tokenizer = tiny_tokenizer("{{ raise_exception('System role not supported') }}")
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    for messages, roles in ((chat, "system, user"), (chat[1:], "user")):
        with pytest.raises(UserError, match=rf"roles {roles} \(System role not supported\)") as caught:
            chat_ids(tokenizer, [messages])
        assert (caught.value.key, caught.value.value) == ("policy.tokenizer.chat_template", None)
        assert ("system_prompt_file" in caught.value.fix) == (messages is chat)
    tokenizer.chat_template = {"short": "{{ messages[0].content }}", "long": "{{ messages[0].content * 2 }}"}
    with pytest.raises(UserError, match=r"chat_template_kwargs\.chat_template .*short, long"):
        chat_ids(tokenizer, [chat[1:]])
    with pytest.raises(UserError) as caught:
        chat_ids(tiny_tokenizer(), [chat], {"tokenize": True})
    assert (caught.value.key, caught.value.value) == ("policy.tokenizer.chat_template_kwargs.tokenize", True)


def test_long_prompts_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = jsonl(tmp_path / "a.jsonl", questions("aaaa", "aaaaa", "aaa"))
    tokenizer = tiny_tokenizer(chat_template=None)
    prompts = load_prompts([dataset], tokenizer, 4)
    assert [(p.prompt_id, len(p.student_ids)) for p in prompts] == [(0, 4), (2, 3)]
    assert prompts.skipped == 1
    assert all(number in caplog.text for number in ("1 of 3", "4 tokens", "longest: 5"))
    with pytest.raises(UserError) as caught:
        load_prompts([dataset], tokenizer, 2)
    assert (caught.value.key, caught.value.value) == ("data.train", None)
    assert all(number in caught.value.problem for number in ("3 prompts", "2 tokens"))


def test_tokenization_of_ten_thousand_prompts_logs_progress(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = jsonl(tmp_path / "a.jsonl", questions(*map(str, range(10_001))))
    with caplog.at_level(logging.INFO):
        assert len(load_prompts([dataset], tiny_tokenizer(chat_template=None), 100)) == 10_001
    assert "10000 of 10001" in caplog.text


# -- order -------------------------------------------------------------------------------------------------------------


def numbered(n: int) -> Prompts:
    problems = tuple(Problem(str(i)) for i in range(n))
    return Prompts(problems, tuple(range(n)), array("i", range(n)), array("q", range(n + 1)), skipped=0)


def drawn(order: PromptOrder, step: int) -> list[int]:
    return [prompt.prompt_id for prompt in order.batch(step)]


@given(n=st.integers(1, 40), per_step=st.integers(1, 40), seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_an_epoch_uses_each_prompt_at_most_once_in_full_batches(n: int, per_step: int, seed: int, epoch: int) -> None:
    if per_step > n:
        with pytest.raises(UserError) as caught:
            PromptOrder(numbered(n), per_step, seed)
        assert (caught.value.key, caught.value.value) == ("distillation.num_prompts_per_step", per_step)
        return
    order = PromptOrder(numbered(n), per_step, seed)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    ids = [i for step in steps for i in drawn(order, step)]
    assert len(set(ids)) == len(ids) == n // per_step * per_step
    assert {order.epoch(step) for step in steps} == {epoch}


@given(seed=st.integers(0, 2**31), steps=st.lists(st.integers(0, 50), min_size=1, max_size=5))
@settings(deadline=None, max_examples=40)
def test_the_prompts_of_a_step_do_not_depend_on_earlier_calls(seed: int, steps: list[int]) -> None:
    used, fresh = PromptOrder(numbered(10), 3, seed), PromptOrder(numbered(10), 3, seed)
    for step in steps:
        drawn(used, step)
    assert drawn(used, steps[0]) == drawn(fresh, steps[0])


def test_the_order_of_prompts_never_changes() -> None:
    """Compare with a literal order: a resume under another version of Python must continue it."""
    order = PromptOrder(numbered(7), 3, seed=42)
    assert [drawn(order, step) for step in range(4)] == [[6, 4, 1], [5, 0, 3], [5, 0, 1], [6, 3, 2]]


def test_the_order_depends_on_seed_and_epoch() -> None:
    order = PromptOrder(numbered(50), 50, seed=1)
    assert drawn(order, 0) != drawn(order, 1)
    assert drawn(order, 0) != drawn(PromptOrder(numbered(50), 50, seed=2), 0)
    assert sorted(drawn(order, 0)) == list(range(50))


def test_without_shuffle_prompts_keep_the_order_of_the_file() -> None:
    order = PromptOrder(numbered(5), 2, seed=1, shuffle=False)
    assert [drawn(order, step) for step in range(3)] == [[0, 1], [2, 3], [0, 1]]


def test_the_number_of_steps_is_limited_by_steps_and_epochs() -> None:
    order = PromptOrder(numbered(10), 3, seed=1)
    assert (order.steps(1000, 2), order.steps(5, 2), order.steps(5, 0)) == (6, 5, 0)


def test_a_resume_finds_no_changes_in_the_same_prompts() -> None:
    order = PromptOrder(numbered(10), 3, seed=1)
    state = json.loads(json.dumps(order.state(7)))
    assert (state["step"], state["epoch"], state["step_in_epoch"]) == (7, 2, 1)
    for seed in (1, 2):  # a different seed is found by comparing recipes
        assert PromptOrder(numbered(10), 3, seed).changes(state) == []


def test_changed_prompts_and_order_settings_are_reported() -> None:
    state = PromptOrder(numbered(10), 3, seed=1).state(7)
    changed, swapped = numbered(10), numbered(10)
    changed.tokens[4] = 99
    swapped.tokens[3], swapped.tokens[4] = swapped.tokens[4], swapped.tokens[3]
    for order, message in [
        (PromptOrder(numbered(10), 2, seed=1), "distillation.num_prompts_per_step was 3 and is 2"),
        (PromptOrder(numbered(11), 3, seed=1), "(0 of 10 prompts removed, 1 added)"),
        (PromptOrder(numbered(9), 3, seed=1), "(1 of 10 prompts removed, 0 added)"),
        (PromptOrder(changed, 3, seed=1), "(1 of 10 prompts removed, 1 added)"),
        (PromptOrder(swapped, 3, seed=1), "(same 10 prompts"),
        (PromptOrder(numbered(10), 3, seed=1, shuffle=False), "data.shuffle was True and is False"),
    ]:
        (change,) = order.changes(state)
        assert message in change


# -- problems of the smoke runs ----------------------------------------------------------------------------------------


def problem_lines(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ROOT / "prompts" / name).read_text().splitlines()]


def make_problems() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_problems", ROOT / "scripts" / "make_problems.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_make_problems_reproduces_the_problem_files() -> None:
    pytest.importorskip("reasoning_gym", reason="in requirements-cpu.lock only", exc_type=ModuleNotFoundError)
    assert list(islice(make_problems().problems(7), 200)) == problem_lines("gsm_train.jsonl")[:200]


def test_make_problems_skips_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    reasoning_gym = ModuleType("reasoning_gym")
    monkeypatch.setitem(sys.modules, "reasoning_gym", reasoning_gym)
    blocks = [questions("a", "b", "a"), questions("b", "c")]
    monkeypatch.setattr(
        reasoning_gym, "create_dataset", lambda task, size, seed: blocks[seed // 1_000_000], raising=False
    )
    assert [row["question"] for row in islice(make_problems().problems(7), 3)] == ["a", "b", "c"]


def test_training_and_validation_problems_are_disjoint() -> None:
    train, validation = problem_lines("gsm_train.jsonl"), problem_lines("gsm_validation.jsonl")
    assert (len(train), len(validation)) == (512, 128)
    assert len({row["question"] for row in train + validation}) == 640
