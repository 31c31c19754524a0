"""Traces and teacher prefixes equal hand-written texts. A byte is a token here."""

from __future__ import annotations

import json
<<<<<<< HEAD
=======
import logging
>>>>>>> main
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import (
    DatasetConfig,
)
<<<<<<< HEAD
from distill.data.prompts import load_prompts
from distill.data.teacher_prefix import (
    SamePromptPrefixes,
)
=======
from distill.data.prompts import PromptOrder, load_prompts
from distill.data.teacher_prefix import ContextPrefixes, SamePromptPrefixes, build_teacher_prefixes
>>>>>>> main
from distill.data.thoughts import extract_trace
from distill.errors import UserError
from distill.types import Problem
from tests.data.teacher_prefixes import (
    CONTEXT,
    EXTRACTOR,
    STATIC,
    counted,
    prefixes,
    read,
    rollout,
)
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
    with pytest.raises(UserError, match=r"answer_column=solution .* input, turns:"):
        load_prompts([dataset], tiny_tokenizer(), 100, trace_column="solution")
    with pytest.raises(UserError, match=r"answer_column=turns .* list in row 0 of"):
        load_prompts([dataset], tiny_tokenizer(), 100, trace_column="turns")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"hint": "b"}, r"answer_column=solution .* line 2 of .* input, hint:"),
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
<<<<<<< HEAD
=======


# -- overflow ---------------------------------------------------------------------------------------------------------

# "1+1?|" and the trace "abc" make a prefix of 8; the answer <think>abc</think>2<|im_end|> has 7 tokens.
ANSWER = "<think>abc</think>2"


@pytest.mark.parametrize(
    ("max_tokens", "policy", "prefix", "cut"),
    [
        (15, "truncate_trace", "1+1?|abc", 0.0),
        (15, "truncate_prefix_only", "1+1?|abc", 0.0),
        (15, "truncate_prefix_from_end", "1+1?|abc", 0.0),
        (14, "truncate_trace", "1+1?|ab", 1.0),
        (14, "truncate_prefix_only", "+1?|abc", 1.0),
        (14, "truncate_prefix_from_end", "1+1?|ab", 1.0),
        (12, "truncate_trace", "1+1?|", 1.0),
        (8, "truncate_prefix_only", "c", 1.0),
        (8, "truncate_prefix_from_end", "1", 1.0),
    ],
)
def test_a_prefix_gives_way_to_its_answer(max_tokens: int, policy: Any, prefix: str, cut: float) -> None:
    made, counts = prefixes(max_tokens=max_tokens, overflow_policy=policy).add([rollout(ANSWER)])
    assert read(made) == [prefix]
    assert len(made[0].teacher_prefix_ids) + len(made[0].response_ids) <= max_tokens
    assert counts.means["context_distillation_prefix_truncation_rate"] == (cut, 1.0)
    assert counts.totals["context_distillation_prefix_truncation_count"] == cut
    assert counts.means["context_distillation_trace_mean_tokens"] == (3.0, 1.0)


def test_by_default_the_trace_alone_gives_way_and_the_chat_stands() -> None:
    # Around the trace stand 35 tokens, 19 of them the chat's; the trace has 9, and the answer 13.
    answer = rollout("<think>0123é678</think>2")
    assert ContextDistillationConfig().overflow_policy == "truncate_trace"
    kept_at = {58: "0123é678", 57: "0123é678", 56: "0123é67", 54: "0123é", 53: "0123", 48: ""}
    for max_tokens, kept in kept_at.items():
        made, counts = prefixes("P: {problem} T: {trace} {problem}", max_tokens, chat_template=True).add([answer])
        assert read(made) == [f"<|im_start|>user\nP: 1+1? T: {kept} 1+1?<|im_end|>\n<|im_start|>assistant\n"]
        assert counted(counts)["prefix_truncation_count"] == float(kept != "0123é678")
    made, counts = prefixes("P: {problem} T: {trace} {problem}", 47, chat_template=True).add([answer])
    assert made == []
    assert (counted(counts)["dropped_prefix_too_long"], counted(counts)["dropped_samples"]) == (1.0, 1.0)


