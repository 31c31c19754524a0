"""Traces and teacher prefixes equal hand-written texts. A byte is a token here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import DatasetConfig
from distill.data.prompts import load_prompts
from distill.data.teacher_prefix import SamePromptPrefixes
from distill.data.thoughts import extract_trace
from distill.errors import UserError
from distill.types import Problem
from tests.data.teacher_prefixes import CONTEXT, EXTRACTOR, STATIC, counted, prefixes, read, rollout
from tests.tiny_tokenizer import tiny_tokenizer

# -- traces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "first", "last", "longest"),
    [
        ("<think>\n a\nb \n</think>c", "a\nb", "a\nb", "a\nb"),
        ("x<think>a</think><think>b</think>", "a", "b", "a"),
        ("<think>a</think>b<think>cd</think><think>e</think>", "a", "e", "cd"),
        ("<think>a    </think><think>bc</think>", "a", "bc", "bc"),
        ("<think>a<think>b</think>c</think>", "a<think>b", "a<think>b", "a<think>b"),
        ("<think> </think>x<think>y</think>", "", "y", "y"),
        ("never opened</think>", "", "", ""),
        ("</think><think>a</think>", "a", "a", "a"),
        ("<THINK>a</THINK>", "", "", ""),
        ("", "", "", ""),
    ],
)
@pytest.mark.parametrize("unclosed", ["to_end", "ignore"])
def test_the_trace_is_the_selected_think_block(text: str, first: str, last: str, longest: str, unclosed: Any) -> None:
    traces: dict[Any, str] = {"first": first, "last": last, "longest": longest}
    for selection, trace in traces.items():
        assert extract_trace(text, replace(EXTRACTOR, selection=selection, unclosed_span=unclosed)) == trace


@pytest.mark.parametrize(
    ("text", "selection", "to_end", "ignore"),
    [
        ("<think>never\nclosed ", "first", "never\nclosed", ""),
        ("<think>a</think>b<think>cd", "first", "a", "a"),
        ("<think>a</think>b<think>cd", "last", "cd", "a"),
        ("<think>a</think>b<think>cd", "longest", "cd", "a"),
        ("<think>a<think>b", "last", "a<think>b", ""),
        ("<think>", "first", "", ""),
    ],
)
def test_an_unclosed_think_block_extends_to_the_end_or_is_ignored(
    text: str, selection: Any, to_end: str, ignore: str
) -> None:
    traces: dict[Any, str] = {"to_end": to_end, "ignore": ignore}
    for unclosed, trace in traces.items():
        assert extract_trace(text, replace(EXTRACTOR, selection=selection, unclosed_span=unclosed)) == trace


def test_an_unclosed_trace_excludes_the_stop_token() -> None:
    stopped = rollout("<think>carry")
    cut = replace(stopped, response_ids=stopped.response_ids[:-1], logprobs=stopped.logprobs[:-1], finish="length")
    made, _ = prefixes().add([stopped, cut])
    assert read(made) == ["1+1?|carry", "1+1?|carry"]


@pytest.mark.parametrize("special_think", [True, False])
def test_think_tags_may_be_special_tokens(special_think: bool) -> None:
    tokenizer = tiny_tokenizer(special_think=special_think)
    made, _ = prefixes(tokenizer=tokenizer).add([rollout("<think>carry</think>2", tokenizer=tokenizer)])
    assert tokenizer.decode(list(made[0].teacher_prefix_ids)) == "1+1?|carry"


def test_a_trace_keeps_its_spaces_before_punctuation() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True  # as some models' tokenizers are set
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    response = rollout("<think>a , b . c 's</think>2")
    made, _ = prefixes(tokenizer=tokenizer).add([response])
    assert read(made) == ["1+1?|a , b . c 's"]


# -- traces of a dataset ----------------------------------------------------------------------------------------------


def test_a_static_trace_comes_from_the_dataset_not_from_the_response() -> None:
    rollouts = [
        rollout("<think>mine</think>2", solution="<think>theirs</think>2"),
        rollout("<think>mine</think>2", solution="no span"),
        rollout("<think>mine</think>2", solution=""),
        rollout("<think>mine</think>2", solution="a<think>b{trace}"),
    ]
    made, counts = prefixes(**STATIC).add(rollouts)
    assert read(made) == ["1+1?|theirs", "1+1?|", "1+1?|", "1+1?|b{trace}"]
    assert counted(counts)["trace_coverage"] == (2.0, 4.0)
    made, counts = prefixes(**STATIC, missing_trace_policy="drop_sample").add(rollouts)
    assert read(made) == ["1+1?|theirs", "1+1?|b{trace}"]
    assert counted(counts)["dropped_missing_trace"] == 2.0


def test_full_text_takes_the_complete_column_as_trace() -> None:
    rollouts = [rollout("2", solution=" carry <think>x</think> "), rollout("2", solution="  ")]
    made, _ = prefixes(**STATIC, type="full_text").add(rollouts)
    assert read(made) == ["1+1?|carry <think>x</think>", "1+1?|"]


def test_a_problem_without_the_trace_column_is_refused() -> None:
    with pytest.raises(UserError, match=r"a\.jsonl.* hint") as caught:
        prefixes(**STATIC).add([rollout("2", hint="h")])
    assert (caught.value.key, caught.value.value) == (f"{CONTEXT}.static_trace.answer_column", "solution")


def trace_problems(tmp_path: Path, *rows: dict[str, Any], column: str = "solution") -> list[Problem]:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"input": "1+1?", **row}) + "\n" for row in rows))
    dataset = DatasetConfig(data_path=str(path))
    return [p.problem for p in load_prompts([dataset], tiny_tokenizer(), 100, trace_column=column)]


def test_the_trace_column_is_read_with_the_problems(tmp_path: Path) -> None:
    rows: tuple[dict[str, Any], ...] = ({"solution": "a"}, {"solution": None}, {"solution": "", "hint": "b"})
    found = [problem.columns for problem in trace_problems(tmp_path, *rows)]
    assert found == [{"solution": "a"}, {"solution": ""}, {"solution": ""}]
    (nested,) = trace_problems(tmp_path, {"turns": [{"text": "a"}]}, column="turns.0.text")
    assert nested.columns == {"turns.0.text": "a"}


def test_the_trace_column_of_a_table_is_read_with_the_problems(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = pa.array([[{"text": "a"}], [{"text": None}]])
    pq.write_table(pa.table({"input": ["1+1?", "2+2?"], "turns": turns}), tmp_path / "a.parquet")
    dataset = DatasetConfig(data_path=str(tmp_path / "a.parquet"))
    prompts = load_prompts([dataset], tiny_tokenizer(), 100, trace_column="turns.0.text")
    assert [prompt.problem.columns for prompt in prompts] == [{"turns.0.text": "a"}, {"turns.0.text": ""}]
    with pytest.raises(UserError, match=r"answer_column=solution .* input, turns"):
        load_prompts([dataset], tiny_tokenizer(), 100, trace_column="solution")
    with pytest.raises(UserError, match=r"answer_column=turns .* list in row 0 of"):
        load_prompts([dataset], tiny_tokenizer(), 100, trace_column="turns")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"hint": "b"}, r"answer_column=solution .* line 2 of .* input, hint"),
        ({"solution": 3}, r"answer_column=solution .* int in line 2 of"),
        ({"solution": ["a"]}, r"answer_column=solution .* list in line 2 of"),
    ],
)
def test_an_unusable_trace_column_is_refused(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError, match=r"^distillation\.context_distillation\.static_trace\." + message):
        trace_problems(tmp_path, {"solution": "a"}, row)


# -- prefixes ---------------------------------------------------------------------------------------------------------


def test_the_filled_template_is_a_user_message() -> None:
    made, _ = prefixes("Given {problem} and {trace}, in {{braces}}.", chat_template=True).add(
        [rollout("<think>carry {x}</think>2", problem="1{}1 {trace}")]
    )
    assert read(made) == [
        "<|im_start|>user\nGiven 1{}1 {trace} and carry {x}, in {braces}.<|im_end|>\n<|im_start|>assistant\n"
    ]


def test_the_chat_template_gets_its_arguments() -> None:
    made, _ = prefixes("{problem}", chat_template=True, template_kwargs={"enable_thinking": False}).add([rollout("2")])
    assert read(made) == ["<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"]


def test_without_chat_template_the_teacher_reads_the_bare_text() -> None:
    made, _ = prefixes("{problem} + {trace}").add([rollout("<think>t</think>2"), rollout("3", problem="2+1?")])
    assert read(made) == ["1+1? + t", "2+1? + "]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="{}<>|ab\n %", max_size=20), st.text(alphabet="{}ab $", max_size=20))
def test_braces_in_the_data_are_literal(problem: str, trace: str) -> None:
    response = rollout(f"<think>{trace}</think>2", problem=problem)
    (made,), _ = prefixes("{{{problem}}} \\boxed{{}} {trace}{problem}").add([response])
    assert read([made]) == [f"{{{problem}}} \\boxed{{}} {trace.strip()}{problem}"]


def test_the_response_is_never_changed() -> None:
    given = rollout("<think>t</think>2")
    for policy in ("truncate_trace", "truncate_prefix_only", "truncate_prefix_from_end"):
        (made,), _ = prefixes(max_tokens=len(given.response_ids) + 5, overflow_policy=policy).add([given])
        assert replace(made, teacher_prefix_ids=()) == given


def test_the_teacher_reads_the_students_prompt_in_plain_distillation() -> None:
    made, counts = SamePromptPrefixes().add([rollout("2"), rollout("3")])
    assert [r.teacher_prefix_ids for r in made] == [(7, 8), (7, 8)]
    assert (counts.means, counts.totals) == ({}, {})
