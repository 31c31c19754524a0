"""Placeholders and braces of prompt files and teacher templates."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import load_config
from distill.config.template import Template, teacher_template
from distill.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "recipes/distillation_math.yaml")
KEY = "distillation.context_distillation.teacher_prefix_template"


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{problem} in \\boxed{}", "1+1? in \\boxed{}"),
        ("\\frac{\\sqrt{2}}{3} {problem}", "\\frac{\\sqrt{2}}{3} 1+1?"),
        ("\\frac{{{problem}}{2}}", "\\frac{{1+1?}{2}}"),
        ('{"a": {"b": 1}}\n{problem}', '{"a": {"b": 1}}\n1+1?'),
        ("\\boxed{ {problem} } {", "\\boxed{ 1+1? } {"),
        ("{{problem}} {problem}} {{{problem}}}", "{problem} 1+1?} {1+1?}"),
        ("{ {{x}} } {problem} }", "{ {x} } 1+1? }"),
        ("{problem} {0} {a b} { trace }", "1+1? {0} {a b} { trace }"),
        ("\\frac{\\sqrt{2}}{3} \\text{{cm}} {problem}", "\\frac{\\sqrt{2}}{3} \\text{cm} 1+1?"),
        ('{{"a": {{"b": "{problem}"}}}}', '{"a": {"b": "1+1?"}}'),
        ("{problem} }} {{", "1+1? }} {{"),
        ("{problem} {{{{problem}}}} {{{{x}}}}", "1+1? {{problem}} {{x}}"),
        ("{{{{{problem}}}}} {{{{{{x}}}}}}", "{{1+1?}} {{{x}}}"),
        ("{problem} {{{{a}} {{b}}}}", "1+1? {{a} {b}}"),
    ],
)
def test_braces_around_anything_but_a_word_are_literal_and_doubled_braces_become_single(
    template: str, filled: str
) -> None:
    assert teacher_template(template).fill({"problem": "1+1?", "trace": ""}) == filled
    load_config(["--config", RECIPE, f"{KEY}={template}"])


@pytest.mark.parametrize(
    ("template", "word", "line"),
    [
        ("{problem} {hint:>9}", "{hint:>9}", 1),
        ("{problem.text}", "{problem.text}", 1),
        ("{problem}\n{problem.__class__}", "{problem.__class__}", 2),
        ("{problem[0]}", "{problem[0]}", 1),
        ("{problem} {trace!r}", "{trace!r}", 1),
        ("{problem}\n\n{trace:>9}", "{trace:>9}", 3),
        ("{problem} \\text{trace.x}", "{trace.x}", 1),
        ("{problem} {{{x!r}}}", "{x!r}", 1),
    ],
)
def test_an_unknown_word_in_braces_is_refused_with_its_line(template: str, word: str, line: int) -> None:
    with pytest.raises(UserError) as caught:
        load_config(["--config", RECIPE, f"{KEY}={template}"])
    assert (caught.value.key, caught.value.value) == (KEY, word)
    assert f"line {line}" in caught.value.problem
    assert f"{{{word}}}" in caught.value.fix  # doubled braces are literal


@pytest.mark.parametrize(
    ("template", "columns"),
    [
        ("{problem} {hint}", ["hint"]),
        ("{hint} {hint}", ["hint"]),
        ("{problem} \\text{answer}", ["answer"]),
        ("{problem} {{{x}}}", ["x"]),
        ("{problem} {{x}}", []),
        ("{info.key.0} {_a1}", ["info.key.0", "_a1"]),
        ("{problems} {traces}", ["problems", "traces"]),
    ],
)
def test_other_words_in_braces_are_columns(template: str, columns: list[str]) -> None:
    found = teacher_template(template)
    assert [name for name in found.names if name not in ("problem", "trace")] == columns
    assert found.fill(dict.fromkeys(["problem", *columns], "v")).count("v") >= len(columns)
    load_config(["--config", RECIPE, f"{KEY}={template}"])


@pytest.mark.parametrize("template", ["{problem", "{trace}", "Always write in French.", "{{problem}}"])
def test_a_teacher_template_without_the_problem_is_refused(template: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(["--config", RECIPE, f"{KEY}={template}"])
    assert (caught.value.key, caught.value.value) == (KEY, template)


def test_a_prompt_file_has_one_placeholder_without_a_name() -> None:
    text = (ROOT / "prompts" / "cot.txt").read_text()
    problem = "Is {x} in \\frac{1}{2} or {{}}?"
    template = Template(text, ("",), "prompt_file", "cot.txt")
    assert template.count("") == 1
    assert template.fill({"": problem}) == text.format(problem)
    with pytest.raises(UserError) as caught:
        Template("{}\n{problem}", ("",), "data.train.prompt_file", "cot.txt")
    assert (caught.value.key, caught.value.value) == ("data.train.prompt_file", "cot.txt")
    assert caught.value.problem.startswith("data.train.prompt_file=cot.txt ")


PIECES = ["{problem}", "{trace}", "{{", "}}", "a", "\n", "problem", ".x", " "]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=10).map("".join))
def test_balanced_templates_of_str_format_have_the_same_result(text: str) -> None:
    values = {"problem": "p{trace}", "trace": "t}{"}
    literal = "".join(piece for piece, *_ in string.Formatter().parse(text))
    depth = [literal[:end].count("{") - literal[:end].count("}") for end in range(len(literal) + 1)]
    if min(depth) == depth[-1] == 0:
        assert Template(text, ("problem", "trace"), KEY).fill(values) == text.format(**values)


LITERAL = st.recursive(st.sampled_from(["a b", "\\x", "1", ""]), lambda inner: inner.map(lambda text: f"{{ {text}}}"))


@settings(max_examples=200, deadline=None)
@given(st.lists(LITERAL, max_size=6).map("".join))
def test_nested_single_braces_are_literal(text: str) -> None:
    assert teacher_template(f"{text}{{problem}}{text}").fill({"problem": "p"}) == f"{text}p{text}"


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="{}ab\n %", max_size=20))
def test_braces_in_values_have_no_meaning(value: str) -> None:
    assert teacher_template("{{{problem}}} {trace}").fill({"problem": value, "trace": value}) == f"{{{value}}} {value}"
