"""Problems, prompt files, prompts and their order."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
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
from distill.config.template import Template
from distill.data.columns import TextColumn
from distill.data.prompts import PromptOrder, Prompts, chat_ids, load_prompts
from distill.data.sources import load_problems
from distill.data.template import read_prompt_file
from distill.errors import UserError
from distill.types import Problem
from tests.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[2]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> DatasetConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetConfig(data_path=str(path), input_key="question", output_key="answer")


def questions(*texts: str) -> list[dict[str, Any]]:
    return [{"question": text, "answer": "1"} for text in texts]


# -- problems ---------------------------------------------------------------------------------------------------------


def test_a_jsonl_file_gives_problems_with_their_named_columns(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "1+1?", "answer": 2, "trace": "carry", "level": 3, "hint": "count"},
        {"question": "é?", "answer": None},
    ]
    dataset = jsonl(tmp_path / "a.jsonl", rows)
    assert load_problems([dataset], columns=[TextColumn("trace", "some.key", needed=False)]) == [
        Problem("1+1?", "2", dataset.data_path or "", {"trace": "carry"}),
        Problem("é?", "", dataset.data_path or "", {}),
    ]


def test_parquet_gives_the_same_problems_as_jsonl(tmp_path: Path) -> None:
    rows = [{"question": "1+1?", "answer": "2", "trace": "carry"}, {"question": "2+2?", "answer": "4", "trace": "none"}]
    table = pa.Table.from_pylist([{**row, "unread": [[1.0] * 8]} for row in rows])
    pq.write_table(table, tmp_path / "a.parquet")
    parquet = DatasetConfig(data_path=str(tmp_path / "a.parquet"), input_key="question", output_key="answer")
    lines = load_problems([jsonl(tmp_path / "a.jsonl", rows)], trace_column="trace")
    assert [(p.text, p.answer, p.columns) for p in load_problems([parquet], trace_column="trace")] == [
        (p.text, p.answer, p.columns) for p in lines
    ]
    assert lines[0].columns == {"trace": "carry"}


def test_datasets_are_put_end_to_end_and_repeated_whole(tmp_path: Path) -> None:
    first = jsonl(tmp_path / "a.jsonl", questions("a", "b"))
    second = jsonl(tmp_path / "b.jsonl", questions("c"))
    twice = DatasetConfig(data_path=first.data_path, input_key="question", output_key="answer", repeat=2)
    assert [p.text for p in load_problems([twice, second])] == ["a", "b", "a", "b", "c"]


def test_a_list_in_a_json_file_and_a_byte_order_mark_and_blank_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(questions("a", "b"), indent=2))
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"question": "c"}\n\n{"question": "d"}')
    datasets = [DatasetConfig(data_path=str(tmp_path / name), input_key="question") for name in ("a.json", "b.jsonl")]
    assert [p.text for p in load_problems(datasets)] == ["a", "b", "c", "d"]


def test_a_slice_takes_part_of_a_file(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", questions(*"abcdefghij"))
    for split, texts in (("train[:20%]", "ab"), ("train[8:]+train[:1]", "ija"), ("train", "abcdefghij")):
        dataset = DatasetConfig(data_path=str(tmp_path / "a.jsonl"), input_key="question", split=split)
        assert "".join(p.text for p in load_problems([dataset])) == texts


def test_rows_without_text_are_skipped_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = jsonl(tmp_path / "a.jsonl", [*questions("a", "  "), {"question": None, "answer": "1"}])
    assert [p.text for p in load_problems([dataset])] == ["a"]
    assert "2 of the 3 rows" in caplog.text


def test_folders_of_the_datasets_library_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert [p.text for p in load_problems(both)] == ["a", "b", "c"]


def test_known_names_bring_their_hub_names_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []
    rows = {
        "openai/gsm8k": [{"question": "1+1?", "answer": "first 1, then 1\n#### 2"}],
        "BytedTsinghua-SIA/DAPO-Math-17k": [
            {"prompt": [{"role": "user", "content": "3?"}], "reward_model": {"ground_truth": "3"}, "kind": "x"}
        ],
        "HuggingFaceH4/aime_2024": [{"problem": "4?", "answer": "4", "solution": "s"}],
    }

    def load_dataset(name: str, subset: str | None, split: str) -> Any:
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(rows[name])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    names = [DatasetConfig(dataset_name=name) for name in ("gsm8k", "DAPOMath17K", "HuggingFaceH4/aime_2024")]
    assert load_problems(names) == [
        Problem("1+1?", "2", "openai/gsm8k"),
        Problem("3?", "3", "BytedTsinghua-SIA/DAPO-Math-17k"),
        Problem("4?", "4", "HuggingFaceH4/aime_2024"),
    ]
    assert asked[0] == ("openai/gsm8k", "main", "train")


@pytest.mark.slow
def test_a_small_file_is_loaded_without_the_datasets_library_or_a_cache(tmp_path: Path) -> None:
    dataset = jsonl(tmp_path / "a.jsonl", questions("a"))
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import sys; from distill.data.sources import load_problems; from distill.config import DatasetConfig; "
        f"print(len(load_problems([DatasetConfig(data_path={dataset.data_path!r}, input_key='question')]))); "
        "assert 'datasets' not in sys.modules"
    )
    env = {"HOME": str(home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert list(home.iterdir()) == []


BAD_FILES = {
    "missing.jsonl": (None, r"data\.train\.data_path=.*missing\.jsonl does not exist"),
    "empty.jsonl": ("", r"data\.train: .*empty\.jsonl is empty"),
    "blank.jsonl": ('{"question": " "}', r"no row of .* has any text in question"),
    "torn.jsonl": ('{"question": "a"}\n\n{"question": "b', r"is malformed in line 3 \(Unterminated string"),
    "list.jsonl": ('{"question": "a"}\n["b"]', r"has \['b'\] in line 2, where an object"),
    "half.jsonl": ('{"question": "a"}\n{"question": "\\ud83d"}', r"is malformed in line 2 \(.*surrogates not allowed"),
    "deep.jsonl": ("[" * 100_000, r"is malformed in line 1 \(maximum recursion depth"),
    "bytes.jsonl": (b'{"question": "\xff"}', r"is malformed in line 1 \("),
    "column.jsonl": ('{"problem": "a", "gold": 1}', r"input_key=question is missing in line 1 of .*problem, gold: set"),
    "second.jsonl": ('{"question": "a"}\n{"problem": "b"}', r"input_key=question is missing in line 2 of"),
    "type.jsonl": (
        '{"question": ["a"]}',
        r"input_key=question is of type list in line 1 of .*: name a column of strings",
    ),
    "notes.txt": ("a", r"is of no kind that can be read: use one of \.jsonl, \.json, \.parquet"),
    "text.parquet": ("a", r"is not a readable Parquet file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_clear_sentence(name: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        load_problems([DatasetConfig(data_path=str(tmp_path / name), input_key="question")])
    assert "\n" not in str(caught.value)


def test_a_parquet_file_that_is_cut_or_holds_no_utf8_is_one_clear_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(questions(*"abcdefgh")), path)
    whole = path.read_bytes()
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.parquet is not a readable Parquet file \(.*: write it again"):
            load_problems([DatasetConfig(data_path=str(path), input_key="question")])
    column = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"question": column}), path)
    with pytest.raises(UserError, match=r"is not a readable Parquet file \('utf-8' codec can't decode"):
        load_problems([DatasetConfig(data_path=str(path), input_key="question")])


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match="is neither a file nor a folder"):
            load_problems([DatasetConfig(data_path=str(tmp_path / name), input_key="question")])
    with pytest.raises(UserError, match=r"prompt_file=.*a\.jsonl is no file"):
        read_prompt_file(str(tmp_path / "a.jsonl"), "data.train.prompt_file")


def test_a_bad_column_of_a_table_names_the_columns_there_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"problem": ["a"], "gold": [[1]]}), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"input_key=question is missing in .*problem, gold: set data\.train\.input_key"
    ):
        load_problems([DatasetConfig(data_path=path, input_key="question", output_key="gold")])
    with pytest.raises(UserError, match=r"output_key=gold is of type list in row 0 of .*strings or numbers"):
        load_problems([DatasetConfig(data_path=path, input_key="problem", output_key="gold")])
    with pytest.raises(UserError, match=r"output_key=answer is missing in the table of .*problem, gold: set"):
        load_problems([DatasetConfig(data_path=path, input_key="problem", output_key="answer")])


def test_bad_keys_of_a_dataset_are_refused(tmp_path: Path) -> None:
    good = jsonl(tmp_path / "a.jsonl", questions("a")).data_path
    bad = {
        r"data\.train names no dataset": [],
        r"data\.train names no dataset: set": [DatasetConfig()],
        r"data\.train\.repeat=0": [DatasetConfig(data_path=good, repeat=0)],
        r"data\.train\.dataset_name=DeepScalr is not among the known names \(DeepScaler": [
            DatasetConfig(dataset_name="DeepScalr")
        ],
        r"data\.train\.split=validation does not fit a file": [
            DatasetConfig(data_path=good, input_key="question", split="validation")
        ],
        r"data\.train\[1\]\.data_path=nowhere\.jsonl": [
            DatasetConfig(data_path=good, input_key="question"),
            DatasetConfig(data_path="nowhere.jsonl"),
        ],
    }
    for message, datasets in bad.items():
        with pytest.raises(UserError, match=message):
            load_problems(datasets)


def test_a_hub_dataset_without_a_hub_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match=r"dataset_name=agentica-org/DeepScaleR.* can't be loaded \(Couldn't reach"):
        load_problems([DatasetConfig(dataset_name="DeepScaler")])
    with pytest.raises(UserError, match=r"data_path=someone/something with split test can't be loaded"):
        load_problems([DatasetConfig(data_path="someone/something", split="test")])


# -- prompt files -----------------------------------------------------------------------------------------------------


def test_a_prompt_file_is_filled_as_str_format_does() -> None:
    text = (ROOT / "prompts" / "cot.txt").read_text()
    problem = "Is {x} in \\frac{1}{2} or {{}}?"
    assert read_prompt_file(str(ROOT / "prompts" / "cot.txt"), "prompt_file").fill({"": problem}) == text.format(
        problem
    )
    assert "\\boxed{}" in text.format(problem)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["{{", "}}", "{}", "a", "\n", "{a}", "é"]), max_size=12), st.text(max_size=5))
def test_a_template_is_filled_as_str_format_does(pieces: list[str], value: str) -> None:
    text = "".join(pieces)
    expected = "".join({"{{": "{", "}}": "}", "{}": value, "{a}": "v{}"}.get(piece, piece) for piece in pieces)
    formatted = "".join({"{}": "{b}"}.get(piece, piece) for piece in pieces).format(a="v{}", b=value)
    assert Template(text, ("", "a"), "here").fill({"": value, "a": "v{}"}) == expected == formatted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n{x.__class__}", r"unknown placeholder \{x\.__class__\} on line 2: only \{\} may stand in it"),
        ("{0}", r"unknown placeholder \{0\}"),
        ("{problem}", r"unknown placeholder \{problem\}"),
        ("{!r}", r"unknown placeholder \{!r\}"),
        ("{:>9}", r"unknown placeholder \{:>9\}"),
        ("{} and {", r"a single \{ on line 1"),
        ("{} and }", r"a single \} on line 1"),
        ("{a{}}", r"a single \{ on line 1"),
        ("no place", r"has no \{\}: put one"),
        ("{{}}", r"has no \{\}: put one"),
        ("\\boxed{} {}", r"has 2 \{\}: keep the problem's"),
    ],
)
def test_a_bad_prompt_file_is_one_clear_sentence(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_prompt_file(str(tmp_path / "p.txt"), "data.default.prompt_file")
    assert str(caught.value).startswith(f"data.default.prompt_file={tmp_path / 'p.txt'}")


def test_a_missing_prompt_file_names_its_key_before_the_data_is_read(tmp_path: Path) -> None:
    for dataset, key in (
        (DatasetConfig(data_path="nowhere.jsonl", prompt_file="nowhere.txt"), "prompt_file"),
        (DatasetConfig(data_path="nowhere.jsonl", system_prompt_file="nowhere.txt"), "system_prompt_file"),
    ):
        with pytest.raises(UserError, match=rf"data\.train\.{key}=nowhere\.txt does not exist"):
            load_prompts([dataset], tiny_tokenizer(), 100)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not a readable UTF-8 text file"):
        read_prompt_file(str(tmp_path / "binary.txt"), "data.train.prompt_file")


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_a_prompt_is_system_prompt_and_filled_file_in_the_chat_template(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Solve {} with \\boxed{{}}")
    (tmp_path / "s.txt").write_text("Be {kind}")
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


def test_each_dataset_keeps_its_own_prompt_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Say {}")
    first = jsonl(tmp_path / "a.jsonl", questions("a"))
    second = DatasetConfig(
        data_path=first.data_path, input_key="question", prompt_file=str(tmp_path / "p.txt"), repeat=2
    )
    tokenizer = tiny_tokenizer(chat_template=None)
    prompts = load_prompts([first, second], tokenizer, 100)
    assert [tokenizer.decode(list(p.student_ids)) for p in prompts] == ["a", "Say a", "Say a"]
    assert [p.prompt_id for p in prompts] == [0, 1, 2]


def test_the_ids_are_those_of_the_tokenizers_own_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    chats = [[{"role": "user", "content": text}] for text in ("a", "é<think>b", "")]
    expected = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    assert chat_ids(tokenizer, chats) == expected


def test_a_chat_template_that_refuses_is_one_clear_sentence() -> None:
    tokenizer = tiny_tokenizer("{{ raise_exception('System role not supported') }}")
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(UserError, match=r"refuses a conversation of system, user \(System role not supported\)"):
        chat_ids(tokenizer, [chat])
    with pytest.raises(UserError, match="not supported") as caught:
        chat_ids(tokenizer, [chat[1:]])
    assert "system_prompt_file" not in str(caught.value)
    tokenizer.chat_template = {"short": "{{ messages[0].content }}", "long": "{{ messages[0].content * 2 }}"}
    with pytest.raises(UserError, match=r"set policy\.tokenizer\.chat_template_kwargs\.chat_template to one of short"):
        chat_ids(tokenizer, [chat[1:]])
    with pytest.raises(UserError, match="chat_template_kwargs sets tokenize"):
        chat_ids(tiny_tokenizer(), [chat], {"tokenize": True})


def test_a_prompt_longer_than_the_window_is_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = jsonl(tmp_path / "a.jsonl", questions("aaaa", "aaaaa", "aaa"))
    tokenizer = tiny_tokenizer(chat_template=None)
    prompts = load_prompts([dataset], tokenizer, 4)
    assert [(p.prompt_id, len(p.student_ids)) for p in prompts] == [(0, 4), (2, 3)]
    assert prompts.skipped == 1
    assert "1 of 3 prompts are longer than 4 tokens (the longest has 5)" in caplog.text
    with pytest.raises(UserError, match=r"data\.train: all 3 prompts are longer than 2 tokens: raise"):
        load_prompts([dataset], tokenizer, 2)


def test_ten_thousand_prompts_report_their_progress(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = jsonl(tmp_path / "a.jsonl", questions(*map(str, range(10_001))))
    with caplog.at_level(logging.INFO):
        assert len(load_prompts([dataset], tiny_tokenizer(chat_template=None), 100)) == 10_001
    assert "tokenised 10000 of 10001 prompts" in caplog.text


# -- order ------------------------------------------------------------------------------------------------------------


def numbered(n: int) -> Prompts:
    problems = tuple(Problem(str(i)) for i in range(n))
    return Prompts(problems, tuple(range(n)), array("i", range(n)), array("q", range(n + 1)), skipped=0)


def drawn(order: PromptOrder, step: int) -> list[int]:
    return [prompt.prompt_id for prompt in order.batch(step)]


@given(n=st.integers(1, 40), per_step=st.integers(1, 40), seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_an_epoch_takes_every_prompt_at_most_once_and_all_that_fill_a_batch(
    n: int, per_step: int, seed: int, epoch: int
) -> None:
    if per_step > n:
        with pytest.raises(UserError, match=rf"num_prompts_per_step={per_step} does not fit the {n} prompts"):
            PromptOrder(numbered(n), per_step, seed)
        return
    order = PromptOrder(numbered(n), per_step, seed)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    ids = [i for step in steps for i in drawn(order, step)]
    assert len(set(ids)) == len(ids) == n // per_step * per_step
    assert {order.epoch(step) for step in steps} == {epoch}


@given(seed=st.integers(0, 2**31), steps=st.lists(st.integers(0, 50), min_size=1, max_size=5))
@settings(deadline=None, max_examples=40)
def test_a_step_is_the_same_whatever_was_drawn_before(seed: int, steps: list[int]) -> None:
    used, fresh = PromptOrder(numbered(10), 3, seed), PromptOrder(numbered(10), 3, seed)
    for step in steps:
        drawn(used, step)
    assert drawn(used, steps[0]) == drawn(fresh, steps[0])


def test_the_order_is_this_one_for_good() -> None:
    """A literal order: a resumed run must find its prompts again under another Python or torch."""
    order = PromptOrder(numbered(7), 3, seed=42)
    assert [drawn(order, step) for step in range(4)] == [[6, 4, 1], [5, 0, 3], [5, 0, 1], [6, 3, 2]]


def test_seeds_and_epochs_have_their_own_orders() -> None:
    order = PromptOrder(numbered(50), 50, seed=1)
    assert drawn(order, 0) != drawn(order, 1)
    assert drawn(order, 0) != drawn(PromptOrder(numbered(50), 50, seed=2), 0)
    assert sorted(drawn(order, 0)) == list(range(50))


def test_without_shuffle_the_order_is_the_files() -> None:
    order = PromptOrder(numbered(5), 2, seed=1, shuffle=False)
    assert [drawn(order, step) for step in range(3)] == [[0, 1], [2, 3], [0, 1]]


def test_epochs_end_a_run_as_steps_do() -> None:
    order = PromptOrder(numbered(10), 3, seed=1)
    assert (order.steps(1000, 2), order.steps(5, 2), order.steps(5, 0)) == (6, 5, 0)


def test_a_position_is_saved_and_found_again() -> None:
    order = PromptOrder(numbered(10), 3, seed=1)
    state = json.loads(json.dumps(order.state(7)))
    assert (state["step"], state["epoch"], state["step_in_epoch"]) == (7, 2, 1)
    for seed in (1, 2):  # another seed is another order from there on, which the recipe's comparison tells
        assert PromptOrder(numbered(10), 3, seed).changes(state) == []


def test_changed_data_and_order_are_reported() -> None:
    state = PromptOrder(numbered(10), 3, seed=1).state(7)
    changed, swapped = numbered(10), numbered(10)
    changed.tokens[4] = 99
    swapped.tokens[3], swapped.tokens[4] = swapped.tokens[4], swapped.tokens[3]
    for order, message in [
        (PromptOrder(numbered(10), 2, seed=1), "distillation.num_prompts_per_step was 3 and is 2"),
        (PromptOrder(numbered(11), 3, seed=1), "of its 10 prompts 0 are gone, and of the 11 now 1 are new)"),
        (PromptOrder(numbered(9), 3, seed=1), "of its 10 prompts 1 are gone, and of the 9 now 0 are new)"),
        (PromptOrder(changed, 3, seed=1), "of its 10 prompts 1 are gone, and of the 10 now 1 are new)"),
        (PromptOrder(swapped, 3, seed=1), "(its 10 prompts are the same in another order)"),
        (PromptOrder(numbered(10), 3, seed=1, shuffle=False), "data.shuffle was True and is False"),
    ]:
        (change,) = order.changes(state)
        assert message in change


# -- the smokes' problems ---------------------------------------------------------------------------------------------


def problem_lines(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ROOT / "prompts" / name).read_text().splitlines()]


def make_problems() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_problems", ROOT / "scripts" / "make_problems.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_makes_the_problem_files_again() -> None:
    assert list(islice(make_problems().problems(7), 200)) == problem_lines("gsm_train.jsonl")[:200]


def test_a_problem_that_comes_again_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import reasoning_gym

    blocks = [questions("a", "b", "a"), questions("b", "c")]
    monkeypatch.setattr(reasoning_gym, "create_dataset", lambda task, size, seed: blocks[seed // 1_000_000])
    assert [row["question"] for row in islice(make_problems().problems(7), 3)] == ["a", "b", "c"]


def test_no_validation_problem_is_trained_on() -> None:
    train, validation = problem_lines("gsm_train.jsonl"), problem_lines("gsm_validation.jsonl")
    assert (len(train), len(validation)) == (512, 128)
    assert len({row["question"] for row in train + validation}) == 640
