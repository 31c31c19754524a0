"""What the teacher reads: hand-worked prefixes, cuts, drops and metrics. A byte is a token here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from distill.config import load_config
from distill.data.context import ContextViews, SamePromptViews, extract_trace, teacher_views
from distill.types import Problem, Prompt, Rollout, UserError
from tests.tiny_tokenizer import tiny_tokenizer

END = 258
"""<|im_end|>"""


def rollout(answer: str, problem: str = "1+1?", tokenizer: Any = None) -> Rollout:
    """An answer that stopped: one token a byte, and the stop token."""
    ids = (*(tokenizer or tiny_tokenizer())(answer)["input_ids"], END)
    return Rollout(Prompt(0, (7, 8), Problem(problem)), 0, ids, (0.0,) * len(ids), "stop", version=0)


def views(template: str = "{problem}|{trace}", max_tokens: int = 1000, **settings: Any) -> ContextViews:
    return ContextViews(tiny_tokenizer(), template, max_tokens, **{"chat_template": False, **settings})


def read(rollouts: list[Rollout]) -> list[str]:
    return [tiny_tokenizer().decode(list(r.teacher_prefix_ids)) for r in rollouts]


# -- traces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "trace"),
    [
        ("<think>\n a\nb \n</think>c", "a\nb"),
        ("x<think>a</think><think>b</think>", "a"),
        ("<think>a<think>b</think>c</think>", "a<think>b"),
        ("<think> </think>x", ""),
        ("<think>never closed", ""),
        ("never opened</think>", ""),
        ("</think><think>a</think>", "a"),
        ("", ""),
    ],
)
def test_the_trace_is_the_first_closed_span_stripped(text: str, trace: str) -> None:
    assert extract_trace(text) == trace


@pytest.mark.parametrize("special_think", [True, False])
def test_a_trace_is_found_whether_its_tags_are_special_tokens_or_not(special_think: bool) -> None:
    tokenizer = tiny_tokenizer(special_think=special_think)
    made, _ = ContextViews(tokenizer, "{problem}|{trace}", 1000, chat_template=False).prefixed(
        [rollout("<think>carry</think>2", tokenizer=tokenizer)]
    )
    assert tokenizer.decode(list(made[0].teacher_prefix_ids)) == "1+1?|carry"


def test_a_trace_keeps_its_spaces_before_punctuation() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True  # as some models' tokenizers are set
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    answer = rollout("<think>a , b . c 's</think>2")
    made, _ = ContextViews(tokenizer, "{problem}|{trace}", 1000, chat_template=False).prefixed([answer])
    assert read(made) == ["1+1?|a , b . c 's"]


# -- prefixes ---------------------------------------------------------------------------------------------------------


def test_the_template_holds_the_raw_problem_in_the_chat_template() -> None:
    made, _ = views("Given {problem} and {trace}, in {{braces}}.", chat_template=True).prefixed(
        [rollout("<think>carry {x}</think>2", problem="1{}1 {trace}")]
    )
    assert read(made) == [
        "<|im_start|>user\nGiven 1{}1 {trace} and carry {x}, in {braces}.<|im_end|>\n<|im_start|>assistant\n"
    ]


def test_the_chat_template_gets_its_arguments() -> None:
    made, _ = views("{problem}", chat_template=True, template_kwargs={"enable_thinking": False}).prefixed(
        [rollout("2")]
    )
    assert read(made) == ["<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"]


def test_without_chat_template_the_teacher_reads_the_bare_text() -> None:
    made, _ = views("{problem} + {trace}").prefixed([rollout("<think>t</think>2"), rollout("3", problem="2+1?")])
    assert read(made) == ["1+1? + t", "2+1? + "]


def test_the_answer_is_untouched() -> None:
    given = rollout("<think>t</think>2")
    (made,), _ = views(max_tokens=len(given.response_ids) + 2).prefixed([given])
    assert replace(made, teacher_prefix_ids=()) == given


def test_plain_distillation_reads_the_students_prompt() -> None:
    made, counts = SamePromptViews().prefixed([rollout("2"), rollout("3")])
    assert [r.teacher_prefix_ids for r in made] == [(7, 8), (7, 8)]
    assert (counts.means, counts.totals) == ({}, {})


# -- overflow ---------------------------------------------------------------------------------------------------------

# "1+1?|" and the trace "abc" make a prefix of 8; the answer <think>abc</think>2<|im_end|> has 7 tokens.
ANSWER = "<think>abc</think>2"


@pytest.mark.parametrize(
    ("max_tokens", "policy", "prefix", "cut"),
    [
        (15, "truncate_prefix_only", "1+1?|abc", 0.0),
        (15, "truncate_prefix_from_end", "1+1?|abc", 0.0),
        (14, "truncate_prefix_only", "+1?|abc", 1.0),
        (14, "truncate_prefix_from_end", "1+1?|ab", 1.0),
        (8, "truncate_prefix_only", "c", 1.0),
        (8, "truncate_prefix_from_end", "1", 1.0),
    ],
)
def test_a_prefix_gives_way_to_its_answer(max_tokens: int, policy: Any, prefix: str, cut: float) -> None:
    made, counts = views(max_tokens=max_tokens, overflow=policy).prefixed([rollout(ANSWER)])
    assert read(made) == [prefix]
    assert len(made[0].teacher_prefix_ids) + len(made[0].response_ids) <= max_tokens
    assert counts.means["context_distillation_prefix_truncation_rate"] == (cut, 1.0)
    assert counts.totals["context_distillation_prefix_truncation_count"] == cut


def test_an_answer_that_leaves_no_room_is_left_out() -> None:
    for max_tokens, reason in ((7, "no_prefix_budget"), (6, "too_long_response")):
        made, counts = views(max_tokens=max_tokens).prefixed([rollout(ANSWER)])
        assert made == []
        assert counts.totals == {
            "context_distillation_valid_samples": 0.0,
            "context_distillation_prefix_truncation_count": 0.0,
            "context_distillation_dropped_samples": 1.0,
            "context_distillation_dropped_missing_trace": 0.0,
            "context_distillation_dropped_too_long_response": float(reason == "too_long_response"),
            "context_distillation_dropped_no_prefix_budget": float(reason == "no_prefix_budget"),
        }


def test_an_answer_without_a_trace_is_kept_or_left_out_as_asked() -> None:
    answers = [rollout("2"), rollout("<think></think>2"), rollout("<think>t</think>2")]
    made, counts = views(missing_trace="drop_sample").prefixed(answers)
    assert read(made) == ["1+1?|t"]
    assert counts.totals["context_distillation_dropped_missing_trace"] == 2.0
    assert counts.means["context_distillation_trace_coverage"] == (1.0, 3.0)
    made, counts = views(missing_trace="empty").prefixed(answers)
    assert read(made) == ["1+1?|", "1+1?|", "1+1?|t"]
    assert counts.totals["context_distillation_dropped_samples"] == 0.0


def test_a_template_without_a_trace_misses_none() -> None:
    made, counts = views("{problem}", missing_trace="drop_sample").prefixed([rollout("2")])
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
    made, counts = views(max_tokens=20).prefixed(answers)
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
    }


def test_two_ranks_counts_add_up_to_those_of_one() -> None:
    answers = [rollout(text) for text in ("<think>abc</think>2", "2", "x" * 30, "<think>é</think>3", "4")]
    _, whole = views(max_tokens=12).prefixed(answers)
    parts = [views(max_tokens=12).prefixed(part)[1] for part in (answers[:2], answers[2:], [])]
    for name, (total, count) in whole.means.items():
        pairs = [part.means.get(name, (0.0, 0.0)) for part in parts]
        assert (sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)) == (total, count)
    assert {name: sum(part.totals[name] for part in parts) for name in whole.totals} == whole.totals


def test_a_mean_over_nothing_is_left_out() -> None:
    made, counts = views().prefixed([])
    assert (made, counts.means) == ([], {})
    _, counts = views().prefixed([rollout("2")])
    assert "context_distillation_trace_mean_chars" not in counts.means


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{problem} {hint}",
            r"teacher_prefix_template has the unknown placeholder \{hint\}.*\{problem\} and \{trace\}",
        ),
        ("{problem.text}", r"unknown placeholder \{problem\.text\}"),
        ("{problem} \\boxed{}", r"unknown placeholder \{\}"),
        ("{problem} {", r"has a single \{"),
        ("{trace}", r"has no \{problem\}"),
    ],
)
def test_a_bad_template_is_one_clear_sentence(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        views(template)


def test_a_recipe_chooses_its_views() -> None:
    config = load_config([])
    tokenizer = tiny_tokenizer()
    assert isinstance(teacher_views(config, tokenizer), SamePromptViews)
    context = replace(
        config.distillation.context_distillation, enabled=True, overflow_policy="truncate_prefix_from_end",
        teacher_prefix_template="{problem} {trace}", chat_template=False,
    )  # fmt: skip
    config = replace(
        config,
        distillation=replace(config.distillation, context_distillation=context),
        teacher=replace(config.teacher, max_total_sequence_length=10),
    )
    made, _ = teacher_views(config, tokenizer).prefixed([rollout(ANSWER)])
    assert read(made) == ["1+1"]
    dropping = replace(context, trace_extractor=replace(context.trace_extractor, missing_trace_policy="drop_sample"))
    config = replace(config, distillation=replace(config.distillation, context_distillation=dropping))
    assert teacher_views(config, tokenizer).prefixed([rollout("2")])[0] == []


def test_the_chat_template_gets_the_teachers_arguments_or_else_the_students() -> None:
    config = load_config([])
    context = replace(config.distillation.context_distillation, enabled=True, teacher_prefix_template="{problem}")
    config = replace(config, distillation=replace(config.distillation, context_distillation=context))
    quiet = {"enable_thinking": False}
    for student, teacher, thinks in ((None, None, True), (quiet, None, False), (quiet, {}, True), (None, quiet, False)):
        policy = replace(config.policy, tokenizer=replace(config.policy.tokenizer, chat_template_kwargs=student))
        other = replace(config.teacher, tokenizer=replace(config.teacher.tokenizer, chat_template_kwargs=teacher))
        made, _ = teacher_views(replace(config, policy=policy, teacher=other), tiny_tokenizer()).prefixed(
            [rollout("2")]
        )
        assert ("</think>" not in read(made)[0]) == thinks
