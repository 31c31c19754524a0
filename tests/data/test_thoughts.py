"""Prompts that end inside an open think block: detection, traces, metrics and grading."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import (
    ContextDistillationConfig,
    DatasetConfig,
    StaticTraceConfig,
    TraceExtractorConfig,
    load_config,
)
from distill.data.grading import THINK_TAGS, Grader, final_part
from distill.data.prompts import load_prompts
from distill.data.teacher_prefix import ContextPrefixes
from distill.data.thoughts import extract_column_trace, extract_trace, inside_thoughts
from distill.errors import UserError
from distill.types import Problem, Prompt, Rollout, Sampling
from distill.validation import HeldOut, load_held_out
from tests.tiny_tokenizer import CHATML, tiny_tokenizer
from tests.validation.test_validation import Engine, validation

BODY = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
START = "<|im_start|>assistant\n"
THINKING_2507 = BODY + "{% if add_generation_prompt %}" + START + "<think>\n{% endif %}"
"""Ends like the template of Qwen3-4B-Thinking-2507."""
R1_DISTILL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<|User|>{{ message['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\\n{% endif %}"
)
"""Ends like the template of DeepSeek-R1-Distill-Qwen."""
ALWAYS = BODY + START + "<think>\n"
"""Ignores add_generation_prompt."""
NO_THINK = BODY + START + "{% if '/no_think' in messages[-1]['content'] %}<think>\n\n</think>\n\n{% else %}<think>\n"
PER_PROMPT = NO_THINK + "{% endif %}"
TRAINING_END = BODY + "{% if add_generation_prompt %}" + START + "<think>\n{% else %}<|endoftext|>{% endif %}"
"""Ends a chat for training with another text than a chat for generation."""
HINT = BODY + "Begin with <think>.{% if add_generation_prompt %}" + START + "{% endif %}"
"""Mentions the tag in its own text and opens no think block."""
BUDGET = BODY + "{% if add_generation_prompt %}" + START + "<think>Budget: 512 tokens.{% endif %}"
"""Writes text into the think block that it opens."""
EXTRACTOR = TraceExtractorConfig()
MISTRAL = ("[THINK]", "[/THINK]")


def jsonl(path: Path, *problems: str, **columns: str) -> DatasetConfig:
    path.write_text("".join(json.dumps({"q": problem, "a": "5", **columns}) + "\n" for problem in problems))
    return DatasetConfig(data_path=str(path), input_key="q", output_key="a", env_name="exact")


def response(text: str, tokenizer: Any, inside: bool, finish: Any = "length", **columns: str) -> Rollout:
    ids = tuple(tokenizer(text)["input_ids"])
    return Rollout(Prompt(0, (1,), Problem("1+1?", columns=columns), inside), 0, ids, (0.0,) * len(ids), finish, 0)


def prefixes(
    tokenizer: Any, template: str = "{problem}|{trace}", window: int = 1000, **context: Any
) -> ContextPrefixes:
    given = {"chat_template": False, **context}
    return ContextPrefixes(
        tokenizer, ContextDistillationConfig(True, teacher_prefix_template=template, **given), window
    )


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special_think", [True, False])
@pytest.mark.parametrize(
    ("template", "problem", "inside"),
    [
        (THINKING_2507, "1+1?", True),
        (R1_DISTILL, "1+1?", True),
        (BUDGET, "1+1?", True),
        (CHATML, "1+1?", False),
        (HINT, "1+1?", False),
        # Tags in the user's text open and close nothing.
        (CHATML, "What does <think> mean?", False),
        (CHATML, "What is <think>", False),
        (CHATML, "a </think> b <think>", False),
        (R1_DISTILL, "What does <think> mean?", True),
        (R1_DISTILL, "<think>", True),
        (THINKING_2507, "a <think> b </think>", True),
        (ALWAYS, "1+1?", True),
        (ALWAYS, "What is <think>", True),
        (TRAINING_END, "What is <think>", True),
        (BODY + START, "What is <think>", False),
        ("{{ messages[-1]['content'] }}", "What is <think>", False),  # the message is the last text
        (PER_PROMPT, "1+1? /no_think", False),
        (PER_PROMPT, "<think> /no_think", False),
        (PER_PROMPT, "1+1?", True),
        # A response continues bare text.
        (None, "User: 1+1? Assistant: <think>\n", True),
        (None, "What does <think> mean?", False),
        (None, "1+1?", False),
    ],
)
def test_a_prompt_ends_inside_a_think_block_if_its_generation_prompt_opens_one(
    tmp_path: Path, template: str | None, problem: str, inside: bool, special_think: bool
) -> None:
    tokenizer = tiny_tokenizer(template, special_think)
    dataset = jsonl(tmp_path / "a.jsonl", problem)
    (prompt,) = load_prompts([dataset], tokenizer, 1000)
    assert prompt.inside_thought is inside
    (held_out,) = load_held_out([dataset], tokenizer, 1000, None, None).prompts
    assert held_out.inside_thought is inside


def test_an_empty_think_block_is_closed(tmp_path: Path) -> None:
    dataset = jsonl(tmp_path / "a.jsonl", "1+1?")
    (prompt,) = load_prompts([dataset], tiny_tokenizer(), 1000, {"enable_thinking": False})
    assert not prompt.inside_thought


def test_repeated_and_skipped_prompts_do_not_change_the_state_of_other_prompts(tmp_path: Path) -> None:
    dataset = replace(jsonl(tmp_path / "a.jsonl", "1", "/no_think", "x" * 200, "2 /no_think", "3"), repeat=2)
    tokenizer = tiny_tokenizer(PER_PROMPT)
    prompts = load_prompts([dataset, jsonl(tmp_path / "b.jsonl", "/no_think", "4")], tokenizer, 100)
    assert prompts.skipped == 2
    read = [("no_think" not in prompt.problem.text, prompt.inside_thought) for prompt in prompts]
    assert len(read) == 10 and all(wanted is found for wanted, found in read)


def test_a_prompt_file_may_open_the_think_block_without_a_chat_template(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("User: {}\nAssistant: <think>\n")
    dataset = replace(jsonl(tmp_path / "a.jsonl", "1+1?"), prompt_file=str(tmp_path / "p.txt"))
    for template, inside in ((None, True), (CHATML, False), (THINKING_2507, True)):
        (prompt,) = load_prompts([dataset], tiny_tokenizer(template), 1000)
        assert prompt.inside_thought is inside, template


def test_configured_think_tags_are_recognised_and_other_tags_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    chats = [[{"role": "user", "content": "1+1?"}]]
    for opening, closing in (
        MISTRAL,
        ("<seed:think>", "</seed:think>"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ):
        tokenizer = tiny_tokenizer(THINKING_2507.replace("<think>", opening), extra=(opening, closing))
        ids = [tokenizer(tokenizer.apply_chat_template(chats[0], tokenize=False, add_generation_prompt=True)).input_ids]
        with caplog.at_level(logging.WARNING):
            assert inside_thoughts(tokenizer, chats, ids, (opening, closing)) == b"\1" and not caplog.messages
            assert inside_thoughts(tokenizer, chats, ids) == b"\0"
        (warning,) = caplog.messages
        assert f" {opening}," in warning and "trace_extractor.think_tags" in warning
        caplog.clear()


def test_a_tag_at_the_end_of_a_message_gives_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer(BODY + START)
    chat = [{"role": "user", "content": "What is [THINK]"}]
    ids = [tokenizer(tokenizer.apply_chat_template(chat, tokenize=False)).input_ids]
    assert inside_thoughts(tokenizer, [chat], ids) == b"\0" and not caplog.messages


# -- traces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "to_end", "ignore"),
    [
        ("carry</think>2", "carry", "carry"),
        ("\ncarry\n</think>\n\n2", "carry", "carry"),
        ("never closed", "never closed", ""),
        ("a</think>b</think>c", "a", "a"),  # a closing tag outside of a span is ignored
        ("a<think>b</think>c", "a<think>b", "a<think>b"),  # an opening tag inside a span is text
        ("</think>2", "", ""),
        ("</think><think>b</think>", "", ""),  # first of two spans
    ],
)
def test_a_response_continues_the_think_block_of_its_prompt(text: str, to_end: str, ignore: str) -> None:
    assert extract_trace(text, EXTRACTOR, inside_thought=True) == to_end
    assert extract_trace(text, replace(EXTRACTOR, unclosed_span="ignore"), inside_thought=True) == ignore


def test_the_think_block_of_the_prompt_can_be_selected() -> None:
    text = "a</think>b<think>cd</think><think>e</think>"
    found = [extract_trace(text, replace(EXTRACTOR, selection=s), True) for s in ("first", "last", "longest")]
    assert found == ["a", "e", "cd"]
    assert extract_trace("a</think>b", replace(EXTRACTOR, type="full_text"), True) == "a</think>b"


PIECES = st.lists(st.sampled_from([*THINK_TAGS, "a", " b", "\n", "\\boxed{5}", *MISTRAL]), max_size=8).map("".join)


@given(PIECES, st.sampled_from(["first", "last", "longest"]), st.sampled_from(["to_end", "ignore"]))
@settings(max_examples=100, deadline=None)
def test_a_think_block_opened_by_the_prompt_equals_one_opened_by_the_response(
    text: str, selection: Any, unclosed: Any
) -> None:
    for tags in (THINK_TAGS, MISTRAL):
        extractor = TraceExtractorConfig(think_tags=tags, selection=selection, unclosed_span=unclosed)
        assert extract_trace(text, extractor, True) == extract_trace(tags[0] + text, extractor)
        assert final_part(text, tags, True) == final_part(tags[0] + text, tags)


@pytest.mark.parametrize(
    ("text", "trace"),
    [
        ("thoughts</think>answer", "thoughts"),
        ("thoughts</think>answer</think>more", "thoughts"),
        ("thoughts</think>x<think>y</think>", "thoughts"),
        ("<think>a</think>b</think>", "a"),
        ("x<think>a</think>b", "a"),
        (" </think><think>a</think>", "a"),
        ("</think>answer", ""),
        ("answer alone", ""),
    ],
)
def test_a_column_whose_first_tag_is_a_closing_tag_begins_inside_a_think_block(text: str, trace: str) -> None:
    assert extract_column_trace(text, EXTRACTOR) == trace
    tokenizer = tiny_tokenizer()
    static: dict[str, Any] = {"trace_source": "static_dataset", "static_trace": StaticTraceConfig("s")}
    for inside in (True, False):  # the state of the student's prompt is not the column's
        made, _ = prefixes(tokenizer, **static).add([response("x", tokenizer, inside, s=text)])
        assert tokenizer.decode(list(made[0].teacher_prefix_ids)) == f"1+1?|{trace}"


@pytest.mark.parametrize("special_think", [True, False])
def test_trace_metrics_count_responses_with_only_the_closing_tag(special_think: bool) -> None:
    tokenizer = tiny_tokenizer(THINKING_2507, special_think)
    texts = ["carry</think>2", "abc"]
    for inside, coverage in ((True, 1.0), (False, 0.0)):
        made, counts = prefixes(tokenizer).add([response(text, tokenizer, inside) for text in texts])
        traced, all_of_them = counts.means["context_distillation_trace_coverage"]
        assert traced == coverage * all_of_them
        read = [tokenizer.decode(list(r.teacher_prefix_ids)) for r in made]
        assert read == (["1+1?|carry", "1+1?|abc"] if inside else ["1+1?|", "1+1?|"])
        if inside:
            assert counts.means["context_distillation_trace_mean_tokens"] == (8.0, 2.0)  # carry, abc


def test_traces_of_other_tags_are_found_in_responses() -> None:
    tokenizer = tiny_tokenizer(extra=MISTRAL)
    extractor = TraceExtractorConfig(think_tags=MISTRAL)
    responses = [response("[THINK]a.b[/THINK]2", tokenizer, False), response("c<think>[/THINK]2", tokenizer, True)]
    made, _ = prefixes(tokenizer, trace_extractor=extractor).add(responses)
    assert [tokenizer.decode(list(r.teacher_prefix_ids)) for r in made] == ["1+1?|a.b", "1+1?|c<think>"]


def test_the_teachers_prefix_has_its_own_think_state() -> None:
    tokenizer = tiny_tokenizer(THINKING_2507)
    responses = [response("<think>a</think>2", tokenizer, False), response("b", tokenizer, True)]
    for context, inside in (
        ({"chat_template": True}, True),
        ({"chat_template": False}, False),
        ({"chat_template": False, "template": "{problem} {trace} <think>\n"}, True),
        ({"chat_template": True, "window": 26, "overflow_policy": "truncate_prefix_from_end"}, False),
    ):
        made, _ = prefixes(tokenizer, **context).add(responses)
        assert [view.teacher_inside_thought for view in made] == [inside, inside], context


# -- grading ----------------------------------------------------------------------------------------------------------

CUT = r"Maybe \boxed{5}? No wait"


def test_a_response_that_ends_inside_a_think_block_is_wrong() -> None:
    with Grader() as grade:
        assert grade("math", CUT, "5", inside_thought=True) == "wrong"
        assert grade("math", CUT, "5") == "right", "no thought was opened"
        assert grade("math", CUT + r"</think> \boxed{6}", "6", inside_thought=True) == "right"
        assert grade("math", CUT + r"</think> \boxed{6}", "5", inside_thought=True) == "wrong"
        assert grade("regex", "42", "42", inside_thought=True) == "wrong"
        assert grade("exact", "C", "C", inside_thought=True) == "wrong"
        assert grade("exact", "B?</think>C", "C", inside_thought=True) == "right"
        assert grade("exact", "[THINK]B?[/THINK]use <think>", "use <think>", think_tags=MISTRAL) == "right"
        assert grade("regex", "[THINK]B?[/THINK]use <think>", "use <think>", think_tags=MISTRAL) == "right"
        assert grade("regex", "[THINK]B?", "B", think_tags=MISTRAL) == "wrong"


# -- the setting ------------------------------------------------------------------------------------------------------

KEY = "distillation.context_distillation.trace_extractor.think_tags"
RECIPE = "--config=recipes/distillation_math.yaml"


def test_the_default_tags_of_traces_and_grading_are_equal() -> None:
    assert EXTRACTOR.think_tags == THINK_TAGS
    config = load_config([RECIPE, f"{KEY}=['[THINK]', '[/THINK]']"])
    assert config.distillation.context_distillation.trace_extractor.think_tags == MISTRAL


@pytest.mark.parametrize(
    "value",
    ["[]", "['<think>']", "[a, b, c]", "[a, a]", "['', '</think>']", "[' ', b]", "[think, /think]", "null", "x"],
)
def test_think_tags_that_are_not_a_pair_are_refused(value: str) -> None:
    with pytest.raises(UserError, match=rf"^{KEY}\S*=.*: set it to "):
        load_config([RECIPE, f"{KEY}={value}"])


# -- validation -------------------------------------------------------------------------------------------------------


def test_validation_grades_each_response_by_the_prompt_that_was_read(tmp_path: Path) -> None:
    """The plain prompt opens a think block and the context does not; then the reverse."""
    tokenizer = tiny_tokenizer()

    class OneResponse(Engine):
        def generate(self, prompts: Any, *_: Any, **__: Any) -> list[Rollout]:
            ids = tuple(tokenizer("5")["input_ids"])
            return [Rollout(p, 0, ids, (0.0,), "length", 0) for p in prompts]

    for inside in (True, False):
        template = "'Hint: {problem}'" if inside else "'Hint: {problem}<think>'"
        context = "distillation.context_distillation"
        keys = [f"{context}.enabled=true", f"{context}.chat_template=false", "distillation.val_at_start=true"]
        held_out = HeldOut((Prompt(0, (5,), Problem("1", "5", "s"), inside),), {0: "exact"}, {0: "s"})
        parts = {
            "held_out": held_out,
            "engine": OneResponse(),
            "decode": tokenizer.decode,
            "sampling": Sampling(1, 8, ()),
        }
        overrides = [*keys, f"{context}.teacher_prefix_template={template}"]
        teacher_prefixes = prefixes(tokenizer, template.strip("'"))
        found = validation(tmp_path, *overrides, **parts, teacher_prefixes=teacher_prefixes)
        responses = found.generate(0)
        assert responses is not None and responses.in_context is not None
        plain, in_context = (found._verdicts(r)[0, 0] for r in (responses.rollouts, responses.in_context.rollouts))
        assert (plain, in_context) == (("wrong", "right") if inside else ("right", "wrong"))
    tags = f"{context}.trace_extractor.think_tags=[t, /u]"
    found = validation(
        tmp_path, *overrides, tags, **{**parts, "decode": lambda ids: "maybe 4/u5"}, teacher_prefixes=teacher_prefixes
    )
    assert responses is not None and found._verdicts(responses.rollouts)[0, 0] == "right", "the recipe's tags"


def test_many_unclosed_tags_take_linear_time() -> None:
    """Quadratic time would be minutes."""
    extractor = replace(EXTRACTOR, unclosed_span="ignore")
    text = "<think>ab</think>" + "<think> and so on, " * 100_000
    begun = time.process_time()
    assert extract_trace(text, extractor) == "ab"
    assert time.process_time() - begun < 20