def test_a_prefix_without_a_trace_to_cut_is_left_out_and_counted() -> None:
    answers = [rollout("2"), rollout("2", problem="1+1+1?")]
    for template in ("{problem}.{trace}", "{problem}."):
        made, counts = prefixes(template, max_tokens=7).add(answers)
        assert read(made) == ["1+1?."]
        assert {name: n for name, n in counted(counts).items() if "dropped" in name and n} == {
            "dropped_samples": 1.0,
            "dropped_prefix_too_long": 1.0,
        }
        assert counted(counts)["prefix_truncation_rate"] == (0.0, 1.0)


def test_where_a_trace_is_needed_one_cut_to_nothing_is_missing() -> None:
    cases: Any = ((13, "drop_sample", ["1+1?|a"]), (12, "drop_sample", []), (12, "empty", ["1+1?|"]))
    for max_tokens, policy, expected in cases:
        made, counts = prefixes(max_tokens=max_tokens, missing_trace_policy=policy).add([rollout(ANSWER)])
        assert read(made) == expected
        assert counted(counts)["dropped_prefix_too_long"] == 1.0 - len(expected)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="abé ☃\n", max_size=60), st.integers(12, 120), st.booleans())
def test_as_much_of_the_trace_is_kept_as_fits(trace: str, max_tokens: int, needed: bool) -> None:
    trace = trace.strip()
    answer = rollout("2", solution=trace)
    made, _ = prefixes(
        "{problem}|{trace}|", max_tokens, **STATIC, type="full_text",
        missing_trace_policy="drop_sample" if needed else "empty",
    ).add([answer])  # fmt: skip
    room = max_tokens - 2 - len("1+1?||")
    kept = ""
    for character in trace:  # whole characters, while their bytes fit
        if len((kept + character).encode()) > room:
            break
        kept += character
    assert read(made) == ([] if needed and not kept else [f"1+1?|{kept}|"])


