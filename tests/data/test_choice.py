"""Multiple choice: the option that a response chooses, ambiguous responses, and unusable gold answers."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import DatasetConfig
from distill.data.choice import chosen_option, named_option
from distill.data.grading import Grader, check_gold
from distill.errors import UserError
from distill.types import Problem, Prompt
from distill.validation import HeldOut, load_held_out
from distill.validation.golds import warn_of_unusable_golds
from tests.tiny_tokenizer import tiny_tokenizer

GRADE = Grader()
"""Grades choices in this process, so that there is no worker to end."""

CHOSEN = {
    "B": [
        r"\boxed{B}",
        r"so $\boxed{\text{B}}$.",
        r"\boxed{\mathrm{B}}",
        r"The final answer is $\boxed{\text{(B) 12}}$",
        r"\boxed{B. 5 cm}",
        r"\boxed{\text{Option B}}",
        r"$\boxed{\textbf{(B)}\ 42}$",
        r"\boxed{\text{(B)}~42}",
        r"\boxed{\textbf{(B)}\;42}",
        r"\boxed{\textbf{(B) }42}",
        r"\boxed{\mathbf{(B)}\,x+1}",
        r"\boxed{\textbf{(B)}\qquad 42}",
        r"\boxed{(B)\ \frac{1}{2}}",
        r"\boxed{(B)Paris}",
        r"\boxed{B)\ 42}",
        "Answer: B",
        "**Answer:** B",
        "**Answer**: **B**",
        "ANSWER: B",
        "### Final Answer\nB",
        "<answer>B</answer>",
        "The answer is B.",
        "The answer is (b)",
        "answer is b",
        'The answer is "B"',
        "The correct option is: B",
        "The correct answer is option B: Paris",
        "The answer to this question is B",
        "The answer is B because A is wrong.",
        "The answer is: B\n\nExplanation: A is too small.",
        "The best choice is B, not C",
        "Option B is correct.",
        "B is the correct answer",
        "Hence, B.",
        "A is wrong, so B.",
        "So B is correct.",
        "B is correct.",
        "B is correct because A is too small.",
        "A is wrong. I think B is correct",
        "Answer: B is correct because 1+1=2.",
        "Answer: B and here is why",
        "I choose B.",
        "I'd go with option (B).",
        "The answer is not A, it is B.",
        "The answer is not (A) but (B).",
        "The correct answer for this question is B",
        "The answer to this multiple choice question is B",
        "The answer to the problem above is (B).",
        "The answer seems to be B",
        "The correct one is B.",
        "The answer's B.",
        "My final verdict is: [[B]]",
        "[[B]] is better than [A]",
        "Answer: ‘B’",
        "Answer: 'B'.",
        "{'answer': 'B'}",
        '{"answer": "B", "confidence": 1}',
        "B - Paris",
        "Answer: B - Paris",
        "Answer: B – paris",
        "The answer is B (Paris).",
        "The answer is B. increases the rate",
        "Ｂ",
        "Answer: Ⓑ",
        "B is the answer.",
        "B is the correct answer because A is not.",
        "The correct statement is B.",
        "The answer is B Explanation: it is.",
        "Q: 1+1?\nA: B",
        "A: (B) Paris",
        r"Answer: B\\",
        "答案是 B 选项",
        "正确答案是（B）。",
        "故选：B",
        "故选B。",
        "应选（B）",
        "选B",
        "选B项。",
        "选项A错误，选项B正确",
        "答案是B，因为A不对",
        "答案：【B】",
        "答案：B",
        "答案是 B。",
        "(B)",
        "[B]",
        "B.",
        "b",
        "**B**",
        "B. Paris",
        "(B) Paris",
        "B) Paris\n\nIt is the capital.",
        "The answer is (B), (A) is wrong.",
        "A is too small.\nSo it must be (B).",
        "First, answer: A.\nWait.\nAnswer: B",
        r"\boxed{A} no, \boxed{B}",
        r"\boxed{A} hmm, so the answer is B",
        r"The answer is A. \boxed{B}",
        r"\boxed{A} and an open \boxed{C, then: Answer: B",
        "<think>Answer: A</think>Answer: B",
    ],
    "A": [
        *("Answer: A", "So A is correct.", "故选A", "The answer is A because it is.", "\\boxed{A}", "A"),
        *("Answer: A, I think", "(A)"),
    ],
}
NOT_CHOSEN = [
    "",
    "A man walks into a bar",
    "The answer is A man who walks",
    "Answer: I think it is so",
    "I think so",
    "angle A is right",
    "Vitamin C is correct.",
    "Hepatitis B is the correct answer",
    "A: 42",
    "A: Dogs",
    "A is right-angled.",
    "Suppose that A is correct, then we fail.",
    "A is correct. B is correct. C is wrong.",
    "The answer is E. coli bacteria",
    "E. coli",
    "J. K. Rowling",
    "Answer: C. S. Lewis",
    r"\boxed{E. coli}",
    "Answer: B cells",
    "**Answer:** B cells",
    "Answer: B & explain",
    "Answer: D-glucose",
    "Answer: C4 plants",
    "Answer: D.C.",
    "Answer: B's theorem",
    "The answer is D = 5",
    "The answer is I am",
    "The answer is Vitamin B",
    "We choose A so that it holds",
    "So A man walks.",
    "答案是B细胞",
    "答案不是B",
    "答案是A、B",
    "答案是A和B",
    "不选B",
    "选项B不正确",
    "选项A: 5\n选项B: 6",
    "Let f(A) be",
    "The answer is Boston",
    "Answer: K",
    "The answer is not B",
    "Option B is not correct",
    "(B) is incorrect",
    "either (A) or (B)",
    "Answer: A and B",
    "The answer is A or B",
    "The answer is both A and B",
    "Answer: B, C",
    "Answer: (A) and (B)",
    "Answer: A/B",
    r"\boxed{A, B}",
    r"\boxed{A \text{ and } B}",
    r"\boxed{5}",
    r"\boxed{B",
    "A. x\nB. y\nC. z",
    "(A) x\n(B) y\n(C) z",
    "A) x\nB) y\nI am not sure.",
    "A man walked in.\nThat is all.",
    "(A) is wrong.\nThat is all.",
    "The answer is B. \\boxed{5}",
    "<think>The answer is B",
]


@pytest.mark.parametrize(("letter", "response"), [(letter, text) for letter in CHOSEN for text in CHOSEN[letter]])
def test_a_response_chooses_the_option_of_its_last_statement(letter: str, response: str) -> None:
    assert GRADE("choice", response, letter) == "right"
    assert GRADE("choice", response, "C") == "wrong"


@pytest.mark.parametrize("response", NOT_CHOSEN)
def test_a_response_without_exactly_one_option_is_always_wrong(response: str) -> None:
    assert {GRADE("choice", response, gold) for gold in "ABCDEFGHIJ"} == {"wrong"}


@given(st.text(st.sampled_from("ABab (){}\\.:*\n answeroptinbx")))
def test_any_text_chooses_one_option_or_none(text: str) -> None:
    assert chosen_option(text) in (None, *"ABCDEFGHIJ")


REPEATED = ["option letter ", "answer to this ", "selection for the ", "answer is not A, ", "\\boxed{", "answer is "]
REPEATED += ["(A) ", "[[", "' ", "A is ", "选", "not A, ", "\x02", " ", "{"]


@pytest.mark.parametrize("text", REPEATED)
def test_a_repetitive_response_takes_linear_time(text: str) -> None:
    """In linear time ten times the text takes ten times as long; in quadratic time a hundred times."""
    begun = time.process_time()
    chosen_option(text * 1_500)
    short = time.process_time() - begun
    chosen_option(text * 15_000)
    assert time.process_time() - begun - short < 40 * short + 0.5


def test_a_gold_answer_is_a_letter_with_or_without_text() -> None:
    for gold in ("B", " B ", "b", "(B)", "B.", "B)", "B) Paris", "(B) Paris", "B. A man", r"\boxed{B}", "Answer: B"):
        assert named_option(gold) == "B", gold
    for gold in ("0", "1", "", "Paris", "A man", "I am", "AB", "A,B", "(A) or (B)", "A. or B", "K", "True"):
        assert named_option(gold) is None, gold
    assert GRADE("choice", "Answer: B", "1") == "failed"


@pytest.mark.parametrize("gold", ["0", "3"])
def test_a_number_as_gold_option_is_refused(gold: str) -> None:
    """A column of letters may be missing, as in cais/mmlu, and env_name=exact would grade every response as wrong."""
    with pytest.raises(UserError) as caught:
        check_gold("choice", gold, "data.validation")
    assert (caught.value.key, caught.value.value) == ("data.validation.env_name", "choice")
    assert repr(gold) in caught.value.problem
    assert "letters" in caught.value.fix and "exact" not in str(caught.value)


def test_the_grader_grades_choices() -> None:
    with Grader() as grade:
        assert [grade("choice", response, "(B)") for response in ("Answer: B", "Answer: A")] == ["right", "wrong"]


def held_out(path: Path, env_name: str, golds: list[str], output_pattern: str | None = None) -> HeldOut:
    path.write_text("".join(json.dumps({"question": "q", "answer": gold}) + "\n" for gold in golds))
    dataset = DatasetConfig(
        data_path=str(path),
        input_key="question",
        output_key="answer",
        env_name=env_name,
        output_pattern=output_pattern,
    )
    return load_held_out([dataset], tiny_tokenizer(chat_template=None), 100, None, None)


def test_a_gold_answer_that_names_no_option_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        held_out(tmp_path / "a.jsonl", "choice", ["B", "2"])
    assert (caught.value.key, caught.value.value) == ("data.validation.env_name", "choice")
    assert "'2'" in caught.value.problem
    found = held_out(tmp_path / "a.jsonl", "choice", ["so it is\n#### B", "#### C"], "####")
    graded = [(found.grader(prompt), prompt.problem.answer) for prompt in found.prompts]
    assert graded == [("choice", "B"), ("choice", "C")]


def warned(caplog: pytest.LogCaptureFixture, grader: str, golds: list[str]) -> str:
    prompts = tuple(Prompt(i, (1,), Problem("q", gold)) for i, gold in enumerate(golds))
    ids = range(len(prompts))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_unusable_golds(HeldOut(prompts, dict.fromkeys(ids, grader), dict.fromkeys(ids, "set")))
    return caplog.text


def test_gold_answers_that_look_unusable_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    solution = "She has 3 + 4 = <<3+4=7>>7 eggs.\n#### 7"
    for grader in ("math", "exact"):
        text = warned(caplog, grader, [solution] * 120)
        assert "40 of 40" in text and f"env_name={grader}" in text
        assert "set data.validation.output_pattern='####'" in text
    boxed = r"We add both of them up and so we find that the sum is \boxed{7}."
    assert r"output_pattern='\\boxed\{(.*)\}'" in warned(caplog, "math", [boxed, "7"] * 2 + [boxed])
    assert "data.validation.output_key" in warned(caplog, "exact", ["line\nline"])


def test_usable_gold_answers_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert warned(caplog, "math", ["7", "1,234", "$18", "-3.5", "25\\%"]) == ""
    assert warned(caplog, "exact", ["Paris", "two words", " 7 "]) == ""
    assert warned(caplog, "choice", ["B"]) == warned(caplog, "regex", ["^a\n"]) == ""
    assert warned(caplog, "math", [r"\frac{1}{2}", r"x^2 + 1", r"\text{Paris}", "(1, 2)"]) == ""