def test_a_tokenizer_that_merges_is_filled_to_its_window() -> None:
    """There, a trace's tokens depend on what stands beside them, and lengths are no straight line."""
    from transformers import AutoTokenizer

    models = Path(__file__).parents[2] / "models/SmolLM2-135M-Instruct"
    if not models.exists():
        pytest.skip("needs models/SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(models)
    trace = " " * 400 + "+-*/" * 300 + "the sum of both " * 200 + "1234567890" * 40
    for max_tokens in (60, 61, 100, 333, 1000):
        answer = Rollout(Prompt(0, (1,), Problem("1+1?", columns={"solution": trace})), 0, (5,), (0.0,), "stop", 0)
        (made,), _ = prefixes(
            "P {problem} T {trace} end", max_tokens, tokenizer, **STATIC, type="full_text", chat_template=True
        ).add([answer])
        text = tokenizer.decode(list(made.teacher_prefix_ids))
        begin, _, rest = text.partition("P 1+1? T ")
        assert begin.endswith("<|im_start|>user\n") and text.endswith(" end<|im_end|>\n<|im_start|>assistant\n")
        assert max_tokens - 4 <= len(made.teacher_prefix_ids) + 1 <= max_tokens
        assert trace.strip().startswith(rest.removesuffix(" end<|im_end|>\n<|im_start|>assistant\n"))


def test_an_answer_that_leaves_no_room_is_left_out() -> None:
    for policy in ("truncate_trace", "truncate_prefix_only", "truncate_prefix_from_end"):
        for max_tokens, reason in ((7, "no_prefix_budget"), (6, "too_long_response")):
            made, counts = prefixes(max_tokens=max_tokens, overflow_policy=policy).add([rollout(ANSWER)])
            assert made == []
            assert counts.totals == {
                "context_distillation_valid_samples": 0.0,
                "context_distillation_prefix_truncation_count": 0.0,
                "context_distillation_dropped_samples": 1.0,
                "context_distillation_dropped_missing_trace": 0.0,
                "context_distillation_dropped_too_long_response": float(reason == "too_long_response"),
                "context_distillation_dropped_no_prefix_budget": float(reason == "no_prefix_budget"),
                "context_distillation_dropped_prefix_too_long": 0.0,
                "context_distillation_dropped_invalid_message": 0.0,
                "context_distillation_dropped_for_dp_divisibility": 0.0,
            }


def test_an_answer_without_a_trace_is_kept_or_left_out_as_asked() -> None:
    answers = [rollout("2"), rollout("<think></think>2"), rollout("<think>t</think>2")]
    made, counts = prefixes(missing_trace_policy="drop_sample").add(answers)
    assert read(made) == ["1+1?|t"]
    assert counts.totals["context_distillation_dropped_missing_trace"] == 2.0
    assert counts.means["context_distillation_trace_coverage"] == (1.0, 3.0)
    made, counts = prefixes(missing_trace_policy="empty").add(answers)
    assert read(made) == ["1+1?|", "1+1?|", "1+1?|t"]
    assert counts.totals["context_distillation_dropped_samples"] == 0.0


def test_a_template_without_a_trace_misses_none() -> None:
    made, counts = prefixes("{problem}", missing_trace_policy="drop_sample").add([rollout("2")])
    assert read(made) == ["1+1?"]
    assert counts.totals["context_distillation_dropped_samples"] == 0.0


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_every_metric_of_a_batch_worked_by_hand() -> None:
    # A window of 20. Answers in tokens, their prefixes "1+1?|" + trace in tokens:
    answers = [
        rollout("<think>abc</think>2"),  # 7; 8: fits
        rollout("<think>né+fgh</think>2"),  # 11; 12, cut to 9
        rollout("2"),  # 2; 5: fits, no trace
        rollout("<think>0123456789abcde</think>2"),  # 19; 20, cut to 1
        rollout("x" * 19),  # 20: no room for a prefix, no trace
        rollout("<think>0123456789abcdefghi</think>"),  # 22: too long, with a trace
    ]
    assert [len(r.response_ids) for r in answers] == [7, 11, 2, 19, 20, 22]
    made, counts = prefixes(max_tokens=20, overflow_policy="truncate_prefix_only").add(answers)
    assert read(made) == ["1+1?|abc", "?|né+fgh", "1+1?|", "e"]
    assert {name.removeprefix("context_distillation_"): pair for name, pair in counts.means.items()} == {
        "trace_coverage": (4.0, 6.0),
        "trace_mean_chars": (3.0 + 6.0 + 15.0 + 19.0, 4.0),
        "trace_mean_tokens": (3.0 + 7.0 + 15.0 + 19.0, 4.0),
        "prefix_truncation_rate": (2.0, 4.0),
        "prefix_mean_tokens": (8.0 + 9.0 + 5.0 + 1.0, 4.0),
    }
    assert {name.removeprefix("context_distillation_"): total for name, total in counts.totals.items()} == {
        "valid_samples": 4.0,
        "prefix_truncation_count": 2.0,
        "dropped_samples": 2.0,
        "dropped_missing_trace": 0.0,
        "dropped_too_long_response": 1.0,
        "dropped_no_prefix_budget": 1.0,
        "dropped_prefix_too_long": 0.0,
        "dropped_invalid_message": 0.0,
        "dropped_for_dp_divisibility": 0.0,
    }
    made, counts = prefixes(max_tokens=20).add(answers)  # the fourth's template and problem alone are 5, and 1 fits
    assert read(made) == ["1+1?|abc", "1+1?|né+", "1+1?|"]
    assert counted(counts) == {
        "trace_coverage": (4.0, 6.0),
        "trace_mean_chars": (43.0, 4.0),
        "trace_mean_tokens": (44.0, 4.0),
        "prefix_truncation_rate": (1.0, 3.0),
        "prefix_mean_tokens": (8.0 + 9.0 + 5.0, 3.0),
        "valid_samples": 3.0,
        "prefix_truncation_count": 1.0,
        "dropped_samples": 3.0,
        "dropped_missing_trace": 0.0,
        "dropped_too_long_response": 1.0,
        "dropped_no_prefix_budget": 1.0,
        "dropped_prefix_too_long": 1.0,
        "dropped_invalid_message": 0.0,
        "dropped_for_dp_divisibility": 0.0,
    }


def test_two_ranks_counts_add_up_to_those_of_one() -> None:
    answers = [rollout(text) for text in ("<think>abc</think>2", "2", "x" * 30, "<think>é</think>3", "4")]
    _, whole = prefixes(max_tokens=12).add(answers)
    parts = [prefixes(max_tokens=12).add(part)[1] for part in (answers[:2], answers[2:], [])]
    for name, (total, count) in whole.means.items():
        pairs = [part.means.get(name, (0.0, 0.0)) for part in parts]
        assert (sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)) == (total, count)
    assert {name: sum(part.totals[name] for part in parts) for name in whole.totals} == whole.totals


def test_a_mean_over_nothing_is_left_out() -> None:
    made, counts = prefixes().add([])
    assert (made, counts.means) == ([], {})
    _, counts = prefixes().add([rollout("2")])
    assert "context_distillation_trace_mean_chars" not in counts.means


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "source", "solutions", "refused"),
    [
        ("{problem}", "dynamic", ["<think>a</think>"], True),
        ("{problem}{trace}", "dynamic", [""], False),  # known only with the answers
        ("{problem}{trace}", "static_dataset", ["", "no span"], True),
        ("{problem}{trace}", "static_dataset", ["", "", "<think>a</think>"], False),
        ("{problem}{{trace}}", "dynamic", [""], False),
        ("{problem}.", "static_dataset", [""], False),
    ],
)
def test_a_student_that_is_its_teacher_and_reads_no_more_as_such_is_refused(
    tmp_path: Path, template: str, source: str, solutions: list[str], refused: bool
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"input": "1+1?", "solution": s}) + "\n" for s in solutions))
    context = "distillation.context_distillation"
    config = load_config(
        [
            *("policy.model_name=m", "teacher.model_name=m", f"{context}.enabled=true"),
            *(f"{context}.teacher_prefix_template={template}", f"{context}.trace_source={source}"),
            *([f"{context}.static_trace.answer_column=solution"] if source == "static_dataset" else []),
        ]
    )
    dataset = DatasetConfig(data_path=str(tmp_path / "a.jsonl"))
    prompts = load_prompts([dataset], tiny_tokenizer(), 100, trace_column="solution")
    order = PromptOrder(prompts, 1, seed=0, shuffle=False)
    with pytest.raises(UserError, match="the two are one model") if refused else contextlib.nullcontext():
        check_reading(config, build_teacher_prefixes(config, tiny_tokenizer()), order)


def test_a_template_that_fills_the_window_by_itself_is_one_clear_sentence() -> None:
    message = (
        r"teacher_prefix_template has 9 tokens without problem, trace and response, but all of them must fit into "
        r"teacher\.max_total_sequence_length=9: shorten"
    )
    with pytest.raises(UserError, match=message):
        prefixes("Solve: {problem}, {trace}", max_tokens=9)
    prefixes("Solve: {problem}, {trace}", max_tokens=10)
    with pytest.raises(UserError, match="has 28 tokens"):  # the chat template's count too
        prefixes("Solve: {problem}, {trace}", max_tokens=28, chat_template=True)


@pytest.mark.parametrize(
    ("template", "source", "warns"),
    [("{problem}{trace}", {}, 1), ("{problem}{trace}", STATIC, 0), ("{problem} {{trace}}", {}, 0)],
)
def test_a_trace_that_leaks_the_answer_being_scored_is_warned_of_once(
    caplog: pytest.LogCaptureFixture, template: str, source: dict[str, Any], warns: int
) -> None:
    with caplog.at_level(logging.WARNING):
        found = prefixes(template, **source)
        for _ in range(3):
            found.add([rollout(ANSWER, solution="")])
    assert len(caplog.records) == warns
    assert all("trace_source=dynamic" in record.message for record in caplog.records)


def test_a_recipe_chooses_its_views() -> None:
    config = load_config([])
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
    made, _ = build_teacher_prefixes(config, tokenizer).add([rollout(ANSWER)])
    assert read(made) == ["1+1"]
    dropping = replace(context, trace_extractor=replace(context.trace_extractor, missing_trace_policy="drop_sample"))
    config = replace(config, distillation=replace(config.distillation, context_distillation=dropping))
    assert build_teacher_prefixes(config, tokenizer).add([rollout("2")])[0] == []


def test_the_column_of_the_traces_is_asked_for_where_it_is_read() -> None:
    context = ContextDistillationConfig(enabled=True, **STATIC)
    assert context.trace_column == "solution"
    assert replace(context, enabled=False).trace_column is None
    assert replace(context, trace_source="dynamic").trace_column is None


def test_the_chat_template_gets_the_teachers_arguments_or_else_the_students() -> None:
    config = load_config([])
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


def test_another_teacher_has_its_own_chat_template_and_a_student_that_is_its_teacher_one(tmp_path: Path) -> None:
    """The student's tokenizer is named apart from its weights, which come with another chat template."""
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
>>>>>>> main
